"""``attention_filtration`` on the CPU, chunk by chunk: the nodes of every pair weighed and summed.

In training a block of captions is passed twice: for its statistics (in the backward: for the gradient that reaches
them), of which logits are kept, and for the rest. The nodes are read from the inputs both times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import filtration
from itm_kernels.native.cpu.filtration import Filter, Gradients, Kept
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import like, rounded, zeros_of
from itm_kernels.native.cpu.stage_places import Place, sides_without_vectors
from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions


class Inputs(NamedTuple):
    """The nodes."""

    alignments: Tensor  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor  # [I, C, S]
    word_counts: Tensor  # [C]


def forward(
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C] float32
    """Filtered alignments, and the statistics that normalised them."""
    batch = _Batch(inputs, parameters, options, workspace_bytes)
    made = torch.empty(inputs.global_alignments.shape, dtype=torch.float32, device="cpu")
    used = torch.empty(2, inputs.word_counts.shape[0], dtype=torch.float32, device="cpu")
    if statistics is not None:
        used.copy_(statistics)
    for start, stop in batch.blocks():
        if options.training:
            used[:, start:stop] = batch.statistics(start, stop)
        of_block = used[:, start:stop].contiguous()
        for chunk in batch.chunks.of_block(start, stop):
            nodes, logits = batch.nodes(chunk)
            batch.place(chunk).put_pairs(made, filtration.filtrate(chunk, nodes, logits, of_block, batch.filter))
    return made, used


def backward(
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients in the dtypes of the inputs."""
    batch = _Batch(inputs, parameters, options, workspace_bytes)
    grads = zeros_of(parameters)
    of_alignments, of_wholes = (
        torch.zeros(given.shape, dtype=given.dtype, device="cpu")
        for given in (inputs.alignments, inputs.global_alignments)
    )
    for start, stop in batch.blocks():
        of_block = statistics[:, start:stop].float().contiguous()
        means = batch.means_of_slopes(start, stop, of_block, grad) if options.training else None
        for chunk in batch.chunks.of_block(start, stop):
            nodes, logits = batch.nodes(chunk)
            place = batch.place(chunk)
            of_nodes = filtration.backward(
                chunk, nodes, logits, of_block, batch.filter, place.pairs(grad), means, Gradients(grads, None)
            )
            place.put_nodes(of_alignments, of_wholes, of_nodes)
    return of_alignments, of_wholes, like(grads, parameters)


class _Batch:
    """The parameters as the steps take them, and the chunks."""

    def __init__(
        self, inputs: Inputs, parameters: FiltrationParameters, options: FiltrationOptions, workspace_bytes: int
    ) -> None:
        self.inputs, self.options, self.workspace_bytes = inputs, options, workspace_bytes
        alignments, counts = inputs.alignments, inputs.word_counts
        self.filter = Filter.of(rounded(parameters, torch.float32), None, options.eps)
        queries, keys = sides_without_vectors(alignments, counts, None, torch.float32, t2i=True)
        nodes_of_row = 1 + counts.shape[0] / queries.num_rows
        self.chunks = Chunks(
            queries,
            keys,
            row_bytes=int(nodes_of_row * (16 * alignments.shape[-1] + 16)) + 1,  # nodes, read; their gradient, written
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=True,
        )

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last caption of each block; in training few enough that their logits can be kept."""
        for start, stop in self.chunks.query_blocks():
            if self.options.training:
                yield from filtration.parts_that_fit(start, stop, self._fit)
            else:
                yield start, stop

    def _fit(self, start: int, stop: int) -> bool:
        """Whether a quarter of the workspace holds the logits of these captions, and what statistics make of them."""
        bounds = self.chunks.queries.bounds
        return 40 * self._images * (bounds[stop] - bounds[start] + stop - start) <= self.workspace_bytes // 4

    @property
    def _images(self) -> int:
        return self.inputs.alignments.shape[0]

    def place(self, chunk: Chunk) -> Place:
        return Place(chunk, self.chunks.queries, self.chunks.keys, t2i=True)

    def nodes(self, chunk: Chunk, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:  # [rows + pairs, S], [..]
        """Nodes and logits of a chunk."""
        alignments, wholes, _ = self.inputs
        count = chunk.rows + chunk.pairs
        nodes = chunk.workspace.floats("node vectors", count, alignments.shape[-1])
        self.place(chunk).nodes(alignments, wholes, nodes)
        room = chunk.workspace.floats("logits", count) if logits is None else logits
        return nodes, filtration.logits(nodes, self.filter, room)

    def statistics(self, start: int, stop: int) -> Tensor:  # [2, captions]
        """Those of the batch, of a block of captions."""
        offsets = self.chunks.queries.offsets_of(start, stop)
        kept = Kept(self.chunks.workspace, offsets, self._images, self.inputs.alignments.shape[-1], keeps=False)
        for chunk in self.chunks.of_block(start, stop):
            self.nodes(chunk, kept.add(chunk).logits)
        return kept.statistics()

    def means_of_slopes(self, start: int, stop: int, statistics: Tensor, grad: Tensor) -> Tensor:  # [2, captions]
        """What the statistics of a block of captions pass back."""
        slopes = torch.zeros(stop - start, 2, dtype=torch.float64, device="cpu")
        for chunk in self.chunks.of_block(start, stop):
            nodes, logits = self.nodes(chunk)
            upstream = self.place(chunk).pairs(grad)
            slopes += filtration.slopes(chunk, nodes, logits, statistics, self.filter, upstream)
        numbers = self._images * (1 + self.chunks.queries.offsets_of(start, stop).diff()).double()
        return (slopes / numbers[:, None]).t().float().contiguous()
