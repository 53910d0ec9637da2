# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Largest product of each query with the keys of a group, and the aggregation of these maxima over a segment.

    z_q = max_k k . q (the first of equal keys, a NaN above all)        score = agg_q z_q

Owner: a program owns BLOCK_Q queries and BLOCK_G slots, walks their keys four at a time and D for each four; another
owns a group and BLOCK_S segments. Read: rows, once a tile. Never in memory: products; what leaves is one float and one
arg-max a query and group, 1/K of them. Accumulation float32, no atomics. The trick: column c of a tile is key c / G of
slot c % G, so that 4 x 32 columns fill a matrix instruction and the four keys that are compared lie in the registers of
one thread; a slot walks whole groups one after another (`deal`), so that captions of all lengths leave no column idle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from itm_kernels.triton import maxima_plan
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.configurations import Table

KEYS = tl.constexpr(maxima_plan.KEYS)


@triton.jit
def deal(
    order, counts, offsets,  # groups by count, the largest first; [groups]; [groups + 1] int64
    rows, ends,  # [k] int32, out: the row of each key as slots walk them, and the group that ends with it, or -1
    begins, lengths,  # [bundles, BLOCK_G] int32, out: of each slot
    groups, bundles, SHARE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # A program deals one bundle, as `maxima_plan.Deal` says.
    bundle = tl.program_id(0)
    last = groups - (bundles - 1 - bundle) * BLOCK_G * SHARE
    first = tl.where(bundle == 0, 0, last - BLOCK_G * SHARE)
    o_group, o_slot = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_G)
    base = tl.zeros([], tl.int32)  # keys of the bundles before
    for start in range(0, first, BLOCK_P):
        mask = start + o_group < first
        group = tl.load(order + start + o_group, mask=mask, other=0)
        base += tl.sum(tl.load(counts + group, mask=mask, other=0).to(tl.int32), 0)
    mask = first + o_group < last
    group = tl.load(order + first + o_group, mask=mask, other=0)
    count = tl.load(counts + group, mask=mask, other=0).to(tl.int32)
    length = tl.zeros([BLOCK_G], tl.int32)
    slot = tl.zeros([BLOCK_P], tl.int32)
    place = tl.zeros([BLOCK_P], tl.int32)
    for i in range(0, last - first):
        shortest = tl.min(length, 0)
        taken = tl.min(tl.where(length == shortest, o_slot, BLOCK_G), 0)
        slot = tl.where(o_group == i, taken, slot)
        place = tl.where(o_group == i, shortest, place)
        length += tl.where(o_slot == taken, tl.sum(tl.where(o_group == i, count, 0), 0), 0)
    begin = base + tl.cumsum(length, 0) - length
    tl.store(begins + bundle * BLOCK_G + o_slot, begin)
    tl.store(lengths + bundle * BLOCK_G + o_slot, length)
    place += tl.gather(begin, slot, 0)
    row = tl.load(offsets + group, mask=mask, other=0).to(tl.int32)
    for key in range(0, tl.max(count, 0)):
        tl.store(rows + place + key, row + key, mask=key < count)
        tl.store(ends + place + key, tl.where(key == count - 1, group.to(tl.int32), -1), mask=key < count)


@triton.jit
def offer(x, key, best, at):
    """Take key number ``key`` where it is larger: not on a tie, and a NaN beats all but a NaN."""
    better = (x > best) | ((x != x) & (best == best))
    return tl.where(better, x, best), tl.where(better, key, at)


@triton.jit
def close(best, at, ends, maxima, arg_max, o_query, m_query, num_queries, stride_arg, KEEP: tl.constexpr):
    """Write what is known of the groups that end here."""
    mask = m_query[:, None] & (ends >= 0)[None, :]
    group = tl.maximum(ends, 0).to(tl.int64)
    tl.store(maxima + group[None, :] * num_queries + o_query[:, None], best, mask=mask)
    if KEEP:
        out = arg_max + group[None, :] * stride_arg + o_query[:, None]
        tl.store(out, at.to(arg_max.dtype.element_ty), mask=mask)


@triton.jit
def largest(
    keys, queries,  # [k, width], [q, width]
    rows, ends, begins, lengths,  # as dealt
    maxima,  # [groups, q] float32, out
    arg_max,  # [groups, q] by stride, out where KEEP
    num_queries, width, stride_arg,
    KEEP: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    if ALIGNED:  # rows begin on 16 bytes: they are read 16 bytes at a time, and past the registers
        width = width // 16 * 16
    tiles = tl.cdiv(num_queries, BLOCK_Q)
    bundle = tl.program_id(0) // tiles
    o_query = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = o_query < num_queries
    o_key = tl.arange(0, KEYS * BLOCK_G) // BLOCK_G
    slot = bundle * BLOCK_G + tl.arange(0, KEYS * BLOCK_G) % BLOCK_G
    first, length = tl.load(begins + slot), tl.load(lengths + slot)
    slot = bundle * BLOCK_G + tl.arange(0, BLOCK_G)
    first_end, left = ends + tl.load(begins + slot), tl.load(lengths + slot)
    query_rows = queries + o_query.to(tl.int64)[:, None] * width
    best = tl.full([BLOCK_Q, BLOCK_G], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK_Q, BLOCK_G], tl.int32)
    began = tl.zeros([BLOCK_G], tl.int32)
    for start in range(0, tl.max(length, 0), KEYS):
        m_key = start + o_key < length
        row = tl.load(rows + first + start + o_key, mask=m_key, other=0).to(tl.int64)
        key_rows = keys + row[:, None] * width
        products = tl.zeros([BLOCK_Q, KEYS * BLOCK_G], tl.float32)
        for column in range(0, width, BLOCK_D):
            o_column = column + tl.arange(0, BLOCK_D)
            m_column = (o_column < width)[None, :]
            q = tl.load(query_rows + o_column[None, :], mask=m_query[:, None] & m_column, other=0.0)
            k = tl.load(key_rows + o_column[None, :], mask=m_key[:, None] & m_column, other=0.0)
            products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
        products = tl.where(m_key[None, :], products, -float("inf"))
        fours = tl.permute(tl.reshape(products, (BLOCK_Q, 2, 2, BLOCK_G)), (0, 3, 1, 2))
        even, odd = tl.split(fours)  # keys 0 and 2, 1 and 3
        zeroth, second = tl.split(even)
        one, third = tl.split(odd)
        for i in tl.static_range(KEYS):
            number = start + i
            x = zeroth if i == 0 else one if i == 1 else second if i == 2 else third
            best, at = offer(x, (number - began)[None, :], best, at)
            end = tl.load(first_end + number, mask=number < left, other=-1)
            close(best, at, end, maxima, arg_max, o_query, m_query, num_queries, stride_arg, KEEP)
            best = tl.where((end >= 0)[None, :], -float("inf"), best)
            at = tl.where((end >= 0)[None, :], 0, at)
            began = tl.where(end >= 0, number + 1, began)


@triton.jit
def load_segments(row, begin, count, start, BLOCK_L: tl.constexpr):
    """Some maxima of each segment, [segments, BLOCK_L], their places in it, and which are any."""
    o_query = start + tl.arange(0, BLOCK_L)
    mask = o_query[None, :] < count[:, None]
    at = begin[:, None] + o_query[None, :]
    return tl.load(row + at, mask=mask, other=0.0), at, o_query, mask


@triton.jit
def top(row, begin, count, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
    """Largest maximum of each segment, NaN where it holds one, and the place of its first."""
    best = tl.full([BLOCK_S], -float("inf"), tl.float32)
    bad = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, tl.max(count, 0), BLOCK_L):
        z, _, _, mask = load_segments(row, begin, count, start, BLOCK_L)
        best = tl.maximum(best, tl.max(tl.where(mask & (z == z), z, -float("inf")), 1))
        bad = tl.maximum(bad, tl.max(tl.where(mask & (z != z), 1, 0), 1))
    first = tl.full([BLOCK_S], 1 << 30, tl.int32)
    for start in range(0, tl.max(count, 0), BLOCK_L):
        z, _, o_query, mask = load_segments(row, begin, count, start, BLOCK_L)
        hit = mask & tl.where((bad > 0)[:, None], z != z, z == best[:, None])
        first = tl.minimum(first, tl.min(tl.where(hit, o_query[None, :], 1 << 30), 1))
    return tl.where(bad > 0, float("nan"), best), first


@triton.jit
def sums(row, best, begin, count, lambda_lse, AGG: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr):
    """Sum over each segment of the maxima, or of shifted exponentials and of those times what is below the top."""
    total = tl.zeros([BLOCK_S], tl.float32)
    weighted = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, tl.max(count, 0), BLOCK_L):
        z, _, _, mask = load_segments(row, begin, count, start, BLOCK_L)
        if AGG == "Sum" or AGG == "Mean":
            total += tl.sum(tl.where(mask, z, 0.0), 1)
        else:
            below = tl.where(mask, z - best[:, None], 0.0)
            e = tl.where(mask, tl.exp(below * lambda_lse), 0.0)
            total += tl.sum(e, 1)
            weighted += tl.sum(e * below, 1)
    return total, weighted


@triton.jit
def aggregate_maxima(
    maxima,  # [groups, q] float32
    offsets, counts,  # of the segments of queries: [segments + 1], [segments] int64
    scores,  # by strides, out
    num_queries, groups, segments, stride_group, stride_segment, lambda_lse,
    AGG: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) % groups).to(tl.int64)
    o_segment = (tl.program_id(0) // groups) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_segment = o_segment < segments
    begin = tl.load(offsets + o_segment, mask=m_segment, other=0)
    count = tl.load(counts + o_segment, mask=m_segment, other=0).to(tl.int32)
    row = maxima + group * num_queries
    best = tl.zeros([BLOCK_S], tl.float32)
    if AGG != "Sum" and AGG != "Mean":
        best, _ = top(row, begin, count, BLOCK_S, BLOCK_L)
    score = best
    if AGG != "Max":
        total, weighted = sums(row, best, begin, count, lambda_lse, AGG, BLOCK_S, BLOCK_L)
        if AGG == "Sum":
            score = total
        elif AGG == "Mean":
            score = total / count.to(tl.float32)
        elif AGG == "Softmax":
            score = best + weighted / total
        else:
            score = best + tl.log(total) / lambda_lse
    tl.store(scores + group * stride_group + o_segment.to(tl.int64) * stride_segment, score, mask=m_segment)


@dataclass(frozen=True)
class TiledBuild(Build):
    """A build whose whole tile depends on the architecture."""

    element_bytes: int = 0

    def on(self, arch: Table) -> Build:
        chosen = maxima_plan.tile(self.kernel.__name__, self.element_bytes, arch.arch)
        return replace(self, constants=self.constants | chosen.constants, **chosen.launch)


def tiled_builds(kernels: tuple[Any, ...], tables: dict[str, str], cases: dict[str, dict[str, Any]]) -> list[Build]:
    """Every kernel with rows of every type and every case: label of a case -> its constants, ``arg_max`` its type."""
    builds = []
    for element, (precision, size) in ARGUMENT_TYPES.items():
        for label, case in cases.items():
            for kernel in kernels:
                tile = maxima_plan.tile(kernel.__name__, size, "sm_80").constants
                constants = {name: value for name, value in case.items() if name != "arg_max"}
                constants |= {"ALIGNED": True, "PRECISION": precision, **tile}
                types = tables | {"keys": f"*{element}", "queries": f"*{element}", "arg_max": case["arg_max"]}
                signature = arguments(kernel, types, **constants)
                builds.append(TiledBuild(kernel, signature, constants, labels=(element, label), element_bytes=size))
    return builds


def aggregate_builds(kernel: Any, tables: dict[str, str]) -> list[Build]:
    """Every way through the aggregation."""
    builds = []
    for agg in ("Max", "Sum", "LogSumExp", "Softmax"):
        blocks = {"BLOCK_S": maxima_plan.AGGREGATE_SEGMENTS, "BLOCK_L": maxima_plan.AGGREGATE_QUERIES}
        constants = {"AGG": agg, **blocks}
        signature = arguments(kernel, tables, **constants)
        builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=(agg,)))
    return builds


def _builds() -> list[Build]:
    tables = {name: "*i64" for name in ("offsets", "counts", "order")} | {"maxima": "*fp32", "scores": "*fp32"}
    tables |= {name: "*i32" for name in ("rows", "ends", "begins", "lengths")}
    cases = {
        "byte": {"KEEP": True, "arg_max": "*u8"},
        "wide": {"KEEP": True, "arg_max": "*i32"},
        "none": {"KEEP": False, "arg_max": "*fp32"},
    }
    dealt = maxima_plan.Deal(32, maxima_plan.RAGGED_GROUPS, 1)
    constants = {"SHARE": dealt.share, "BLOCK_G": dealt.slots, "BLOCK_P": dealt.most}
    signature = arguments(deal, tables, **constants)
    return [
        Build(deal, signature, constants, num_warps=1, tensor_cores=False),
        *tiled_builds((largest,), tables, cases),
        *aggregate_builds(aggregate_maxima, tables),
    ]


AHEAD_OF_TIME = _builds()
