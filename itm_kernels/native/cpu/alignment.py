"""Alignment vectors of a chunk: library products around the C++ steps, forward and backward.

    a = attention of products        c = a^T keys        x = l2norm(weight (q - l2norm(c))^2 + bias)

Products of a backward: ``c`` is kept, its squares are made again for ``dW``, and ``dc`` takes the place of ``c``; from
there ``da = keys dc^T`` and ``dkeys += a dc`` end at the gradient of the products, which the caller hands on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu.pair_chunks import Chunk, add_product
from itm_kernels.ops.parameters import AlignmentParameters


class Attention(NamedTuple):
    """How the queries of a chunk attend."""

    products: Tensor  # [G, K, L] float32
    temperatures: Tensor | None  # [rows] float32; None: one number for all
    weights: Tensor  # [G, K, L]


class Vectors(NamedTuple):
    """Alignment vectors."""

    wide: Tensor  # [rows, S] float32
    rounded: Tensor  # [rows, S]: the same for products


class Aligned(NamedTuple):
    """Alignment vectors, and what their backward reads."""

    vectors: Tensor  # [rows, S] float32
    rounded: Tensor  # [rows, S]: the same for products
    attended: Tensor  # [rows, D]
    norms: Tensor  # [rows], of the attended vectors
    vector_norms: Tensor  # [rows], before the normalisation

    def as_vectors(self) -> Vectors:
        return Vectors(self.vectors, self.rounded)


def attend(
    chunk: Chunk, products: Tensor, temperatures: Tensor | None, temperature: float, weights: Tensor
) -> Attention:
    """Weights of the keys, into ``weights``, rounded as that is."""
    torch.ops.itm_kernels_native.alignment_attention(
        products, chunk.key_counts, chunk.offsets, temperatures, temperature, weights
    )
    return Attention(products, temperatures, weights)


def attend_backward(
    chunk: Chunk,
    attention: Attention,
    temperature: float,
    grad_weights: Tensor,  # [G, K, L] float32
) -> tuple[Tensor, Tensor]:  # [G, K, L], in the place of the products; [rows]
    """Gradients of products and temperatures."""
    grad_temperatures = chunk.workspace.floats("grad temperatures", chunk.rows)
    torch.ops.itm_kernels_native.alignment_attention_backward(
        attention.products,
        chunk.key_counts,
        chunk.offsets,
        attention.temperatures,
        temperature,
        grad_weights,
        grad_temperatures,
    )
    return attention.products, grad_temperatures


def attended(chunk: Chunk, attention: Attention, step: int) -> Tensor:  # [rows, D]
    """The keys, summed by their weights."""
    return chunk.combine_keys(attention.weights, chunk.wide(f"attended {step}" if chunk.keeps else None))


def attended_backward(chunk: Chunk, attention: Attention, grad_attended: Tensor) -> Tensor:  # [G, K, L] float32
    """Gradient of the weights; that of the keys is added where it belongs."""
    chunk.add_to_keys(attention.weights, grad_attended)
    return chunk.products_with(grad_attended, "grad weights")


def align(chunk: Chunk, attended: Tensor, parameters: AlignmentParameters, step: int) -> Aligned:
    """Alignment vectors of what a chunk attends to; ``parameters`` are those of one step."""
    norms = chunk.workspace.floats(chunk.name("attended norms", step), chunk.rows)
    vector_norms = chunk.workspace.floats(chunk.name("vector norms", step), chunk.rows)
    vectors = chunk.workspace.take(chunk.name("vectors", step), chunk.rows, parameters.bias.shape[0])
    squares = chunk.wide()
    torch.ops.itm_kernels_native.squared_differences(chunk.queries, attended, squares, norms)
    torch.mm(squares, parameters.weight.t(), out=vectors)
    wide = chunk.workspace.floats(chunk.name("vectors", step), *vectors.shape)
    torch.ops.itm_kernels_native.normalise_rows(vectors, parameters.bias, vector_norms, wide)
    return Aligned(wide, vectors, attended, norms, vector_norms)


def align_backward(
    chunk: Chunk,
    aligned: Aligned,
    grad_vectors: Tensor,  # [rows, S] float32
    parameters: AlignmentParameters,
    grads: AlignmentParameters,  # added to
) -> Tensor:  # [rows, D]: gradient of the attended vectors, in their place
    """Gradients of parameters and queries are added where they belong; the vectors are overwritten."""
    wide, vectors, attended, norms, vector_norms = aligned
    sums = chunk.sums(chunk.rows, vectors.shape[1])
    torch.ops.itm_kernels_native.normalise_rows_backward(wide, vector_norms, grad_vectors, vectors, sums)
    grads.bias.add_(sums.sum(0))
    squares = chunk.wide()
    torch.ops.itm_kernels_native.squared_differences(chunk.queries, attended, squares, norms)
    add_product(grads.weight, vectors.t(), squares)
    torch.mm(vectors, parameters.weight, out=squares)
    torch.ops.itm_kernels_native.squared_differences_backward(
        chunk.queries, norms, squares, attended, chunk.grad_queries
    )
    return attended
