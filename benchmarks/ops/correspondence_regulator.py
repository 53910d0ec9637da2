"""``correspondence_regulator``: RCR of RCAR, against the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the definition, caption by caption, differentiated by autograd
eager, native, triton     the op on that floor
========================  ==============================================================================================

The first step. What is differentiated are the attention scores, the only product of the gate; temperatures and hidden
layer are made, and go back with a gradient of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.chain import Product
from benchmarks.models import METHODS, SIMILARITY_WIDTH
from benchmarks.ops.regulated_scores import CLAMP
from benchmarks.parity import TOLERANCE
from benchmarks.stages import LARGEST, StageWorkload
from itm_kernels import CorrespondenceParameters, correspondence_regulator
from itm_kernels.nn import RegulatedScorer

__all__ = ["DIRECTIONS", "LARGEST", "METHODS", "OP", "workload"]

OP = "correspondence_regulator"
DIRECTIONS = ("t2i", "i2t")


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> CorrespondenceWorkload:
    return CorrespondenceWorkload(case, direction, dtype, device, TOLERANCE[dtype] + CLAMP[dtype])


class CorrespondenceWorkload(StageWorkload):
    op = OP

    def make(self) -> RegulatedScorer:
        return RegulatedScorer(self.case.width, SIMILARITY_WIDTH, direction=self.direction, regulator="rcr", steps=1)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, RegulatedScorer)
        correspondence = self.module.parameters_of_stages().correspondence
        assert correspondence is not None
        return list(correspondence)

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"alignments": self.alignments(), "regions": regions, "words": self.packed(words)}

    def output_shape(self) -> tuple[int, ...]:
        return self.case.images, self.case.regions, self.num_words

    def part(self, images: int, captions: int) -> tuple[slice, ...]:
        return slice(images), slice(None), slice(sum(self.word_counts[:captions]))

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        record = CorrespondenceParameters(*parameters)
        return correspondence_regulator(*inputs, word_counts, record, direction=self.direction).attention_scores

    def products(self) -> list[Product]:
        queries, s, d = self.num_queries(), SIMILARITY_WIDTH, self.case.width
        of_networks = [Product(queries, s, 2 * s), Product(queries, 2 * s, d), Product(queries, s, s // 2)]
        return [*of_networks, *self.attended(self.direction)]  # gated products: as many FLOPs
