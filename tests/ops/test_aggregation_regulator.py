"""``aggregation_regulator`` on every floor, its dropout, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import score_error
from itm_kernels import AggregationParameters, aggregation_regulator
from stage_suite import IN_BLOCKS, StageSuite, refused, skip_without
from stages import ROUNDING, Case, floors, stage_batch

OP = "aggregation_regulator"
DROPPED = {"dropout": 0.4, "seed": 2**40, "image_offset": 3, "caption_offset": 9}


class TestAggregationRegulator(StageSuite):
    cases = (
        *(
            Case(OP, {"direction": direction, "step": step}, ("pooled",) if step else ())
            for direction in ("t2i", "i2t")
            for step in (0, 2)
        ),
        *(Case(OP, {"direction": direction, "step": 1, **DROPPED}, ("pooled",)) for direction in ("t2i", "i2t")),
    )


@floors
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_masks_ask_for_the_place_in_the_whole_batch(direction: str, backend: str, dtype: torch.dtype) -> None:
    options = {"direction": direction, "step": 1, "dropout": 0.4, "seed": 7}
    made = stage_batch(Case(OP, options), 1, images=4, region_counts=False, word_counts=[2, 3, 1, 2]).to(dtype)
    (whole,) = made.outputs(made.tensors, backend=backend)
    vectors = made.tensors["alignments"]
    part = vectors[1:3, 2:6] if direction == "t2i" else vectors[1:3, :, 1:3]
    parameters = AggregationParameters(*(made.tensors[name] for name in AggregationParameters._fields))

    def pooled(**more: Any) -> torch.Tensor:
        return aggregation_regulator(part, None, [3, 1], parameters, **{**options, **more}, backend=backend)

    assert score_error(pooled(image_offset=1, caption_offset=1), whole[1:3, 1:3]) < ROUNDING[dtype]
    for change in ({}, {"image_offset": 1}, {"image_offset": 1, "caption_offset": 1, "seed": 8}):
        assert score_error(pooled(**change), whole[1:3, 1:3]) > 1e-3


@floors
def test_without_pooled_vectors_the_mean_asks(backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP), 2).to(dtype)
    (expected,) = made.outputs(made.tensors, backend=backend)
    captions = made.tensors["alignments"].split(made.batch.word_counts, dim=1)
    tensors = {**made.tensors, "pooled": torch.stack([caption.mean(1) for caption in captions], dim=1)}
    assert score_error(made.outputs(tensors, backend=backend)[0], expected) < ROUNDING[dtype]


@pytest.mark.parametrize("backend", ["reference", *IN_BLOCKS])
def test_narrow_matrices_beside_wide_alignments_set_the_products(backend: str) -> None:
    skip_without(backend, OP)
    made = stage_batch(Case(OP, {}, ("pooled",)), 3).to(torch.float32)
    narrow = {name: t if name in ("alignments", "pooled") else t.bfloat16() for name, t in made.tensors.items()}
    rounded = {name: t.float() for name, t in narrow.items()}
    mine, its = (made.outputs(tensors, backend=backend)[0] for tensors in (narrow, rounded))
    assert mine.dtype == torch.float32
    assert score_error(mine, its) < 2e-2
    if backend != "reference":  # the definition rounds matrices alone
        assert not torch.equal(mine, its)


def inputs() -> dict[str, Any]:
    """A call that works: 2 images, 3 captions of 6 words in all, S = 4, 2 steps."""
    matrix, vector = torch.randn(2, 4, 4), torch.randn(2, 4)
    return {
        "alignments": torch.randn(2, 6, 4),
        "pooled": torch.randn(2, 3, 4),
        "word_counts": [3, 1, 2],
        "parameters": AggregationParameters(matrix, vector, matrix, vector, vector, torch.randn(2)),
    }


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alignments no tensor": ({"alignments": None}, TypeError, "alignments must be a tensor, got NoneType"),
    "alignments dtype": (
        {"alignments": torch.zeros(2, 6, 4, dtype=torch.int64)},
        TypeError,
        "alignments must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    "alignments": (
        {"alignments": torch.randn(2, 3, 3, 4)},
        ValueError,
        "alignments must be [I, N, S] with direction 't2i', got [2, 3, 3, 4]",
    ),
    "alignments of words": (
        {"direction": "i2t"},
        ValueError,
        "alignments must be [I, R, C, S] with direction 'i2t', got [2, 6, 4]",
    ),
    "no regions": (
        {"direction": "i2t", "alignments": torch.randn(2, 0, 3, 4)},
        ValueError,
        "R and S must be at least 1, got alignments [2, 0, 3, 4]",
    ),
    "other captions": (
        {"direction": "i2t", "alignments": torch.randn(2, 5, 4, 4)},
        ValueError,
        "word_counts must be [C] with C = 4 as in alignments, got [3]",
    ),
    "counts": (
        {"word_counts": [3, 1, 1]},
        ValueError,
        "alignments must be [I, N, S] with N = 5, the sum of word_counts, got [2, 6, 4]",
    ),
    "a count of 0": (
        {"word_counts": [5, 1, 0]},
        ValueError,
        "word_counts must be at least 1, got 0 at position 2",
    ),
    "region counts of words": (
        {"region_counts": [1, 1]},
        ValueError,
        "region_counts must be None with direction 't2i': alignments have rows of words alone there",
    ),
    "region counts": (
        {"direction": "i2t", "alignments": torch.randn(2, 5, 3, 4), "region_counts": [6, 1]},
        ValueError,
        "region_counts must be in 1..5, got 6 at position 0",
    ),
    "region counts of other images": (
        {"direction": "i2t", "alignments": torch.randn(2, 5, 3, 4), "region_counts": [5]},
        ValueError,
        "region_counts must be [I] with I = 2 as in alignments, got [1]",
    ),
    "pooled": (
        {"pooled": torch.randn(3, 2, 4)},
        ValueError,
        "pooled must be [I, C, S] with I = 2, C = 3, S = 4, got [3, 2, 4]",
    ),
    "pooled dtype": (
        {"pooled": torch.randn(2, 3, 4).bfloat16()},
        TypeError,
        "pooled must be torch.float32, got torch.bfloat16",
    ),
    "parameters": ({"parameters": ()}, TypeError, "parameters must be AggregationParameters, got tuple"),
    "key bias": (
        {"parameters": inputs()["parameters"]._replace(key_bias=torch.randn(2, 5))},
        ValueError,
        "parameters.key_bias must be [steps, S] with S = 4, steps = 2, got [2, 5]",
    ),
    "half alignments": (
        {"alignments": torch.randn(2, 6, 4).double()},
        TypeError,
        "parameters.key_weight must be torch.float64, got torch.float32",
    ),
    "step": ({"step": -1}, ValueError, "step must be within 0..1, the steps of parameters, got -1"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout must be within [0, 1), got 1.0"),
    "seed": ({"seed": -1}, ValueError, "seed must be within 0..2^63 - 1, got -1"),
    "offset": ({"caption_offset": 2**31}, ValueError, "caption_offset must be within 0..2^31 - 1, got 2147483648"),
    "direction": ({"direction": "up"}, ValueError, "direction must be one of t2i, i2t, got 'up'"),
    "workspace": ({"workspace_bytes": -1}, ValueError, "workspace_bytes must be positive, got -1"),
    "backend": (
        {"backend": 3},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 3",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    arguments, error, message = REFUSALS[change]
    refused(aggregation_regulator, error, message, {**inputs(), **arguments})


def test_the_call_that_refusals_change_works() -> None:
    assert aggregation_regulator(**inputs()).shape == (2, 3, 4)
