"""``attention_filtration`` on a GPU, block by block: the nodes of every pair weighed and summed.

In training a block of captions is passed twice: for its statistics (in the backward: for the gradient that reaches
them), and for the rest. The nodes are read from the inputs both times. Sums run in one order, without atomics; all on
the current stream, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions
from itm_kernels.pair_blocks import filtered, filtration
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.filtration import Moments
from itm_kernels.pair_blocks.parameters import like, rounded, zeros_of
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.stage_places import Place, sides_without_vectors
from itm_kernels.pair_blocks.steps import Steps

Span = tuple[int, int]
"""First and last caption of a block of queries."""


class Inputs(NamedTuple):
    """The nodes."""

    alignments: Tensor  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor  # [I, C, S]
    word_counts: Tensor  # [C]
    word_offsets: Tensor | None = None  # [C + 1]


def forward(
    steps: Steps,
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C] float32
    """Filtered alignments, and the statistics that normalised them."""
    wholes = inputs.global_alignments
    with on_device(wholes.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes)
        made = wholes.new_empty(wholes.shape, dtype=torch.float32)
        used = wholes.new_empty(2, inputs.word_counts.shape[0], dtype=torch.float32)
        if statistics is not None:
            used.copy_(statistics)
        for span in batch.blocks.query_blocks():
            if options.training:
                used[:, slice(*span)] = batch.statistics(span)
            for block, groups, segments in batch.blocks.forward_blocks([span]):
                place = Place(block, batch.blocks, groups, segments, t2i=True)
                place.put_pairs(made, filtered.filtrate(block, batch.nodes(place), used[:, segments], batch.by).vectors)
                del block, place  # before the next block's rows are made, not after
        return made, used


def backward(
    steps: Steps,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.alignments.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes)
        grads = zeros_of(parameters)
        of_alignments, of_wholes = (
            torch.zeros_like(given, memory_format=torch.contiguous_format)
            for given in (inputs.alignments, inputs.global_alignments)
        )
        used = statistics.to(torch.float32)
        for span in batch.blocks.query_blocks():
            means = batch.means_of_slopes(span, used[:, slice(*span)], grad) if options.training else None
            for block, groups, segments in batch.blocks.forward_blocks([span]):  # no vectors, no gradients of these
                place = Place(block, batch.blocks, groups, segments, t2i=True)
                nodes, of_block = batch.nodes(place), used[:, segments]
                made = filtered.filtrate(block, nodes, of_block, batch.by)
                found = filtered.slopes(block, nodes, made, place.pairs(grad))
                of_nodes = filtered.backward(block, nodes, made, found, of_block, batch.by, means, grads)
                place.put_nodes(of_alignments, of_wholes, of_nodes)
                del block, place, nodes, made, found, of_nodes
        return of_alignments, of_wholes, like(grads, parameters)


class _Batch:
    """The parameters as the steps take them, and the blocks."""

    def __init__(
        self,
        steps: Steps,
        inputs: Inputs,
        parameters: FiltrationParameters,
        options: FiltrationOptions,
        workspace_bytes: int,
    ) -> None:
        self.inputs = inputs
        alignments, counts = inputs.alignments, inputs.word_counts
        self.by = filtration.filter_of(rounded(parameters, torch.float32), None, options.eps)
        of_node = 20 * alignments.shape[-1] + 80  # nodes, their gradient, products of them, one on its way; numbers
        self.blocks = PairBlocks(
            steps,
            *sides_without_vectors(alignments, counts, inputs.word_offsets, None, torch.float32, t2i=True),
            row_bytes=of_node,
            pair_bytes=of_node,
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=True,
        )

    def nodes(self, place: Place) -> Tensor:  # [rows + pairs, S] float32
        return place.nodes(self.inputs.alignments, self.inputs.global_alignments, torch.float32)

    def statistics(self, span: Span) -> Tensor:  # [2, captions] float64
        """Those of the batch, of a block of captions."""
        moments = Moments()
        for block, groups, segments in self.blocks.forward_blocks([span]):
            nodes = self.nodes(Place(block, self.blocks, groups, segments, t2i=True))
            moments.add(block, filtration.find_logits(block, nodes, self.by))
            del block, nodes
        return moments.statistics()

    def means_of_slopes(self, span: Span, statistics: Tensor, grad: Tensor) -> Tensor:  # [2, captions]
        """What the statistics of a block of captions pass back."""
        total, counts = torch.zeros_like(statistics, dtype=torch.float64), None
        for block, groups, segments in self.blocks.forward_blocks([span]):
            place = Place(block, self.blocks, groups, segments, t2i=True)
            nodes = self.nodes(place)
            made = filtered.filtrate(block, nodes, statistics, self.by)
            total += filtration.over_groups(block, filtered.slopes(block, nodes, made, place.pairs(grad)).of_pairs)
            counts = block.queries.counts
            del block, place, nodes, made
        assert counts is not None, "there is an image"
        return (total / (self.inputs.alignments.shape[0] * (1 + counts))).to(torch.float32)
