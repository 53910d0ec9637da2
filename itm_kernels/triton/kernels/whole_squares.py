# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Squared differences of whole images v_g and whole captions t_s, and back, around a library product.

    x_gs = (v_g - t_s)^2        dv_g = 2 sum_s (v_g - t_s) dx_gs        dt_s = 2 sum_g (t_s - v_g) dx_gs

Row ``g S + s`` of x is segment s facing key group g. Owner: forward has one program some rows and columns; the backward
one row of a side and some columns, which walks the other side: one order, no atomics. Read: rows of x once a side.
Never in memory: differences. Float32 inside. The trick: the two sides differ by strides alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.gates import owned_tile
from itm_kernels.triton.kernels.squared_difference import load_rows, load_tile, store_tile
from itm_kernels.triton.pair_tiles import ROWS, SUM_WIDTH, WHOLE_ROWS, WIDTH


@triton.jit
def whole_squares(
    images, captions, squares, pairs, num_segments, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    _, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    mask = (row < pairs - first)[:, None] & (o_column < width)[None, :]
    pair = first + row
    d = load_rows(images, pair // num_segments, o_column, width, mask)
    d -= load_rows(captions, pair % num_segments, o_column, width, mask)
    store_tile(squares, first, row, o_column, width, mask, d * d)


@triton.jit
def whole_squares_backward(
    own, other, grad_squares, grad_own, others, stride_own, stride_other, width, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    mine, first, _, o_column = owned_tile(width, 1, BLOCK_D)
    m_column = o_column < width
    one = tl.zeros([1], tl.int32)
    x = load_tile(own, first, one, o_column, width, m_column[None, :])
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, others, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        mask = (row < others)[:, None] & m_column[None, :]
        d = x - load_rows(other, row, o_column, width, mask)
        pair = tl.cast(mine, tl.int64) * stride_own + row.to(tl.int64) * stride_other
        total += tl.sum(2.0 * d * load_rows(grad_squares, pair, o_column, width, mask), 0)
    at = tl.cast(mine, tl.int64) * width + o_column
    tl.store(grad_own + at, tl.load(grad_own + at, mask=m_column, other=0.0) + total, mask=m_column)


def _builds() -> list[Build]:
    builds = []
    for element in ARGUMENT_TYPES:
        types = {name: f"*{element}" for name in ("images", "captions", "squares", "own", "other", "grad_squares")}
        types["grad_own"] = "*fp32"
        for kernel, rows, width in ((whole_squares, ROWS, WIDTH), (whole_squares_backward, WHOLE_ROWS, SUM_WIDTH)):
            constants = {"BLOCK_N": rows, "BLOCK_D": width}
            signature = arguments(kernel, types, **constants)
            builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
