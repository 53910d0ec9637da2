"""The suite that every stage as an op passes: a class of tests whose subclass names the op's cases."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers import GRADIENT_FLOOR, SCORE_FLOOR, Place, relative_error, score_error
from itm_kernels.backends import FLOORS, why_not
from itm_kernels.ops import stages
from memory import peak_bytes
from models import CLAMP_GRADIENT_FLOOR
from stages import (
    Case,
    StageBatch,
    StageResult,
    filled_up,
    output_axes,
    recorded_calls,
    run_at,
    run_stage,
    stage_batch,
    truth_of,
    words_axes,
)

IN_BLOCKS = ("eager", "native")
HALVES = (torch.bfloat16, torch.float16)
ODD = {
    "one image": {"images": 1},
    "one caption": {"captions": 1},
    "one region": {"regions": 1},
    "one word": {"words": 1},
    "one channel": {"width": 1},
    "all regions": {"region_counts": False},
    "many": {"images": 7, "captions": 19, "regions": 11, "words": 13, "width": 17},
}


def assert_exact(got: StageResult, true: StageResult, case: Case) -> None:
    """float64: outputs absolutely, gradients relatively."""
    for mine, real in zip(got.outputs, true.outputs, strict=True):
        assert mine.shape == real.shape
        assert score_error(mine, real) <= 1e-9
    for name, real in true.gradients.items():
        mine = got.gradients[name]
        assert mine.shape == real.shape
        if name in case.zero_gradients():
            assert float((mine - real).norm()) <= 1e-9, name
        else:
            assert relative_error(mine, real) <= 1e-6, name
    for mine, real in zip(got.buffers, true.buffers, strict=True):
        torch.testing.assert_close(mine, real, rtol=1e-9, atol=1e-9)


def assert_near(got: StageResult, true: StageResult, case: Case, dtype: torch.dtype) -> None:
    """``got`` is as far from the truth as the rounding of ``dtype`` explains."""
    eps = torch.finfo(dtype).eps
    for mine, real in zip(got.outputs, true.outputs, strict=True):
        assert score_error(mine, real) <= 40 * eps * max(1.0, float(real.abs().max()))
    largest = max(float(real.norm()) for real in true.gradients.values())
    for name in got.gradients:
        real = true.gradients[name]
        error = float((got.gradients[name].double() - real).norm())
        assert error <= 60 * eps * max(float(real.norm()), 0.05 * largest), name


def assert_ladder(got: StageResult, peer: StageResult, true: StageResult, case: Case, *, least: float = 0.0) -> None:
    """``got`` is no further from the truth than twice its ``peer`` (eager, same inputs), or the float32 noise floor.

    A gradient smaller than ``least`` times the largest one, all but cancelled, may have the noise of one that large.
    """
    for mine, its, real in zip(got.outputs, peer.outputs, true.outputs, strict=True):
        floor = SCORE_FLOOR * max(1.0, float(real.abs().max()))
        assert score_error(mine, real) <= max(2 * score_error(its, real), floor)
    floor = CLAMP_GRADIENT_FLOOR if case.op == "correspondence_regulator" else GRADIENT_FLOOR
    scale = max(float(real.norm()) for real in true.gradients.values())
    for name, real in true.gradients.items():
        mine, its = got.gradients[name], peer.gradients[name]
        of_noise = scale if name in case.zero_gradients() else max(float(real.norm()), least * scale)
        bound = max(2 * float((its.double() - real).norm()), floor * of_noise)
        assert float((mine.double() - real).norm()) <= bound, name


def assert_half_ladder(runs: list[tuple[StageResult, StageResult, StageResult]], case: Case) -> None:
    """The same in half precision over several batches ``(got, peer, true)``: the median counts, and there is no floor.

    Where a few small sums cancel, one batch comes out well and another badly, whoever computes it.
    """

    def errors(which: int) -> list[list[float]]:  # of every output and gradient, one a batch
        found = []
        for run in runs:
            mine, true = run[which], run[2]
            pairs = list(zip(mine.outputs, true.outputs, strict=True))
            names = [name for name in true.gradients if name not in case.zero_gradients()]
            pairs += [(mine.gradients[name], true.gradients[name]) for name in names]
            found.append([relative_error(got, real) for got, real in pairs])
        return [list(of_batches) for of_batches in zip(*found, strict=True)]

    for mine, its in zip(errors(0), errors(1), strict=True):
        assert statistics.median(mine) <= 2 * statistics.median(its)


def _spread(tensor: Tensor, axis: int | None, counts: list[int]) -> Tensor:
    """Packed words along an axis as ``C W`` rows, zeros where a caption is at its end."""
    if axis is None:
        return tensor
    return torch.cat([filled_up(p, axis, max(counts), 0.0) for p in tensor.split(counts, dim=axis)], dim=axis)


def padded_out(packed: StageBatch) -> StageBatch:
    """The batch as counts on a device have it, upstream gradients too; the padding of inputs holds NaN."""
    made, counts = packed.padded(), packed.batch.word_counts
    upstream = zip(packed.upstream, output_axes(packed.case), strict=True)
    return dataclasses.replace(made, upstream=tuple(_spread(grad, axis, counts) for grad, axis in upstream))


def spread_out(packed: StageBatch, result: StageResult) -> StageResult:
    """What a run of :func:`padded_out` is to give, by one of the batch with packed words."""
    counts, axes = packed.batch.word_counts, words_axes(packed.case, packed.tensors)
    outputs = zip(result.outputs, output_axes(packed.case), strict=True)
    gradients = {name: _spread(grad, axes.get(name), counts) for name, grad in result.gradients.items()}
    if "words" in gradients:
        gradients["words"] = gradients["words"].unflatten(0, (len(counts), -1))
    return StageResult(tuple(_spread(output, axis, counts) for output, axis in outputs), gradients, result.buffers)


def check(place: Place, made: StageBatch, *, least: float = 0.0, **more: Any) -> None:
    """``place`` agrees with the definition: exactly in float64, on the ladder where it has no float64."""
    if place.why_not(made.case.op, torch.float64) is None:
        assert_exact(run_at(place, made, **more), truth_of(made), made.case)
    else:
        made = made.to(torch.float32)
        got, peer = run_at(place, made, **more), run_stage(made, "eager")
        assert_ladder(got, peer, truth_of(made), made.case, least=least)


def skip_without(floor: str, op: str) -> None:
    """Skip where a floor cannot run on the CPU."""
    reason = why_not(floor, op, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)


def refused(function: Callable[..., Any], error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """``function`` raises this before any floor runs."""

    def reached(*given: Any, **options: Any) -> None:
        raise AssertionError("a floor ran on bad input")

    op = function.__name__
    with pytest.MonkeyPatch.context() as patch:
        for floor in FLOORS:
            if importlib.util.find_spec(f"itm_kernels.{floor}.{op}") is not None:
                for phase in ("forward", "backward"):
                    patch.setattr(f"itm_kernels.{floor}.{op}.{phase}", reached)
        with pytest.raises(error) as raised:
            function(**arguments)
    assert type(raised.value) is error
    assert str(raised.value) == f"{op}: {message}"


class StageSuite:
    """Tests of an op; a subclass says which."""

    cases: tuple[Case, ...]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            cases = metafunc.cls.cases
            slow = metafunc.function.__name__ == "test_memory_stays_within_the_workspace"
            metafunc.parametrize("case", (cases[0], cases[-1]) if slow else cases, ids=str)

    @staticmethod
    def few(case: Case) -> StageBatch:
        """Small enough for finite differences."""
        sizes = {"images": 2, "captions": 2, "regions": 3, "words": 3, "width": 3}
        return stage_batch(case, 21, **sizes, shortest=2)

    def test_float32_against_the_definition(self, place: Place, case: Case) -> None:
        made = stage_batch(case, 20).to(torch.float32)
        got, peer, true = run_at(place, made), run_stage(made, "eager"), truth_of(made)
        assert all(output.dtype == torch.float32 for output in got.outputs)
        assert_ladder(got, peer, true, case)

    def test_float64_floors_agree(self, place64: Place, case: Case) -> None:
        made = stage_batch(case, 2)
        assert_exact(run_at(place64, made), truth_of(made), case)

    @pytest.mark.parametrize("sizes", ODD.values(), ids=list(ODD))
    def test_odd_sizes(self, place: Place, case: Case, sizes: dict[str, Any]) -> None:
        check(place, stage_batch(case, 26, **sizes), least=0.05)  # one query, one channel: nearly all cancels

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_half_precision_against_eager(self, case: Case, dtype: torch.dtype) -> None:
        skip_without("native", case.op)
        sizes = {"images": 6, "captions": 6, "regions": 12, "words": 9, "width": 24, "shortest": 3}
        runs = []
        for seed in range(5):
            made = stage_batch(case, 30 + seed, **sizes).to(dtype)
            runs.append((run_stage(made, "native"), run_stage(made, "eager"), truth_of(made)))
        assert_half_ladder(runs, case)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_narrow_inputs_are_wide_inside(self, place: Place, case: Case, dtype: torch.dtype) -> None:
        # What is exact in the narrow dtype is the same in both, but for the arithmetic.
        made = stage_batch(case, 4, shortest=3, images=4, regions=8, region_counts=False).to(dtype)
        got = run_at(place, made)
        assert all(output.dtype == torch.float32 for output in got.outputs)
        assert all(grad.dtype == dtype for grad in got.gradients.values())
        if case.op == "correspondence_regulator":
            # The gate starts on the clamp's own edge: gradients of the other side of it are no question of precision.
            got = StageResult(got.outputs, {}, ())
        assert_near(got, truth_of(made), case, dtype)

    def test_views_that_are_not_contiguous(self, place: Place, case: Case) -> None:
        made = stage_batch(case, 11)

        def view(tensor: Tensor) -> Tensor:
            wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
            wide[..., ::2] = tensor
            return wide[..., ::2]

        if place.why_not(case.op, torch.float64) is not None:
            made = made.to(torch.float32)
        viewed = {name: view(tensor) for name, tensor in made.tensors.items()}
        got = run_at(place, dataclasses.replace(made, tensors=viewed))
        assert_exact(got, run_at(place, made), case)

    def test_tiny_workspace(self, place: Place, case: Case) -> None:
        check(place, stage_batch(case, 5, captions=9), workspace_bytes=1)

    @pytest.mark.parametrize("floor", IN_BLOCKS)
    def test_memory_stays_within_the_workspace(self, case: Case, floor: str) -> None:
        skip_without(floor, case.op)
        sizes = {"images": 24, "captions": 16, "regions": 16, "words": 16, "width": 64, "region_counts": False}
        made = stage_batch(case, 12, **sizes).to(torch.float32)
        bound = 2**20 if "regions" in made.tensors else 2**17  # a part of what one block would take
        leaves = {name: tensor.requires_grad_() for name, tensor in made.tensors.items()}

        def extra(call: Callable[[], Any], results: list[Tensor]) -> int:
            return peak_bytes(call) - sum(result.nbytes for result in results)

        def outputs() -> tuple[Tensor, ...]:
            return made.outputs(leaves, backend=floor, workspace_bytes=bound)

        outside = 0
        if case.op == "correspondence_regulator":
            # Outside the op its layer is put behind those that came in, and their two gradients are summed.
            outside = made.upstream[2].numel() * 4 * max(case.options["step"], 1)
        with torch.no_grad():
            results = list(outputs())
            assert extra(outputs, results) <= bound + outside
        everything = outputs()
        upstream = [torch.ones_like(output) for output in everything]
        needed = extra(lambda: torch.autograd.grad(everything, list(leaves.values()), upstream), list(leaves.values()))
        assert needed <= bound + outside

    def test_what_does_not_count_is_never_used(self, place: Place, case: Case) -> None:
        made = stage_batch(case, 6).to(torch.float32)
        got = run_at(place, made)
        assert all(output.isfinite().all() for output in got.outputs)
        for name, grad in got.gradients.items():
            assert grad.isfinite().all()
            assert (grad[made.tensors[name].isnan()] == 0).all(), name

    def test_counts_on_a_device_keep_the_padding(
        self, place: Place, case: Case, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        packed = stage_batch(case, 7)
        if place.why_not(case.op, torch.float64) is not None:
            packed = packed.to(torch.float32)
        true = spread_out(packed, run_at(place, packed))
        monkeypatch.setattr(stages, "keeps_padding", lambda counts: True)
        assert_exact(run_at(place, padded_out(packed)), true, case)

    @pytest.mark.parametrize("none", ["images", "captions"])
    def test_empty(self, place: Place, case: Case, none: str) -> None:
        made = stage_batch(case, 8, **{none: 0}).to(torch.float32).to(place.device)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in made.tensors.items()}
        outputs = made.outputs(leaves, backend=place.floor)
        assert all(output.numel() == 0 for output in outputs)
        for grad in torch.autograd.grad(sum(o.sum() for o in outputs), list(leaves.values()), allow_unused=True):
            assert grad is None or not grad.any()

    def test_gradcheck(self, place64: Place, case: Case) -> None:
        made = self.few(case).to(place64.device)
        names = list(made.tensors)
        leaves = [tensor.nan_to_num().requires_grad_() for tensor in made.tensors.values()]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return made.outputs(dict(zip(names, tensors, strict=True)), backend=place64.floor)

        assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)

    def test_differentiating_twice_raises(self, case: Case) -> None:
        made = self.few(case)
        leaves = {name: tensor.nan_to_num().requires_grad_() for name, tensor in made.tensors.items()}
        total = sum(output.sum() for output in made.outputs(leaves))
        (grad,) = torch.autograd.grad(total, [next(iter(leaves.values()))], create_graph=True)
        with pytest.raises(RuntimeError, match=f"{case.op}: can be differentiated once, not twice"):
            grad.sum().backward()

    def test_opcheck(self, place: Place, case: Case) -> None:
        made = self.few(case).to(torch.float32)
        with recorded_calls(case.op) as calls:
            run_at(place, made)
        assert [str(op) for op, _ in calls] == [
            f"itm_kernels.{case.op}{direction}.default" for direction in ("", "_backward")
        ]
        for op, arguments in calls:
            given = [
                a.detach().nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
            ]
            torch.library.opcheck(op, tuple(given))

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compile_fullgraph(self, case: Case) -> None:
        made = self.few(case)
        counter = CompileCounterWithBackend("aot_eager")
        names, upstream = list(made.tensors), made.upstream

        @torch.compile(fullgraph=True, backend=counter)
        def loss(*tensors: Tensor) -> Tensor:
            outputs = made.outputs(dict(zip(names, tensors, strict=True)))
            last = outputs[-1][-1] if case.op == "correspondence_regulator" else outputs[-1]
            return sum((o * g).sum() for o, g in zip((*outputs[:-1], last), upstream, strict=True))

        leaves = [tensor.nan_to_num().requires_grad_() for tensor in made.tensors.values()]
        grads = torch.autograd.grad(loss(*leaves), leaves)
        clean = dict(zip(names, (leaf.detach() for leaf in leaves), strict=True))
        expected = run_stage(StageBatch(case, clean, made.batch, made.buffers, upstream))
        for mine, its in zip(grads, expected.gradients.values(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("floor", IN_BLOCKS)
    def test_autocast(self, case: Case, floor: str) -> None:
        skip_without(floor, case.op)
        made = stage_batch(case, 9, region_counts=False).to(torch.float32)
        plain = run_stage(made, floor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = run_stage(made, floor)
        for mine, its in zip(under.outputs, plain.outputs, strict=True):
            assert mine.dtype == torch.float32
            assert score_error(mine, its) < 0.1 * max(1.0, float(its.abs().max()))
        assert any(not torch.equal(mine, its) for mine, its in zip(under.outputs, plain.outputs, strict=True))
        for name, grad in under.gradients.items():
            assert grad.dtype == made.tensors[name].dtype

    def test_two_runs_give_the_same_bits(self, place: Place, case: Case) -> None:
        made = stage_batch(case, 10).to(torch.float32)
        first, second = run_at(place, made), run_at(place, made)
        for mine, its in zip(first.outputs, second.outputs, strict=True):
            assert torch.equal(mine, its)
        for name, grad in first.gradients.items():
            assert torch.equal(grad, second.gradients[name]), name
