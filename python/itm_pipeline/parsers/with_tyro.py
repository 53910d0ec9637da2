"""The command line by tyro; the only module that needs it."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

from itm_pipeline.commands import Bench, Evaluate, Info
from itm_pipeline.config import TrainConfig
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.parsers.start import DESCRIPTION, train_defaults, train_help


def parse(args: list[str]) -> Any:
    """The command as its dataclass."""
    train = tyro.conf.subcommand("train", default=train_defaults(args, tyro.MISSING), description=train_help())
    command = (
        Annotated[DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[TrainConfig, train]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate"), tyro.conf.PositionalRequiredArgs]
        | Annotated[Bench, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(
        command,
        prog="itm",
        description=DESCRIPTION,
        args=args,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
