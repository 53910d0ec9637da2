# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Attention filtration: one weight for each node x_i of a pair, through a batch normalisation, and the pair's score.

    l_i = w . x_i + b     z_i = (l_i - mean) / sqrt(var + eps)     a_i = sigmoid(gamma z_i + beta)
    r = sum_i a_i x_i / (sum_i a_i + 1e-8)       score = sigmoid(w_e . l2norm(r) + b_e)
    da_i = (dr . x_i - dr . r) / sum a      dy_i = a_i (1 - a_i) da_i      dx_i = a_i / sum a dr + dl_i w
    dl_i = gamma / sqrt(var + eps) (dy_i - mean(dy) - z_i mean(dy z))      means over a caption's batch, else 0

Node 0 of a pair is the whole of it, the others are its words. Owner: logits and a have one program some nodes; a pair
has one, which walks its nodes once, in the backward three times. Read: the nodes of a pair, after the first time from
the cache. Never in memory: z, r and dr. Float32; sigmoids in float64, for gradients are small differences of them. No
atomics, sums of parameters come back a pair each. The trick: the statistics' gradients are the sums of dy and dy z, so
that a pass over all images of a caption hands on two numbers a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build, arguments
from itm_kernels.triton.kernels.squared_difference import load_rows, store_rows
from itm_kernels.triton.kernels.words import EPS, segments_of
from itm_kernels.triton.pair_tiles import ROWS, WEIGHTS, WIDTH, filtration_tile


@triton.jit
def nodes_of(offsets, counts, num_queries, num_segments, pair):
    """Row of a pair's first word, and its nodes, without padding and with it."""
    segment = pair % num_segments
    begin = tl.load(offsets + segment)
    first = (pair // num_segments).to(tl.int64) * num_queries + begin
    count = tl.load(counts + segment).to(tl.int32)
    return first, 1 + count, 1 + (tl.load(offsets + segment + 1) - begin).to(tl.int32)


@triton.jit
def node_row(node, first, words, pair):
    """Where nodes of a pair stand: the words of all pairs come before the wholes."""
    return tl.where(node == 0, tl.cast(words, tl.int64) + pair, first + node - 1)


@triton.jit
def _sigmoid(x):
    return (1.0 / (1.0 + tl.exp(-x.to(tl.float64)))).to(tl.float32)


@triton.jit
def _rate(statistics, segment, num_segments, eps, mask=None):
    """Mean of captions, and 1 / sqrt(var + eps)."""
    variance = tl.load(statistics + num_segments + segment, mask=mask)
    return tl.load(statistics + segment, mask=mask), tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _load_nodes(nodes, weights, start, count, first, words, pair, o_channel, width, BLOCK_Q: tl.constexpr):
    """Some nodes of a pair: which are there, their rows, x and a, 0 outside."""
    node = start + tl.arange(0, BLOCK_Q)
    m_node = node < count
    o_row = node_row(node, first, words, pair)
    x = load_rows(nodes, o_row, o_channel, width, m_node[:, None] & (o_channel < width)[None, :])
    return m_node, o_row, x, tl.load(weights + o_row, mask=m_node, other=0.0)


@triton.jit
def _sum_of_nodes(
    nodes, weights, first, count, words, pair, o_channel, width, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """r and 1 / sum of the weights."""
    total, summed = EPS, tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, count, BLOCK_Q):
        _, _, x, a = _load_nodes(nodes, weights, start, count, first, words, pair, o_channel, width, BLOCK_Q)
        total += tl.sum(a, 0)
        summed += tl.sum(a[:, None] * x, 0)
    return summed / total, 1.0 / total


@triton.jit
def node_logits(
    vectors, weight, bias, logits, count, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_row = o_row < count
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_D):
        o_column = start + tl.arange(0, BLOCK_D)
        m_column = o_column < width
        x = load_rows(vectors, o_row, o_column, width, m_row[:, None] & m_column[None, :])
        total += tl.sum(x * tl.load(weight + o_column, mask=m_column, other=0.0)[None, :], 1)
    tl.store(logits + o_row, total + tl.load(bias), mask=m_row)


@triton.jit
def node_weights(
    logits, segments, statistics, norm_weight, norm_bias, eps, weights, pairs, words, num_queries, num_segments,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # a of every node, 0 for words of the padding.
    o_row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_word = segments_of(segments, tl.where(o_row < words, o_row % num_queries, num_queries), num_queries)
    segment = tl.where(o_row < words, of_word, (o_row - words) % num_segments)
    m_row = o_row < words + pairs
    m_node = m_row & (segment >= 0)
    mean, rate = _rate(statistics, segment, num_segments, eps, m_node)
    z = (tl.load(logits + o_row, mask=m_node) - mean) * rate
    a = tl.where(m_node, _sigmoid(z * tl.load(norm_weight) + tl.load(norm_bias)), 0.0)
    tl.store(weights + o_row, a, mask=m_row)


@triton.jit
def filtrate_nodes(
    nodes, weights, offsets, counts, score_weight, score_bias, scores, words, num_queries, num_segments, width,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    first, count, _ = nodes_of(offsets, counts, num_queries, num_segments, pair)
    o_channel = tl.arange(0, BLOCK_S)
    r, _ = _sum_of_nodes(nodes, weights, first, count, words, pair, o_channel, width, BLOCK_Q, BLOCK_S)
    along = tl.sum(r * tl.load(score_weight + o_channel, mask=o_channel < width, other=0.0), 0)
    norm = tl.sqrt_rn(tl.sum(r * r, 0))
    tl.store(scores + pair, _sigmoid(along / (norm + EPS) + tl.load(score_bias)))


@triton.jit
def filtrate_nodes_backward(
    nodes, logits, weights, offsets, counts, statistics, weight, norm_weight, eps, score_weight, score_bias,
    grad_scores, means, slopes, grad_nodes, sums, words, num_queries, num_segments, width, BATCH: tl.constexpr,
    DESCENDS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # DESCENDS: to nodes and sums [pairs, 2 S + 2], else to slopes alone. BATCH: the statistics are the batch's.
    pair = tl.program_id(0)
    segment = pair % num_segments
    first, count, extent = nodes_of(offsets, counts, num_queries, num_segments, pair)
    mean, rate = _rate(statistics, segment, num_segments, eps)
    o_channel = tl.arange(0, BLOCK_S)
    m_channel = o_channel < width
    r, share = _sum_of_nodes(nodes, weights, first, count, words, pair, o_channel, width, BLOCK_Q, BLOCK_S)
    w = tl.load(score_weight + o_channel, mask=m_channel, other=0.0)
    along, norm = tl.sum(r * w, 0), tl.sqrt_rn(tl.sum(r * r, 0))
    score = _sigmoid(along / (norm + EPS) + tl.load(score_bias))
    of_logit = tl.load(grad_scores + pair) * score * (1.0 - score)
    push = tl.where(norm == 0.0, 0.0, of_logit / (norm + EPS))
    pull = tl.where(norm == 0.0, 0.0, push * along / (norm * (norm + EPS)))
    dr = push * w - pull * r
    # Nodes may be much alike and dr all but orthogonal to them: what tells them apart is taken before the product, and
    # its mean, zero but for rounding, off after it.
    back, apart, apart_z, steep, steep_z = 0.0, 0.0, 0.0, 0.0, 0.0
    for start in range(0, count, BLOCK_Q):
        m_node, o_row, x, a = _load_nodes(nodes, weights, start, count, first, words, pair, o_channel, width, BLOCK_Q)
        z = (tl.load(logits + o_row, mask=m_node, other=0.0) - mean) * rate
        da, slope = tl.sum(dr[None, :] * (x - r[None, :]), 1), a * (1.0 - a)
        back += tl.sum(a * da, 0) * share
        apart += tl.sum(slope * da, 0)
        apart_z += tl.sum(slope * da * z, 0)
        steep += tl.sum(slope, 0)
        steep_z += tl.sum(slope * z, 0)
    tl.store(slopes + 2 * pair, (apart - back * steep) * share)
    tl.store(slopes + 2 * pair + 1, (apart_z - back * steep_z) * share)
    if DESCENDS:
        at = sums + pair.to(tl.int64) * (2 * width + 2)
        tl.store(at + width + o_channel, push * r, mask=m_channel)
        tl.store(at + 2 * width + 1, of_logit)
        of_mean, of_mean_z = 0.0, 0.0
        if BATCH:
            of_mean, of_mean_z = tl.load(means + segment), tl.load(means + num_segments + segment)
        outer = tl.load(norm_weight) * rate
        v = tl.load(weight + o_channel, mask=m_channel, other=0.0)
        of_weight, of_bias = tl.zeros([BLOCK_S], tl.float32), 0.0
        for start in range(0, extent, BLOCK_Q):
            m_node, o_row, x, a = _load_nodes(
                nodes, weights, start, count, first, words, pair, o_channel, width, BLOCK_Q
            )
            z = (tl.load(logits + o_row, mask=m_node, other=0.0) - mean) * rate
            dy = a * (1.0 - a) * (tl.sum(dr[None, :] * (x - r[None, :]), 1) - back) * share
            dl = tl.where(m_node, outer * (dy - of_mean - z * of_mean_z), 0.0)
            dx = (a * share)[:, None] * dr[None, :] + dl[:, None] * v[None, :]  # of the padding: 0
            inside = (start + tl.arange(0, BLOCK_Q) < extent)[:, None] & m_channel[None, :]
            store_rows(grad_nodes, o_row, o_channel, width, inside, dx)
            of_weight += tl.sum(dl[:, None] * x, 0)
            of_bias += tl.sum(dl, 0)
        tl.store(at + o_channel, of_weight, mask=m_channel)
        tl.store(at + 2 * width, of_bias)


def _builds() -> list[Build]:
    floats = (
        "nodes", "vectors", "logits", "statistics", "weight", "bias", "norm_weight", "norm_bias", "score_weight",
        "score_bias", "scores", "grad_scores", "means", "slopes", "grad_nodes", "sums", "weights",
    )  # fmt: skip
    types = {name: "*fp32" for name in floats} | {"offsets": "*i64", "counts": "*i64", "segments": "*i32"}
    types["eps"] = "fp32"
    builds = []
    for kernel, constants in ((node_logits, {"BLOCK_N": ROWS, "BLOCK_D": WIDTH}), (node_weights, {"BLOCK_N": WEIGHTS})):
        builds.append(Build(kernel, arguments(kernel, types, **constants), constants, tensor_cores=False))
    for width in (256, 1024):
        tile = dict(zip(("BLOCK_Q", "BLOCK_S"), filtration_tile(width), strict=True))
        signature = arguments(filtrate_nodes, types, **tile)
        builds.append(Build(filtrate_nodes, signature, tile, tensor_cores=False, labels=(str(width),)))
        for label, batch, descends in (("batch", True, True), ("constants", False, True), ("slopes", False, False)):
            constants = tile | {"BATCH": batch, "DESCENDS": descends}
            signature = arguments(filtrate_nodes_backward, types, **constants)
            labels = (str(width), label)
            builds.append(Build(filtrate_nodes_backward, signature, constants, tensor_cores=False, labels=labels))
    return builds


AHEAD_OF_TIME = _builds()
