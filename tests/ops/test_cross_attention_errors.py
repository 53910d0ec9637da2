"""What ``cross_attention`` refuses, with its sentence, before any floor runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from itm_kernels import cross_attention
from stage_suite import refused


def arguments() -> dict[str, Any]:
    """A call that works: 2 images of 3 regions, 3 captions of at most 3 words, 2 pairs, width 4."""
    return {
        "regions": torch.randn(2, 3, 4),
        "words": torch.randn(3, 5, 4),
        "word_counts": [3, 1, 2],
        "pairs": torch.tensor([[0, 2], [1, 1]]),
    }


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "regions no tensor": ({"regions": 1}, TypeError, "regions must be a tensor, got int"),
    "words of another width": (
        {"words": torch.randn(3, 5, 3)},
        ValueError,
        "words must be [C, W, D] or packed [N, D] with D = 4 as in regions, got [3, 5, 3]",
    ),
    "counts": ({"word_counts": [3, 6, 1]}, ValueError, "word_counts must be in 1..5, got 6 at position 1"),
    "counts of packed words": (
        {"words": torch.randn(7, 4)},
        ValueError,
        "packed words must be [N, D] with N = 6, the sum of word_counts, got [7, 4]",
    ),
    "region counts": ({"region_counts": [4, 1]}, ValueError, "region_counts must be in 1..3, got 4 at position 0"),
    "pairs no tensor": ({"pairs": [[0, 0]]}, TypeError, "pairs must be an int64 tensor, got list"),
    "pairs of floats": ({"pairs": torch.zeros(1, 2)}, TypeError, "pairs must be an int64 tensor, got torch.float32"),
    "pairs of three": (
        {"pairs": torch.zeros(2, 3, dtype=torch.int64)},
        ValueError,
        "pairs must be [P, 2] (image, caption), got [2, 3]",
    ),
    "image out of range": (
        {"pairs": torch.tensor([[0, 0], [2, 0]])},
        ValueError,
        "pairs must name images within 0..1, got 2 in row 1",
    ),
    "caption out of range": (
        {"pairs": torch.tensor([[0, -1]])},
        ValueError,
        "pairs must name captions within 0..2, got -1 in row 0",
    ),
    "direction": ({"direction": "both"}, ValueError, "direction must be one of t2i, i2t, got 'both'"),
    "norm": (
        {"raw_feature_norm": "l3norm"},
        ValueError,
        "raw_feature_norm must be one of softmax, l2norm, clipped_l2norm, l1norm, clipped_l1norm, clipped, no_norm, "
        "got 'l3norm'",
    ),
    "lambda no number": ({"lambda_softmax": "9"}, TypeError, "lambda_softmax must be a number, got '9'"),
    "lambda NaN": ({"lambda_softmax": math.nan}, ValueError, "lambda_softmax must be a finite number, got nan"),
    "focal": ({"focal": "most"}, ValueError, "focal must be None, 'equal' or 'prob', got 'most'"),
    "focal none": ({"focal": "none"}, ValueError, "focal must be None, 'equal' or 'prob', got 'none'"),
    "gate": (
        {"gate": torch.ones(2, 3, 4)},
        ValueError,
        "gate must be [P, W, D] with P = 2, W = 5, D = 4, got [2, 3, 4]",
    ),
    "gate of regions": (
        {"gate": torch.ones(2, 5, 4), "direction": "i2t"},
        ValueError,
        "gate must be [P, R, D] with P = 2, R = 3, D = 4, got [2, 5, 4]",
    ),
    "gate dtype": (
        {"gate": torch.ones(2, 5, 4).double()},
        TypeError,
        "gate must be torch.float32, got torch.float64",
    ),
    "temperature": (
        {"temperature": torch.ones(2)},
        ValueError,
        "temperature must be [P, W] with P = 2, W = 5, got [2]",
    ),
    "temperature a number": ({"temperature": 10.0}, TypeError, "temperature must be a tensor, got float"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 'cuda'",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    changed, error, message = REFUSALS[change]
    refused(cross_attention, error, message, {**arguments(), **changed})


def test_the_call_that_refusals_change_works() -> None:
    assert cross_attention(**arguments()).weights.shape == (2, 5, 3)
