"""``cross_attention`` on every floor against loops over numbers, and against the scores that rest on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import EVERY, FEW, PAIRS, Inputs, inputs_of, run, upstream_of, weights_by_numbers
from helpers import FOCALS, GRADIENT_FLOOR, SCORE_FLOOR, Place, label, random_batch, relative_error, score_error
from itm_kernels import CrossAttention, caption_layout, cross_attention, cross_attention_scores
from itm_kernels.eager import cross_attention as eager
from itm_kernels.nn import RegulatedScorer
from itm_kernels.ops.attention_options import AttentionOptions
from itm_kernels.ops.options import QUERY_DIRECTIONS
from memory import peak_bytes

OP = "cross_attention"


def by_numbers(inputs: Inputs) -> CrossAttention:
    """The formula one number at a time, from the paper and not from any floor."""
    options = {"raw_feature_norm": "clipped_l2norm", "lambda_softmax": 9.0, "focal": None, **inputs.options}
    norm, t2i = options["raw_feature_norm"], options["direction"] == "t2i"
    batch, width = inputs.batch, inputs.batch.regions.shape[2]
    longest, most = batch.words.shape[1], batch.regions.shape[1]
    shape = (len(PAIRS), longest, most) if t2i else (len(PAIRS), most, longest)
    weights = torch.zeros(shape, dtype=torch.float64)
    attended = torch.zeros(*shape[:2], width, dtype=torch.float64)
    of_regions = batch.region_counts or [most] * batch.regions.shape[0]
    for p, (image, caption) in enumerate(PAIRS.tolist()):
        regions = batch.regions[image, : of_regions[image]].tolist()
        words = batch.words[caption, : batch.word_counts[caption]].tolist()
        queries, keys = (words, regions) if t2i else (regions, words)
        gates = [[1.0] * width for _ in queries] if inputs.gate is None else inputs.gate[p].tolist()
        sharpness = [options["lambda_softmax"]] * len(queries)
        if inputs.temperature is not None:
            sharpness = inputs.temperature[p].tolist()
        for i, shares in enumerate(weights_by_numbers(queries, keys, gates, sharpness, norm, options["focal"])):
            for j, (share, key) in enumerate(zip(shares, keys, strict=True)):
                weights[p, i, j] = share
                attended[p, i] += share * torch.tensor(key, dtype=torch.float64)
    return CrossAttention(weights, attended)


@pytest.mark.parametrize("options", EVERY, ids=label)
def test_every_option_against_a_loop(place64: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, regions=7, words=6, width=5)
    for mine, real in zip(run(inputs, place64)[0], by_numbers(inputs), strict=True):
        assert mine.shape == real.shape
        assert score_error(mine, real) <= 1e-9


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_gate_and_temperatures_against_a_loop(place64: Place, direction: str) -> None:
    inputs = inputs_of({"direction": direction}, of_pairs=True)
    for mine, real in zip(run(inputs, place64)[0], by_numbers(inputs), strict=True):
        assert score_error(mine, real) <= 1e-9


@pytest.mark.parametrize("of_pairs", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("options", FEW, ids=label)
def test_float32_against_the_definition(place: Place, options: dict[str, Any], of_pairs: bool) -> None:
    narrow = inputs_of(options, 2, of_pairs=of_pairs).to(torch.float32)
    (got, grads), (peer, peers) = run(narrow, place), run(narrow, "eager")
    true, trues = run(narrow.to(torch.float64), "reference")
    for mine, its, real in zip(got, peer, true, strict=True):
        assert mine.dtype == torch.float32
        assert score_error(mine, real) <= max(2 * score_error(its, real), SCORE_FLOOR)
    for name, real in trues.items():
        assert relative_error(grads[name], real) <= max(2 * relative_error(peers[name], real), GRADIENT_FLOOR), name


@pytest.mark.parametrize("options", FEW, ids=label)
def test_rows_sum_to_one_and_padding_is_zero(place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 3).to(torch.float32)
    made, grads = run(inputs, place)
    regions, words = inputs.batch.padding()
    of_pairs = words[PAIRS[:, 1]], regions[PAIRS[:, 0]]
    no_query, no_key = of_pairs if options["direction"] == "t2i" else of_pairs[::-1]
    assert no_query.any()
    assert no_key.any()
    assert (made.weights.sum(2) - (~no_query).float()).abs().max() <= 1e-6
    assert not made.weights[no_query].any()
    assert not made.weights.transpose(1, 2)[no_key].any()
    assert not made.attended[no_query].any()
    assert not grads["regions"][regions].any()
    assert not grads["words"][words].any()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert not grads["regions"][1].any(), "no pair names this image"


@pytest.mark.parametrize("focal", FOCALS, ids=str)
@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_the_scores_follow_from_it(place64: Place, direction: str, focal: str | None) -> None:
    """Cosine of every query and what it attends to, averaged: ``agg_func="Mean"``."""
    options = {"direction": direction, "focal": focal, "lambda_softmax": 12.0}
    batch = inputs_of(options, 4).batch
    made = Inputs(batch, options).call(
        {"regions": batch.regions.to(place64.device), "words": batch.words.to(place64.device)}, place64.floor
    )
    scores = cross_attention_scores(
        batch.regions, batch.words, batch.word_counts, region_counts=batch.region_counts, agg_func="Mean", **options
    )
    assert batch.region_counts is not None
    for p, (image, caption) in enumerate(PAIRS.tolist()):
        sides = batch.words[caption, : batch.word_counts[caption]], batch.regions[image, : batch.region_counts[image]]
        queries = sides[0] if direction == "t2i" else sides[1]
        cosine = torch.cosine_similarity(queries, made.attended[p, : len(queries)].cpu(), dim=1).mean()
        assert (cosine - scores[image, caption]).abs() <= 1e-9


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_every_step_of_rcar_is_a_call_with_its_gate_and_temperature(place64: Place, direction: str) -> None:
    batch = random_batch(5, region_counts=True, shortest=2, dtype=torch.float64)
    torch.manual_seed(0)
    scorer = RegulatedScorer(24, 10, direction=direction, regulator="rcar", steps=3).double().eval()
    for parameter in scorer.parameters():
        parameter.data.mul_(3)
    scorer, batch = scorer.to(place64.device), batch.to(place64.device)
    given = batch.regions, batch.words, batch.word_counts, PAIRS
    with torch.no_grad():
        states = scorer.attention_states(*given, region_counts=batch.region_counts)
    assert len(states) == 3
    for state in states:
        made = cross_attention(
            *given,
            region_counts=batch.region_counts,
            direction=direction,
            gate=state.gate,
            temperature=state.temperature,
            backend=place64.floor,
        )
        sides = batch.padding()[1][PAIRS[:, 1]], batch.padding()[0][PAIRS[:, 0]]
        asks = ~(sides[0] if direction == "t2i" else sides[1])
        assert score_error(made.weights[asks], state.weights[asks]) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", FEW[:2], ids=label)
def test_half_precision_is_wide_inside(place64: Place, options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = inputs_of(options, 6, of_pairs=True).to(dtype)
    made, grads = run(inputs, place64)
    true, trues = run(inputs.to(torch.float64), "reference")
    eps = torch.finfo(dtype).eps
    for mine, real in zip(made, true, strict=True):
        assert mine.dtype == torch.float32
        assert score_error(mine, real) <= 20 * eps
    for name, real in trues.items():
        assert grads[name].dtype == dtype
        assert relative_error(grads[name].nan_to_num(), real.nan_to_num()) <= 20 * eps, name


ODD = {
    "one image": {"images": 1},
    "one caption": {"captions": 1},
    "one region": {"regions": 1},
    "one word": {"words": 1},
    "one channel": {"width": 1},
    "all regions": {"region_counts": False},
}


@pytest.mark.parametrize("options", FEW, ids=label)
@pytest.mark.parametrize("sizes", ODD.values(), ids=list(ODD))
def test_odd_sizes(place64: Place, options: dict[str, Any], sizes: dict[str, Any]) -> None:
    inputs = inputs_of(options, 7, **sizes)
    pairs = PAIRS.clamp(max=torch.tensor([sizes.get("images", 5) - 1, sizes.get("captions", 6) - 1]))
    (made, grads), (true, trues) = run(inputs, place64, pairs), run(inputs, "reference", pairs)
    for mine, real in zip(made, true, strict=True):
        assert score_error(mine, real) <= 1e-9
    for name, real in trues.items():
        assert relative_error(grads[name], real) <= 1e-6, name


def test_zero_vectors_attend_evenly(place64: Place) -> None:
    regions, words = (
        torch.zeros(1, n, 3, dtype=torch.float64, device=place64.device, requires_grad=True) for n in (4, 2)
    )
    for focal in FOCALS:
        made = cross_attention(regions, words, [2], PAIRS[:1], focal=focal, backend=place64.floor)
        assert (made.weights == 0.25).all()
        grads = torch.autograd.grad(made.weights.sum() + made.attended.sum(), (regions, words))
        assert (grads[0] == 0.5).all()
        assert not grads[1].any()


@pytest.mark.parametrize("options", FEW, ids=label)
def test_blocks_of_one_pair_give_what_one_block_gives(options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 8, of_pairs=True)
    batch = inputs.batch
    record = AttentionOptions(
        options["direction"],
        options.get("raw_feature_norm", "clipped_l2norm"),
        options.get("lambda_softmax", 9.0),
        options.get("focal") or "none",
    )
    sides = batch.regions, batch.words, torch.tensor(batch.word_counts), torch.tensor(batch.region_counts)
    given = *sides, PAIRS, inputs.gate, inputs.temperature, record
    once, often = (eager.forward(*given, workspace_bytes=size) for size in (2**30, 1))
    for mine, its in zip(often, once, strict=True):
        assert score_error(mine, its) <= 1e-12
    upstream = [torch.ones_like(t) * torch.arange(t.shape[-1]) for t in once]
    grads = [eager.backward(*upstream, *given, workspace_bytes=size) for size in (2**30, 1)]
    for mine, its in zip(*grads, strict=True):
        assert relative_error(mine.nan_to_num(), its.nan_to_num()) <= 1e-12


@pytest.mark.parametrize("of_pairs", [False, True], ids=["plain", "gated"])
def test_memory_stays_within_the_workspace(of_pairs: bool) -> None:
    batch = random_batch(8, images=4, captions=4, regions=24, words=16, width=64)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(8, 1)
    gate, temperature = (torch.ones(len(pairs), 16, 64), torch.ones(len(pairs), 16)) if of_pairs else (None, None)
    record = AttentionOptions("t2i", "clipped_l2norm", 9.0, "prob")
    given = batch.regions, batch.words, torch.tensor(batch.word_counts), None, pairs, gate, temperature, record
    bound = 2**20

    def beside(call: Callable[[], Sequence[Tensor | None]], results: Sequence[Tensor | None]) -> int:
        return peak_bytes(call) - sum(t.nbytes for t in results if t is not None)

    outputs = eager.forward(*given, workspace_bytes=bound)
    upstream = [torch.ones_like(t) for t in outputs]
    grads = eager.backward(*upstream, *given, workspace_bytes=bound)
    assert beside(lambda: eager.forward(*given, workspace_bytes=bound), outputs) <= bound
    needed = beside(lambda: eager.backward(*upstream, *given, workspace_bytes=bound), grads)
    assert bound / 4 < needed <= bound  # and blocks are not needlessly small


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_counts_in_every_form_and_packed_words(place: Place, direction: str) -> None:
    inputs = inputs_of({"direction": direction}, 9).to(torch.float32)
    batch, (expected, grads) = inputs.batch, run(inputs, place)
    counts = batch.word_counts
    for words in (batch.words, batch.packed().words):
        for form in (
            counts,
            torch.tensor(counts),
            torch.tensor(counts, dtype=torch.int32),
            caption_layout(counts, "cpu"),
        ):
            leaf = words.clone().to(place.device).requires_grad_()
            made = cross_attention(
                batch.regions.to(place.device),
                leaf,
                form,
                PAIRS,
                region_counts=batch.region_counts,
                direction=direction,
                backend=place.floor,
            )
            for mine, its in zip(made, expected, strict=True):
                assert torch.equal(mine.detach().cpu(), its)
    # The last leaf is packed: its gradient is that of the padded words without the padding.
    (grad,) = torch.autograd.grad(made, [leaf], upstream_of(made))
    assert torch.equal(grad.cpu(), torch.cat([row[:n] for row, n in zip(grads["words"], counts, strict=True)]))


def test_views_that_are_not_contiguous(place64: Place) -> None:
    inputs = inputs_of({"direction": "t2i"}, 10, of_pairs=True)
    expected, grads = run(inputs, place64)

    def view(tensor: Tensor) -> Tensor:
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide.to(place64.device)[..., ::2].requires_grad_()

    leaves = {name: view(tensor) for name, tensor in inputs.tensors().items()}
    turned = PAIRS.flip(1).t().contiguous().t().flip(1)
    made = inputs.call(leaves, place64.floor, turned)
    for mine, its in zip(made, expected, strict=True):
        assert score_error(mine.detach(), its) <= 1e-12
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in made]
    for (name, its), mine in zip(
        grads.items(), torch.autograd.grad(made, list(leaves.values()), upstream), strict=True
    ):
        assert relative_error(mine.cpu().nan_to_num(), its.nan_to_num()) <= 1e-12, name


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(place: Place) -> None:
    for options in FEW:
        made, grads = run(inputs_of(options, 11).to(torch.float32), place)
        assert all(t.isfinite().all() for t in (*made, *grads.values()))


@pytest.mark.parametrize("none", ["pairs", "images", "captions"])
def test_empty(place: Place, none: str) -> None:
    sizes = {} if none == "pairs" else {none: 0}
    inputs = inputs_of({"direction": "t2i"}, 12, region_counts=False, **sizes).to(torch.float32)
    made, grads = run(inputs, place, PAIRS[:0])
    assert made.weights.shape == (0, 9, 12)
    assert made.attended.shape == (0, 9, 24)
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("options", FEW, ids=label)
def test_two_runs_give_the_same_bits(place: Place, options: dict[str, Any]) -> None:
    inputs = inputs_of(options, 18, of_pairs=True).to(torch.float32)
    (first, grads), (second, others) = run(inputs, place), run(inputs, place)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(grads[name].nan_to_num(), others[name].nan_to_num()) for name in grads)


def test_unread_indices_out_of_range_are_nan(place64: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices on a GPU are never read: they are here what they would be there, unchecked."""
    monkeypatch.setattr("itm_kernels.ops.cross_attention.check_index_values", lambda *given: None)
    inputs = inputs_of({"direction": "t2i"}, 19)
    pairs = torch.tensor([[0, 0], [5, 0], [0, 6], [-1, 2], [3, 1]])
    made, grads = run(inputs, place64, pairs)
    for outputs in made:
        assert [bool(pair.isnan().all()) for pair in outputs] == [False, True, True, True, False]
        assert outputs[[0, 4]].isfinite().all()
    named = run(inputs, place64, PAIRS[:1])[0]
    assert score_error(made.weights[0], named.weights[0]) <= 1e-12
    assert all(grad.isfinite().all() for grad in grads.values())
    nowhere, zeros = run(inputs, place64, pairs[1:4])
    assert nowhere.weights.isnan().all()
    assert not any(grad.any() for grad in zeros.values())
