"""The aggregation regulator of a block (RAR): alignment vectors pooled by attention, asked by the pooled vector."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.dropout import threshold
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.triton.alignment import Aligned, normalise_rows_backward
from itm_kernels.triton.directions import Masks
from itm_kernels.triton.kernels import pooling
from itm_kernels.triton.pair_blocks import PairBlock, add_product, product
from itm_kernels.triton.pair_tiles import CHANNELS, POOLED_QUERIES, POOLED_ROWS


class Pooled(NamedTuple):
    """A step's pooled vectors, and what its backward reads."""

    pooled: Tensor  # [pairs, S] float32
    norms: Tensor  # [pairs]
    weights: Tensor  # [rows]
    keys: Tensor  # [rows, S] float32, after tanh
    asked: Tensor  # [pairs, S] float32, after tanh
    before: Tensor  # [pairs, S], rounded for the product


class Dropout(NamedTuple):
    """The constants of the kernels that make masks, and where these come from, but for the step."""

    constants: dict[str, bool]
    masks: Masks

    @staticmethod
    def of(block: PairBlock, options: RegulatedOptions) -> Dropout:
        of_groups, of_segments = options.image_offset, options.caption_offset
        if not options.t2i:
            of_groups, of_segments = of_segments, of_groups
        first = block.first_group + of_groups, block.first_segment + of_segments
        constants = {"DROPS": options.dropout > 0, "GROUPS_ARE_IMAGES": options.t2i}
        return Dropout(constants, masks_of(first, options.seed, options.dropout))

    def at(self, step: int) -> Masks:
        return self.masks._replace(step=step)


def masks_of(first: tuple[int, int], seed: int, dropout: float) -> Masks:
    """Of a block whose first group and segment have these numbers; the step is to be filled in."""
    # As signed numbers the halves of a seed are 32 bits to Triton, whatever they are.
    low, high = (word - (word >> 31 << 32) for word in (seed & 0xFFFFFFFF, seed >> 32))
    return Masks(*first, 0, low, high, threshold(dropout), 1 / (1 - dropout))


def mean(block: PairBlock, vectors: Tensor) -> Tensor:  # [rows, S] float32 -> [pairs, S] float32
    """What the first step asks with; of cosines, ``[rows, 1]``, a score."""
    width = vectors.shape[1]
    means = block.floats(block.pairs, width)
    pooling.mean_rows[(block.pairs * -(-width // CHANNELS),)](
        vectors, block.queries.offsets, block.queries.counts, means, block.num_queries, block.segments, width,
        BLOCK_Q=POOLED_QUERIES, BLOCK_S=CHANNELS,
    )  # fmt: skip
    return means


def mean_backward(block: PairBlock, grad_means: Tensor, grad_vectors: Tensor) -> None:
    """Adds to ``grad_vectors [rows, S]``."""
    _rows_backward(block, None, None, grad_means, None, grad_vectors)


def pool(
    block: PairBlock,
    aligned: Aligned,
    before: Tensor,  # [pairs, S] float32
    parameters: AggregationParameters,  # of one step
    dropout: Dropout,
    step: int,
) -> Pooled:
    """Step ``step``."""
    vectors, queries = aligned.vectors, block.queries
    sizes, width = (block.num_queries, block.segments), vectors.shape[1]
    rounded = before.to(block.dtype)
    asked = product(rounded, parameters.pooled_weight.t())
    factors = torch.empty_like(asked)
    of_rows: dict[str, Any] = {**dropout.constants, "BLOCK_N": POOLED_ROWS, "BLOCK_S": CHANNELS}
    pooling.ask_pairs[(-(-block.pairs // POOLED_ROWS) * -(-width // CHANNELS),)](
        asked, parameters.pooled_bias, parameters.value_weight, factors, dropout.at(step), block.pairs, block.segments,
        width, **of_rows,
    )  # fmt: skip
    keys = product(aligned.rounded, parameters.key_weight.t())
    logits = block.floats(block.rows)
    pooling.pool_logits[(-(-block.rows // POOLED_ROWS),)](
        keys, parameters.key_bias, factors, queries.segments, queries.offsets, dropout.at(step), logits, block.rows,
        *sizes, width, **of_rows,
    )  # fmt: skip
    weights, norms = block.floats(block.rows), block.floats(block.pairs)
    pooling.softmax_queries[(block.pairs,)](
        logits, queries.offsets, queries.counts, weights, *sizes, BLOCK_Q=POOLED_QUERIES
    )
    pooled = block.floats(block.pairs, width)
    pooling.pool_rows[(block.pairs,)](
        vectors, weights, queries.offsets, queries.counts, pooled, norms, *sizes, width, BLOCK_Q=POOLED_QUERIES,
        BLOCK_S=CHANNELS,
    )  # fmt: skip
    return Pooled(pooled, norms, weights, keys, asked, rounded)


def pool_backward(
    block: PairBlock,
    state: Pooled,
    aligned: Aligned,
    grad_pooled: Tensor,  # [pairs, S] float32, overwritten
    parameters: AggregationParameters,
    grads: AggregationParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
    dropout: Dropout,
    step: int,
) -> Tensor:  # [pairs, S] float32: gradient of the pooled vectors before
    """Gradients of parameters are added where they belong. That of the value's bias, which moves no weight, is zero."""
    queries, width = block.queries, aligned.vectors.shape[1]
    normalise_rows_backward(state.pooled, state.norms, grad_pooled)
    grad_weights = block.floats(block.rows)
    _rows_backward(block, aligned.vectors, state.weights, grad_pooled, grad_weights, grad_vectors)
    # In float32 the gradients take the place of what they are made from, element by element.
    of_keys = state.keys if block.dtype == torch.float32 else block.take(*state.keys.shape)
    of_bias, of_value, of_asked = (block.floats(block.pairs, width) for _ in range(3))
    pooling.pool_logits_backward[(block.pairs * -(-width // CHANNELS),)](
        state.keys, state.weights, grad_weights, state.asked, parameters.value_weight, queries.offsets, queries.counts,
        dropout.at(step), of_keys, of_asked, of_bias, of_value, block.num_queries, block.segments, width,
        **dropout.constants, BLOCK_Q=POOLED_QUERIES, BLOCK_S=CHANNELS,
    )  # fmt: skip
    grads.value_weight.add_(of_value.sum(0))
    grads.key_bias.add_(of_bias.sum(0))
    grads.pooled_bias.add_(of_asked.sum(0))
    add_product(grads.key_weight, of_keys.t(), aligned.rounded)
    add_product(grad_vectors, of_keys, parameters.key_weight)
    rounded = of_asked.to(block.dtype)
    add_product(grads.pooled_weight, rounded.t(), state.before)
    return product(rounded, parameters.pooled_weight)


def _rows_backward(
    block: PairBlock,
    vectors: Tensor | None,
    weights: Tensor | None,
    grad: Tensor,
    grad_weights: Tensor | None,
    grad_vectors: Tensor,
) -> None:
    queries = block.queries
    pooling.pool_rows_backward[(-(-block.rows // POOLED_ROWS),)](
        vectors, weights, queries.segments, queries.counts, grad, grad_weights, grad_vectors, block.rows,
        block.num_queries, block.segments, grad.shape[1], WEIGHTED=weights is not None, BLOCK_N=POOLED_ROWS,
        BLOCK_S=CHANNELS,
    )  # fmt: skip
