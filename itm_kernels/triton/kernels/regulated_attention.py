# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Attention weights of a block of pairs from its products, and the way back to the products and the temperatures.

    x = phi(s)    n = x / (norm_segment(x) + eps)    a = softmax_k(t n)
    dl = a (da - sum_k a da)    dt = sum_k dl n    dn = t dl
    dx = dn / (norm + eps) - x sum_q(dn x) / (norm (norm + eps)^2)

Products are [groups, keys, queries]: every query of a group faces every key. Owner: norms have one program a pair and
some keys, which walks the queries of the segment; weights have one a group and some queries, which walks the keys twice
(largest logit and sum, then weights). Read: each array twice, the second time from the cache. Never in memory: logits,
normalised products. Float32, no atomics: sums run in one order. The trick: temperatures differ from query to query, and
what a key needs of a segment is one norm, so that neither walk holds a whole pair and any number of keys fits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.words import EPS, NEGATIVE_SLOPE, feature, segments_of
from itm_kernels.triton.pair_tiles import KEYS, QUERIES, SEGMENT_KEYS, SEGMENT_QUERIES


@triton.jit
def _load(matrix, group, most, num_queries, o_key, o_query, mask):
    """Keys by queries of one group, 0 outside."""
    at = (group * most + o_key.to(tl.int64))[:, None] * num_queries + o_query[None, :]
    return tl.load(matrix + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_pair(num_segments, most, BLOCK_K: tl.constexpr):
    """Group, segment, and keys of a program of a pair."""
    program, blocks = tl.program_id(0), tl.cdiv(most, BLOCK_K)
    pair = program // blocks
    o_key = (program % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    return (pair // num_segments).to(tl.int64), pair % num_segments, o_key


@triton.jit
def segment_norms(
    products, offsets, counts, norms, most, num_queries, num_segments, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    group, segment, o_key = _of_pair(num_segments, most, BLOCK_K)
    begin, count = tl.load(offsets + segment), tl.load(counts + segment).to(tl.int32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        mask = (o_key < most)[:, None] & (row < count)[None, :]
        x = feature(_load(products, group, most, num_queries, o_key, begin + row, mask), True)
        total += tl.sum(x * x, 1)
    tl.store(norms + (group * num_segments + segment) * most + o_key, tl.sqrt_rn(total), mask=o_key < most)


@triton.jit
def _normalised(products, norms, group, segment, o_key, o_query, count, most, num_queries, num_segments):
    """Products over their norms, 0 where that is 0; and where there is a key and a query."""
    mask = (o_key < count)[:, None] & (segment >= 0)[None, :]
    x = feature(_load(products, group, most, num_queries, o_key, o_query, mask), True)
    at = (group * num_segments + segment)[None, :] * most + o_key[:, None]
    norm = tl.load(norms + at, mask=mask, other=0.0)
    return tl.where(norm > 0.0, x / (norm + EPS), tl.where(norm == 0.0, 0.0, norm)), mask


@triton.jit
def _of_queries(
    segments, temperatures, temperature, num_queries, WARMED: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Group, queries, their segments and temperatures."""
    program, blocks = tl.program_id(0), tl.cdiv(num_queries, BLOCK_Q)
    group = (program // blocks).to(tl.int64)
    o_query = (program % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    segment = segments_of(segments, o_query, num_queries)
    if WARMED:
        at = temperatures + group * num_queries + o_query
        warmth = tl.load(at, mask=o_query < num_queries, other=0.0)
    else:
        warmth = tl.zeros([BLOCK_Q], tl.float32) + temperature
    return group, o_query, segment, warmth


@triton.jit
def attention_weights(
    products, norms, key_counts, segments, temperatures, temperature, weights, most, num_queries, num_segments,
    WARMED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group, o_query, segment, warmth = _of_queries(segments, temperatures, temperature, num_queries, WARMED, BLOCK_Q)
    count = tl.load(key_counts + group).to(tl.int32)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, count, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        x, _ = _normalised(products, norms, group, segment, o_key, o_query, count, most, num_queries, num_segments)
        logit = tl.where((o_key < count)[:, None], x * warmth[None, :], -float("inf"))
        above = tl.maximum(top, tl.max(logit, 0))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(logit - above[None, :]), 0)
        top = above
    for start in range(0, most, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        x, mask = _normalised(products, norms, group, segment, o_key, o_query, count, most, num_queries, num_segments)
        weight = tl.where(mask, tl.exp(x * warmth[None, :] - top[None, :]) / total[None, :], 0.0)
        at = (group * most + o_key.to(tl.int64))[:, None] * num_queries + o_query[None, :]
        inside = (o_key < most)[:, None] & (o_query < num_queries)[None, :]
        tl.store(weights + at, weight.to(weights.dtype.element_ty), mask=inside)


@triton.jit
def attention_weights_backward(
    products, norms, key_counts, segments, temperatures, temperature, grad, grad_temperatures, most, num_queries,
    num_segments, WARMED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The gradient at the weights is overwritten by that at the normalised products. Weights are made again, in float32.
    group, o_query, segment, warmth = _of_queries(segments, temperatures, temperature, num_queries, WARMED, BLOCK_Q)
    count = tl.load(key_counts + group).to(tl.int32)
    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, count, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        x, mask = _normalised(products, norms, group, segment, o_key, o_query, count, most, num_queries, num_segments)
        logit = tl.where((o_key < count)[:, None], x * warmth[None, :], -float("inf"))
        above = tl.maximum(top, tl.max(logit, 0))
        scale, power = tl.exp(top - above), tl.exp(logit - above[None, :])
        total = total * scale + tl.sum(power, 0)
        mean = mean * scale + tl.sum(power * _load(grad, group, most, num_queries, o_key, o_query, mask), 0)
        top = above
    mean = mean / total
    of_temperature = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, most, BLOCK_K):
        o_key = start + tl.arange(0, BLOCK_K)
        x, mask = _normalised(products, norms, group, segment, o_key, o_query, count, most, num_queries, num_segments)
        weight = tl.where(mask, tl.exp(x * warmth[None, :] - top[None, :]) / total[None, :], 0.0)
        pull = weight * (_load(grad, group, most, num_queries, o_key, o_query, mask) - mean[None, :])
        of_temperature += tl.sum(pull * x, 0)
        at = (group * most + o_key.to(tl.int64))[:, None] * num_queries + o_query[None, :]
        inside = (o_key < most)[:, None] & (o_query < num_queries)[None, :]
        tl.store(grad + at, pull * warmth[None, :], mask=inside)
    tl.store(grad_temperatures + group * num_queries + o_query, of_temperature, mask=o_query < num_queries)


@triton.jit
def segment_norms_backward(
    products, norms, offsets, counts, grad, out, most, num_queries, num_segments, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Keys and queries of the padding get the zero that `attention_weights_backward` left for them.
    group, segment, o_key = _of_pair(num_segments, most, BLOCK_K)
    begin, m_key = tl.load(offsets + segment), o_key < most
    rows = (tl.load(offsets + segment + 1) - begin).to(tl.int32)
    count = tl.load(counts + segment).to(tl.int32)
    norm = tl.load(norms + (group * num_segments + segment) * most + o_key, mask=m_key, other=0.0)
    along = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        mask = m_key[:, None] & (row < count)[None, :]
        x = feature(_load(products, group, most, num_queries, o_key, begin + row, mask), True)
        along += tl.sum(x * _load(grad, group, most, num_queries, o_key, begin + row, mask), 1)
    # Without a norm there is no gradient: the true slope, 1 / eps, would swamp every other.
    push = tl.where(norm == 0.0, 0.0, 1.0 / (norm + EPS))
    pull = tl.where(norm == 0.0, 0.0, along * push * push / norm)
    for start in range(0, rows, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        mask = m_key[:, None] & (row < count)[None, :]
        raw = _load(products, group, most, num_queries, o_key, begin + row, mask)
        of_feature = _load(grad, group, most, num_queries, o_key, begin + row, mask) * push[:, None]
        of_feature -= feature(raw, True) * pull[:, None]
        of_product = tl.where(raw > 0.0, of_feature, of_feature * NEGATIVE_SLOPE)
        at = (group * most + o_key.to(tl.int64))[:, None] * num_queries + (begin + row)[None, :]
        inside = m_key[:, None] & (row < rows)[None, :]
        tl.store(out + at, tl.where(mask, of_product, 0.0).to(out.dtype.element_ty), mask=inside)


def _builds() -> list[Build]:
    of_pairs = {"BLOCK_Q": SEGMENT_QUERIES, "BLOCK_K": SEGMENT_KEYS}
    of_queries = {"BLOCK_Q": QUERIES, "BLOCK_K": KEYS}
    floats = ("products", "norms", "temperatures", "grad", "grad_temperatures")
    types = {name: "*fp32" for name in floats} | {"temperature": "fp32", "segments": "*i32"}
    types |= {name: "*i64" for name in ("offsets", "counts", "key_counts")}

    def build(kernel, constants, *labels, **more):
        signature = arguments(kernel, types | more, **constants)
        return Build(kernel, signature, constants, tensor_cores=False, labels=labels)

    builds = [build(segment_norms, of_pairs)]
    for warmed in (True, False):
        constants = of_queries | {"WARMED": warmed}
        builds.append(build(attention_weights_backward, constants, "warmed" if warmed else "plain"))
        for element in ARGUMENT_TYPES:
            label = ("warmed" if warmed else "plain", element)
            builds.append(build(attention_weights, constants, *label, weights=f"*{element}"))
    return builds + [build(segment_norms_backward, of_pairs, e, out=f"*{e}") for e in ARGUMENT_TYPES]


AHEAD_OF_TIME = _builds()
