"""Nodes of a chunk of pairs (SGRAF): alignment vectors of the words of every pair, and of every pair as a whole.

They stand in one matrix, ``[rows + pairs, S]``, the words first: csrc/cpu/node_rows.h says in which order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import alignment
from itm_kernels.native.cpu.pair_chunks import Chunk, add_product
from itm_kernels.ops.parameters import AlignmentParameters


class Nodes(NamedTuple):
    """Alignment vectors, and what their backward reads."""

    vectors: Tensor  # [rows + pairs, S] float32
    norms: Tensor  # [rows + pairs], before the normalisation
    rounded: Tensor  # [rows + pairs, S], for products; a backward puts gradients there


class Wholes(NamedTuple):
    """Global vectors of the images and captions of a chunk, and where gradients of theirs are added."""

    images: Tensor  # [G, D]
    captions: Tensor  # [segments, D]
    grad_images: Tensor | None = None  # [I, D] float32
    grad_captions: Tensor | None = None  # [segments, D] float32


class Differences(NamedTuple):
    """What a chunk's nodes are made from."""

    attention: alignment.Attention
    attended: Tensor  # [rows, D]
    squares: Tensor  # [pairs, D], of the wholes


class Transforms(NamedTuple):
    """Of the words and of the wholes; of one step each."""

    words: AlignmentParameters
    wholes: AlignmentParameters


def room(chunk: Chunk, width: int, vectors: Tensor | None = None, norms: Tensor | None = None) -> Nodes:
    """Memory for the nodes of a chunk; ``vectors`` and ``norms`` where they have a place of their own."""
    count = chunk.rows + chunk.pairs
    if vectors is None:
        vectors = chunk.workspace.floats("node vectors", count, width)
    if norms is None:
        norms = chunk.workspace.floats("node norms", count)
    single = chunk.workspace.dtype == vectors.dtype
    return Nodes(vectors, norms, vectors if single else chunk.workspace.take("rounded nodes", count, width))


def compare(chunk: Chunk, wholes: Wholes, temperature: float) -> Differences:
    """What the words attend to, and the squared differences of the wholes."""
    products = chunk.plain_products()
    weights = chunk.workspace.take("weights", *products.shape)
    attention = alignment.attend(chunk, products, None, temperature, weights)
    squares = chunk.workspace.take("whole squares", chunk.pairs, chunk.queries.shape[1])
    torch.ops.itm_kernels_native.whole_squares(wholes.images, wholes.captions, squares)
    return Differences(attention, alignment.attended(chunk, attention, 0), squares)


def transform(chunk: Chunk, made: Differences, transforms: Transforms, nodes: Nodes) -> None:
    """Alignment vectors, into ``nodes``."""
    squares = chunk.wide()
    norms = chunk.workspace.floats("attended norms", chunk.rows)
    torch.ops.itm_kernels_native.squared_differences(chunk.queries, made.attended, squares, norms)
    halves = (squares, transforms.words, 0, chunk.rows), (made.squares, transforms.wholes, chunk.rows, chunk.pairs)
    for rows, parameters, first, count in halves:
        vectors, norms, rounded = (tensor.narrow(0, first, count) for tensor in nodes)
        torch.mm(rows, parameters.weight.t(), out=rounded)
        torch.ops.itm_kernels_native.normalise_rows(rounded, parameters.bias, norms, vectors)


def backward(
    chunk: Chunk,
    made: Differences,
    nodes: Nodes,
    grad_nodes: Tensor,  # [rows + pairs, S] float32
    wholes: Wholes,
    temperature: float,
    transforms: Transforms,
    grads: Transforms,
) -> None:
    """Adds every gradient where it belongs."""
    rows, pairs = chunk.rows, chunk.pairs
    vectors, norms, rounded = (tensor[:rows] for tensor in nodes)
    lengths = chunk.workspace.floats("attended norms", rows)  # made again with the squares
    of_words = alignment.Aligned(vectors, rounded, made.attended, lengths, norms)
    grad_attended = alignment.align_backward(chunk, of_words, grad_nodes[:rows], transforms.words, grads.words)
    grad_weights = alignment.attended_backward(chunk, made.attention, grad_attended)
    grad_products, _ = alignment.attend_backward(chunk, made.attention, temperature, grad_weights)
    chunk.plain_products_backward(grad_products)

    vectors, norms, rounded = (tensor[rows:] for tensor in nodes)
    sums = chunk.sums(pairs, vectors.shape[1])
    torch.ops.itm_kernels_native.normalise_rows_backward(vectors, norms, grad_nodes[rows:], rounded, sums)
    grads.wholes.bias.add_(sums.sum(0))
    add_product(grads.wholes.weight, rounded.t(), made.squares)
    torch.mm(rounded, transforms.wholes.weight, out=made.squares)
    assert wholes.grad_images is not None
    of_images = chunk.workspace.floats("grad wholes", *wholes.images.shape)
    torch.ops.itm_kernels_native.whole_squares_backward(
        wholes.images, wholes.captions, made.squares, of_images, wholes.grad_captions
    )
    wholes.grad_images.index_add_(0, chunk.group_numbers, of_images)
