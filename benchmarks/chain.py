"""The yardstick of ops that chain many products: the same products, bare, into memory that is there already.

Forward and backward are three times the forward's (each product has two gradients): making the forward again is the
op's cost and not the yardstick's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contender import BOTH, FORWARD, PRODUCT, Contender

LARGEST_OPERAND = {"cpu": 8 * 2**20, "cuda": 2**30}
"""Bytes of the largest operand or result: on a CPU it stays in the cache, as a block of an op does; on a GPU it only
has to leave room for the methods."""


@dataclass(frozen=True)
class Product:
    """``times`` products ``[rows, inner] x [inner, columns]``."""

    rows: int
    inner: int
    columns: int
    times: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times


def bare_chain(products: Sequence[Product], dtype: torch.dtype, device: torch.device) -> Contender:
    """Products one after another; many rows are taken in blocks, many small products in batches."""
    generator = torch.Generator(device).manual_seed(1)
    calls = [_call(product, dtype, device, generator) for product in products if product.flops]

    def forward() -> Sequence[Tensor]:
        return [call() for call in calls]

    def forward_backward() -> Sequence[Tensor]:
        return [call() for _ in range(3) for call in calls]

    return Contender(
        PRODUCT,
        "torch.bmm",
        dtype,
        device,
        {FORWARD: forward, BOTH: forward_backward},
        graph=None,
        owned_bytes={FORWARD: 0, BOTH: 0},  # all there before a call
        needed_bytes={},
    )


def _call(
    product: Product, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Callable[[], Tensor]:
    limit = LARGEST_OPERAND[device.type] // dtype.itemsize
    wide = max(product.inner, product.columns)
    rows = min(product.rows, max(limit // wide // 128 * 128, 128))
    together = min(product.times, max(limit // (rows * wide), 1))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    left, right = random(together, rows, product.inner), random(together, product.inner, product.columns)
    result = random(together, rows, product.columns)
    parts = [(min(together, product.times - t), t) for t in range(0, product.times, together)]
    blocks = [min(rows, product.rows - r) for r in range(0, product.rows, rows)]

    def call() -> Tensor:
        for number, _ in parts:
            for high in blocks:
                torch.bmm(left[:number, :high], right[:number], out=result[:number, :high])
        return result

    return call
