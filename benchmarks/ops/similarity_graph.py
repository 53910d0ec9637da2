"""``similarity_graph``: SGR of SGRAF, against the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the definition, caption by caption, differentiated by autograd
eager, native, triton     the op on that floor
========================  ==============================================================================================
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
from itm_kernels import GraphParameters, similarity_graph
from itm_kernels.nn import SimilarityGraphScorer

__all__ = ["DIRECTIONS", "LARGEST", "METHODS", "OP", "workload"]

OP = "similarity_graph"
DIRECTIONS = ("sgr",)
STEPS = 3


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> GraphWorkload:
    # A long chain: the digits that half precision keeps of it.
    more = Tolerance(0, 0) if dtype == torch.float32 else Tolerance(2e-2, 0.15)
    return GraphWorkload(case, direction, dtype, device, TOLERANCE[dtype] + more)


class GraphWorkload(PooledWorkload):
    op = OP

    def make(self) -> SimilarityGraphScorer:
        return SimilarityGraphScorer(self.case.width, SIMILARITY_WIDTH, steps=STEPS, num_regions=self.case.regions)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, SimilarityGraphScorer)
        graph = self.module.parameters_of_stages().graph
        assert graph is not None
        return list(graph)

    def make_inputs(self, regions: Tensor, words: Tensor) -> dict[str, Tensor]:
        return {"alignments": self.alignments(), "global_alignments": self.global_alignments()}

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        return similarity_graph(*inputs, word_counts, GraphParameters(*parameters))

    def products(self) -> list[Product]:
        return self.graph_products(STEPS)
