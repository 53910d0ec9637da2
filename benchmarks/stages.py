"""What the benchmarks of the stages as ops share: alignments as inputs, outputs of every query or every pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models import SIMILARITY_WIDTH, ModelWorkload

LARGEST = {"cpu": 32, "cuda": 128}
"""Images and captions: at 128 the alignments of RCAR's regions are 0.6 GB in float32, their hidden layers 1.2 GB."""


class StageWorkload(ModelWorkload):
    """A stage on one batch: words packed, and alignment vectors as another stage leaves them, of length 1.

    Everything is in one dtype, alignments as well.
    """

    @property
    def t2i(self) -> bool:
        return self.direction != "i2t"

    def of_queries(self) -> tuple[int, ...]:
        """Axes of the queries: ``I, N`` or ``I, R, C``."""
        images, regions, captions = self.case.images, self.case.regions, self.case.captions
        return (images, self.num_words) if self.t2i else (images, regions, captions)

    def num_queries(self) -> int:
        """Queries of all pairs."""
        return torch.Size(self.of_queries()).numel()

    def packed(self, words: Tensor) -> Tensor:  # [C, W, D] -> [N, D]
        return torch.cat([caption[:count] for caption, count in zip(words, self.word_counts, strict=True)])

    def alignments(self) -> Tensor:  # [I, N, S] or [I, R, C, S]
        return self._unit(*self.of_queries())

    def global_alignments(self) -> Tensor:  # [I, C, S]
        return self._unit(self.case.images, self.case.captions)

    def _unit(self, *axes: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(2)
        own = torch.randn(*axes, SIMILARITY_WIDTH, generator=generator, device=self.device)
        shared = torch.randn(SIMILARITY_WIDTH, generator=generator, device=self.device)
        return F.normalize(own.add_(shared), dim=-1).to(self.dtype)

    def cut(self, name: str, tensor: Tensor, images: int, captions: int) -> Tensor:
        words = sum(self.word_counts[:captions])
        if name == "words":
            return tensor[:words]
        if name == "alignments":
            return tensor[:images, :words] if self.t2i else tensor[:images, :, :captions]
        return tensor[:images] if name == "regions" else tensor[:images, :captions]

    def part_of_queries(self, images: int, captions: int) -> tuple[slice, ...]:
        """Of an output along the queries."""
        if self.t2i:
            return slice(images), slice(sum(self.word_counts[:captions]))
        return slice(images), slice(None), slice(captions)


class PooledWorkload(StageWorkload):
    """A stage that leaves a vector a pair."""

    def output_shape(self) -> tuple[int, ...]:
        return self.case.images, self.case.captions, SIMILARITY_WIDTH
