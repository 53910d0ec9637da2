# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Cosine of each query with what it attends to, and the way back.

    out = q . c s / max(|q| |c| s, eps),  s = 1 / (|c| + eps), 0 at c = 0      dq += a c + b q      dc = a q + d c

Row ``g L + l`` is query l facing key group g. Owner: forward one program some rows, which walks their width once;
backward some queries and a slice of the width, where the gradients of a query meet over the groups: one order, no
atomics. Read: each array once. Never in memory: c over its norm. Float32 inside. The trick: a, b and d are three
numbers a row that the recomputed forward leaves, so that no sum over the width is needed twice; above the floor the
norm of c cancels against s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.squared_difference import load_rows, load_tile, store_tile
from itm_kernels.triton.kernels.words import EPS, segments_of
from itm_kernels.triton.pair_tiles import ROWS, SUM_ROWS, SUM_WIDTH, WIDTH


@triton.jit
def cosine_rows(
    queries, attended, cosines, slopes, count, num_queries, width, KEEPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    dot = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    of_query = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        mask = m_row[:, None] & (o_column < width)[None, :]
        q = load_rows(queries, o_row % num_queries, o_column, width, mask)
        c = load_rows(attended, o_row, o_column, width, mask)
        dot += tl.sum(q * c, 1)
        squares += tl.sum(c * c, 1)
        of_query += tl.sum(q * q, 1)
    norm, query_norm = tl.sqrt_rn(squares), tl.sqrt_rn(of_query)
    # Nothing attended to: 0, and no gradient. What is divided by stands in for it.
    nothing = norm == 0.0
    scale = tl.where(nothing, 0.0, 1.0 / (norm + EPS))
    lengths = query_norm * norm * scale
    on_floor = lengths < EPS
    cosine = dot * scale / tl.where(on_floor, EPS, lengths)
    tl.store(cosines + o_row, cosine, mask=m_row)
    if KEEPS:
        some = tl.where(nothing, 1.0, norm)
        straight = tl.where(on_floor, scale / EPS, 1.0 / (query_norm * some))
        at = slopes + o_row
        tl.store(at, tl.where(nothing, 0.0, straight), mask=m_row)
        tl.store(at + count, tl.where(on_floor, 0.0, -cosine / of_query), mask=m_row)
        of_attended = tl.where(on_floor, -cosine * scale / some, -cosine / (some * some))
        tl.store(at + tl.cast(count, tl.int64) * 2, tl.where(nothing, 0.0, of_attended), mask=m_row)


@triton.jit
def cosine_rows_backward(
    queries, attended, slopes, segments, counts, grad, grad_queries, groups, num_queries, num_segments, width,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # `grad [groups, segments]` is that of a pair's mean. What is attended to is overwritten by its gradient.
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_D)
    first, row = (program // across) * BLOCK_N, tl.arange(0, BLOCK_N)
    o_column = (program % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_query = row < num_queries - first
    mask = m_query[:, None] & (o_column < width)[None, :]
    segment = segments_of(segments, first + row, num_queries)
    m_pair = segment >= 0
    share = tl.load(counts + segment, mask=m_pair, other=1).to(tl.float32)
    rows = tl.cast(groups, tl.int64) * num_queries
    q = load_tile(queries, first, row, o_column, width, mask)
    total = load_tile(grad_queries, first, row, o_column, width, mask)
    for group in range(0, groups):
        base = tl.cast(group, tl.int64) * num_queries + first
        upstream = tl.load(grad + tl.cast(group, tl.int64) * num_segments + segment, mask=m_pair, other=0.0) / share
        straight = upstream * tl.load(slopes + base + row, mask=m_query, other=0.0)
        of_query = upstream * tl.load(slopes + rows + base + row, mask=m_query, other=0.0)
        of_attended = upstream * tl.load(slopes + 2 * rows + base + row, mask=m_query, other=0.0)
        c = load_tile(attended, base, row, o_column, width, mask)
        total += straight[:, None] * c + of_query[:, None] * q
        store_tile(attended, base, row, o_column, width, mask, straight[:, None] * q + of_attended[:, None] * c)
    store_tile(grad_queries, first, row, o_column, width, mask, total)


def _builds() -> list[Build]:
    builds = []
    tables = {"segments": "*i32", "counts": "*i64"}
    for element in ARGUMENT_TYPES:
        types = tables | {name: f"*{element}" for name in ("queries", "attended")}
        types |= {name: "*fp32" for name in ("cosines", "slopes", "grad", "grad_queries")}
        for kernel, constants in (
            (cosine_rows, {"KEEPS": True, "BLOCK_N": ROWS, "BLOCK_D": WIDTH}),
            (cosine_rows_backward, {"BLOCK_N": SUM_ROWS, "BLOCK_D": SUM_WIDTH}),
        ):
            signature = arguments(kernel, types, **constants)
            builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
