"""``similarity_graph`` on a GPU, block by block: all steps on the nodes of a block of pairs.

Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.ops.stage_options import product_dtype
from itm_kernels.pair_blocks import graph
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.parameters import at_step, like, rounded
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.stage_places import Place, sides_without_vectors
from itm_kernels.pair_blocks.steps import Steps


class Inputs(NamedTuple):
    """The nodes."""

    alignments: Tensor  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor  # [I, C, S]
    word_counts: Tensor  # [C]
    word_offsets: Tensor | None = None  # [C + 1]


def forward(
    steps: Steps, inputs: Inputs, parameters: GraphParameters, *, workspace_bytes: int
) -> Tensor:  # [I, C, S] float32
    """The global nodes after the last step."""
    wholes = inputs.global_alignments
    with on_device(wholes.device):
        batch = _Batch(steps, inputs, parameters, workspace_bytes, backward=False)
        made = wholes.new_empty(wholes.shape, dtype=torch.float32)
        for block, groups, segments in batch.blocks.forward_blocks():
            place = Place(block, batch.blocks, groups, segments, t2i=True)
            wide = batch.reason(place)[-1].wide
            assert wide is not None, "the last step makes it"
            place.put_pairs(made, wide)
            del block, place, wide  # before the next block's rows are made, not after
        return made


def backward(
    steps: Steps,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.alignments.device):
        batch = _Batch(steps, inputs, parameters, workspace_bytes, backward=True)
        totals = graph.zeros_of(parameters)
        assert totals is not None, "there are parameters"
        of_alignments, of_wholes = (
            torch.zeros_like(given, memory_format=torch.contiguous_format)
            for given in (inputs.alignments, inputs.global_alignments)
        )
        for block, groups, segments in batch.blocks.forward_blocks():  # no vectors, no gradients of these
            place = Place(block, batch.blocks, groups, segments, t2i=True)
            made, of_step = batch.reason(place), place.pairs(grad)
            for number in reversed(range(len(batch.steps))):
                total = at_step(totals, number)
                of_step = graph.reason_backward(block, made.pop(), batch.steps[number], total, of_step)
            place.put_nodes(of_alignments, of_wholes, of_step)
            del block, place, of_step
        return of_alignments, of_wholes, like(graph.unmerged(batch.parameters, totals), parameters)


class _Batch:
    """The steps as the products want them, and the blocks."""

    def __init__(
        self, steps: Steps, inputs: Inputs, parameters: GraphParameters, workspace_bytes: int, *, backward: bool
    ) -> None:
        self.inputs = inputs
        alignments, counts = inputs.alignments, inputs.word_counts
        self.dtype = product_dtype(alignments.dtype, parameters.query_weight.dtype)
        self.parameters = rounded(parameters, self.dtype)
        self.steps = graph.steps_of(self.parameters)
        queries, keys = sides_without_vectors(alignments, counts, inputs.word_offsets, None, self.dtype, t2i=True)
        s, element, kept = alignments.shape[-1], self.dtype.itemsize, len(self.steps) if backward else 1
        # Nodes; of a step asking, gathered and reasoned ones; edges. Nodes on their way from or to their place.
        of_node = s * (element * (1 + 3 * kept) + 8) + 4 * (1 + queries.most) + 24
        if backward:  # a gradient of nodes and its copy; parts of a bias; edges once more
            of_node += s * (8 + element) + s // 4 + 4 * (1 + queries.most)
        self.blocks = PairBlocks(
            steps,
            queries,
            keys,
            row_bytes=of_node,
            pair_bytes=of_node + 4 * s,
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )

    def reason(self, place: Place) -> list[graph.Reasoned]:
        """All steps on one block; without a backward the last alone is held."""
        alignments, wholes, *_ = self.inputs
        nodes = place.nodes(alignments, wholes, self.dtype)
        made: list[graph.Reasoned] = []
        for number, step in enumerate(self.steps):
            done = graph.reason(place.block, nodes, step, last=number == len(self.steps) - 1)
            if not place.block.keeps:
                made.clear()
            made.append(done)
            nodes = done.after
            del done
        return made
