"""Where what a chunk holds stands in the tensors of a whole batch, for the stages as ops.

These tensors have queries along ``I, words`` (t2i) or ``I, R, C`` (i2t), products along ``I, R, words`` and pairs along
``I, C``; words are one packed axis or two padded ones, ``C, W``. What does not count is never read and stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from itm_kernels.native.cpu.pair_chunks import Chunk
from itm_kernels.native.packing import Packed

Index = tuple[Tensor, ...]


@dataclass
class Place:
    """Of one chunk."""

    chunk: Chunk
    side: Packed  # the queries of the batch
    of_keys: Packed
    t2i: bool

    def queries(self, tensor: Tensor) -> Tensor:  # -> [rows, ..] float32, a copy
        """What belongs to the queries of every group."""
        run = self._run
        found = tensor[self._queries] if run is None else tensor[:, run].index_select(0, self.chunk.group_numbers)
        return found.float().flatten(0, 1)

    def put_queries(self, tensor: Tensor, rows: Tensor) -> None:  # [rows, ..]
        """The inverse."""
        block = rows.unflatten(0, (self.chunk.groups, -1)).to(tensor.dtype)
        if self._run is None:
            tensor.index_put_(self._queries, block)
        else:
            tensor[:, self._run].index_copy_(0, self.chunk.group_numbers, block)

    def products(self, tensor: Tensor) -> Tensor:  # -> [G, K, L] float32, a copy
        """Of every key and every query; zero behind a group's last key."""
        chunk = self.chunk
        lanes, room = chunk.queries.shape[0], chunk.keys.shape[1] * chunk.groups
        found = tensor[self._products].float()  # [n, L]
        if found.shape[0] < room:
            found = found.new_zeros(room, lanes).index_copy_(0, self._keys_of_room, found)
        return found.view(chunk.groups, -1, lanes)

    def put_products(self, tensor: Tensor, block: Tensor) -> None:  # [G, K, L]
        """The inverse."""
        flat = block.flatten(0, 1)
        if self._keys_of_room.shape[0] < flat.shape[0]:
            flat = flat.index_select(0, self._keys_of_room)
        tensor.index_put_(self._products, flat.to(tensor.dtype))

    def pairs(self, tensor: Tensor) -> Tensor:  # -> [pairs, ..] float32, a copy
        """What belongs to the pairs."""
        return tensor[self._pairs].float().flatten(0, 1)

    def put_pairs(self, tensor: Tensor, block: Tensor) -> None:  # [pairs, ..]
        """The inverse."""
        tensor.index_put_(self._pairs, block.unflatten(0, (self.chunk.groups, -1)).to(tensor.dtype))

    def nodes(self, alignments: Tensor, wholes: Tensor, out: Tensor) -> Tensor:  # [rows + pairs, S]
        """SGRAF's, into ``out``: of the words, then of the pairs as a whole."""
        out[: self.chunk.rows] = self.queries(alignments)
        out[self.chunk.rows :] = self.pairs(wholes)
        return out

    def put_nodes(self, alignments: Tensor, wholes: Tensor, nodes: Tensor) -> None:
        """The inverse."""
        self.put_queries(alignments, nodes[: self.chunk.rows])
        self.put_pairs(wholes, nodes[self.chunk.rows :])

    @property
    def _run(self) -> slice | None:
        """The queries of a group where they are one run of memory, which is several times as fast: packed words."""
        segments = self.chunk.segments
        return self.side.span(segments.start, segments.stop) if len(self.side.shape) == 2 else None

    @cached_property
    def _queries(self) -> Index:  # broadcasts to [G, L]
        groups, lanes = self.chunk.group_numbers[:, None], [axis[None] for axis in self._lanes]
        return (groups, *lanes) if self.t2i else (*lanes, groups)

    @cached_property
    def _products(self) -> Index:  # broadcasts to [n, L]: n keys of all groups
        lanes = [axis[None] for axis in self._lanes]
        keys = [axis[:, None] for axis in _axes(self.of_keys, self.chunk.group_numbers, self.chunk.key_counts)]
        return (*keys, *lanes) if self.t2i else (*lanes, *keys)

    @cached_property
    def _pairs(self) -> Index:  # broadcasts to [G, segments]
        groups, segments = self.chunk.group_numbers[:, None], self.chunk.segment_numbers[None]
        return (groups, segments) if self.t2i else (segments, groups)

    @cached_property
    def _lanes(self) -> Index:
        return _axes(self.side, self.chunk.segment_numbers, self.chunk.offsets.diff())

    @cached_property
    def _keys_of_room(self) -> Tensor:  # [n], rows of [G * K]
        group, key = _members(self.chunk.key_counts)
        return group * self.chunk.keys.shape[1] + key


def _axes(side: Packed, numbers: Tensor, counts: Tensor) -> Index:  # [groups], [groups] -> one or two of [n]
    """Members of groups where the batch has them: packed, or group and place."""
    group, place = _members(counts)
    if len(side.shape) == 2:
        return (side.offsets[numbers[group]] + place,)
    return numbers[group], place


def _members(counts: Tensor) -> tuple[Tensor, Tensor]:  # [groups] -> [n], [n]
    """Group and place within it, of every member."""
    group = torch.repeat_interleave(torch.arange(counts.shape[0], device="cpu"), counts)
    return group, torch.arange(group.shape[0], device="cpu") - (counts.cumsum(0) - counts)[group]


def sides_without_vectors(
    alignments: Tensor,  # [I, N, S], [I, C, W, S] or [I, R, C, S]
    word_counts: Tensor,
    region_counts: Tensor | None,
    dtype: torch.dtype,
    *,
    t2i: bool,
) -> tuple[Packed, Packed]:
    """Queries and keys of the batch that alignments are of, for stages that ask which rows count and see no vector.

    Vectors are single numbers that nobody reads, and every group has one key.
    """

    def side(counts: Tensor | None, *rows: int) -> Packed:
        return Packed(torch.zeros((), dtype=dtype, device="cpu").expand(*rows, 1), counts, dtype)

    images, *rows = alignments.shape[:-1]
    if t2i:
        return side(word_counts, *rows), side(None, images, 1)
    regions, captions = rows
    return side(region_counts, images, regions), side(None, captions, 1)
