"""Kernels in Triton: the portable floor of GPUs. Nothing here imports Triton before a kernel is asked for."""

from __future__ import annotations

import functools
import importlib

INSTALL = '`pip install "itm-kernels[triton]"` (triton>=3.6) brings it'


@functools.cache
def load_error() -> str | None:
    """Why Triton is not there, or None."""
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, AttributeError) as error:  # a folder called triton on the path has no version
        return f"Triton does not import: {error}; {INSTALL}"
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"Triton is {version}, 3.6 or newer is needed; {INSTALL}"
    return None


@functools.cache
def interprets() -> bool:
    """Whether the kernels were decorated under ``TRITON_INTERPRET=1`` and so run on the CPU, in Python."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    kernels = importlib.import_module(f"{__name__}.kernels.gram")
    return isinstance(kernels.add_gradients, interpreter.InterpretedFunction)
