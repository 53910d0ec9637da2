# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""``agg_func``: one number a segment from one number a query (the cosine, PFAN's largest weight), and back.

    LogSumExp log(sum exp(lambda x)) / lambda, shifted by its maximum; Max (gradient to the first arg-max); Sum; Mean

Owner: a program owns one key group and BLOCK_S segments, a row each, and walks their queries: one order, no atomics; a
NaN stays in its row and counts as the largest of all, as in torch. Read: a query's state, 1/keys of the products.
Never in memory: cosines. Float32. The trick is where the cosine is made: here, once a query, and not beside the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import Build, arguments, backward_types, listed
from itm_kernels.triton.directions import Direction
from itm_kernels.triton.kernels.words import (
    COSINE,
    DOT,
    GRAD_COSINE,
    GRAD_PEAK,
    LARGEST_WEIGHT,
    QUADRATIC,
    SCALE,
    cosine_of,
    plane,
)


@triton.jit
def _load(
    state, query_norms, group, groups, o_query, mask, num_queries, PEAK: tl.constexpr, FINISHED: tl.constexpr
):  # fmt: skip
    """What is aggregated, [segments, queries of each]; FINISHED: the state is that already."""
    if FINISHED and PEAK:
        x = tl.load(plane(state, LARGEST_WEIGHT, group, groups, num_queries) + o_query, mask=mask, other=0.0)
    elif FINISHED:
        x = tl.load(plane(state, COSINE, group, groups, num_queries) + o_query, mask=mask, other=0.0)
    elif PEAK:
        x = tl.load(plane(state, SCALE, group, groups, num_queries) + o_query, mask=mask, other=0.0)
    else:
        dot = tl.load(plane(state, DOT, group, groups, num_queries) + o_query, mask=mask, other=0.0)
        quadratic = tl.load(plane(state, QUADRATIC, group, groups, num_queries) + o_query, mask=mask, other=0.0)
        x = cosine_of(dot, quadratic, tl.load(query_norms + o_query, mask=mask, other=0.0))
    return x


@triton.jit
def _reduce(
    state, query_norms, group, groups, begin, count, num_queries, lambda_lse, AGG: tl.constexpr, PEAK: tl.constexpr,
    FINISHED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of each segment: largest value, whether there is a NaN, and the sum (LogSumExp: of shifted exponentials)."""
    best = tl.full([BLOCK_S], -float("inf"), tl.float32)
    bad = tl.zeros([BLOCK_S], tl.int32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, tl.max(count, 0), BLOCK_L):
        o_row = start + tl.arange(0, BLOCK_L)
        mask = o_row[None, :] < count[:, None]
        at = begin[:, None] + o_row[None, :]
        x = _load(state, query_norms, group, groups, at, mask, num_queries, PEAK, FINISHED)
        if AGG == "Sum" or AGG == "Mean":
            total += tl.sum(tl.where(mask, x, 0.0), 1)
        else:
            above = tl.maximum(best, tl.max(tl.where(mask & (x == x), x, -float("inf")), 1))
            bad = tl.maximum(bad, tl.max(tl.where(mask & (x != x), 1, 0), 1))
            if AGG == "LogSumExp":
                shift = tl.where(above > -float("inf"), above, 0.0)
                e = tl.exp((x - shift[:, None]) * lambda_lse)
                total = total * tl.exp((best - shift) * lambda_lse) + tl.sum(tl.where(mask, e, 0.0), 1)
            best = above
    return best, bad, total


@triton.jit
def _aggregated(best, bad, total, count, lambda_lse, AGG: tl.constexpr):
    if AGG == "Sum":
        value = total
    elif AGG == "Mean":
        value = total / count.to(tl.float32)
    elif AGG == "Max":
        value = tl.where(bad > 0, float("nan"), best)
    else:
        value = best + tl.log(total) / lambda_lse
    return value


@triton.jit
def aggregate(
    state, query_norms,
    offsets, counts,  # [segments + 1], [segments] int64
    scores,  # by strides, out
    num_queries, groups, segments, stride_group, stride_segment, lambda_lse, peak_weight,
    AGG: tl.constexpr, PEAK: tl.constexpr, ACCUMULATE: tl.constexpr, FINISHED: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    o_segment = (tl.program_id(0) // groups) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_segment = o_segment < segments
    begin = tl.load(offsets + o_segment, mask=m_segment, other=0)
    count = tl.load(counts + o_segment, mask=m_segment, other=0).to(tl.int32)
    best, bad, total = _reduce(
        state, query_norms, group, groups, begin, count, num_queries, lambda_lse, AGG, False, FINISHED, BLOCK_S,
        BLOCK_L,
    )  # fmt: skip
    score = _aggregated(best, bad, total, count, lambda_lse, AGG)
    if PEAK:
        best, bad, total = _reduce(
            state, query_norms, group, groups, begin, count, num_queries, lambda_lse, AGG, True, FINISHED, BLOCK_S,
            BLOCK_L,
        )  # fmt: skip
        score += peak_weight * _aggregated(best, bad, total, count, lambda_lse, AGG)
    at = scores + group.to(tl.int64) * stride_group + o_segment.to(tl.int64) * stride_segment
    if ACCUMULATE:
        score += tl.load(at, mask=m_segment, other=0.0)
    tl.store(at, score, mask=m_segment)


@triton.jit
def _spread(
    state, query_norms, group, groups, begin, count, num_queries, lambda_lse, grad, AGG: tl.constexpr,
    PEAK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """The gradient of each segment's aggregate, handed out to its queries."""
    best, bad, total = _reduce(
        state, query_norms, group, groups, begin, count, num_queries, lambda_lse, AGG, PEAK, False, BLOCK_S, BLOCK_L
    )
    first = tl.full([BLOCK_S], 1 << 30, tl.int32)
    longest = tl.max(count, 0)
    if AGG == "Max":
        for start in range(0, longest, BLOCK_L):
            o_row = start + tl.arange(0, BLOCK_L)
            mask = o_row[None, :] < count[:, None]
            at = begin[:, None] + o_row[None, :]
            x = _load(state, query_norms, group, groups, at, mask, num_queries, PEAK, False)
            hit = mask & tl.where((bad > 0)[:, None], x != x, x == best[:, None])
            first = tl.minimum(first, tl.min(tl.where(hit, o_row[None, :], 1 << 30), 1))
    for start in range(0, longest, BLOCK_L):
        o_row = start + tl.arange(0, BLOCK_L)
        mask = o_row[None, :] < count[:, None]
        o_query = begin[:, None] + o_row[None, :]
        if AGG == "Max":
            out = tl.where(o_row[None, :] == first[:, None], grad[:, None], 0.0)
        elif AGG == "Sum":
            out = tl.broadcast_to(grad[:, None], (BLOCK_S, BLOCK_L))
        elif AGG == "Mean":
            out = tl.broadcast_to((grad / count.to(tl.float32))[:, None], (BLOCK_S, BLOCK_L))
        else:
            x = _load(state, query_norms, group, groups, o_query, mask, num_queries, PEAK, False)
            out = tl.exp((x - best[:, None]) * lambda_lse) * (grad / total)[:, None]
        if PEAK:
            tl.store(plane(state, GRAD_PEAK, group, groups, num_queries) + o_query, out, mask=mask)
        else:
            tl.store(plane(state, GRAD_COSINE, group, groups, num_queries) + o_query, out, mask=mask)


@triton.jit
def _spread_scores(
    d, program, lambda_lse, peak_weight, AGG: tl.constexpr, PEAK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """From what attend left in a direction's state: its planes GRAD_COSINE and GRAD_PEAK."""
    group = program % d.groups
    o_segment = (program // d.groups) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_segment = o_segment < d.num_segments
    begin = tl.load(d.offsets + o_segment, mask=m_segment, other=0)
    count = tl.load(d.counts + o_segment, mask=m_segment, other=0).to(tl.int32)
    at = d.grad_scores + group.to(tl.int64) * d.stride_group + o_segment.to(tl.int64) * d.stride_segment
    grad = tl.load(at, mask=m_segment, other=0.0).to(tl.float32)
    _spread(
        d.state, d.query_norms, group, d.groups, begin, count, d.num_queries, lambda_lse, grad, AGG, False, BLOCK_S,
        BLOCK_L,
    )  # fmt: skip
    if PEAK:
        _spread(
            d.state, d.query_norms, group, d.groups, begin, count, d.num_queries, lambda_lse, grad * peak_weight, AGG,
            True, BLOCK_S, BLOCK_L,
        )  # fmt: skip


@triton.jit
def aggregate_backward(
    directions, lambda_lse, peak_weight,
    WAYS: tl.constexpr, AGG: tl.constexpr, PEAK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(WAYS):
        programs = directions[i].groups * tl.cdiv(directions[i].num_segments, BLOCK_S)
        if (program >= 0) & (program < programs):
            _spread_scores(directions[i], program, lambda_lse, peak_weight, AGG, PEAK, BLOCK_S, BLOCK_L)
        program -= programs


def _builds() -> list[Build]:
    types = {name: "*fp32" for name in ("state", "query_norms", "scores")} | {"offsets": "*i64", "counts": "*i64"}
    constants = {"AGG": "LogSumExp", "PEAK": True, "BLOCK_S": tiles.AGGREGATE_SEGMENTS}
    constants |= {"BLOCK_L": tiles.AGGREGATE_QUERIES}
    forward = constants | {"ACCUMULATE": True, "FINISHED": False}
    direction = listed(Direction, backward_types("fp32"))
    backward = constants | {"WAYS": 2}
    signature = arguments(aggregate_backward, {"directions": (direction, direction)}, **backward)
    return [
        Build(aggregate, arguments(aggregate, types, **forward), forward, tensor_cores=False, labels=("fp32",)),
        Build(aggregate_backward, signature, backward, tensor_cores=False, labels=("fp32",)),
    ]


AHEAD_OF_TIME = _builds()
