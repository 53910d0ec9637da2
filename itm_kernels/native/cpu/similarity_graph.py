"""``similarity_graph`` on the CPU, chunk by chunk: all steps on the nodes of a chunk of pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import graph
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import like, operand_dtype, rounded
from itm_kernels.native.cpu.stage_places import Place, sides_without_vectors
from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.ops.stage_options import product_dtype


class Inputs(NamedTuple):
    """The nodes."""

    alignments: Tensor  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor  # [I, C, S]
    word_counts: Tensor  # [C]


def forward(inputs: Inputs, parameters: GraphParameters, *, workspace_bytes: int) -> Tensor:  # [I, C, S] float32
    """The global nodes after the last step."""
    batch = _Batch(inputs, parameters, workspace_bytes, backward=False)
    made = torch.empty(inputs.global_alignments.shape, dtype=torch.float32, device="cpu")
    for chunk in batch.chunks.every():
        wide = batch.reason(chunk)[-1].wide
        assert wide is not None, "the last step makes it"
        batch.place(chunk).put_pairs(made, wide)
    return made


def backward(
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients in the dtypes of the inputs."""
    batch = _Batch(inputs, parameters, workspace_bytes, backward=True)
    totals = graph.zeros_of(parameters)
    of_alignments, of_wholes = (
        torch.zeros(given.shape, dtype=given.dtype, device="cpu")
        for given in (inputs.alignments, inputs.global_alignments)
    )
    for chunk in batch.chunks.every(keeps=True):
        place, of_nodes = batch.place(chunk), batch.reason(chunk)
        of_step = place.pairs(grad)
        for made, step, total in zip(of_nodes[::-1], batch.steps[::-1], totals[::-1], strict=True):
            of_step = graph.reason_backward(chunk, made, step, total, of_step)
        place.put_nodes(of_alignments, of_wholes, of_step)
    return of_alignments, of_wholes, like(graph.unmerged(batch.parameters, totals), parameters)


class _Batch:
    """The steps as the products want them, and the chunks."""

    def __init__(self, inputs: Inputs, parameters: GraphParameters, workspace_bytes: int, *, backward: bool) -> None:
        self.inputs = inputs
        alignments, counts = inputs.alignments, inputs.word_counts
        given = product_dtype(alignments.dtype, parameters.query_weight.dtype)
        self.dtype = operand_dtype(given)
        self.parameters = rounded(parameters, given)
        self.steps = graph.steps_of(self.parameters)
        s, kept = alignments.shape[-1], len(self.steps) if backward else 1
        queries, keys = sides_without_vectors(alignments, counts, None, self.dtype, t2i=True)
        # A step keeps three vectors a node; beside them stand the nodes, read and as a gradient.
        of_node = s * (self.dtype.itemsize * (3 * kept + 1) + (12 if backward else 8))
        self.chunks = Chunks(
            queries,
            keys,
            row_bytes=int(of_node * (1 + counts.shape[0] / queries.num_rows)) + 16,
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )

    def place(self, chunk: Chunk) -> Place:
        return Place(chunk, self.chunks.queries, self.chunks.keys, t2i=True)

    def reason(self, chunk: Chunk) -> list[graph.Reasoned]:
        """All steps on one chunk."""
        alignments, wholes, _ = self.inputs
        nodes = chunk.workspace.take("nodes", chunk.rows + chunk.pairs, alignments.shape[-1])
        self.place(chunk).nodes(alignments, wholes, nodes)
        made: list[graph.Reasoned] = []
        for number, step in enumerate(self.steps):
            last = number == len(self.steps) - 1
            made.append(graph.reason(chunk, made[-1].after if made else nodes, step, number, last=last))
        return made
