"""Blocks of images x captions for the stages as ops: what a pair has of its own is read from and put back into place.

A block has queries of G groups against keys of H groups, ``[H, G, Q, ..]``: H images and G captions in t2i, the reverse
in i2t. In the tensors of the whole batch words are one packed axis, ``N``, or two padded ones, ``C, W``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from itm_kernels.eager.blocks import Batch, Side
from itm_kernels.ops.pairs import score_dtype

Given = TypeVar("Given", Tensor, "Tensor | None")


@dataclass
class Place:
    """Some images against some captions."""

    batch: Batch
    t2i: bool
    start: int  # of the images
    stop: int
    rows: Tensor  # numbers of the captions
    lengths: list[int]
    wide: torch.dtype
    images: Side  # [i, R, D]
    captions: Side  # [c, w, D]

    @property
    def queries_valid(self) -> Tensor:  # [G, Q]
        return self.captions.valid if self.t2i else self.images.valid

    def queries(self, tensor: Given) -> Given:  # [I, words, ..] or [I, R, C, ..] -> [H, G, Q, ..]
        """What belongs to the queries, wide, zeros where they do not count."""
        if tensor is None:
            return None
        mine = tensor[self.start : self.stop]
        if self.t2i:
            return self._words_of(mine, 1)
        mine = mine.index_select(2, self.rows)
        return torch.where(_beside(self.images.valid, 2, mine), mine, 0).movedim(2, 0).to(self.wide)

    def put_queries(self, tensor: Tensor, block: Tensor) -> None:
        """The inverse; ``tensor`` holds zeros where nobody counts."""
        mine = tensor[self.start : self.stop]
        if self.t2i:
            self._put_words(mine, 1, block)
        else:
            mine.index_copy_(2, self.rows, block.movedim(0, 2).to(tensor.dtype))

    def products(self, tensor: Given) -> Given:  # [I, R, words] -> [H, K, G, Q]
        """Of every key and every query, wide, zeros where one of them does not count."""
        if tensor is None:
            return None
        mine = self._words_of(tensor[self.start : self.stop], 2)
        mine = torch.where(_beside(self.images.valid, 2, mine), mine, 0)
        return mine if self.t2i else mine.permute(2, 3, 0, 1)

    def put_products(self, tensor: Tensor, block: Tensor) -> None:
        """The inverse."""
        block = block if self.t2i else block.permute(2, 3, 0, 1)
        block = torch.where(_beside(self.images.valid, 2, block), block, 0)
        self._put_words(tensor[self.start : self.stop], 2, block)

    def pairs(self, tensor: Given) -> Given:  # [I, C, ..] -> [H, G, ..]
        """What belongs to the pairs, wide."""
        if tensor is None:
            return None
        mine = tensor[self.start : self.stop].index_select(1, self.rows).to(self.wide)
        return mine if self.t2i else mine.transpose(0, 1)

    def put_pairs(self, tensor: Tensor, block: Tensor) -> None:
        """The inverse."""
        block = block if self.t2i else block.transpose(0, 1)
        tensor[self.start : self.stop].index_copy_(1, self.rows, block.to(tensor.dtype))

    def add_sides(self, of_regions: Tensor, of_words: Tensor, regions: Tensor, words: Tensor) -> None:
        """Gradients of a block's sides, added to those of the batch."""
        of_regions[self.start : self.stop] += torch.where(self.images.valid[..., None], regions, 0)
        self._put_words(of_words, 0, words, add=True)

    def _words_of(self, tensor: Tensor, axis: int) -> Tensor:  # [.., words, ..] -> [.., c, w, ..]
        longest = self.captions.valid.shape[1]
        if self.batch.starts is None:
            mine = tensor.index_select(axis, self.rows).narrow(axis + 1, 0, longest)
        else:
            flat = self._packed_rows().clamp(max=tensor.shape[axis] - 1)
            mine = tensor.index_select(axis, flat).unflatten(axis, (-1, longest))
        return torch.where(_beside(self.captions.valid, axis + 2, mine), mine, 0).to(self.wide)

    def _put_words(self, tensor: Tensor, axis: int, block: Tensor, *, add: bool = False) -> None:
        block = torch.where(_beside(self.captions.valid, axis + 2, block), block, 0).to(tensor.dtype)
        if self.batch.starts is None:
            tensor, index = tensor.narrow(axis + 1, 0, block.shape[axis + 1]), self.rows
        else:  # packed: the counts are on the host, and nothing has to be read back
            number = torch.arange(block.shape[axis + 1], device="cpu")
            counted = (number < torch.tensor(self.lengths, device="cpu")[:, None]).flatten().nonzero()[:, 0]
            counted = counted.to(tensor.device, non_blocking=True)
            index = self._packed_rows()[counted]
            block = block.flatten(axis, axis + 1).index_select(axis, counted)
        if add:
            tensor.index_add_(axis, index, block)
        else:
            tensor.index_copy_(axis, index, block)

    def _packed_rows(self) -> Tensor:  # [c * w], those of the padding past their caption
        assert self.batch.starts is not None
        number = torch.arange(self.captions.valid.shape[1], device=self.rows.device)
        return (self.batch.starts[self.rows, None] + number).flatten()


def _beside(valid: Tensor, dims: int, tensor: Tensor) -> Tensor:
    """``valid`` for the last two of the first ``dims`` axes of ``tensor``."""
    return valid.view(*valid.shape, *[1] * (tensor.dim() - dims))


def places(batch: Batch, t2i: bool, query_bytes: int, workspace_bytes: int) -> Iterator[Place]:
    """A batch in blocks, where a query of a pair takes ``query_bytes`` in all, its gradient included."""
    wide, most = score_dtype(batch.regions.dtype), batch.regions.shape[1]
    # A block of captions is cut for a handful of images.
    word_bytes = query_bytes * 4 if t2i else query_bytes * most // 4
    done = 0
    for rows, longest in batch.caption_blocks(workspace_bytes, word_bytes):
        lengths = batch.lengths[done : done + rows.shape[0]]
        done += rows.shape[0]
        captions = batch.captions_of(rows, longest).to(wide)
        image_bytes = rows.shape[0] * query_bytes * (longest if t2i else most)
        for start, stop in batch.images_at_once(image_bytes, workspace_bytes):
            images = batch.images_of(start, stop).to(wide)
            yield Place(batch, t2i, start, stop, rows, lengths, wide, images, captions)


def batch_without_vectors(
    alignments: Tensor,  # [I, N, S], [I, C, W, S] or [I, R, C, S]
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    t2i: bool,
) -> Batch:
    """The batch that alignments are of: what is asked of its sides is which of their rows count."""
    images, *rows = alignments.shape[:-1]
    if t2i:
        return Batch(
            alignments.new_empty(images, 1, 0), alignments.new_empty(*rows, 0), word_counts, word_offsets, region_counts
        )
    # Which words there are plays no part where regions ask: one for each caption.
    regions, captions = alignments.new_empty(images, rows[0], 0), alignments.new_empty(rows[1], 1, 0)
    return Batch(regions, captions, torch.ones_like(word_counts), None, region_counts)


def differentiate(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
) -> list[Any]:
    """Gradients of the outputs of ``function``, each times its own of ``grads``; None for an input of None."""
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, asked, grads, materialize_grads=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def accumulators(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros in the shapes of ``tensors``, wide."""
    return [torch.zeros(t.shape, dtype=score_dtype(t.dtype), device=t.device) for t in tensors]


def zeros_of(tensor: Tensor) -> Tensor:
    """For a gradient whose every element is written once."""
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
