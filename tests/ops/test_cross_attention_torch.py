"""``cross_attention`` inside torch's machinery: gradcheck, opcheck, torch.compile, torch.func, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from attention_cases import EVERY, FEW, inputs_of, run
from helpers import Place, label, score_error
from itm_kernels.ops.options import QUERY_DIRECTIONS
from stages import recorded_calls

OP = "cross_attention"


@pytest.mark.parametrize("of_pairs", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("options", EVERY, ids=label)
def test_gradcheck(place64: Place, options: dict[str, Any], of_pairs: bool) -> None:
    inputs = inputs_of(options, 13, of_pairs=of_pairs, regions=3, words=3, width=3)
    names = list(inputs.tensors())
    leaves = [tensor.nan_to_num().to(place64.device).requires_grad_() for tensor in inputs.tensors().values()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(inputs.call(dict(zip(names, tensors, strict=True)), place64.floor))

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("of_pairs", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("options", FEW, ids=label)
def test_opcheck(place: Place, options: dict[str, Any], of_pairs: bool) -> None:
    inputs = inputs_of(options, 14, of_pairs=of_pairs, regions=3, words=3, width=3).to(torch.float32)
    with recorded_calls(OP) as calls:
        run(inputs, place)
    assert [str(op) for op, _ in calls] == [f"itm_kernels.{OP}.default", f"itm_kernels.{OP}_backward.default"]
    for op, arguments in calls:
        given = [a.detach().nan_to_num() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        torch.library.opcheck(op, tuple(given))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_compile_fullgraph(direction: str) -> None:
    inputs = inputs_of({"direction": direction}, 15, of_pairs=True)
    counter = CompileCounterWithBackend("aot_eager")
    names = list(inputs.tensors())

    @torch.compile(fullgraph=True, backend=counter)
    def loss(*tensors: Tensor) -> Tensor:
        made = inputs.call(dict(zip(names, tensors, strict=True)), None)
        return (made.weights.square().sum() + made.attended.square().sum()) * 2

    leaves = [tensor.nan_to_num().requires_grad_() for tensor in inputs.tensors().values()]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    made = inputs.call(dict(zip(names, leaves, strict=True)), None)
    expected = torch.autograd.grad((made.weights.square().sum() + made.attended.square().sum()) * 2, leaves)
    for mine, its in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)
    assert counter.frame_count == 1


def test_func_grad_and_one_derivative_alone(place64: Place) -> None:
    inputs = inputs_of({"direction": "t2i"}, 16, region_counts=False)
    words = inputs.batch.words.nan_to_num().to(place64.device)

    def loss(regions: Tensor) -> Tensor:
        return inputs.call({"regions": regions, "words": words}, place64.floor).weights.square().sum()

    regions = inputs.batch.regions.clone().to(place64.device).requires_grad_()
    (expected,) = torch.autograd.grad(loss(regions), [regions], create_graph=True)
    assert torch.equal(torch.func.grad(loss)(regions.detach()), expected.detach())
    with pytest.raises(RuntimeError, match="cross_attention: can be differentiated once, not twice"):
        expected.sum().backward()


def test_autocast() -> None:
    inputs = inputs_of({"direction": "t2i"}, 17).to(torch.float32)
    plain, _ = run(inputs, "eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, grads = run(inputs, "eager")
    for mine, its in zip(under, plain, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < score_error(mine, its) < 0.1
    assert all(grad.dtype == torch.float32 for grad in grads.values())
