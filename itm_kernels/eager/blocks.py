"""Blocks of images x captions for the eager ops: captions in order of length, padded to their own longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from itm_kernels.layout import offsets_of
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import ReasoningParameters, RegulatedParameters


@dataclass
class Side:
    """The regions of some images, or the words of some captions, padded to the longest of them."""

    vectors: Tensor  # [G, K, D], zero where not valid
    valid: Tensor  # [G, K] bool

    def to(self, dtype: torch.dtype) -> Side:
        """The same in another dtype."""
        return Side(self.vectors.to(dtype), self.valid)

    def as_leaf(self) -> Side:
        """The same vectors at the start of a graph."""
        return Side(self.vectors.detach().requires_grad_(), self.valid)

    def flat(self) -> Tensor:  # [G * K, D]
        return self.vectors.flatten(0, 1)

    def gram(self) -> Tensor:  # [G, K, K]
        wide = self.vectors.to(score_dtype(self.vectors.dtype))
        return wide @ wide.transpose(1, 2)

    def norms(self) -> Tensor:  # [G, K]
        norms: Tensor = torch.linalg.vector_norm(self.vectors, dim=-1, dtype=score_dtype(self.vectors.dtype))
        return norms


class Batch:
    """Cuts a batch into blocks and puts their gradients back."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        region_counts: Tensor | None,
    ) -> None:
        self.regions, self.words = regions, words
        self.images, self.captions = regions.shape[0], word_counts.shape[0]
        self.counts_on_host = word_counts.device.type == "cpu"
        if words.dim() == 3:
            word_counts = word_counts.clamp(1, words.shape[1])
        self.word_counts = word_counts.to(words.device)
        if words.dim() == 3:
            self.starts = None
        else:
            self.starts = offsets_of(self.word_counts) if word_offsets is None else word_offsets
        if self.counts_on_host:
            host = word_counts.tolist()
            self.order = sorted(range(self.captions), key=host.__getitem__)
            self.lengths = [host[c] for c in self.order]
        else:  # never read back: every caption is as long as the padding
            self.order, self.lengths = list(range(self.captions)), [words.shape[1]] * self.captions
        if region_counts is None:
            self.region_counts = None
        else:
            self.region_counts = region_counts.to(regions.device).clamp(1, regions.shape[1])

    def caption_blocks(self, workspace_bytes: int, word_bytes: int | None = None) -> list[tuple[Tensor, int]]:
        """Captions of like length: (their numbers, the longest). A word takes ``word_bytes``, or 16 an element."""
        if word_bytes is None:
            word_bytes = 16 * self.regions.shape[2]
        blocks: list[tuple[Tensor, int]] = []
        start = 0
        while start < self.captions:
            stop = start + 1
            while stop < self.captions:
                longest = self.lengths[stop]  # ascending
                rows = (stop + 1 - start) * longest
                padded = rows - sum(self.lengths[start : stop + 1])
                # Half of the bound for the captions of a block and their gradient, the rest for products; a tenth of
                # a block may be padding once it is large enough for an efficient product.
                if rows * word_bytes > workspace_bytes // 2 or (rows > 256 and padded * 10 > rows):
                    break
                stop += 1
            rows_of_block = torch.tensor(self.order[start:stop], device=self.words.device)
            blocks.append((rows_of_block, self.lengths[stop - 1]))
            start = stop
        return blocks

    def image_blocks(self, rows: Tensor, longest: int, arrays: int, workspace_bytes: int) -> list[tuple[int, int]]:
        """Images against the captions ``rows``, where a pair takes so many arrays of [R, W]."""
        regions = self.regions.shape[1]
        pair_bytes = arrays * regions * longest * (8 if self.regions.dtype == torch.float64 else 4)
        return self.images_at_once(rows.shape[0] * pair_bytes, workspace_bytes)

    def images_at_once(self, image_bytes: int, workspace_bytes: int) -> list[tuple[int, int]]:
        """Images (first, past the last) where one takes ``image_bytes`` beside its regions."""
        regions, width = self.regions.shape[1:]
        per_image = image_bytes + 4 * 4 * regions * (width + regions)
        step = min(max(workspace_bytes // 2 // per_image, 1), self.images)
        return [(start, min(start + step, self.images)) for start in range(0, self.images, step)]

    def images_of(self, start: int, stop: int) -> Side:
        vectors = self.regions[start:stop]
        if self.region_counts is None:
            return Side(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device))
        number = torch.arange(vectors.shape[1], device=vectors.device)
        valid = number < self.region_counts[start:stop, None]
        return Side(torch.where(valid[..., None], vectors, 0), valid)

    def captions_of(self, rows: Tensor, longest: int) -> Side:
        number = torch.arange(longest, device=rows.device)
        valid = number < self.word_counts[rows, None]
        if self.starts is None:
            vectors = self.words[rows, :longest]
        else:
            vectors = self.words[(self.starts[rows, None] + number).clamp(max=self.words.shape[0] - 1)]
        return Side(torch.where(valid[..., None], vectors, 0), valid)

    def put_captions(self, grad_words: Tensor, rows: Tensor, valid: Tensor, grad: Tensor) -> None:
        if self.starts is None:
            grad_words[rows, : valid.shape[1]] = torch.where(valid[..., None], grad, 0)
        else:
            number = torch.arange(valid.shape[1], device=rows.device)
            grad_words[(self.starts[rows, None] + number)[valid]] = grad[valid]


def room_for_blocks(workspace_bytes: int, parameters: RegulatedParameters | ReasoningParameters) -> int:
    """What blocks may take of the bound: beside them stands a set of wide parameters, and gradients of a block's."""
    beside = sum(2 * 4 * p.numel() for p in parameters.flat() if p is not None)
    return max(workspace_bytes - beside, workspace_bytes // 4)
