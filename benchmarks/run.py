"""Measure the ops: ``python -m benchmarks.run``, also ``itm bench``.

For every case and direction, methods and dtypes take turns round by round with cold caches. Before anything is timed,
every method's scores and gradients are held against the definition in float64. What the columns and the records of
``--json`` mean stands in ``benchmarks/records.py``, what the methods are in ``benchmarks/ops/``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, ops, records, table
from benchmarks.cases import CASES, DEFAULT_CASES
from benchmarks.compare import Comparison, compare
from benchmarks.parity import ParityError
from benchmarks.records import Record

RESULTS = Path(__file__).with_name("results")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TO_RESULTS = "results"  # `--json` alone; no Path, so it equals none that is given
QUICK_CASE, QUICK_SECONDS, SECONDS = "b32", 3.0, 30.0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 1 where a method does not compute what it should."""
    parser = _parser()
    options = parser.parse_args(args)
    _complete(parser, options)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        # The yardstick accumulates as the kernels do.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    began = time.monotonic()
    print(f"{machine.describe(device)}, torch {torch.__version__}, commit {machine.commit()}")
    try:
        found = [record for what in _comparisons(options, device) for record in _show(what)]
    except ParityError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    print(f"\n{len(found)} measurements in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        records.write(found, options.json)
        print(f"written to {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"action": "append", "metavar": "NAME"}
    methods = sorted({method for op in ops.OPS for method in ops.load(op).METHODS})
    directions = sorted({direction for op in ops.OPS for direction in ops.load(op).DIRECTIONS})
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--op", choices=ops.OPS, help=f"{', '.join(ops.OPS)}; default: all", **several)
    defaults = "; ".join(f"{', '.join(names)} on {device}" for device, names in DEFAULT_CASES.items())
    parser.add_argument("--case", choices=CASES, help=f"{', '.join(CASES)}; default: {defaults}", **several)
    parser.add_argument("--direction", choices=directions, help=f"{', '.join(directions)}; default: all", **several)
    parser.add_argument("--dtype", choices=DTYPES, help=f"{', '.join(DTYPES)}; default: float32, bfloat16", **several)
    parser.add_argument("--method", choices=methods, help=f"{', '.join(methods)}; default: all that run", **several)
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help=f"aim for the rounds of a case's phase, 5 rounds at least; default: {SECONDS:g}",
    )
    parser.add_argument("--no-peak", action="store_true", help="leave peak memory out (a process for every number)")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_CASE}, t2i, float32, {QUICK_SECONDS:g} s a phase, unless named"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=TO_RESULTS,
        type=Path,
        metavar="FILE",
        help="write the records; without FILE into benchmarks/results/<device>/",
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number
    return convert


def _complete(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in what was not given; refuse what cannot be before anything runs."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    options.op = options.op or list(ops.OPS)
    if options.quick:
        options.case = options.case or [QUICK_CASE]
        options.direction = options.direction or ["t2i"]
        options.dtype = options.dtype or ["float32"]
        options.seconds = options.seconds or QUICK_SECONDS
    options.case = options.case or list(DEFAULT_CASES[options.device])
    options.dtype = options.dtype or ["float32", "bfloat16"]
    options.seconds = options.seconds or SECONDS
    if options.json == TO_RESULTS:
        folder = RESULTS / machine.slug(torch.device(options.device))
        options.json = folder / f"{'-'.join(options.op)}.json"
    if options.json is not None:
        try:
            records.check_writable(options.json)
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error.strerror}")


def _comparisons(options: argparse.Namespace, device: torch.device) -> list[Comparison]:
    return [
        Comparison(
            op,
            CASES[case],
            direction,
            tuple(DTYPES[name] for name in dict.fromkeys(options.dtype)),
            tuple(method for method in ops.load(op).METHODS if not options.method or method in options.method),
            device,
            options.seconds,
            peak=not options.no_peak,
        )
        for op in dict.fromkeys(options.op)
        for case in dict.fromkeys(options.case)
        for direction in ops.load(op).DIRECTIONS
        if not options.direction or direction in options.direction
    ]


def _show(what: Comparison) -> list[Record]:
    found = []
    for phase in compare(what, lambda note: print(f"  {note}")):
        if phase:
            print(f"\n{table.title(phase[0])}\n{table.render(phase)}", flush=True)
            found += phase
    return found


if __name__ == "__main__":
    sys.exit(main())
