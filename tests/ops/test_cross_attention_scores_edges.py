"""Edges of ``cross_attention_scores``, finite and equal on all floors: one, none, zeros, equals, extremes, NaN."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from helpers import Batch, Place, Result, label, random_batch, relative_error, run, score_error, truth, unit
from itm_kernels import cross_attention_scores
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS

OP = "cross_attention_scores"
OPTIONS = [
    {"direction": direction, "raw_feature_norm": norm, "focal": focal}
    for norm, focal, direction in itertools.product(RAW_FEATURE_NORMS, (None, "equal", "prob"), DIRECTIONS)
]
# A norm over a single query divides a number by itself: its gradient is what rounding leaves of a difference of equals.
GRADIENT_OF_ONE = 5e-5


def ones(regions: int, words: int) -> Batch:
    return random_batch(101, images=3, captions=4, regions=regions, words=words, width=16, shortest=words)


def zero_word() -> Batch:
    batch = random_batch(102, regions=7, words=6, width=16, shortest=3)
    batch.words[:, 1] = 0.0
    return batch


def zero_region() -> Batch:
    batch = random_batch(103, regions=7, words=6, width=16, shortest=3)
    batch.regions[:, 2] = 0.0
    return batch


def zeros() -> Batch:
    batch = random_batch(104, regions=7, words=6, width=16, shortest=3)
    batch.regions[1], batch.words[2] = 0.0, 0.0
    return batch


def alike() -> Batch:
    """Identical regions, identical words: every attention is uniform and BFAN's strict comparison keeps nothing."""
    batch = random_batch(105, regions=7, words=6, width=16, shortest=6)
    batch.regions[:] = batch.regions[:, :1].clone()
    batch.words[:] = batch.words[:, :1].clone()
    return batch


EDGES = {
    "one region": ones(1, 6),
    "one word": ones(7, 1),
    "one region, one word": ones(1, 1),
    "a zero word": zero_word(),
    "a zero region": zero_region(),
    "a zero image, a zero caption": zeros(),
    "all alike": alike(),
}


@functools.cache
def true_result(edge: str, case: tuple[tuple[str, Any], ...]) -> Result:
    return truth(EDGES[edge], **dict(case))


def cases_of(place: Place) -> list[dict[str, Any]]:
    """All on native, with the aggregations in turn; a third and fewer on the floors written in torch."""
    cases = [case | {"agg_func": agg} for case, agg in zip(OPTIONS, itertools.cycle(AGG_FUNCS), strict=False)]
    return cases[:: {"native": 1, "eager": 3, "triton": 9, "reference": 5}[place.floor]]


def assert_edge(edge: str, got: Result, case: dict[str, Any], *, scores: float, gradients: float) -> None:
    true = true_result(edge, tuple(case.items()))
    for name, value in zip(("scores", "regions", "words"), got, strict=True):
        assert value.isfinite().all(), f"{label(case)}: {name}"
    assert score_error(got.scores, true.scores) <= scores * (10 if case["agg_func"] == "Sum" else 1), label(case)
    for mine, real in zip(got.gradients(), true.gradients(), strict=True):
        if edge == "all alike":
            # Which of the equals is the largest, or kept, is up to rounding; together they get the same.
            mine, real = mine.sum(1), real.sum(1)
        assert relative_error(mine, real) <= gradients, label(case)


@pytest.mark.parametrize("edge", EDGES)
def test_the_edges_are_finite_and_equal_on_all_floors(place: Place, edge: str) -> None:
    batch = EDGES[edge].to(place.device)
    for case in cases_of(place):
        assert_edge(edge, run(batch, place.floor, **case), case, scores=1e-6, gradients=GRADIENT_OF_ONE)


@pytest.mark.parametrize("edge", EDGES)
def test_the_edges_in_float64(edge: str) -> None:
    batch = EDGES[edge].to(torch.float64)
    for case in cases_of(Place("eager")):
        assert_edge(edge, run(batch, "eager", **case), case, scores=1e-9, gradients=1e-6)


@pytest.mark.parametrize("focal", ["equal", "prob"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bfan_keeps_all_where_all_are_equal(place: Place, direction: str, focal: str) -> None:
    batch = EDGES["all alike"].to(place.device)
    plain = run(batch, place.floor, direction=direction)
    kept = run(batch, place.floor, direction=direction, focal=focal)
    torch.testing.assert_close(kept.scores, plain.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("agg_func", ["Max", "LogSumExp", "Mean"])
def test_the_peak_of_equals_goes_to_the_first(place: Place, agg_func: str) -> None:
    # Two pairs of exactly equal keys: the peak's gradient belongs to the first of the best.
    batch = random_batch(106, images=3, captions=3, regions=8, words=5, width=16, shortest=5)
    batch.regions[:, 4:] = batch.regions[:, :4].clone()
    options = {"direction": "t2i", "peak_weight": 0.5, "raw_feature_norm": "no_norm", "agg_func": agg_func}
    got, true = run(batch.to(place.device), place.floor, **options), truth(batch, **options)
    for mine, real in zip(got.gradients(), true.gradients(), strict=True):
        assert relative_error(mine, real) <= 5e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("images", "captions"), [(0, 4), (3, 0), (0, 0)])
def test_none_of_something(place: Place, images: int, captions: int, direction: str) -> None:
    batch = random_batch(107, images=images, captions=captions).to(place.device)
    for given in (batch, batch.packed()):
        got = run(given, place.floor, direction=direction)
        assert got.scores.shape == (images, captions)
        assert got.scores.dtype == torch.float32
        assert got.grad_regions.shape == given.regions.shape
        assert got.grad_words.shape == given.words.shape
        assert not got.grad_regions.any()
        assert not got.grad_words.any()


def test_no_captions_in_any_form(place: Place) -> None:
    regions = torch.randn(2, 3, 4, device=place.device)
    for words in (torch.empty(0, 5, 4, device=place.device), torch.empty(0, 4, device=place.device)):
        for counts in ([], (), torch.empty(0, dtype=torch.int64)):
            assert cross_attention_scores(regions, words, counts, backend=place.floor).shape == (2, 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_region_counts_are_shorter_images(place: Place, direction: str) -> None:
    batch = random_batch(108, region_counts=True)
    got = run(batch.to(place.device), place.floor, direction=direction)
    assert batch.region_counts is not None
    for i, n in enumerate(batch.region_counts):
        cut = dataclasses.replace(
            batch, regions=batch.regions[i : i + 1, :n], region_counts=None, grad_scores=batch.grad_scores[i : i + 1]
        )
        alone = run(cut.to(place.device), place.floor, direction=direction)
        torch.testing.assert_close(got.scores[i : i + 1], alone.scores, atol=2e-6, rtol=0)
        torch.testing.assert_close(got.grad_regions[i : i + 1, :n], alone.grad_regions, atol=1e-5, rtol=1e-4)


def test_all_regions_counted_is_no_counts(place: Place) -> None:
    batch = random_batch(109)
    full = dataclasses.replace(batch, region_counts=[batch.regions.shape[1]] * batch.regions.shape[0])
    for mine, its in zip(
        run(full.to(place.device), place.floor), run(batch.to(place.device), place.floor), strict=True
    ):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"lambda_softmax": 1000.0}, {"lambda_lse": 500.0}, {"lambda_softmax": -3.0},
                                     {"lambda_softmax": 0.0}], ids=label)  # fmt: skip
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temperatures_far_out(place: Place, options: dict[str, Any], direction: str) -> None:
    # Nothing overflows: every exponent is shifted by its maximum.
    case = options | {"direction": direction, "raw_feature_norm": "no_norm"}
    batch = random_batch(110, shortest=3)
    got, true = run(batch.to(place.device), place.floor, **case), truth(batch, **case)
    assert all(value.isfinite().all() for value in got)
    sharpness = max(abs(case.get("lambda_softmax", 9.0)), case.get("lambda_lse", 6.0)) / 6.0
    assert score_error(got.scores, true.scores) <= 1e-6 * sharpness
    for mine, real in zip(got.gradients(), true.gradients(), strict=True):
        assert relative_error(mine, real) <= 5e-6 * sharpness


@pytest.mark.parametrize("length", [1e-3, 1e3])
@pytest.mark.parametrize("norm", RAW_FEATURE_NORMS)
def test_vectors_of_other_lengths(place: Place, norm: str, length: float) -> None:
    batch = random_batch(111, shortest=3)
    batch = dataclasses.replace(batch, regions=batch.regions * length, words=batch.words * length)
    options = {"raw_feature_norm": norm, "direction": "both", "lambda_softmax": 0.01}
    got, true = run(batch.to(place.device), place.floor, **options), truth(batch, **options)
    assert all(value.isfinite().all() for value in got)
    # Logits of 10^4 carry the rounding of 10^4; normalised ones do not.
    tolerance = 2e-3 if length > 1 and norm in ("no_norm", "clipped", "softmax") else 5e-6
    assert score_error(got.scores, true.scores) <= tolerance


@pytest.mark.parametrize("agg_func", AGG_FUNCS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_reaches_the_scores_it_belongs_to(place: Place, direction: str, agg_func: str) -> None:
    batch = random_batch(112, images=3, captions=3, regions=7, words=5, width=16, shortest=5)
    batch.words[1, 3] = torch.nan
    batch.regions[2, 4] = torch.nan
    expected = torch.zeros(3, 3, dtype=torch.bool)
    expected[:, 1] = expected[2, :] = True
    for norm in RAW_FEATURE_NORMS:
        options = {"direction": direction, "agg_func": agg_func, "raw_feature_norm": norm}
        found = run(batch.to(place.device), place.floor, **options).scores.isnan().cpu()
        assert torch.equal(found, expected), f"{norm}: {found.tolist()}"


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_a_cosine_stays_a_cosine_where_keys_cancel(place: Place, direction: str) -> None:
    # Two opposite keys, attended almost equally: what is attended to is nearly nothing, a difference of equals.
    generator = torch.Generator().manual_seed(0)
    key, queries = unit(20, 1, 16, generator=generator), unit(20, 3, 16, generator=generator)
    keys = torch.cat([key, -key], 1).float().to(place.device)
    pair = (keys, queries.float().to(place.device)) if direction == "t2i" else (queries.float().to(place.device), keys)
    counts = [pair[1].shape[1]] * 20
    scores = cross_attention_scores(
        *pair, counts, direction=direction, raw_feature_norm="no_norm", lambda_softmax=1e-3, agg_func="Mean",
        backend=place.floor,
    )  # fmt: skip
    assert scores.abs().max() <= 1.001
