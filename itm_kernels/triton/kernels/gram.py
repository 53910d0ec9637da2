# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Gram matrices of ragged groups, norms of rows, and the way back of both to the rows.

    G = K K^T      dK += (dG + dG^T) K      dQ += (dL/d|q| / |q|) Q

Owner: a block of one group's G, or a block of its gradient rows, has one program, which walks D (or the group's keys):
one order, no atomics. Read: the rows. Accumulation float32; half-precision rows meet dG in float32. Groups are ragged
and rows packed, which no batched library product takes without padding: that is why these are kernels of our own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments


@triton.jit
def _load_rows(rows, first, row, m_row, o_column, width):
    """Some columns of rows ``first + row``, 0 outside. Only the first row's offset needs 64 bits."""
    mask = m_row[:, None] & (o_column < width)[None, :]
    at = row[:, None] * width + o_column[None, :]
    return tl.load(rows + tl.cast(first, tl.int64) * width + at, mask=mask, other=0.0)


@triton.jit
def gram(
    rows,  # [n, width]
    offsets, counts,  # [groups + 1], [groups] int64
    grams,  # [groups, most, most] float32, out; not written outside a group
    most, width,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(most, BLOCK_K)
    group = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    o_left = (tl.program_id(0) // blocks % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_right = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    first, count = tl.load(offsets + group), tl.load(counts + group)
    total = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        left = _load_rows(rows, first, o_left, o_left < count, o_column, width)
        right = _load_rows(rows, first, o_right, o_right < count, o_column, width)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    at = o_left[:, None] * most + o_right[None, :]
    tl.store(grams + group * most * most + at, total, mask=(o_left < count)[:, None] & (o_right < count)[None, :])


@triton.jit
def row_norms(
    rows, norms,  # [n, width]; [n] float32, out
    n, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        x = _load_rows(rows, first, row, row < n - first, start + tl.arange(0, BLOCK_D), width).to(tl.float32)
        total += tl.sum(x * x, 1)
    tl.store(norms + first + row, tl.sqrt_rn(total), mask=row < n - first)


@triton.jit
def own_gradient(
    rows,  # [n, width]
    offsets, counts,
    grad_gram,  # [groups, most, most] float32
    own,  # [n] float32
    gradient,  # [n, width] float32, added to
    most, width,
    HAS_GRAM: tl.constexpr, HAS_OWN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    across, down = tl.cdiv(width, BLOCK_D), tl.cdiv(most, BLOCK_K)
    group = (tl.program_id(0) // (across * down)).to(tl.int64)
    o_key = (tl.program_id(0) // across % down) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_column = (tl.program_id(0) % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = tl.load(offsets + group), tl.load(counts + group).to(tl.int32)
    m_key = o_key < count
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if HAS_OWN:
        scale = tl.load(own + first + o_key, mask=m_key, other=0.0)
        total += _load_rows(rows, first, o_key, m_key, o_column, width).to(tl.float32) * scale[:, None]
    if HAS_GRAM:
        for start in range(0, count, BLOCK_K):
            o_other = start + tl.arange(0, BLOCK_K)
            mask = m_key[:, None] & (o_other < count)[None, :]
            base = grad_gram + group * most * most
            factor = tl.load(base + o_key[:, None] * most + o_other[None, :], mask=mask, other=0.0)
            factor += tl.load(base + o_other[None, :] * most + o_key[:, None], mask=mask, other=0.0)
            other = _load_rows(rows, first, o_other, o_other < count, o_column, width).to(tl.float32)
            total = tl.dot(factor, other, total, input_precision=PRECISION)
    total += _load_rows(gradient, first, o_key, m_key, o_column, width)
    at = o_key[:, None] * width + o_column[None, :]
    tl.store(gradient + first * width + at, total, mask=m_key[:, None] & (o_column < width)[None, :])


def _builds() -> list[Build]:
    tables = {"offsets": "*i64", "counts": "*i64"}
    tables |= {name: "*fp32" for name in ("grams", "norms", "grad_gram", "own", "gradient")}
    blocks = {"BLOCK_K": tiles.GRAM_KEYS, "BLOCK_D": tiles.GRAM_WIDTH}
    builds = []
    for element, (precision, _) in ARGUMENT_TYPES.items():
        types = tables | {"rows": f"*{element}"}
        dots = blocks | {"PRECISION": precision}
        for kernel, constants in ((gram, dots), (own_gradient, dots | {"HAS_GRAM": True, "HAS_OWN": True})):
            signature = arguments(kernel, types, **constants)
            builds.append(Build(kernel, signature, constants, num_warps=tiles.GRAM_WARPS, labels=(element,)))
        constants = {"BLOCK_N": tiles.NORM_ROWS, "BLOCK_D": tiles.NORM_WIDTH}
        signature = arguments(row_norms, types, **constants)
        builds.append(Build(row_norms, signature, constants, tensor_cores=False, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
