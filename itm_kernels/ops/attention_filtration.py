"""SAF: the alignment vectors of every pair weighed one by one and summed."""

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
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes
from itm_kernels.ops.pairs import autocast_inputs, score_dtype
from itm_kernels.ops.parameters import FiltrationParameters, check_parameter, check_stage
from itm_kernels.ops.stage_options import FiltrationOptions, check_filtration_options
from itm_kernels.ops.stages import check_alignments, check_beside, check_rows, products_like, split_words

OP = "attention_filtration"
_PARAMETERS = len(FiltrationParameters._fields)
_STATISTICS = 4  # position of the statistics among the tensors
_SIGNATURE = Signature(OP, tensors=5 + _PARAMETERS, constants=(_STATISTICS,), kept=((1, _STATISTICS),))


def attention_filtration(
    alignments: Tensor,  # [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    parameters: FiltrationParameters,
    *,
    batch_norm: tuple[Any, ...],
    training: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Filter the alignments of every pair: one attention weight for each word and one for the whole.

    With the nodes :math:`x_0` (the global alignment) and :math:`x_1 .. x_n` (one a word) of a pair,

    .. math::

        a_i \propto \operatorname{sigmoid}(\operatorname{BN}(w \cdot x_i + b)), \quad
        f = \operatorname{l2norm}(\sum_i a_i x_i).

    Parameters
    ----------
    alignments
        ``[I, N, S]`` alignments of the words, as :func:`alignment_vectors` makes them (direction ``"t2i"``); float64,
        float32, bfloat16 or float16.
    global_alignments
        ``[I, C, S]``; dtype of ``alignments``, or float32 and half precision beside each other.
    word_counts
        ``[C]`` words of each caption, as :func:`alignment_vectors` took them.
    parameters
        :class:`FiltrationParameters` without the affine part of the normalisation; dtype of ``alignments``, or float32
        and half precision beside each other.
    batch_norm
        ``(weight [1], bias [1], running_mean [1], running_var [1], num_batches_tracked [], momentum, eps)``, and a
        process group where the statistics run over its ranks (not in this version).
    training
        The statistics of the batch normalise, each caption by itself, over all images and its nodes; the buffers are
        updated in place once per caption, in their order, as the published loop does (momentum None: running averages).
        Otherwise the running statistics normalise.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, outputs and their gradients. One image by one caption is the
        smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C, S]`` float32 (float64 for float64 input), differentiable once in both alignments, parameters and the
        affine part of the batch normalisation.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, and its published code. With
    one image and captions of one word a batch of two numbers normalises; that is the least there is.
    """
    counts, offsets, _ = check_alignments(OP, alignments, word_counts, None, "t2i")
    norm = checked_batch_norm(OP, "SAF", batch_norm)
    assert norm is not None, "there is one with SAF, or it was refused"
    options = FiltrationOptions(bool(training), norm.eps)
    check_filtration_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    images, captions, s = alignments.shape[0], counts.shape[0], alignments.shape[-1]
    if isinstance(global_alignments, Tensor):
        alignments, global_alignments = autocast_inputs(alignments, global_alignments)
    shape = {"I": images, "C": captions, "S": s}
    beside = products_like(OP, alignments, getattr(parameters, "weight", None))
    check_beside(OP, "global_alignments", global_alignments, shape, *beside)
    for name in ("weight", "bias", "running_mean", "running_var"):
        check_parameter(OP, f"batch_norm {name}", getattr(norm, name), *beside)
    if isinstance(parameters, FiltrationParameters):
        if parameters.norm_weight is not None or parameters.norm_bias is not None:
            raise ValueError(f"{OP}: norm_weight and norm_bias of parameters must be None: batch_norm brings them")
        parameters = parameters._replace(norm_weight=norm.weight, norm_bias=norm.bias)
    check_stage(OP, FiltrationParameters, parameters, {"S": s}, *beside)
    statistics = None
    if not options.training:
        running = torch.stack([norm.running_mean, norm.running_var]).to(score_dtype(alignments.dtype))  # [2, 1]
        statistics = running.expand(2, captions)
    alignments = split_words(alignments, 1, counts)
    tensors = [alignments, global_alignments, counts, offsets, statistics, *parameters]
    pooled, used = differentiable(_SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend)))
    if options.training and images and captions:
        # As the floors count them, where words stand in padding.
        counted = counts if alignments.dim() == 3 else counts.clamp(1, alignments.shape[2])
        update_buffers(norm, used.detach(), images * (counted + 1))
    return pooled


_INPUTS = (
    "Tensor alignments, Tensor global_alignments, Tensor word_counts, Tensor? word_offsets, Tensor? statistics, "
    + "".join(f"Tensor {name}, " for name in FiltrationParameters._fields)
    + "bool training, float eps, int workspace_bytes, str backend"
)


def _split(rest: tuple[Any, ...]) -> tuple[FiltrationParameters, FiltrationOptions, int, str]:
    parameters, (training, eps, workspace_bytes, backend) = rest[:_PARAMETERS], rest[_PARAMETERS:]
    return FiltrationParameters(*parameters), FiltrationOptions(training, eps), workspace_bytes, backend


def _forward(
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    statistics: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C]
    parameters, options, workspace_bytes, backend = _split(rest)
    check_rows(OP, alignments, word_counts, None, "t2i")
    floor = pick(OP, alignments.device, alignments.dtype, backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return _forward_fake(alignments, global_alignments, word_counts)
    pooled, used = floor.forward(
        alignments,
        global_alignments,
        word_counts,
        parameters,
        statistics,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    made: Tensor = used
    return pooled, made.clone() if made is statistics else made  # an op returns none of its inputs


def _forward_fake(
    alignments: Tensor, global_alignments: Tensor, word_counts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    wide = score_dtype(alignments.dtype)
    pooled = global_alignments.new_empty(global_alignments.shape, dtype=wide)
    return pooled, alignments.new_empty(2, word_counts.shape[0], dtype=wide)


def _backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    statistics: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of both alignments and of parameters
    parameters, options, workspace_bytes, backend = _split(rest)
    check_rows(OP, alignments, word_counts, None, "t2i")
    floor = pick(OP, alignments.device, alignments.dtype, backend)
    if not alignments.shape[0] or not word_counts.shape[0]:
        return [made.zero_() for made in gradients_like([alignments, global_alignments, *parameters])]
    of_alignments, of_global, of_parameters = floor.backward(
        grad,
        alignments,
        global_alignments,
        word_counts,
        parameters,
        statistics,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [of_alignments, of_global, *of_parameters]


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]), _SIGNATURE.constants)


forward_op = define(OP, f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
