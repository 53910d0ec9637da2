"""All methods of one op on one batch in one direction: parity, then time, then memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import machine, memory, ops
from benchmarks.cases import Case
from benchmarks.contender import PHASES, PRODUCT, Contender
from benchmarks.measure import QUIET, Call, CoreShare, interleave, ratio, rounds_within, summarize, timer_for
from benchmarks.parity import assert_parity
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
    """

    op: str
    case: Case
    direction: str
    dtypes: tuple[torch.dtype, ...]
    methods: tuple[str, ...]
    device: torch.device
    seconds: float
    peak: bool


Key = tuple[torch.dtype, str]


def compare(what: Comparison, tell: Callable[[str], None]) -> Iterator[list[Record]]:
    """Records phase by phase; ``tell`` hears what is left out, and why.

    Raises
    ------
    ParityError
        A method that computes something else; nothing of the batch is timed then.
    """
    torch.compiler.reset()  # the last batch's code would count against the limit of recompilations
    workloads, contenders = _line_up(what, tell)
    for (dtype, _), contender in contenders.items():
        _check(contender, workloads[dtype], what.device)
    timer = timer_for(what.device)
    for phase in PHASES:
        affordable = {
            key: contender for key, contender in contenders.items() if _fits(contender, phase, what.device, tell)
        }
        calls: dict[Key, Call] = {key: contender.calls[phase] for key, contender in affordable.items()}
        yardstick = YARDSTICK[what.device.type], PRODUCT
        calls[yardstick] = shares = CoreShare(calls[yardstick])
        times = interleave(calls, rounds_within(calls, what.seconds, timer), timer)
        share = summarize(shares.shares).median
        if what.device.type == "cpu" and share < QUIET:
            tell(
                f"{phase}: the machine is busy: the bare product got {share:.0%} of its threads. Methods suffer from "
                "that unequally; measure again when it is quiet"
            )
        yield [
            _record(what, workloads[key[0]], contender, phase, key, times)
            for key, contender in affordable.items()
            if key[0] in what.dtypes and key[1] in what.methods
        ]


def _line_up(
    what: Comparison, tell: Callable[[str], None]
) -> tuple[dict[torch.dtype, ops.Workload], dict[Key, Contender]]:
    """Workloads by dtype and the methods that can run, the yardstick among them."""
    yardstick = (YARDSTICK[what.device.type], PRODUCT)
    keys = [yardstick, *((d, m) for d in what.dtypes for m in what.methods if (d, m) != yardstick)]
    make = ops.load(what.op).workload
    workloads = {
        dtype: make(what.case, what.direction, dtype, what.device) for dtype in dict.fromkeys(d for d, _ in keys)
    }
    contenders: dict[Key, Contender] = {}
    for dtype, method in keys:
        found = workloads[dtype].contender(method)
        if isinstance(found, str):
            tell(f"{method}, {name_of(dtype)}: left out: {found}")
        else:
            contenders[dtype, method] = found
    return workloads, contenders


def _fits(contender: Contender, phase: str, device: torch.device, tell: Callable[[str], None]) -> bool:
    needed, free = contender.needed_bytes.get(phase, 0), machine.free_bytes(device)
    if free is None or needed <= MEMORY_SHARE * free:
        return True
    tell(
        f"{contender.method}, {name_of(contender.dtype)}, {phase}: left out: it takes about {needed / 2**30:.0f} GiB, "
        f"{free / 2**30:.0f} GiB are free"
    )
    return False


def _check(contender: Contender, workload: ops.Workload, device: torch.device) -> None:
    if contender.method == PRODUCT:
        return  # it computes no scores
    for phase, call in contender.calls.items():
        if _fits(contender, phase, device, lambda _: None):
            who = f"{workload.case.name} {workload.direction} {name_of(contender.dtype)} {contender.method}, {phase}"
            assert_parity(who, call(), workload.truth(), workload.tolerance)


def _record(
    what: Comparison,
    workload: ops.Workload,
    contender: Contender,
    phase: str,
    key: Key,
    times: dict[Key, list[float]],
) -> Record:
    on_gpu = what.device.type == "cuda"
    own, bare = times[key], times[YARDSTICK[what.device.type], PRODUCT]
    loop = times.get((key[0], LOOP))
    summary, flops = summarize(own), workload.flops(phase)
    peak = None
    if what.peak:
        subject = memory.Subject(what.op, what.case, what.direction, name_of(key[0]), contender.method, phase)
        peak = memory.peak_bytes(subject, contender)
    saved = memory.saved_bytes(contender.graph) if contender.graph is not None and phase == PHASES[-1] else None
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
