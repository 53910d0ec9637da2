# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""The correspondence regulator between its products: tanh of rows behind a bias, the gate of queries, and back.

    out = tanh(y + b)      t = tanh(z + b)    e = clamp(t + e_before, -1, 1)    u = q e      e_before = 1 at the first
    t_r = relu(u . tanh(y + b) + c + t_before)
    du -> dq += du e,  de = du q + de_after,  dp = de where |t + e_before| <= 1, else 0,  dz = dp (1 - t^2)

Row ``g L + l`` is query l facing key group g. Owner: a program owns some rows and a slice of their width; in the
backward of the gate some queries, whose gradients over all groups meet there. Sums of a bias come back per program and
are added up by the caller: one order, no atomics. Read: each array once. Never in memory: in a forward alone, neither t
nor (at the last step) e. Float32 inside. The trick: the gradient of e_before is dp, so one array carries it from step
to step, in place; t rather than e is kept, for whether the clamp was exactly on its edge cannot be seen in e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.squared_difference import load_rows, load_tile, store_rows, store_tile
from itm_kernels.triton.pair_tiles import GATED_ROWS, ROWS, SUM_ROWS, SUM_WIDTH, WIDTH


@triton.jit
def tanh_of(x):
    """By exponentials, and near zero, where these cancel, by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    series = 1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 - s * (1382.0 / 155925)))))
    return tl.where(s < 0.09, x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def owned_tile(width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Number of the program among those that share its columns, rows from a first one on, columns."""
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_D)
    part = program // across
    return part, part * BLOCK_N, tl.arange(0, BLOCK_N), (program % across) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def tanh_rows(rows, bias, out, count, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    _, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < count - first)[:, None] & m_column[None, :]
    x = load_tile(rows, first, row, o_column, width, mask) + tl.load(bias + o_column, mask=m_column, other=0.0)[None, :]
    store_tile(out, first, row, o_column, width, mask, tanh_of(x))


@triton.jit
def warm_rows(
    rows, bias, weight, shift, before, temperature, temperatures, count, width, CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Rows are overwritten by their tanh; without CHAINED all start from one temperature.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    along = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        m_column = o_column < width
        mask = m_row[:, None] & m_column[None, :]
        x = load_rows(rows, o_row, o_column, width, mask)
        t = tanh_of(x + tl.load(bias + o_column, mask=m_column, other=0.0)[None, :])
        store_rows(rows, o_row, o_column, width, mask, t)
        along += tl.sum(t * tl.load(weight + o_column, mask=m_column, other=0.0)[None, :], 1)
    warmer = along + tl.load(shift)
    if CHAINED:
        warmer += tl.load(before + o_row, mask=m_row, other=0.0)
    else:
        warmer += temperature
    tl.store(temperatures + o_row, tl.where(warmer < 0.0, 0.0, warmer), mask=m_row)


@triton.jit
def tanh_rows_backward(
    tangents, grad, factors, out, sums, count, width, OUTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    # OUTER: the gradient at tanh is the outer product of `grad [rows]` and `factors [width]`.
    part, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < count - first)[:, None] & m_column[None, :]
    t = load_tile(tangents, first, row, o_column, width, mask)
    if OUTER:
        after = tl.load(grad + first + row, mask=row < count - first, other=0.0)[:, None]
        after = after * tl.load(factors + o_column, mask=m_column, other=0.0)[None, :]
    else:
        after = load_tile(grad, first, row, o_column, width, mask)
    before = tl.where(mask, after * (1.0 - t * t), 0.0)
    store_tile(out, first, row, o_column, width, mask, before)
    tl.store(sums + part.to(tl.int64) * width + o_column, tl.sum(before, 0), mask=m_column)


@triton.jit
def _before(gates, base, row, o_column, width, mask, CHAINED: tl.constexpr):
    return load_tile(gates, base, row, o_column, width, mask) if CHAINED else tl.where(mask, 1.0, 0.0)


@triton.jit
def gate_queries(
    queries, bias, before, rows, tangents, gates, count, num_queries, width, CHAINED: tl.constexpr,
    KEEPS: tl.constexpr, HANDS_ON: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Rows are z, overwritten by gated queries; gates may take the place of those before.
    _, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < count - first)[:, None] & m_column[None, :]
    x = load_tile(rows, first, row, o_column, width, mask) + tl.load(bias + o_column, mask=m_column, other=0.0)[None, :]
    t = tanh_of(x)
    total = t + _before(before, first, row, o_column, width, mask, CHAINED)
    gate = tl.where(total > 1.0, 1.0, tl.where(total < -1.0, -1.0, total))
    if KEEPS:
        store_tile(tangents, first, row, o_column, width, mask, t)
    if HANDS_ON:
        store_tile(gates, first, row, o_column, width, mask, gate)
    gated = load_rows(queries, (first + row) % num_queries, o_column, width, mask) * gate
    store_tile(rows, first, row, o_column, width, mask, gated)


@triton.jit
def gate_queries_backward(
    queries, before, tangents, grad, grad_gates, grad_queries, sums, groups, num_queries, width,
    CHAINED: tl.constexpr, CARRIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The gradient at gated queries is overwritten by that at z; CARRIES: that at the gates by that at those before.
    part, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < num_queries - first)[:, None] & m_column[None, :]
    q = load_tile(queries, first, row, o_column, width, mask)
    total = load_tile(grad_queries, first, row, o_column, width, mask)
    of_bias = tl.zeros([BLOCK_D], tl.float32)
    for group in range(0, groups):
        base = tl.cast(group, tl.int64) * num_queries + first
        t = load_tile(tangents, base, row, o_column, width, mask)
        unclamped = t + _before(before, base, row, o_column, width, mask, CHAINED)
        gate = tl.where(unclamped > 1.0, 1.0, tl.where(unclamped < -1.0, -1.0, unclamped))
        du = load_tile(grad, base, row, o_column, width, mask)
        total += du * gate
        de = du * q
        if CARRIES:
            de += load_tile(grad_gates, base, row, o_column, width, mask)
        dp = tl.where(tl.abs(unclamped) <= 1.0, de, 0.0)
        if CARRIES:
            store_tile(grad_gates, base, row, o_column, width, mask, dp)
        dz = tl.where(mask, dp * (1.0 - t * t), 0.0)
        store_tile(grad, base, row, o_column, width, mask, dz)
        of_bias += tl.sum(dz, 0)
    store_tile(grad_queries, first, row, o_column, width, mask, total)
    tl.store(sums + part.to(tl.int64) * width + o_column, of_bias, mask=m_column)


def _builds() -> list[Build]:
    streamed, summed = {"BLOCK_N": ROWS, "BLOCK_D": WIDTH}, {"BLOCK_N": SUM_ROWS, "BLOCK_D": SUM_WIDTH}
    builds = []

    def add(kernel, types, constants, *labels):
        pointers = {name: f"*{kind}" for name, kind in types.items()}
        signature = arguments(kernel, pointers, **constants)
        builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=labels))

    names = ("rows", "bias", "weight", "shift", "before", "temperatures")
    for chained in (True, False):
        types, label = {name: "*fp32" for name in names}, "chained" if chained else "first"
        constants = streamed | {"CHAINED": chained}
        signature = arguments(warm_rows, types | {"temperature": "fp32"}, **constants)
        builds.append(Build(warm_rows, signature, constants, tensor_cores=False, labels=(label,)))
    for element in ARGUMENT_TYPES:
        wide = {name: "fp32" for name in ("bias", "factors", "sums", "grad_queries", "grad_gates")}
        add(tanh_rows, wide | {"rows": "fp32", "out": element}, streamed, element)
        for outer in (True, False):
            types = wide | {"tangents": "fp32" if outer else element, "grad": "fp32", "out": element}
            label = "outer" if outer else "product"
            add(tanh_rows_backward, types, summed | {"OUTER": outer}, element, label)
        for chained in (True, False):
            label = (element, "chained" if chained else "first")
            types = wide | {name: element for name in ("queries", "before", "rows", "tangents", "gates", "grad")}
            flags = {"CHAINED": chained, "KEEPS": True, "HANDS_ON": True}
            add(gate_queries, types, streamed | flags, *label)
            gated = summed | {"BLOCK_N": GATED_ROWS, "CHAINED": chained, "CARRIES": True}
            add(gate_queries_backward, types, gated, *label)
    return builds


AHEAD_OF_TIME = _builds()
