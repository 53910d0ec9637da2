# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Attention of queries over a key group, without the attended vector.

    a = focal(softmax_k(logit))      q . c = sum_k a_k s_k      |c|^2 = a^T G a

Owner: a program owns one key group and a tile of queries, whatever segments they are of. Read: the products, one
factor a key and segment, the group's Gram matrix G. Never in memory: weights. What leaves is a query's state, a few
numbers (`words.DOT` and on) from which the backward rebuilds every weight without a reduction. Accumulation float32;
a query's sums lie in one program, no atomics. The trick: a program takes the columns of its group's class, so that one
launch serves captions of all lengths and both directions; a group of 36 keys is 32 + 16 columns and not 64, G a is four
block products on the tensor cores, and groups that are too large for that are walked in chunks (`streamed`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import Build, attention_builds, forward_types
from itm_kernels.triton.kernels.words import (
    CUT,
    DOT,
    QUADRATIC,
    SCALE,
    TOP,
    load_logits,
    plane,
    segments_of,
    share_of,
    weights_of,
)


@triton.jit
def load_gram(gram, group, most, o_row, o_column, count):
    """A block of a group's Gram matrix, 0 outside the group."""
    at = o_row[:, None] * most + o_column[None, :]
    return tl.load(
        gram + tl.cast(group, tl.int64) * most * most + at,
        mask=(o_row < count)[:, None] & (o_column < count)[None, :],
        other=0.0,
    )


@triton.jit
def store_state(
    state, group, groups, o_query, num_queries, dot, quadratic, scale, top, cut, KEEP: tl.constexpr, FOCAL: tl.constexpr
):
    mask = o_query < num_queries
    tl.store(plane(state, DOT, group, groups, num_queries) + o_query, dot, mask=mask)
    tl.store(plane(state, QUADRATIC, group, groups, num_queries) + o_query, quadratic, mask=mask)
    tl.store(plane(state, SCALE, group, groups, num_queries) + o_query, scale, mask=mask)
    if KEEP:
        tl.store(plane(state, TOP, group, groups, num_queries) + o_query, top, mask=mask)
        if FOCAL != "none":
            tl.store(plane(state, CUT, group, groups, num_queries) + o_query, cut, mask=mask)


@triton.jit
def attended(
    raw, logit, o_main, raw_rest, logit_rest, o_rest, gram, group, most, count, FOCAL: tl.constexpr,
    PRECISION: tl.constexpr, HAS_REST: tl.constexpr,
):  # fmt: skip
    """A query's state from the products and logits of a group's keys, in one or two tiles of columns."""
    top = tl.max(logit, 1)
    if HAS_REST:
        top = tl.maximum(top, tl.max(logit_rest, 1))
        weight_rest = tl.exp(logit_rest - top[:, None])
    weight = tl.exp(logit - top[:, None])
    total = tl.sum(weight, 1)
    if HAS_REST:
        total += tl.sum(weight_rest, 1)
    scale = 1.0 / total
    weight = weight * scale[:, None]
    if HAS_REST:
        weight_rest = weight_rest * scale[:, None]

    cut = tl.full(top.shape, -float("inf"), tl.float32)
    if FOCAL != "none":
        # Keep a_k sum_j h_j > sum_j a_j h_j. Where nothing passes (all weights alike) everything is kept.
        share = tl.where((o_main < count)[None, :], share_of(weight, FOCAL), 0.0)
        factor, threshold = tl.sum(share, 1), tl.sum(share * weight, 1)
        if HAS_REST:
            share_rest = tl.where((o_rest < count)[None, :], share_of(weight_rest, FOCAL), 0.0)
            factor += tl.sum(share_rest, 1)
            threshold += tl.sum(share_rest * weight_rest, 1)
        passes = weight * factor[:, None] - threshold[:, None] > 0.0
        kept = tl.sum(tl.where(passes, weight, 0.0), 1)
        below = tl.max(tl.where(passes, -float("inf"), logit), 1)
        if HAS_REST:
            passes_rest = weight_rest * factor[:, None] - threshold[:, None] > 0.0
            kept += tl.sum(tl.where(passes_rest, weight_rest, 0.0), 1)
            below = tl.maximum(below, tl.max(tl.where(passes_rest, -float("inf"), logit_rest), 1))
        cut = tl.where(kept > 0.0, below, cut)
        scale = tl.where(kept > 0.0, scale / kept, scale)
        weight = weights_of(logit, top, scale, cut, FOCAL)
        if HAS_REST:
            weight_rest = weights_of(logit_rest, top, scale, cut, FOCAL)

    dot = tl.sum(weight * raw, 1)
    # G a whole, though G is symmetric: where keys cancel its rows are small one by one, parts of it are not.
    image = tl.dot(weight, load_gram(gram, group, most, o_main, o_main, count), input_precision=PRECISION)
    if HAS_REST:
        dot += tl.sum(weight_rest * raw_rest, 1)
        down = load_gram(gram, group, most, o_rest, o_main, count)
        image = tl.dot(weight_rest, down, image, input_precision=PRECISION)
        across = load_gram(gram, group, most, o_main, o_rest, count)
        image_rest = tl.dot(weight, across, input_precision=PRECISION)
        corner_gram = load_gram(gram, group, most, o_rest, o_rest, count)
        image_rest = tl.dot(weight_rest, corner_gram, image_rest, input_precision=PRECISION)
    quadratic = tl.sum(weight * image, 1)
    if HAS_REST:
        quadratic += tl.sum(weight_rest * image_rest, 1)
    return dot, quadratic, scale, top, cut


@triton.jit
def held(
    d, group, query, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A group of up to MAIN + REST keys, all of them in registers."""
    row, o_main = tl.arange(0, BLOCK_Q), tl.arange(0, MAIN)
    o_query = query + row
    first_key = tl.load(d.key_offsets + group)
    segment = segments_of(d.segments, o_query, d.num_queries)
    raw, logit = load_logits(
        d, query, row, segment, first_key, o_main, count, lambda_softmax, NORM, CLIPPED
    )  # fmt: skip
    raw_rest, logit_rest, o_rest = raw, logit, o_main
    if REST > 0:
        o_rest = MAIN + tl.arange(0, REST)
        raw_rest, logit_rest = load_logits(
            d, query, row, segment, first_key, o_rest, count, lambda_softmax, NORM, CLIPPED
        )  # fmt: skip
    dot, quadratic, scale, top, cut = attended(
        raw, logit, o_main, raw_rest, logit_rest, o_rest, d.gram, group, d.most, count, FOCAL, PRECISION, REST > 0
    )
    store_state(d.state, group, d.groups, o_query, d.num_queries, dot, quadratic, scale, top, cut, KEEP, FOCAL)


@triton.jit
def streamed(
    d, group, query, count, lambda_softmax, NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A group of any size: logits are made again from the cached products wherever they are needed."""
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    o_query = query + row
    first_key = tl.load(d.key_offsets + group)
    segment = segments_of(d.segments, o_query, d.num_queries)

    top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, count, BLOCK_K):
        _, logit = load_logits(
            d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
        )
        above = tl.maximum(top, tl.max(logit, 1))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(logit - above[:, None]), 1)
        top = above
    scale = 1.0 / total

    cut = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    if FOCAL != "none":
        factor = tl.zeros([BLOCK_Q], tl.float32)
        threshold = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(0, count, BLOCK_K):
            _, logit = load_logits(
                d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
            )
            weight = tl.exp(logit - top[:, None]) * scale[:, None]
            share = tl.where((column < count - start)[None, :], share_of(weight, FOCAL), 0.0)
            factor += tl.sum(share, 1)
            threshold += tl.sum(share * weight, 1)
        kept = tl.zeros([BLOCK_Q], tl.float32)
        below = cut
        for start in range(0, count, BLOCK_K):
            _, logit = load_logits(
                d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
            )
            weight = tl.exp(logit - top[:, None]) * scale[:, None]
            passes = weight * factor[:, None] - threshold[:, None] > 0.0
            kept += tl.sum(tl.where(passes, weight, 0.0), 1)
            below = tl.maximum(below, tl.max(tl.where(passes, -float("inf"), logit), 1))
        cut = tl.where(kept > 0.0, below, cut)
        scale = tl.where(kept > 0.0, scale / kept, scale)

    dot = tl.zeros([BLOCK_Q], tl.float32)
    quadratic = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, count, BLOCK_K):
        raw, logit = load_logits(
            d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
        )
        weight = weights_of(logit, top, scale, cut, FOCAL)
        dot += tl.sum(weight * raw, 1)
        image = streamed_image(
            d, query, segment, first_key, start + column, count, group, lambda_softmax, top, scale, cut, NORM, CLIPPED,
            FOCAL, PRECISION, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        quadratic += tl.sum(weight * image, 1)
    store_state(d.state, group, d.groups, o_query, d.num_queries, dot, quadratic, scale, top, cut, KEEP, FOCAL)


@triton.jit
def streamed_image(
    d, query, segment, first_key, o_key, count, group, lambda_softmax, top, scale, cut, NORM: tl.constexpr,
    CLIPPED: tl.constexpr, FOCAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(G a) of the keys ``o_key``, with the weights of all keys made chunk by chunk."""
    row, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    image = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for start in range(0, count, BLOCK_K):
        _, logit = load_logits(
            d, query, row, segment, first_key + start, column, count - start, lambda_softmax, NORM, CLIPPED
        )
        weight = weights_of(logit, top, scale, cut, FOCAL)
        block = load_gram(d.gram, group, d.most, start + column, o_key, count)
        image = tl.dot(weight, block, image, input_precision=PRECISION)
    return image


@triton.jit
def attend(
    directions, lambda_softmax,
    # Of each direction and class of groups that are held: more keys than FLOORS, in MAINS + RESTS columns.
    FLOORS: tl.constexpr, MAINS: tl.constexpr, RESTS: tl.constexpr,
    STREAMED: tl.constexpr,  # of each direction: groups of more keys are; -1: there are none
    NORM: tl.constexpr, CLIPPED: tl.constexpr, FOCAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(len(STREAMED)):
        d = directions[i]
        programs = d.groups * tl.cdiv(d.num_queries, BLOCK_Q)
        if (program >= 0) & (program < programs):
            group, query = program % d.groups, (program // d.groups) * BLOCK_Q
            count = tl.load(d.key_counts + group).to(tl.int32)
            for c in tl.static_range(len(MAINS[i])):
                if (count > FLOORS[i][c]) & (count <= MAINS[i][c] + RESTS[i][c]):
                    held(
                        d, group, query, count, lambda_softmax, NORM, CLIPPED, FOCAL, KEEP, PRECISION, BLOCK_Q,
                        MAINS[i][c], RESTS[i][c],
                    )  # fmt: skip
            if STREAMED[i] >= 0 and count > STREAMED[i]:
                streamed(
                    d, group, query, count, lambda_softmax, NORM, CLIPPED, FOCAL, KEEP, PRECISION, BLOCK_Q, BLOCK_K
                )
        program -= programs


def _builds() -> list[Build]:
    return attention_builds(attend, forward_types, KEEP=True)


AHEAD_OF_TIME = _builds()
