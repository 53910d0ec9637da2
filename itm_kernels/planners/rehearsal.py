"""Calls gone through without their work: what they would launch, multiply and hold, counted as they go.

Where a plan follows from Python rather than from a formula, the floor itself is the plan: its tensors are on torch's
meta device, which has shapes and no values, or few and small; raw kernels are counted and not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NATIVE = "itm_kernels_native"
# Where the factors of a product stand among the arguments.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


@dataclass
class Counted:
    """What was counted."""

    launches: int = 0
    """Kernels, products, and operators of torch that are neither views nor allocations."""
    steps: int = 0
    """Kernels and products alone."""
    flops: int = 0
    """Of products of matrices; a multiply-add counts 2."""
    peak_bytes: int = 0
    """Most memory held at once, on the meta device."""
    held: dict[StorageWeakRef, int] = field(default_factory=dict)


class Rehearsal(TorchDispatchMode):
    """Counts what a call would do to tensors on ``device_type``."""

    def __init__(self, device_type: str, but_for: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.but_for = but_for
        self.counted = Counted()
        self.device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        counted = self.counted
        namespace, name = func._schema.name.split("::")
        if namespace == NATIVE:
            counted.launches += 1
            counted.steps += 1
            # On the CPU the values are few, and others are made from them.
            return func(*args, **kwargs) if self.device_type == "cpu" else None
        # Torch has no shapes for the one overload that adds products of half precision in float32.
        out = kwargs["out"] if func is torch.ops.aten.baddbmm.dtype_out else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == self.device_type for tensor in tensors):
            return out
        place = _PRODUCTS.get(name.removesuffix("_"))
        if place is not None:
            left, right = args[place : place + 2]
            counted.flops += 2 * math.prod(left.shape) * right.shape[-1]
            counted.steps += 1
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        view = alias is not None and not alias.is_write
        if not view and name not in _ALLOCATIONS:
            counted.launches += 1
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_meta(t)}
        for tensor in tree_leaves(out):
            if _is_meta(tensor) and tuple(tensor.shape) not in self.but_for:
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in given:
                    counted.held[storage] = tensor.untyped_storage().nbytes()
        counted.held = {storage: size for storage, size in counted.held.items() if not storage.expired()}
        counted.peak_bytes = max(counted.peak_bytes, sum(counted.held.values()))
        return out


def _is_meta(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_meta


def rehearse(call: Callable[[], Any], device_type: str, *, but_for: set[tuple[int, ...]]) -> Counted:
    """What ``call`` does; its inputs are made outside it, and tensors of the shapes ``but_for`` are no workspace."""
    with Rehearsal(device_type, but_for) as rehearsal:
        kept = call()
    del kept
    counted: Counted = rehearsal.counted
    return counted


def total(counts: list[int], *, keys: int, queries: int) -> int:
    """Of ``queries x keys`` blocks, by the ``counts`` of 1 x 1, 1 x 2 and 2 x 1; of fewer where there are fewer.

    A call costs something once, something for each block of queries, and something for each block.
    """
    one, more_keys, more_queries = counts
    of_block = more_keys - one
    of_queries = more_queries - one - of_block
    return one - of_queries - of_block + queries * (of_queries + keys * of_block)
