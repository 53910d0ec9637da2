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
from itm_kernels.pair_blocks.blocks import PairBlock, add_product, product


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
    norms = block.floats(block.groups, block.segments, block.most)
    weights = block.take(*products.shape)
    block.steps.attention_weights(block, products, temperatures, temperature, norms, weights)
    return Attention(products, norms, temperatures, weights, block.combine_keys(weights))


def attend_backward(
    block: PairBlock,
    attention: Attention,
    temperature: float,
    grad_attended: Tensor,  # [rows, D]
) -> tuple[Tensor, Tensor]:  # [G, K, L], [rows]
    """Gradients of products, rounded for products, and temperatures; that of the keys is added where it belongs."""
    products, norms, temperatures, weights, _ = attention
    block.add_to_keys(weights, grad_attended)
    grad = block.products_with(grad_attended)
    grad_temperatures = block.floats(block.rows)
    grad_products = weights  # in their place: they have been used
    block.steps.attention_weights_backward(
        block, products, norms, temperatures, temperature, grad, grad_temperatures, grad_products
    )
    return grad_products, grad_temperatures


def align(block: PairBlock, attended: Tensor, parameters: AlignmentParameters) -> Aligned:
    """Alignment vectors of what a block attends to; ``parameters`` are those of one step."""
    norms = block.floats(block.rows)
    vectors = product(squares(block, attended, norms), parameters.weight.t())
    vector_norms = block.floats(block.rows)
    rounded = vectors if block.dtype == torch.float32 else block.take(*vectors.shape)
    block.steps.normalise_rows(vectors, parameters.bias, vector_norms, rounded)
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
    of_products = grad_vectors if block.dtype == torch.float32 else block.take(*grad_vectors.shape)
    block.steps.normalise_rows_backward(vectors, vector_norms, grad_vectors, of_products)
    block.add_sum(grads.bias, grad_vectors)
    made = squares(block, attended, norms)
    add_product(grads.weight, of_products.t(), made)
    torch.mm(of_products, parameters.weight, out=made)
    block.steps.squared_differences_backward(block, attended, made, norms)
    return attended


def squares(block: PairBlock, attended: Tensor, norms: Tensor) -> Tensor:  # [rows, D]
    """Squared differences of the queries and what they attend to at length 1; ``norms [rows]`` are those before."""
    made = torch.empty_like(attended)
    block.steps.squared_differences(block, attended, made, norms)
    return made
