"""Scores of every image against every caption by SGRAF: alignments filtered (SAF) or reasoned over (SGR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.batch_norm import checked_batch_norm, update_buffers
from itm_kernels.ops.library import define
from itm_kernels.ops.options import (
    REASONINGS,
    WORKSPACE_BYTES,
    ReasoningOptions,
    check_reasoning_options,
    check_workspace_bytes,
    whole,
)
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.parameters import (
    REASONING_PARTS,
    ReasoningParameters,
    check_parameter,
    check_reasoning,
    field_names,
    with_norm,
)

OP = "similarity_reasoning_scores"
STEPS = 3
"""Published steps of SGR."""
_PARAMETERS = field_names(ReasoningParameters, REASONING_PARTS)
_STATISTICS = 7  # position of the statistics among the tensors
_SIGNATURE = Signature(OP, tensors=8 + len(_PARAMETERS), constants=(_STATISTICS,), kept=((1, _STATISTICS),))


def similarity_reasoning_scores(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [C, D]
    parameters: ReasoningParameters,
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    reasoning: str = "SAF",
    steps: int | None = None,
    batch_norm: tuple[Any, ...] | None = None,
    training: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Score every image against every caption with SGRAF's filtration or graph, all stages in blocks of pairs.

    Words :math:`t_w` attend to regions as in SCAN (clipped l2 norm, temperature 9), :math:`\hat c_w` is the attended
    vector at length 1, :math:`v_g` and :math:`t_g` the global vectors,

    .. math::

        x_w = \operatorname{l2norm}(W_l (\hat c_w - t_w)^2 + b_l), \quad
        x_g = \operatorname{l2norm}(W_g (v_g - t_g)^2 + b_g).

    SAF weighs these nodes, :math:`a \propto \operatorname{sigmoid}(\operatorname{BN}(w_a \cdot x + b_a))`, and pools
    them, :math:`f = \operatorname{l2norm}(\sum a x)`; SGR lets them attend to each other and keeps the global one. The
    score is :math:`\operatorname{sigmoid}(w_e \cdot f + b_e)`. Nothing of size ``[I, C, W, D]`` or ``[I, N, S]``
    outlives a block (but on the floor ``reference``, which has no blocks).

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
    image_global, caption_global
        ``[I, D]`` and ``[C, D]`` global vectors, dtype of ``regions``.
    parameters
        :class:`ReasoningParameters`, whose fields give the shapes; dtype of ``regions``, or float32 beside half
        precision.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    reasoning
        ``"SAF"`` or ``"SGR"``.
    steps
        Of SGR, by default 3; an error with SAF.
    batch_norm
        SAF's batch normalisation: ``(weight [1], bias [1], running_mean [1], running_var [1], num_batches_tracked [],
        momentum, eps)``, and a process group where the statistics run over its ranks (not in this version). An error
        with SGR.
    training
        SAF: the statistics of the batch normalise, each caption by itself, over all images and its nodes; the buffers
        are updated in place once per caption, in their order, as the published loop does (momentum None: running
        averages). Otherwise the running statistics normalise.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, gradients and scores. One image by one caption is the
        smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C]`` float32 (float64 for float64 input), differentiable once in regions, words, global vectors,
        parameters and the affine part of the batch normalisation.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, and its published code. The
    backward keeps inputs and parameters alone and runs the stages of a block again. With one image and captions of one
    word a batch of two numbers normalises; that is the least there is.
    """
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    if reasoning not in REASONINGS:
        raise ValueError(f"{OP}: reasoning must be one of {', '.join(REASONINGS)}, got {reasoning!r}")
    norm = checked_batch_norm(OP, reasoning, batch_norm)
    options = ReasoningOptions(reasoning, _steps(reasoning, steps), _flag(training), norm.eps if norm else 1e-5)
    check_reasoning_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    for name, tensor, groups, letter in (
        ("image_global", image_global, regions.shape[0], "I"),
        ("caption_global", caption_global, counts.shape[0], "C"),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if list(tensor.shape) != [groups, regions.shape[2]]:
            raise ValueError(
                f"{OP}: {name} must be [{letter}, D] with {letter} = {groups} and D = {regions.shape[2]}, "
                f"got {list(tensor.shape)}"
            )
    regions, words, image_global, caption_global = autocast_inputs(regions, words, image_global, caption_global)
    for name, tensor in (("image_global", image_global), ("caption_global", caption_global)):
        if tensor.dtype != regions.dtype or tensor.device != regions.device:
            raise TypeError(
                f"{OP}: {name} must be {regions.dtype} on {regions.device} as regions are, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    statistics = None
    if norm is not None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            check_parameter(OP, f"batch_norm {name}", getattr(norm, name), regions)
        parameters = with_norm(OP, parameters, norm.weight, norm.bias)
        if not options.training:
            running = torch.stack([norm.running_mean, norm.running_var]).to(score_dtype(regions.dtype))  # [2, 1]
            statistics = running.expand(2, counts.shape[0])
    check_reasoning(OP, parameters, options, regions)
    tensors = [
        regions,
        words,
        counts,
        offsets,
        of_regions,
        image_global,
        caption_global,
        statistics,
        *parameters.flat(),
    ]
    scores, used = differentiable(_SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend)))
    if norm is not None and options.training and regions.shape[0] and counts.shape[0]:
        counted = counts if words.dim() == 2 else counts.clamp(1, words.shape[1])  # as the floors count them
        update_buffers(norm, used.detach(), regions.shape[0] * (counted + 1))
    return scores


def _steps(reasoning: str, steps: int | None) -> int:
    if reasoning == "SAF":
        if steps is not None:
            raise ValueError(f"{OP}: steps must be None with reasoning 'SAF': it has none; got {steps}")
        return 0
    return STEPS if steps is None else whole(OP, "steps", steps)


def _flag(training: object) -> bool:
    if not isinstance(training, bool):
        raise TypeError(f"{OP}: training must be True or False, got {training!r}")
    return training


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, "
    "Tensor image_global, Tensor caption_global, Tensor? statistics, "
    + "".join(f"Tensor? {name}, " for name in _PARAMETERS)
    + "str reasoning, int steps, bool training, float eps, int workspace_bytes, str backend"
)


def _split(rest: tuple[Any, ...]) -> tuple[ReasoningParameters, ReasoningOptions, int, str]:
    parameters = rest[: len(_PARAMETERS)]
    *options, workspace_bytes, backend = rest[len(_PARAMETERS) :]
    return ReasoningParameters.of(parameters), ReasoningOptions(*options), workspace_bytes, backend


def _forward(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    statistics: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR
    parameters, options, workspace_bytes, backend = _split(rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return _empty(regions, word_counts, options)
    scores, used = floor.forward(
        regions,
        words,
        word_counts,
        region_counts,
        image_global,
        caption_global,
        parameters,
        statistics,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    assert isinstance(used, Tensor)
    return scores, used.clone() if used is statistics else used  # an op returns none of its inputs


def _empty(regions: Tensor, word_counts: Tensor, options: ReasoningOptions) -> tuple[Tensor, Tensor]:
    wide, captions = score_dtype(regions.dtype), word_counts.shape[0]
    scores = regions.new_empty(regions.shape[0], captions, dtype=wide)
    return scores, regions.new_empty(2, captions if options.reasoning == "SAF" else 0, dtype=wide)


def _forward_fake(regions: Tensor, words: Tensor, word_counts: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    options = _split(rest[5:])[1]  # after offsets, region counts, global vectors and statistics
    return _empty(regions, word_counts, options)


def _backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    statistics: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of regions, words, global vectors, and the parameters that are there
    parameters, options, workspace_bytes, backend = _split(rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        given = [regions, words, image_global, caption_global, *parameters.flat()]
        return [grad.zero_() for grad in gradients_like(given)]
    *of_inputs, of_parameters = floor.backward(
        grad_scores,
        regions,
        words,
        word_counts,
        region_counts,
        image_global,
        caption_global,
        parameters,
        statistics,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [*of_inputs, *(p for p in of_parameters.flat() if p is not None)]


def _backward_fake(grad_scores: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]), _SIGNATURE.constants)


forward_op = define(OP, f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad_scores, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
