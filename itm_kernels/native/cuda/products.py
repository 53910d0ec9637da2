"""Library products of a block: their memory, and sums of them."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 8
"""Elements; as in ``csrc/common/device_scores_plan.h``. The library's fast kernels for half precision want rows of
products to begin at multiples of 16 bytes, and the words of a block are any number."""


def empty_products(queries: Tensor, keys: Tensor) -> Tensor:  # [q, D], [k, D] -> [q, k]
    """Uninitialised, every row aligned."""
    columns = keys.shape[0]
    padded = (columns + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return queries.new_empty(queries.shape[0], padded)[:, :columns]


def products_of(queries: Tensor, keys: Tensor) -> Tensor:  # [q, D], [k, D] -> [q, k]
    """Inner products of every query with every key."""
    return torch.mm(queries, keys.t(), out=empty_products(queries, keys))


def add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """``out = left @ right``, or ``+=``; accumulated in float32 whatever the operands are."""
    if left.dtype == torch.float32:
        if first:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
    elif left.device.type == "cuda":
        # Accumulates in the library: a product of its own would be rounded to half precision, and read again.
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, beta=0 if first else 1, out=out)
    else:
        product = left.float() @ right.float()
        out.copy_(product) if first else out.add_(product)
