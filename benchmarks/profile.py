"""Where the time of one call goes, kernel by kernel: ``python -m benchmarks.profile``.

Prints a table for every method and phase, and writes with ``--json`` a list of
``{op, case, direction, dtype, method, phase, kernel, calls, total_us, share, device, torch, commit}``. ``--bare`` makes
each call once and looks at nothing, for another profiler to watch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import machine, ops, records
from benchmarks.cases import CASES
from benchmarks.compare import name_of
from benchmarks.contender import BOTH, PHASES, PRODUCT, Contender
from benchmarks.measure import Call

METHODS = (PRODUCT, "native", "triton")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_ROWS = 12


def main(args: Sequence[str] | None = None) -> int:
    """Exit code 1 where no method could run."""
    options = _parser().parse_args(args)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    found: list[dict[str, Any]] = []
    ran = 0
    for op in options.op or ops.OPS:
        workload = ops.load(op).workload(CASES[options.case], options.direction, DTYPES[options.dtype], device)
        for method in options.method or METHODS:
            contender = workload.contender(method)
            if isinstance(contender, str):
                print(f"{op}, {method}: left out: {contender}")
                continue
            ran += 1
            for phase in PHASES[-1:] if options.bare else PHASES:
                found += _look(op, options, contender, phase)
    if options.json is not None:
        records.check_writable(options.json)
        options.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n", encoding="utf-8")
    return 0 if ran else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = sorted({direction for op in ops.OPS for direction in ops.load(op).DIRECTIONS})
    methods = sorted({method for op in ops.OPS for method in ops.load(op).METHODS})
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=ops.OPS, action="append", help="default: all")
    parser.add_argument("--method", choices=methods, action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--case", choices=CASES, default="b1024")
    parser.add_argument("--direction", choices=directions, default="t2i")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--bare", action="store_true", help=f"call {BOTH} once, without a profile")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _look(op: str, options: argparse.Namespace, contender: Contender, phase: str) -> list[dict[str, Any]]:
    call = contender.calls[phase]
    call()
    _finish(contender.device)
    if options.bare:
        return []
    rows = kernels(call, contender.device)
    total = sum(row["total_us"] for row in rows)
    print(f"\n{op}  {options.case}  {options.direction}  {phase}  {contender.method}  {name_of(contender.dtype)}")
    print(f"{total:,.0f} us in {sum(row['calls'] for row in rows)} kernels")
    for row in rows[:MOST_ROWS]:
        print(f"  {row['share']:6.1%}  {row['total_us']:12,.1f} us  {row['calls']:6d} x  {row['kernel'][:88]}")
    head = {
        "op": op,
        "case": options.case,
        "direction": options.direction,
        "dtype": name_of(contender.dtype),
        "method": contender.method,
        "phase": phase,
    }
    tail = {
        "device": machine.describe(contender.device),
        "torch": torch.__version__,
        "commit": machine.commit(),
    }
    return [{**head, **row, **tail} for row in rows]


def kernels(call: Call, device: torch.device) -> list[dict[str, Any]]:
    """Kernels of one call (on a CPU: torch's operators, each without those it calls), the longest first."""
    on_gpu = device.type == "cuda"
    activity, kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        call()
        _finish(device)
    rows = [
        {
            "kernel": event.key,
            "calls": event.count,
            "total_us": float(event.self_device_time_total if on_gpu else event.self_cpu_time_total),
        }
        for event in profile.key_averages()
        if event.device_type == kind
    ]
    total = sum(row["total_us"] for row in rows)
    return [{**row, "share": row["total_us"] / total} for row in sorted(rows, key=lambda r: -r["total_us"]) if total]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
