"""``attention_filtration`` on every floor, its buffers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from itm_kernels import FiltrationParameters, attention_filtration
from stage_suite import StageSuite, refused
from stages import Case, floors, run_stage, stage_batch

OP = "attention_filtration"


class TestAttentionFiltration(StageSuite):
    cases = tuple(Case(OP, {"training": training}, ("global_alignments",)) for training in (False, True))


@floors
@pytest.mark.parametrize("training", [False, True])
def test_buffers_are_those_of_a_module_run_once_a_caption(training: bool, backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP, {"training": training}, ("global_alignments",)), 1).to(dtype)
    module = nn.BatchNorm1d(1).to(dtype)
    before = tuple(buffer.clone() for buffer in made.buffers)
    module.running_mean, module.running_var, module.num_batches_tracked = (buffer.clone() for buffer in before)
    module.train(training)
    tensors = made.tensors
    wholes = tensors["global_alignments"].unsqueeze(2).unbind(1)
    for whole, words in zip(wholes, tensors["alignments"].split(made.batch.word_counts, dim=1), strict=True):
        nodes = torch.cat([whole, words], dim=1)
        module((nodes @ tensors["weight"] + tensors["bias"]).unsqueeze(1))
    after = run_stage(made, backend).buffers
    for mine, its in zip(after, (module.running_mean, module.running_var, module.num_batches_tracked), strict=True):
        torch.testing.assert_close(mine, its)
    if not training:
        assert all(torch.equal(mine, its) for mine, its in zip(after, before, strict=True))


def inputs() -> dict[str, Any]:
    """A call that works: 2 images, 3 captions of 6 words in all, S = 4."""
    one = torch.ones(1)
    return {
        "alignments": torch.randn(2, 6, 4),
        "global_alignments": torch.randn(2, 3, 4),
        "word_counts": [3, 1, 2],
        "parameters": FiltrationParameters(torch.randn(4), torch.randn(1)),
        "batch_norm": (one, one.clone(), one.clone(), one.clone(), torch.tensor(0), 0.1, 1e-5),
    }


def normed(position: int, value: Any) -> tuple[Any, ...]:
    fields = list(inputs()["batch_norm"])
    fields[position] = value
    return tuple(fields)


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alignments": (
        {"alignments": torch.randn(6, 4)},
        ValueError,
        "alignments must be [I, N, S] with direction 't2i', got [6, 4]",
    ),
    "counts": (
        {"word_counts": [3, 3]},
        ValueError,
        "global_alignments must be [I, C, S] with I = 2, C = 2, S = 4, got [2, 3, 4]",
    ),
    "a sum of counts": (
        {"word_counts": [3, 3, 1]},
        ValueError,
        "alignments must be [I, N, S] with N = 7, the sum of word_counts, got [2, 6, 4]",
    ),
    "global alignments": (
        {"global_alignments": torch.randn(2, 3, 5)},
        ValueError,
        "global_alignments must be [I, C, S] with I = 2, C = 3, S = 4, got [2, 3, 5]",
    ),
    "global alignments no tensor": (
        {"global_alignments": None},
        TypeError,
        "global_alignments must be a tensor, got NoneType",
    ),
    "parameters": ({"parameters": None}, TypeError, "parameters must be FiltrationParameters, got NoneType"),
    "weight": (
        {"parameters": FiltrationParameters(torch.randn(5), torch.randn(1))},
        ValueError,
        "parameters.weight must be [S] with S = 4, got [5]",
    ),
    "norm in parameters": (
        {"parameters": FiltrationParameters(torch.randn(4), torch.randn(1), torch.ones(1))},
        ValueError,
        "norm_weight and norm_bias of parameters must be None: batch_norm brings them",
    ),
    "eps": ({"batch_norm": normed(6, 0.0)}, ValueError, "eps of batch_norm must be positive, got 0.0"),
    "running mean": (
        {"batch_norm": normed(2, torch.ones(2))},
        ValueError,
        "batch_norm running_mean must be a tensor of shape [1], got [2]",
    ),
    "running mean dtype": (
        {"batch_norm": normed(2, torch.ones(1).double())},
        TypeError,
        "batch_norm running_mean must be torch.float32, got torch.float64",
    ),
    "momentum": (
        {"batch_norm": normed(5, 1.5)},
        ValueError,
        "batch_norm momentum must be None or within 0..1, got 1.5",
    ),
    "workspace": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
    "backend": (
        {"backend": "cpu"},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 'cpu'",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    arguments, error, message = REFUSALS[change]
    refused(attention_filtration, error, message, {**inputs(), **arguments})


def test_the_call_that_refusals_change_works() -> None:
    assert attention_filtration(**inputs()).shape == (2, 3, 4)
