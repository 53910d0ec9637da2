"""What a scorer allocates in blocks of pairs on a GPU: its orchestration around kernels that do nothing."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import model_checks as checks
from itm_kernels.pair_blocks import similarity_reasoning_scores
from itm_kernels.pair_blocks.similarity_reasoning_scores import Inputs
from memory import peak_bytes
from models import REASONED, Case, model_batch

MIB = 1 << 20


class IdleSteps:
    """Steps of a floor that compute nothing. What they allocate for themselves is the floor's and small."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None

    def pack(self, packings: Any, width: int) -> None:
        for packing in packings:
            packing.segments.zero_()

    def filtrate_nodes_backward(self, block: Any, vectors: Tensor, *rest: Any) -> Tensor | None:
        return None if rest[-1] is None else torch.empty(block.pairs, 2 * vectors.shape[1] + 2)

    def graph_attend_backward(self, block: Any, nodes: Tensor, *rest: Any) -> Tensor:
        return torch.empty(block.pairs, nodes.shape[1])

    def relu_rows_backward(self, grad: Tensor, rows: Tensor) -> Tensor:
        return torch.empty(-(-rows.shape[0] // 16), rows.shape[1])


@pytest.mark.parametrize("workspace_bytes", [8 * MIB, 48 * MIB], ids=["many", "few"])
@pytest.mark.parametrize("case", REASONED, ids=str)
def test_reasoning_stays_within_the_workspace(case: Case, workspace_bytes: int) -> None:
    sizes = {"images": 24, "captions": 24, "regions": 36, "words": 14, "width": 512, "similarity": 256, "shortest": 6}
    made = model_batch(case, 63, **sizes).to(torch.float32).packed()
    given = checks.arguments(made, "eager", requires_grad=False)
    parameters, options, _, _ = importlib.import_module(f"itm_kernels.ops.{case.op}")._split(given[8:])
    regions, words, counts, offsets, region_counts, *wholes, statistics = given[:8]
    inputs = Inputs(regions, words, counts, region_counts, *wholes, offsets)
    steps: Any = IdleSteps()
    how: dict[str, Any] = {"workspace_bytes": workspace_bytes}

    def forward() -> Any:
        return similarity_reasoning_scores.forward(steps, inputs, parameters, statistics, options, **how)

    upstream, used = made.batch.grad_scores.float(), torch.ones(2, len(made.batch.word_counts))

    def backward() -> Any:
        return similarity_reasoning_scores.backward(steps, upstream, inputs, parameters, used, options, **how)

    weights = [p.nbytes for p in parameters.flat() if p is not None]
    gradients = sum(tensor.nbytes for tensor in (regions, words, *wholes)) + sum(weights)
    # A graph's merged weights, and where their gradients add up, stand beside those of the parameters.
    beside = sum(weights) if parameters.graph is not None else 0
    for call, results in ((forward, upstream.nbytes), (backward, gradients + beside)):
        peak = peak_bytes(call)
        assert peak <= workspace_bytes + results + beside
        assert peak >= workspace_bytes // 8, "blocks much smaller than need be"
