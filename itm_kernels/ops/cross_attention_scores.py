"""Cross-attention scores of every image against every caption: SCAN, BFAN, PFAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, ScoreOptions, check_options, check_workspace_bytes, number
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype

OP = "cross_attention_scores"


def cross_attention_scores(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    raw_feature_norm: str = "clipped_l2norm",
    lambda_softmax: float = 9.0,
    agg_func: str = "LogSumExp",
    lambda_lse: float = 6.0,
    focal: str | None = None,
    peak_weight: float = 0.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Score every image against every caption by cross attention between regions and words.

    With queries :math:`q` (t2i: words, i2t: regions) and keys :math:`k` of the other side,
    :math:`s_{kq} = k \cdot q`,

    .. math::

        a_{kq} = \operatorname{softmax}_k(\lambda\, \hat s_{kq}), \quad
        c_q = \sum_k a_{kq} k, \quad
        \text{score} = \operatorname{agg}_q \cos(q, c_q),

    where :math:`\hat s` is :math:`s` after ``raw_feature_norm``, taken for each key over the queries of the pair.
    Neither :math:`c_q` nor anything of size ``[I, C, W, D]`` is formed (but by the floor ``reference``).

    Parameters
    ----------
    regions
        ``[I, R, D]`` region vectors; float64, float32, bfloat16 or float16, any strides.
    words
        ``[C, W, D]`` padded word vectors (what stands in the padding is never used), or ``[N, D]`` packed, one caption
        after another. Same dtype and device as ``regions``.
    word_counts
        ``[C]`` words of each caption, 1..W: a list, an integer tensor, or a :class:`CaptionLayout`. A tensor on a GPU
        is never read back: it is clamped to 1..W there and the padded size is computed.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    direction
        ``"t2i"`` (words attend to regions), ``"i2t"`` (regions attend to words) or ``"both"``, the sum of the two.
    raw_feature_norm
        ``"softmax"``, ``"l2norm"``, ``"clipped_l2norm"``, ``"l1norm"``, ``"clipped_l1norm"``, ``"clipped"`` or
        ``"no_norm"``; "clipped" is LeakyReLU(0.1). Norms add 1e-8. A key whose products are all zero gets no gradient
        through its norm.
    lambda_softmax
        Inverse temperature of the attention.
    agg_func
        ``"LogSumExp"`` (``log(sum(exp(lambda_lse x))) / lambda_lse``), ``"Max"`` (gradient to the first arg-max),
        ``"Sum"`` or ``"Mean"`` over the queries.
    lambda_lse
        Inverse temperature of ``"LogSumExp"``, positive.
    focal
        BFAN's focal step: ``"equal"`` keeps keys above the mean weight, ``"prob"`` above the weighted one, and
        renormalises; where no key passes (all weights alike) all are kept. None: plain attention.
    peak_weight
        PFAN: adds ``peak_weight`` times the same aggregation of the largest attention weight of each word; t2i only.
    workspace_bytes
        Bound on the memory used beside inputs, gradients and scores; the work is cut into blocks of images x captions
        that fit. One image by one caption is the smallest block. The floor ``reference`` has no blocks.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C]`` float32 (float64 for float64 input), differentiable once in ``regions`` and ``words``.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    SCAN: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018. BFAN: Liu et al., "Focus Your
    Attention", ACM MM 2019 (``direction="both", focal=..., lambda_softmax=20, agg_func="Mean"``). PFAN: Wang et al.,
    "Position Focused Attention Network", IJCAI 2019 (``peak_weight=0.5``). Under autocast the products run in the
    autocast dtype. Two runs on the same input give the same bits.
    """
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    options = ScoreOptions(
        direction,
        raw_feature_norm,
        number(OP, "lambda_softmax", lambda_softmax),
        agg_func,
        number(OP, "lambda_lse", lambda_lse),
        "none" if focal is None else focal,
        number(OP, "peak_weight", peak_weight),
    )
    if focal == "none":  # our own spelling, not the contract's
        raise ValueError(f"{OP}: focal must be None, 'equal' or 'prob', got 'none'")
    check_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    regions, words = autocast_inputs(regions, words)
    scores: Tensor = CrossAttentionScores.apply(
        regions, words, counts, offsets, of_regions, (*options.as_arguments(), workspace_bytes, requested(backend))
    )
    return scores


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, str direction, "
    "str raw_feature_norm, float lambda_softmax, str agg_func, float lambda_lse, str focal, float peak_weight, "
    "int workspace_bytes, str backend"
)


def _forward(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> Tensor:  # [I, C]
    *options, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return _forward_fake(regions, words, word_counts)
    scores: Tensor = floor.forward(
        regions,
        words,
        word_counts,
        region_counts,
        ScoreOptions(*options),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return scores


def _forward_fake(regions: Tensor, words: Tensor, word_counts: Tensor, *rest: Any) -> Tensor:  # [I, C]
    return regions.new_empty(regions.shape[0], word_counts.shape[0], dtype=score_dtype(regions.dtype))


def _backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *options, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (regions, words))  # type: ignore[return-value]
    grads: tuple[Tensor, Tensor] = floor.backward(
        grad_scores,
        regions,
        words,
        word_counts,
        region_counts,
        ScoreOptions(*options),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return grads


def _backward_fake(grad_scores: Tensor, regions: Tensor, words: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(regions, memory_format=torch.contiguous_format),
        torch.empty_like(words, memory_format=torch.contiguous_format),
    )


forward_op = define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
backward_op = define(
    f"{OP}_backward", f"(Tensor grad_scores, {_INPUTS}) -> (Tensor, Tensor)", _backward, _backward_fake
)


class CrossAttentionScores(torch.autograd.Function):
    """Keeps its inputs alone; the backward makes the products again, block by block."""

    # No *rest in this signature: where nothing requires grad, torch.compile counts the parameters to tell whether the
    # context is one of them.
    @staticmethod
    def forward(
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        region_counts: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        scores: Tensor = forward_op(regions, words, word_counts, word_offsets, region_counts, *rest)
        return scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.rest = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        grads = CrossAttentionScoresBackward.apply(grad_scores, *ctx.saved_tensors, ctx.rest)
        return (*grads, None, None, None, None)


class CrossAttentionScoresBackward(torch.autograd.Function):
    """A node of its own, so that differentiating it again raises.

    ``once_differentiable`` raises where the upstream gradient requires grad, and passes for a constant where it does
    not (a sum of scores) and under ``torch.func``: a gradient penalty would be dropped in silence.
    """

    @staticmethod
    def forward(
        grad_scores: Tensor,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        region_counts: Tensor | None,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = backward_op(
            grad_scores, regions, words, word_counts, word_offsets, region_counts, *rest
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{OP}: can be differentiated once, not twice; its gradient has no gradient")
