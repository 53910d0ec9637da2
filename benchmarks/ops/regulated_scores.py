"""``regulated_scores``: RCAR as published, against the loop and the bare products of its chain.

========================  ==============================================================================================
product                   the library products of the same FLOPs into memory that is there already; three times as many
                          forward and backward
reference                 the published loop over captions, differentiated by autograd as published
eager, native, triton     the op on that floor
========================  ==============================================================================================

Directions are ``<regulator>-<direction>``; the steps are the published ones, dropout is off.
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
from itm_kernels import RegulatedParameters, regulated_scores
from itm_kernels.nn import RegulatedScorer

__all__ = ["DIRECTIONS", "METHODS", "OP", "workload"]

OP = "regulated_scores"
STEPS = {"rcar-t2i": 2, "rcar-i2t": 2, "rar-t2i": 3, "rcr-t2i": 2}
DIRECTIONS = tuple(STEPS)
CLAMP = {
    torch.float32: Tolerance(0, 3e-2),
    torch.float16: Tolerance(2e-3, 0.2),
    torch.bfloat16: Tolerance(2e-2, 0.5),
}
"""Added for RCR: its clamp starts on its own edge, where rounding decides whether a gradient passes."""


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> RegulatedWorkload:
    return RegulatedWorkload(case, direction, dtype, device, TOLERANCE[dtype] + CLAMP[dtype])


class RegulatedWorkload(ModelWorkload):
    op = OP

    @property
    def options(self) -> dict[str, Any]:
        regulator, way = self.direction.split("-")
        return {"regulator": regulator, "direction": way, "steps": STEPS[self.direction]}

    def make(self) -> RegulatedScorer:
        return RegulatedScorer(self.case.width, SIMILARITY_WIDTH, **self.options)

    def flat_parameters(self) -> list[Tensor]:
        assert isinstance(self.module, RegulatedScorer)
        flat = self.module.parameters_of_stages().flat()
        self.present = [tensor is not None for tensor in flat]
        return [tensor for tensor in flat if tensor is not None]

    def scores(self, inputs: Sequence[Tensor], word_counts: Any, parameters: Sequence[Tensor]) -> Tensor:
        rest = iter(parameters)
        record = RegulatedParameters.of([next(rest) if there else None for there in self.present])
        temperature = 10.0 if self.options["direction"] == "t2i" else 3.0
        return regulated_scores(*inputs, word_counts, record, temperature=temperature, **self.options)

    def products(self) -> list[Product]:
        regulator, way = self.direction.split("-")
        steps, d, s = STEPS[self.direction], self.case.width, SIMILARITY_WIDTH
        alignments = 1 if regulator == "rar" else steps
        corrections = {"rar": 0, "rcr": steps, "rcar": steps - 1}[regulator]
        aggregations = 0 if regulator == "rcr" else steps
        images, regions, n = self.case.images, self.case.regions, self.num_words
        queries = images * n if way == "t2i" else self.case.captions * images * regions
        made = [Product(images * regions, d, n)]
        for _ in range(alignments):
            made += [*self.attended(way), Product(queries, d, s)]
        for _ in range(corrections):
            made += [Product(queries, s, 2 * s), Product(queries, 2 * s, d), Product(queries, s, s // 2)]
            made += self.attended(way)  # as many FLOPs as the gated products with the keys
        for _ in range(aggregations):
            made += [Product(queries, s, s), Product(images * self.case.captions, s, s)]
        return made
