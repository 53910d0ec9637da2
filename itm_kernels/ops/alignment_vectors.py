"""Alignment vectors of every image and every caption: how a query and what it attends to differ, in S numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes, number
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions, check_direction, check_temperature
from itm_kernels.ops.stages import check_beside, joined_words, query_words, split_words

OP = "alignment_vectors"
_SIGNATURE = Signature(OP, tensors=9)


def alignment_vectors(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    weight: Tensor,  # [S, D]
    bias: Tensor,  # [S]
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    attention_scores: Tensor | None = None,  # [I, R, N]
    temperature: float | Tensor = 9.0,  # or [I, N], [I, R, C]
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Let every query of every pair attend, and say in S numbers how it differs from what it attends to.

    With queries :math:`q` (t2i: words, i2t: regions), keys :math:`k` of the other side and products
    :math:`s_{kq} = k \cdot q`, or those given in their place,

    .. math::

        a_{kq} = \operatorname{softmax}_k(t_q\, \hat s_{kq}), \quad
        c_q = \sum_k a_{kq} k, \quad \hat c_q = \operatorname{l2norm}(c_q), \quad
        x_q = \operatorname{l2norm}(W (q - \hat c_q)^2 + b),

    :math:`\hat s` clipped (LeakyReLU 0.1) and l2-normalised over the queries of the pair. Nothing of size
    ``[I, C, W, D]`` outlives a block (but on the floor ``reference``, which has no blocks).

    Parameters
    ----------
    regions
        ``[I, R, D]`` region vectors; float64, float32, bfloat16 or float16, any strides.
    words
        ``[C, W, D]`` padded word vectors (what stands in the padding is never used), or ``[N, D]`` packed, one caption
        after another. Same dtype and device as ``regions``. ``torch.compile`` without a graph break needs packed words
        (or counts on a device).
    word_counts
        ``[C]`` words of each caption, 1..W: a list, an integer tensor, or a :class:`CaptionLayout`; N is their sum. A
        tensor on a GPU is never read back: it is clamped to 1..W there, N is C W, and rows of padding are zeros.
    weight, bias
        ``[S, D]`` and ``[S]``; dtype of ``regions``, or float32 beside half precision.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    direction
        ``"t2i"`` (words attend to regions) or ``"i2t"`` (regions attend to words).
    attention_scores
        ``[I, R, N]`` gated products, as :func:`correspondence_regulator` makes them; None: the plain products.
    temperature
        Multiplies the logits: a number, or a tensor with one for each query, ``[I, N]`` (t2i) or ``[I, R, C]`` (i2t).
    workspace_bytes
        Bound on the memory used beside inputs, outputs and their gradients. One image by one caption is the smallest
        block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, N, S]`` (t2i) or ``[I, R, C, S]`` (i2t), float32 (float64 for float64 input); zeros for regions that do
        not count. Differentiable once in regions, words, weight, bias, attention scores and temperatures.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, and "Plug-and-Play Regulators
    for Image-Text Matching", TIP 2023. The output of a large batch is gigabytes: to score, use
    :func:`regulated_scores` or :func:`similarity_reasoning_scores`, which keep a block of it at a time.
    """
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    given = temperature if isinstance(temperature, Tensor) else None
    options = AlignmentOptions(direction, number(OP, "temperature", temperature) if given is None else 1.0)
    check_direction(OP, direction)
    check_temperature(OP, options.temperature)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    regions, words = autocast_inputs(regions, words)
    width = bias.shape[0] if isinstance(bias, Tensor) and bias.dim() == 1 else -1
    check_beside(OP, "bias", bias, {"S": max(width, 1)}, regions)
    check_beside(OP, "weight", weight, {"S": width, "D": regions.shape[2]}, regions)
    words = query_words(OP, regions, words, counts, of_regions)
    captions, (images, keys, _), rows = counts.shape[0], regions.shape, words.shape[:-1].numel()
    if attention_scores is not None:
        check_beside(OP, "attention_scores", attention_scores, {"I": images, "R": keys, "N": rows}, regions)
        attention_scores = split_words(attention_scores, 2, counts)
    if given is not None:
        shape = {"I": images, "N": rows} if options.t2i else {"I": images, "R": keys, "C": captions}
        check_beside(OP, "temperature", given, shape, regions)
        given = split_words(given, 1, counts) if options.t2i else given
    tensors = [regions, words, counts, offsets, of_regions, weight[None], bias[None], attention_scores, given]
    made = differentiable(_SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend)))[0]
    return joined_words(made, 1, counts) if options.t2i else made


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, Tensor weight, "
    "Tensor bias, Tensor? attention_scores, Tensor? temperatures, str direction, float temperature, "
    "int workspace_bytes, str backend"
)


def _forward(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    weight: Tensor,  # [1, S, D]
    bias: Tensor,  # [1, S]
    *rest: Any,
) -> Tensor:  # [I, N, S], [I, C, W, S] or [I, R, C, S]
    *given, direction, temperature, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return _forward_fake(regions, words, word_counts, word_offsets, region_counts, weight, bias, *rest)
    made: Tensor = floor.forward(
        regions,
        words,
        word_counts,
        region_counts,
        AlignmentParameters(weight, bias),
        *given,
        AlignmentOptions(direction, temperature),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return made


def _forward_fake(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *rest: Any,
) -> Tensor:
    direction, dtype = rest[2], score_dtype(regions.dtype)
    queries = words.shape[:-1] if direction == "t2i" else (regions.shape[1], word_counts.shape[0])
    return regions.new_empty(regions.shape[0], *queries, bias.shape[1], dtype=dtype)


def _backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *rest: Any,
) -> list[Tensor]:  # of regions, words, weight, bias, and of attention scores and temperatures that are there
    *given, direction, temperature, workspace_bytes, backend = rest
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return [made.zero_() for made in gradients_like([regions, words, weight, bias, *given])]
    of_regions, of_words, of_parameters, *of_given = floor.backward(
        grad,
        regions,
        words,
        word_counts,
        region_counts,
        AlignmentParameters(weight, bias),
        *given,
        AlignmentOptions(direction, temperature),
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [of_regions, of_words, *of_parameters, *(made for made in of_given if made is not None)]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
