"""``attention_constraints`` on every floor against loops over numbers, and its edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from constraint_cases import EVERY, FEW, GATED, PAIRS, Inputs, by_numbers, inputs_of, run, upstream_of
from helpers import GRADIENT_FLOOR, SCORE_FLOOR, Place, label, random_batch, relative_error, score_error
from itm_kernels import attention_constraints, caption_layout
from itm_kernels.eager import attention_constraints as eager
from itm_kernels.ops.constraint_options import ConstraintOptions
from itm_kernels.ops.options import QUERY_DIRECTIONS
from memory import peak_bytes

OP = "attention_constraints"


def assert_same(mine: Sequence[Tensor], its: Sequence[Tensor], bound: float) -> None:
    """Terms within ``bound``, and valid in the same places."""
    for k in range(2):
        assert mine[k].shape == its[k].shape
        assert score_error(mine[k], its[k]) <= bound
        assert torch.equal(mine[k + 2], its[k + 2])


@pytest.mark.parametrize("options", EVERY, ids=label)
def test_every_option_against_a_loop(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, regions=5, words=4, width=3)
    made, true = run(inputs, place64)[0], by_numbers(inputs)
    assert_same(made, true, 1e-9)
    for terms, valid in ((true.ccr, true.ccr_valid), (true.ccs, true.ccs_valid)):
        assert terms.any()
        assert 0 < valid.sum() < valid.numel()


@pytest.mark.parametrize("options", GATED, ids=label)
def test_gate_and_temperatures_against_a_loop(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, gated=True)
    assert_same(run(inputs, place64)[0], by_numbers(inputs), 1e-9)


@pytest.mark.parametrize("options", [*FEW, GATED[1]], ids=label)
def test_float32_against_the_definition(place: Place, options: dict[str, Any]) -> None:
    narrow = inputs_of(options, 2, gated=options in GATED[1:]).to(torch.float32)
    (got, grads), (peer, peers) = run(narrow, place), run(narrow, "eager")
    true, trues = run(narrow.to(torch.float64), "reference")
    for mine, its, real in zip(got[:2], peer[:2], true[:2], strict=True):
        assert mine.dtype == torch.float32
        assert score_error(mine, real) <= max(2 * score_error(its, real), SCORE_FLOOR)
    for name, real in trues.items():
        assert relative_error(grads[name], real) <= max(2 * relative_error(peers[name], real), GRADIENT_FLOOR), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FEW[:2], ids=label)
def test_half_precision_is_wide_inside(place64: Place, options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = inputs_of(options, 6).to(dtype)
    made, grads = run(inputs, place64)
    true, trues = run(inputs.to(torch.float64), "reference")
    eps = torch.finfo(dtype).eps
    for mine, real in zip(made[:2], true[:2], strict=True):
        assert mine.dtype == torch.float32
        assert score_error(mine, real) <= 20 * eps
    for name, real in trues.items():
        assert grads[name].dtype == dtype
        assert relative_error(grads[name], real) <= 20 * eps, name


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_none_is_the_diagonal(place64: Place, direction: str) -> None:
    square = torch.arange(4)[:, None].repeat(1, 2)
    inputs = inputs_of({"direction": direction}, 3, pairs=square, images=4, captions=4)
    assert_same(run(inputs, place64)[0], run(inputs, place64, pairs=None)[0], 0)


@pytest.mark.parametrize("options", FEW, ids=label)
def test_padding_has_neither_terms_nor_gradients(place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 5).to(torch.float32)
    made, grads = run(inputs, place)
    regions, words = inputs.batch.padding()
    no_query = words[PAIRS[:, 1]] if options["direction"] == "t2i" else regions[PAIRS[:, 0]]
    assert no_query.any()
    for terms, valid in ((made.ccr, made.ccr_valid), (made.ccs, made.ccs_valid)):
        assert not valid[no_query].any()
        assert not terms[~valid].any()
    assert not grads["regions"][regions].any()
    assert not grads["words"][words].any()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("swap", ["query", "content"])
@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_detached_fragments_get_no_gradient(place64: Place, direction: str, swap: str) -> None:
    """The pairs are of the first images and captions, what is swapped in of the others."""
    pairs = torch.tensor([[0, 0], [1, 1], [0, 1]])
    inputs = inputs_of({"direction": direction, "swap": swap}, 6, pairs=pairs, region_counts=False)
    side, name = (inputs.batch.words, "words") if direction == "t2i" else (inputs.batch.regions, "regions")
    first = 2 * side.shape[1]  # row of the third caption's or image's first fragment
    assert inputs.swapped is not None
    inputs = dataclasses.replace(inputs, swapped=torch.full_like(inputs.swapped, first))
    (attached, grads), (detached, others) = run(inputs, place64), run(inputs, place64, detach_swapped=True)
    assert_same(attached, detached, 0)
    assert grads[name][2, 0].any()
    assert not others[name][2].any()
    grads[name][2] = 0
    for both in grads:
        assert relative_error(others[both], grads[both]) <= 1e-12


def test_one_key_has_no_ccr_and_nothing_swapped_no_ccs(place64: Place) -> None:
    for options, sizes in (({"direction": "t2i"}, {"regions": 1}), ({"direction": "i2t"}, {"words": 1})):
        inputs = inputs_of(options, 7, **sizes)
        assert inputs.swapped is not None
        inputs = dataclasses.replace(inputs, swapped=torch.full_like(inputs.swapped, -1))
        for given in (inputs, dataclasses.replace(inputs, swapped=None)):
            made, grads = run(given, place64)
            assert not any(output.any() for output in made)
            assert not any(grad.any() for grad in grads.values())
    inputs = dataclasses.replace(inputs_of({"direction": "t2i"}, 8), swapped=None)
    made, grads = run(inputs, place64)
    assert made.ccr_valid.any()
    assert not made.ccs_valid.any()
    assert grads["words"].any()


@pytest.mark.parametrize("swap", ["query", "content"])
def test_vectors_of_zeros_have_cosine_zero(place64: Place, swap: str) -> None:
    regions, words = (torch.zeros(2, n, 3, dtype=torch.float64, device=place64.device) for n in (4, 2))
    for sides in ((regions, words), (regions + 1, words), (regions, words + 1)):
        leaves = [side.clone().requires_grad_() for side in sides]
        made = attention_constraints(
            *leaves, [2, 2], swapped=torch.tensor([[2, 3], [0, -1]]), swap=swap, ccs_margin=0.3, backend=place64.floor
        )
        assert (made.ccr == 0.2).all()
        assert made.ccs.flatten().tolist() == [0.3, 0.3, 0.3, 0.0]
        grads = torch.autograd.grad(made.ccr.sum() + made.ccs.sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)


def test_what_a_query_ignores_by_hand(place64: Place) -> None:
    """Two keys at right angles, the query on the first: attention (w, 1 - w), re-sourced (1 - w, w)."""
    regions = torch.eye(2, dtype=torch.float64, device=place64.device)[None]
    query = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64, device=place64.device)
    made = attention_constraints(
        regions, query, [1], raw_feature_norm="no_norm", lambda_softmax=1.0, ccr_margin=1, backend=place64.floor
    )
    w = torch.tensor([1.0, 0.0]).double().softmax(0)
    assert made.ccr.item() == pytest.approx(float(1 - w[0] / w.norm() + w[1] / w.norm()), abs=1e-12)


def record_of(options: dict[str, Any]) -> ConstraintOptions:
    return ConstraintOptions(
        options["direction"],
        options.get("raw_feature_norm", "clipped_l2norm"),
        options.get("lambda_softmax", 9.0),
        options.get("focal") or "none",
        options.get("swap", "query"),
        options.get("detach_swapped", False),
        0.2,
        0.2,
    )


@pytest.mark.parametrize("options", FEW, ids=label)
def test_blocks_of_one_pair_give_what_one_block_gives(fast_place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 8).to(torch.float32)
    (once, grads), (often, others) = (run(inputs, fast_place, workspace_bytes=size) for size in (2**30, 1))
    assert_same(often, once, 1e-6)
    for name in grads:
        assert relative_error(others[name], grads[name]) <= 1e-5, name


@pytest.mark.parametrize("options", [*FEW, {"direction": "t2i", "gated": True}], ids=label)
def test_memory_stays_within_the_workspace(options: dict[str, Any]) -> None:
    batch = random_batch(8, images=4, captions=4, regions=24, words=16, width=64)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(8, 1)
    queries = 16 if options["direction"] == "t2i" else 24
    swapped = torch.randint(4 * queries, (len(pairs), queries), generator=torch.Generator().manual_seed(0))
    of_pairs = (None, None)
    if options.get("gated"):
        of_pairs = torch.ones(len(pairs), queries, 64), torch.ones(len(pairs), queries)
    given = batch.regions, batch.words, torch.tensor(batch.word_counts), None, pairs, swapped, *of_pairs
    bound = 2**21

    def beside(call: Callable[[], Sequence[Tensor | None]], results: Sequence[Tensor | None]) -> int:
        return peak_bytes(call) - sum(t.nbytes for t in results if t is not None)

    outputs = eager.forward(*given, record_of(options), workspace_bytes=bound)
    upstream = [torch.ones_like(t) for t in outputs[:2]]
    grads = eager.backward(*upstream, *given, record_of(options), workspace_bytes=bound)
    assert beside(lambda: eager.forward(*given, record_of(options), workspace_bytes=bound), outputs) <= bound
    needed = beside(lambda: eager.backward(*upstream, *given, record_of(options), workspace_bytes=bound), grads)
    assert bound / 4 < needed <= bound  # and blocks are not needlessly small


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_counts_in_every_form_and_packed_words(place: Place, direction: str) -> None:
    inputs = inputs_of({"direction": direction}, 9).to(torch.float32)
    batch, (expected, grads) = inputs.batch, run(inputs, place)
    counts, longest = batch.word_counts, batch.words.shape[1]
    assert inputs.swapped is not None
    of_packed = torch.tensor([sum(counts[:c]) + w for c, n in enumerate(counts) for w in range(n)])
    of_padded = torch.tensor([c * longest + w for c, n in enumerate(counts) for w in range(n)])
    for packed in (False, True):
        words, swapped = batch.words, inputs.swapped
        if packed:
            words = batch.packed().words
            if direction == "t2i":
                place_of = {int(a): int(b) for a, b in zip(of_padded, of_packed, strict=True)} | {-1: -1}
                swapped = swapped.clone().apply_(place_of.__getitem__)
        for form in (
            counts,
            torch.tensor(counts),
            torch.tensor(counts, dtype=torch.int32),
            caption_layout(counts, "cpu"),
        ):
            leaf = words.clone().to(place.device).requires_grad_()
            made = attention_constraints(
                batch.regions.to(place.device),
                leaf,
                form,
                pairs=PAIRS,
                swapped=swapped,
                region_counts=batch.region_counts,
                direction=direction,
                backend=place.floor,
            )
            assert all(torch.equal(m.detach().cpu(), e) for m, e in zip(made, expected, strict=True))
    # The last leaf is packed: its gradient is that of the padded words without the padding.
    grad = torch.autograd.grad(made[:2], leaf, upstream_of(made))[0].cpu()
    assert torch.equal(grad, torch.cat([row[:n] for row, n in zip(grads["words"], counts, strict=True)]))


def test_views_that_are_not_contiguous(place64: Place) -> None:
    inputs = inputs_of({"direction": "t2i"}, 10, gated=True)
    expected, grads = run(inputs, place64)

    def view(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide.to(place64.device)[..., ::2].requires_grad_()

    leaves = {name: view(tensor) for name, tensor in inputs.tensors().items()}
    assert inputs.swapped is not None
    turned = PAIRS.flip(1).t().contiguous().t().flip(1)
    made = inputs.call(leaves, place64.floor, pairs=turned, swapped=inputs.swapped.t().contiguous().t())
    assert_same([t.detach().cpu() for t in made], expected, 1e-12)
    found = torch.autograd.grad(made[:2], list(leaves.values()), upstream_of(made))
    for (name, its), mine in zip(grads.items(), found, strict=True):
        assert relative_error(mine.cpu().nan_to_num(), its.nan_to_num()) <= 1e-12, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(place: Place) -> None:
    for options in FEW:
        made, grads = run(inputs_of(options, 11).to(torch.float32), place)
        assert all(t.isfinite().all() for t in (*made[:2], *grads.values()))


@pytest.mark.parametrize("none", ["pairs", "images", "captions"])
def test_empty(place: Place, none: str) -> None:
    sizes = {} if none == "pairs" else {none: 0}
    batch = random_batch(12, **sizes)
    inputs = Inputs(batch, {"direction": "t2i"}, PAIRS[:0], torch.zeros(0, 9, dtype=torch.int64))
    made, grads = run(inputs, place)
    assert all(output.shape == (0, 9) for output in made)
    assert not any(grad.nan_to_num().any() for grad in grads.values())


@pytest.mark.parametrize("options", FEW, ids=label)
def test_two_runs_give_the_same_bits(place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 18).to(torch.float32)
    (first, grads), (second, others) = run(inputs, place), run(inputs, place)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(grads[name], others[name]) for name in grads)


def test_unread_indices_out_of_range_are_nan(place64: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices on a GPU are never read: they are here what they would be there, unchecked."""
    for check in ("check_index_values", "check_swapped_values"):
        monkeypatch.setattr(f"itm_kernels.ops.attention_constraints.{check}", lambda *given: None)
    pairs = torch.tensor([[0, 0], [5, 0], [0, 6], [-1, 2], [2, 1]])
    inputs = inputs_of({"direction": "t2i"}, 19, pairs=pairs, word_counts=[9, 8, 3, 4, 5, 6])
    assert inputs.swapped is not None
    inputs.swapped[0, :5] = torch.tensor([-2, 54, 2 * 9 + 3, 2 * 9 + 2, -1])  # two beyond, one of the padding
    made, grads = run(inputs, place64)
    assert made.ccr.isnan().all(1).tolist() == made.ccs.isnan().all(1).tolist() == [False, True, True, True, False]
    assert made.ccr_valid[1:4].all()
    assert made.ccs[0, :5].isnan().tolist() == [True, True, True, False, False]
    assert made.ccs_valid[0, :5].tolist() == [True, True, True, True, False]
    assert made.ccr[[0, 4]].isfinite().all()
    assert made.ccs[4].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
    nowhere = dataclasses.replace(inputs, pairs=pairs[1:4], swapped=inputs.swapped[1:4])
    assert not any(grad.any() for grad in run(nowhere, place64)[1].values())
