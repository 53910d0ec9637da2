"""The command line by argparse alone: every option of the dataclasses, without the text that tyro shows for each."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from itm_pipeline.commands import Bench, Evaluate, Info
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.parsers.start import DESCRIPTION, train_defaults, train_help

EPILOG = "What each option does is shown where tyro is installed: pip install 'itm-kernels[pipeline]'."
MISSING = dataclasses.MISSING


def parse(args: list[str]) -> Any:
    """The command as its dataclass."""
    train = train_defaults(args, MISSING)
    commands: dict[str, tuple[type, Any, str | None]] = {  # dataclass, what its options start from, description
        "demo": (DemoConfig, DemoConfig(), DemoConfig.__doc__),
        "train": (type(train), train, train_help()),
        "evaluate": (Evaluate, None, Evaluate.__doc__),
        "bench": (Bench, None, Bench.__doc__),
        "info": (Info, None, Info.__doc__),
    }
    parser = argparse.ArgumentParser(prog="itm", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (kind, start, description) in commands.items():
        command = choices.add_parser(
            name,
            help=(kind.__doc__ or "").splitlines()[0],
            description=description,
            epilog=EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add(command, kind, start)
    values = vars(parser.parse_args(args))
    kind, start, _ = commands[values.pop("command")]
    return _make(kind, start, values)


def _add(command: argparse.ArgumentParser, kind: type, start: Any, prefix: str = "") -> None:
    """An option for every field; groups are gone through, their names are no part of the option."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, dest = hints[field.name], prefix + field.name
        default = field.default if start is None else getattr(start, field.name)
        option = "--" + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            _add(command, typing.cast(type, hint), default, f"{dest}.")
        elif hint is bool:
            command.add_argument(option, dest=dest, action=argparse.BooleanOptionalAction, default=default)
        elif default is MISSING and start is None:
            command.add_argument(dest, type=_reader(hint)[0])
        else:
            read, allowed = _reader(hint)
            known: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
            shown = "{" + ",".join(map(str, allowed)) + "}" if allowed else field.name.upper()
            note = None if default is MISSING else f"default: {default}"
            command.add_argument(option, dest=dest, type=read, choices=allowed, metavar=shown, help=note, **known)


def _reader(hint: Any) -> tuple[Callable[[str], Any], list[Any] | None]:
    """What reads a value of this type, and the values that it may have; None is written `None`."""
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    (hint,) = [part for part in typing.get_args(hint) if part is not type(None)] if optional else [hint]
    allowed = list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None
    base: Callable[[str], Any] = str if allowed else hint
    if not optional:
        return base, allowed

    def read(text: str) -> Any:
        return None if text == "None" else base(text)

    read.__name__ = getattr(base, "__name__", "value")  # argparse names it where the text does not fit
    return read, [*allowed, None] if allowed else None


def _make(kind: type, start: Any, values: dict[str, Any], prefix: str = "") -> Any:
    hints = typing.get_type_hints(kind)
    made = {
        name: _make(typing.cast(type, hint), getattr(start, name), values, f"{prefix}{name}.")
        if dataclasses.is_dataclass(hint)
        else values[prefix + name]
        for name, hint in hints.items()
    }
    return kind(**made)
