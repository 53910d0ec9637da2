"""Registration of opaque ops: schema, implementation, fake.

``torch.library.custom_op`` would bring an autograd kernel of its own, which breaks ``torch.func.grad`` inside a
backward; these ops have none. Differentiation is the business of the ``autograd.Function`` above them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("itm_kernels", "DEF")


def define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register ``itm_kernels::<name>`` and return it as a callable.

    The autograd keys fall through instead of being excluded: the floor ``reference`` differentiates its own formula
    inside the backward op, which needs a working autograd there. Nothing leaks, every implementation here runs without
    gradient recording.
    """

    def run(*args: Any) -> Any:
        # The inputs have the dtype that autocast asks for already; inside, it would take the epilogue down as well.
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        # A dispatch mode (a FLOP counter, opcheck) calls with autograd excluded: have it back.
        back = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with torch.no_grad(), torch.autocast(device, enabled=False), back:
            return implementation(*args)

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"itm_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.itm_kernels, name).default
