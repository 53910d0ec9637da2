# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Backward of the attention: from gradients at the cosines to gradients at logits, products and Gram matrix.

    da_k = dp s_k + 2 dQ (G a)_k + [k is the first arg-max] dpeak      dlogit_k = a_k (da_k - sum_j a_j da_j)
    direct: ds_k <- dp a_k                                              dG += sum_q dQ a a^T

Owner: a program owns one key group and one tile of queries; in `gram_gradient` one part of one group's dG, and parts
are added in one order: no atomics. Read: products, factors, G and a query's state. Written: lambda dlogit and dp a in
the type of the products, for `feature_norm_backward`, which owns the sums over segments. Accumulation float32. The
trick: the state holds every sum (sum_j a_j da_j = dp p + 2 dQ Q + dpeak a_top), so that none is made again. BFAN's
focal step needs no line: its weights are a softmax over the kept keys, 0 elsewhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build, attention_builds
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
def load_state(
    state, query_norms, group, groups, o_query, m_query, num_queries, FOCAL: tl.constexpr, PEAK: tl.constexpr
):
    """Top, scale and cut of the weights; gradients at q . c, |c|^2 and the peak; sum_j a_j da_j."""
    dot = tl.load(plane(state, DOT, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    quadratic = tl.load(plane(state, QUADRATIC, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    scale = tl.load(plane(state, SCALE, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    top = tl.load(plane(state, TOP, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    grad = tl.load(plane(state, GRAD_COSINE, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    norm = tl.load(query_norms + o_query, mask=m_query, other=0.0)
    grad_dot, grad_quadratic, _ = gradients_of_cosine(grad, dot, quadratic, norm)
    mean = grad_dot * dot + 2.0 * grad_quadratic * quadratic
    cut = top
    if FOCAL != "none":
        cut = tl.load(plane(state, CUT, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
    grad_peak = mean
    if PEAK:
        grad_peak = tl.load(plane(state, GRAD_PEAK, group, groups, num_queries) + o_query, mask=m_query, other=0.0)
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
def store_gradients(
    grad_features, grad_direct, logit_grad, direct, query, row, m_query, key, column, left, stride_query, stride_key
):
    first = corner(query, key, stride_query, stride_key)
    at = within(row, column, stride_query, stride_key)
    mask = m_query[:, None] & (column < left)[None, :]
    tl.store(grad_features + first + at, logit_grad.to(grad_features.dtype.element_ty), mask=mask)
    tl.store(grad_direct + first + at, direct.to(grad_direct.dtype.element_ty), mask=mask)


@triton.jit
def store_gram(grad_gram, part, most, o_row, o_column, block):
    at = o_row[:, None] * most + o_column[None, :]
    tl.store(
        grad_gram + tl.cast(part, tl.int64) * most * most + at,
        block,
        mask=(o_row < most)[:, None] & (o_column < most)[None, :],
    )


@triton.jit
def attend_backward(
    products, factors, tops, gram, segments, key_offsets, key_counts, state,  # as in attend
    query_norms,  # [num_queries] float32
    grad_features, grad_direct,  # by strides, out
    num_queries, num_keys, groups, most, stride_query, stride_key, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    query = (tl.program_id(0) // groups) * BLOCK_Q
    row, o_main = tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    o_query = query + row
    first_key, count = tl.load(key_offsets + group), tl.load(key_counts + group).to(tl.int32)
    if (count <= FLOOR) | (count > MAIN + REST):
        return
    segment = segments_of(segments, o_query, num_queries)
    m_query = segment >= 0
    top, scale, cut, grad_dot, grad_quadratic, grad_peak, mean = load_state(
        state, query_norms, group, groups, o_query, m_query, num_queries, FOCAL, PEAK
    )
    raw, logit = load_logits(
        products, factors, tops, query, row, segment, first_key, o_main, count, num_keys, stride_query, stride_key,
        lambda_softmax, NORM, CLIPPED,
    )  # fmt: skip
    weight = weights_of(logit, top, scale, cut, FOCAL)
    image = tl.dot(weight, load_gram(gram, group, most, o_main, o_main, count), input_precision=PRECISION)
    first = tl.full([BLOCK_Q], 0, tl.int32)
    if PEAK:
        first = first_at_top(logit, o_main, top)
    if REST > 0:
        o_rest = MAIN + tl.arange(0, REST)
        raw_rest, logit_rest = load_logits(
            products, factors, tops, query, row, segment, first_key, o_rest, count, num_keys, stride_query,
            stride_key, lambda_softmax, NORM, CLIPPED,
        )  # fmt: skip
        weight_rest = weights_of(logit_rest, top, scale, cut, FOCAL)
        down = load_gram(gram, group, most, o_rest, o_main, count)
        image = tl.dot(weight_rest, down, image, input_precision=PRECISION)
        across = load_gram(gram, group, most, o_main, o_rest, count)
        image_rest = tl.dot(weight, across, input_precision=PRECISION)
        corner_gram = load_gram(gram, group, most, o_rest, o_rest, count)
        image_rest = tl.dot(weight_rest, corner_gram, image_rest, input_precision=PRECISION)
        if PEAK:
            first = tl.minimum(first, first_at_top(logit_rest, o_rest, top))
        grad_rest = lambda_softmax * grad_at_logits(
            raw_rest, weight_rest, image_rest, o_rest, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
        )
        store_gradients(
            grad_features, grad_direct, grad_rest, grad_dot[:, None] * weight_rest, query, row, m_query, first_key,
            o_rest, count, stride_query, stride_key,
        )  # fmt: skip
    grad = lambda_softmax * grad_at_logits(
        raw, weight, image, o_main, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
    )
    store_gradients(
        grad_features, grad_direct, grad, grad_dot[:, None] * weight, query, row, m_query, first_key, o_main, count,
        stride_query, stride_key,
    )  # fmt: skip


@triton.jit
def gram_gradient(
    products, factors, tops, segments, key_offsets, key_counts, state, query_norms,
    grad_gram,  # [parts, groups, most, most] float32, out
    num_queries, num_keys, groups, most, tiles, stride_query, stride_key, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # A program owns one part of one group's dG and walks its query tiles. dG is symmetric: the block across is the one
    # below, turned. The weights are made again, which costs less than keeping G and dG in registers at once.
    group = tl.program_id(0) % groups
    first_tile = (tl.program_id(0) // groups) * tiles
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(num_queries, BLOCK_Q))
    first_key, count = tl.load(key_offsets + group), tl.load(key_counts + group).to(tl.int32)
    if (count <= FLOOR) | (count > MAIN + REST):
        return
    row, o_main = tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    sum_main = tl.zeros([MAIN, MAIN], tl.float32)
    if REST > 0:
        o_rest = MAIN + tl.arange(0, REST)
        sum_down = tl.zeros([REST, MAIN], tl.float32)
        sum_rest = tl.zeros([REST, REST], tl.float32)
    for i_tile in range(first_tile, last_tile):
        query = i_tile * BLOCK_Q
        o_query = query + row
        segment = segments_of(segments, o_query, num_queries)
        # A query of no segment has the weights of nothing: exp(0) times a scale of 0.
        top, scale, cut, _, grad_quadratic, _, _ = load_state(
            state, query_norms, group, groups, o_query, segment >= 0, num_queries, FOCAL, PEAK
        )
        _, logit = load_logits(
            products, factors, tops, query, row, segment, first_key, o_main, count, num_keys, stride_query, stride_key,
            lambda_softmax, NORM, CLIPPED,
        )  # fmt: skip
        weight = weights_of(logit, top, scale, cut, FOCAL)
        pulled = tl.trans(weight * grad_quadratic[:, None])
        sum_main = tl.dot(pulled, weight, sum_main, input_precision=PRECISION)
        if REST > 0:
            _, logit_rest = load_logits(
                products, factors, tops, query, row, segment, first_key, o_rest, count, num_keys, stride_query,
                stride_key, lambda_softmax, NORM, CLIPPED,
            )  # fmt: skip
            weight_rest = weights_of(logit_rest, top, scale, cut, FOCAL)
            pulled_rest = tl.trans(weight_rest * grad_quadratic[:, None])
            sum_down = tl.dot(pulled_rest, weight, sum_down, input_precision=PRECISION)
            sum_rest = tl.dot(pulled_rest, weight_rest, sum_rest, input_precision=PRECISION)
    part = tl.program_id(0)
    store_gram(grad_gram, part, most, o_main, o_main, sum_main)
    if REST > 0:
        store_gram(grad_gram, part, most, o_rest, o_main, sum_down)
        store_gram(grad_gram, part, most, o_main, o_rest, tl.trans(sum_down))
        store_gram(grad_gram, part, most, o_rest, o_rest, sum_rest)


@triton.jit
def attend_backward_streamed(
    products, factors, tops, gram, segments, key_offsets, key_counts, state, query_norms, grad_features, grad_direct,
    num_queries, num_keys, groups, most, stride_query, stride_key, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) % groups
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    query = (tl.program_id(0) // groups) * BLOCK_Q
    o_query = query + row
    first_key, count = tl.load(key_offsets + group), tl.load(key_counts + group).to(tl.int32)
    if count <= FLOOR:
        return
    segment = segments_of(segments, o_query, num_queries)
    m_query = segment >= 0
    top, scale, cut, grad_dot, grad_quadratic, grad_peak, mean = load_state(
        state, query_norms, group, groups, o_query, m_query, num_queries, FOCAL, PEAK
    )
    first = tl.full([BLOCK_Q], 1 << 30, tl.int32)
    if PEAK:
        for start in range(0, count, BLOCK_K):
            _, logit = load_logits(
                products, factors, tops, query, row, segment, first_key + start, column, count - start, num_keys,
                stride_query, stride_key, lambda_softmax, NORM, CLIPPED,
            )  # fmt: skip
            first = tl.minimum(first, first_at_top(logit, start + column, top))
    for start in range(0, count, BLOCK_K):
        raw, logit = load_logits(
            products, factors, tops, query, row, segment, first_key + start, column, count - start, num_keys,
            stride_query, stride_key, lambda_softmax, NORM, CLIPPED,
        )  # fmt: skip
        weight = weights_of(logit, top, scale, cut, FOCAL)
        image = streamed_image(
            products, factors, tops, gram, query, segment, first_key, start + column, count, num_keys, group, most,
            stride_query, stride_key, lambda_softmax, top, scale, cut, NORM, CLIPPED, FOCAL, PRECISION, BLOCK_Q,
            BLOCK_K,
        )  # fmt: skip
        grad = lambda_softmax * grad_at_logits(
            raw, weight, image, start + column, first, grad_dot, grad_quadratic, grad_peak, mean, PEAK
        )
        store_gradients(
            grad_features, grad_direct, grad, grad_dot[:, None] * weight, query, row, m_query, first_key + start,
            column, count - start, stride_query, stride_key,
        )  # fmt: skip


@triton.jit
def gram_gradient_streamed(
    products, factors, tops, segments, key_offsets, key_counts, state, query_norms,
    grad_gram,  # [groups, most, most] float32, out
    num_queries, num_keys, groups, most, stride_query, stride_key, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PEAK: tl.constexpr, PRECISION: tl.constexpr,
    FLOOR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A program owns a block of one group's dG and walks all queries.
    blocks = tl.cdiv(most, BLOCK_K)
    group = tl.program_id(0) // (blocks * blocks)
    o_row = (tl.program_id(0) // blocks % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_column = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_key, count = tl.load(key_offsets + group), tl.load(key_counts + group).to(tl.int32)
    if count <= FLOOR:
        return
    row = tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    for start in range(0, num_queries, BLOCK_Q):
        o_query = start + row
        segment = segments_of(segments, o_query, num_queries)
        top, scale, cut, _, grad_quadratic, _, _ = load_state(
            state, query_norms, group, groups, o_query, segment >= 0, num_queries, FOCAL, PEAK
        )
        _, logit = load_logits(
            products, factors, tops, start, row, segment, first_key, o_row, count, num_keys, stride_query, stride_key,
            lambda_softmax, NORM, CLIPPED,
        )  # fmt: skip
        left = weights_of(logit, top, scale, cut, FOCAL) * grad_quadratic[:, None]
        _, logit = load_logits(
            products, factors, tops, start, row, segment, first_key, o_column, count, num_keys, stride_query,
            stride_key, lambda_softmax, NORM, CLIPPED,
        )  # fmt: skip
        right = weights_of(logit, top, scale, cut, FOCAL)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    store_gram(grad_gram, group, most, o_row, o_column, total)


def _builds() -> list[Build]:
    types = {name: "*fp32" for name in ("factors", "tops", "gram", "state", "query_norms", "grad_gram")}
    types |= {"segments": "*i32", "key_offsets": "*i64", "key_counts": "*i64"}
    common = {"NORM": "l2norm", "CLIPPED": True, "FOCAL": "prob", "PEAK": True, "stride_key": 1}
    turned = "its rows are keys: 16 or 32, and the wide instructions of sm_90 and sm_100 start at 64"
    kernels = {attend_backward: "attend_backward", attend_backward_streamed: "attend_backward_streamed"}
    transposed = {gram_gradient: "gram_gradient", gram_gradient_streamed: "gram_gradient_streamed"}
    return attention_builds(kernels, types, common) + attention_builds(transposed, types, common, small_dots=turned)


AHEAD_OF_TIME = _builds()
