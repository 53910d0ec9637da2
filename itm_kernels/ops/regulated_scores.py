"""Scores of every image against every caption by RCAR: attention and pooling of alignments, regulated step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.dropout import seed_tensor, seed_value
from itm_kernels.ops.library import define
from itm_kernels.ops.options import (
    WORKSPACE_BYTES,
    RegulatedOptions,
    check_regulated_options,
    check_workspace_bytes,
    number,
    whole,
)
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.parameters import REGULATED_PARTS, RegulatedParameters, check_regulated, field_names

OP = "regulated_scores"
_PARAMETERS = field_names(RegulatedParameters, REGULATED_PARTS)
_SIGNATURE = Signature(OP, tensors=6 + len(_PARAMETERS))


def regulated_scores(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    parameters: RegulatedParameters,
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    regulator: str = "rcar",
    steps: int = 2,
    temperature: float = 10.0,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    image_offset: int = 0,
    caption_offset: int = 0,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> Tensor:
    r"""Score every image against every caption with RCAR's regulators, all stages in blocks of pairs.

    With queries :math:`q` (t2i: words, i2t: regions) and keys :math:`k` of the other side, a gate :math:`M_q` (first 1)
    and a temperature :math:`t_q` a query,

    .. math::

        s_{kq} = k \cdot (M_q \circ q), \quad a_{kq} = \operatorname{softmax}_k(t_q\, \hat s_{kq}), \quad
        \hat c_q = \frac{c_q}{|c_q| + \epsilon},\; c_q = \sum_k a_{kq} k, \quad
        x_q = \operatorname{l2norm}(W (q - \hat c_q)^2 + b).

    RCR makes the next gate and temperature from :math:`x_q`,
    :math:`M' = \operatorname{clamp}(\tanh(W_2 \tanh(W_1 x + b_1) + b_2) + M, -1, 1)` and
    :math:`t' = \operatorname{relu}(U_2 \tanh(U_1 x + c_1) + c_2 + t)`; RAR pools the :math:`x_q` of a pair by attention
    that its pooled vector asks. Nothing of size ``[I, C, W, D]`` or ``[I, N, S]`` outlives a block (but on the floor
    ``reference``, which has no blocks).

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
    parameters
        :class:`RegulatedParameters`, whose fields give the shapes; dtype of ``regions``, or float32 beside half
        precision.
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    direction
        ``"t2i"`` (words attend to regions) or ``"i2t"`` (regions attend to words).
    regulator
        ``"rcr"``: attention regulated ``steps`` times, then the mean cosine of query and attended vector.
        ``"rar"``: one attention, pooling regulated ``steps`` times. ``"rcar"``: both in turn. The last two end in a
        sigmoid.
    steps
        Regulation steps; 0 is allowed for ``"rcr"`` (plain mean cosine) and ``"rar"`` (plain mean of alignments).
    temperature
        Multiplies the logits of the first attention, and is what RCR adds to (published: 10 for t2i, 3 for i2t).
    dropout
        Probability of RAR's two dropouts (published: 0.4 in training); an error with ``"rcr"``.
    seed
        Of the dropout masks, 0..2^63 - 1; a new one for every training step. The same seed gives the same masks on
        every floor, in any blocks: they depend on the numbers of image, caption, query and channel alone. A number, or
        an int64 tensor ``[]`` on the host, which ``torch.compile`` takes without compiling anew for every step.
    image_offset, caption_offset
        Global number of the first image and the first caption, for the masks.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, gradients and scores. One image by one caption is the
        smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    Tensor
        ``[I, C]`` float32 (float64 for float64 input), differentiable once in regions, words and parameters.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Diao et al., "Plug-and-Play Regulators for Image-Text Matching", TIP 2023, and its published code. The backward
    keeps inputs and parameters alone and runs the stages of a block again. :math:`\epsilon = 10^{-8}`.
    """
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    options = RegulatedOptions(
        direction,
        regulator,
        whole(OP, "steps", steps),
        number(OP, "temperature", temperature),
        number(OP, "dropout", dropout),
        0 if isinstance(seed, Tensor) else whole(OP, "seed", seed),
        whole(OP, "image_offset", image_offset),
        whole(OP, "caption_offset", caption_offset),
    )
    check_regulated_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    regions, words = autocast_inputs(regions, words)
    check_regulated(OP, parameters, options, regions)
    seed = seed_tensor(OP, seed)
    tensors = [regions, words, counts, offsets, of_regions, seed, *parameters.flat()]
    return differentiable(_SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend)))[0]


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, Tensor? region_counts, Tensor seed, "
    + "".join(f"Tensor? {name}, " for name in _PARAMETERS)
    + "str direction, str regulator, int steps, float temperature, float dropout, SymInt image_offset, "
    "SymInt caption_offset, int workspace_bytes, str backend"
)


def _split(seed: Tensor, rest: tuple[Any, ...]) -> tuple[RegulatedParameters, RegulatedOptions, int, str]:
    parameters = rest[: len(_PARAMETERS)]
    *named, image_offset, caption_offset, workspace_bytes, backend = rest[len(_PARAMETERS) :]
    direction, regulator, steps, temperature, dropout = named
    options = RegulatedOptions(
        direction, regulator, steps, temperature, dropout, seed_value(OP, seed), image_offset, caption_offset
    )
    return RegulatedParameters.of(parameters), options, workspace_bytes, backend


def _forward(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    seed: Tensor,  # []
    *rest: Any,
) -> Tensor:  # [I, C]
    parameters, options, workspace_bytes, backend = _split(seed, rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return _forward_fake(regions, words, word_counts)
    scores: Tensor = floor.forward(
        regions,
        words,
        word_counts,
        region_counts,
        parameters,
        options,
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
    seed: Tensor,  # []
    *rest: Any,
) -> list[Tensor]:  # of regions, words, and the parameters that are there
    parameters, options, workspace_bytes, backend = _split(seed, rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return [grad.zero_() for grad in gradients_like([regions, words, *parameters.flat()])]
    of_regions, of_words, of_parameters = floor.backward(
        grad_scores,
        regions,
        words,
        word_counts,
        region_counts,
        parameters,
        options,
        workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )
    return [of_regions, of_words, *(p for p in of_parameters.flat() if p is not None)]


def _backward_fake(grad_scores: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> Tensor", _forward, _forward_fake)
backward_op = define(f"{OP}_backward", f"(Tensor grad_scores, {_INPUTS}) -> Tensor[]", _backward, _backward_fake)
