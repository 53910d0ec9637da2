"""Calls into the compiled library, and the reason where there is none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

INSTALL = "`pip install --no-build-isolation -e .` in a source checkout builds it"


@functools.cache
def load_error() -> str | None:
    """Why the compiled library is not there, or None once it is loaded."""
    try:
        for module in ("_C", "_host"):
            importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError:
        return f"the native library is not built (pure Python install); {INSTALL}"
    except ImportError as error:
        return f"the native library does not load: {error}; {INSTALL}"
    return None


def host() -> ModuleType:
    """``_host``: block plans and build information.

    Raises
    ------
    RuntimeError
        The library is not built; the message says how.
    """
    reason = load_error()
    if reason is not None:
        raise RuntimeError(reason)
    return importlib.import_module(f"{__name__}._host")
