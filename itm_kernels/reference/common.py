"""What the definitions of SGRAF and RCAR share: guarded norms, the loop over captions, groups of images, precision."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import (
    AggregationParameters,
    AlignmentParameters,
    CorrespondenceParameters,
    GraphParameters,
)

EPS = 1e-8
"""Added to norms, outside the root; the floor of the product of two norms in a cosine."""

Stacked = TypeVar("Stacked", AlignmentParameters, CorrespondenceParameters, AggregationParameters, GraphParameters)


def norm(x: Tensor) -> Tensor:  # [..., S] -> [...]
    """Euclidean norm with gradient zero at zero."""
    square = (x * x).sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def l2norm(x: Tensor) -> Tensor:  # [..., S] -> [..., S]
    """``x / (|x| + eps)``; a zero vector stays zero and passes no gradient (published: NaN)."""
    length = norm(x).unsqueeze(-1)
    return torch.where(length > 0, x / (length + EPS), 0.0)


def at_step(stacked: Stacked | None, step: int) -> Stacked:
    """One step's tensors of a record whose tensors are stacked along their first axis."""
    assert stacked is not None, "the op has checked that what its options need is there"
    return type(stacked)(*(tensor[step] for tensor in stacked))


def captions_of(words: Tensor, word_counts: Tensor) -> list[Tensor]:  # [C, W, D] or [N, D] -> C times [n, D]
    """The valid words of each caption."""
    if words.dim() == 2:
        counts: list[int] = word_counts.tolist()
        return [words[start : start + n] for start, n in zip(accumulate(counts, initial=0), counts, strict=False)]
    return [words[c, :n] for c, n in enumerate(counts_on_host(word_counts, words.shape[1]))]


def over_images(
    regions: Tensor,  # [I, R, D]
    region_counts: Tensor | None,  # [I]
    function: Callable[[Tensor, Tensor], Tensor],  # numbers of the images [B], their regions [B, r, D] -> [B, ...]
) -> Tensor:  # [I, ...]
    """``function`` of all images at once; images with as many regions together, each group cut to what is valid."""
    numbers = torch.arange(regions.shape[0], device=regions.device)
    if region_counts is None:
        return function(numbers, regions)
    counts = counts_on_host(region_counts, regions.shape[1])
    order, parts = [], []
    for count in sorted(set(counts)):
        rows = numbers[[i for i, value in enumerate(counts) if value == count]]
        order.append(rows)
        parts.append(function(rows, regions[rows, :count]))
    return torch.cat(parts)[torch.cat(order).argsort()]


def wide(tensor: Tensor, products: torch.dtype) -> Tensor:
    """A parameter in the dtype of scores; a matrix first rounded to ``products``, the dtype of the regions.

    Vectors and biases are not rounded. The only matrices are those of the steps, ``[steps, rows, columns]``.
    """
    return (tensor.to(products) if tensor.dim() == 3 else tensor).to(score_dtype(products))


def all_wide(tensors: list[Tensor | None], products: torch.dtype) -> list[Tensor | None]:
    """``wide`` of those that are there."""
    return [None if tensor is None else wide(tensor, products) for tensor in tensors]


def gradients(
    function: Callable[[list[Tensor], list[Tensor | None]], Tensor],  # of features and parameters -> scores
    features: list[Tensor],  # the regions first
    parameters: list[Tensor | None],
    grad_scores: Tensor,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of ``sum(scores * grad_scores)`` by autograd, each in shape and dtype of its input.

    The leaves are in the dtype of scores, so that a gradient is rounded once, at its end.
    """
    products = features[0].dtype

    def leaf(tensor: Tensor) -> Tensor:
        return wide(tensor, products).detach().requires_grad_()

    with torch.enable_grad():
        leaves, of_parameters = [leaf(t) for t in features], [None if t is None else leaf(t) for t in parameters]
        scores = function(leaves, of_parameters)
        asked = leaves + [t for t in of_parameters if t is not None]
        found = iter(torch.autograd.grad(scores, asked, grad_scores.to(scores.dtype)))
    grads = [next(found).to(t.dtype).contiguous() for t in features]
    return grads, [None if t is None else next(found).to(t.dtype).contiguous() for t in parameters]


def counts_on_host(counts: Tensor, most: int) -> list[int]:
    """Counts as numbers, clamped to ``1..most`` where nobody has checked them."""
    # The one place that may wait for a device: the definition is not a kernel.
    values: list[int] = counts.tolist()
    return values if counts.device.type == "cpu" else [min(max(n, 1), most) for n in values]


# Of the stages as ops: the axis of words, ``N`` or ``C, W``, stands in their tensors wherever words have it.


def words_of_captions(
    tensor: Tensor, axis: int, word_counts: Tensor, padded: bool
) -> list[Tensor]:  # [.., N, ..] or [.., C, W, ..] -> C times [.., n, ..]
    """What belongs to the valid words of each caption."""
    if padded:
        counts = counts_on_host(word_counts, tensor.shape[axis + 1])
        return [tensor.select(axis, c).narrow(axis, 0, n) for c, n in enumerate(counts)]
    counts = word_counts.tolist()
    return [tensor.narrow(axis, start, n) for start, n in zip(accumulate(counts, initial=0), counts, strict=False)]


def joined_captions(captions: list[Tensor], axis: int, longest: int | None) -> Tensor:
    """The inverse: packed, or every caption filled up with zeros to ``longest`` words."""
    if longest is None:
        return torch.cat(captions, dim=axis)
    return torch.stack([filled(caption, axis, longest) for caption in captions], dim=axis)


def filled(tensor: Tensor, axis: int, size: int) -> Tensor:
    """With zeros behind, up to ``size`` along an axis."""
    behind = size - tensor.shape[axis]
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, behind))


def nodes_of_captions(features: list[Tensor | None], word_counts: Tensor) -> list[Tensor]:  # C times [I, 1 + n, S]
    """The nodes of all images with each caption, the global one first, from the alignments of words and wholes."""
    alignments, of_wholes = features
    assert alignments is not None
    assert of_wholes is not None
    captions = words_of_captions(alignments, 1, word_counts, alignments.dim() == 4)
    wholes = of_wholes.unsqueeze(2).unbind(1)  # C times [I, 1, S]
    return [torch.cat([whole, words], dim=1) for whole, words in zip(wholes, captions, strict=True)]


def counted_regions(regions: Tensor, region_counts: Tensor | None) -> Tensor:  # [I, R] bool
    """Which regions count."""
    images, most = regions.shape[:2]
    if region_counts is None:
        return torch.ones(images, most, dtype=torch.bool, device=regions.device)
    counts = torch.tensor(counts_on_host(region_counts, most), device=regions.device)
    return torch.arange(most, device=regions.device) < counts[:, None]


def widened(features: list[Tensor | None], products: torch.dtype) -> list[Tensor | None]:
    """What is no parameter, in the dtype of scores."""
    return [None if tensor is None else tensor.to(score_dtype(products)) for tensor in features]


def stage_gradients(
    function: Callable[[list[Tensor | None], list[Tensor]], tuple[Tensor, ...]],  # of features and parameters
    features: list[Tensor | None],
    parameters: list[Tensor],
    upstream: tuple[Tensor, ...],
    products: torch.dtype,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of ``sum(outputs * upstream)`` by autograd, each in shape and dtype of its input.

    The leaves are in the dtype of scores, so that a gradient is rounded once, at its end.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in widened(features, products)]
        of_parameters = [wide(t, products).detach().requires_grad_() for t in parameters]
        outputs = function(leaves, of_parameters)
    asked = [t for t in leaves if t is not None] + of_parameters
    grads = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    found = iter(torch.autograd.grad(outputs, asked, grads, materialize_grads=True))
    made = [None if t is None else next(found).to(t.dtype).contiguous() for t in features]
    return made, [next(found).to(t.dtype).contiguous() for t in parameters]
