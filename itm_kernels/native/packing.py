"""Ragged groups of rows, packed one after another, whatever form they arrive in."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.layout import offsets_of


class Packed:
    """Rows of G groups: the regions of images, or the words of captions.

    A block of groups is a view where the storage is packed already (all regions valid, packed words) and a gathered
    copy otherwise.
    """

    def __init__(self, vectors: Tensor, counts: Tensor | None, dtype: torch.dtype) -> None:  # [G, K, D] or [N, D]; [G]
        self.dtype = dtype
        self.shape = vectors.shape
        self.device = vectors.device
        if counts is None:
            counts = torch.full((vectors.shape[0],), vectors.shape[1], dtype=torch.int64, device="cpu")
        self.offsets = offsets_of(counts)  # [G + 1]
        self.bounds: list[int] = self.offsets.tolist()
        self.most = int(counts.max())
        self._whole = vectors.dim() == 2 or self.bounds[-1] == vectors.shape[0] * vectors.shape[1]
        self._vectors = vectors
        # Strides that do not flatten are gathered block by block: flattening them here would copy the whole batch.
        flattens = self._whole and (vectors.dim() == 2 or vectors.is_contiguous())
        self._flat = vectors.view(-1, vectors.shape[-1]) if flattens else None
        self.is_view = flattens and vectors.is_contiguous() and vectors.dtype == dtype

    @property
    def num_rows(self) -> int:
        return self.bounds[-1]

    def span(self, start: int, stop: int) -> slice:
        """Packed rows of groups ``start`` to ``stop``."""
        return slice(self.bounds[start], self.bounds[stop])

    def offsets_of(self, start: int, stop: int) -> Tensor:  # [stop - start + 1]
        return self.offsets[start : stop + 1] - self.offsets[start]

    def rows(self, start: int, stop: int) -> Tensor:  # [n, D], contiguous
        if self._flat is not None:
            return self._flat[self.span(start, stop)].to(self.dtype).contiguous()
        return self._vectors[self._places(start, stop)].to(self.dtype)

    def gradient(self) -> Tensor:  # in the shape of the input, float32
        """Accumulator: the gradient itself for float32 input."""
        make = torch.empty if self._whole else torch.zeros
        return make(self.shape, dtype=torch.float32, device=self.device)

    def view_of(self, gradient: Tensor, start: int, stop: int) -> Tensor | None:  # [n, D]
        """Where groups ``start`` to ``stop`` accumulate, if that is one run of memory."""
        return gradient.view(-1, self.shape[-1])[self.span(start, stop)] if self._whole else None

    def put(self, gradient: Tensor, start: int, stop: int, rows: Tensor, *, add: bool) -> None:
        """Write or add a block's rows where they belong; padding stays zero."""
        gradient.index_put_(self._places(start, stop), rows, accumulate=add)

    def _places(self, start: int, stop: int) -> tuple[Tensor, Tensor]:  # [n], [n]: group, and row within it
        counts = self.offsets[start + 1 : stop + 1] - self.offsets[start:stop]
        group = torch.repeat_interleave(torch.arange(start, stop, device="cpu"), counts)
        row = torch.arange(self.bounds[start], self.bounds[stop], device="cpu")
        return group, row - self.offsets[group]
