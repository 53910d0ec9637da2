"""``similarity_graph`` on every floor, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itm_kernels import GraphParameters, similarity_graph
from stage_suite import StageSuite, refused
from stages import Case

OP = "similarity_graph"


class TestSimilarityGraph(StageSuite):
    cases = (Case(OP, {"steps": 1}, ("global_alignments",)), Case(OP, {"steps": 3}, ("global_alignments",)))


def inputs(steps: int = 2) -> dict[str, Any]:
    """A call that works: 2 images, 3 captions of 6 words in all, S = 4."""
    matrix, vector = torch.randn(steps, 4, 4), torch.randn(steps, 4)
    return {
        "alignments": torch.randn(2, 6, 4),
        "global_alignments": torch.randn(2, 3, 4),
        "word_counts": [3, 1, 2],
        "parameters": GraphParameters(matrix, vector, matrix, vector, matrix, vector),
    }


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alignments": (
        {"alignments": torch.randn(2, 6)},
        ValueError,
        "alignments must be [I, N, S] with direction 't2i', got [2, 6]",
    ),
    "counts": (
        {"word_counts": [3, 1, 3]},
        ValueError,
        "alignments must be [I, N, S] with N = 7, the sum of word_counts, got [2, 6, 4]",
    ),
    "global alignments": (
        {"global_alignments": torch.randn(3, 2, 4)},
        ValueError,
        "global_alignments must be [I, C, S] with I = 2, C = 3, S = 4, got [3, 2, 4]",
    ),
    "global alignments dtype": (
        {"global_alignments": torch.randn(2, 3, 4).double()},
        TypeError,
        "global_alignments must be torch.float32, got torch.float64",
    ),
    "parameters": ({"parameters": None}, TypeError, "parameters must be GraphParameters, got NoneType"),
    "no steps": (
        {"parameters": inputs(0)["parameters"]},
        ValueError,
        "parameters must be of one step at least, got [0, 4]",
    ),
    "node weight": (
        {"parameters": inputs()["parameters"]._replace(node_weight=torch.randn(3, 4, 4))},
        ValueError,
        "parameters.node_weight must be [steps, S, S] with S = 4, steps = 2, got [3, 4, 4]",
    ),
    "node bias no tensor": (
        {"parameters": inputs()["parameters"]._replace(node_bias=None)},
        TypeError,
        "parameters.node_bias must be a tensor, got NoneType",
    ),
    "workspace": ({"workspace_bytes": True}, TypeError, "workspace_bytes must be a whole number, got True"),
    "backend": (
        {"backend": "gpu"},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 'gpu'",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    arguments, error, message = REFUSALS[change]
    refused(similarity_graph, error, message, {**inputs(), **arguments})


def test_the_call_that_refusals_change_works() -> None:
    assert similarity_graph(**inputs()).shape == (2, 3, 4)
