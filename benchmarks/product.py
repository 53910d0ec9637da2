"""The yardstick: an op's FLOPs as bare library products of packed vectors, into memory that is there already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.contender import BOTH, FORWARD, PRODUCT, Contender

LARGEST_PRODUCT = 16 * 2**30
"""Bytes from which on the product is made in blocks of rows, each still thousands of rows high: what is left of a GPU
must hold the methods."""
ROWS_TOGETHER = 128  # a multiple of the libraries' tiles


def bare_products(rows: Tensor, columns: Tensor) -> Contender:  # [M, K], [N, K]
    """Forward ``S = rows columns^T``; forward and backward four products: ``S``, ``S`` again, ``dS columns``,
    ``dS^T rows``."""
    rows, columns = rows.detach(), columns.detach()
    high = block_rows(rows.shape[0], columns.shape[0] * rows.element_size())
    # Written to, so that their pages are there: fresh memory costs a page fault every 4 KiB.
    products = rows.new_empty(high, columns.shape[0]).fill_(1)
    of_rows, of_columns = rows.clone(), columns.clone()
    blocks = [slice(first, min(first + high, rows.shape[0])) for first in range(0, rows.shape[0], high)]

    def forward() -> Sequence[Tensor]:
        for block in blocks:
            torch.mm(rows[block], columns.t(), out=products[: block.stop - block.start])
        return (products,)

    def forward_backward() -> Sequence[Tensor]:
        for block in blocks:
            part = products[: block.stop - block.start]
            torch.mm(rows[block], columns.t(), out=part)
            torch.mm(rows[block], columns.t(), out=part)
            torch.mm(part, columns, out=of_rows[block])
            if block.start == 0:
                torch.mm(part.t(), rows[block], out=of_columns)
            else:
                torch.addmm(of_columns, part.t(), rows[block], out=of_columns)
        return products, of_rows, of_columns

    return Contender(
        PRODUCT,
        "torch.mm" if len(blocks) == 1 else f"torch.mm, blocks of {high} rows",
        rows.dtype,
        rows.device,
        {FORWARD: forward, BOTH: forward_backward},
        graph=None,
        owned_bytes={FORWARD: 0, BOTH: 0},  # all there before a call
        needed_bytes={},
    )


def block_rows(rows: int, row_bytes: int) -> int:
    """Rows of a block: all of them where the product is small enough, else as even blocks as tiles allow."""
    blocks = -(-rows * row_bytes // LARGEST_PRODUCT)
    if blocks <= 1:
        return rows
    even = -(-rows // blocks)
    return -(-even // ROWS_TOGETHER) * ROWS_TOGETHER
