"""One side of a batch, the regions of all images or the words of all captions, as packed rows block by block.

Counts known on the host: a block holds valid rows alone, one group after another (a view where the storage is that
already). Counts on a device alone: a block is padded, padding is zero, and kernels see which rows count.
Nothing waits for the device: small tables go there from pinned memory, or are made there from the offsets given, rows
and tables of both sides in one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from itm_kernels.layout import offsets_of
from itm_kernels.pair_blocks.records import Packing


@dataclass
class Block:
    """Some groups of a side."""

    rows: Tensor  # [n, D]
    offsets: Tensor  # [groups + 1] int64: first row of each group in the block
    counts: Tensor  # [groups] int64: valid rows of each
    segments: Tensor  # [n] int32: group of each row, counted from any number; -1: padding
    most: int  # rows of the largest group, padding included
    extent: int | None = None  # rows from group to group of the gradient; None: it is packed as the block is

    @property
    def groups(self) -> int:
        return self.counts.shape[0]

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]


class Side:
    """Rows of G groups in any of the forms that the op takes."""

    def __init__(
        self,
        vectors: Tensor,  # [G, K, D] or packed [N, D]
        counts: Tensor | None,  # [G]
        *,
        offsets: Tensor | None = None,  # [G + 1] int64 on the device, of the packed rows
        what: str = "counts",
    ) -> None:
        self.vectors, self.device = vectors, vectors.device
        self.width = vectors.shape[-1]
        packed = vectors.dim() == 2
        self._device_counts: Tensor | None = None
        if counts is not None and not on_host(counts):
            self._device_counts = counts.to(self.device)  # clamped where they are read
            counts = None
        groups = vectors.shape[0] if counts is None else counts.shape[0]
        self._extent = 0 if packed else vectors.shape[1]
        host = counts if counts is not None else torch.full((groups,), self._extent, dtype=torch.int64, device="cpu")
        self.bounds: list[int] = offsets_of(host).tolist()
        self.most = int(host.max()) if groups else 0
        self.whole = not packed and self.bounds[-1] == groups * self._extent
        self._packed = packed
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None
        self._offsets: Tensor | None = None
        if not self.whole:
            self._offsets = offsets if offsets is not None else _to_device(offsets_of(host), self.device, what)

    @property
    def padded(self) -> bool:
        """Counts are on the device alone: every group costs its padding."""
        return self._device_counts is not None

    @property
    def in_place(self) -> bool:
        """Whether a block's gradient is one run of memory."""
        return self._packed or self.whole

    @property
    def is_view(self) -> bool:
        """Whether blocks share the memory of the input."""
        return self.in_place and self.vectors.is_contiguous() and not self.padded

    def packing(self, start: int, stop: int) -> tuple[Block, Packing | None]:
        """Groups ``start`` to ``stop``, and what is to be packed before they can be used."""
        first, last = self.bounds[start], self.bounds[stop]
        groups, most = stop - start, max(b - a for a, b in pairwise(self.bounds[start : stop + 1]))
        if self._packed:
            vectors, strides = self.vectors[first:last], (None, *self.vectors.stride())
        else:
            vectors, strides = self.vectors[start:stop], self.vectors.stride()
        if self.whole and self.is_view and self._tables is not None and self._tables[1].shape[0] >= groups:
            # Every block of the side looks alike: the first is the largest, the others are its head.
            offsets, counts, segments = self._tables
            rows = vectors.reshape(-1, self.width)
            return Block(rows, offsets[: groups + 1], counts[:groups], segments[: last - first], most), None
        view = self.vectors.is_contiguous() and (self._packed or self.whole) and not self.padded
        rows = vectors.reshape(-1, self.width) if view else vectors.new_empty(last - first, self.width)
        offsets, counts = (torch.empty(n, dtype=torch.int64, device=self.device) for n in (groups + 1, groups))
        segments = torch.empty(last - first, dtype=torch.int32, device=self.device)
        if self.whole:
            self._tables = offsets, counts, segments
        block = Block(rows, offsets, counts, segments, most, None if self.in_place else self._extent)
        return block, Packing(
            vectors,
            None if self._offsets is None else self._offsets[start : stop + 1],
            None if self._device_counts is None else self._device_counts[start:stop],
            None if view else rows,
            offsets, counts, segments, groups, self._extent, *strides,
        )  # fmt: skip

    def gradient(self) -> Tensor:
        """Float32 accumulator in the shape of the input: the gradient itself for float32 input."""
        return torch.zeros(self.vectors.shape, dtype=torch.float32, device=self.device)

    def rows_of(self, gradient: Tensor, start: int) -> Tensor:  # [.., D]
        """Rows of a gradient from group ``start`` on."""
        first = self.bounds[start] if self.in_place else start * self._extent
        return gradient.view(-1, self.width)[first:]

    def view_of(self, gradient: Tensor, start: int, stop: int) -> Tensor | None:  # [n, D]
        """Where groups ``start`` to ``stop`` accumulate, if that is one run of memory."""
        if self.in_place:
            return gradient.view(-1, self.width)[self.bounds[start] : self.bounds[stop]]
        return None

    def add(self, gradient: Tensor, start: int, block: Block, rows: Tensor) -> None:
        """Add a block's rows where they belong. No place comes twice, so the order of writes does not matter."""
        group = block.segments.long()
        place = (group + start, torch.arange(block.num_rows, device=self.device) - block.offsets[group])
        gradient[place] = gradient[place].add_(rows)


def blocks(pack: Callable[[tuple[Packing, ...], int], None], *wanted: tuple[Side, int, int]) -> list[Block]:
    """Groups of sides; ``pack`` is given all that there is to pack, and its width."""
    made = [side.packing(start, stop) for side, start, stop in wanted]
    packings = tuple(packing for _, packing in made if packing is not None)
    if packings:
        pack(packings, wanted[0][0].width)
    return [block for block, _ in made]


def on_host(counts: Tensor) -> bool:
    """Whether counts may be read; a device is never asked for them."""
    return counts.device.type == "cpu"


def _to_device(table: Tensor, device: torch.device, what: str) -> Tensor:
    if device.type == "cpu":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"under CUDA graph capture {what} on the host cannot reach the device; give "
            + ("a CaptionLayout" if what == "word_counts" else "a device tensor")
        )
    return table.pin_memory().to(device, non_blocking=True)
