"""How a kernel may be compiled without a GPU: declared beside the kernel, read by the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from itm_kernels.triton.configurations import Configuration, Table
from itm_kernels.triton.tiles import CLASSES, STREAMED_KEYS, key_columns

ARGUMENT_TYPES = {"bf16": ("tf32", 2), "fp32": ("tf32x3", 4)}
"""Element type of rows and products -> precision of float32 tiles, bytes."""


@dataclass(frozen=True)
class Build:
    """One set of argument types and constants of a kernel, as its launch chooses them."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    tensor_cores: bool = True
    """Whether there must be matrix instructions; False for kernels without a product."""
    small_dots: str = ""
    """Why sm_90 and sm_100 may run the products on the warp-level instruction; empty: they may not."""
    labels: tuple[str, ...] = ()
    configure: Callable[[Table], Configuration | None] | None = None
    """Where block size, warps and stages depend on the architecture; None of it: the kernel is not launched there."""

    @property
    def name(self) -> str:
        """Test id."""
        return "-".join((self.kernel.__name__, *self.labels))

    def on(self, arch: Table) -> Build | None:
        """As launched on an architecture, if it is."""
        if self.configure is None:
            return self
        chosen = self.configure(arch)
        if chosen is None:
            return None
        constants = self.constants | {"BLOCK_Q": chosen.block_q}
        return replace(self, constants=constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages)


def arguments(kernel: Any, pointers: dict[str, str], **constants: Any) -> dict[str, str]:
    """Signature of ``kernel``: constants, the named pointers, floats by their names, all else 32-bit integers.

    Strides are 64-bit, as launches of large blocks have them.
    """
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = pointers[name]
        elif name.startswith("lambda_") or name.endswith("_weight"):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name.startswith("stride_") else "i32"
    return signature


def attention_builds(
    kernels: dict[Any, str], pointers: dict[str, str], constants: dict[str, Any], *, small_dots: str = ""
) -> list[Build]:
    """Builds of kernels over key groups: half precision and float32, every class of key columns."""
    builds = []
    for element, (precision, element_bytes) in ARGUMENT_TYPES.items():
        typed = pointers | {name: f"*{element}" for name in ("products", "grad_features", "grad_direct")}
        for kernel, name in kernels.items():
            streamed = name.endswith("_streamed")
            for keys in (STREAMED_KEYS,) if streamed else CLASSES:
                main, rest = key_columns(keys)
                columns = {"BLOCK_K": keys} if streamed else {"MAIN": main, "REST": rest}
                chosen = constants | {"PRECISION": precision, "FLOOR": 0, "BLOCK_Q": 64, **columns}
                builds.append(
                    Build(
                        kernel,
                        arguments(kernel, typed, **chosen),
                        chosen,
                        small_dots=small_dots,
                        labels=(element,) if streamed else (element, f"{main}+{rest}"),
                        configure=partial(_configuration, name, keys, element_bytes),
                    )
                )
    return builds


def _configuration(kernel: str, keys: int, element_bytes: int, arch: Table) -> Configuration | None:
    return arch.find(kernel, keys, element_bytes)
