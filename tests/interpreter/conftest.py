"""Makes Triton's interpreter cheaper, in the processes that run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from itm_kernels import triton as floor


@pytest.fixture(scope="session", autouse=True)
def _patched_once() -> Iterator[None]:
    """The interpreter patches Triton's language at every launch, and again at every call of a device function.

    The latter is a third of its time and changes nothing from the second call of a module's functions on.
    """
    if floor.load_error() is not None or not floor.interprets():
        yield
        return
    from triton.runtime import interpreter

    patched: set[str] = set()
    call = interpreter.InterpretedFunction.__call__

    def call_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_patched
    yield
    interpreter.InterpretedFunction.__call__ = call
