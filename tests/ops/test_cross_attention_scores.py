"""All floors of ``cross_attention_scores`` compute the same, in every option."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from focal import decided
from helpers import (
    GRADIENT_FLOOR,
    Batch,
    Place,
    Result,
    assert_exact,
    assert_ladder,
    every_option,
    label,
    option_pairs,
    random_batch,
    relative_error,
    run,
    score_error,
    score_floor,
    truth,
)

OP = "cross_attention_scores"

# Away from the defaults on purpose: an option that a floor ignores would show.
TEMPERATURES = {"lambda_softmax": 5.0, "lambda_lse": 3.0}


Case = tuple[tuple[str, Any], ...]


@functools.cache
def small(case: Case) -> tuple[Batch, Tensor, Result]:
    """A batch for one of all options, the pairs that rounding decides, and the truth."""
    batch, excused = decided(random_batch(2, images=3, captions=4, shortest=3), dict(case))
    return batch, excused, truth(batch, **dict(case))


@functools.cache
def large(case: Case) -> tuple[Batch, Tensor, Result, Result]:
    """Likewise in the sizes of real pairs, and what eager makes of it in float32."""
    batch = random_batch(3, images=6, captions=7, regions=36, words=20, width=96, shortest=3)
    batch, excused = decided(batch, dict(case))
    return batch, excused, truth(batch, **dict(case)), run(batch, "eager", **dict(case))


@pytest.mark.parametrize("options", every_option(), ids=label)
def test_the_gram_form_is_the_definition(options: dict[str, Any]) -> None:
    options = options | TEMPERATURES
    batch, _, true = small(tuple(options.items()))
    assert_exact(run(batch.to(torch.float64), "eager", **options), true, scores=1e-12, gradients=1e-10)


@pytest.mark.parametrize("options", every_option(), ids=label)
def test_native_computes_every_option(options: dict[str, Any]) -> None:
    reason = Place("native").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    options = options | TEMPERATURES
    batch, excused, true = small(tuple(options.items()))
    assert_ladder(run(batch, "native", **options), run(batch, "eager", **options), true, options, excused=excused)


@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_float32_stays_on_the_ladder(place: Place, options: dict[str, Any]) -> None:
    batch, excused, true, peer = large(tuple(options.items()))
    if place == Place("eager"):  # the ladder's own measure: sound in itself
        assert score_error(peer.scores[~excused], true.scores[~excused]) <= score_floor(options)
        assert max(map(relative_error, peer.gradients(), true.gradients())) <= 2 * GRADIENT_FLOOR
    else:
        assert_ladder(run(batch.to(place.device), place.floor, **options), peer, true, options, excused=excused)


@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_ragged_images_in_every_option(options: dict[str, Any]) -> None:
    batch = random_batch(9, captions=4, region_counts=True, dtype=torch.float64)
    assert_exact(run(batch, "eager", **options), truth(batch, **options), scores=1e-12, gradients=1e-10)


@pytest.mark.parametrize("options", option_pairs()[::3], ids=label)
def test_padding_is_never_used_and_gets_no_gradient(place: Place, options: dict[str, Any]) -> None:
    # Padding of a random batch is NaN; zeros and huge values there must give the same bits.
    batch = random_batch(4, region_counts=True)
    expected = run(batch.to(place.device), place.floor, **options)
    assert all(tensor.isfinite().all() for tensor in expected)
    for filler in (0.0, 1e30):
        other = random_batch(4, region_counts=True)
        for side, padding in zip((other.regions, other.words), other.padding(), strict=True):
            side[padding] = filler
        got = run(other.to(place.device), place.floor, **options)
        for mine, its in zip(got, expected, strict=True):
            assert torch.equal(mine, its)
    for gradient, padding in zip(expected.gradients(), batch.padding(), strict=True):
        assert (gradient.cpu()[padding] == 0).all()


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_two_directions_are_the_sum_of_one_and_one(place: Place, direction: str) -> None:
    batch = random_batch(5).to(place.device)
    parts = ("t2i", "i2t") if direction == "both" else (direction,)
    expected = sum(run(batch, place.floor, direction=part).scores for part in parts)
    torch.testing.assert_close(run(batch, place.floor, direction=direction).scores, expected, atol=1e-6, rtol=0)


def test_scores_of_a_pair_do_not_depend_on_the_others(place: Place) -> None:
    batch = random_batch(6, region_counts=True)
    together = run(batch.to(place.device), place.floor, direction="both").scores.cpu()
    for i, c in ((0, 0), (1, 3), (4, 5)):
        alone = random_batch(6, region_counts=True)
        alone = type(alone)(
            alone.regions[i : i + 1],
            alone.words[c : c + 1],
            alone.word_counts[c : c + 1],
            alone.region_counts[i : i + 1] if alone.region_counts else None,
            alone.grad_scores[i : i + 1, c : c + 1],
        )
        score = run(alone.to(place.device), place.floor, direction="both").scores.cpu()
        torch.testing.assert_close(score[0, 0], together[i, c], atol=2e-6, rtol=0)


def test_the_defaults_are_scans(place: Place) -> None:
    batch = random_batch(7).to(place.device)
    spelt = run(
        batch,
        place.floor,
        direction="t2i",
        raw_feature_norm="clipped_l2norm",
        lambda_softmax=9.0,
        agg_func="LogSumExp",
        lambda_lse=6.0,
        focal=None,
        peak_weight=0.0,
    )
    for mine, its in zip(run(batch, place.floor), spelt, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "i2t"},
        {"direction": "both"},
        {"raw_feature_norm": "l2norm"},
        {"raw_feature_norm": "softmax"},
        {"lambda_softmax": 4.0},
        {"agg_func": "Mean"},
        {"lambda_lse": 5.0},
        {"focal": "equal"},
        {"focal": "prob"},
        {"peak_weight": 0.5},
    ],
    ids=label,
)
def test_no_option_is_ignored(place: Place, change: dict[str, Any]) -> None:
    batch = random_batch(8).to(place.device)
    difference = run(batch, place.floor).scores - run(batch, place.floor, **change).scores
    assert difference.abs().max() > 1e-3
