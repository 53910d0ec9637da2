"""One side of a batch on the device: the regions of images, or the words of captions, and blocks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm_kernels.layout import offsets_of


@dataclass
class Block:
    """Some groups: their rows, where each begins, and what the kernels make of them."""

    rows: Tensor  # [n, D]
    offsets: Tensor | None  # [groups + 1] int64 on the device; None: every group has `stride` rows
    counts: Tensor | None  # [groups] int64 on the device; None: every row of a group is valid
    groups: int
    stride: int
    uniform: bool  # rows of one length by nature (images), so that the launch may count on it
    gram: Tensor | None = None  # [groups, stride, stride] float32
    norms: Tensor | None = None  # [n] float32
    grad_gram: Tensor | None = None  # [splits, groups, stride, stride]
    grad_norms: Tensor | None = None  # [parts, n]

    @property
    def where(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """As the kernels take it."""
        return self.offsets, self.counts, self.groups, self.stride


class Side:
    """Groups of rows in any form.

    Packed rows, and padded rows whose counts are on the host, are worked on packed. Where counts are on the device
    alone, every group keeps its padded length; rows that are no member are zeros then.
    """

    def __init__(
        self,
        ops: Any,
        vectors: Tensor,  # [G, K, D] or [N, D]
        counts: Tensor | None,  # [G] int64, on the host or on the device
        *,
        offsets: Tensor | None = None,  # [G + 1] on the device, where the caller has them
        packs: bool,
    ) -> None:
        self.ops = ops
        self.vectors, self.packs = vectors, packs
        padded = vectors.dim() == 3
        on_host = counts is not None and known(counts)
        self.groups = vectors.shape[0] if counts is None else counts.shape[0]
        whole = counts is None or (padded and on_host and int(counts.min()) == vectors.shape[1])
        self.stride = vectors.shape[1] if padded else 0
        self.offsets: Tensor | None = None
        self.counts: Tensor | None = None
        if on_host and not whole and packs:
            assert counts is not None
            host = offsets_of(counts)
            self.bounds: list[int] = host.tolist()
            self.offsets = to_device(host, vectors.device) if offsets is None else offsets
        else:
            self.bounds = list(range(0, (self.groups + 1) * self.stride, self.stride))
            if not whole:
                assert counts is not None
                self.counts = to_device(counts, vectors.device)
        # A block is a view where memory is packed already, and made by a kernel otherwise.
        self.copies = not vectors.is_contiguous() or (padded and not whole)
        self._flat = None if self.copies else vectors.view(-1, vectors.shape[-1])

    @property
    def num_rows(self) -> int:
        return self.bounds[-1]

    def block(self, start: int, stop: int) -> Block:
        offsets = None if self.offsets is None else self.offsets[start : stop + 1]
        counts = None if self.counts is None else self.counts[start:stop]
        if self._flat is not None:
            rows = self._flat[self.bounds[start] : self.bounds[stop]]
        elif self.vectors.dim() == 2:
            rows = self.vectors[self.bounds[start] : self.bounds[stop]].contiguous()
        else:
            vectors = self.vectors[start:stop]
            rows = vectors.new_empty(self.bounds[stop] - self.bounds[start], vectors.shape[2])
            self.ops.pack_rows(vectors, offsets, counts, rows)
        stride = self.stride
        if offsets is not None:  # of this block: its Gram matrices need no more
            stride = max(self.bounds[g + 1] - self.bounds[g] for g in range(start, stop))
        return Block(rows, offsets, counts, stop - start, stride, not self.packs)

    def put(self, gradient: Tensor, start: int, stop: int, rows: Tensor) -> None:
        """Float32 rows of a block's gradient where they belong, in the dtype of ``gradient``; zeros in padding."""
        if gradient.dim() == 2:
            gradient[self.bounds[start] : self.bounds[stop]] = rows
            return
        offsets = None if self.offsets is None else self.offsets[start : stop + 1]
        counts = None if self.counts is None else self.counts[start:stop]
        self.ops.unpack_rows(rows, offsets, counts, gradient[start:stop])


def known(counts: Tensor) -> bool:
    """Whether the host may look at counts: those on a device are never read back."""
    return counts.device.type == "cpu"


def to_device(indices: Tensor, device: torch.device) -> Tensor:
    """Integers on the device, contiguous, without waiting for it.

    Raises
    ------
    RuntimeError
        While a CUDA graph is captured: the copy would read host memory again at every replay.
    """
    indices = indices.contiguous()
    if indices.device == device:
        return indices
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "counts on the host cannot be sent to the device while a CUDA graph is captured: pass a CaptionLayout made "
            "before the capture (region_counts: a device tensor)"
        )
    return indices.pin_memory().to(device, non_blocking=True)
