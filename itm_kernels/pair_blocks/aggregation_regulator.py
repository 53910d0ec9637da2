"""``aggregation_regulator`` on a GPU, block by block: the alignment vectors of every pair pooled once more.

Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions, product_dtype
from itm_kernels.pair_blocks import aggregation
from itm_kernels.pair_blocks.aggregation import Gradients, Vectors
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.parameters import at_step, like, rounded
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.stage_places import Place, sides_without_vectors
from itm_kernels.pair_blocks.steps import Steps


class Inputs(NamedTuple):
    """What is pooled."""

    alignments: Tensor  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    pooled: Tensor | None  # [I, C, S]; None: the mean of the alignments
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    word_offsets: Tensor | None = None  # [C + 1]


def forward(
    steps: Steps,
    inputs: Inputs,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
) -> Tensor:  # [I, C, S] float32
    """Pooled vectors."""
    alignments = inputs.alignments
    with on_device(alignments.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes)
        shape = alignments.shape[0], inputs.word_counts.shape[0], alignments.shape[-1]
        made = alignments.new_empty(shape, dtype=torch.float32)
        for block, groups, segments in batch.blocks.forward_blocks():
            stage = _Stage(batch, Place(block, batch.blocks, groups, segments, options.t2i))
            stage.place.put_pairs(made, stage.state.pooled)
            del block, stage  # before the next block's rows are made, not after
        return made


def backward(
    steps: Steps,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.alignments.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes)
        grads = Gradients.zeros_of(parameters)
        of_alignments, of_pooled = (
            None if given is None else torch.zeros_like(given, memory_format=torch.contiguous_format)
            for given in (inputs.alignments, inputs.pooled)
        )
        assert of_alignments is not None
        for block, groups, segments in batch.blocks.forward_blocks():  # no vectors, no gradients of these
            stage = _Stage(batch, Place(block, batch.blocks, groups, segments, options.t2i))
            grad_vectors, grad_before = stage.backward(grad, at_step(grads, options.step))
            if of_pooled is None:
                aggregation.mean_backward(block, grad_before, grad_vectors)
            else:
                stage.place.put_pairs(of_pooled, grad_before)
            stage.place.put_queries(of_alignments, grad_vectors)
            del block, stage, grad_vectors, grad_before
        return of_alignments, of_pooled, like(grads.of(parameters), parameters)


class _Batch:
    """The parameters as the products want them, and the blocks."""

    def __init__(
        self,
        steps: Steps,
        inputs: Inputs,
        parameters: AggregationParameters,
        options: AggregationOptions,
        workspace_bytes: int,
    ) -> None:
        self.inputs, self.options = inputs, options
        alignments = inputs.alignments
        self.dtype = product_dtype(alignments.dtype, parameters.key_weight.dtype)
        self.parameters = at_step(rounded(parameters, self.dtype), options.step)
        counts = inputs.word_counts, inputs.word_offsets, inputs.region_counts
        s, copied = alignments.shape[-1], 2 if self.dtype.itemsize < 4 else 0
        self.blocks = PairBlocks(
            steps,
            *sides_without_vectors(alignments, *counts, self.dtype, t2i=options.t2i),
            row_bytes=s * (16 + 2 * copied) + 64,  # vectors, keys, their gradients, one on its way
            pair_bytes=48 * s + 32,  # twelve vectors
            matrices=0,
            workspace_bytes=workspace_bytes,
            backward=True,
        )


class _Stage:
    """The stage on one block, and back."""

    def __init__(self, batch: _Batch, place: Place) -> None:
        self.batch, self.place = batch, place
        block, options, given = place.block, batch.options, batch.inputs.pooled
        self.masks = aggregation.masks_of(block, options)._replace(step=options.step)
        wide = place.queries(batch.inputs.alignments)
        self.vectors = Vectors(wide, wide.to(batch.dtype))
        before = aggregation.mean(block, wide) if given is None else place.pairs(given)
        self.state = aggregation.pool(block, self.vectors, before, batch.parameters, self.masks)

    def backward(self, grad: Tensor, grads: Gradients) -> tuple[Tensor, Tensor]:  # [rows, S], [pairs, S]
        """Gradients of the alignments and of the pooled vectors before, float32; those of parameters are added."""
        grad_vectors = torch.zeros_like(self.vectors.vectors)
        grad_before = aggregation.pool_backward(
            self.place.block, self.state, self.vectors, self.place.pairs(grad), self.batch.parameters, grads,
            grad_vectors, self.masks,
        )  # fmt: skip
        return grad_vectors, grad_before
