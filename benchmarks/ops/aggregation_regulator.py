"""``aggregation_regulator``: RAR of RCAR, against the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the definition, caption by caption, differentiated by autograd
eager, native, triton     the op on that floor
========================  ==============================================================================================

The first step, which the mean of the alignments asks; dropout is off.
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
from itm_kernels import AggregationParameters, aggregation_regulator
from itm_kernels.nn import RegulatedScorer

__all__ = ["DIRECTIONS", "LARGEST", "METHODS", "OP", "workload"]

OP = "aggregation_regulator"
DIRECTIONS = ("t2i", "i2t")


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> AggregationWorkload:
    # Weights that are nearly alike: gradients of the two branches are small differences.
    more = Tolerance(0, 0) if dtype == torch.float32 else Tolerance(5e-3, 5e-2)
    return AggregationWorkload(case, direction, dtype, device, TOLERANCE[dtype] + more)


class AggregationWorkload(PooledWorkload):
    op = OP

    def make(self) -> RegulatedScorer:
        return RegulatedScorer(self.case.width, SIMILARITY_WIDTH, direction=self.direction, regulator="rar", steps=1)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, RegulatedScorer)
        aggregation = self.module.parameters_of_stages().aggregation
        assert aggregation is not None
        return list(aggregation)

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"alignments": self.alignments()}

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        record = AggregationParameters(*parameters)
        return aggregation_regulator(inputs[0], None, word_counts, record, direction=self.direction)

    def products(self) -> list[Product]:
        s = SIMILARITY_WIDTH
        return [Product(self.num_queries(), s, s), Product(self.case.images * self.case.captions, s, s)]
