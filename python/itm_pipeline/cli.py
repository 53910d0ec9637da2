"""The command `itm`: demo, train, evaluate, bench, info.

It calls the functions that anyone can call from Python, with the dataclasses that `itm_pipeline.parsers` makes of the
options, and turns `UserError` into one sentence and exit code 2.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itm_pipeline.commands import Evaluate, Info
from itm_pipeline.config import TrainConfig
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.errors import UserError

BAD_INPUT = 2


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    args
        Arguments after the program's name; by default those of the process.

    Returns
    -------
    int
        Exit code: 0; 2 for bad input; 128 plus the signal's number where training was stopped.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        if given[:1] == ["bench"]:
            # Its options are the benchmark runner's own, so they are passed on unread.
            return _bench(given[1:])
        return _run(_parse(given))
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("itm: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")


def _refuse(sentence: str) -> int:
    print(f"itm: {sentence}", file=sys.stderr)
    return BAD_INPUT


def _parse(args: list[str]) -> Any:
    """The command as a dataclass: by tyro, or by argparse where tyro is not installed."""
    try:
        from itm_pipeline.parsers.with_tyro import parse
    except ModuleNotFoundError as error:
        if error.name != "tyro":
            raise
        from itm_pipeline.parsers.plain import parse
    return parse(args)


def _run(command: Any) -> int:
    match command:
        case TrainConfig():
            return _train(command)
        case Evaluate():
            return _evaluate(command)
        case DemoConfig():
            from itm_pipeline.demo import demo

            return _stoppable(lambda: demo(command))
        case Info():
            from itm_kernels import info

            info.main()
            return 0
    raise AssertionError(f"no such command: {command}")


def _train(config: TrainConfig) -> int:
    from itm_pipeline.train import train

    def action() -> None:
        result = train(config)
        print(f"best dev rsum {result.best_rsum:.1f} at epoch {result.best_epoch} of {result.epochs}, run {result.run}")
        print(f"evaluate it with: itm evaluate {result.run}")

    return _stoppable(action)


def _stoppable(action: Any) -> int:
    from itm_pipeline.train import Interrupted

    try:
        action()
    except Interrupted as stop:
        print(f"itm: {stop}", file=sys.stderr)
        return 128 + stop.number
    return 0


def _evaluate(command: Evaluate) -> int:
    from itm_pipeline.attention import attention_table
    from itm_pipeline.evaluate import evaluate, metrics_path, table

    metrics = evaluate(
        command.run,
        split=command.split,
        data=command.data,
        checkpoint=command.checkpoint,
        fold5=command.fold5,
        scores=command.scores,
        device=command.device,
        block_mib=command.block_mib,
        attention=command.attention,
        attention_threshold=command.attention_threshold,
        attention_average=command.attention_average,
    )
    print(table(metrics))
    written = metrics_path(command.run, command.split, command.checkpoint, fold5=command.fold5)
    if command.attention is not None:
        found = json.loads(written.read_text(encoding="utf-8"))["attention"]
        words = found["words"]
        print(f"\nattention: {words['with_box']} words with boxes ({words['without_box']} more of phrases without)")
        print(attention_table(found))
    print(f"written to {written}")
    if command.scores is not None:
        print(f"scores written to {command.scores}")
    return 0


def _bench(args: list[str]) -> int:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise UserError(
            "the benchmarks are not part of the installed package: clone the project's sources, install from "
            "there with `pip install -e .`, and run `itm bench` again"
        )
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *args], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    return done.returncode
