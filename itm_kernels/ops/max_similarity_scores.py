"""Hard-assignment scores of every image against every caption: each query takes its most similar key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.library import define
from itm_kernels.ops.options import (
    WORKSPACE_BYTES,
    SimilarityOptions,
    check_similarity_options,
    check_workspace_bytes,
    number,
)
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype

OP = "max_similarity_scores"
KEYS_OF_A_BYTE = 256


def max_similarity_scores(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    agg_func: str = "Sum",
    lambda_lse: float = 10.0,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Score every image against every caption by hard assignment (late interaction, MaxSim).

    With queries :math:`q` (t2i: words, i2t: regions) and keys :math:`k` of the other side,

    .. math::

        z_q = \max_k k \cdot q, \qquad \text{score} = \operatorname{agg}_q z_q .

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
        ``"t2i"`` (each word takes a region) or ``"i2t"`` (each region takes a word).
    agg_func
        ``"Sum"``, ``"Mean"``, ``"Max"`` (gradient to the first arg-max), ``"LogSumExp"``
        (``log(sum(exp(lambda_lse z))) / lambda_lse``) or ``"Softmax"`` (``sum(softmax(lambda_lse z) z)``) over the
        queries.
    lambda_lse
        Inverse temperature of ``"LogSumExp"`` and ``"Softmax"``, positive.
    workspace_bytes
        Bound on the memory used beside inputs, gradients and scores; the work is cut into blocks of images x captions
        that fit. Where a gradient is wanted, the arg-max is kept for it in one byte an entry if it fits the same bound
        and keys are 256 at most; otherwise the backward makes the products again. The floor ``reference`` has no
        blocks.
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
    CHAN: Pan et al., "Fine-Grained Image-Text Matching by Cross-Modal Hard Aligning Network", CVPR 2023. ColBERT:
    Khattab and Zaharia, SIGIR 2020. FILIP: Yao et al., ICLR 2022. ColPali: Faysse et al., ICLR 2025. Of several equal
    maxima the first is taken; a NaN is the largest of all. Under autocast the products run in the autocast dtype. Two
    runs on the same input give the same bits.
    """
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    options = SimilarityOptions(direction, agg_func, number(OP, "lambda_lse", lambda_lse))
    check_similarity_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    regions, words = autocast_inputs(regions, words)
    differentiated = torch.is_grad_enabled() and (regions.requires_grad or words.requires_grad)
    scores: Tensor
    scores, _ = MaxSimilarityScores.apply(
        regions,
        words,
        counts,
        offsets,
        of_regions,
        (*options.as_arguments(), workspace_bytes, requested(backend)),
        differentiated,
    )
    return scores


def arg_max_shape(
    images: int, captions: int, regions: int, words: int, longest: int | None, direction: str, workspace_bytes: int
) -> tuple[int, int] | None:
    """Shape of the arg-max that is kept for the backward, ``[groups of keys, queries]``, or None: made again.

    A function of shapes alone, so that a fake tensor has the shape of the real one: ``words`` counts the rows of the
    word tensor, padding with them, and ``longest`` is W of padded words (None: packed, captions may be of any length).
    """
    if direction == "t2i":
        groups, queries, keys = images, words, regions
    else:
        groups, queries, keys = captions, images * regions, longest or 1
    if keys > KEYS_OF_A_BYTE or groups * queries > workspace_bytes:
        return None
    return groups, queries


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, str direction, "
    "str agg_func, float lambda_lse, int workspace_bytes, str backend"
)


def _empty_outputs(
    regions: Tensor, words: Tensor, word_counts: Tensor, direction: str, workspace_bytes: int, differentiated: bool
) -> tuple[Tensor, Tensor]:  # [I, C], [groups, queries] or [0]
    images, captions = regions.shape[0], word_counts.shape[0]
    scores = regions.new_empty(images, captions, dtype=score_dtype(regions.dtype))
    rows, longest = (words.shape[0], None) if words.dim() == 2 else (captions * words.shape[1], words.shape[1])
    shape = arg_max_shape(images, captions, regions.shape[1], rows, longest, direction, workspace_bytes)
    if not differentiated or shape is None:
        return scores, regions.new_empty(0, dtype=torch.uint8)
    # Zeros: a floor that packs what is padded leaves the rest of a row alone.
    return scores, regions.new_zeros(shape, dtype=torch.uint8)


def _usable(arg_max: Tensor, words: Tensor, word_counts: Tensor, direction: str) -> Tensor | None:
    """The arg-max if there is one and a byte can hold it: packed captions may turn out too long for that."""
    if not arg_max.numel():
        return None
    if direction == "i2t" and words.dim() == 2 and int(word_counts.max()) > KEYS_OF_A_BYTE:
        return None
    return arg_max


def _forward(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    direction: str,
    agg_func: str,
    lambda_lse: float,
    workspace_bytes: int,
    backend: str,
    differentiated: bool,
) -> tuple[Tensor, Tensor]:
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    scores, arg_max = _empty_outputs(regions, words, word_counts, direction, workspace_bytes, differentiated)
    if scores.numel():
        scores = floor.forward(
            regions,
            words,
            word_counts,
            region_counts,
            SimilarityOptions(direction, agg_func, lambda_lse),
            workspace_bytes=workspace_bytes,
            word_offsets=word_offsets,
            arg_max=_usable(arg_max, words, word_counts, direction),
        )
    return scores, arg_max


def _forward_fake(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    direction: str,
    agg_func: str,
    lambda_lse: float,
    workspace_bytes: int,
    backend: str,
    differentiated: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_outputs(regions, words, word_counts, direction, workspace_bytes, differentiated)


def _backward(
    grad_scores: Tensor,  # [I, C]
    arg_max: Tensor,  # as the forward left it
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    direction: str,
    agg_func: str,
    lambda_lse: float,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not grad_scores.numel():
        return tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (regions, words))  # type: ignore[return-value]
    grads: tuple[Tensor, Tensor] = floor.backward(
        grad_scores,
        regions,
        words,
        word_counts,
        region_counts,
        SimilarityOptions(direction, agg_func, lambda_lse),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
        arg_max=_usable(arg_max, words, word_counts, direction),
    )
    return grads


def _backward_fake(
    grad_scores: Tensor, arg_max: Tensor, regions: Tensor, words: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(regions, memory_format=torch.contiguous_format),
        torch.empty_like(words, memory_format=torch.contiguous_format),
    )


forward_op = define(OP, f"({_INPUTS}, bool differentiated) -> (Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(
    f"{OP}_backward", f"(Tensor grad_scores, Tensor arg_max, {_INPUTS}) -> (Tensor, Tensor)", _backward, _backward_fake
)


class MaxSimilarityScores(torch.autograd.Function):
    """Keeps its inputs, and the arg-max while that is small."""

    @staticmethod
    def forward(
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        region_counts: Tensor | None,
        rest: tuple[Any, ...],
        differentiated: bool,
    ) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = forward_op(
            regions, words, word_counts, word_offsets, region_counts, *rest, differentiated
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.rest, _ = inputs
        _, arg_max = output
        ctx.mark_non_differentiable(arg_max)
        ctx.save_for_backward(arg_max, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = MaxSimilarityScoresBackward.apply(grad_scores, *ctx.saved_tensors, ctx.rest)
        return (*grads, None, None, None, None, None)


class MaxSimilarityScoresBackward(torch.autograd.Function):
    """A node of its own, so that differentiating it again raises; ``once_differentiable`` passes for a constant where
    the upstream gradient does not require grad."""

    @staticmethod
    def forward(
        grad_scores: Tensor,
        arg_max: Tensor,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        region_counts: Tensor | None,
        rest: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = backward_op(
            grad_scores, arg_max, regions, words, word_counts, word_offsets, region_counts, *rest
        )
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{OP}: can be differentiated once, not twice; its gradient has no gradient")
