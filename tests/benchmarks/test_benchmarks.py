"""The benchmarks measure what they say: statistics, turns, memory, parity, records, the command."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases, machine, measure, memory, ops, parity, records, run
from benchmarks.caption_lengths import histogram
from benchmarks.cases import CASES, Case
from benchmarks.contender import BOTH, FORWARD, PHASES, PRODUCT, Contender

CPU = torch.device("cpu")
# Names and order as the protocol has them; a file of results is read by them.
PROTOCOL = (
    "op case direction dtype method backend phase I C R N D median_ms p20_ms p80_ms flops tflops eta rho "
    "speedup_vs_loop saved_mib peak_mib device torch commit"
)
FIELDS = PROTOCOL.split()
OP = "cross_attention_scores"
FLOORS = ("reference", "eager", "native")
ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)


def make(
    method: str, case: Case = CASES["tiny"], direction: str = "t2i", dtype: torch.dtype = torch.float32
) -> Contender:
    found = ops.load(OP).workload(case, direction, dtype, CPU).contender(method)
    if isinstance(found, str):
        pytest.skip(found)
    return found


# cases


def test_word_counts_are_real_lengths_longest_first() -> None:
    for captions in (1, 7, 32, 128, 4096):
        counts = cases.word_counts(captions)
        assert len(counts) == captions
        assert counts == sorted(counts, reverse=True)
        assert set(counts) <= set(cases.caption_lengths())
    lengths = cases.caption_lengths()
    mean = sum(words * captions for words, captions in lengths.items()) / sum(lengths.values())
    assert sum(cases.word_counts(128)) / 128 == pytest.approx(mean, rel=0.01)
    assert max(cases.word_counts(8192)) == max(lengths)


def test_the_histogram_counts_words_with_start_and_end() -> None:
    assert histogram(["A dog runs .", "Two dogs ran .", "Dogs don't !"]) == {6: 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_unit_vectors_padded_with_zeros_and_correlated(dtype: torch.dtype) -> None:
    workload: Any = ops.load(OP).workload(CASES["tiny"], "t2i", dtype, CPU)
    regions, words = (leaf.detach().float() for leaf in workload.leaves)
    norms = words.norm(dim=-1)
    for c, count in enumerate(CASES["tiny"].word_counts):
        assert torch.allclose(norms[c, :count], torch.ones(count), atol=1e-2)
        assert not norms[c, count:].any()
    assert torch.allclose(regions.norm(dim=-1), torch.ones(8, 5), atol=1e-2)
    products = torch.einsum("ird,cwd->ic", regions, words) / torch.tensor(CASES["tiny"].word_counts) / 5
    others = products[~torch.eye(8, dtype=torch.bool)]
    assert products.diagonal().mean() > others.mean() + 0.1  # an image's own caption
    assert others.mean() > 0.1  # the direction that all share


def test_flops_count_no_padding() -> None:
    case = CASES["tiny"]
    workload = ops.load(OP).workload(case, "both", torch.float32, CPU)
    assert workload.flops(FORWARD) == 2 * 8 * 5 * sum(case.word_counts) * 64
    assert workload.flops(BOTH) == 4 * workload.flops(FORWARD)


# time


def test_summary_is_median_and_percentiles() -> None:
    found = measure.summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (found.median, found.p20, found.p80) == (3.5, 2.0, 5.0)
    assert measure.summarize([7.0]) == measure.Summary(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        measure.summarize([])


def test_ratios_are_formed_within_rounds() -> None:
    # The machine is ten times slower in the second half: medians of times would mix two machines.
    slow = [1.0, 1.0, 10.0, 10.0]
    assert measure.ratio([3 * t for t in slow], slow).median == 3.0
    with pytest.raises(ValueError, match="longer"):
        measure.ratio([1.0], [1.0, 2.0])


class FakeTimer:
    """A clock that the calls themselves move."""

    def __init__(self) -> None:
        self.now = 0.0

    def start(self, call: measure.Call) -> Callable[[], float]:
        before = self.now
        call()
        took = self.now - before
        return lambda: took


def test_methods_take_turns() -> None:
    timer, order = FakeTimer(), []

    def method(name: str, milliseconds: float) -> measure.Call:
        def call() -> None:
            order.append(name)
            timer.now += milliseconds

        return call

    calls = {"a": method("a", 1.0), "b": method("b", 2.0), "c": method("c", 3.0)}
    times = measure.interleave(calls, 4, timer)
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4, "c": [3.0] * 4}
    # 6 ms a round
    assert measure.rounds_within(calls, 0.060, timer) == 10
    assert measure.rounds_within(calls, 1e-4, timer) == measure.FEWEST_ROUNDS
    assert measure.rounds_within(calls, 100.0, timer) == measure.MOST_ROUNDS


def test_cpu_timer_times_the_call_alone() -> None:
    timer = measure.CpuTimer()
    assert timer.start(lambda: time.sleep(0.05))() >= 50
    # Writing the flush buffer takes longer than this.
    assert min(timer.start(lambda: None)() for _ in range(5)) < 0.5


def test_share_of_the_cores() -> None:
    torch.set_num_threads(1)

    def work() -> str:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
        return "done"

    def work_half_the_time() -> None:
        began = time.perf_counter()
        work()
        time.sleep(time.perf_counter() - began)

    alone, waiting = measure.CoreShare(work), measure.CoreShare(work_half_the_time)
    assert [alone() for _ in range(3)] == ["done"] * 3
    assert len(alone.shares) == 3
    assert 0 < max(alone.shares) <= 1.01  # 1 on a machine of its own
    for _ in range(3):
        waiting()
    assert max(waiting.shares) <= 0.51
    torch.set_num_threads(4)  # work() uses one of them
    alone()
    assert alone.shares[-1] <= 0.26


# memory


def test_saved_bytes_count_every_storage_once() -> None:
    x, y = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp()) == 4000  # its result
    assert memory.saved_bytes(lambda: x * y) == 8000
    assert memory.saved_bytes(lambda: (x * y) * (x[:500] * y[:500]).sum()) == 8000 + 4000 + 4
    assert memory.saved_bytes(lambda: x + y) == 0


@ON_LINUX
def test_peak_sees_what_was_allocated_for_a_while() -> None:
    def use_and_free() -> None:
        bytearray(b"x" * (64 * memory.MIB))  # twice: the argument, and the copy

    for _ in range(2):
        assert 127 * memory.MIB <= memory.resident_rise(use_and_free) < 140 * memory.MIB
    assert memory.resident_rise(lambda: torch.ones(32 * memory.MIB // 4)) > 31 * memory.MIB
    assert memory.resident_rise(lambda: None) < memory.MIB


@ON_LINUX
def test_peak_of_a_method_is_measured_beyond_its_results() -> None:
    # Gradients of 9 MiB, padded products of 8.4 MiB; the eager epilogue keeps several arrays of that size.
    case = Case("flat", 64, 64, 36, 512)
    peaks = {}
    for method in (PRODUCT, "eager"):
        subject = memory.Subject(OP, case, "t2i", "float32", method, BOTH)
        peaks[method] = memory.peak_bytes(subject, make(method, case))
    assert peaks[PRODUCT] is not None
    assert peaks["eager"] is not None
    assert peaks[PRODUCT] < 8 * memory.MIB  # its results are there before; what remains is the library's own
    assert 16 * memory.MIB < peaks["eager"] < 256 * memory.MIB


@ON_LINUX
def test_what_goes_wrong_in_the_other_process_is_told() -> None:
    subject = memory.Subject(OP, CASES["tiny"], "t2i", "float32", "no_such_floor", FORWARD)
    with pytest.raises(RuntimeError, match=r"peak memory of no_such_floor, tiny, forward: .*no no_such_floor floor"):
        memory.peak_bytes(subject, make(PRODUCT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("floor", ["eager", "native"])
def test_scores_keep_their_inputs_and_little_else(floor: str, direction: str, dtype: torch.dtype) -> None:
    case = Case("flat", 24, 24, 36, 256)
    contender = make(floor, case, direction, dtype)
    assert contender.graph is not None
    inputs = (24 * 36 + 24 * max(case.word_counts)) * 256 * dtype.itemsize
    assert inputs <= memory.saved_bytes(contender.graph) <= inputs + 2 * (24 * 24 * 4)


# parity


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("floor", FLOORS)
def test_every_floor_passes_parity(floor: str, direction: str) -> None:
    workload = ops.load(OP).workload(CASES["tiny"], direction, torch.float32, CPU)
    for phase in PHASES:
        outputs = make(floor, direction=direction).calls[phase]()
        assert len(outputs) == (1 if phase == FORWARD else 3)
        assert parity.assert_parity(floor, outputs, workload.truth(), workload.tolerance) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["t2i", "both"])
def test_the_compiled_baseline_passes_parity(direction: str, fresh_compiler: None) -> None:
    workload = ops.load(OP).workload(CASES["tiny"], direction, torch.float32, CPU)
    outputs = make("compile", direction=direction).calls[BOTH]()
    parity.assert_parity("compile", outputs, workload.truth(), workload.tolerance)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda scores, regions, words: (scores + 1e-4, regions, words), "scores of some images are off by"),
        (lambda scores, regions, words: (scores, regions * 1.001, words), "gradients of regions are off by"),
        (lambda scores, regions, words: (scores, regions, words.roll(1, 0)), "gradients of words are off by"),
        (lambda scores, regions, words: (scores, regions, words * torch.nan), "off by nan"),
        (lambda scores, regions, words: (scores[:, :1], regions, words), "the definition has"),
    ],
)
def test_parity_fires(wrong: Callable[..., Any], message: str) -> None:
    workload = ops.load(OP).workload(CASES["tiny"], "t2i", torch.float32, CPU)
    outputs = wrong(*make("eager").calls[BOTH]())
    with pytest.raises(parity.ParityError, match=f"^eager: .*{message}"):
        parity.assert_parity("eager", outputs, workload.truth(), workload.tolerance)


# records


def record(**changes: Any) -> records.Record:
    numbers = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "tflops", "rho", "speedup_vs_loop", "saved_mib"), 1.5)
    letters = dict.fromkeys(("I", "C", "R", "N", "D", "flops"), 8)
    names = {name: name for name in FIELDS if name not in {**numbers, **letters, "eta": 0, "peak_mib": 0}}
    return records.Record(**{**names, **letters, **numbers, "eta": None, "peak_mib": None, **changes})


def test_records_have_the_fields_of_the_protocol() -> None:
    assert [field.name for field in dataclasses.fields(records.Record)] == FIELDS


def test_records_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "machine" / "results.json"
    written = [record(), record(method="native", eta=0.7)]
    records.write(written, path)
    assert records.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not JSON"),
        ("{}", "must hold a list"),
        ("[3]", "record 0 lacks"),
        (json.dumps([{**dataclasses.asdict(record()), "speed": 1}]), "record 0 .*should not have: speed"),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_folder_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in {
        "NVIDIA H200": "h200",
        "AMD EPYC": "amd-epyc",
        "Intel(R) Xeon(R) w5": "intel-r-xeon-r-w5",
    }.items():
        monkeypatch.setattr(machine, "model_name", lambda _, name=name: name)
        assert machine.slug(CPU) == folder


def test_fast_bfloat16_is_a_processor_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, fast in {
        "fma avx512f avx512_bf16": True,
        "amx_tile amx_bf16": True,
        "avx2 avx512f": False,
        "": False,
    }.items():
        monkeypatch.setattr(machine, "_cpuinfo", lambda _, flags=flags: flags)
        assert machine.has_fast_bfloat16() is fast


# the command

FAST = ["--device", "cpu", "--case", "tiny", "--threads", "1", "--seconds", "0.01", "--dtype", "float32"]
WITHOUT_COMPILER = [f"--method={name}" for name in (PRODUCT, *FLOORS, "triton")]


def test_run_prints_a_table_and_writes_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    args = [*FAST, "--direction", "t2i", *WITHOUT_COMPILER, "--no-peak", "--json", str(path)]
    assert run.main(args) == 0
    told = capsys.readouterr().out
    found = {(r.method, r.phase): r for r in records.read(path)}
    ran = [name for name in (PRODUCT, *FLOORS) if f"{name}, float32: left out" not in told]
    assert list(found) == [(method, phase) for phase in PHASES for method in ran]
    for (method, phase), r in found.items():
        assert f"\n{method} " in told
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert (r.eta, r.peak_mib) == (None, None)
        assert r.tflops == pytest.approx(r.flops / r.median_ms / 1e9, rel=1e-3)
        assert (r.saved_mib is None) == (method == PRODUCT or phase == FORWARD)
        assert r.device.endswith(", 1 thread")
    assert found[PRODUCT, BOTH].rho == 1
    assert found["reference", BOTH].speedup_vs_loop == 1
    assert "triton, float32: left out: this version has no triton floor" in told


def test_run_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from itm_kernels.eager import cross_attention_scores as eager

    right = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *a, **k: tuple(g * 1.01 for g in right(*a, **k)))
    assert run.main([*FAST, "--direction", "i2t", "--method", "eager", "--no-peak"]) == 1
    captured = capsys.readouterr()
    assert "tiny i2t float32 eager, forward+backward: gradients of regions are off by 1.00e-02" in captured.err
    assert "TFLOP/s" not in captured.out


def test_run_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda _: 1000)
    assert run.main([*FAST, "--direction", "t2i", "--method", "reference", "--no-peak"]) == 0
    out = capsys.readouterr().out
    assert "reference, float32, forward+backward: left out: it takes about 0 GiB, 0 GiB are free" in out
    assert "  forward\n" in out
    assert "  forward+backward\n" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "b7"], "invalid choice: 'b7'"),
        (["--seconds", "0"], "must be positive"),
        (["--threads", "two"], "invalid int value"),
        (["--json", "."], "cannot be written"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_run_refuses_before_it_starts(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_run_on_a_gpu_reports_eta(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    args = ["--device", "cuda", "--case", "tiny", "--seconds", "0.1", *WITHOUT_COMPILER, "--json", str(path)]
    assert run.main(args) == 0
    found = records.read(path)
    assert {r.dtype for r in found} == {"float32", "bfloat16"}
    for r in found:
        assert r.rho is None
        assert r.eta is not None
        assert r.eta > 0
        assert r.peak_mib is not None
