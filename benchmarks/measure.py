"""Time: methods taken in turns, with cold caches, and what is said about the times.

A machine has moods (other programs, clock rates), and they last longer than a call. So the methods take turns round by
round, ratios are formed within a round, and the median of a method's rounds is reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

Call = Callable[[], Any]
Key = TypeVar("Key")

# Four times the last-level cache that a few cores of a server share, and five times the 60 MB L2 of an H200.
FLUSH_BYTES = {"cpu": 128 * 2**20, "cuda": 300 * 2**20}
FEWEST_ROUNDS, MOST_ROUNDS = 5, 30


class Timer(Protocol):
    """Times calls one after another on one device."""

    def start(self, call: Call) -> Callable[[], float]:
        """Flush the caches, run ``call``; the returned function waits for its end and says how many ms it took."""


class CpuTimer:
    """Wall-clock time; the caches are flushed before every call by writing a buffer larger than they are."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(FLUSH_BYTES["cpu"], dtype=torch.uint8)

    def start(self, call: Call) -> Callable[[], float]:
        self._buffer.add_(1)
        begin = time.perf_counter()
        result = call()
        elapsed = (time.perf_counter() - begin) * 1e3
        del result  # not within the time
        return lambda: elapsed


class CudaTimer:
    """CUDA events on the current stream; nothing waits until a round is over."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(FLUSH_BYTES["cuda"], dtype=torch.uint8, device="cuda")

    def start(self, call: Call) -> Callable[[], float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._buffer.zero_()
        begin.record()
        call()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return float(begin.elapsed_time(end))

        return milliseconds


def timer_for(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else CpuTimer()


def interleave(calls: Mapping[Key, Call], rounds: int, timer: Timer) -> dict[Key, list[float]]:
    """Milliseconds of every call in every round.

    Each round runs every call once and begins with another one, so that none always follows the same neighbour. The
    garbage collector rests meanwhile. Warm up before: the first round counts.
    """
    order = list(calls)
    times: dict[Key, list[float]] = {key: [] for key in order}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            first = r % len(order)
            pending = [(key, timer.start(calls[key])) for key in order[first:] + order[:first]]
            for key, milliseconds in pending:
                times[key].append(milliseconds())
    finally:
        if enabled:
            gc.enable()
    return times


def pilot(call: Call, timer: Timer) -> float:
    """Milliseconds of a warm call; the call before it warms it up."""
    call()
    return timer.start(call)()


def rounds_within(milliseconds: float, seconds: float) -> int:
    """How many rounds of ``milliseconds`` take about ``seconds``, within 5..30."""
    return min(max(int(seconds * 1e3 / max(milliseconds, 1e-6)), FEWEST_ROUNDS), MOST_ROUNDS)


class CoreShare:
    """A call that keeps all its threads busy, such as a large product, noting the share of them that it gets.

    On a machine of its own the share is nearly 1. Where others hold the cores it falls, and methods suffer unequally:
    one that waits for all its threads after every step loses more than one that runs on a single thread for a while.
    Their ratio is then no ratio of their speeds.

    Attributes
    ----------
    shares
        Processor time / (time x threads) of every call, in order.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self.shares: list[float] = []

    def __call__(self) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = self._call()
        cpu = time.process_time() - cpu
        self.shares.append(cpu / max((time.perf_counter() - wall) * torch.get_num_threads(), 1e-9))
        return result


QUIET = 0.75
"""From this share on a machine counts as quiet."""


@dataclass(frozen=True)
class Summary:
    """Of the rounds of one method; the unit of the values it was made of."""

    median: float
    p20: float
    p80: float


def summarize(values: list[float]) -> Summary:
    """Median with the 20th and 80th percentile, linear between neighbours."""
    if not values:
        raise ValueError("summarize: no values")
    ascending = sorted(values)

    def percentile(share: float) -> float:
        place = share * (len(ascending) - 1)
        low = int(place)
        high = min(low + 1, len(ascending) - 1)
        return ascending[low] + (place - low) * (ascending[high] - ascending[low])

    return Summary(percentile(0.5), percentile(0.2), percentile(0.8))


def ratio(numerator: list[float], denominator: list[float]) -> Summary:
    """Of two methods that took turns: the ratios within each round, summarised."""
    return summarize([a / b for a, b in zip(numerator, denominator, strict=True)])
