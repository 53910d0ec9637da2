"""Scores of every image against every caption, and CCR and CCS of their pairs, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.attention_constraints import AttentionConstraints, attention_constraints
from itm_kernels.ops.cross_attention_scores import cross_attention_scores
from itm_kernels.ops.options import DIRECTIONS, WORKSPACE_BYTES, ScoreOptions, check_options, number

OP = "scores_and_constraints"


def scores_and_constraints(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    pairs: Tensor | str | None = None,  # [P, 2] int64
    direction: str = "t2i",
    raw_feature_norm: str = "clipped_l2norm",
    lambda_softmax: float = 9.0,
    agg_func: str = "LogSumExp",
    lambda_lse: float = 6.0,
    focal: str | None = None,
    peak_weight: float = 0.0,
    swapped: Tensor | Sequence[Tensor | None] | None = None,  # t2i [P, W], i2t [P, R]; both: one of each
    swap: str = "query",
    detach_swapped: bool = False,
    ccr_margin: float = 0.2,
    ccs_margin: float = 0.2,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
) -> tuple[Tensor, AttentionConstraints | tuple[AttentionConstraints, AttentionConstraints]]:
    """Score every image against every caption, and constrain the attention of chosen pairs, with the same options.

    The scores are those of :func:`cross_attention_scores`, the terms those of :func:`attention_constraints`, with one
    set of attention options for both. Products of matched pairs are a C-th of all; they are made again for the terms.

    Parameters
    ----------
    regions, words, word_counts, region_counts, raw_feature_norm, lambda_softmax, focal, workspace_bytes, backend
        As in both.
    agg_func, lambda_lse, peak_weight
        As in :func:`cross_attention_scores`: of the scores alone.
    pairs, swap, detach_swapped, ccr_margin, ccs_margin
        As in :func:`attention_constraints`: of the terms alone.
    direction
        ``"t2i"``, ``"i2t"``, or ``"both"``: the scores are the sum, the terms a pair.
    swapped
        As in :func:`attention_constraints`; with direction both a pair: of words for t2i, of regions for i2t.

    Returns
    -------
    Tensor
        ``[I, C]`` scores.
    AttentionConstraints
        With direction both a pair of them: t2i, i2t.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As the two raise them, and where ``direction`` and ``swapped`` do not fit each other.

    Notes
    -----
    BFAN: ``direction="both"`` with ``focal``. RCAR and SGRAF score otherwise: they take
    :func:`attention_constraints` alone.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"{OP}: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    swaps: dict[str, Any] = {direction: swapped}  # a single direction: checked by the terms
    if direction == "both":
        of_both = (None, None) if swapped is None else swapped
        if isinstance(of_both, Tensor) or not isinstance(of_both, Sequence) or len(of_both) != 2:
            got = f"{len(of_both)}" if isinstance(of_both, Sequence) else type(of_both).__name__
            raise ValueError(f"{OP}: swapped must be two tensors, t2i and i2t, with direction 'both', got {got}")
        swaps = {"t2i": of_both[0], "i2t": of_both[1]}
    of_scores = ScoreOptions(
        direction,
        raw_feature_norm,
        number(OP, "lambda_softmax", lambda_softmax),
        agg_func,
        number(OP, "lambda_lse", lambda_lse),
        "none" if focal is None else focal,
        number(OP, "peak_weight", peak_weight),
    )
    check_options(OP, of_scores)  # the terms come first, and what is wrong with the scores is said before

    def terms(way: str) -> AttentionConstraints:
        return attention_constraints(
            regions,
            words,
            word_counts,
            region_counts=region_counts,
            pairs=pairs,
            direction=way,
            raw_feature_norm=raw_feature_norm,
            lambda_softmax=lambda_softmax,
            focal=focal,
            swapped=swaps[way],
            swap=swap,
            detach_swapped=detach_swapped,
            ccr_margin=ccr_margin,
            ccs_margin=ccs_margin,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )

    made = (terms("t2i"), terms("i2t")) if direction == "both" else terms(direction)
    scores = cross_attention_scores(
        regions,
        words,
        word_counts,
        region_counts=region_counts,
        direction=direction,
        raw_feature_norm=raw_feature_norm,
        lambda_softmax=lambda_softmax,
        agg_func=agg_func,
        lambda_lse=lambda_lse,
        focal=focal,
        peak_weight=peak_weight,
        workspace_bytes=workspace_bytes,
        backend=backend,
    )
    return scores, made
