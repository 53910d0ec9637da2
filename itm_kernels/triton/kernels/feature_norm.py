# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""``raw_feature_norm``: sums over the queries of a segment for each key, and the way back.

    x = phi(s) or s      logit = lambda x / (norm_segment(x) + eps)      softmax: logit = lambda exp(s - top) / sum

Owner: a program owns one segment and BLOCK_K keys, whatever groups they are of, and walks the segment's queries: sums
run in one order, and a NaN stays in its segment. Read: the products (and two gradients) once or twice, from the cache.
Never in memory: normalised features. Float32, no atomics. The trick: what a key needs of a segment is one factor, so
that the kernels behind this one own any run of queries, whole segments or not, and no caption is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import Build, arguments
from itm_kernels.triton.kernels.words import EPS, NEGATIVE_SLOPE, corner, feature, within


@triton.jit
def _load(products, query, key, row, column, mask, stride_query, stride_key):
    """Products [queries, keys] in float32, 0 outside."""
    at = within(row, column, stride_query, stride_key)
    return tl.load(products + corner(query, key, stride_query, stride_key) + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sums(
    products, begin, count, key, column, m_key, stride_query, stride_key, NORM: tl.constexpr, CLIPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each key: sum of squares, of magnitudes, or (largest, sum of exponentials)."""
    row = tl.arange(0, BLOCK_Q)
    top = tl.full([BLOCK_K], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_Q):
        mask = (row < count - start)[:, None] & m_key[None, :]
        x = feature(_load(products, begin + start, key, row, column, mask, stride_query, stride_key), CLIPPED)
        if NORM == "softmax":
            x = tl.where(mask, x, -float("inf"))
            above = tl.maximum(top, tl.max(x, 0))
            # A column of no key is -inf throughout; it must not make a NaN that a debugger would stop at.
            above = tl.where(m_key, above, 0.0)
            total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above[None, :]), 0)
            top = above
        elif NORM == "l1norm":
            total += tl.sum(tl.abs(x), 0)
        else:
            total += tl.sum(x * x, 0)
    return top, total


@triton.jit
def feature_norms(
    products,  # by strides
    factors,  # [segments, num_keys] float32, out: logit = factor * x
    tops,  # [segments, num_keys] float32, out: softmax alone
    offsets,  # [segments + 1] int64
    counts,  # [segments] int64
    num_keys, stride_query, stride_key, lambda_softmax,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_keys, BLOCK_K)
    i_segment = (tl.program_id(0) // blocks).to(tl.int64)
    key = (tl.program_id(0) % blocks) * BLOCK_K
    column = tl.arange(0, BLOCK_K)
    m_key = column < num_keys - key
    begin, count = tl.load(offsets + i_segment), tl.load(counts + i_segment).to(tl.int32)
    top, total = _sums(
        products, begin, count, key, column, m_key, stride_query, stride_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K
    )
    if NORM == "softmax":
        factor = lambda_softmax / total
        tl.store(tops + i_segment * num_keys + key + column, top, mask=m_key)
    elif NORM == "l1norm":
        factor = lambda_softmax / (total + EPS)
    else:
        factor = lambda_softmax / (tl.sqrt_rn(total) + EPS)
    tl.store(factors + i_segment * num_keys + key + column, factor, mask=m_key)


@triton.jit
def feature_norm_backward(
    products,  # by strides, like the next three
    grad_features,  # gradient at the normalised features (times lambda: at the logits)
    grad_direct,  # what reaches a product through q . c
    grad_products,  # out; may be `products`
    offsets,  # [segments + 1] int64: rows that belong to a segment, its padding included
    counts,  # [segments] int64: the valid ones
    key_groups,  # [num_keys] int32, -1: padding
    num_keys, stride_query, stride_key,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # With d the gradient at x / (n + eps): dx = d / (n + eps) - x sum(d x) / (n (n + eps)^2). A key whose products are
    # all zero has n = 0 and no gradient through its norm: the true slope, 1 / eps, would swamp every other gradient.
    blocks = tl.cdiv(num_keys, BLOCK_K)
    i_segment = (tl.program_id(0) // blocks).to(tl.int64)
    key = (tl.program_id(0) % blocks) * BLOCK_K
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    m_column = column < num_keys - key
    m_key = tl.load(key_groups + key + column, mask=m_column, other=-1) >= 0
    begin, count = tl.load(offsets + i_segment), tl.load(counts + i_segment).to(tl.int32)
    rows = (tl.load(offsets + i_segment + 1) - begin).to(tl.int32)

    push = tl.full([BLOCK_K], 1.0, tl.float32)
    pull = tl.zeros([BLOCK_K], tl.float32)
    top = tl.zeros([BLOCK_K], tl.float32)
    if NORM != "none":
        top, total = _sums(
            products, begin, count, key, column, m_key, stride_query, stride_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K
        )
        norm = tl.sqrt_rn(total) if NORM == "l2norm" else total
        along = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, count, BLOCK_Q):
            mask = (row < count - start)[:, None] & m_key[None, :]
            x = feature(_load(products, begin + start, key, row, column, mask, stride_query, stride_key), CLIPPED)
            if NORM == "softmax":
                x = tl.where(mask, tl.exp(x - top[None, :]), 0.0)
            along += tl.sum(
                _load(grad_features, begin + start, key, row, column, mask, stride_query, stride_key) * x, 0
            )
        if NORM == "softmax":
            push = 1.0 / norm
            pull = along / (norm * norm)
        else:
            scale = 1.0 / (norm + EPS)
            push = tl.where(norm == 0.0, 0.0, scale)
            pull = along * scale * scale
            pull = tl.where(norm == 0.0, 0.0, pull / norm if NORM == "l2norm" else pull)

    for start in range(0, rows, BLOCK_Q):
        mask = (row < count - start)[:, None] & m_key[None, :]
        raw = _load(products, begin + start, key, row, column, mask, stride_query, stride_key)
        grad = _load(grad_features, begin + start, key, row, column, mask, stride_query, stride_key) * push[None, :]
        x = feature(raw, CLIPPED)
        if NORM == "softmax":
            e = tl.exp(x - top[None, :])
            grad = e * (grad - pull[None, :])
        elif NORM == "l1norm":
            grad -= tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)) * pull[None, :]
        elif NORM == "l2norm":
            grad -= x * pull[None, :]
        if CLIPPED:
            grad = tl.where(raw > 0.0, grad, grad * NEGATIVE_SLOPE)
        grad += _load(grad_direct, begin + start, key, row, column, mask, stride_query, stride_key)
        # Padding gets its zero here: the library products behind this one read every row and column.
        grad = tl.where(mask, grad, 0.0)
        m_out = (row < rows - start)[:, None] & m_column[None, :]
        if ACCUMULATE:
            grad += _load(grad_products, begin + start, key, row, column, m_out, stride_query, stride_key)
        tile = grad_products + corner(begin + start, key, stride_query, stride_key)
        at = within(row, column, stride_query, stride_key)
        tl.store(tile + at, grad.to(grad_products.dtype.element_ty), mask=m_out)


def _builds() -> list[Build]:
    builds = []
    for element in ("bf16", "fp32"):
        constants = {"NORM": "l2norm", "CLIPPED": True, "stride_key": 1}
        constants |= {"BLOCK_Q": tiles.NORM_QUERIES, "BLOCK_K": tiles.NORM_KEYS}
        tables = {"factors": "*fp32", "tops": "*fp32", "offsets": "*i64", "counts": "*i64", "key_groups": "*i32"}
        tables |= {name: f"*{element}" for name in ("products", "grad_features", "grad_direct", "grad_products")}
        for kernel, more in ((feature_norms, {}), (feature_norm_backward, {"ACCUMULATE": False})):
            chosen = constants | more
            signature = arguments(kernel, tables, **chosen)
            builds.append(Build(kernel, signature, chosen, tensor_cores=False, labels=(element,)))
    return builds


AHEAD_OF_TIME = _builds()
