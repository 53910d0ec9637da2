# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Queries less what they attend to, squared, and the way back.

    d = q - c / (|c| + eps)      out = d^2      dq += 2 d dout      dc = -s (2 d dout + x c),  s = 1 / (|c| + eps)

Row ``g L + l`` of c, out and their gradients is query l facing key group g. Owner: forward and `attended_slopes` have
one program some rows, which walks their width twice or once; the backward has one program some queries and a slice of
the width, which walks the groups, where the gradients of a query meet: one order, no atomics. Read: each array twice,
or once behind the slopes. Never in memory: c over its norm, d. Float32 inside, rows in the dtype of products. The
trick: the norm of c comes from the row itself, which is read anyway, so no Gram matrix is needed; its slope x is one
number a row, which lets the backward cut the width into slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.words import EPS
from itm_kernels.triton.pair_tiles import ROWS, SUM_ROWS, SUM_WIDTH, WIDTH


@triton.jit
def load_rows(rows, o_row, o_column, width, mask):
    """Columns of rows in float32, 0 outside."""
    at = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
    return tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(rows, o_row, o_column, width, mask, x):
    at = o_row.to(tl.int64)[:, None] * width + o_column[None, :]
    tl.store(rows + at, x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(rows, first, row, o_column, width, mask):
    """The same of rows ``first + row``: offsets inside a tile take 32 bits, half the registers."""
    at = row[:, None] * width + o_column[None, :]
    return tl.load(rows + tl.cast(first, tl.int64) * width + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(rows, first, row, o_column, width, mask, x):
    at = row[:, None] * width + o_column[None, :]
    tl.store(rows + tl.cast(first, tl.int64) * width + at, x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def squared_differences(
    queries, attended, squares, norms, rows, num_queries, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < rows
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        c = load_rows(attended, o_row, o_column, width, m_row[:, None] & (o_column < width)[None, :])
        total += tl.sum(c * c, 1)
    norm = tl.sqrt_rn(total)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_column < width)[None, :]
        c = load_rows(attended, o_row, o_column, width, mask)
        d = load_rows(queries, o_row % num_queries, o_column, width, mask) - c / (norm + EPS)[:, None]
        store_rows(squares, o_row, o_column, width, mask, d * d)
    tl.store(norms + o_row, norm, mask=m_row)


@triton.jit
def attended_slopes(
    queries, attended, grad_squares, norms, slopes, rows, num_queries, width, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < rows
    norm = tl.load(norms + o_row, mask=m_row, other=0.0)
    scale = 1.0 / (norm + EPS)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_column < width)[None, :]
        c = load_rows(attended, o_row, o_column, width, mask)
        d = load_rows(queries, o_row % num_queries, o_column, width, mask) - c * scale[:, None]
        total -= tl.sum(2.0 * d * load_rows(grad_squares, o_row, o_column, width, mask) * c, 1)
    tl.store(slopes + o_row, tl.where(norm == 0.0, 0.0, total * scale / norm), mask=m_row)


@triton.jit
def squared_differences_backward(
    queries, attended, grad_squares, norms, slopes, grad_queries, groups, num_queries, width, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # What is attended to is overwritten by its gradient.
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_D)
    first, row = (program // across) * BLOCK_N, tl.arange(0, BLOCK_N)
    o_column = (program % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_query = row < num_queries - first
    mask = m_query[:, None] & (o_column < width)[None, :]
    q = load_tile(queries, first, row, o_column, width, mask)
    total = load_tile(grad_queries, first, row, o_column, width, mask)
    for group in range(0, groups):
        base = tl.cast(group, tl.int64) * num_queries + first
        norm = tl.load(norms + base + row, mask=m_query, other=0.0)
        slope = tl.load(slopes + base + row, mask=m_query, other=0.0)
        scale = 1.0 / (norm + EPS)
        c = load_tile(attended, base, row, o_column, width, mask)
        twice = 2.0 * (q - c * scale[:, None]) * load_tile(grad_squares, base, row, o_column, width, mask)
        total += twice
        # The slope belongs to the gradient at c / (|c| + eps), which is minus that at q.
        of_attended = -tl.where(norm == 0.0, 0.0, scale)[:, None] * (twice + slope[:, None] * c)
        store_tile(attended, base, row, o_column, width, mask, of_attended)
    store_tile(grad_queries, first, row, o_column, width, mask, total)


def _builds() -> list[Build]:
    builds = []
    for element in ARGUMENT_TYPES:
        types = {name: f"*{element}" for name in ("queries", "attended", "squares", "grad_squares")}
        types |= {name: "*fp32" for name in ("norms", "slopes", "grad_queries")}
        for kernel, blocks in (
            (squared_differences, (ROWS, WIDTH)),
            (attended_slopes, (ROWS, WIDTH)),
            (squared_differences_backward, (SUM_ROWS, SUM_WIDTH)),
        ):
            constants = dict(zip(("BLOCK_N", "BLOCK_D"), blocks, strict=True))
            signature = arguments(kernel, types, **constants)
            builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
