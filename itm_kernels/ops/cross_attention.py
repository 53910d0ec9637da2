"""Attention weights and attended vectors of chosen pairs: for pictures, metrics, research on top of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout, padded_words
from itm_kernels.ops.attention_options import (
    AttentionOptions,
    check_attention_options,
    check_index_values,
    check_indices,
)
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, number
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.stages import check_beside

OP = "cross_attention"
_SIGNATURE = Signature(OP, tensors=7, outputs=2)


class CrossAttention(NamedTuple):
    """The attention of P pairs. Queries are words (t2i) or regions (i2t); rows of what is no query are zeros."""

    weights: Tensor  # t2i [P, W, R], i2t [P, R, W]; over the keys, the last axis, they sum to 1
    attended: Tensor  # t2i [P, W, D], i2t [P, R, D]; the keys summed by their weights


def cross_attention(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    pairs: Tensor,  # [P, 2] int64: image, caption
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    raw_feature_norm: str = "clipped_l2norm",
    lambda_softmax: float = 9.0,
    focal: str | None = None,
    gate: Tensor | None = None,  # t2i [P, W, D], i2t [P, R, D]
    temperature: Tensor | None = None,  # t2i [P, W], i2t [P, R]
    backend: str | None = None,
) -> CrossAttention:
    r"""Weights and attended vectors of chosen pairs of an image and a caption.

    With queries :math:`q` (t2i: words, i2t: regions), keys :math:`k` of the other side, a gate :math:`m_q` (ones where
    none is given) and :math:`s_{kq} = k \cdot (m_q \circ q)`,

    .. math::

        a_{kq} = \operatorname{softmax}_k(t_q\, \hat s_{kq}), \quad c_q = \sum_k a_{kq} k,

    where :math:`\hat s` is :math:`s` after ``raw_feature_norm``, taken for each key over the queries of the pair, and
    :math:`t_q` is ``lambda_softmax`` or the query's own temperature.

    Parameters
    ----------
    regions
        ``[I, R, D]`` region vectors; float64, float32, bfloat16 or float16, any strides.
    words
        ``[C, W, D]`` padded word vectors (what stands in the padding is never used), or ``[N, D]`` packed, one caption
        after another; W is then the words of the longest caption. Same dtype and device as ``regions``.
        ``torch.compile`` without a graph break needs padded words.
    word_counts
        ``[C]`` words of each caption, 1..W: a list, an integer tensor, or a :class:`CaptionLayout`. A tensor on a GPU
        is never read back: it is clamped to 1..W there.
    pairs
        ``[P, 2]`` int64, image and caption of each pair, in any order and with repeats. Indices on a GPU are never read
        back: a pair out of range gives NaN.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    direction
        ``"t2i"`` (words attend to regions) or ``"i2t"`` (regions attend to words).
    raw_feature_norm, lambda_softmax, focal
        As in :func:`cross_attention_scores`.
    gate
        Multiplies the queries within the attention: ``[P, W, D]`` (t2i) or ``[P, R, D]`` (i2t); dtype of ``regions``,
        or float32 beside half precision.
    temperature
        Inverse temperature of each query, in the place of ``lambda_softmax``: ``[P, W]`` (t2i) or ``[P, R]`` (i2t).
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    CrossAttention
        ``weights`` ``[P, W, R]`` and ``attended`` ``[P, W, D]`` (t2i), or ``[P, R, W]`` and ``[P, R, D]`` (i2t);
        float32 (float64 for float64 input). Zeros where a query or a key is padding. Differentiable once in regions,
        words, gate and temperature.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    SCAN, SGRAF: the defaults. BFAN: ``focal`` with ``lambda_softmax=20``, one call for each direction. RCAR: gate and
    temperature of a step, as :meth:`itm_kernels.nn.RegulatedScorer.attention_states` gives them.
    """
    counts, _, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    check_indices(OP, pairs, regions)
    options = AttentionOptions(
        direction,
        raw_feature_norm,
        number(OP, "lambda_softmax", lambda_softmax),
        "none" if focal is None else focal,
    )
    if focal == "none":  # our own spelling, not the contract's
        raise ValueError(f"{OP}: focal must be None, 'equal' or 'prob', got 'none'")
    check_attention_options(OP, options)
    check_backend(OP, backend)
    regions, words = autocast_inputs(regions, words)
    if words.dim() == 2:
        check_count_values(OP, regions, words, counts, of_regions)
        words = padded_words(words, word_counts)[0]
    letter, queries = ("W", words.shape[1]) if options.t2i else ("R", regions.shape[1])
    if gate is not None:
        check_beside(OP, "gate", gate, {"P": pairs.shape[0], letter: queries, "D": regions.shape[2]}, regions)
    if temperature is not None:
        check_beside(OP, "temperature", temperature, {"P": pairs.shape[0], letter: queries}, regions)
    tensors = [regions, words, counts, of_regions, pairs, gate, temperature]
    rest = (*options.as_arguments(), WORKSPACE_BYTES, requested(backend))
    return CrossAttention(*differentiable(_SIGNATURE, tensors, rest))


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? region_counts, Tensor pairs, Tensor? gate, "
    "Tensor? temperature, str direction, str raw_feature_norm, float lambda_softmax, str focal, int workspace_bytes, "
    "str backend"
)


def _forward(
    regions: Tensor,
    words: Tensor,  # [C, W, D]
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *options, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    check_index_values(OP, pairs, regions.shape[0], words.shape[0])
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not (pairs.shape[0] and regions.shape[0] and words.shape[0]):  # no pair, or none within range
        made = _forward_fake(regions, words, word_counts, region_counts, pairs, gate, temperature, *rest)
        return made[0].fill_(torch.nan), made[1].fill_(torch.nan)
    outputs: tuple[Tensor, Tensor] = floor.forward(
        regions,
        words,
        word_counts,
        region_counts,
        pairs,
        gate,
        temperature,
        AttentionOptions(*options),
        workspace_bytes=workspace_bytes,
    )
    return outputs


def _forward_fake(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    queries, keys = (words, regions) if rest[0] == "t2i" else (regions, words)
    dtype = score_dtype(regions.dtype)
    weights = regions.new_empty(pairs.shape[0], queries.shape[1], keys.shape[1], dtype=dtype)
    return weights, regions.new_empty(pairs.shape[0], queries.shape[1], regions.shape[2], dtype=dtype)


def _backward(
    grad_weights: Tensor,
    grad_attended: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of regions, words, and of gate and temperature that are there
    *options, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    check_index_values(OP, pairs, regions.shape[0], words.shape[0])
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not (pairs.shape[0] and regions.shape[0] and words.shape[0]):
        return [made.zero_() for made in gradients_like([regions, words, gate, temperature])]
    grads = floor.backward(
        grad_weights,
        grad_attended,
        regions,
        words,
        word_counts,
        region_counts,
        pairs,
        gate,
        temperature,
        AttentionOptions(*options),
        workspace_bytes=workspace_bytes,
    )
    return [grad for grad in grads if grad is not None]


def _backward_fake(grad_weights: Tensor, grad_attended: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(
    f"{OP}_backward",
    f"(Tensor grad_weights, Tensor grad_attended, {_INPUTS}) -> Tensor[]",
    _backward,
    _backward_fake,
)
