"""Contenders, records and a clock for the tests of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import measure, ops, records
from benchmarks.cases import CASES, Case
from benchmarks.contender import Contender

CPU = torch.device("cpu")
OP = "cross_attention_scores"
# Names and order as the protocol has them; a file of results is read by them.
PROTOCOL = (
    "op case direction dtype method backend phase I C R N D median_ms p20_ms p80_ms flops tflops eta rho "
    "speedup_vs_loop saved_mib peak_mib device torch commit"
)
FIELDS = PROTOCOL.split()
OP = "cross_attention_scores"


def make(
    method: str, case: Case = CASES["tiny"], direction: str = "t2i", dtype: torch.dtype = torch.float32
) -> Contender:
    found = ops.load(OP).workload(case, direction, dtype, CPU).contender(method)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def record(**changes: Any) -> records.Record:
    numbers = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "tflops", "rho", "speedup_vs_loop", "saved_mib"), 1.5)
    letters = dict.fromkeys(("I", "C", "R", "N", "D", "flops"), 8)
    names = {name: name for name in FIELDS if name not in {**numbers, **letters, "eta": 0, "peak_mib": 0}}
    return records.Record(**{**names, **letters, **numbers, "eta": None, "peak_mib": None, **changes})


class FakeTimer:
    """A clock that the calls themselves move."""

    def __init__(self) -> None:
        self.now = 0.0

    def start(self, call: measure.Call) -> Callable[[], float]:
        before = self.now
        call()
        took = self.now - before
        return lambda: took
