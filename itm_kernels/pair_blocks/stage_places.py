"""Where what a block holds stands in the tensors of a whole batch, for the stages as ops.

These tensors have queries along ``I, words`` (t2i) or ``I, R, C`` (i2t), products along ``I, R, words`` and pairs along
``I, C``; words are one packed axis or two padded ones, ``C, W``. What does not count is never used and stays zero. All
tables are made on the device, from those of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from itm_kernels.pair_blocks.blocks import PairBlock, PairBlocks
from itm_kernels.pair_blocks.rows import Block, Side

Index = tuple[Tensor, ...]


@dataclass
class Place:
    """Of one block, whose groups and segments are these of the batch."""

    block: PairBlock
    batch: PairBlocks
    groups: slice
    segments: slice
    t2i: bool

    def queries(self, tensor: Tensor) -> Tensor:  # -> [rows, ..] float32, a copy
        """What belongs to the queries of every group; zeros for those of the padding."""
        run = self._run
        found = tensor[self._queries] if run is None else tensor[self.groups, run]
        found = found.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return self._counted(found, 1).flatten(0, 1)

    def put_queries(self, tensor: Tensor, rows: Tensor) -> None:  # [rows, ..], zeroed where they do not count
        """The inverse."""
        block = self._counted(rows.unflatten(0, (self.block.groups, -1)), 1)
        if self._run is None:
            tensor[self._queries] = block.to(tensor.dtype)
        else:
            tensor[self.groups, self._run] = block

    def products(self, tensor: Tensor) -> Tensor:  # -> [G, K, L] float32, a copy
        """Of every key and every query; zero where one of them does not count."""
        block = self.block
        found = tensor[self._products].float()  # [n, L]
        if self.batch.keys.padded:
            found.masked_fill_((block.keys.segments < 0)[:, None], 0)
        found = self._counted(found, 1)
        if self._room is not None:
            room = block.floats(block.groups * block.most, block.num_queries).zero_()
            found = room.index_copy_(0, self._room, found)
        return found.view(block.groups, block.most, -1)

    def put_products(self, tensor: Tensor, products: Tensor) -> None:  # [G, K, L], zero where they do not count
        """The inverse."""
        flat = products.flatten(0, 1)
        if self._room is not None:
            flat = flat.index_select(0, self._room)
        tensor[self._products] = flat.to(tensor.dtype)

    def pairs(self, tensor: Tensor) -> Tensor:  # -> [pairs, ..] float32, a copy
        """What belongs to the pairs."""
        found = self._pairs_of(tensor)
        return found.to(torch.float32, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)

    def put_pairs(self, tensor: Tensor, pairs: Tensor) -> None:  # [pairs, ..]
        """The inverse."""
        self._pairs_of(tensor).copy_(pairs.unflatten(0, (self.block.groups, -1)))

    def nodes(self, alignments: Tensor, wholes: Tensor, dtype: torch.dtype) -> Tensor:  # [rows + pairs, S]
        """SGRAF's: of the words, then of the pairs as a whole."""
        block = self.block
        made = alignments.new_empty(block.rows + block.pairs, alignments.shape[-1], dtype=dtype)
        made[: block.rows] = self.queries(alignments)
        made[block.rows :].unflatten(0, (block.groups, -1)).copy_(self._pairs_of(wholes))
        return made

    def put_nodes(self, alignments: Tensor, wholes: Tensor, nodes: Tensor) -> None:
        """The inverse."""
        self.put_queries(alignments, nodes[: self.block.rows])
        self.put_pairs(wholes, nodes[self.block.rows :])

    def _pairs_of(self, tensor: Tensor) -> Tensor:  # [I, C, ..] -> [G, segments, ..], a view
        return tensor[self.groups, self.segments] if self.t2i else tensor[self.segments, self.groups].transpose(0, 1)

    def _counted(self, found: Tensor, axis: int) -> Tensor:
        """Zeros, in place, where queries, along an axis, do not count."""
        if self.batch.queries.padded:
            beyond = self.block.queries.segments < 0
            found.masked_fill_(beyond.view(-1, *(1 for _ in range(axis + 1, found.dim()))), 0)
        return found

    @property
    def _run(self) -> slice | None:
        """The queries of a group where they are one run of memory: packed words."""
        side = self.batch.queries
        if not _packed(side):
            return None
        return slice(side.bounds[self.segments.start], side.bounds[self.segments.stop])

    @cached_property
    def _queries(self) -> Index:  # broadcasts to [G, L]
        groups, lanes = self._range(self.groups)[:, None], [axis[None] for axis in self._lanes]
        return (groups, *lanes) if self.t2i else (*lanes, groups)

    @cached_property
    def _products(self) -> Index:  # broadcasts to [n, L]: n keys of all groups
        lanes = [axis[None] for axis in self._lanes]
        keys = [axis[:, None] for axis in _axes(self.batch.keys, self.block.keys, self.groups.start)]
        return (*keys, *lanes) if self.t2i else (*lanes, *keys)

    @cached_property
    def _lanes(self) -> Index:
        return _axes(self.batch.queries, self.block.queries, self.segments.start)

    @cached_property
    def _room(self) -> Tensor | None:
        """``[n]`` rows of ``[G * K]``; None: keys fill their room."""
        block = self.block
        if block.keys.num_rows == block.groups * block.most:
            return None
        group, key = members(block.keys)
        return group * block.most + key

    def _range(self, of: slice) -> Tensor:
        return torch.arange(of.start, of.stop, device=self.block.padded.device)


def _axes(side: Side, block: Block, first: int) -> Index:  # one or two of [n]
    """Rows of a block where the batch has them: packed, or group and place."""
    if _packed(side):
        return (torch.arange(block.num_rows, device=side.device) + side.bounds[first],)
    group, place = members(block)
    return group + first, place


def _packed(side: Side) -> bool:
    return side.vectors.dim() == 2


def members(block: Block) -> tuple[Tensor, Tensor]:  # [n], [n]
    """Group and place within it, of every row; those of the padding are members."""
    rows = torch.arange(block.num_rows, device=block.offsets.device)
    group = torch.searchsorted(block.offsets[1:], rows, right=True)
    return group, rows - block.offsets[group]


def sides_without_vectors(
    alignments: Tensor,  # [I, N, S], [I, C, W, S] or [I, R, C, S]
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    dtype: torch.dtype,
    *,
    t2i: bool,
) -> tuple[Side, Side]:
    """Queries and keys of the batch that alignments are of, for stages that ask which rows count and see no vector.

    Vectors are single numbers that nobody uses, and every group has one key.
    """
    images, *rows = alignments.shape[:-1]
    if t2i:
        words = alignments.new_zeros(*rows, 1, dtype=dtype)
        queries = Side(words, word_counts, offsets=word_offsets, what="word_counts")
        return queries, Side(alignments.new_zeros(images, 1, 1, dtype=dtype), None)
    regions, captions = rows
    queries = Side(alignments.new_zeros(images, regions, 1, dtype=dtype), region_counts, what="region_counts")
    return queries, Side(alignments.new_zeros(captions, 1, 1, dtype=dtype), None)
