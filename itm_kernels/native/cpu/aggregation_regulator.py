"""``aggregation_regulator`` on the CPU, chunk by chunk: the alignment vectors of every pair pooled once more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import aggregation
from itm_kernels.native.cpu.aggregation import Dropout
from itm_kernels.native.cpu.alignment import Vectors
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import at_step, like, operand_dtype, rounded, zeros_of
from itm_kernels.native.cpu.stage_places import Place, sides_without_vectors
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions, product_dtype


class Inputs(NamedTuple):
    """What is pooled."""

    alignments: Tensor  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    pooled: Tensor | None  # [I, C, S]; None: the mean of the alignments
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]


def forward(
    inputs: Inputs, parameters: AggregationParameters, options: AggregationOptions, *, workspace_bytes: int
) -> Tensor:  # [I, C, S] float32
    """Pooled vectors."""
    batch = _Batch(inputs, parameters, options, workspace_bytes)
    images, captions, s = inputs.alignments.shape[0], inputs.word_counts.shape[0], inputs.alignments.shape[-1]
    made = torch.empty(images, captions, s, dtype=torch.float32, device="cpu")
    for chunk in batch.chunks.every():
        stage = _Stage(batch, chunk)
        stage.place.put_pairs(made, stage.state.pooled)
    return made


def backward(
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients in the dtypes of the inputs."""
    batch = _Batch(inputs, parameters, options, workspace_bytes)
    alignments, pooled = inputs.alignments, inputs.pooled
    grads = zeros_of(parameters)
    of_alignments = torch.zeros(alignments.shape, dtype=alignments.dtype, device="cpu")
    of_pooled = None if pooled is None else torch.empty(pooled.shape, dtype=pooled.dtype, device="cpu")
    for chunk in batch.chunks.every():
        stage = _Stage(batch, chunk)
        grad_vectors, grad_before = stage.backward(stage.place.pairs(grad), at_step(grads, options.step))
        if of_pooled is None:
            aggregation.mean_backward(chunk, grad_before, grad_vectors)
        else:
            stage.place.put_pairs(of_pooled, grad_before)
        stage.place.put_queries(of_alignments, grad_vectors)
    return of_alignments, of_pooled, like(grads, parameters)


class _Batch:
    """The parameters as the products want them, and the chunks."""

    def __init__(
        self, inputs: Inputs, parameters: AggregationParameters, options: AggregationOptions, workspace_bytes: int
    ) -> None:
        self.inputs, self.options = inputs, options
        alignments = inputs.alignments
        given = product_dtype(alignments.dtype, parameters.key_weight.dtype)
        self.dtype = operand_dtype(given)
        self.parameters = at_step(rounded(parameters, given), options.step)
        counts = inputs.word_counts, inputs.region_counts
        self.chunks = Chunks(
            *sides_without_vectors(alignments, *counts, self.dtype, t2i=options.t2i),
            # Six vectors of a row, and twelve of a pair, which may be a single row.
            row_bytes=72 * alignments.shape[-1] + 64,
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=True,
        )


class _Stage:
    """The stage on one chunk, and back."""

    def __init__(self, batch: _Batch, chunk: Chunk) -> None:
        inputs, self.batch, self.chunk = batch.inputs, batch, chunk
        self.place = Place(chunk, batch.chunks.queries, batch.chunks.keys, batch.options.t2i)
        self.dropout = Dropout.of(chunk, batch.options)
        wide = self.place.queries(inputs.alignments)
        self.vectors = Vectors(wide, wide.to(batch.dtype))
        before = aggregation.mean(chunk, wide) if inputs.pooled is None else self.place.pairs(inputs.pooled)
        step = batch.options.step
        self.state = aggregation.pool(chunk, self.vectors, before, batch.parameters, self.dropout, step)

    def backward(self, grad: Tensor, grads: AggregationParameters) -> tuple[Tensor, Tensor]:  # [rows, S], [pairs, S]
        """Gradients of the alignments and of the pooled vectors before, float32; those of parameters are added."""
        grad_vectors = self.chunk.workspace.floats("grad vectors", *self.vectors.wide.shape).zero_()
        grad_before = aggregation.pool_backward(
            self.chunk, self.state, self.vectors, grad, self.batch.parameters, grads, grad_vectors, self.dropout,
            self.batch.options.step,
        )  # fmt: skip
        return grad_vectors, grad_before
