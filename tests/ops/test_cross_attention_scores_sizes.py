"""Sizes of ``cross_attention_scores``: no size is hard-coded, none has to be a power of two."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Batch, Place, assert_exact, assert_ladder, random_batch, run, truth
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS

OP = "cross_attention_scores"


def leaning(batch: Batch) -> Batch:
    """Vectors moved towards one side, as encoders' are.

    In few dimensions random vectors attended to may cancel to nearly nothing, and a cosine with nothing is noise.
    """
    return dataclasses.replace(batch, regions=batch.regions.abs(), words=batch.words.abs())


def assert_fits(place: Place, batch: Batch, **options: Any) -> None:
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    assert_ladder(run(batch.to(place.device), place.floor, **options), peer, true, options)


@pytest.mark.parametrize("regions", [2, 7, 36, 100, 577])
def test_regions(place: Place, regions: int) -> None:
    batch = random_batch(161, images=3, captions=4, regions=regions, words=11, width=40, shortest=3)
    assert_fits(place, batch, direction="both")


@pytest.mark.parametrize("width", [1, 2, 3, 5, 64, 255, 256, 257, 1000])
def test_widths(place: Place, width: int) -> None:
    batch = random_batch(162, images=3, captions=4, regions=9, words=7, width=width, shortest=3)
    assert_fits(place, leaning(batch), direction="both", agg_func="Mean")


@pytest.mark.parametrize("words", [2, 15, 16, 17, 33, 300])
def test_words(place: Place, words: int) -> None:
    batch = random_batch(163, images=3, captions=5, regions=12, words=words, width=40, shortest=3)
    assert_fits(place, batch, direction="both")


def test_many_short_captions(fast_place: Place) -> None:
    # More captions than a tile of the native epilogue holds.
    batch = random_batch(164, images=3, captions=200, regions=6, words=4, width=16, word_counts=[3, 4, 2, 4] * 50)
    assert_fits(fast_place, batch, direction="both", agg_func="Mean")


@pytest.mark.parametrize("focal", ["equal", "prob"])
def test_a_long_caption_among_short_ones(place: Place, focal: str) -> None:
    counts = [3, 4, 200, 5, 3, 4]
    batch = random_batch(165, images=3, captions=6, regions=20, words=200, width=32, word_counts=counts)
    assert_fits(place, batch, direction="t2i", focal=focal, lambda_softmax=20.0, agg_func="Mean")


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Batch, dict[str, Any]]:
    """A ragged batch of any shape, and options."""
    images, captions = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    regions, words = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    batch = random_batch(
        draw(st.integers(0, 2**16)),
        images=images,
        captions=captions,
        regions=regions,
        words=words,
        width=draw(st.integers(1, 70)),
        word_counts=draw(st.lists(st.integers(1, words), min_size=captions, max_size=captions)),
        region_counts=draw(st.booleans()),
    )
    options = {
        "direction": draw(st.sampled_from(DIRECTIONS)),
        "raw_feature_norm": draw(st.sampled_from(RAW_FEATURE_NORMS)),
        "agg_func": draw(st.sampled_from(AGG_FUNCS)),
        "workspace_bytes": draw(st.sampled_from([1, 1 << 14, 1 << 18, 1 << 28])),
    }
    batch = leaning(batch)
    return (batch.packed() if draw(st.booleans()) else batch), options


@settings(max_examples=60)
@given(case=ragged())
def test_any_ragged_batch_on_native(case: tuple[Batch, dict[str, Any]]) -> None:
    reason = Place("native").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    batch, options = case
    true, got = truth(batch, **options), run(batch, "native", **options)
    # Scores of a sum over up to 80 cosines, in float32.
    torch.testing.assert_close(got.scores.double(), true.scores, atol=2e-6, rtol=1e-6)
    for mine, real in zip(got.gradients(), true.gradients(), strict=True):
        assert mine.isfinite().all()
        # Norms over one query leave rounding: compared where the gradient is not tiny beside the others.
        scale = float(real.abs().max())
        assert float((mine.double() - real).abs().max()) <= 1e-4 * max(scale, 1e-3)


@settings(max_examples=40)
@given(case=ragged())
def test_any_ragged_batch_on_eager(case: tuple[Batch, dict[str, Any]]) -> None:
    batch, options = case
    batch = batch.to(torch.float64)
    assert_exact(run(batch, "eager", **options), truth(batch, **options), scores=1e-11, gradients=1e-7)
