"""What the tests of ``max_similarity_scores`` share: the helpers of score ops, and its two ways to a gradient."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

import helpers
from helpers import Batch, Result
from itm_kernels.ops.max_similarity_scores import backward_op, forward_op, max_similarity_scores
from itm_kernels.ops.options import SIMILARITY_AGG_FUNCS, SIMILARITY_DIRECTIONS

OP = "max_similarity_scores"
WORKSPACE_BYTES = 1 << 24

run = functools.partial(helpers.run, op=max_similarity_scores)
truth = functools.partial(helpers.truth, op=max_similarity_scores)


def every_option() -> list[dict[str, Any]]:
    """Directions x aggregations, with a temperature away from the default: one that is ignored would show."""
    return [
        {"direction": direction, "agg_func": agg_func, "lambda_lse": 4.0}
        for direction, agg_func in itertools.product(SIMILARITY_DIRECTIONS, SIMILARITY_AGG_FUNCS)
    ]


def arguments(
    batch: Batch, backend: str, options: dict[str, Any], workspace_bytes: int = WORKSPACE_BYTES
) -> tuple[Any, ...]:
    """What the opaque ops take after their own first arguments."""
    counts = torch.tensor(batch.word_counts, dtype=torch.int64)
    of_regions = None if batch.region_counts is None else torch.tensor(batch.region_counts)
    chosen = {"direction": "t2i", "agg_func": "Sum", "lambda_lse": 10.0} | options
    return batch.regions, batch.words, counts, None, of_regions, *chosen.values(), workspace_bytes, backend


def kept_arg_max(batch: Batch, backend: str, options: dict[str, Any], workspace_bytes: int = WORKSPACE_BYTES) -> Tensor:
    """What the forward keeps for the backward; empty: nothing."""
    arg_max: Tensor = forward_op(*arguments(batch, backend, options, workspace_bytes), True)[1]
    return arg_max


def gradients(batch: Batch, backend: str, options: dict[str, Any], *, kept: bool) -> Result:
    """Scores and gradients with the arg-max of the forward, or with one made again."""
    inputs = arguments(batch, backend, options)
    scores, arg_max = forward_op(*inputs, kept)
    assert bool(arg_max.numel()) == kept
    return Result(scores, *backward_op(batch.grad_scores.to(scores.dtype), arg_max, *inputs))
