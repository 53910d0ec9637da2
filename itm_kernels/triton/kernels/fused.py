# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Products and cosines of whole captions against a bundle of key groups, in one kernel (t2i).

    S = Q K^T      logit = lambda x / (norm(x) + eps)      a = focal(softmax_k(logit))      x = q . c / |q| |c|

Owner: a program owns BLOCK_G groups and a tile of whole segments, BLOCK_Q packed rows at most, and walks D once. Read:
rows, Gram matrices, lengths of queries. Never in memory: S, factors, weights; what leaves is the cosine of a query and
group (and its largest weight, for the peak). Accumulation float32, one order, no atomics; a NaN stays with its pair.
The trick: 36 keys are 32 + 4 columns, the fours of a bundle share one product, columns are placed so that a thread
holds the same places of every group, and sums over segments are products with an indicator on the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl

from itm_kernels.triton import fused_plan
from itm_kernels.triton.ahead_of_time import Build, arguments
from itm_kernels.triton.configurations import Table
from itm_kernels.triton.kernels.attend import attended
from itm_kernels.triton.kernels.words import COSINE, EPS, LARGEST_WEIGHT, cosine_of, feature, plane

LARGEST = tl.constexpr(3.0e38)
LEAST_COLUMNS = tl.constexpr(16)
ABSENT = tl.constexpr(1 << 20)  # number of no key


@triton.jit
def pack_segments(offsets, starts, tiles, groups, rows, BLOCK_S: tl.constexpr):
    """First segment of each tile: one step a tile, which looks at the segments that it may hold."""
    at = tl.zeros([], tl.int64)
    for i in range(0, tiles):
        tl.store(starts + i, at)
        following = at + 1 + tl.arange(0, BLOCK_S)
        end = tl.load(offsets + following, mask=following <= groups, other=1 << 62)
        at += tl.sum((end <= tl.load(offsets + at) + rows).to(tl.int64), 0)
    tl.store(starts + tiles, at)


@triton.jit
def place_of(column, COLUMNS: tl.constexpr):
    """Group within the bundle and key of each product column, COLUMNS a group.

    A thread's accumulator holds columns 2t, 2t + 1 of every eight: four keys a group go to its four values of t.
    """
    if COLUMNS == 4:
        group = column // 8 * 2 + column % 2
        key = column % 8 // 2
    else:
        group = column // COLUMNS
        key = column % COLUMNS
    return group, key


@triton.jit
def one_group(products, WHICH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_G: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of one group. In integers, where adding 0 is nothing: the sum over groups leaves no instruction."""
    bits = products.to(tl.int32, bitcast=True)
    if COLUMNS == 4:
        bits = tl.permute(tl.reshape(bits, (BLOCK_Q, BLOCK_G // 2, 4, 2)), (0, 1, 3, 2))
    bits = tl.reshape(bits, (BLOCK_Q, BLOCK_G, COLUMNS))
    mine = (tl.arange(0, BLOCK_G) == WHICH)[None, :, None]
    return tl.sum(tl.where(mine, bits, 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def widened(x, BLOCK_Q: tl.constexpr, COLUMNS: tl.constexpr):
    """Fewer columns than a dot takes, spread out with zeros between; and the key of each column."""
    if COLUMNS < LEAST_COLUMNS:
        x, key = widened(tl.reshape(tl.join(x, tl.zeros_like(x)), (BLOCK_Q, 2 * COLUMNS)), BLOCK_Q, 2 * COLUMNS)
        key = tl.where(key % 2 == 0, key // 2, ABSENT)
    else:
        key = tl.arange(0, COLUMNS)
    return x, key


@triton.jit
def nearest(x):
    """The nearest number that TF32 holds; what is left of ``x`` nearly fits another."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def factors_of(
    products, segment, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Factor of every segment and column, [segments, columns]: logit = factor * x."""
    x = feature(products, CLIPPED)
    size = tl.abs(x) if NORM == "l1norm" else x * x
    # A NaN is in the row itself already; in a product with 0 it would reach other segments, as would an infinity.
    size = tl.where(size == size, tl.minimum(size, LARGEST), 0.0)
    upper = nearest(size)
    # Columns are rows here: there are enough of them for all warps, of segments there are not.
    member = (segment[:, None] == tl.arange(0, BLOCK_S)[None, :]).to(tl.float32)
    total = tl.dot(tl.trans(upper), member, input_precision="tf32")
    if PRECISION == "tf32x3":  # behind half-precision rows eleven bits of each term are enough
        total = tl.dot(tl.trans(size - upper), member, total, input_precision="tf32")
    norm = total if NORM == "l1norm" else tl.sqrt_rn(total)
    return tl.trans(lambda_softmax / (norm + EPS))


@triton.jit
def logits_of(
    raw, factor, o_key, count, segment, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Logits of a group's products, [queries, keys]; every row takes its segment's factor, in two halves."""
    logit = feature(raw, CLIPPED)
    if NORM == "none":
        logit = logit * lambda_softmax
    else:
        member = (segment[:, None] == tl.arange(0, BLOCK_S)[None, :]).to(tl.float32)
        upper = nearest(factor)
        of_row = tl.dot(member, upper, input_precision="tf32")
        logit = logit * tl.dot(member, factor - upper, of_row, input_precision="tf32")
    return tl.where((o_key < count)[None, :], logit, -float("inf"))


@triton.jit
def attend_fused(
    keys, queries,  # [k, width], [q, width]
    gram,  # [groups, most, most] float32
    query_norms,  # [q] float32
    key_offsets, key_counts,  # [groups + 1], [groups] int64
    query_offsets,  # [segments + 1] int64
    segments,  # [q] int32, -1: padding
    starts,  # [tiles + 1] int64: first segment of each tile
    state,  # [1 or 2, groups, q] float32, out
    num_queries, groups, tiles, most, width, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if ALIGNED:  # rows begin on 16 bytes: they are read 16 bytes at a time, and past the registers
        width = width // 16 * 16
    # Programs that run together share tiles and bundles: eight tiles at a time against all bundles.
    bundles = tl.cdiv(groups, BLOCK_G)
    lowest = tl.program_id(0) // (8 * bundles) * 8
    together = tl.minimum(tiles - lowest, 8)
    tile = lowest + tl.program_id(0) % (8 * bundles) % together
    first_group = tl.program_id(0) % (8 * bundles) // together * BLOCK_G

    first_segment, next_segment = tl.load(starts + tile), tl.load(starts + tile + 1)
    query = tl.load(query_offsets + first_segment)
    row = tl.arange(0, BLOCK_Q)
    m_row = row < tl.load(query_offsets + next_segment) - query
    key = tl.load(key_offsets + first_group)
    group_main, key_main = place_of(tl.arange(0, BLOCK_G * MAIN), MAIN)
    group_main += first_group
    count_main = tl.load(key_counts + group_main, mask=group_main < groups, other=0)
    place = (tl.load(key_offsets + group_main, mask=group_main < groups, other=0) - key + key_main).to(tl.int32)
    m_main = (key_main < count_main)[:, None]
    query_rows = queries + query * width + row[:, None] * width
    main_rows = keys + key * width + place[:, None] * width
    main = tl.zeros([BLOCK_Q, BLOCK_G * MAIN], tl.float32)
    if REST > 0:
        group_rest, key_rest = place_of(tl.arange(0, BLOCK_G * REST), REST)
        group_rest += first_group
        count_rest = tl.load(key_counts + group_rest, mask=group_rest < groups, other=0)
        place_rest = tl.load(key_offsets + group_rest, mask=group_rest < groups, other=0) - key + MAIN + key_rest
        m_rest = (MAIN + key_rest < count_rest)[:, None]
        rest_rows = keys + key * width + place_rest.to(tl.int32)[:, None] * width
        rest = tl.zeros([BLOCK_Q, BLOCK_G * REST], tl.float32)
    for column in range(0, width, BLOCK_D):
        o_column = (column + tl.arange(0, BLOCK_D))[None, :]
        m_column = o_column < width
        q = tl.load(query_rows + o_column, mask=m_row[:, None] & m_column, other=0.0)
        k = tl.load(main_rows + o_column, mask=m_main & m_column, other=0.0)
        main = tl.dot(q, tl.trans(k), main, input_precision=PRECISION)
        if REST > 0:
            k_rest = tl.load(rest_rows + o_column, mask=m_rest & m_column, other=0.0)
            rest = tl.dot(q, tl.trans(k_rest), rest, input_precision=PRECISION)

    o_query = query + row
    norm = tl.load(query_norms + o_query, mask=m_row, other=0.0)
    segment = tl.load(segments + o_query, mask=m_row, other=-1)
    segment = tl.where(segment >= 0, segment - tl.load(segments) - first_segment.to(tl.int32), -1)
    o_main = tl.arange(0, MAIN)
    if NORM != "none":
        factors = factors_of(main, segment, lambda_softmax, NORM, CLIPPED, PRECISION, BLOCK_S)
        if REST > 0:
            factors_rest = factors_of(rest, segment, lambda_softmax, NORM, CLIPPED, PRECISION, BLOCK_S)
    for i in tl.static_range(BLOCK_G):
        group = first_group + i
        count = tl.load(key_counts + group, mask=group < groups, other=0).to(tl.int32)
        raw = one_group(main, i, BLOCK_Q, BLOCK_G, MAIN)
        factor, factor_rest = raw, raw
        if NORM != "none":
            factor = one_group(factors, i, BLOCK_S, BLOCK_G, MAIN)
        logit = logits_of(raw, factor, o_main, count, segment, lambda_softmax, NORM, CLIPPED, BLOCK_S)
        if REST > 0:
            raw_rest, o_rest = widened(one_group(rest, i, BLOCK_Q, BLOCK_G, REST), BLOCK_Q, REST)
            o_rest += MAIN
            if NORM != "none":
                factor_rest, _ = widened(one_group(factors_rest, i, BLOCK_S, BLOCK_G, REST), BLOCK_S, REST)
            logit_rest = logits_of(
                raw_rest, factor_rest, o_rest, count, segment, lambda_softmax, NORM, CLIPPED, BLOCK_S
            )
            dot, quadratic, scale, _, _ = attended(
                raw, logit, o_main, raw_rest, logit_rest, o_rest, gram, group, most, count, FOCAL, PRECISION, True
            )
        else:
            dot, quadratic, scale, _, _ = attended(
                raw, logit, o_main, raw, logit, o_main, gram, group, most, count, FOCAL, PRECISION, False
            )
        x = cosine_of(dot, quadratic, norm)
        mask = (segment >= 0) & (group < groups)
        tl.store(plane(state, COSINE, group, groups, num_queries) + o_query, x, mask=mask)
        if PEAK:
            tl.store(plane(state, LARGEST_WEIGHT, group, groups, num_queries) + o_query, scale, mask=mask)


@dataclass(frozen=True)
class FusedBuild(Build):
    """A build whose whole tile depends on the architecture."""

    regions: int = 0

    def on(self, arch: Table) -> Build:
        chosen = fused_plan.tile(self.regions, arch.arch)
        return replace(self, constants=self.constants | chosen.constants, **chosen.launch)


def _builds() -> list[Build]:
    # Half precision alone: of float32 the plan never asks it, and the interpreter does not compile.
    types = {name: "*fp32" for name in ("gram", "query_norms", "state")} | {"segments": "*i32"}
    types |= {name: "*i64" for name in ("key_offsets", "key_counts", "query_offsets", "starts", "offsets")}
    types |= {"keys": "*bf16", "queries": "*bf16"}
    blocks = {"BLOCK_S": fused_plan.SEGMENTS}
    signature = arguments(pack_segments, types, **blocks)
    builds: list[Build] = [Build(pack_segments, signature, blocks, num_warps=1, tensor_cores=False)]
    for regions in fused_plan.SIZES:
        constants = {"NORM": "l2norm", "CLIPPED": True, "FOCAL": "prob", "PEAK": True, "ALIGNED": True}
        constants |= {"PRECISION": "tf32", **fused_plan.tile(regions, "sm_80").constants}
        signature = arguments(attend_fused, types, **constants)
        builds.append(FusedBuild(attend_fused, signature, constants, labels=("bf16", f"{regions}"), regions=regions))
    return builds


AHEAD_OF_TIME = _builds()
