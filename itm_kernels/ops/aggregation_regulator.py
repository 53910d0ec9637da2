"""RAR: the alignment vectors of every pair pooled by attention that its pooled vector asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes, number, whole
from itm_kernels.ops.pairs import autocast_inputs, score_dtype
from itm_kernels.ops.parameters import AggregationParameters, check_stage, size_of
from itm_kernels.ops.stage_options import (
    AggregationOptions,
    check_aggregation_options,
    check_direction,
    product_dtype,
)
from itm_kernels.ops.stages import check_alignments, check_beside, check_rows, products_like, split_words

OP = "aggregation_regulator"
_PARAMETERS = len(AggregationParameters._fields)
_SIGNATURE = Signature(OP, tensors=5 + _PARAMETERS)


def aggregation_regulator(
    alignments: Tensor,  # [I, N, S] (t2i) or [I, R, C, S] (i2t)
    pooled: Tensor | None,  # [I, C, S]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    parameters: AggregationParameters,
    *,
    step: int = 0,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    dropout: float = 0.0,
    seed: int = 0,
    image_offset: int = 0,
    caption_offset: int = 0,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Pool the alignment vectors of every pair once more.

    With the alignment vectors :math:`x_q` of a pair, its pooled vector :math:`h`, and dropout :math:`D`,

    .. math::

        p_q = \operatorname{softmax}_q(w_v \cdot (D(\tanh(W_k x_q + b_k)) \circ D(\tanh(W_q h + b_q))) + b_v), \quad
        h' = \operatorname{l2norm}(\sum_q p_q x_q).

    Parameters
    ----------
    alignments
        ``[I, N, S]`` (t2i: a query is a word) or ``[I, R, C, S]`` (i2t: a region), as :func:`alignment_vectors` makes
        them; float64, float32, bfloat16 or float16. The products run in this dtype, or in that of half-precision
        matrices beside float32.
    pooled
        ``[I, C, S]`` of the step before, in the dtype of the products or in float32 beside half precision; None: the
        mean of the alignments, with which the first step asks.
    word_counts
        ``[C]`` words of each caption, as :func:`alignment_vectors` took them.
    parameters
        :class:`AggregationParameters` of all steps, stacked; in the dtype of the products, or in float32 beside half
        precision.
    step
        Which of them this is, from 0; the dropout masks of steps differ.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all. An error with direction ``"t2i"``, where no row is a
        region's.
    direction
        ``"t2i"`` or ``"i2t"``.
    dropout
        Probability of the two dropouts (published: 0.4 in training).
    seed
        Of the dropout masks, 0..2^63 - 1; a new one for every training step. The same seed gives the same masks on
        every floor, in any blocks: they depend on the numbers of image, caption, query and channel alone.
    image_offset, caption_offset
        Global number of the first image and the first caption, for the masks.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, outputs and their gradients. One image by one caption is the
        smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C, S]`` float32 (float64 for float64 input), differentiable once in alignments, pooled vectors and
        parameters.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Plug-and-Play Regulators for Image-Text Matching", TIP 2023, and its published code.
    """
    check_direction(OP, direction)
    counts, offsets, of_regions = check_alignments(OP, alignments, word_counts, region_counts, direction)
    options = AggregationOptions(
        direction,
        whole(OP, "step", step),
        number(OP, "dropout", dropout),
        whole(OP, "seed", seed),
        whole(OP, "image_offset", image_offset),
        whole(OP, "caption_offset", caption_offset),
    )
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    (alignments,) = autocast_inputs(alignments)
    images, captions, s = alignments.shape[0], counts.shape[0], alignments.shape[-1]
    sizes = {"S": s, "steps": size_of(getattr(parameters, "value_weight", None), 0)}
    beside = products_like(OP, alignments, getattr(parameters, "key_weight", None))
    check_stage(OP, AggregationParameters, parameters, sizes, *beside)
    check_aggregation_options(OP, options, sizes["steps"])
    if pooled is not None:
        check_beside(OP, "pooled", pooled, {"I": images, "C": captions, "S": s}, *beside)
    if options.t2i:
        alignments = split_words(alignments, 1, counts)
    tensors = [alignments, pooled, counts, offsets, of_regions, *parameters]
    return differentiable(_SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend)))[0]


_INPUTS = (
    "Tensor alignments, Tensor? pooled, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, "
    + "".join(f"Tensor {name}, " for name in AggregationParameters._fields)
    + "str direction, int step, float dropout, int seed, int image_offset, int caption_offset, int workspace_bytes, "
    "str backend"
)


def _split(rest: tuple[Any, ...]) -> tuple[AggregationParameters, AggregationOptions, int, str]:
    parameters, (*options, workspace_bytes, backend) = rest[:_PARAMETERS], rest[_PARAMETERS:]
    return AggregationParameters(*parameters), AggregationOptions(*options), workspace_bytes, backend


def _products(alignments: Tensor, parameters: AggregationParameters) -> torch.dtype:
    return product_dtype(alignments.dtype, parameters.key_weight.dtype)


def _forward(
    alignments: Tensor,
    pooled: Tensor | None,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> Tensor:  # [I, C, S]
    parameters, options, workspace_bytes, backend = _split(rest)
    check_rows(OP, alignments, word_counts, region_counts, options.direction)
    floor = pick(OP, alignments.device, _products(alignments, parameters), backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return _forward_fake(alignments, pooled, word_counts)
    made: Tensor = floor.forward(
        alignments,
        pooled,
        word_counts,
        region_counts,
        parameters,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return made


def _forward_fake(alignments: Tensor, pooled: Tensor | None, word_counts: Tensor, *rest: Any) -> Tensor:
    images, width = alignments.shape[0], alignments.shape[-1]
    return alignments.new_empty(images, word_counts.shape[0], width, dtype=score_dtype(alignments.dtype))


def _backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    pooled: Tensor | None,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of alignments, of pooled vectors if they are there, of parameters
    parameters, options, workspace_bytes, backend = _split(rest)
    check_rows(OP, alignments, word_counts, region_counts, options.direction)
    floor = pick(OP, alignments.device, _products(alignments, parameters), backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return [made.zero_() for made in gradients_like([alignments, pooled, *parameters])]
    of_alignments, of_pooled, of_parameters = floor.backward(
        grad,
        alignments,
        pooled,
        word_counts,
        region_counts,
        parameters,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [of_alignments, *([] if of_pooled is None else [of_pooled]), *of_parameters]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
