"""Which floor runs an op: the order, the reasons why not, and how to force one.

A floor offers an op when it has a module of that name (``itm_kernels.<floor>.<op>``) with ``why_not``, ``forward`` and
``backward``. The choice is made inside the opaque op, so that ``torch.compile`` traces past it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

FLOORS = ("reference", "eager", "native", "triton")
"""From the definition to the fastest."""

ORDER = {"cuda": ("native", "triton", "eager"), "cpu": ("native", "eager")}
"""Automatic choice by device type; what is not listed runs on eager."""

AUTO = "auto"

_forced: str | None = None
_log = logging.getLogger("itm_kernels")
_told: set[tuple[str, str, str, str]] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in this block on one floor, or raise with the reason why it cannot.

    The setting is the process's, like ``torch.backends`` flags, and is read when an op is called: the backward of that
    call runs on the same floor, also outside the block.

    Parameters
    ----------
    name
        ``"reference"``, ``"eager"``, ``"native"`` or ``"triton"``.
    """
    global _forced
    check_backend("use_backend", name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def check_backend(op: str, name: str | None) -> None:
    """Raise unless ``name`` is a floor (or None: automatic)."""
    if name is not None and name not in FLOORS:
        raise ValueError(f"{op}: backend must be one of {', '.join(FLOORS)}, got {name!r}")


def requested(backend: str | None) -> str:
    """What a call asks for: its own ``backend`` argument, else the surrounding :func:`use_backend`, else automatic."""
    return backend or _forced or AUTO


def why_not(backend: str, op: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """One sentence that says why ``backend`` cannot run ``op`` there, or None if it can."""
    module = f"{__package__}.{backend}"
    if importlib.util.find_spec(module) is None:
        return f"this version has no {backend} floor"
    if importlib.util.find_spec(f"{module}.{op}") is None:
        return f"{op} has no {backend} kernels in this version"
    floor = importlib.import_module(f"{module}.{op}")
    reason: str | None = floor.why_not(torch.device(device), dtype)
    return reason


def pick(op: str, device: torch.device, dtype: torch.dtype, backend: str) -> ModuleType:
    """The module that runs ``op``.

    Raises
    ------
    RuntimeError
        ``backend`` names a floor that cannot run it; the message carries the reason.
    """
    if backend != AUTO:
        reason = why_not(backend, op, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run on {device.type} with {dtype}: {reason}")
        return importlib.import_module(f"{__package__}.{backend}.{op}")
    for candidate in ORDER.get(device.type, ("eager",)):
        reason = why_not(candidate, op, device, dtype)
        if reason is None:
            return importlib.import_module(f"{__package__}.{candidate}.{op}")
        note = (op, candidate, device.type, str(dtype))
        if note not in _told:
            _told.add(note)
            _log.info("%s: not on %s for %s %s: %s", op, candidate, device.type, dtype, reason)
    raise RuntimeError(f"{op}: no backend runs on {device.type} with {dtype}")
