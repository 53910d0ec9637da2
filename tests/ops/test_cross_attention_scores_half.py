"""bfloat16 and float16 inputs of ``cross_attention_scores``: over 1,000 scores, against eager in the same dtype."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from focal import undecided, without
from helpers import Batch, Place, Result, assert_ladder, label, random_batch, run, score_error, truth

OP = "cross_attention_scores"
CASES: list[dict[str, Any]] = [
    {"direction": "t2i"},
    {"direction": "i2t", "lambda_softmax": 4.0, "lambda_lse": 5.0},
    {"direction": "both", "agg_func": "Mean"},
    {"direction": "t2i", "raw_feature_norm": "softmax", "agg_func": "Sum"},
    {"direction": "t2i", "raw_feature_norm": "no_norm", "agg_func": "Mean"},
    {"direction": "i2t", "raw_feature_norm": "l1norm", "agg_func": "LogSumExp"},
    {"direction": "both", "raw_feature_norm": "clipped", "agg_func": "Mean"},
    {"direction": "t2i", "agg_func": "Mean", "peak_weight": 0.5},
    {"direction": "both", "agg_func": "Mean", "lambda_softmax": 20.0, "focal": "equal"},
    {"direction": "both", "agg_func": "Mean", "lambda_softmax": 20.0, "focal": "prob"},
]


DTYPES = [torch.bfloat16, torch.float16]


@functools.cache
def pairs(dtype: torch.dtype, case: tuple[tuple[str, Any], ...]) -> tuple[Batch, Tensor, Result, Result]:
    """A batch, the pairs in which a mask flips, the truth, and what eager makes of it in the same dtype."""
    # Few queries and keys a pair, many pairs: so that BFAN's masks do not flip in all of them.
    batch = random_batch(151, images=40, captions=50, regions=9, words=7, width=64, shortest=3, dtype=dtype)
    options = dict(case)
    flips = undecided(batch, options, 2e-3, rounding=dtype)
    batch = without(batch, flips)
    return batch, flips, truth(batch, **options), run(batch, "eager", **options)


@pytest.mark.parametrize("options", CASES, ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_stays_on_the_ladder(fast_place: Place, dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch, flips, true, peer = pairs(dtype, tuple(options.items()))
    assert (~flips).sum() >= 1000
    assert flips.any() == ("focal" in options)
    if fast_place == Place("eager"):  # the ladder's own measure: sound in itself
        bound = 0.1 if options.get("agg_func") == "Sum" else 0.02
        assert score_error(peer.scores[~flips], true.scores[~flips]) <= bound
    else:
        got = run(batch.to(fast_place.device), fast_place.floor, **options)
        assert_ladder(got, peer, true, options, noise=False, excused=flips)


@functools.cache
def ragged(dtype: torch.dtype, direction: str) -> tuple[Batch, Result, Result]:
    """A ragged batch, its truth and eager's result, with packed words."""
    batch = random_batch(152, images=70, captions=15, width=40, region_counts=True, shortest=6, dtype=dtype)
    packed = batch.packed()
    return batch, truth(packed, direction=direction), run(packed, "eager", direction=direction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_half_precision_ragged_and_packed(fast_place: Place, dtype: torch.dtype, direction: str) -> None:
    batch, true, peer = ragged(dtype, direction)
    options = {"direction": direction}
    packed = run(batch.packed().to(fast_place.device), fast_place.floor, **options)
    assert_ladder(packed, peer, true, options, noise=False)
    padded = run(batch.to(fast_place.device), fast_place.floor, **options)
    rows = ~batch.padding()[1].to(fast_place.device)
    padded = Result(padded.scores, padded.grad_regions, padded.grad_words[rows])
    assert_ladder(padded, peer, true, options, noise=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_over_blocks_is_float32(fast_place: Place, dtype: torch.dtype) -> None:
    # Sums of many blocks in half precision would lose what a single block keeps.
    batch = random_batch(153, images=64, captions=24, regions=9, words=8, width=32, shortest=3, dtype=dtype)
    true, whole = truth(batch), run(batch, "eager")
    many = run(batch.to(fast_place.device), fast_place.floor, workspace_bytes=1 << 16)
    assert_ladder(many, whole, true, {}, noise=False)
