# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""The aggregation regulator: attention over the alignment vectors x_i of a pair, asked by its pooled vector.

    K_i = D tanh(k_i + bk)    P = D tanh(p + bp)    w = softmax_i(v . (K_i P))    r = sum_i w_i x_i    out = l2norm(r)

D is dropout by counters (``ops/dropout.py``): 0 or 1 / (1 - p). The value's bias moves no weight, so it is no argument.

Row ``g L + l`` is query l facing key group g, pair ``g S + s`` segment s of it. Owner: P and logits have one program
some pairs or rows; sums one a pair, which walks its queries twice for the norm and once for what is written. Read: rows
once or twice. Never in memory: masks, made again in the backward. Float32 throughout, for over the queries of a pair
nearly all of a gradient cancels; no atomics. The trick: v P is one vector a pair, so that logits do not wait for one
another, and four channels share a counter, whose four words interleave.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build, arguments
from itm_kernels.triton.directions import Masks
from itm_kernels.triton.kernels.gates import tanh_of
from itm_kernels.triton.kernels.squared_difference import load_rows, store_rows
from itm_kernels.triton.kernels.words import EPS, segments_of
from itm_kernels.triton.pair_tiles import CHANNELS, POOLED_QUERIES, POOLED_ROWS

KEYS_BRANCH, POOLED_BRANCH = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def dropout_scale(
    masks, group, segment, query, channel, BRANCH: tl.constexpr, GROUPS_ARE_IMAGES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """0 or 1 / (1 - p) for channels ``channel`` (a multiple of 4) and on; group, segment, query of each row."""
    of_group = (tl.cast(masks.first_group, tl.int64) + group).to(tl.uint32)
    of_segment = (tl.cast(masks.first_segment, tl.int64) + segment).to(tl.uint32)
    if GROUPS_ARE_IMAGES:
        image, caption = of_group, of_segment
    else:
        image, caption = of_segment, of_group
    four: tl.constexpr = BLOCK_S // 4
    place = tl.cast(masks.step, tl.int64) * (1 << 24) + BRANCH * (1 << 23) + channel // 4 + tl.arange(0, four)
    zeros = tl.zeros([BLOCK_N, four], tl.uint32)
    a, b, c, d = tl.philox_impl(
        zeros + image[:, None], zeros + caption[:, None], zeros + query.to(tl.uint32)[:, None],
        zeros + place.to(tl.uint32)[None, :], tl.cast(tl.cast(masks.seed_low, tl.int64), tl.uint32),
        tl.cast(tl.cast(masks.seed_high, tl.int64), tl.uint32),
    )  # fmt: skip
    word = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.where((word >> 8).to(tl.int32) >= masks.threshold, masks.scale, 0.0)


@triton.jit
def ask_pairs(
    pooled, bias, value, asked, masks, pairs, num_segments, width, DROPS: tl.constexpr,
    GROUPS_ARE_IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # The product becomes its tanh; asked: v P.
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_S)
    pair = (program // across) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = (program % across) * BLOCK_S
    o_channel = channel + tl.arange(0, BLOCK_S)
    m_channel = o_channel < width
    mask = (pair < pairs)[:, None] & m_channel[None, :]
    x = load_rows(pooled, pair, o_channel, width, mask)
    t = tanh_of(x + tl.load(bias + o_channel, mask=m_channel, other=0.0)[None, :])
    store_rows(pooled, pair, o_channel, width, mask, t)
    t = t * tl.load(value + o_channel, mask=m_channel, other=0.0)[None, :]
    if DROPS:
        t *= dropout_scale(
            masks, pair // num_segments, pair % num_segments, pair * 0, channel, POOLED_BRANCH, GROUPS_ARE_IMAGES,
            BLOCK_N, BLOCK_S,
        )  # fmt: skip
    store_rows(asked, pair, o_channel, width, mask, t)


@triton.jit
def pool_logits(
    keys, bias, asked, segments, offsets, masks, logits, count, num_queries, num_segments, width,
    DROPS: tl.constexpr, GROUPS_ARE_IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # The product becomes its tanh.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    group, query = o_row // num_queries, o_row % num_queries
    segment = segments_of(segments, tl.where(m_row, query, num_queries), num_queries)
    m_pair = segment >= 0
    pair = group.to(tl.int64) * num_segments + segment
    number = query - tl.load(offsets + segment, mask=m_pair, other=0).to(tl.int32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for channel in range(0, width, BLOCK_S):
        o_channel = channel + tl.arange(0, BLOCK_S)
        m_channel = o_channel < width
        mask = m_row[:, None] & m_channel[None, :]
        x = load_rows(keys, o_row, o_channel, width, mask)
        t = tanh_of(x + tl.load(bias + o_channel, mask=m_channel, other=0.0)[None, :])
        store_rows(keys, o_row, o_channel, width, mask, t)
        if DROPS:
            t *= dropout_scale(masks, group, segment, number, channel, KEYS_BRANCH, GROUPS_ARE_IMAGES, BLOCK_N, BLOCK_S)
        total += tl.sum(t * load_rows(asked, pair, o_channel, width, m_pair[:, None] & m_channel[None, :]), 1)
    tl.store(logits + o_row, total, mask=m_row)


@triton.jit
def _of_segment(offsets, counts, num_queries, num_segments, pair):
    """First row of a pair, and how many count."""
    begin = tl.load(offsets + pair % num_segments)
    first = (pair // num_segments).to(tl.int64) * num_queries + begin
    return first, tl.load(counts + pair % num_segments).to(tl.int32)


@triton.jit
def _weighted(vectors, weights, first, count, o_channel, width, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """Some channels of the weighted sum of a pair's rows; without weights of their mean."""
    total = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        x = load_rows(vectors, first + row, o_channel, width, (row < count)[:, None] & (o_channel < width)[None, :])
        if weights is not None:
            x *= tl.load(weights + first + row, mask=row < count, other=0.0)[:, None]
        total += tl.sum(x, 0)
    if weights is None:
        total = total / count.to(tl.float32)
    return total


@triton.jit
def mean_rows(
    vectors, offsets, counts, means, num_queries, num_segments, width, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_S)
    pair = program // across
    o_channel = (program % across) * BLOCK_S + tl.arange(0, BLOCK_S)
    first, count = _of_segment(offsets, counts, num_queries, num_segments, pair)
    total = _weighted(vectors, None, first, count, o_channel, width, BLOCK_Q, BLOCK_S)
    tl.store(means + pair.to(tl.int64) * width + o_channel, total, mask=o_channel < width)


@triton.jit
def softmax_queries(
    logits, offsets, counts, weights, num_queries, num_segments, BLOCK_Q: tl.constexpr
):  # fmt: skip
    pair = tl.program_id(0)
    first, count = _of_segment(offsets, counts, num_queries, num_segments, pair)
    top = -float("inf")
    total = 0.0
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        x = tl.load(logits + first + row, mask=row < count, other=-float("inf"))
        above = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above), 0)
        top = above
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        x = tl.load(logits + first + row, mask=row < count, other=0.0)
        tl.store(weights + first + row, tl.exp(x - top) / total, mask=row < count)


@triton.jit
def pool_rows(
    vectors, weights, offsets, counts, pooled, norms, num_queries, num_segments, width, BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    first, count = _of_segment(offsets, counts, num_queries, num_segments, pair)
    square = 0.0
    for channel in range(0, width, BLOCK_S):
        x = _weighted(vectors, weights, first, count, channel + tl.arange(0, BLOCK_S), width, BLOCK_Q, BLOCK_S)
        square += tl.sum(x * x, 0)
    norm = tl.sqrt_rn(square)
    for channel in range(0, width, BLOCK_S):
        o_channel = channel + tl.arange(0, BLOCK_S)
        x = _weighted(vectors, weights, first, count, o_channel, width, BLOCK_Q, BLOCK_S)
        tl.store(pooled + pair.to(tl.int64) * width + o_channel, x / (norm + EPS), mask=o_channel < width)
    tl.store(norms + pair, norm)


@triton.jit
def pool_rows_backward(
    vectors, weights, segments, counts, grad, grad_weights, grad_vectors, count, num_queries, num_segments, width,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # From the gradient at the sum (WEIGHTED) or the mean of a pair's rows: added to that of the rows; that of weights.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    query = o_row % num_queries
    segment = segments_of(segments, tl.where(m_row, query, num_queries), num_queries)
    m_pair = segment >= 0
    pair = (o_row // num_queries).to(tl.int64) * num_segments + segment
    if WEIGHTED:
        weight = tl.load(weights + o_row, mask=m_pair, other=0.0)
    else:
        weight = tl.where(m_pair, 1.0 / tl.load(counts + segment, mask=m_pair, other=1).to(tl.float32), 0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for channel in range(0, width, BLOCK_S):
        o_channel = channel + tl.arange(0, BLOCK_S)
        mask = m_pair[:, None] & (o_channel < width)[None, :]
        dr = load_rows(grad, pair, o_channel, width, mask)
        if WEIGHTED:
            total += tl.sum(dr * load_rows(vectors, o_row, o_channel, width, mask), 1)
        dx = load_rows(grad_vectors, o_row, o_channel, width, mask) + weight[:, None] * dr
        store_rows(grad_vectors, o_row, o_channel, width, mask, dx)
    if WEIGHTED:
        tl.store(grad_weights + o_row, total, mask=m_row)


@triton.jit
def pool_logits_backward(
    keys, weights, grad_weights, pooled, value, offsets, counts, masks, grad_keys, grad_pooled, sums, grad_value,
    num_queries, num_segments, width, DROPS: tl.constexpr, GROUPS_ARE_IMAGES: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Of a pair and some channels: gradients at both products before their tanh, and what the pair adds to those of the
    # key's bias (`sums`) and the value. Queries of the padding get a zero: products read every row.
    program, across = tl.program_id(0), tl.cdiv(width, BLOCK_S)
    pair, channel = program // across, (program % across) * BLOCK_S
    o_channel = channel + tl.arange(0, BLOCK_S)
    m_channel = o_channel < width
    segment = pair % num_segments
    first, count = _of_segment(offsets, counts, num_queries, num_segments, pair)
    extent = (tl.load(offsets + segment + 1) - tl.load(offsets + segment)).to(tl.int32)
    mean = 0.0
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        weight = tl.load(weights + first + row, mask=row < count, other=0.0)
        mean += tl.sum(weight * tl.load(grad_weights + first + row, mask=row < count, other=0.0), 0)
    at = pair.to(tl.int64) * width + o_channel
    p = tl.load(pooled + at, mask=m_channel, other=0.0)
    v = tl.load(value + o_channel, mask=m_channel, other=0.0)
    scale_of_pooled = tl.full([BLOCK_S], 1.0, tl.float32)
    if DROPS:
        one = tl.zeros([1], tl.int32)
        scale_of_pooled = tl.sum(
            dropout_scale(masks, one + pair // num_segments, one + segment, one, channel, POOLED_BRANCH,
                          GROUPS_ARE_IMAGES, 1, BLOCK_S), 0
        )  # fmt: skip
    asked = p * scale_of_pooled * v
    total = tl.zeros([BLOCK_S], tl.float32)
    of_bias = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, extent, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        m_row = row < count
        mask = m_row[:, None] & m_channel[None, :]
        weight = tl.load(weights + first + row, mask=m_row, other=0.0)
        dl = weight * (tl.load(grad_weights + first + row, mask=m_row, other=0.0) - mean)
        t = load_rows(keys, first + row, o_channel, width, mask)
        factor = tl.where(mask, dl[:, None], 0.0)
        if DROPS:
            rows = row * 0
            factor *= dropout_scale(masks, rows + pair // num_segments, rows + segment, row, channel, KEYS_BRANCH,
                                    GROUPS_ARE_IMAGES, BLOCK_Q, BLOCK_S)  # fmt: skip
        total += tl.sum(factor * t, 0)
        dk = factor * asked[None, :] * (1.0 - t * t)
        of_bias += tl.sum(dk, 0)
        store_rows(grad_keys, first + row, o_channel, width, (row < extent)[:, None] & m_channel[None, :], dk)
    tl.store(sums + at, of_bias, mask=m_channel)
    tl.store(grad_value + at, total * p * scale_of_pooled, mask=m_channel)
    tl.store(grad_pooled + at, total * v * scale_of_pooled * (1.0 - p * p), mask=m_channel)


def _builds() -> list[Build]:
    floats = (
        "pooled", "bias", "value", "asked", "keys", "logits", "vectors", "means", "weights", "norms", "grad",
        "grad_weights", "grad_vectors", "grad_keys", "grad_pooled", "sums", "grad_value",
    )  # fmt: skip
    types = {name: "*fp32" for name in floats} | {"offsets": "*i64", "counts": "*i64", "segments": "*i32"}
    types["masks"] = Masks("i32", "i32", "i32", "i32", "i32", "i32", "fp32")
    of_rows = {"BLOCK_N": POOLED_ROWS, "BLOCK_S": CHANNELS}
    of_pairs = {"BLOCK_Q": POOLED_QUERIES, "BLOCK_S": CHANNELS}
    builds = []

    def add(kernel, constants, *labels, **more):
        signature = arguments(kernel, types | more, **constants)
        builds.append(Build(kernel, signature, constants, num_warps=2, tensor_cores=False, labels=labels))

    add(softmax_queries, {"BLOCK_Q": POOLED_QUERIES})
    add(mean_rows, of_pairs)
    add(pool_rows, of_pairs)
    for label, flag in (("dropout", True), ("plain", False)):
        flags = {"DROPS": flag, "GROUPS_ARE_IMAGES": True}
        add(ask_pairs, of_rows | flags, label)
        add(pool_logits, of_rows | flags, label)
        add(pool_rows_backward, of_rows | {"WEIGHTED": flag}, "weighted" if flag else "mean")
        for element in ("bf16", "fp32"):
            add(pool_logits_backward, of_pairs | flags, label, element, grad_keys=f"*{element}")
    return builds


AHEAD_OF_TIME = _builds()
