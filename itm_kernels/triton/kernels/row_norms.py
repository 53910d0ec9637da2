# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Rows to length 1 behind a bias, and the way back.

    x = y + b      out = x / (|x| + eps)      dy = (dout - out (out . dout) (|x| + eps) / |x|) / (|x| + eps)

Owner: a program owns some rows and walks their width twice. Read: each array twice, the second time from the cache.
Never in memory: x. Float32, no atomics. The trick: both work in place, and the backward needs the rows as they came out
and one number a row; a sum of such rows (a pooled vector) takes the same backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build, arguments
from itm_kernels.triton.kernels.squared_difference import load_rows, store_rows
from itm_kernels.triton.kernels.words import EPS
from itm_kernels.triton.pair_tiles import ROWS, WIDTH


@triton.jit
def normalise_rows(
    rows, bias, norms, rounded, count, width, ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    # In place; ROUNDS: products want them in another dtype as well.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        m_column = o_column < width
        x = load_rows(rows, o_row, o_column, width, m_row[:, None] & m_column[None, :])
        x += tl.load(bias + o_column, mask=m_column, other=0.0)[None, :]
        total += tl.sum(x * x, 1)
    norm = tl.sqrt_rn(total)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        m_column = o_column < width
        mask = m_row[:, None] & m_column[None, :]
        x = load_rows(rows, o_row, o_column, width, mask)
        x += tl.load(bias + o_column, mask=m_column, other=0.0)[None, :]
        x = x / (norm + EPS)[:, None]
        store_rows(rows, o_row, o_column, width, mask, x)
        if ROUNDS:
            store_rows(rounded, o_row, o_column, width, mask, x)
    tl.store(norms + o_row, norm, mask=m_row)


@triton.jit
def normalise_rows_backward(
    rows, norms, grad, rounded, count, width, ROUNDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    # The gradient is overwritten; ROUNDS: products want it in another dtype as well.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    norm = tl.load(norms + o_row, mask=m_row, other=0.0)
    along = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_column < width)[None, :]
        x = load_rows(rows, o_row, o_column, width, mask)
        along += tl.sum(x * load_rows(grad, o_row, o_column, width, mask), 1)
    scale = tl.where(norm == 0.0, 0.0, 1.0 / (norm + EPS))
    pull = tl.where(norm == 0.0, 0.0, along * (norm + EPS) / norm)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_column < width)[None, :]
        x = load_rows(rows, o_row, o_column, width, mask)
        dy = (load_rows(grad, o_row, o_column, width, mask) - x * pull[:, None]) * scale[:, None]
        store_rows(grad, o_row, o_column, width, mask, dy)
        if ROUNDS:
            store_rows(rounded, o_row, o_column, width, mask, dy)


def _builds() -> list[Build]:
    blocks = {"BLOCK_N": ROWS, "BLOCK_D": WIDTH}
    types = {name: "*fp32" for name in ("rows", "bias", "norms", "grad")}
    builds = []
    for rounded in ("bf16", "fp32"):
        constants = blocks | {"ROUNDS": rounded != "fp32"}
        for kernel in (normalise_rows, normalise_rows_backward):
            signature = arguments(kernel, types | {"rounded": f"*{rounded}"}, **constants)
            builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=(rounded,)))
    return builds


AHEAD_OF_TIME = _builds()
