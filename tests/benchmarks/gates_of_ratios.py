"""What the gates on ratios share: taking turns on two threads, and saying what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from benchmarks import measure

if TYPE_CHECKING:  # plain pytest skips these gates and may lack the plugin
    from pytest_benchmark.fixture import BenchmarkFixture

THREADS = 2


def take_turns(calls: Mapping[str, measure.Call], rounds: int) -> dict[str, list[float]]:
    torch.set_num_threads(THREADS)
    for call in calls.values():
        call()
    return measure.interleave(calls, rounds, measure.CpuTimer())


def report(benchmark: BenchmarkFixture, call: measure.Call, times: list[float], **seen: float) -> None:
    """Hand the op's own time to pytest-benchmark, and what the gate saw."""
    benchmark.extra_info.update(seen, threads=THREADS, interleaved_median_ms=measure.summarize(times).median)
    benchmark.pedantic(call, rounds=5)


def sentence(name: str, ratio: measure.Summary, gate: str) -> str:
    return f"{name} is {ratio.median:.2f} (rounds from {ratio.p20:.2f} to {ratio.p80:.2f}), the gate is {gate}"
