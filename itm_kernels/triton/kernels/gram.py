# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Gram matrices of ragged groups, norms of rows, and all that comes back to the rows.

    G = K K^T      dK += dS^T Q + (dG + dG^T) K      dQ += dS K + (dL/d|q| / |q|) Q

Owner: a block of one group's G, or a block of its gradient rows, has one program, which walks D (or the group's keys):
one order, no atomics. Read: the rows, and the library's products with dS. Accumulation float32; half-precision rows
meet dG in float32. Groups are ragged and rows packed, which no batched library product takes without padding: that is
why these are kernels of our own. The trick: rows of a gradient are read and written once, where they belong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments, listed
from itm_kernels.triton.directions import RowGradients


@triton.jit
def _load_rows(rows, first, row, m_row, o_column, width):
    """Some columns of rows ``first + row``, 0 outside. Only the first row's offset needs 64 bits."""
    mask = m_row[:, None] & (o_column < width)[None, :]
    at = row[:, None] * width + o_column[None, :]
    return tl.load(rows + tl.cast(first, tl.int64) * width + at, mask=mask, other=0.0)


@triton.jit
def blocks_of_rows(side, BLOCK_K: tl.constexpr):
    """Programs that `describe` a side."""
    programs = tl.cdiv(side.n, BLOCK_K)
    if side.grams is not None:
        programs = side.groups * tl.cdiv(side.most, BLOCK_K) * tl.cdiv(side.most, BLOCK_K)
    return programs


@triton.jit
def describe(side, program, width, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gram matrices (not written outside a group), norms of rows, or both."""
    row = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    if side.grams is None:
        first = program * BLOCK_K
        m_row = row < side.n - first
        for start in range(0, width, BLOCK_D):
            x = _load_rows(side.rows, first, row, m_row, start + tl.arange(0, BLOCK_D), width).to(tl.float32)
            squares += tl.sum(x * x, 1)
        tl.store(side.norms + first + row, tl.sqrt_rn(squares), mask=m_row)
    else:
        blocks = tl.cdiv(side.most, BLOCK_K)
        group = (program // (blocks * blocks)).to(tl.int64)
        o_left = (program // blocks % blocks) * BLOCK_K + row
        o_right = (program % blocks) * BLOCK_K + row
        first, count = tl.load(side.offsets + group), tl.load(side.counts + group)
        total = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
        for start in range(0, width, BLOCK_D):
            o_column = start + tl.arange(0, BLOCK_D)
            left = _load_rows(side.rows, first, o_left, o_left < count, o_column, width)
            right = _load_rows(side.rows, first, o_right, o_right < count, o_column, width)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
            if side.norms is not None:
                x = left.to(tl.float32)
                squares += tl.sum(x * x, 1)
        at = o_left[:, None] * side.most + o_right[None, :]
        mask = (o_left < count)[:, None] & (o_right < count)[None, :]
        tl.store(side.grams + group * side.most * side.most + at, total, mask=mask)
        if side.norms is not None and program % blocks == 0:
            tl.store(side.norms + first + o_left, tl.sqrt_rn(squares), mask=o_left < count)


@triton.jit
def _add_gradient(
    side, program, width, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    across, down = tl.cdiv(width, BLOCK_D), tl.cdiv(side.most, BLOCK_K)
    group = (program // (across * down)).to(tl.int64)
    o_key = (program // across % down) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_column = (program % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, count = tl.load(side.offsets + group), tl.load(side.counts + group).to(tl.int32)
    m_key = o_key < count
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    if side.own is not None:
        scale = tl.load(side.own + first + o_key, mask=m_key, other=0.0)
        total += _load_rows(side.rows, first, o_key, m_key, o_column, width).to(tl.float32) * scale[:, None]
    if side.grad_gram is not None:
        for start in range(0, count, BLOCK_O):
            o_other = start + tl.arange(0, BLOCK_O)
            mask = m_key[:, None] & (o_other < count)[None, :]
            base = side.grad_gram + group * side.most * side.most
            factor = tl.load(base + o_key[:, None] * side.most + o_other[None, :], mask=mask, other=0.0)
            factor += tl.load(base + o_other[None, :] * side.most + o_key[:, None], mask=mask, other=0.0)
            other = _load_rows(side.rows, first, o_other, o_other < count, o_column, width).to(tl.float32)
            total = tl.dot(factor, other, total, input_precision=PRECISION)
    total += _load_rows(side.product, first, o_key, m_key, o_column, width)
    place = first
    if side.extent is not None:
        place = group * side.extent
    total += _load_rows(side.gradient, place, o_key, m_key, o_column, width)
    at = o_key[:, None] * width + o_column[None, :]
    tl.store(side.gradient + place * width + at, total, mask=m_key[:, None] & (o_column < width)[None, :])


@triton.jit
def add_gradients(
    sides, width, SIDES: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(SIDES):
        programs = sides[i].groups * tl.cdiv(sides[i].most, BLOCK_K) * tl.cdiv(width, BLOCK_D)
        if (program >= 0) & (program < programs):
            _add_gradient(sides[i], program, width, PRECISION, BLOCK_K, BLOCK_O, BLOCK_D)
        program -= programs


def _builds() -> list[Build]:
    tables = {"offsets": "*i64", "counts": "*i64"}
    tables |= {name: "*fp32" for name in ("grad_gram", "own", "product", "gradient")}
    builds = []
    for element, (precision, _) in ARGUMENT_TYPES.items():
        types = tables | {"rows": f"*{element}"}
        constants = {"BLOCK_K": tiles.GRAM_KEYS, "BLOCK_D": tiles.GRAM_WIDTH, "PRECISION": precision, "SIDES": 2}
        constants |= {"BLOCK_O": tiles.GRADIENT_KEYS}
        sides = listed(RowGradients, types, extent=None), listed(RowGradients, types)
        signature = arguments(add_gradients, {"sides": sides}, **constants)
        builds.append(Build(add_gradients, signature, constants, num_warps=tiles.GRADIENT_WARPS, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
