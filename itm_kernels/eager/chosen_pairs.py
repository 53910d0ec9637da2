"""Chosen pairs of an image and a caption in blocks: what they name, and where their gradients go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PairBlock:
    """Some of the pairs: where they stand, what they name, which of them name something."""

    rows: slice | Tensor
    images: Tensor  # [b]
    captions: Tensor  # [b]
    named: Tensor  # [b] bool
    region_valid: Tensor  # [b, R] bool
    word_valid: Tensor  # [b, W] bool


def valid_regions(regions: Tensor, region_counts: Tensor | None) -> Tensor:  # [I, R] bool
    """Which regions count."""
    images, most, device = *regions.shape[:2], regions.device
    if region_counts is None:
        return torch.ones(images, most, dtype=torch.bool, device=device)
    counts = region_counts.to(device, non_blocking=True).clamp(1, most)
    return torch.arange(most, device=device) < counts[:, None]


def valid_words(words: Tensor, word_counts: Tensor) -> Tensor:  # [C, W] bool
    """Which words of padded captions count."""
    longest, device = words.shape[1], words.device
    counts = word_counts.to(device, non_blocking=True).clamp(1, longest)
    return torch.arange(longest, device=device) < counts[:, None]


def pair_blocks(
    pairs: Tensor,  # [P, 2]
    region_valid: Tensor,  # [I, R] bool
    word_valid: Tensor,  # [C, W] bool
    pair_bytes: int,
    workspace_bytes: int,
    lengths: Tensor | None = None,  # [P]
) -> Iterator[PairBlock]:
    """The pairs in their order, so many at a time that they fit the workspace where one takes ``pair_bytes``.

    Where the host knows the words of each (``lengths``): in that order, and no wider than the longest of a block.
    """
    images, captions, device = region_valid.shape[0], word_valid.shape[0], region_valid.device
    step = max(1, workspace_bytes // pair_bytes)
    order = None if lengths is None or lengths.device.type != "cpu" else lengths.argsort(stable=True)
    image, caption = pairs.to(device, non_blocking=True).unbind(1)
    named = (image >= 0) & (image < images) & (caption >= 0) & (caption < captions)
    image, caption = image.clamp(0, images - 1), caption.clamp(0, captions - 1)
    for start in range(0, pairs.shape[0], step):
        rows: slice | Tensor = slice(start, start + step)
        longest = word_valid.shape[1]
        if order is not None and lengths is not None:
            longest = int(lengths[order[rows][-1]])
            rows = order[rows].to(device, non_blocking=True)
        of_block = image[rows], caption[rows]
        yield PairBlock(rows, *of_block, named[rows], region_valid[of_block[0]], word_valid[of_block[1], :longest])


def put(total: Tensor, place: Tensor | slice, grad: Tensor) -> None:
    """Add the gradients of a block; several of its pairs may name one image."""
    if isinstance(place, slice):
        total[place] = grad
    elif total.device.type == "cpu":
        total.index_add_(0, place, grad)
    else:
        # This one sorts on a GPU, where index_add_ adds in whatever order its threads come.
        total.index_put_((place,), grad, accumulate=True)
