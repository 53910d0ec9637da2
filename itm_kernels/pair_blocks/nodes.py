"""Nodes of a block of pairs (SGRAF): alignment vectors of the words of every pair, and of every pair as a whole.

They stand in one buffer, ``[rows + pairs, S]``, the words first, so that the words and the wholes are each one run for
the products of their own, and all nodes are one for the products that they share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import AlignmentParameters, ReasoningParameters
from itm_kernels.pair_blocks import alignment
from itm_kernels.pair_blocks.blocks import PairBlock, add_product, put_product
from itm_kernels.pair_blocks.parameters import at_step


class Nodes(NamedTuple):
    """Alignment vectors, and what their backward reads."""

    vectors: Tensor  # [rows + pairs, S] float32
    rounded: Tensor  # [rows + pairs, S]: the same for products, where any follow
    norms: Tensor  # [rows + pairs], before the normalisation


class Wholes(NamedTuple):
    """Global vectors of the images and captions of a block, and where gradients of theirs are added."""

    images: Tensor  # [G, D]
    captions: Tensor  # [segments, D]
    grad_images: Tensor | None = None  # [G, D] float32
    grad_captions: Tensor | None = None  # [segments, D] float32


class Transforms(NamedTuple):
    """Of the words and of the wholes; of one step each. Or their gradients."""

    words: AlignmentParameters
    wholes: AlignmentParameters

    @staticmethod
    def of(parameters: ReasoningParameters) -> Transforms:
        """The two alignments, which have one step."""
        return Transforms(at_step(parameters.local_alignment, 0), at_step(parameters.global_alignment, 0))


def attend(block: PairBlock, temperature: float) -> alignment.Attention:
    """What the words attend to."""
    return alignment.attend(block, block.plain_products(), None, temperature)


def transform(block: PairBlock, attended: Tensor, wholes: Wholes, transforms: Transforms, *, rounds: bool) -> Nodes:
    """Alignment vectors; ``rounds``: products follow."""
    count, width = block.rows + block.pairs, transforms.words.bias.shape[0]
    vectors, norms = block.floats(count, width), block.floats(count)
    rounded = vectors if block.dtype == torch.float32 or not rounds else block.take(count, width)
    made = Nodes(vectors, rounded, norms)
    of_words, of_wholes = slice(0, block.rows), slice(block.rows, None)
    squares = alignment.squares(block, attended, block.floats(block.rows))
    _transform(block, squares, transforms.words, _part(made, of_words))
    del squares
    _transform(block, _whole_squares(block, wholes), transforms.wholes, _part(made, of_wholes))
    return made


def backward(
    block: PairBlock,
    attention: alignment.Attention,
    nodes: Nodes,
    grad_nodes: Tensor,  # [rows + pairs, S] float32, overwritten
    wholes: Wholes,
    temperature: float,
    transforms: Transforms,
    grads: Transforms,
) -> None:
    """Adds every gradient where it belongs. That of the attended vectors takes their place."""
    rows = block.rows
    vectors, rounded, norms = _part(nodes, slice(0, rows))
    lengths = block.floats(rows)  # made again with the squares
    of_words = alignment.Aligned(vectors, rounded, attention.attended, lengths, norms)
    grad_attended = alignment.align_backward(block, of_words, grad_nodes[:rows], transforms.words, grads.words)
    grad_products, _ = alignment.attend_backward(block, attention, temperature, grad_attended)
    block.plain_products_backward(grad_products)

    assert wholes.grad_images is not None
    assert wholes.grad_captions is not None
    grad = grad_nodes[rows:]
    of_products = grad if block.dtype == torch.float32 else block.take(*grad.shape)
    block.steps.normalise_rows_backward(nodes.vectors[rows:], nodes.norms[rows:], grad, of_products)
    block.add_sum(grads.wholes.bias, grad)
    squares = _whole_squares(block, wholes)
    add_product(grads.wholes.weight, of_products.t(), squares)
    torch.mm(of_products, transforms.wholes.weight, out=squares)
    block.steps.whole_squares_backward(
        wholes.images, wholes.captions, squares, wholes.grad_images, wholes.grad_captions
    )


def _part(nodes: Nodes, rows: slice) -> Nodes:
    """Some of the nodes, by their rows."""
    vectors = nodes.vectors[rows]
    rounded = vectors if nodes.rounded is nodes.vectors else nodes.rounded[rows]
    return Nodes(vectors, rounded, nodes.norms[rows])


def _transform(block: PairBlock, squares: Tensor, parameters: AlignmentParameters, out: Nodes) -> None:
    put_product(out.vectors, squares, parameters.weight.t())
    block.steps.normalise_rows(out.vectors, parameters.bias, out.norms, out.rounded)


def _whole_squares(block: PairBlock, wholes: Wholes) -> Tensor:  # [pairs, D]
    squares = block.take(block.pairs, block.width)
    block.steps.whole_squares(wholes.images, wholes.captions, squares)
    return squares
