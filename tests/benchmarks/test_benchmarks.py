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
from bench_helpers import CPU, FIELDS, OP, FakeTimer, make, record

from benchmarks import cases, machine, measure, memory, ops, parity, product, records
from benchmarks.caption_lengths import histogram
from benchmarks.cases import CASES, Case
from benchmarks.contender import BOTH, FORWARD, PHASES, PRODUCT

FLOORS = ("reference", "eager", "native")
ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)


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


def test_a_large_product_is_made_in_even_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = torch.randn(300, 8), torch.randn(50, 8)
    whole = product.bare_products(rows, columns)
    monkeypatch.setattr(product, "LARGEST_PRODUCT", 50 * 4 * 130)  # three blocks are needed
    monkeypatch.setattr(product, "ROWS_TOGETHER", 4)
    cut = product.bare_products(rows, columns)
    assert (whole.backend, cut.backend) == ("torch.mm", "torch.mm, blocks of 100 rows")
    for contender in (whole, cut):
        products, of_rows, of_columns = contender.calls[BOTH]()
        full = rows @ columns.t()
        torch.testing.assert_close(products, full[-products.shape[0] :])
        torch.testing.assert_close(of_rows, full @ columns)
        torch.testing.assert_close(of_columns, full.t() @ rows)
    monkeypatch.undo()
    assert product.block_rows(16384 * 36, 254_000 * 2) * 254_000 * 2 < 1.1 * product.LARGEST_PRODUCT


@pytest.mark.parametrize("direction", ["t2i", "both"])
def test_the_truth_is_the_same_in_groups(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ops.load(OP)
    whole = module.workload(CASES["tiny"], direction, torch.float32, CPU).truth()
    monkeypatch.setattr(module, "PARITY_CAPTIONS", 3)
    monkeypatch.setattr(module, "PARITY_IMAGES", 3)
    for part, again in zip(whole, module.workload(CASES["tiny"], direction, torch.float32, CPU).truth(), strict=True):
        torch.testing.assert_close(part.expected, again.expected)


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
    assert measure.pilot(calls["b"], timer) == 2.0
    assert "".join(order[-2:]) == "bb"  # once to warm up
    assert measure.rounds_within(6.0, 0.060) == 10
    assert measure.rounds_within(6.0, 1e-4) == measure.FEWEST_ROUNDS
    assert measure.rounds_within(6.0, 100.0) == measure.MOST_ROUNDS


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
