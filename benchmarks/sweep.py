"""Variants of one setting against each other, in one process and in turns, for tuning: ``python -m benchmarks.sweep``.

    python -m benchmarks.sweep --case b1024 --workspace-mib 32 --workspace-mib 64 --workspace-mib 256
    python -m benchmarks.sweep --triton-table now.json --triton-table mine.json

A workspace decides how the work is cut into blocks; a table says how Triton's kernels are launched, in the form of the
files in ``itm_kernels/triton/configurations``, and concerns the method ``triton`` alone. Every variant is held against
the definition before it is timed. ``share`` is the time of the bare products in the same dtype over the variant's own.
Nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import itm_kernels
from benchmarks import machine, ops
from benchmarks.cases import CASES
from benchmarks.contender import PHASES, PRODUCT
from benchmarks.measure import Call, interleave, pilot, ratio, rounds_within, summarize, timer_for
from benchmarks.parity import assert_parity

METHODS = ("native", "triton")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Variant = Callable[[], AbstractContextManager[None]]


@contextlib.contextmanager
def workspace(op: str, mib: int) -> Iterator[None]:
    """The op's own default bound, for a while."""
    defaults: dict[str, Any] = getattr(itm_kernels, op).__kwdefaults__
    before = defaults["workspace_bytes"]
    defaults["workspace_bytes"] = mib * 2**20
    try:
        yield
    finally:
        defaults["workspace_bytes"] = before


@contextlib.contextmanager
def triton_table(path: Path, device: torch.device) -> Iterator[None]:
    """Launch configurations of another file, for a while."""
    from itm_kernels.triton import configurations

    buckets = configurations.table(configurations.arch_of(device)).buckets
    before = dict(buckets)
    buckets.update(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    try:
        yield
    finally:
        buckets.clear()
        buckets.update(before)


def main(args: Sequence[str] | None = None) -> int:
    """Exit code 1 where no method can run."""
    options = _parser().parse_args(args)
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    workspaces: dict[str, Variant] = {
        f"{mib} MiB": lambda mib=mib: workspace(options.op, mib) for mib in options.workspace_mib
    }
    tables: dict[str, Variant] = {
        str(path): lambda path=path: triton_table(path, device) for path in options.triton_table
    }
    methods = options.method or (METHODS if workspaces or not tables else ("triton",))
    workload = ops.load(options.op).workload(CASES[options.case], options.direction, dtype, device)
    found = {method: workload.contender(method) for method in (PRODUCT, *methods)}
    contenders = {}
    for method, contender in found.items():
        if isinstance(contender, str):
            print(f"{method}: left out: {contender}")
        else:
            contenders[method] = contender
    if len(contenders) < 2:
        return 1
    timer = timer_for(device)
    print(f"{machine.describe(device)}, torch {torch.__version__}, commit {machine.commit()}")
    for phase in PHASES:
        calls: dict[str, Call] = {PRODUCT: contenders[PRODUCT].calls[phase]}
        for method, contender in contenders.items():
            if method == PRODUCT:
                continue
            variants = {**workspaces, **(tables if method == "triton" else {})} or {"as it is": contextlib.nullcontext}
            for name, variant in variants.items():
                call = calls[f"{method}, {name}"] = _inside(variant, contender.calls[phase])
                assert_parity(f"{method}, {name}, {phase}", call(), workload.truth(), workload.tolerance)
        rounds = rounds_within(sum(pilot(call, timer) for call in calls.values()), options.seconds)
        times = interleave(calls, rounds, timer)
        print(f"\n{options.op}  {options.case}  {options.direction}  {phase}  {dtype}  {rounds} rounds")
        for name in calls:
            own, share = summarize(times[name]), ratio(times[PRODUCT], times[name]).median
            print(f"{own.median:12.4g} ms  ({own.p20:.4g} .. {own.p80:.4g})  share {share:.3f}  {name}", flush=True)
    return 0


def _inside(variant: Variant, call: Call) -> Call:
    def within() -> Any:
        with variant():
            return call()

    return within


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    directions = sorted({direction for op in ops.OPS for direction in ops.load(op).DIRECTIONS})
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=ops.OPS, default=ops.OPS[0], help="default: %(default)s")
    parser.add_argument("--method", choices=METHODS, action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--case", choices=CASES, default="b1024", help="default: %(default)s")
    parser.add_argument("--direction", choices=directions, default="t2i", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="aim for the rounds of a phase; default: %(default)s"
    )
    parser.add_argument("--workspace-mib", type=int, action="append", default=[], metavar="N")
    parser.add_argument("--triton-table", type=Path, action="append", default=[], metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
