"""``attention_constraints`` inside torch's machinery: gradcheck, opcheck, torch.compile, torch.func, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from constraint_cases import EVERY, FEW, GATED, Inputs, inputs_of, run
from helpers import Place, label, score_error
from stages import recorded_calls

OP = "attention_constraints"


def check_gradients(inputs: Inputs, place: Place) -> None:
    names = list(inputs.tensors())
    leaves = [tensor.nan_to_num().to(place.device).requires_grad_() for tensor in inputs.tensors().values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return inputs.call(dict(zip(names, tensors, strict=True)), place.floor)[:2]

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("options", EVERY, ids=label)
def test_gradcheck(place64: Place, options: dict[str, Any]) -> None:
    check_gradients(inputs_of(options, 13, regions=3, words=3, width=3), place64)


@pytest.mark.parametrize("options", GATED, ids=label)
def test_gradcheck_with_gate_and_temperatures(place64: Place, options: dict[str, Any]) -> None:
    check_gradients(inputs_of(options, 13, gated=True, regions=3, words=3, width=3), place64)


@pytest.mark.parametrize("options", [*FEW, GATED[1]], ids=label)
def test_opcheck(place: Place, options: dict[str, Any]) -> None:
    gated = options == GATED[1]
    inputs = inputs_of(options, 14, gated=gated, regions=3, words=3, width=3).to(torch.float32)
    with recorded_calls(OP) as calls:
        run(inputs, place)
    assert [str(op) for op, _ in calls] == [f"itm_kernels.{OP}.default", f"itm_kernels.{OP}_backward.default"]
    for op, arguments in calls:
        given = [a.detach().nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        torch.library.opcheck(op, tuple(given))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("pairs", ["given", "diagonal", "all"])
def test_compile_fullgraph(pairs: str) -> None:
    square = torch.arange(4)[:, None].repeat(1, 2) if pairs != "all" else torch.cartesian_prod(*[torch.arange(4)] * 2)
    inputs = inputs_of({"direction": "t2i"}, 15, pairs=square, images=4, captions=4)
    changes = {"given": {}, "diagonal": {"pairs": None}, "all": {"pairs": "all"}}[pairs]
    counter = CompileCounterWithBackend("aot_eager")

    def loss(regions: Tensor, words: Tensor) -> Tensor:
        made = inputs.call({"regions": regions, "words": words}, None, **changes)
        return (made.ccr.square().sum() + made.ccs.sum()) / made.ccr_valid.sum()

    leaves = [tensor.nan_to_num().requires_grad_() for tensor in (inputs.batch.regions, inputs.batch.words)]
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    found, expected = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 1


def test_func_grad_and_one_derivative_alone(place64: Place) -> None:
    inputs = inputs_of({"direction": "t2i"}, 16, region_counts=False)
    words = inputs.batch.words.nan_to_num().to(place64.device)

    def loss(regions: Tensor) -> Tensor:
        return inputs.call({"regions": regions, "words": words}, place64.floor).ccr.square().sum()

    regions = inputs.batch.regions.clone().to(place64.device).requires_grad_()
    (expected,) = torch.autograd.grad(loss(regions), [regions], create_graph=True)
    assert torch.equal(torch.func.grad(loss)(regions.detach()), expected.detach())
    with pytest.raises(RuntimeError, match="attention_constraints: can be differentiated once, not twice"):
        expected.sum().backward()


def test_autocast() -> None:
    inputs = inputs_of({"direction": "t2i"}, 17).to(torch.float32)
    plain, _ = run(inputs, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, grads = run(inputs, "eager")
    for mine, its in zip(under[:2], plain[:2], strict=True):
        assert mine.dtype == torch.float32
        assert 0 < score_error(mine, its) < 0.1
    assert all(grad.dtype == torch.float32 for grad in grads.values())
