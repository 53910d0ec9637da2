"""One side of a batch, the regions of all images or the words of all captions, as packed rows block by block.

Counts known on the host: a block holds valid rows alone, one group after another (a view where the storage is that
already). Counts on a device alone: a block is padded, padding is zero, and kernels see which rows count.
Nothing waits for the device: small tables go there from pinned memory, or are made there from the offsets given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itm_kernels.layout import offsets_of


@dataclass
class Block:
    """Some groups of a side."""

    rows: Tensor  # [n, D]
    offsets: Tensor  # [groups + 1] int64: first row of each group in the block
    counts: Tensor  # [groups] int64: valid rows of each
    segments: Tensor  # [n] int32: group of each row, counted from any number; -1: padding
    most: int  # rows of the largest group, padding included

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
            self._device_counts = counts.to(self.device).clamp(1, vectors.shape[1])
            counts = None
        groups = vectors.shape[0] if counts is None else counts.shape[0]
        self._extent = 0 if packed else vectors.shape[1]
        host = counts if counts is not None else torch.full((groups,), self._extent, dtype=torch.int64, device="cpu")
        self.bounds: list[int] = offsets_of(host).tolist()
        self.most = int(host.max()) if groups else 0
        self.whole = not packed and self.bounds[-1] == groups * self._extent
        self._packed = packed
        if self.whole:
            self._tables: tuple[Tensor, ...] | None = None
            self._offsets = None
        else:
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

    def block(self, start: int, stop: int) -> Block:
        """Groups ``start`` to ``stop``."""
        first, last = self.bounds[start], self.bounds[stop]
        if self.whole:
            return self._whole_block(start, stop)
        assert self._offsets is not None
        offsets = self._offsets[start : stop + 1]
        offsets = offsets - offsets[0]
        row = torch.arange(last - first, device=self.device)
        segments = torch.searchsorted(offsets, row, right=True) - 1
        if self._packed:
            rows = self.vectors[first:last].contiguous()
        else:
            rows = self.vectors[segments + start, row - offsets[segments]]
        most = max(self.bounds[g + 1] - self.bounds[g] for g in range(start, stop))
        return Block(rows, offsets, offsets.diff(), segments.to(torch.int32), most)

    def _whole_block(self, start: int, stop: int) -> Block:
        extent, groups = self._extent, stop - start
        if self._tables is None or self._tables[1].shape[0] < groups:
            # Every block of the side looks alike: the first is the largest, the others are its head.
            offsets = torch.arange(groups + 1, device=self.device) * extent
            numbers = torch.arange(groups * extent, device=self.device)
            self._tables = (
                offsets,
                torch.full((groups,), extent, dtype=torch.int64, device=self.device),
                numbers.div(extent, rounding_mode="floor").to(torch.int32),
            )
        offsets, counts, segments = self._tables
        offsets, counts, segments = offsets[: groups + 1], counts[:groups], segments[: groups * extent]
        vectors = self.vectors[start:stop]
        if self._device_counts is not None:
            counts = self._device_counts[start:stop]
            valid = torch.arange(extent, device=self.device) < counts[:, None]
            vectors = torch.where(valid[..., None], vectors, torch.zeros((), dtype=vectors.dtype, device=self.device))
            segments = torch.where(valid.flatten(), segments, -1)
        return Block(vectors.reshape(-1, self.width).contiguous(), offsets, counts, segments, extent)

    def gradient(self) -> Tensor:
        """Float32 accumulator in the shape of the input: the gradient itself for float32 input."""
        return torch.zeros(self.vectors.shape, dtype=torch.float32, device=self.device)

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


def on_host(counts: Tensor) -> bool:
    """Whether counts may be read; a device is never asked for them."""
    return counts.device.type == "cpu"


def _to_device(table: Tensor, device: torch.device, what: str) -> Tensor:
    if device.type == "cpu":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"cross_attention_scores: under CUDA graph capture {what} on the host cannot reach the device; give "
            + ("a CaptionLayout" if what == "word_counts" else "a device tensor")
        )
    return table.pin_memory().to(device, non_blocking=True)
