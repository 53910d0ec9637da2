"""CCR and CCS: how much closer a query is to what it attends to than to what it ignores, and than another query is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.backends import check_backend, pick, requested
from itm_kernels.layout import CaptionLayout, padded_words
from itm_kernels.ops.attention_options import check_index_values
from itm_kernels.ops.autograd import Signature, differentiable, gradients_like
from itm_kernels.ops.constraint_options import (
    ConstraintOptions,
    check_constraint_options,
    check_swapped,
    check_swapped_values,
    padded_rows,
    pair_indices,
)
from itm_kernels.ops.library import define
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes, number
from itm_kernels.ops.pairs import autocast_inputs, check_count_values, check_pairs, score_dtype
from itm_kernels.ops.stages import check_beside

OP = "attention_constraints"
_SIGNATURE = Signature(OP, tensors=8, outputs=2)


class AttentionConstraints(NamedTuple):
    """Terms of P pairs, one for each query: words (t2i, ``[P, W]``) or regions (i2t, ``[P, R]``)."""

    ccr: Tensor  # content re-sourcing; 0 where not valid
    ccs: Tensor  # content swapping; 0 where not valid
    ccr_valid: Tensor  # bool: a query, with more than one key
    ccs_valid: Tensor  # bool: a query that has a swapped one


def attention_constraints(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    pairs: Tensor | str | None = None,  # [P, 2] int64
    direction: str = "t2i",
    raw_feature_norm: str = "clipped_l2norm",
    lambda_softmax: float = 9.0,
    focal: str | None = None,
    swapped: Tensor | None = None,  # t2i [P, W], i2t [P, R] int64
    gate: Tensor | None = None,  # t2i [P, W, D], i2t [P, R, D]
    temperature: Tensor | None = None,  # t2i [P, W], i2t [P, R]
    swap: str = "query",
    detach_swapped: bool = False,
    ccr_margin: float = 0.2,
    ccs_margin: float = 0.2,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> AttentionConstraints:
    r"""Terms of content re-sourcing (CCR) and content swapping (CCS) of chosen pairs of an image and a caption.

    With the attention weights :math:`w_{ij}` of query :math:`i` over its :math:`n` keys as in
    :func:`cross_attention`, :math:`a_i = \sum_j w_{ij} k_j`, and :math:`R` the cosine,

    .. math::

        \hat a_i = \frac{\sum_j (1 - w_{ij})\, k_j}{n - 1}, \quad
        \text{ccr}_i = \max(0, \gamma - R(q_i, a_i) + R(q_i, \hat a_i)), \quad
        \text{ccs}_i = \max(0, \gamma - R(q_i, a_i) + R(\tilde q_i, a_i)).

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
    region_counts
        ``[I]`` valid regions of each image, 1..R; None: all.
    pairs
        ``[P, 2]`` int64, image and caption of each pair; None: the diagonal of a square batch; ``"all"``: every image
        with every caption, pair ``i C + c``. Indices on a GPU are never read back: a pair out of range gives NaN.
    direction
        ``"t2i"`` (words attend to regions) or ``"i2t"`` (regions attend to words).
    raw_feature_norm, lambda_softmax, focal
        As in :func:`cross_attention_scores`. Keys that ``focal`` drops have weight 0.
    swapped
        The fragment :math:`\tilde q` for each query of each pair, -1 for none: ``[P, W]`` rows of the words
        (``c W + w`` where they are padded, rows of ``[N, D]`` where they are packed), or ``[P, R]`` rows ``i R + r`` of
        the regions with i2t. None: no CCS. :func:`swapped_words` and :func:`swapped_regions` draw them. A row out of
        range, or of the padding, is an error on the host and gives NaN where it is on a GPU.
    gate, temperature
        As in :func:`cross_attention`: they shape the weights alone, the cosines take the queries without a gate. An
        error with ``swap="content"``.
    swap
        ``"query"``: as above. ``"content"``: what the swapped fragment would attend to takes the place of the swapped
        query, :math:`R(q_i, a(\tilde q_i))`, with :math:`\tilde q_i` standing in for :math:`q_i` among the queries of
        the pair.
    detach_swapped
        No gradient into the swapped fragments.
    ccr_margin, ccs_margin
        :math:`\gamma` of each term, at least 0.
    workspace_bytes
        Bound on the memory used beside inputs, gradients and terms; one pair is the smallest block.
    backend
        ``"reference"``, ``"eager"``, ``"native"``, ``"triton"``; None: :func:`use_backend`, else the fastest that runs.

    Returns
    -------
    AttentionConstraints
        ``ccr`` and ``ccs``, float32 (float64 for float64 input), and where they are valid; each ``[P, W]`` (t2i) or
        ``[P, R]`` (i2t). Differentiable once in regions, words, gate and temperature.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit; the message names argument, expectation and what was found.
    RuntimeError
        A forced backend that cannot run, with its reason.

    Notes
    -----
    Chen et al., "More Than Just Attention: Improving Cross-Modal Attentions with Contrastive Constraints for Image-Text
    Matching", WACV 2023. There is no official code; this is our reading of the paper.
    """
    counts, _, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    options = ConstraintOptions(
        direction,
        raw_feature_norm,
        number(OP, "lambda_softmax", lambda_softmax),
        "none" if focal is None else focal,
        swap,
        detach_swapped,
        number(OP, "ccr_margin", ccr_margin),
        number(OP, "ccs_margin", ccs_margin),
    )
    if focal == "none":  # our own spelling, not the contract's
        raise ValueError(f"{OP}: focal must be None, 'equal' or 'prob', got 'none'")
    check_constraint_options(OP, options)
    check_backend(OP, backend)
    check_workspace_bytes(OP, workspace_bytes)
    indices = pair_indices(OP, pairs, regions, counts.shape[0])
    for name, given in (("gate", gate), ("temperature", temperature)):
        if given is not None and swap == "content":
            raise ValueError(f"{OP}: {name} must be None with swap 'content': what it would be for a swap is not known")
    regions, words = autocast_inputs(regions, words)
    packed = words.dim() == 2
    if packed:
        check_count_values(OP, regions, words, counts, of_regions)
        rows = words.shape[0]
        words = padded_words(words, word_counts)[0]
    letter, queries = ("W", words.shape[1]) if options.t2i else ("R", regions.shape[1])
    pairs_number = regions.shape[0] * words.shape[0] if indices is None else indices.shape[0]
    shape = {"P": pairs_number, letter: queries}
    if swapped is not None:
        check_swapped(OP, swapped, shape, regions)
        if packed and options.t2i:
            check_swapped_values(OP, swapped, rows, None, 1)
            swapped = padded_rows(swapped, counts, words.shape[1])
    if gate is not None:
        check_beside(OP, "gate", gate, {**shape, "D": regions.shape[2]}, regions)
    if temperature is not None:
        check_beside(OP, "temperature", temperature, shape, regions)
    tensors = [regions, words, counts, of_regions, indices, swapped, gate, temperature]
    rest = (*options.as_arguments(), workspace_bytes, requested(backend))
    return AttentionConstraints(*differentiable(_SIGNATURE, tensors, rest))


_INPUTS = (
    "Tensor regions, Tensor words, Tensor word_counts, Tensor? region_counts, Tensor? pairs, Tensor? swapped, "
    "Tensor? gate, Tensor? temperature, str direction, str raw_feature_norm, float lambda_softmax, str focal, "
    "str swap, bool detach_swapped, float ccr_margin, float ccs_margin, int workspace_bytes, str backend"
)


def _floor(tensors: Sequence[Any], rest: Sequence[Any]) -> Any:
    """The floor that runs, once values of counts and indices have been looked at."""
    regions, words, word_counts, region_counts, pairs, swapped = tensors[:6]
    check_count_values(OP, regions, words, word_counts, region_counts)
    if pairs is not None:
        check_index_values(OP, pairs, regions.shape[0], words.shape[0])
    if swapped is not None:
        side, counts = (words, word_counts) if rest[0] == "t2i" else (regions, region_counts)
        check_swapped_values(OP, swapped, side.shape[0] * side.shape[1], counts, side.shape[1])
    return pick(OP, regions.device, regions.dtype, rest[-1])


def _nothing_to_do(regions: Tensor, words: Tensor, pairs: Tensor | None) -> bool:  # no pair, or none within range
    return not (regions.shape[0] and words.shape[0] and (pairs is None or pairs.shape[0]))


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors, rest = arguments[: _SIGNATURE.tensors], arguments[_SIGNATURE.tensors :]
    *options, workspace_bytes, _ = rest
    floor = _floor(tensors, rest)
    if _nothing_to_do(tensors[0], tensors[1], tensors[4]):
        made = _forward_fake(*arguments)
        return made[0].fill_(torch.nan), made[1].fill_(torch.nan), made[2].fill_(True), made[3].fill_(True)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = floor.forward(
        *tensors, ConstraintOptions(*options), workspace_bytes=workspace_bytes
    )
    return outputs


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    regions, words, pairs = arguments[0], arguments[1], arguments[4]
    queries = words if arguments[_SIGNATURE.tensors] == "t2i" else regions
    number = regions.shape[0] * words.shape[0] if pairs is None else pairs.shape[0]
    shape = number, queries.shape[1]
    terms = [regions.new_empty(shape, dtype=score_dtype(regions.dtype)) for _ in range(2)]
    valid = [regions.new_empty(shape, dtype=torch.bool) for _ in range(2)]
    return terms[0], terms[1], valid[0], valid[1]


def _backward(grad_ccr: Tensor, grad_ccs: Tensor, *arguments: Any) -> list[Tensor]:
    """Of regions, words, and of gate and temperature that are there."""
    tensors, rest = arguments[: _SIGNATURE.tensors], arguments[_SIGNATURE.tensors :]
    *options, workspace_bytes, _ = rest
    floor = _floor(tensors, rest)
    if _nothing_to_do(tensors[0], tensors[1], tensors[4]):
        return [made.zero_() for made in gradients_like(list(tensors))]
    grads = floor.backward(grad_ccr, grad_ccs, *tensors, ConstraintOptions(*options), workspace_bytes=workspace_bytes)
    return [grad for grad in grads if grad is not None]


def _backward_fake(grad_ccr: Tensor, grad_ccs: Tensor, *arguments: Any) -> list[Tensor]:
    return gradients_like(list(arguments[: _SIGNATURE.tensors]))


forward_op = define(OP, f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake)
backward_op = define(
    f"{OP}_backward", f"(Tensor grad_ccr, Tensor grad_ccs, {_INPUTS}) -> Tensor[]", _backward, _backward_fake
)
