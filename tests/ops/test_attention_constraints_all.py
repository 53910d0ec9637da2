"""``attention_constraints`` of every image with every caption: what explicit pairs give, in blocks of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from constraint_cases import EVERY, FEW, GATED, inputs_of, run
from helpers import GRADIENT_FLOOR, SCORE_FLOOR, Place, label, random_batch, relative_error, score_error
from itm_kernels import attention_constraints
from itm_kernels.eager import attention_constraints as eager
from itm_kernels.ops.constraint_options import ConstraintOptions
from memory import peak_bytes

OP = "attention_constraints"
EVERYTHING = torch.cartesian_prod(torch.arange(5), torch.arange(6))
DETACHED = [{**options, "detach_swapped": True} for options in EVERY if options["focal"] is None]


def assert_same(mine: Any, its: Any, bound: float = 1e-9) -> None:
    (terms, grads), (others, their_grads) = mine, its
    for k in range(2):
        assert terms[k].shape == others[k].shape
        assert score_error(terms[k], others[k]) <= bound
        assert torch.equal(terms[k + 2], others[k + 2])
    for name in grads:
        assert relative_error(grads[name], their_grads[name]) <= 1e-6, name


@pytest.mark.parametrize("options", [*EVERY, *DETACHED], ids=label)
def test_all_are_explicit_pairs(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 21, pairs=EVERYTHING, regions=4, words=4, width=5)
    assert_same(run(inputs, place64, pairs="all"), run(inputs, "reference"))


@pytest.mark.parametrize("options", GATED, ids=label)
def test_gates_of_all_pairs(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 22, pairs=EVERYTHING, gated=True)
    assert_same(run(inputs, place64, pairs="all"), run(inputs, "reference"))


@pytest.mark.parametrize("options", FEW, ids=label)
def test_float32_and_half_precision(place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 23, pairs=EVERYTHING).to(torch.float32)
    (got, grads), (peer, peers) = run(inputs, place, pairs="all"), run(inputs, "eager")
    true, trues = run(inputs.to(torch.float64), "reference")
    for mine, its, real in zip(got[:2], peer[:2], true[:2], strict=True):
        assert score_error(mine, real) <= max(2 * score_error(its, real), SCORE_FLOOR)
    for name, real in trues.items():
        assert relative_error(grads[name], real) <= max(2 * relative_error(peers[name], real), GRADIENT_FLOOR), name
    for dtype in (torch.bfloat16, torch.float16):
        narrow = inputs_of(FEW[0], 23, pairs=EVERYTHING).to(dtype)
        made, grads = run(narrow, place, pairs="all")
        true, trues = run(narrow.to(torch.float64), "reference")
        assert made.ccr.dtype == torch.float32
        assert score_error(made.ccr, true.ccr) <= 20 * torch.finfo(dtype).eps
        assert all(relative_error(grads[name], trues[name]) <= 20 * torch.finfo(dtype).eps for name in grads)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", FEW, ids=label)
def test_small_blocks_give_what_one_block_gives(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 24, pairs=EVERYTHING)
    once = run(inputs, place64, pairs="all")
    for size in (1, 2**15):
        assert_same(run(inputs, place64, pairs="all", workspace_bytes=size), once, 1e-12)
    again = run(inputs, place64, pairs="all")
    assert all(torch.equal(a, b) for a, b in zip(again[0], once[0], strict=True))
    assert all(torch.equal(again[1][name], once[1][name]) for name in again[1])


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_nothing_swapped_one_key_and_unread_rows(
    place64: Place, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of({"direction": direction}, 25, pairs=EVERYTHING)
    without = dataclasses.replace(inputs, swapped=None)
    assert_same(run(without, place64, pairs="all"), run(without, "reference"))
    single = inputs_of({"direction": direction}, 25, pairs=EVERYTHING, regions=1, words=1)
    made, grads = run(single, place64, pairs="all")
    assert not made.ccr_valid.any()
    assert all(grad.isfinite().all() for grad in grads.values())
    monkeypatch.setattr("itm_kernels.ops.attention_constraints.check_swapped_values", lambda *given: None)
    assert inputs.swapped is not None
    inputs.swapped[0, 0] = 10**6
    made, grads = run(inputs, place64, pairs="all")
    assert made.ccs.isnan().nonzero().tolist() == [[0, 0]]
    assert all(grad.isfinite().all() for grad in grads.values())


def test_memory_stays_within_the_workspace() -> None:
    batch = random_batch(8, images=12, captions=14, regions=24, words=16, width=64)
    swapped = torch.randint(14 * 16, (12 * 14, 16), generator=torch.Generator().manual_seed(0))
    record = ConstraintOptions("t2i", "clipped_l2norm", 9.0, "prob", "query", False, 0.2, 0.2)
    words = batch.words.nan_to_num()
    given = batch.regions, words, torch.full((14,), 16), None, None, swapped, None, None, record
    bound = 2**21

    def beside(call: Callable[[], Sequence[Tensor | None]], results: Sequence[Tensor | None]) -> int:
        return peak_bytes(call) - sum(t.nbytes for t in results if t is not None)

    outputs = eager.forward(*given, workspace_bytes=bound)
    upstream = [torch.ones_like(t) for t in outputs[:2]]
    grads = eager.backward(*upstream, *given, workspace_bytes=bound)
    assert beside(lambda: eager.forward(*given, workspace_bytes=bound), outputs) <= bound
    needed = beside(lambda: eager.backward(*upstream, *given, workspace_bytes=bound), grads)
    assert bound / 4 < needed <= bound  # and blocks are not needlessly small


def test_empty(place: Place) -> None:
    for images, captions in ((0, 3), (3, 0)):
        sides = [torch.randn(n, 4, 8, device=place.device, requires_grad=True) for n in (images, captions)]
        made = attention_constraints(*sides, [4] * captions, pairs="all", backend=place.floor)
        assert all(output.shape == (0, 4) for output in made)
        assert not any(grad.any() for grad in torch.autograd.grad(made.ccr.sum(), sides))
