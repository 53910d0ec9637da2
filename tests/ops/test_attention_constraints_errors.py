"""What ``attention_constraints`` refuses, with its sentence, before any floor runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from itm_kernels import attention_constraints
from stage_suite import refused


def arguments() -> dict[str, Any]:
    """A call that works: 2 images of 3 regions, 3 captions of at most 5 words, 2 pairs, width 4."""
    return {
        "regions": torch.randn(2, 3, 4),
        "words": torch.randn(3, 5, 4),
        "word_counts": [3, 1, 2],
        "pairs": torch.tensor([[0, 2], [1, 1]]),
        "swapped": torch.tensor([[0, 2, -1, -1, -1], [10, -1, -1, -1, -1]]),
    }


def rows(*of_first: int) -> torch.Tensor:
    """``swapped`` that starts with these."""
    swapped = torch.full((2, 5), -1)
    swapped[0, : len(of_first)] = torch.tensor(of_first)
    return swapped


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "regions no tensor": ({"regions": 1}, TypeError, "regions must be a tensor, got int"),
    "counts": ({"word_counts": [3, 6, 1]}, ValueError, "word_counts must be in 1..5, got 6 at position 1"),
    "region counts": ({"region_counts": [4, 1]}, ValueError, "region_counts must be in 1..3, got 4 at position 0"),
    "no diagonal": (
        {"pairs": None},
        ValueError,
        "pairs must be given where I and C differ, got None with I = 2, C = 3",
    ),
    "pairs of a name": ({"pairs": "some"}, ValueError, "pairs must be None, 'all' or [P, 2] indices, got 'some'"),
    "pairs no tensor": ({"pairs": [[0, 0]]}, TypeError, "pairs must be an int64 tensor, got list"),
    "image out of range": (
        {"pairs": torch.tensor([[0, 0], [2, 0]])},
        ValueError,
        "pairs must name images within 0..1, got 2 in row 1",
    ),
    "swapped no tensor": ({"swapped": [[0]]}, TypeError, "swapped must be an int64 tensor, got list"),
    "swapped int32": ({"swapped": rows().int()}, TypeError, "swapped must be an int64 tensor, got torch.int32"),
    "swapped of all pairs": (
        {"pairs": "all"},
        ValueError,
        "swapped must be [P, W] with P = 6, W = 5, got [2, 5]",
    ),
    "swapped of words": (
        {"direction": "i2t"},
        ValueError,
        "swapped must be [P, R] with P = 2, R = 3, got [2, 5]",
    ),
    "swapped out of range": (
        {"swapped": rows(0, 15)},
        ValueError,
        "swapped must be within 0..14, or -1, got 15 at [0, 1]",
    ),
    "swapped below": ({"swapped": rows(-2)}, ValueError, "swapped must be within 0..14, or -1, got -2 at [0, 0]"),
    "swapped of the padding": (
        {"swapped": rows(0, 6)},
        ValueError,
        "swapped must not name padding, got row 6 at [0, 1]",
    ),
    "swapped padding of regions": (
        {"direction": "i2t", "region_counts": [3, 1], "swapped": torch.tensor([[0, 1, 4], [-1, -1, -1]])},
        ValueError,
        "swapped must not name padding, got row 4 at [0, 2]",
    ),
    "swapped out of packed words": (
        {"words": torch.randn(6, 4), "swapped": rows(0, 6)[:, :3]},
        ValueError,
        "swapped must be within 0..5, or -1, got 6 at [0, 1]",
    ),
    "direction": ({"direction": "both"}, ValueError, "direction must be one of t2i, i2t, got 'both'"),
    "norm": (
        {"raw_feature_norm": "l3norm"},
        ValueError,
        "raw_feature_norm must be one of softmax, l2norm, clipped_l2norm, l1norm, clipped_l1norm, clipped, no_norm, "
        "got 'l3norm'",
    ),
    "lambda NaN": ({"lambda_softmax": math.nan}, ValueError, "lambda_softmax must be a finite number, got nan"),
    "focal": ({"focal": "most"}, ValueError, "focal must be None, 'equal' or 'prob', got 'most'"),
    "focal none": ({"focal": "none"}, ValueError, "focal must be None, 'equal' or 'prob', got 'none'"),
    "swap": ({"swap": "key"}, ValueError, "swap must be one of query, content, got 'key'"),
    "detach": ({"detach_swapped": 1}, TypeError, "detach_swapped must be True or False, got 1"),
    "margin no number": ({"ccr_margin": "0.2"}, TypeError, "ccr_margin must be a number, got '0.2'"),
    "margin NaN": ({"ccr_margin": math.nan}, ValueError, "ccr_margin must be a finite number of at least 0, got nan"),
    "margin below 0": ({"ccs_margin": -0.1}, ValueError, "ccs_margin must be a finite number of at least 0, got -0.1"),
    "gate": (
        {"gate": torch.ones(2, 3, 4)},
        ValueError,
        "gate must be [P, W, D] with P = 2, W = 5, D = 4, got [2, 3, 4]",
    ),
    "gate and content": (
        {"gate": torch.ones(2, 5, 4), "swap": "content"},
        ValueError,
        "gate must be None with swap 'content': what it would be for a swap is not known",
    ),
    "temperature and content": (
        {"temperature": torch.ones(2, 5), "swap": "content"},
        ValueError,
        "temperature must be None with swap 'content': what it would be for a swap is not known",
    ),
    "temperature": (
        {"temperature": torch.ones(2)},
        ValueError,
        "temperature must be [P, W] with P = 2, W = 5, got [2]",
    ),
    "workspace": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 'cuda'",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    changed, error, message = REFUSALS[change]
    refused(attention_constraints, error, message, {**arguments(), **changed})


def test_the_call_that_refusals_change_works() -> None:
    assert attention_constraints(**arguments()).ccr.shape == (2, 5)
