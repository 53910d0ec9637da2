"""Measure the ops: ``python -m benchmarks.run``, also ``itm bench``.

For every case and direction, methods and dtypes take turns round by round with cold caches. Before anything is timed,
every method's scores and gradients are held against the definition in float64; one that fails is not timed, and named
at the end. What the columns and the records of ``--json`` mean stands in ``benchmarks/records.py``, what the methods
are in ``benchmarks/ops/``. Exit code: 0; 1 a method failed; 75 the deadline left something out; 76 both.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, ops, records, table
from benchmarks.cases import CASES, DEFAULT_CASES
from benchmarks.compare import Comparison, compare, name_of, reason_of
from benchmarks.contender import PHASES
from benchmarks.records import Record

RESULTS = Path(__file__).with_name("results")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TO_RESULTS = "results"  # `--json` alone; no Path, so it equals none that is given
FAILED, LATE, FAILED_AND_LATE = 1, 75, 76
QUICK_CASE, QUICK_SECONDS, SECONDS = "b32", 3.0, 30.0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(args)
    began = time.monotonic()
    _complete(parser, options)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        # The yardstick accumulates as the kernels do, and float32 is float32.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{machine.describe(device)}, torch {torch.__version__}, commit {machine.commit()}", flush=True)
    measuring = Measuring(_kept(parser, options), options.json, lambda: options.deadline - (time.monotonic() - began))
    for what in _comparisons(options, device, measuring.left):
        measuring.take(what)
    print(f"\n{measuring.measured} measurements in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        records.write(measuring.records, options.json)
        print(f"written to {options.json}")
    if measuring.not_begun:
        print(f"left for want of time: {'; '.join(measuring.not_begun)}")
    for failure in measuring.failures:
        print(f"benchmarks: {failure}", file=sys.stderr)
    failed, late = bool(measuring.failures), bool(measuring.not_begun)
    return FAILED_AND_LATE if failed and late else LATE if late else FAILED if failed else 0


class Measuring:
    """Comparisons one after another, and what came of them; what is measured is written at once.

    Attributes
    ----------
    records
        All that is known: what was there before, then what was measured; so many of them were measured: ``measured``.
    failures
        Methods that failed, each with its reason.
    not_begun
        Comparisons that the time did not reach.
    """

    def __init__(self, kept: Sequence[Record], path: Path | None, left: Callable[[], float]) -> None:
        self.records = list(kept)
        self.measured = 0
        self.failures: list[str] = []
        self.not_begun: list[str] = []
        self.left = left
        self._path = path
        self._took: list[tuple[int, float]] = []
        self._lost = False

    def take(self, what: Comparison) -> None:
        if self._is_there(what):
            print(f"  {what}: is there already")
        elif self._lost:
            self.failures.append(f"{what}: not measured, the device is lost")
        elif self.left() <= self._at_least(what):
            self.not_begun.append(str(what))
        else:
            before = self.left()
            try:
                self._measure(what)
            except Exception as error:
                self._fail(f"{what}: {reason_of(error)}")
                self._lost = not _answers(what.device)
            if math.isfinite(before):
                self._took.append((what.case.images, before - self.left()))

    def _at_least(self, what: Comparison) -> float:
        """Seconds: a batch takes no less than a smaller one did."""
        return max((seconds for images, seconds in self._took if images <= what.case.images), default=0.0)

    def _measure(self, what: Comparison) -> None:
        for phase in compare(what, lambda note: print(f"  {note}", flush=True), self._fail):
            if phase:
                print(f"\n{table.title(phase[0])}\n{table.render(phase)}", flush=True)
                self.records += phase
                self.measured += len(phase)
                if self._path is not None:
                    records.write(self.records, self._path)

    def _fail(self, reason: str) -> None:
        print(f"  FAILED {reason}", flush=True)
        self.failures.append(reason)

    def _is_there(self, what: Comparison) -> bool:
        """In its last phase, with every dtype; a phase alone, after which the process ended, is measured again."""
        place, wanted = (what.op, what.case.name, what.direction), {name_of(dtype) for dtype in what.dtypes}
        own = [r for r in self.records if (r.op, r.case, r.direction) == place and r.dtype in wanted]
        if wanted <= {r.dtype for r in own if r.phase == PHASES[-1]}:
            return True
        self.records = [r for r in self.records if r not in own]
        return False


def _answers(device: torch.device) -> bool:
    """Whether the device still works: after an illegal access nothing of this process will run on it."""
    try:
        torch.ones(1, device=device).sum().item()
    except Exception:
        return False
    return True


def _kept(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Record]:
    """With --resume: the file's records of this device, torch and commit."""
    if not options.resume or not options.json.is_file():
        return []
    try:
        found = records.read(options.json)
    except ValueError as error:
        parser.error(f"--resume: {error}")
    here = machine.describe(torch.device(options.device)), torch.__version__, machine.commit()
    return [record for record in found if (record.device, record.torch, record.commit) == here]


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
    parser.add_argument("--without", choices=methods, help="leave this method out", **several)
    parser.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        metavar="S",
        help=f"aim for the rounds of a case's phase, 5 rounds at least; default: {SECONDS:g}",
    )
    parser.add_argument(
        "--deadline",
        type=_positive(float),
        default=math.inf,
        metavar="S",
        help="begin nothing that S seconds from now do not suffice for; exit code 75 says that something is left",
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
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file of --json has of this device, torch and commit"
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
    if options.resume and options.json is None:
        parser.error("--resume needs --json: the file to go on with")
    if options.json == TO_RESULTS:
        folder = RESULTS / machine.slug(torch.device(options.device))
        options.json = folder / f"{'-'.join(options.op)}.json"
    if options.json is not None:
        try:
            records.check_writable(options.json)
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error.strerror}")


def _comparisons(options: argparse.Namespace, device: torch.device, left: Callable[[], float]) -> Iterator[Comparison]:
    """Direction by direction, so that a run that ends early has all batches of the first one."""
    directions = dict.fromkeys(name for op in ops.OPS for name in ops.load(op).DIRECTIONS)
    for direction in directions:
        for op in dict.fromkeys(options.op):
            module = ops.load(op)
            if direction not in module.DIRECTIONS or (options.direction and direction not in options.direction):
                continue
            methods = tuple(
                method
                for method in module.METHODS
                if (not options.method or method in options.method) and method not in (options.without or ())
            )
            for case in dict.fromkeys(options.case):
                if not ops.fits(op, CASES[case], device):
                    print(f"{op} {case} {direction}: left out: its output would be gigabytes", flush=True)
                    continue
                dtypes = tuple(DTYPES[name] for name in dict.fromkeys(options.dtype))
                yield Comparison(
                    op,
                    CASES[case],
                    direction,
                    dtypes,
                    methods,
                    device,
                    options.seconds,
                    peak=not options.no_peak,
                    left=left,
                )


if __name__ == "__main__":
    sys.exit(main())
