"""``alignment_vectors`` on every floor, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itm_kernels import alignment_vectors, caption_layout
from stage_suite import StageSuite, refused
from stages import Case, floors, run_stage, stage_batch

OP = "alignment_vectors"


class TestAlignmentVectors(StageSuite):
    cases = tuple(
        Case(OP, {"direction": direction}, given)
        for direction in ("t2i", "i2t")
        for given in ((), ("attention_scores",), ("temperature",), ("attention_scores", "temperature"))
    )


@floors
def test_one_temperature_is_the_same_for_all_queries(backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP, {}, ("temperature",)), 1).to(dtype)
    made.tensors["temperature"].fill_(4.0)
    (expected,) = run_stage(made, backend).outputs
    del made.tensors["temperature"]
    assert torch.equal(run_stage(made, backend, temperature=4.0).outputs[0], expected)
    assert not torch.equal(run_stage(made, backend).outputs[0], expected)  # 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_padded_words_are_packed_whatever_form_their_counts_have(direction: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP, {"direction": direction}), 2).to(dtype)
    (expected,) = run_stage(made).outputs
    tensors, counts = made.padded().tensors, made.batch.word_counts
    words = tensors["words"].requires_grad_()
    for form in (counts, torch.tensor(counts), torch.tensor(counts, dtype=torch.int32), caption_layout(counts, "cpu")):
        vectors = alignment_vectors(
            tensors["regions"],
            words,
            form,
            tensors["weight"],
            tensors["bias"],
            region_counts=made.batch.region_counts,
            direction=direction,
        )
        assert torch.equal(vectors.detach(), expected)
        (grad,) = torch.autograd.grad(vectors.sum(), [words])
        assert grad.isfinite().all()
        assert (grad[words.isnan()] == 0).all()


@floors
def test_regions_that_do_not_count_have_zeros(backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP, {"direction": "i2t"}), 3).to(dtype)
    (vectors,) = run_stage(made, backend).outputs
    beyond = made.batch.padding()[0]
    assert beyond.any()
    assert not vectors[beyond].any()
    assert vectors[~beyond].any(-1).all()


def inputs() -> dict[str, Any]:
    """A call that works: 2 images of 3 regions, 3 captions of 6 words in all, width 4, 5 numbers."""
    return {
        "regions": torch.randn(2, 3, 4),
        "words": torch.randn(6, 4),
        "word_counts": [3, 1, 2],
        "weight": torch.randn(5, 4),
        "bias": torch.randn(5),
    }


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "regions no tensor": ({"regions": 1}, TypeError, "regions must be a tensor, got int"),
    "words of another width": (
        {"words": torch.randn(6, 3)},
        ValueError,
        "words must be [C, W, D] or packed [N, D] with D = 4 as in regions, got [6, 3]",
    ),
    "counts": (
        {"word_counts": [3, 1, 1]},
        ValueError,
        "packed words must be [N, D] with N = 5, the sum of word_counts, got [6, 4]",
    ),
    "counts of padded words": (
        {"words": torch.randn(3, 2, 4)},
        ValueError,
        "word_counts must be in 1..2, got 3 at position 0",
    ),
    "region counts": (
        {"region_counts": [4, 1]},
        ValueError,
        "region_counts must be in 1..3, got 4 at position 0",
    ),
    "direction": (
        {"direction": "both"},
        ValueError,
        "direction must be one of t2i, i2t, got 'both'",
    ),
    "weight": (
        {"weight": torch.randn(4, 5)},
        ValueError,
        "weight must be [S, D] with S = 5, D = 4, got [4, 5]",
    ),
    "weight no tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "weight dtype": (
        {"weight": torch.randn(5, 4).double()},
        TypeError,
        "weight must be torch.float32, got torch.float64",
    ),
    "bias": ({"bias": torch.randn(5, 1)}, ValueError, "bias must be [S] with S = 1, got [5, 1]"),
    "attention scores": (
        {"attention_scores": torch.randn(2, 6, 3)},
        ValueError,
        "attention_scores must be [I, R, N] with I = 2, R = 3, N = 6, got [2, 6, 3]",
    ),
    "attention scores dtype": (
        {"attention_scores": torch.zeros(2, 3, 6, dtype=torch.int64)},
        TypeError,
        "attention_scores must be torch.float32, got torch.int64",
    ),
    "temperatures": (
        {"temperature": torch.ones(2, 3, 3)},
        ValueError,
        "temperature must be [I, N] with I = 2, N = 6, got [2, 3, 3]",
    ),
    "temperatures of regions": (
        {"temperature": torch.ones(2, 6), "direction": "i2t"},
        ValueError,
        "temperature must be [I, R, C] with I = 2, R = 3, C = 3, got [2, 6]",
    ),
    "temperature no number": ({"temperature": "9"}, TypeError, "temperature must be a number, got '9'"),
    "temperature NaN": (
        {"temperature": float("nan")},
        ValueError,
        "temperature must be a finite number of at least 0, got nan",
    ),
    "temperature negative": (
        {"temperature": -1},
        ValueError,
        "temperature must be a finite number of at least 0, got -1.0",
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
    arguments, error, message = REFUSALS[change]
    refused(alignment_vectors, error, message, {**inputs(), **arguments})


def test_the_call_that_refusals_change_works() -> None:
    assert alignment_vectors(**inputs()).shape == (2, 6, 5)
