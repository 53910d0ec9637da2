"""All methods of one op on one batch in one direction: parity, then time, then memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from benchmarks import machine, memory, ops
from benchmarks.cases import Case
from benchmarks.contender import PHASES, PRODUCT, Contender
from benchmarks.measure import (
    FEWEST_ROUNDS,
    QUIET,
    Call,
    CoreShare,
    Timer,
    interleave,
    pilot,
    ratio,
    rounds_within,
    summarize,
    timer_for,
)
from benchmarks.parity import ParityError, assert_parity
from benchmarks.records import Record

LOOP = "reference"
YARDSTICK = {"cpu": torch.float32, "cuda": torch.bfloat16}
"""In this dtype the bare products are what rho (CPU) and eta (GPU) compare with, whatever the method's own."""
# Left to the rest of the process and of the machine.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how thoroughly.

    Attributes
    ----------
    dtypes
        They take turns too: bfloat16 against float32 is a ratio within rounds.
    seconds
        Aim for the rounds of one phase; 5 rounds are the least.
    peak
        Whether to measure peak memory, a pass of its own.
    left
        Seconds until the run has to end; what certainly takes longer is left out.
    """

    op: str
    case: Case
    direction: str
    dtypes: tuple[torch.dtype, ...]
    methods: tuple[str, ...]
    device: torch.device
    seconds: float
    peak: bool
    left: Callable[[], float] = lambda: math.inf

    @property
    def yardstick(self) -> Key:
        return YARDSTICK[self.device.type], PRODUCT

    def __str__(self) -> str:
        return f"{self.op} {self.case.name} {self.direction}"


Key = tuple[torch.dtype, str]
Say = Callable[[str], None]
T = TypeVar("T")


def compare(what: Comparison, tell: Say, fail: Say) -> Iterator[list[Record]]:
    """Records phase by phase.

    ``tell`` hears what is left out, and why; ``fail`` hears of methods that raise, or compute something else than the
    definition. Such a method is not timed, the others go on.
    """
    _clear(what.device)  # the last batch's code would count against the limit of recompilations
    workloads, contenders = _line_up(what, tell, fail)
    contenders = {
        key: contender
        for key, contender in contenders.items()
        if _passes(what, contender, workloads[key[0]], tell, fail)
    }
    timer = timer_for(what.device)
    for phase in PHASES:
        calls, rounds = _affordable(what, contenders, phase, timer, tell, fail)
        times = interleave(calls, rounds, timer)
        yield [
            _record(what, workloads[key[0]], contenders[key], phase, key, times, fail)
            for key in calls
            if key[0] in what.dtypes and key[1] in what.methods
        ]
        share = calls[what.yardstick]
        if isinstance(share, CoreShare) and summarize(share.shares).median < QUIET:
            tell(
                f"{phase}: the machine is busy: the bare product got {summarize(share.shares).median:.0%} of its "
                "threads. Methods suffer from that unequally; measure again when it is quiet"
            )


def _line_up(what: Comparison, tell: Say, fail: Say) -> tuple[dict[torch.dtype, ops.Workload], dict[Key, Contender]]:
    """Workloads by dtype and the methods that can run, the yardstick first."""
    keys = [what.yardstick, *((d, m) for d in what.dtypes for m in what.methods if (d, m) != what.yardstick)]
    make = ops.load(what.op).workload
    workloads = {
        dtype: make(what.case, what.direction, dtype, what.device) for dtype in dict.fromkeys(d for d, _ in keys)
    }
    contenders: dict[Key, Contender] = {}
    for dtype, method in keys:
        workload = workloads[dtype]
        found = _try(_who(what, dtype, method), fail, lambda w=workload, m=method: w.contender(m))
        if isinstance(found, str):
            tell(f"{method}, {name_of(dtype)}: left out: {found}")
        elif found is not None:
            contenders[dtype, method] = found
    return workloads, contenders


def _passes(what: Comparison, contender: Contender, workload: ops.Workload, tell: Say, fail: Say) -> bool:
    """Whether a method can be timed: there is time for its compiler, and it computes what the definition says."""
    if contender.method == PRODUCT:
        return True  # it computes no scores
    if contender.preparation_s > what.left():
        tell(f"{contender.method}, {name_of(contender.dtype)}: left out: no time left for its compiler")
        return False
    for phase, call in contender.calls.items():
        if _fits(contender, phase, what.device, lambda _: None):
            who = f"{_who(what, contender.dtype, contender.method)}, {phase}"

            def check(who: str = who, call: Call = call) -> float:
                return assert_parity(who, call(), workload.truth(), workload.tolerance)

            if _try(who, fail, check, _if_too_large(contender, phase, tell)) is None:
                return False
    return True


def _affordable(
    what: Comparison, contenders: dict[Key, Contender], phase: str, timer: Timer, tell: Say, fail: Say
) -> tuple[dict[Key, Call], int]:
    """Warm calls for whose rounds there are memory and time, and the number of rounds."""
    calls: dict[Key, Call] = {}
    took: dict[Key, float] = {}
    for key, contender in contenders.items():
        call = contender.calls[phase]
        if key == what.yardstick:
            # No guard: without a yardstick there is nothing to say about the others.
            calls[key] = CoreShare(call) if what.device.type == "cpu" else call
            took[key] = pilot(calls[key], timer)
        elif _fits(contender, phase, what.device, tell):
            who, too_large = f"{_who(what, *key)}, {phase}", _if_too_large(contender, phase, tell)
            found = _try(who, fail, lambda c=call: pilot(c, timer), too_large)
            if found is not None:
                calls[key], took[key] = call, found
    while len(calls) > 1 and FEWEST_ROUNDS * sum(took.values()) > what.left() * 1e3:
        slowest = max((key for key in calls if key != what.yardstick), key=lambda key: took[key])
        tell(
            f"{slowest[1]}, {name_of(slowest[0])}, {phase}: left out: {FEWEST_ROUNDS} rounds of "
            f"{took[slowest] / 1e3:.1f} s are more than the time left"
        )
        del calls[slowest], took[slowest]
    return calls, rounds_within(sum(took.values()), min(what.seconds, what.left()))


def _fits(contender: Contender, phase: str, device: torch.device, tell: Say) -> bool:
    needed, free = contender.needed_bytes.get(phase, 0), machine.free_bytes(device)
    if free is None or needed <= MEMORY_SHARE * free:
        return True
    tell(
        f"{contender.method}, {name_of(contender.dtype)}, {phase}: left out: it takes about {needed / 2**30:.0f} GiB, "
        f"{free / 2**30:.0f} GiB are free"
    )
    return False


def _if_too_large(contender: Contender, phase: str, tell: Say) -> Say | None:
    """Who hears that memory ran out: ``tell`` for a method that is known to take more than its results."""
    expected = contender.needed_bytes.get(phase, 0) > contender.owned_bytes[phase]
    return (lambda who: tell(f"{who}: left out: out of memory")) if expected else None


def _try(who: str, fail: Say, action: Callable[[], T], too_large: Say | None = None) -> T | None:
    """What the action returns, or None and its reason to ``fail``."""
    try:
        return action()
    except torch.OutOfMemoryError as error:
        if too_large is None:
            fail(f"{who}: {reason_of(error)}")
        else:
            too_large(who)
    except ParityError as error:
        fail(str(error))
    except Exception as error:
        fail(f"{who}: {reason_of(error)}")
    # The exception held the frames, and they the tensors, of what did not work.
    _release()
    return None


def reason_of(error: Exception) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _clear(device: torch.device) -> None:
    torch.compiler.reset()
    if device.type == "cuda":
        _release()


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


def _who(what: Comparison, dtype: torch.dtype, method: str) -> str:
    return f"{what.case.name} {what.direction} {name_of(dtype)} {method}"


def _record(
    what: Comparison,
    workload: ops.Workload,
    contender: Contender,
    phase: str,
    key: Key,
    times: dict[Key, list[float]],
    fail: Say,
) -> Record:
    on_gpu = what.device.type == "cuda"
    own, bare = times[key], times[what.yardstick]
    loop = times.get((key[0], LOOP))
    summary, flops = summarize(own), workload.flops(phase)
    who = f"{_who(what, *key)}, {phase}"
    peak = saved = None
    if what.peak:
        subject = memory.Subject(what.op, what.case, what.direction, name_of(key[0]), contender.method, phase)
        peak = _try(f"{who}, peak memory", fail, lambda: memory.peak_bytes(subject, contender))
    graph = contender.graph
    if graph is not None and phase == PHASES[-1]:
        saved = _try(f"{who}, saved memory", fail, lambda: memory.saved_bytes(graph))
    return Record(
        op=what.op,
        case=what.case.name,
        direction=what.direction,
        dtype=name_of(key[0]),
        method=contender.method,
        backend=contender.backend,
        phase=phase,
        I=what.case.images,
        C=what.case.captions,
        R=what.case.regions,
        N=workload.num_words,
        D=what.case.width,
        median_ms=_digits(summary.median),
        p20_ms=_digits(summary.p20),
        p80_ms=_digits(summary.p80),
        flops=flops,
        tflops=_digits(flops / summary.median / 1e9),
        eta=_digits(ratio(bare, own).median) if on_gpu else None,
        rho=None if on_gpu else _digits(ratio(own, bare).median),
        speedup_vs_loop=None if loop is None else _digits(ratio(loop, own).median),
        saved_mib=None if saved is None else _digits(saved / memory.MIB),
        peak_mib=None if peak is None else _digits(peak / memory.MIB),
        device=machine.describe(what.device),
        torch=torch.__version__,
        commit=machine.commit(),
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digits(value: float) -> float:
    """Four digits that count; the fifth is noise."""
    return float(f"{value:.4g}")
