# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Gradients by the arg-max: of the maxima, of the queries and of the keys.

    dz = dagg(z)        dS_kq = dz_q [arg_q = k]        dQ += dS^T K        dK += dS Q

Owner: a program owns a group and BLOCK_S segments (dz), BLOCK_Q queries and a slice of the width (dQ, all keys in
turn), or a run of keys and a slice of the width (dK, all queries in turn): one order, no atomics. Read: dz and arg-max,
rows. Never in memory: dS, made in registers for the product that consumes it. Accumulation float32. The
trick: dS has one entry in K, but on the matrix units its dense product should cost less than gathering rows from the
second-level cache, up to about a hundred keys (reckoned from rates, not timed yet).
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build
from itm_kernels.triton.kernels.maxima import (
    KEYS,
    aggregate_builds,
    load_segments,
    sums,
    tiled_builds,
    top,
)


@triton.jit
def aggregate_maxima_backward(
    maxima,  # [groups, q] float32; replaced by its gradient (Sum and Mean do not read it)
    offsets, counts,  # of the segments of queries
    grad_scores,  # by strides
    num_queries, groups, segments, stride_group, stride_segment, lambda_lse,
    AGG: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) % groups).to(tl.int64)
    o_segment = (tl.program_id(0) // groups) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_segment = o_segment < segments
    begin = tl.load(offsets + o_segment, mask=m_segment, other=0)
    count = tl.load(counts + o_segment, mask=m_segment, other=0).to(tl.int32)
    at = grad_scores + group * stride_group + o_segment.to(tl.int64) * stride_segment
    grad = tl.load(at, mask=m_segment, other=0.0).to(tl.float32)
    row = maxima + group * num_queries
    if AGG != "Sum" and AGG != "Mean":
        best, first = top(row, begin, count, BLOCK_S, BLOCK_L)
        total, weighted = sums(row, best, begin, count, lambda_lse, AGG, BLOCK_S, BLOCK_L)
    for start in range(0, tl.max(count, 0), BLOCK_L):
        if AGG == "Sum" or AGG == "Mean":
            o_query = start + tl.arange(0, BLOCK_L)
            mask = o_query[None, :] < count[:, None]
            place = begin[:, None] + o_query[None, :]
            share = grad if AGG == "Sum" else grad / count.to(tl.float32)
            out = tl.broadcast_to(share[:, None], (BLOCK_S, BLOCK_L))
        else:
            z, place, o_query, mask = load_segments(row, begin, count, start, BLOCK_L)
            if AGG == "Max":
                out = tl.where(o_query[None, :] == first[:, None], grad[:, None], 0.0)
            else:
                below = z - best[:, None]
                out = tl.exp(below * lambda_lse) * (grad / total)[:, None]
                if AGG == "Softmax":
                    out *= 1.0 + lambda_lse * (below - (weighted / total)[:, None])
        tl.store(row + place, out, mask=mask)


@triton.jit
def grad_products(grad_maxima, arg_max, segments, group, m_column, o_query, num_queries, stride_arg):
    """dz and arg-max of a tile, [queries, columns]; each group's stand under all of its columns. Padding has none."""
    m_query = tl.load(segments + o_query, mask=o_query < num_queries, other=-1) >= 0
    mask = m_query[:, None] & m_column[None, :]
    grad = tl.load(grad_maxima + group[None, :] * num_queries + o_query[:, None], mask=mask, other=0.0)
    at = tl.load(arg_max + group[None, :] * stride_arg + o_query[:, None], mask=mask, other=0)
    return grad, at.to(tl.int32)


@triton.jit
def keys_of(key_groups, offsets, o_key, num_keys):
    """Of some rows of keys: the group, the number in it, and whether there is one (padding has none)."""
    group = tl.load(key_groups + o_key, mask=o_key < num_keys, other=-1)
    m_key = group >= 0
    group = tl.where(m_key, group, 0).to(tl.int64)
    return group, (o_key - tl.load(offsets + group)).to(tl.int32), m_key


@triton.jit
def queries_gradient(
    keys,  # [k, width]
    offsets, counts,  # of the groups of keys
    key_groups,  # [k] int32, -1: padding
    grad_maxima, arg_max,  # [groups, q] float32; [groups, q] by stride
    segments,  # [q] int32, -1: padding
    grad_queries,  # [q, width] float32, added to
    num_queries, num_keys, groups, width, stride_arg,
    ALIKE: tl.constexpr,  # groups are of like size
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        width = width // 16 * 16
    across = tl.cdiv(width, BLOCK_D)
    o_query = (tl.program_id(0) // across) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_column = (tl.program_id(0) % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_query, m_column = o_query < num_queries, o_column < width
    place = tl.arange(0, KEYS * BLOCK_G)
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if ALIKE:  # dz and arg-max of BLOCK_G groups stay in registers while their keys pass, four at a time
        o_key = place // BLOCK_G
        for bundle in range(0, tl.cdiv(groups, BLOCK_G)):
            group = (bundle * BLOCK_G + place % BLOCK_G).to(tl.int64)
            m_group = group < groups
            first = tl.load(offsets + group, mask=m_group, other=0)
            count = tl.load(counts + group, mask=m_group, other=0).to(tl.int32)
            grad, at = grad_products(grad_maxima, arg_max, segments, group, m_group, o_query, num_queries, stride_arg)
            for start in range(0, tl.max(count, 0), KEYS):
                m_key = start + o_key < count
                rows = keys + (first + start + o_key)[:, None] * width + o_column[None, :]
                k = tl.load(rows, mask=m_key[:, None] & m_column[None, :], other=0.0)
                inner = tl.where(at == (start + o_key)[None, :], grad, 0.0).to(k.dtype)
                total = tl.dot(inner, k, total, input_precision=PRECISION)
    else:  # no column of a tile is idle: keys one after another, whatever groups they are of
        for start in range(0, num_keys, KEYS * BLOCK_G):
            o_row = start + place
            group, number, m_key = keys_of(key_groups, offsets, o_row, num_keys)
            grad, at = grad_products(grad_maxima, arg_max, segments, group, m_key, o_query, num_queries, stride_arg)
            rows = keys + o_row.to(tl.int64)[:, None] * width + o_column[None, :]
            k = tl.load(rows, mask=m_key[:, None] & m_column[None, :], other=0.0)
            inner = tl.where(at == number[None, :], grad, 0.0).to(k.dtype)
            total = tl.dot(inner, k, total, input_precision=PRECISION)
    out = grad_queries + o_query.to(tl.int64)[:, None] * width + o_column[None, :]
    mask = m_query[:, None] & m_column[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + total, mask=mask)


@triton.jit
def keys_gradient(
    queries,  # [q, width]
    offsets,  # of the groups of keys
    key_groups,  # [k] int32, -1: padding
    grad_maxima, arg_max,  # [groups, q] float32; [groups, q] by stride
    segments,  # [q] int32, -1: padding
    grad_keys,  # [k, width] float32, added to
    num_queries, num_keys, width, stride_arg,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if ALIGNED:
        width = width // 16 * 16
    across = tl.cdiv(width, BLOCK_D)
    o_key = (tl.program_id(0) // across) * (KEYS * BLOCK_G) + tl.arange(0, KEYS * BLOCK_G)
    o_column = (tl.program_id(0) % across) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_column = o_column < width
    group, number, m_key = keys_of(key_groups, offsets, o_key, num_keys)
    total = tl.zeros([KEYS * BLOCK_G, BLOCK_D], tl.float32)
    for tile in range(0, num_queries, BLOCK_Q):
        o_query = tile + tl.arange(0, BLOCK_Q)
        m_query = o_query < num_queries
        grad, at = grad_products(grad_maxima, arg_max, segments, group, m_key, o_query, num_queries, stride_arg)
        rows = queries + o_query.to(tl.int64)[:, None] * width + o_column[None, :]
        q = tl.load(rows, mask=m_query[:, None] & m_column[None, :], other=0.0)
        inner = tl.where(at == number[None, :], grad, 0.0).to(q.dtype)
        total = tl.dot(tl.trans(inner), q, total, input_precision=PRECISION)
    out = grad_keys + o_key.to(tl.int64)[:, None] * width + o_column[None, :]
    mask = m_key[:, None] & m_column[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + total, mask=mask)


def _builds() -> list[Build]:
    tables = {"offsets": "*i64", "counts": "*i64"}
    rows = {"key_groups": "*i32", "segments": "*i32"}
    tables |= {name: "*fp32" for name in ("maxima", "grad_scores", "grad_maxima", "grad_queries", "grad_keys")}
    cases = {"byte": {"arg_max": "*u8"}, "wide": {"arg_max": "*i32"}}
    alike = {f"{label}-{how}": case | {"ALIKE": how == "alike"} for label, case in cases.items()
             for how in ("alike", "ragged")}  # fmt: skip
    return [
        *tiled_builds((queries_gradient,), tables | rows, alike),
        *tiled_builds((keys_gradient,), tables | rows, cases),
        *aggregate_builds(aggregate_maxima_backward, tables),
    ]


AHEAD_OF_TIME = _builds()
