"""``attention_filtration``: SAF of SGRAF, against bare products of the same FLOPs.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the definition, caption by caption, differentiated by autograd
eager, native, triton     the op on that floor
========================  ==============================================================================================

It normalises with the running statistics, as the benchmark of ``similarity_reasoning_scores`` does. The products are a
number for each node and a sum for each pair: they take no time, memory does, and rho says little.
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
from benchmarks.stages import LARGEST, PooledWorkload
from itm_kernels import FiltrationParameters, attention_filtration
from itm_kernels.nn import AttentionFiltrationScorer

__all__ = ["DIRECTIONS", "LARGEST", "METHODS", "OP", "workload"]

OP = "attention_filtration"
DIRECTIONS = ("saf",)


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> FiltrationWorkload:
    # Gradients of the weights are small differences.
    more = Tolerance(0, 0) if dtype == torch.float32 else Tolerance(5e-3, 5e-2)
    return FiltrationWorkload(case, direction, dtype, device, TOLERANCE[dtype] + more)


class FiltrationWorkload(PooledWorkload):
    op = OP

    def make(self) -> AttentionFiltrationScorer:
        return AttentionFiltrationScorer(self.case.width, SIMILARITY_WIDTH, num_regions=self.case.regions)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, AttentionFiltrationScorer)
        filtration = self.module.parameters_of_stages().filtration
        assert filtration is not None
        return [filtration.weight, filtration.bias]

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"alignments": self.alignments(), "global_alignments": self.global_alignments()}

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        one = inputs[0].new_ones(1)
        batch_norm = (one, 0 * one, 0.1 * one, one, torch.tensor(0), 0.1, 1e-5)
        return attention_filtration(*inputs, word_counts, FiltrationParameters(*parameters), batch_norm=batch_norm)

    def products(self) -> list[Product]:
        s, images = SIMILARITY_WIDTH, self.case.images
        nodes = images * (self.num_words + self.case.captions)
        return [Product(nodes, s, 1), *(Product(1, count + 1, s, images) for count in self.word_counts)]
