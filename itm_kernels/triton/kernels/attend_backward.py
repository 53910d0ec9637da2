# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Backward of the attention: from gradients at the cosines to gradients at logits, products and Gram matrix.

    da_k = dp s_k + 2 dQ (G a)_k + [k is the first arg-max] dpeak      dlogit_k = a_k (da_k - sum_j a_j da_j)
    direct: ds_k <- dp a_k                                              dG += sum_q dQ a a^T

Owner: a program owns one key group and one tile of queries, or one part of one group's dG (parts are added in one order
afterwards), or what some queries take of themselves: no atomics. Read: products, factors, G and a query's state.
Written: lambda dlogit and dp a in the type of the products, for `feature_norm_backward`, which owns the sums over
segments. Accumulation float32. The trick: the state holds every sum (sum_j a_j da_j = dp p + 2 dQ Q + dpeak a_top), so
that none is made again and all owners are one launch. BFAN's focal step needs no line: its weights are a softmax over
the kept keys, 0 elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import Build, attention_builds, backward_types
from itm_kernels.triton.kernels.attend import load_gram, streamed_image
from itm_kernels.triton.kernels.words import (
    CUT,
    DOT,
    GRAD_COSINE,
    GRAD_PEAK,
    QUADRATIC,
    SCALE,
    TOP,
    corner,
    gradients_of_cosine,
    load_logits,
    plane,
    segments_of,
    weights_of,
    within,
)


@triton.jit
def load_state(d, group, o_query, m_query, FOCAL: tl.constexpr, PEAK: tl.constexpr):
    """Top, scale and cut of the weights; gradients at q . c, |c|^2 and the peak; sum_j a_j da_j."""
    dot = tl.load(plane(d.state, DOT, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    quadratic = tl.load(plane(d.state, QUADRATIC, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    scale = tl.load(plane(d.state, SCALE, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    top = tl.load(plane(d.state, TOP, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    grad = tl.load(plane(d.state, GRAD_COSINE, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    norm = tl.load(d.query_norms + o_query, mask=m_query, other=0.0)
    grad_dot, grad_quadratic, _ = gradients_of_cosine(grad, dot, quadratic, norm)
    mean = grad_dot * dot + 2.0 * grad_quadratic * quadratic
    cut = top
    if FOCAL != "none":
        cut = tl.load(plane(d.state, CUT, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0)
    grad_peak = mean
    if PEAK:
        grad_peak = tl.load(
            plane(d.state, GRAD_PEAK, group, d.groups, d.num_queries) + o_query, mask=m_query, other=0.0
        )
        mean += grad_peak * scale
    return top, scale, cut, grad_dot, grad_quadratic, grad_peak, mean


@triton.jit
def first_at_top(logit, o_key, top):
    """Smallest key whose logit is the largest; past every key where there is none."""
    return tl.min(tl.where(logit == top[:, None], o_key[None, :], 1 << 30), 1)


@triton.jit
def grad_at_logits(raw, weight, image, o_key, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK: tl.constexpr):
    grad = grad_dot[:, None] * raw + (2.0 * grad_quadratic)[:, None] * image - mean[:, None]
    if PEAK:
        grad += tl.where(o_key[None, :] == first[:, None], grad_peak[:, None], 0.0)
    return weight * grad


@triton.jit
def store_gradients(d, logit_grad, direct, query, row, m_query, key, column, left):
    first = corner(query, key, d.stride_query, d.stride_key)
    at = within(row, column, d.stride_query, d.stride_key)
    mask = m_query[:, None] & (column < left)[None, :]
    tl.store(d.grad_features + first + at, logit_grad.to(d.grad_features.dtype.element_ty), mask=mask)
    tl.store(d.grad_direct + first + at, direct.to(d.grad_direct.dtype.element_ty), mask=mask)


@triton.jit
def store_gram(grad_gram, part, most, o_row, o_column, block):
    at = o_row[:, None] * most + o_column[None, :]
    tl.store(
        grad_gram + tl.cast(part, tl.int64) * most * most + at,
        block,
        mask=(o_row < most)[:, None] & (o_column < most)[None, :],
    )


@triton.jit
def held_backward(
    d, group, query, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    PEAK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row, o_main = tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    o_query = query + row
    first_key = tl.load(d.key_offsets + group)
    segment = segments_of(d.segments, o_query, d.num_queries)
    m_query = segment >= 0
    top, scale, cut, grad_dot, grad_quadratic, grad_peak, mean = load_state(d, group, o_query, m_query, FOCAL, PEAK)
    raw, logit = load_logits(d, query, row, segment, first_key, o_main, count, lambda_softmax, NORM, CLIPPED)
    weight = weights_of(logit, top, scale, cut, FOCAL)
    image = tl.dot(weight, load_gram(d.gram, group, d.most, o_main, o_main, count), input_precision=PRECISION)
    first = tl.full([BLOCK_Q], 0, tl.int32)
    if PEAK:
        first = first_at_top(logit, o_main, top)
    if REST > 0:
        o_rest = MAIN + tl.arange(0, REST)
        raw_rest, logit_rest = load_logits(
            d, query, row, segment, first_key, o_rest, count, lambda_softmax, NORM, CLIPPED
        )
        weight_rest = weights_of(logit_rest, top, scale, cut, FOCAL)
        down = load_gram(d.gram, group, d.most, o_rest, o_main, count)
        image = tl.dot(weight_rest, down, image, input_precision=PRECISION)
        across = load_gram(d.gram, group, d.most, o_main, o_rest, count)
        image_rest = tl.dot(weight, across, input_precision=PRECISION)
        corner_gram = load_gram(d.gram, group, d.most, o_rest, o_rest, count)
        image_rest = tl.dot(weight_rest, corner_gram, image_rest, input_precision=PRECISION)
        if PEAK:
            first = tl.minimum(first, first_at_top(logit_rest, o_rest, top))
        grad_rest = lambda_softmax * grad_at_logits(
            raw_rest, weight_rest, image_rest, o_rest, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
        )
        store_gradients(d, grad_rest, grad_dot[:, None] * weight_rest, query, row, m_query, first_key, o_rest, count)
    grad = lambda_softmax * grad_at_logits(
        raw, weight, image, o_main, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
    )
    store_gradients(d, grad, grad_dot[:, None] * weight, query, row, m_query, first_key, o_main, count)


@triton.jit
def streamed_backward(
    d, group, query, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    PEAK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    o_query = query + row
    first_key = tl.load(d.key_offsets + group)
    segment = segments_of(d.segments, o_query, d.num_queries)
    m_query = segment >= 0
    top, scale, cut, grad_dot, grad_quadratic, grad_peak, mean = load_state(d, group, o_query, m_query, FOCAL, PEAK)
    first = tl.full([BLOCK_Q], 1 << 30, tl.int32)
    if PEAK:
        for start in range(0, count, BLOCK_K):
            _, logit = load_logits(
                d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
            )
            first = tl.minimum(first, first_at_top(logit, start + column, top))
    for start in range(0, count, BLOCK_K):
        raw, logit = load_logits(
            d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
        )
        weight = weights_of(logit, top, scale, cut, FOCAL)
        image = streamed_image(
            d, query, segment, first_key, start + column, count, group, lambda_softmax, top, scale, cut, NORM, CLIPPED,
            FOCAL, PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        grad = lambda_softmax * grad_at_logits(
            raw, weight, image, start + column, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
        )
        store_gradients(
            d, grad, grad_dot[:, None] * weight, query, row, m_query, first_key + start, column, count - start
        )


@triton.jit
def held_gram(
    d, group, part, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    PEAK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # Walks the query tiles of a part. dG is symmetric: the block across is the one below, turned. The weights are made
    # again, which costs less than keeping G and dG in registers at once.
    first_tile = part * d.tiles
    last_tile = tl.minimum(first_tile + d.tiles, tl.cdiv(d.num_queries, BLOCK_Q))
    first_key = tl.load(d.key_offsets + group)
    row, o_main = tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    sum_main = tl.zeros([MAIN, MAIN], tl.float32)
    if REST > 0:
        o_rest = MAIN + tl.arange(0, REST)
        sum_down = tl.zeros([REST, MAIN], tl.float32)
        sum_rest = tl.zeros([REST, REST], tl.float32)
    for i_tile in range(first_tile, last_tile):
        query = i_tile * BLOCK_Q
        o_query = query + row
        segment = segments_of(d.segments, o_query, d.num_queries)
        # A query of no segment has the weights of nothing: exp(0) times a scale of 0.
        top, scale, cut, _, grad_quadratic, _, _ = load_state(d, group, o_query, segment >= 0, FOCAL, PEAK)
        _, logit = load_logits(d, query, row, segment, first_key, o_main, count, lambda_softmax, NORM, CLIPPED)
        weight = weights_of(logit, top, scale, cut, FOCAL)
        pulled = tl.trans(weight * grad_quadratic[:, None])
        sum_main = tl.dot(pulled, weight, sum_main, input_precision=PRECISION)
        if REST > 0:
            _, logit_rest = load_logits(d, query, row, segment, first_key, o_rest, count, lambda_softmax, NORM, CLIPPED)
            weight_rest = weights_of(logit_rest, top, scale, cut, FOCAL)
            pulled_rest = tl.trans(weight_rest * grad_quadratic[:, None])
            sum_down = tl.dot(pulled_rest, weight, sum_down, input_precision=PRECISION)
            sum_rest = tl.dot(pulled_rest, weight_rest, sum_rest, input_precision=PRECISION)
    out = part * d.groups + group
    store_gram(d.grad_gram, out, d.most, o_main, o_main, sum_main)
    if REST > 0:
        store_gram(d.grad_gram, out, d.most, o_rest, o_main, sum_down)
        store_gram(d.grad_gram, out, d.most, o_main, o_rest, tl.trans(sum_down))
        store_gram(d.grad_gram, out, d.most, o_rest, o_rest, sum_rest)


@triton.jit
def streamed_gram(
    d, group, part, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    PEAK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Block after block of a part of dG, each of which walks the queries.
    first_key = tl.load(d.key_offsets + group)
    row, blocks = tl.arange(0, BLOCK_Q), tl.cdiv(count, BLOCK_K)
    first_query = part * d.tiles * BLOCK_Q
    last_query = tl.minimum(first_query + d.tiles * BLOCK_Q, d.num_queries)
    for block in range(0, blocks * blocks):
        o_row = (block // blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        o_column = (block % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
        for start in range(first_query, last_query, BLOCK_Q):
            o_query = start + row
            segment = segments_of(d.segments, o_query, d.num_queries)
            top, scale, cut, _, grad_quadratic, _, _ = load_state(d, group, o_query, segment >= 0, FOCAL, PEAK)
            _, logit = load_logits(d, start, row, segment, first_key, o_row, count, lambda_softmax, NORM, CLIPPED)
            left = weights_of(logit, top, scale, cut, FOCAL) * grad_quadratic[:, None]
            _, logit = load_logits(d, start, row, segment, first_key, o_column, count, lambda_softmax, NORM, CLIPPED)
            right = weights_of(logit, top, scale, cut, FOCAL)
            total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        store_gram(d.grad_gram, part * d.groups + group, d.most, o_row, o_column, total)


@triton.jit
def query_norm_gradient(d, program, BLOCK_G: tl.constexpr, BLOCK_Q: tl.constexpr):
    """What some queries take of themselves, over all key groups in one order."""
    o_query = program * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_query = tl.load(d.segments + o_query, mask=o_query < d.num_queries, other=-1) >= 0
    norm = tl.load(d.query_norms + o_query, mask=m_query, other=0.0)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, d.groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        mask = (group < d.groups)[:, None] & m_query[None, :]
        at = group.to(tl.int64)[:, None] * d.num_queries + o_query[None, :]
        stride = tl.cast(d.groups, tl.int64) * d.num_queries
        dot = tl.load(d.state + stride * DOT + at, mask=mask, other=0.0)
        quadratic = tl.load(d.state + stride * QUADRATIC + at, mask=mask, other=0.0)
        grad = tl.load(d.state + stride * GRAD_COSINE + at, mask=mask, other=0.0)
        _, _, grad_norm = gradients_of_cosine(grad, dot, quadratic, norm[None, :])
        total += tl.sum(grad_norm, 0)
    tl.store(d.own + o_query, tl.where(norm == 0.0, 0.0, total / norm), mask=o_query < d.num_queries)


@triton.jit
def attend_backward(
    directions, lambda_softmax,
    FLOORS: tl.constexpr, MAINS: tl.constexpr, RESTS: tl.constexpr, STREAMED: tl.constexpr,  # as in attend
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, GRAM_Q: tl.constexpr, SUM_G: tl.constexpr, SUM_Q: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(len(STREAMED)):
        d = directions[i]
        programs = d.groups * d.parts  # these walk longest: they begin first
        if (program >= 0) & (program < programs):
            group, part = program % d.groups, program // d.groups
            count = tl.load(d.key_counts + group).to(tl.int32)
            for c in tl.static_range(len(MAINS[i])):
                if (count > FLOORS[i][c]) & (count <= MAINS[i][c] + RESTS[i][c]):
                    held_gram(
                        d, group, part, count, lambda_softmax, NORM, CLIPPED, FOCAL, PEAK, PRECISION, GRAM_Q,
                        MAINS[i][c], RESTS[i][c],
                    )  # fmt: skip
            if STREAMED[i] >= 0 and count > STREAMED[i]:
                streamed_gram(
                    d, group, part, count, lambda_softmax, NORM, CLIPPED, FOCAL, PEAK, PRECISION, GRAM_Q, BLOCK_K
                )
        program -= programs
    for i in tl.static_range(len(STREAMED)):
        d = directions[i]
        programs = d.groups * tl.cdiv(d.num_queries, BLOCK_Q)
        if (program >= 0) & (program < programs):
            group, query = program % d.groups, (program // d.groups) * BLOCK_Q
            count = tl.load(d.key_counts + group).to(tl.int32)
            for c in tl.static_range(len(MAINS[i])):
                if (count > FLOORS[i][c]) & (count <= MAINS[i][c] + RESTS[i][c]):
                    held_backward(
                        d, group, query, count, lambda_softmax, NORM, CLIPPED, FOCAL, PEAK, PRECISION, BLOCK_Q,
                        MAINS[i][c], RESTS[i][c],
                    )  # fmt: skip
            if STREAMED[i] >= 0 and count > STREAMED[i]:
                streamed_backward(
                    d, group, query, count, lambda_softmax, NORM, CLIPPED, FOCAL, PEAK, PRECISION, BLOCK_Q, BLOCK_K
                )
        program -= programs
    for i in tl.static_range(len(STREAMED)):
        programs = tl.cdiv(directions[i].num_queries, SUM_Q)
        if (program >= 0) & (program < programs):
            query_norm_gradient(directions[i], program, SUM_G, SUM_Q)
        program -= programs


def _builds() -> list[Build]:
    return attention_builds(
        attend_backward, backward_types,
        PEAK=True, GRAM_Q=tiles.GRAM_QUERIES, SUM_G=tiles.SUM_GROUPS, SUM_Q=tiles.SUM_QUERIES,
    )  # fmt: skip


AHEAD_OF_TIME = _builds()
