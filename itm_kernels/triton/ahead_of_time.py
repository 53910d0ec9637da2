"""How a kernel may be compiled without a GPU: declared beside the kernel, read by the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from itm_kernels.triton import tiles
from itm_kernels.triton.configurations import Table
from itm_kernels.triton.directions import Direction

ARGUMENT_TYPES = {"bf16": ("tf32", 2), "fp32": ("tf32x3", 4)}
"""Element type of rows and products -> precision of float32 tiles, bytes."""


@dataclass(frozen=True)
class Constant:
    """A field of a tuple whose value the compiler knows."""

    value: Any


@dataclass(frozen=True)
class Build:
    """One set of argument types and constants of a kernel, as its launch chooses them."""

    kernel: Any
    signature: dict[str, Any]  # types by name; tuples of types, or of tuples
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    tensor_cores: bool = True
    """Whether there must be matrix instructions; False for kernels without a product."""
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Test id."""
        return "-".join((self.kernel.__name__, *self.labels))

    def on(self, arch: Table) -> Build:
        """As launched on an architecture."""
        return self

    def source(self) -> tuple[dict[str, Any], dict[Any, Any], dict[tuple[int, ...], Any]]:
        """Signature, constants and attributes, as the compiler takes them: what lies in tuples by its path."""
        constants: dict[Any, Any] = dict(self.constants)
        attributes: dict[tuple[int, ...], Any] = {}

        def typed(kind: Any, path: tuple[int, ...]) -> Any:
            if isinstance(kind, Constant):
                constants[path] = kind.value
                return "constexpr"
            if isinstance(kind, tuple):
                fields = [typed(field, (*path, at)) for at, field in enumerate(kind)]
                return type(kind)(*fields) if hasattr(kind, "_fields") else tuple(fields)
            if kind[0] == "*":  # as torch allocates; sizes and strides are any number
                attributes[path] = [["tt.divisibility", 16]]
            return kind

        signature = {name: typed(kind, (at,)) for at, (name, kind) in enumerate(self.signature.items())}
        return signature, constants, attributes

    def with_sizes_of_one(self) -> Build:
        """As launched where every size and stride is 1: an integer of 1 becomes a constant."""

        def one(kind: Any) -> Any:
            if isinstance(kind, tuple):
                return type(kind)(*map(one, kind)) if hasattr(kind, "_fields") else tuple(map(one, kind))
            return Constant(1) if kind in ("i32", "i64") else kind

        return replace(self, signature={name: one(kind) for name, kind in self.signature.items()})


_SIZES = ("groups", "most", "n", "extent", "parts", "tiles", "num_queries", "num_keys", "num_segments")


def listed(kind: Any, types: dict[str, Any], **constants: Any) -> Any:
    """A tuple of ``directions`` with the types of its fields; a field that is not named is not there."""
    fields: list[Any] = []
    for name in kind._fields:
        if name in constants:
            fields.append(Constant(constants[name]))
        elif name.startswith("stride_"):
            fields.append("i64")
        elif name in _SIZES:
            fields.append("i32")
        else:
            fields.append(types.get(name, Constant(None)))
    return kind(*fields)


def forward_types(element: str) -> dict[str, str]:
    """Of a `Direction`, as every kernel behind the products has it."""
    types = {name: "*i64" for name in ("key_offsets", "key_counts", "offsets", "counts")}
    types |= {name: "*fp32" for name in ("factors", "tops", "gram", "query_norms", "state")}
    return types | {"products": f"*{element}", "key_groups": "*i32", "segments": "*i32"}


def backward_types(element: str) -> dict[str, str]:
    """The same in the backward."""
    gradients = {name: "*fp32" for name in ("grad_scores", "grad_gram", "own")}
    return forward_types(element) | gradients | {name: f"*{element}" for name in ("grad_features", "grad_direct")}


def arguments(kernel: Any, pointers: dict[str, Any], **constants: Any) -> dict[str, Any]:
    """Signature of ``kernel``: constants, the named pointers, floats by their names, all else 32-bit integers.

    Strides are 64-bit, as launches of large blocks have them.
    """
    signature: dict[str, Any] = {}
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


@dataclass(frozen=True)
class AttentionBuild(Build):
    """A build whose classes of key groups, block and warps depend on the architecture."""

    keys: tuple[tuple[int, ...], ...] = ()  # of each direction
    element_bytes: int = 0

    def on(self, arch: Table) -> Build:
        chosen = tiles.choose_tiles(self.kernel.__name__, self.keys, self.element_bytes, arch)
        constants = self.constants | chosen.constants
        return replace(self, constants=constants, num_warps=chosen.num_warps, num_stages=chosen.num_stages)


def attention_builds(kernel: Any, types: Callable[[str], dict[str, str]], **constants: Any) -> list[Build]:
    """Builds of a kernel over key groups: regions, captions of every class and longer ones, and both."""
    regions, captions = (48,), (*tiles.CLASSES, tiles.BEYOND)
    builds: list[Build] = []
    for element, (precision, element_bytes) in ARGUMENT_TYPES.items():
        along, across = (listed(Direction, types(element), **{f"stride_{way}": 1}) for way in ("key", "query"))
        chosen = {"NORM": "l2norm", "CLIPPED": True, "FOCAL": "prob", "PRECISION": precision, **constants}
        for label, directions, keys in (
            ("t2i", (along,), (regions,)),
            ("i2t", (along,), (captions,)),
            ("both", (along, across), (regions, captions)),
        ):
            ours = tiles.Tiles((), (), block_q=0, num_warps=0, num_stages=0).constants  # by name alone
            signature = arguments(kernel, {"directions": directions}, **chosen, **ours)
            builds.append(
                AttentionBuild(
                    kernel, signature, chosen, labels=(element, label), keys=keys, element_bytes=element_bytes
                )
            )
    return builds
