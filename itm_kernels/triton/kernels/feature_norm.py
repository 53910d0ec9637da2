# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""``raw_feature_norm``: sums over the queries of a segment for each key, and the way back.

    x = phi(s) or s      logit = lambda x / (norm_segment(x) + eps)      softmax: logit = lambda exp(s - top) / sum

Owner: a program owns one segment and BLOCK_K keys, whatever groups they are of, and walks the segment's queries: sums
run in one order, and a NaN stays in its segment; in the backward of both directions it owns a pair, a segment of each.
Read: the products (and two gradients) once or twice, from the cache. Never in memory: normalised features. Float32, no
atomics. The trick: what a key needs of a segment is one factor, so that the kernels behind this one own any run of
queries, whole segments or not, and no caption is padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import Build, arguments, backward_types, listed
from itm_kernels.triton.directions import Direction
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
    d, program, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Factors of one segment's keys, and the largest products for the softmax."""
    blocks = tl.cdiv(d.num_keys, BLOCK_K)
    i_segment = (program // blocks).to(tl.int64)
    key = (program % blocks) * BLOCK_K
    column = tl.arange(0, BLOCK_K)
    m_key = column < d.num_keys - key
    begin, count = tl.load(d.offsets + i_segment), tl.load(d.counts + i_segment).to(tl.int32)
    top, total = _sums(
        d.products, begin, count, key, column, m_key, d.stride_query, d.stride_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K
    )
    if NORM == "softmax":
        factor = lambda_softmax / total
        tl.store(d.tops + i_segment * d.num_keys + key + column, top, mask=m_key)
    elif NORM == "l1norm":
        factor = lambda_softmax / (total + EPS)
    else:
        factor = lambda_softmax / (tl.sqrt_rn(total) + EPS)
    tl.store(d.factors + i_segment * d.num_keys + key + column, factor, mask=m_key)


@triton.jit
def _terms(
    d, begin, count, key, column, m_key, NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each key and one segment: what turns the gradients at normalised features into those at products."""
    # With g the gradient at x / (n + eps): dx = g / (n + eps) - x sum(g x) / (n (n + eps)^2). A key whose products are
    # all zero has n = 0 and no gradient through its norm: the true slope, 1 / eps, would swamp every other gradient.
    row = tl.arange(0, BLOCK_Q)
    push = tl.full([BLOCK_K], 1.0, tl.float32)
    pull = tl.zeros([BLOCK_K], tl.float32)
    top = tl.zeros([BLOCK_K], tl.float32)
    if NORM != "none":
        top, total = _sums(
            d.products, begin, count, key, column, m_key, d.stride_query, d.stride_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K
        )
        norm = tl.sqrt_rn(total) if NORM == "l2norm" else total
        along = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, count, BLOCK_Q):
            mask = (row < count - start)[:, None] & m_key[None, :]
            x = _load(d.products, begin + start, key, row, column, mask, d.stride_query, d.stride_key)
            x = feature(x, CLIPPED)
            if NORM == "softmax":
                x = tl.where(mask, tl.exp(x - top[None, :]), 0.0)
            grad = _load(d.grad_features, begin + start, key, row, column, mask, d.stride_query, d.stride_key)
            along += tl.sum(grad * x, 0)
        if NORM == "softmax":
            push = 1.0 / norm
            pull = along / (norm * norm)
        else:
            scale = 1.0 / (norm + EPS)
            push = tl.where(norm == 0.0, 0.0, scale)
            pull = along * scale * scale
            pull = tl.where(norm == 0.0, 0.0, pull / norm if NORM == "l2norm" else pull)
    return top, push, pull


@triton.jit
def _at_products(grad, raw, top, push, pull, NORM: tl.constexpr, CLIPPED: tl.constexpr):
    """Gradient at products from that at normalised features; the terms lie along the keys."""
    x = feature(raw, CLIPPED)
    grad *= push
    if NORM == "softmax":
        grad = tl.exp(x - top) * (grad - pull)
    elif NORM == "l1norm":
        grad -= tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)) * pull
    elif NORM == "l2norm":
        grad -= x * pull
    if CLIPPED:
        grad = tl.where(raw > 0.0, grad, grad * NEGATIVE_SLOPE)
    return grad


@triton.jit
def _store(d, query, key, row, column, m_row, m_column, grad):
    tile = d.grad_direct + corner(query, key, d.stride_query, d.stride_key)
    at = within(row, column, d.stride_query, d.stride_key)
    tl.store(tile + at, grad.to(d.grad_direct.dtype.element_ty), mask=m_row[:, None] & m_column[None, :])


@triton.jit
def _one_way(
    d, program, NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """dS of one segment and BLOCK_K keys."""
    blocks = tl.cdiv(d.num_keys, BLOCK_K)
    i_segment = (program // blocks).to(tl.int64)
    key = (program % blocks) * BLOCK_K
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    m_column = column < d.num_keys - key
    m_key = tl.load(d.key_groups + key + column, mask=m_column, other=-1) >= 0
    begin, count = tl.load(d.offsets + i_segment), tl.load(d.counts + i_segment).to(tl.int32)
    rows = (tl.load(d.offsets + i_segment + 1) - begin).to(tl.int32)
    top, push, pull = _terms(d, begin, count, key, column, m_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K)
    for start in range(0, rows, BLOCK_Q):
        query = begin + start
        mask = (row < count - start)[:, None] & m_key[None, :]
        raw = _load(d.products, query, key, row, column, mask, d.stride_query, d.stride_key)
        grad = _load(d.grad_features, query, key, row, column, mask, d.stride_query, d.stride_key)
        grad = _at_products(grad, raw, top[None, :], push[None, :], pull[None, :], NORM, CLIPPED)
        grad += _load(d.grad_direct, query, key, row, column, mask, d.stride_query, d.stride_key)
        # Padding gets its zero here: the library products behind this one read every row and column.
        _store(d, query, key, row, column, row < rows - start, m_column, tl.where(mask, grad, 0.0))


@triton.jit
def _both_ways(
    d, turned, program, NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """dS of one pair, a segment of one direction and a group of its keys, which is a segment of the other (`turned`).

    Walks tiles of queries and keys. Terms along the other side are made again for every tile after the first; words of
    most captions, and regions of most images, are one tile.
    """
    i_segment, group = (program // d.groups).to(tl.int64), (program % d.groups).to(tl.int64)
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    begin, count = tl.load(d.offsets + i_segment), tl.load(d.counts + i_segment).to(tl.int32)
    rows = (tl.load(d.offsets + i_segment + 1) - begin).to(tl.int32)
    first, keys = tl.load(d.key_offsets + group), tl.load(d.key_counts + group).to(tl.int32)
    columns = (tl.load(d.key_offsets + group + 1) - first).to(tl.int32)
    for start in range(0, rows, BLOCK_Q):
        query, m_query = begin + start, row < count - start
        top_t, push_t, pull_t = _terms(turned, first, keys, query, row, m_query, NORM, CLIPPED, BLOCK_K, BLOCK_Q)
        for across in range(0, columns, BLOCK_K):
            key, m_key = first + across, column < keys - across
            top, push, pull = _terms(d, begin, count, key, column, m_key, NORM, CLIPPED, BLOCK_Q, BLOCK_K)
            mask = m_query[:, None] & m_key[None, :]
            raw = _load(d.products, query, key, row, column, mask, d.stride_query, d.stride_key)
            grad = _load(d.grad_features, query, key, row, column, mask, d.stride_query, d.stride_key)
            grad = _at_products(grad, raw, top[None, :], push[None, :], pull[None, :], NORM, CLIPPED)
            other = _load(turned.grad_features, query, key, row, column, mask, d.stride_query, d.stride_key)
            grad += _at_products(other, raw, top_t[:, None], push_t[:, None], pull_t[:, None], NORM, CLIPPED)
            grad += _load(d.grad_direct, query, key, row, column, mask, d.stride_query, d.stride_key)
            grad += _load(turned.grad_direct, query, key, row, column, mask, d.stride_query, d.stride_key)
            _store(d, query, key, row, column, row < rows - start, column < columns - across, tl.where(mask, grad, 0.0))


@triton.jit
def _add_parts(d, program, BLOCK: tl.constexpr):
    """Parts of dG in one order, in place of the first."""
    size = tl.cast(d.groups, tl.int64) * d.most * d.most
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(d.grad_gram + at, mask=at < size, other=0.0)
    for part in range(1, d.parts):
        total += tl.load(d.grad_gram + part * size + at, mask=at < size, other=0.0)
    tl.store(d.grad_gram + at, total, mask=at < size)


@triton.jit
def feature_norm_backward(
    directions, WAYS: tl.constexpr, NORM: tl.constexpr, CLIPPED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PAIR_Q: tl.constexpr, PAIR_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = directions[0]
    if WAYS == 2:
        programs = d.num_segments * d.groups
        if program < programs:
            _both_ways(d, directions[1], program, NORM, CLIPPED, PAIR_Q, PAIR_K)
    else:
        programs = d.num_segments * tl.cdiv(d.num_keys, BLOCK_K)
        if program < programs:
            _one_way(d, program, NORM, CLIPPED, BLOCK_Q, BLOCK_K)
    program -= programs
    for i in tl.static_range(WAYS):
        programs = tl.cdiv(directions[i].groups * directions[i].most * directions[i].most, BLOCK_P)
        if (program >= 0) & (program < programs):
            _add_parts(directions[i], program, BLOCK_P)
        program -= programs


def _builds() -> list[Build]:
    builds = []
    for element in ("bf16", "fp32"):
        constants = {"NORM": "l2norm", "CLIPPED": True, "BLOCK_Q": tiles.NORM_QUERIES, "BLOCK_K": tiles.NORM_KEYS}
        constants |= {"PAIR_Q": tiles.PAIR_QUERIES, "PAIR_K": tiles.PAIR_KEYS, "BLOCK_P": tiles.PART_ENTRIES}
        types = backward_types(element)
        t2i, i2t = listed(Direction, types, stride_key=1), listed(Direction, types, stride_query=1)
        for label, directions in (("one", (t2i,)), ("both", (t2i, i2t))):
            chosen = constants | {"WAYS": len(directions)}
            signature = arguments(feature_norm_backward, {"directions": directions}, **chosen)
            warps = tiles.PAIR_WARPS if label == "both" else tiles.NORM_WARPS
            labels = (element, label)
            builds.append(Build(feature_norm_backward, signature, chosen, warps, tensor_cores=False, labels=labels))
    return builds


AHEAD_OF_TIME = _builds()
