"""The command `python -m benchmarks.run`: what it measures, leaves out, survives, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import CPU, OP, FakeTimer, make, record

from benchmarks import compare, machine, measure, ops, records, run
from benchmarks.cases import Case
from benchmarks.contender import BOTH, FORWARD, PHASES, PRODUCT
from itm_kernels.backends import why_not

FLOORS = ("reference", "eager", "native")
FAST = ["--op", OP, "--device", "cpu", "--case", "tiny", "--threads", "1", "--seconds", "0.01", "--dtype", "float32"]
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
    assert f"triton, float32: left out: {why_not('triton', OP, CPU, torch.float32)}" in told


def test_run_times_nothing_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from itm_kernels.eager import cross_attention_scores as eager

    right = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *a, **k: tuple(g * 1.01 for g in right(*a, **k)))
    assert run.main([*FAST, "--direction", "i2t", "--method", "eager", "--no-peak"]) == 1
    captured = capsys.readouterr()
    assert "tiny i2t float32 eager, forward+backward: gradients of regions are off by 1.00e-02" in captured.err
    assert "TFLOP/s" not in captured.out


def test_run_goes_on_without_a_method_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from itm_kernels.eager import cross_attention_scores as eager

    def raises(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 7 GiB\nand more lines")

    monkeypatch.setattr(eager, "backward", raises)
    path = tmp_path / "results.json"
    args = [*FAST, "--direction", "t2i", "--method", "eager", "--method", "reference", "--no-peak", "--json", str(path)]
    assert run.main(args) == run.FAILED == 1
    captured = capsys.readouterr()
    reason = "tiny t2i float32 eager, forward+backward: OutOfMemoryError: tried to allocate 7 GiB"
    assert f"  FAILED {reason}\n" in captured.out
    assert captured.err == f"benchmarks: {reason}\n"
    assert [(r.method, r.phase) for r in records.read(path)] == [("reference", phase) for phase in PHASES]


def test_a_baseline_may_run_out_of_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from itm_kernels.reference import cross_attention_scores as reference

    right = reference.forward

    def raises(regions: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if regions.dtype == torch.float32 and regions.requires_grad and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("tried to allocate 7 GiB")
        return right(regions, *args, **kwargs)

    monkeypatch.setattr(reference, "forward", raises)
    assert run.main([*FAST, "--direction", "t2i", "--method", "reference", "--no-peak"]) == 0
    assert "tiny t2i float32 reference, forward+backward: left out: out of memory" in capsys.readouterr().out


def test_run_goes_on_after_a_batch_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = ops.load(OP).workload

    def sometimes(case: Case, direction: str, *rest: Any) -> Any:
        if direction == "t2i":
            raise RuntimeError("no such batch")
        return workload(case, direction, *rest)

    monkeypatch.setattr(ops.load(OP), "workload", sometimes)
    assert run.main([*FAST, "--direction", "t2i", "--direction", "i2t", "--method", PRODUCT, "--no-peak"]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"benchmarks: {OP} tiny t2i: RuntimeError: no such batch\n"
    assert f"{OP}  tiny  i2t  forward+backward" in captured.out


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def left_of(self, seconds: float) -> Callable[[], float]:
        return lambda: seconds - self.now


def comparison(left: Callable[[], float], size: int = 8, **changes: Any) -> compare.Comparison:
    case = Case(f"b{size}", size, 8, 5, 64)
    what = compare.Comparison(OP, case, "t2i", (torch.float32,), (PRODUCT,), CPU, 0.01, False, left)
    return dataclasses.replace(what, **changes)


def test_a_deadline_begins_nothing_that_smaller_batches_have_shown_to_last_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, begun = Clock(), []
    left = clock.left_of(100)

    def slow(what: compare.Comparison, *_: Any) -> Any:
        begun.append(what.case.name)
        clock.now += what.case.images
        yield [record(op=what.op, case=what.case.name, direction=what.direction, dtype="float32", phase=BOTH)]

    monkeypatch.setattr(run, "compare", slow)
    measuring = run.Measuring([], tmp_path / "results.json", left)
    for size in (10, 50, 60, 20, 70):
        measuring.take(comparison(left, size))
    assert begun == ["b10", "b50", "b20"]
    assert measuring.not_begun == [f"{OP} b60 t2i", f"{OP} b70 t2i"]
    assert [r.case for r in records.read(tmp_path / "results.json")] == begun


def test_a_deadline_leaves_out_what_there_is_no_time_for() -> None:
    clock = Clock()
    timer, told, failed = FakeTimer(), [], []
    seconds = {"reference": 3.0, "eager": 1.0, PRODUCT: 0.5}
    whats = comparison(clock.left_of(9), methods=("reference", "eager"))

    def takes(name: str) -> Callable[[], Any]:
        def call() -> None:
            timer.now += seconds[name] * 1e3

        return call

    contenders = {
        (torch.float32, name): dataclasses.replace(make(name), calls={FORWARD: takes(name)}, needed_bytes={})
        for name in seconds
    }
    calls, rounds = compare._affordable(whats, contenders, FORWARD, timer, told.append, failed.append)
    assert [name for _, name in calls] == ["eager", PRODUCT]
    assert rounds == measure.FEWEST_ROUNDS
    assert told == ["reference, float32, forward: left out: 5 rounds of 3.0 s are more than the time left"]
    compiled = dataclasses.replace(make("eager"), method="compile", preparation_s=10.0)
    assert not compare._passes(whats, compiled, None, told.append, failed.append)  # type: ignore[arg-type]
    assert told[1:] == ["compile, float32: left out: no time left for its compiler"]
    assert not failed


def test_a_run_with_a_deadline_says_what_is_left_and_another_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    args = [*FAST, "--direction", "t2i", "--method", "eager", "--no-peak", "--json", str(path)]
    assert run.main([*args, "--deadline", "1e-9"]) == run.LATE
    assert f"left for want of time: {OP} tiny t2i" in capsys.readouterr().out
    assert run.main(args) == 0
    first = records.read(path)
    assert [r.phase for r in first] == list(PHASES)
    assert run.main([*args, "--resume", "--direction", "i2t"]) == 0
    assert f"{OP} tiny t2i: is there already" in capsys.readouterr().out
    assert records.read(path)[:2] == first
    assert [r.direction for r in records.read(path)] == ["t2i", "t2i", "i2t", "i2t"]
    # A process that ended between the phases of t2i; and a commit that is not ours.
    records.write([first[0], dataclasses.replace(first[1], commit="another")], path)
    assert run.main([*args, "--resume"]) == 0
    assert [(r.phase, r.commit) for r in records.read(path)] == [(phase, first[0].commit) for phase in PHASES]


def test_methods_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    every = [f"--without={method}" for method in ops.load(OP).METHODS if method not in (PRODUCT, "eager")]
    assert run.main([*FAST, "--direction", "t2i", "--no-peak", *every]) == 0
    out = capsys.readouterr().out
    assert "\neager " in out
    assert "reference" not in out


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
        (["--resume"], "--resume needs --json"),
        (["--deadline", "-1"], "must be positive"),
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
    assert all(r.device.endswith(", TF32 off") for r in found)
    assert {r.dtype for r in found} == {"float32", "bfloat16"}
    for r in found:
        assert r.rho is None
        assert r.eta is not None
        assert r.eta > 0
        assert r.peak_mib is not None
