"""RCR: from the alignment vectors of one step to the attention scores and temperatures of the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes, number, whole
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.parameters import CorrespondenceParameters, check_stage, size_of
from itm_kernels.ops.stage_options import CorrespondenceOptions, check_direction, check_step, check_temperature
from itm_kernels.ops.stages import check_beside, joined_words, query_words, split_words

OP = "correspondence_regulator"
TEMPERATURE = 10.0
"""Published first temperature of t2i."""
_PARAMETERS = len(CorrespondenceParameters._fields)
_SIGNATURE = Signature(OP, tensors=6 + _PARAMETERS + 2, outputs=3)


class CorrespondenceState(NamedTuple):
    """What RCR hands to the next step. The gate itself, ``[.., D]``, is none of it: the hidden layers make it again."""

    attention_scores: Tensor  # [I, R, N], gated products
    temperature: Tensor  # [I, N] (t2i) or [I, R, C] (i2t)
    hidden: Tensor  # [steps so far, I, N, H] (t2i) or [steps so far, I, R, C, H] (i2t)


def correspondence_regulator(
    alignments: Tensor,  # [I, N, S] (t2i) or [I, R, C, S] (i2t)
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    parameters: CorrespondenceParameters,
    *,
    step: int = 0,
    state: CorrespondenceState | None = None,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    direction: str = "t2i",
    temperature: float = TEMPERATURE,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> CorrespondenceState:
    r"""Regulate how the next attention asks: a gate on the queries and a temperature, made from alignment vectors.

    In step :math:`m`, with the alignment vector :math:`x` of a query :math:`q`, gate :math:`M` (first 1) and
    temperature :math:`t`,

    .. math::

        h_m &= \tanh(W_1 x + b_1), &
        M' &= \operatorname{clamp}(\tanh(W_2 h_m + b_2) + M, -1, 1), \\
        s_{kq} &= k \cdot (M' \circ q), &
        t' &= \operatorname{relu}(u \cdot \tanh(U x + c_1) + c_2 + t).

    The gate, ``[.., D]``, lives no longer than a block: it is made again from the hidden layers :math:`h_0 .. h_m`,
    which the state keeps.

    Parameters
    ----------
    alignments
        ``[I, N, S]`` (t2i) or ``[I, R, C, S]`` (i2t), as :func:`alignment_vectors` makes them; dtype of ``regions``, or
        float32 beside half precision.
    regions, words, word_counts, region_counts, direction
        As :func:`alignment_vectors` takes them.
    parameters
        :class:`CorrespondenceParameters` of all steps, stacked; dtype of ``regions``, or float32 beside half precision.
    step
        Which of them this is, from 0; the gate weights of the steps before it are used as well.
    state
        What the step before returned, with ``step`` hidden layers; None in step 0.
    temperature
        That of the first attention, where ``state`` is None (published: 10 for t2i, 3 for i2t). An error beside a
        state, which brings its own.
    workspace_bytes
        Bound on the memory used beside inputs, parameters, outputs and their gradients, and beside this step's hidden
        layer, which is put behind the earlier ones. One image by one caption is the smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    CorrespondenceState
        Attention scores and temperatures for the next :func:`alignment_vectors`, and the hidden layers so far; float32
        (float64 for float64 input), zeros for regions that do not count. Differentiable once in alignments, regions,
        words, parameters, and the hidden layers and temperatures of ``state``.

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
    counts, offsets, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    options = CorrespondenceOptions(direction, whole(OP, "step", step), number(OP, "temperature", temperature))
    check_direction(OP, direction)
    check_temperature(OP, options.temperature)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    regions, words = autocast_inputs(regions, words)
    sizes = {"S": size_of(alignments, -1), "D": regions.shape[2]}
    for letter, field, axis in (("steps", "hidden_bias", 0), ("H", "hidden_bias", 1), ("U", "temperature_weight", 1)):
        sizes[letter] = size_of(getattr(parameters, field, None), axis)
    check_stage(OP, CorrespondenceParameters, parameters, sizes, regions)
    check_step(OP, options.step, sizes["steps"])
    words = query_words(OP, regions, words, counts, of_regions)
    captions, (images, keys, _), rows = counts.shape[0], regions.shape, words.shape[:-1].numel()
    of_queries = {"I": images, "N": rows} if options.t2i else {"I": images, "R": keys, "C": captions}
    check_beside(OP, "alignments", alignments, {**of_queries, "S": sizes["S"]}, regions)
    _check_state(options, state, {"steps": options.step, **of_queries, "H": sizes["H"]}, regions)

    def inside(tensor: Tensor, axis: int) -> Tensor:
        return split_words(tensor, axis, counts) if options.t2i else tensor

    hidden = temperatures = None
    if state is not None:
        hidden, temperatures = inside(state.hidden, 2), inside(state.temperature, 1)
    tensors = [inside(alignments, 1), regions, words, counts, offsets, of_regions, *parameters, hidden, temperatures]
    scores, warmer, made = differentiable(
        _SIGNATURE, tensors, (*options.as_arguments(), workspace_bytes, requested(backend))
    )
    scores = joined_words(scores, 2, counts)
    if options.t2i:
        warmer, made = joined_words(warmer, 1, counts), joined_words(made, 1, counts)
    so_far = made[None] if state is None else torch.cat([state.hidden.to(made.dtype), made[None]])
    return CorrespondenceState(scores, warmer, so_far)


def _check_state(
    options: CorrespondenceOptions, state: CorrespondenceState | None, shape: dict[str, int], regions: Tensor
) -> None:
    if state is None:
        if options.step:
            raise ValueError(f"{OP}: state must be that of step {options.step - 1} in step {options.step}, got None")
        return
    if not isinstance(state, CorrespondenceState):
        raise TypeError(f"{OP}: state must be a CorrespondenceState, got {type(state).__name__}")
    if options.temperature != TEMPERATURE:
        raise ValueError(
            f"{OP}: temperature is that of the first step alone and state brings its own, got {options.temperature}"
        )
    check_beside(OP, "state.hidden", state.hidden, shape, regions)
    of_queries = {letter: size for letter, size in shape.items() if letter not in ("steps", "H")}
    check_beside(OP, "state.temperature", state.temperature, of_queries, regions)


_INPUTS = (
    "Tensor alignments, Tensor regions, Tensor words, Tensor word_counts, Tensor? word_offsets, "
    "Tensor? region_counts, "
    + "".join(f"Tensor {name}, " for name in CorrespondenceParameters._fields)
    + "Tensor? hidden, Tensor? temperatures, str direction, int step, float temperature, int workspace_bytes, "
    "str backend"
)


def _split(rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any], str]:
    """Parameters, what is given of a state, and options; the arguments by name; the backend."""
    parameters, (hidden, temperatures, *options) = rest[:_PARAMETERS], rest[_PARAMETERS:-2]
    workspace_bytes, backend = rest[-2:]
    positional = (CorrespondenceParameters(*parameters), hidden, temperatures, CorrespondenceOptions(*options))
    return positional, {"workspace_bytes": workspace_bytes}, backend


def _forward(
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # attention scores, temperatures, this step's hidden layer
    positional, named, backend = _split(rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        return _forward_fake(alignments, regions, words, word_counts, word_offsets, region_counts, *rest)
    given = alignments, regions, words, word_counts, region_counts
    made: tuple[Tensor, Tensor, Tensor] = floor.forward(*given, *positional, **named, word_offsets=word_offsets)
    return made


def _forward_fake(
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, queries = score_dtype(regions.dtype), alignments.shape[:-1]
    width = rest[0].shape[1]  # of the hidden layer
    scores = regions.new_empty(*regions.shape[:2], *words.shape[:-1], dtype=wide)
    return scores, regions.new_empty(queries, dtype=wide), regions.new_empty(*queries, width, dtype=wide)


def _backward(
    grad_scores: Tensor,
    grad_temperatures: Tensor,
    grad_hidden: Tensor,
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    word_offsets: Tensor | None,
    region_counts: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # of alignments, regions, words, parameters, and of the state's that are there
    positional, named, backend = _split(rest)
    check_count_values(OP, regions, words, word_counts, region_counts)
    floor = pick(OP, regions.device, regions.dtype, backend)
    if not regions.shape[0] or not word_counts.shape[0]:
        tensors = [alignments, regions, words, *rest[: _PARAMETERS + 2]]
        return [made.zero_() for made in gradients_like(tensors)]
    upstream, given = (grad_scores, grad_temperatures, grad_hidden), (alignments, regions, words)
    of_alignments, of_regions, of_words, of_parameters, *of_state = floor.backward(
        *upstream, *given, word_counts, region_counts, *positional, **named, word_offsets=word_offsets
    )
    return [of_alignments, of_regions, of_words, *of_parameters, *(made for made in of_state if made is not None)]


def _backward_fake(*arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[3 : 3 + _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(
    f"{OP}_backward",
    f"(Tensor grad_scores, Tensor grad_temperatures, Tensor grad_hidden, {_INPUTS}) -> Tensor[]",
    _backward,
    _backward_fake,
)
