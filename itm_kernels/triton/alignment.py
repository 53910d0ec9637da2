"""Alignment vectors of a block: library products around the kernels, forward and backward.

    a = attention of products        c = a^T keys        x = l2norm(weight (q - l2norm(c))^2 + bias)

Products of a backward: ``c`` is kept, its squares are made again for ``dW``, and ``dc`` takes the place of ``c``; from
there ``da = keys dc^T`` and ``dkeys += a dc`` end at the gradient of the products, which the caller hands on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.triton.kernels import regulated_attention, row_norms, squared_difference
from itm_kernels.triton.pair_blocks import PairBlock, add_product, product
from itm_kernels.triton.pair_tiles import (
    KEYS,
    QUERIES,
    ROWS,
    SEGMENT_KEYS,
    SEGMENT_QUERIES,
    SUM_ROWS,
    SUM_WIDTH,
    WIDTH,
)


class Attention(NamedTuple):
    """What the queries of a block attend to."""

    products: Tensor  # [G, K, L] float32
    norms: Tensor  # [G, segments, K] float32, of the products
    temperatures: Tensor | None  # [rows] float32; None: one number for all
    weights: Tensor  # [G, K, L]
    attended: Tensor  # [rows, D]


class Aligned(NamedTuple):
    """Alignment vectors, and what their backward reads."""

    vectors: Tensor  # [rows, S] float32
    rounded: Tensor  # [rows, S]: the same for products
    attended: Tensor  # [rows, D]
    norms: Tensor  # [rows], of the attended vectors
    vector_norms: Tensor  # [rows], before the normalisation


def attend(block: PairBlock, products: Tensor, temperatures: Tensor | None, temperature: float) -> Attention:
    """Weights, and the keys summed by them."""
    sizes = block.most, block.num_queries, block.segments
    norms = block.floats(block.groups, block.segments, block.most)
    regulated_attention.segment_norms[(block.pairs * -(-block.most // SEGMENT_KEYS),)](
        products, block.queries.offsets, block.queries.counts, norms, *sizes, BLOCK_Q=SEGMENT_QUERIES,
        BLOCK_K=SEGMENT_KEYS,
    )  # fmt: skip
    weights = block.take(*products.shape)
    regulated_attention.attention_weights[(block.groups * -(-block.num_queries // QUERIES),)](
        products, norms, block.keys.counts, block.queries.segments, temperatures, temperature, weights, *sizes,
        WARMED=temperatures is not None, BLOCK_Q=QUERIES, BLOCK_K=KEYS,
    )  # fmt: skip
    return Attention(products, norms, temperatures, weights, block.combine_keys(weights))


def attend_backward(
    block: PairBlock,
    attention: Attention,
    temperature: float,
    grad_attended: Tensor,  # [rows, D]
) -> tuple[Tensor, Tensor]:  # [G, K, L], [rows]
    """Gradients of products, rounded for products, and temperatures; that of the keys is added where it belongs."""
    products, norms, temperatures, weights, _ = attention
    sizes = block.most, block.num_queries, block.segments
    block.add_to_keys(weights, grad_attended)
    grad = block.products_with(grad_attended)
    grad_temperatures = block.floats(block.rows)
    regulated_attention.attention_weights_backward[(block.groups * -(-block.num_queries // QUERIES),)](
        products, norms, block.keys.counts, block.queries.segments, temperatures, temperature, grad, grad_temperatures,
        *sizes, WARMED=temperatures is not None, BLOCK_Q=QUERIES, BLOCK_K=KEYS,
    )  # fmt: skip
    grad_products = weights  # in their place: they have been used
    regulated_attention.segment_norms_backward[(block.pairs * -(-block.most // SEGMENT_KEYS),)](
        products, norms, block.queries.offsets, block.queries.counts, grad, grad_products, *sizes,
        BLOCK_Q=SEGMENT_QUERIES, BLOCK_K=SEGMENT_KEYS,
    )  # fmt: skip
    return grad_products, grad_temperatures


def align(block: PairBlock, attended: Tensor, parameters: AlignmentParameters) -> Aligned:
    """Alignment vectors of what a block attends to; ``parameters`` are those of one step."""
    norms = block.floats(block.rows)
    vectors = product(_squares(block, attended, norms), parameters.weight.t())
    vector_norms = block.floats(block.rows)
    rounds = block.dtype != torch.float32
    rounded = block.take(*vectors.shape) if rounds else vectors
    row_norms.normalise_rows[(-(-block.rows // ROWS),)](
        vectors, parameters.bias, vector_norms, rounded, *vectors.shape, ROUNDS=rounds, BLOCK_N=ROWS, BLOCK_D=WIDTH
    )
    return Aligned(vectors, rounded, attended, norms, vector_norms)


def align_backward(
    block: PairBlock,
    aligned: Aligned,
    grad_vectors: Tensor,  # [rows, S] float32, overwritten
    parameters: AlignmentParameters,
    grads: AlignmentParameters,  # added to
) -> Tensor:  # [rows, D]: gradient of the attended vectors, in their place
    """Gradients of parameters and queries are added where they belong."""
    vectors, _, attended, norms, vector_norms = aligned
    normalise_rows_backward(vectors, vector_norms, grad_vectors)
    grads.bias.add_(grad_vectors.sum(0))
    of_products = grad_vectors.to(block.dtype)
    squares = _squares(block, attended, norms)
    add_product(grads.weight, of_products.t(), squares)
    torch.mm(of_products, parameters.weight, out=squares)
    slopes = block.floats(block.rows)
    squared_difference.attended_slopes[(-(-block.rows // ROWS),)](
        block.queries.rows, attended, squares, norms, slopes, block.rows, block.num_queries, block.width, BLOCK_N=ROWS,
        BLOCK_D=WIDTH,
    )  # fmt: skip
    programs = -(-block.num_queries // SUM_ROWS) * -(-block.width // SUM_WIDTH)
    squared_difference.squared_differences_backward[(programs,)](
        block.queries.rows, attended, squares, norms, slopes, block.grad_queries, block.groups, block.num_queries,
        block.width, BLOCK_N=SUM_ROWS, BLOCK_D=SUM_WIDTH,
    )  # fmt: skip
    return attended


def normalise_rows_backward(rows: Tensor, norms: Tensor, grad: Tensor) -> None:  # [n, S], [n], [n, S] float32
    """Gradient at rows of length 1 to that before, in place."""
    row_norms.normalise_rows_backward[(-(-rows.shape[0] // ROWS),)](
        rows, norms, grad, *rows.shape, BLOCK_N=ROWS, BLOCK_D=WIDTH
    )


def _squares(block: PairBlock, attended: Tensor, norms: Tensor) -> Tensor:  # [rows, D]
    squares = torch.empty_like(attended)
    squared_difference.squared_differences[(-(-block.rows // ROWS),)](
        block.queries.rows, attended, squares, norms, block.rows, block.num_queries, block.width, BLOCK_N=ROWS,
        BLOCK_D=WIDTH,
    )  # fmt: skip
    return squares
