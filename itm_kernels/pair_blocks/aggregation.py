"""The aggregation regulator of a block (RAR): alignment vectors pooled by attention, asked by the pooled vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.dropout import threshold
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions
from itm_kernels.pair_blocks.alignment import Aligned
from itm_kernels.pair_blocks.blocks import PairBlock, add_product, product
from itm_kernels.pair_blocks.records import Masks


class Vectors(NamedTuple):
    """Alignment vectors whose making is not of interest."""

    vectors: Tensor  # [rows, S] float32
    rounded: Tensor  # [rows, S]: the same for products


class Pooled(NamedTuple):
    """A step's pooled vectors, and what its backward reads."""

    pooled: Tensor  # [pairs, S] float32
    norms: Tensor  # [pairs]
    weights: Tensor  # [rows]
    keys: Tensor  # [rows, S] float32, after tanh
    asked: Tensor  # [pairs, S] float32, after tanh
    before: Tensor  # [pairs, S], rounded for the product


def masks_of(block: PairBlock, options: RegulatedOptions | AggregationOptions) -> Masks:
    """Where dropout comes from, but for the step."""
    of_groups, of_segments = options.image_offset, options.caption_offset
    if not options.t2i:
        of_groups, of_segments = of_segments, of_groups
    first = block.first_group + of_groups, block.first_segment + of_segments
    return masks_at(first, options.seed, options.dropout, t2i=options.t2i)


def masks_at(first: tuple[int, int], seed: int, dropout: float, *, t2i: bool) -> Masks:
    """Of a block whose first group and segment have these numbers; the step is to be filled in."""
    # As signed numbers the halves of a seed are 32 bits to any kernel, whatever they are.
    low, high = (word - (word >> 31 << 32) for word in (seed & 0xFFFFFFFF, seed >> 32))
    return Masks(*first, 0, low, high, threshold(dropout), 1 / (1 - dropout), dropout > 0, t2i)


class Gradients(NamedTuple):
    """Where those of one step, or of all one behind another, are added, float32."""

    key_weight: Tensor  # [S, S]
    pooled_weight: Tensor  # [S, S]
    sums: Tensor  # [3, S]: of the biases of keys and pooled vectors, and of the value

    @staticmethod
    def zeros_of(parameters: AggregationParameters) -> Gradients:
        """Of all steps."""
        of_matrix = torch.zeros_like(parameters.key_weight, dtype=torch.float32)
        steps, width = parameters.key_bias.shape
        return Gradients(of_matrix, torch.zeros_like(of_matrix), of_matrix.new_zeros(steps, 3, width))

    def of(self, parameters: AggregationParameters) -> AggregationParameters:
        """As the gradients of the parameters. That of the value's bias, which moves no weight, is zero."""
        of_keys, of_pooled, of_value = (sums.clone() for sums in self.sums.unbind(1))  # outputs share no memory
        of_value_bias = torch.zeros_like(parameters.value_bias, dtype=torch.float32)
        return AggregationParameters(self.key_weight, of_keys, self.pooled_weight, of_pooled, of_value, of_value_bias)


def mean(block: PairBlock, vectors: Tensor) -> Tensor:  # [rows, S] float32 -> [pairs, S] float32
    """What the first step asks with; of cosines, ``[rows, 1]``, a score."""
    means = block.floats(block.pairs, vectors.shape[1])
    block.steps.mean_rows(block, vectors, means)
    return means


def mean_backward(block: PairBlock, grad_means: Tensor, grad_vectors: Tensor) -> None:
    """Adds to ``grad_vectors [rows, S]``."""
    block.steps.mean_rows_backward(block, grad_means, grad_vectors)


def pool(
    block: PairBlock,
    aligned: Aligned | Vectors,
    before: Tensor,  # [pairs, S] float32
    parameters: AggregationParameters,  # of one step
    masks: Masks,  # of this step
) -> Pooled:
    """One step."""
    rounded = before.to(block.dtype)
    asked = product(rounded, parameters.pooled_weight.t())
    keys = product(aligned.rounded, parameters.key_weight.t())
    weights, norms = block.floats(block.rows), block.floats(block.pairs)
    pooled = torch.empty_like(asked)
    block.steps.pool_rows(
        block, aligned.vectors, keys, parameters.key_bias, asked, parameters.pooled_bias, parameters.value_weight,
        masks, weights, pooled, norms,
    )  # fmt: skip
    return Pooled(pooled, norms, weights, keys, asked, rounded)


def pool_backward(
    block: PairBlock,
    state: Pooled,
    aligned: Aligned | Vectors,
    grad_pooled: Tensor,  # [pairs, S] float32, overwritten
    parameters: AggregationParameters,
    grads: Gradients,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
    masks: Masks,  # of this step
) -> Tensor:  # [pairs, S] float32: gradient of the pooled vectors before
    """Gradients of parameters are added where they belong."""
    # In float32 the gradients take the place of what they are made from, element by element.
    of_keys = state.keys if block.dtype == torch.float32 else block.take(*state.keys.shape)
    sums = block.floats(3, *state.asked.shape)  # in the order of `Gradients.sums`
    of_bias, of_asked, of_value = sums
    block.steps.pool_rows_backward(
        block, aligned.vectors, state.keys, state.asked, parameters.value_weight, masks, state.weights, state.pooled,
        state.norms, grad_pooled, grad_vectors, of_keys, of_asked, of_bias, of_value,
    )  # fmt: skip
    block.add_sums(grads.sums, sums)
    add_product(grads.key_weight, of_keys.t(), aligned.rounded)
    add_product(grad_vectors, of_keys, parameters.key_weight)
    rounded = of_asked.to(block.dtype)
    add_product(grads.pooled_weight, rounded.t(), state.before)
    return product(rounded, parameters.pooled_weight)
