# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Device words that the kernels share.

Both directions are one picture: *keys* are what is attended to and stand in *groups* (t2i: the regions of an image),
*queries* attend and stand in *segments* (t2i: the words of a caption). Rows of a tile are queries, columns are keys.
A block's products are addressed by a stride a query and a stride a key, so nothing here knows the direction.

A key outside its group has the logit -inf and the weight 0; a query outside every segment (padding) has segment -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-8)
NEGATIVE_SLOPE = tl.constexpr(0.1)

# Planes of `state [7, groups, queries]` float32: what is known of a query against a key group.
DOT = tl.constexpr(0)  # q . c
QUADRATIC = tl.constexpr(1)  # |c|^2
SCALE = tl.constexpr(2)  # 1 / sum of the kept exponentials: the weight of a key at the top, hence the largest weight
TOP = tl.constexpr(3)  # largest logit
CUT = tl.constexpr(4)  # largest logit that the focal step drops, -inf: none
GRAD_COSINE = tl.constexpr(5)
GRAD_PEAK = tl.constexpr(6)

# Planes of the forward that makes products itself: nothing is rebuilt from them.
COSINE = tl.constexpr(0)
LARGEST_WEIGHT = tl.constexpr(1)


@triton.jit
def plane(state, WHICH: tl.constexpr, group, groups, num_queries):
    return state + tl.cast(group + groups * WHICH, tl.int64) * num_queries


@triton.jit
def segments_of(segments, o_query, num_queries):
    """Segment of each query within the block, -1 for none. The first row of a block opens its first segment."""
    segment = tl.load(segments + o_query, mask=o_query < num_queries, other=-1)
    return tl.where(segment >= 0, segment - tl.load(segments), -1)


@triton.jit
def feature(raw, CLIPPED: tl.constexpr):
    if CLIPPED:
        raw = tl.where(raw > 0.0, raw, raw * NEGATIVE_SLOPE)
    return raw


@triton.jit
def within(row, column, stride_row, stride_column):
    """Offsets inside a tile, in 32 bits: half the registers. What they are added to is a scalar of 64 bits."""
    return row[:, None] * tl.cast(stride_row, tl.int32) + column[None, :] * tl.cast(stride_column, tl.int32)


@triton.jit
def corner(query, key, stride_query, stride_key):
    """Offset of a tile's first query and key. In 64 bits before it is multiplied."""
    return tl.cast(query, tl.int64) * stride_query + tl.cast(key, tl.int64) * stride_key


@triton.jit
def load_logits(
    d, query, row, segment, key, column, left, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr
):  # fmt: skip
    """Products and logits of a tile, [queries, keys]; -inf where the group (``left`` keys from ``key``) has ended."""
    m_column = column < left
    mask = (segment >= 0)[:, None] & m_column[None, :]
    tile = d.products + corner(query, key, d.stride_query, d.stride_key)
    raw = tl.load(tile + within(row, column, d.stride_query, d.stride_key), mask=mask, other=0.0).to(tl.float32)
    logit = feature(raw, CLIPPED)
    if NORM == "none":
        logit = logit * lambda_softmax
    else:
        lowest = tl.min(tl.where(segment >= 0, segment, 1 << 30), 0)
        at = tl.cast(lowest, tl.int64) * d.num_keys + key
        inside = within(segment - lowest, column, d.num_keys, 1)
        if NORM == "softmax":
            logit = tl.exp(logit - tl.load(d.tops + at + inside, mask=mask, other=0.0))
        logit = logit * tl.load(d.factors + at + inside, mask=mask, other=0.0)
    return raw, tl.where(m_column[None, :], logit, -float("inf"))


@triton.jit
def weights_of(logit, top, scale, cut, FOCAL: tl.constexpr):
    """Attention weights from a query's state. A NaN stays one: it is not below the cut."""
    weight = tl.exp(logit - top[:, None]) * scale[:, None]
    if FOCAL != "none":
        weight = tl.where(logit <= cut[:, None], 0.0, weight)
    return weight


@triton.jit
def share_of(weight, FOCAL: tl.constexpr):
    """BFAN's confidence of a key: 1 (equal) or the root of its weight (prob)."""
    return tl.sqrt(weight) if FOCAL == "prob" else tl.where(weight == weight, 1.0, weight)


@triton.jit
def norms_of(quadratic, query_norm):
    """|q| |c|, with |c|^2 clamped at 0: rounding may take it below."""
    return query_norm * tl.sqrt_rn(tl.maximum(quadratic, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def cosine_of(dot, quadratic, query_norm):
    norms = norms_of(quadratic, query_norm)
    return dot / tl.where(norms < EPS, EPS, norms)


@triton.jit
def gradients_of_cosine(grad, dot, quadratic, query_norm):
    """Gradients at q . c, |c|^2 and |q|; on the floor of the cosine none reaches the norms."""
    norms = norms_of(quadratic, query_norm)
    on_floor = norms < EPS
    divisor = tl.where(on_floor, EPS, norms)
    pull = grad * (dot / divisor)
    grad_quadratic = tl.where(on_floor, 0.0, -0.5 * pull / quadratic)
    return grad / divisor, grad_quadratic, tl.where(on_floor, 0.0, -pull / query_norm)
