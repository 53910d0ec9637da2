"""``similarity_reasoning_scores``: SGRAF as published, against the loop and the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the published loop over captions, differentiated by autograd as published
eager, native, triton     the op on that floor
========================  ==============================================================================================

SAF normalises with its running statistics: those of a batch tie all images of a caption together, and a part of the
batch could not be held against the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.chain import Product
from benchmarks.models import METHODS, SIMILARITY_WIDTH, ModelWorkload
from benchmarks.parity import TOLERANCE, Tolerance
from itm_kernels import ReasoningParameters, similarity_reasoning_scores
from itm_kernels.nn import AttentionFiltrationScorer, SimilarityGraphScorer

__all__ = ["DIRECTIONS", "METHODS", "OP", "workload"]

OP = "similarity_reasoning_scores"
DIRECTIONS = ("saf", "sgr")
STEPS = 3


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> ReasoningWorkload:
    # Sigmoids of a long chain: the digits that half precision keeps of it.
    more = Tolerance(0, 0) if dtype == torch.float32 else Tolerance(5e-3, 0.15)
    return ReasoningWorkload(case, direction, dtype, device, TOLERANCE[dtype] + more)


class ReasoningWorkload(ModelWorkload):
    op = OP

    def make(self) -> AttentionFiltrationScorer | SimilarityGraphScorer:
        regions = self.case.regions
        if self.direction == "saf":
            return AttentionFiltrationScorer(self.case.width, SIMILARITY_WIDTH, num_regions=regions)
        return SimilarityGraphScorer(self.case.width, SIMILARITY_WIDTH, steps=STEPS, num_regions=regions)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, (AttentionFiltrationScorer, SimilarityGraphScorer))
        flat = self.module.parameters_of_stages().flat()
        self.present = [tensor is not None for tensor in flat]
        return [tensor for tensor in flat if tensor is not None]

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        assert isinstance(self.module, (AttentionFiltrationScorer, SimilarityGraphScorer))
        with torch.no_grad():
            found = self.module.globals(regions.float(), words.float(), self.word_counts)
        image_global, caption_global = (tensor.to(self.dtype) for tensor in found)
        return {**super().make_inputs(regions, words), "image_global": image_global, "caption_global": caption_global}

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        rest = iter(parameters)
        record = ReasoningParameters.of([next(rest) if there else None for there in self.present])
        regions, words, *extras = inputs
        options: dict[str, Any] = {"reasoning": self.direction.upper()}
        if self.direction == "saf":
            one = regions.new_ones(1)
            options["batch_norm"] = (one, 0 * one, 0.1 * one, one, torch.tensor(0), 0.1, 1e-5)
        else:
            options["steps"] = STEPS
        return similarity_reasoning_scores(regions, words, word_counts, *extras, record, **options)

    def products(self) -> list[Product]:
        d, s, images, n = self.case.width, SIMILARITY_WIDTH, self.case.images, self.num_words
        pairs = images * self.case.captions
        made = [
            Product(images * self.case.regions, d, n),
            Product(n, self.case.regions, d, images),
            Product(images * n, d, s),
            Product(pairs, d, s),
        ]
        return made + (self.graph_products(STEPS) if self.direction == "sgr" else [])
