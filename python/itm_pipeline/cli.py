"""The command `itm`: demo, train, evaluate, bench, info.

This is the only module that needs tyro. It turns options into the dataclasses of `itm_pipeline.config`, calls the
functions that anyone can call from Python, and turns `UserError` into one sentence and exit code 2.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
except ImportError:
    raise SystemExit("itm: the command line needs tyro; install it with: pip install 'itm-kernels[pipeline]'") from None

from itm_pipeline.config import PRESETS, TrainConfig, from_preset
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.errors import UserError

BAD_INPUT = 2


@dataclass(frozen=True)
class Evaluate:
    """Retrieval of a trained model: prints a table and writes it into the run as JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder that `itm train` made."""
    split: str = "test"
    """Which split: the first part of its file names."""
    data: Path | None = None
    """Folder of the split. Default: the one the run was trained on."""
    checkpoint: Literal["best", "last"] = "best"
    """The weights of the best rsum on dev, or the last ones."""
    fold5: bool = False
    """Mean over five folds of consecutive images (COCO's 1K protocol) instead of the full matrix."""
    scores: Path | None = None
    """Also save the score matrix, images by captions, float32, in this .npy file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    block_mib: int | None = None
    """Bound on encoded images and captions held at once, MiB. Default: the run's --eval-block-mib."""


@dataclass(frozen=True)
class Bench:
    """Measure the ops. All options go to `python -m benchmarks.run`; `itm bench --help` shows them."""


@dataclass(frozen=True)
class Info:
    """Versions, the build, and which implementation of each op can run here, with a reason where one cannot."""


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
    train = tyro.conf.subcommand("train", default=_train_defaults(args), description=_train_help())
    command = (
        Annotated[DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[TrainConfig, train]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(
        command,
        prog="itm",
        description="Fine-grained image-text matching: train, evaluate, look. `itm demo` needs nothing but time.",
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _train_help() -> str:
    presets = "\n".join(f"  {name}: {preset.summary}" for name, preset in PRESETS.items())
    return f"{TrainConfig.__doc__}\n\nPresets:\n{presets}"


def _train_defaults(args: list[str]) -> TrainConfig:
    """What the options of `train` start from: the preset, or the run to resume, that stands among them."""
    if args[:1] != ["train"]:
        return from_preset("scan-t2i", Path("DIR"))
    resume = _value(args, "--resume")
    if resume is not None and resume != "None":
        from itm_pipeline.runs import open_run

        return dataclasses.replace(open_run(Path(resume)).config, resume=Path(resume))
    preset: Any = _value(args, "--preset") or "scan-t2i"
    # An unknown name is left to tyro, which lists those that there are.
    base = from_preset(preset if preset in PRESETS else "scan-t2i", Path("DIR"))
    return dataclasses.replace(base, dataset=dataclasses.replace(base.dataset, data=tyro.MISSING))


def _value(args: list[str], option: str) -> str | None:
    """The value that an option has among arguments, without parsing the others."""
    found = None
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == option:
            found = value if equals else (args[index + 1] if index + 1 < len(args) else None)
    return found


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
    )
    print(table(metrics))
    print(f"written to {metrics_path(command.run, command.split, command.checkpoint, fold5=command.fold5)}")
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
