"""What both parsers start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from itm_pipeline.config import PRESETS, TrainConfig, from_preset

DESCRIPTION = "Fine-grained image-text matching: train, evaluate, look. `itm demo` needs nothing but time."


def train_help() -> str:
    """Description of `itm train`."""
    presets = "\n".join(f"  {name}: {preset.summary}" for name, preset in PRESETS.items())
    return f"{TrainConfig.__doc__}\n\nPresets:\n{presets}"


def train_defaults(args: list[str], missing: Any) -> TrainConfig:
    """What the options of `train` start from: the preset, or the run to resume, that stands among them.

    `missing` stands for the folder of the data where nothing says it.
    """
    if args[:1] != ["train"]:
        return from_preset("scan-t2i", Path("DIR"))
    resume = _value(args, "--resume")
    if resume is not None and resume != "None":
        from itm_pipeline.runs import open_run

        return dataclasses.replace(open_run(Path(resume)).config, resume=Path(resume))
    preset: Any = _value(args, "--preset") or "scan-t2i"
    # An unknown name is left to the parser, which lists those that there are.
    base = from_preset(preset if preset in PRESETS else "scan-t2i", Path("DIR"))
    return dataclasses.replace(base, dataset=dataclasses.replace(base.dataset, data=missing))


def _value(args: list[str], option: str) -> str | None:
    """The value that an option has among arguments, without parsing the others."""
    found = None
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == option:
            found = value if equals else (args[index + 1] if index + 1 < len(args) else None)
    return found
