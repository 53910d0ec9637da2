"""``alignment_vectors``: the first stage of SGRAF and RCAR, against the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the definition, caption by caption, differentiated by autograd
eager, native, triton     the op on that floor
========================  ==============================================================================================

Attention is that of plain products, with one temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.chain import Product
from benchmarks.models import METHODS, SIMILARITY_WIDTH
from benchmarks.parity import TOLERANCE, Tolerance
from benchmarks.stages import LARGEST, StageWorkload
from itm_kernels import alignment_vectors
from itm_kernels.nn import RegulatedScorer

__all__ = ["DIRECTIONS", "LARGEST", "METHODS", "OP", "workload"]

OP = "alignment_vectors"
DIRECTIONS = ("t2i", "i2t")


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> AlignmentWorkload:
    # A vector of small differences: the digits that half precision keeps of it.
    more = Tolerance(0, 0) if dtype == torch.float32 else Tolerance(2e-2, 5e-2)
    return AlignmentWorkload(case, direction, dtype, device, TOLERANCE[dtype] + more)


class AlignmentWorkload(StageWorkload):
    op = OP

    def make(self) -> RegulatedScorer:
        return RegulatedScorer(self.case.width, SIMILARITY_WIDTH, direction=self.direction, regulator="rar", steps=1)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, RegulatedScorer)
        alignment = self.module.parameters_of_stages().alignment
        assert alignment is not None
        return [tensor[0] for tensor in alignment]

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"regions": regions, "words": self.packed(words)}

    def output_shape(self) -> tuple[int, ...]:
        return *self.of_queries(), SIMILARITY_WIDTH

    def part(self, images: int, captions: int) -> tuple[slice, ...]:
        return self.part_of_queries(images, captions)

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        temperature = 10.0 if self.t2i else 3.0
        return alignment_vectors(*inputs, word_counts, *parameters, direction=self.direction, temperature=temperature)

    def products(self) -> list[Product]:
        d = self.case.width
        plain = Product(self.case.images * self.case.regions, d, self.num_words)
        return [plain, *self.attended(self.direction), Product(self.num_queries(), d, SIMILARITY_WIDTH)]
