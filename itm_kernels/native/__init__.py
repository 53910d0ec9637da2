"""Calls into the compiled library, and the reason where there is none."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
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


@functools.cache
def cuda_load_error() -> str | None:
    """Why there are no CUDA kernels, or None once they are loaded."""
    reason = load_error()
    if reason is not None:
        return reason
    reason = host().build_information()["no_cuda"]
    if reason:
        return f"the CUDA kernels were not built: {reason}"
    try:
        _cuda_modules()
    except ImportError as error:
        return f"the CUDA kernels do not load: {error}; {INSTALL}"
    return None


def cuda_architectures() -> list[str]:
    """GPUs that the CUDA kernels were compiled for, as torch writes them; empty where there are none."""
    if cuda_load_error() is not None:
        return []
    return sorted({name for module in _cuda_modules() for name in module.architectures.split()})


def _cuda_modules() -> list[ModuleType]:
    """``_C_cuda``, and the libraries beside it whose kernels need GPUs of their own (``_C_cuda_90a``)."""
    beside = sorted(path.name.split(".")[0] for path in Path(__file__).parent.glob("_C_cuda_*.so"))
    return [importlib.import_module(f"{__name__}.{name}") for name in ("_C_cuda", *beside)]
