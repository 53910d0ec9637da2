"""Attention Precision, Recall and F1 of Chen et al. ("More Than Just Attention", WACV 2023), and the pointing game.

A query, a word of a phrase that somebody has drawn boxes for, attends to the regions ``A = {j : w_j > T}`` of its n
regions; those that lie on one of the boxes are ``G``. Then

    P = |A and G| / |A|        R = |A and G| / |G|        F1 = 2 P R / (P + R)

with P = 0 where A is empty, F1 = 0 where P + R = 0. Queries with an empty G cannot be judged: they are left out and
counted. No official code exists and the paper's thresholds are not at hand: ``T = 1/n``, what even attention would give
every region, needs no tuning and is the default; :func:`attention_curve` has all others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UserError

if TYPE_CHECKING:
    import torch

AVERAGES = ("macro", "micro")
CURVE_POINTS = 200
"""How many points of a curve are handed out at most; its best F1 is that of all thresholds."""


def attention(
    weights: npt.NDArray[Any] | torch.Tensor,
    relevant: npt.NDArray[np.bool_] | torch.Tensor,
    key_counts: npt.NDArray[Any] | torch.Tensor | list[int],
    threshold: float | None = None,
    average: str = "macro",
) -> dict[str, float]:
    """How well attention weights find the regions that they should.

    Parameters
    ----------
    weights
        ``[Q, K]`` weights of each query over its keys; what stands behind its ``key_counts`` keys is not looked at.
    relevant
        ``[Q, K]`` bool, the keys that the query means.
    key_counts
        ``[Q]`` keys of each query, 1..K.
    threshold
        A key is attended to when its weight is larger than this (in the precision of ``weights``); None: 1/n of each
        query, n its keys.
    average
        ``"macro"``: precision and recall are means over queries; ``"micro"``: of all keys of all queries together.

    Returns
    -------
    dict
        ``precision``, ``recall``; ``f1``, the harmonic mean of these two; ``mean_f1``, the mean of the queries' own F1
        with either average; ``pointing``, the share of queries whose largest weight (of equal ones the first) is on a
        relevant key; ``queries``, how many these are numbers of, and ``skipped``, those without a relevant key. From 0
        to 1; NaN where every query is skipped.

    Raises
    ------
    ValueError
        Shapes, types or options that do not fit.
    UserError
        A weight is NaN or infinite (the query is named).
    """
    judged = _judged("attention", weights, relevant, key_counts, average)
    if threshold is None:
        bounds = (1.0 / judged.counts).astype(judged.weights.dtype)[:, None]
    elif not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ValueError(f"attention: threshold must be a finite number or None, got {threshold!r}")
    else:
        bounds = np.asarray(threshold, dtype=judged.weights.dtype)
    attended = (judged.weights > bounds) & judged.valid
    hits = np.count_nonzero(attended & judged.relevant, axis=1)
    sizes = np.count_nonzero(attended, axis=1)
    meant = np.count_nonzero(judged.relevant, axis=1)
    precisions, recalls = _share(hits, sizes), _share(hits, meant)
    if average == "macro":
        precision, recall = _mean(precisions), _mean(recalls)
    else:
        precision, recall = (float(_share(hits.sum(), of.sum())) if len(hits) else math.nan for of in (sizes, meant))
    first = np.where(judged.valid, judged.weights, -np.inf).argmax(axis=1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": float(_harmonic(precision, recall)),
        "mean_f1": _mean(_harmonic(precisions, recalls)),
        "pointing": _mean(judged.relevant[np.arange(len(first)), first]),
        "queries": len(hits),
        "skipped": judged.skipped,
    }


def attention_curve(
    weights: npt.NDArray[Any] | torch.Tensor,
    relevant: npt.NDArray[np.bool_] | torch.Tensor,
    key_counts: npt.NDArray[Any] | torch.Tensor | list[int],
    average: str = "macro",
    points: int = CURVE_POINTS,
) -> dict[str, Any]:
    """Precision and recall at every threshold, and the best F1 among them.

    Every weight that occurs is a threshold, and 0: between them nothing changes.

    Parameters
    ----------
    weights, relevant, key_counts, average
        As in :func:`attention`.
    points
        Of a longer curve, so many points at even steps of recall and the best one are handed out.

    Returns
    -------
    dict
        ``threshold`` (falling), ``precision``, ``recall``, ``f1``: lists, one entry a point, as :func:`attention` has
        them at that threshold; ``best_f1`` of the whole sweep and ``best_threshold``, the largest that reaches it.
        Without a query to judge the lists are empty and these two NaN.

    Raises
    ------
    ValueError, UserError
        As :func:`attention`.
    """
    judged = _judged("attention_curve", weights, relevant, key_counts, average)
    if points < 2:
        raise ValueError(f"attention_curve: points must be at least 2, got {points}")
    if not len(judged.weights):
        empty: dict[str, Any] = {name: [] for name in ("threshold", "precision", "recall", "f1")}
        return {**empty, "best_f1": math.nan, "best_threshold": math.nan}
    thresholds, precision, recall = _sweep(judged, average)
    f1 = _harmonic(precision, recall)
    best = int(f1.argmax())
    kept = np.arange(len(f1))
    if len(f1) > points:
        steps = np.linspace(0.0, recall[-1], points)
        kept = np.union1d(np.searchsorted(np.maximum.accumulate(recall), steps).clip(max=len(f1) - 1), [best])
    return {
        "threshold": thresholds[kept].astype(np.float64).tolist(),
        "precision": precision[kept].tolist(),
        "recall": recall[kept].tolist(),
        "f1": f1[kept].tolist(),
        "best_f1": float(f1[best]),
        "best_threshold": float(thresholds[best]),
    }


class _Judged(NamedTuple):
    """The queries that mean some key."""

    weights: npt.NDArray[Any]  # [Q, K]
    relevant: npt.NDArray[np.bool_]  # [Q, K], False behind the keys of a query
    valid: npt.NDArray[np.bool_]  # [Q, K]
    counts: npt.NDArray[np.int64]  # [Q]
    skipped: int


def _sweep(
    judged: _Judged, average: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64], npt.NDArray[np.float64]]:  # thresholds, precision, recall
    """All points, thresholds falling. A key joins the attended ones below its own weight, and moves the averages."""
    size = np.arange(1, judged.weights.shape[1] + 1)
    ranked = np.argsort(np.where(judged.valid, -judged.weights, np.inf), axis=1, kind="stable")
    weights, relevant, valid = (
        np.take_along_axis(array, ranked, axis=1) for array in (judged.weights, judged.relevant, judged.valid)
    )
    hits = relevant.cumsum(axis=1)
    if average == "macro":
        queries, meant = len(hits), hits[:, -1:]
        # What the query's j-th key changes, in the order of the query's own weights.
        moves = [np.diff(values, axis=1, prepend=0.0)[valid] for values in (hits / size, hits / meant)]
        totals: tuple[Any, Any] = (queries, queries)
    else:
        moves = [relevant[valid].astype(np.float64)]
        totals = (None, hits[:, -1].sum())
    falling = np.argsort(-weights[valid], kind="stable")
    values = weights[valid][falling]
    sums = [move[falling].cumsum() for move in moves]
    last = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)  # the last of equal weights
    sums = [np.append(0.0, total[last]) for total in sums]
    counted = np.append(0, last + 1)
    # Behind the first j groups of equal weights, the threshold is the next weight; behind all of them it is 0.
    thresholds = np.append(values[last], values.dtype.type(0))
    if values[-1] <= 0:
        thresholds, sums, counted = thresholds[:-1], [total[:-1] for total in sums], counted[:-1]
    if average == "macro":
        return thresholds, sums[0] / totals[0], sums[1] / totals[1]
    return thresholds, _share(sums[0], counted), sums[0] / totals[1]


def _judged(
    name: str,
    weights: npt.NDArray[Any] | torch.Tensor,
    relevant: npt.NDArray[np.bool_] | torch.Tensor,
    key_counts: npt.NDArray[Any] | torch.Tensor | list[int],
    average: str,
) -> _Judged:
    if str(getattr(weights, "dtype", "")) == "torch.bfloat16":  # NumPy has no such type
        raise ValueError(f"{name}: weights must be float16, float32 or float64, got bfloat16: convert them")
    w, g, n = _array(weights), _array(relevant), _array(key_counts)
    if average not in AVERAGES:
        raise ValueError(f"{name}: average must be one of {', '.join(AVERAGES)}, got {average!r}")
    if w.ndim != 2 or w.dtype.kind != "f":
        raise ValueError(f"{name}: weights must be floating-point [Q, K], got {w.dtype} {list(w.shape)}")
    if g.dtype != np.bool_ or g.shape != w.shape:
        raise ValueError(f"{name}: relevant must be bool {list(w.shape)} as weights, got {g.dtype} {list(g.shape)}")
    if n.shape != w.shape[:1] or (n.size and n.dtype.kind not in "iu"):
        raise ValueError(f"{name}: key_counts must be integers [{len(w)}], got {n.dtype} {list(n.shape)}")
    if n.size and not (n.min() >= 1 and n.max() <= w.shape[1]):
        raise ValueError(f"{name}: key_counts must be in 1..{w.shape[1]}, got {n.min()} to {n.max()}")
    n = n.astype(np.int64)
    valid = np.arange(w.shape[1]) < n[:, None]
    bad = np.flatnonzero((~np.isfinite(w) & valid).any(axis=1))
    if bad.size:
        raise UserError(
            f"an attention weight of query {bad[0]} is NaN or infinite: the weights of the model have diverged or the "
            "features are damaged; train with a smaller learning rate or check them"
        )
    g = g & valid
    kept = g.any(axis=1)
    return _Judged(w[kept], g[kept], valid[kept], n[kept], int(np.count_nonzero(~kept)))


def _array(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _share(part: Any, whole: Any) -> npt.NDArray[np.float64]:
    """``part / whole``, 0 where both are."""
    return np.asarray(np.asarray(part, dtype=np.float64) / np.maximum(whole, 1))


def _harmonic(precision: Any, recall: Any) -> npt.NDArray[np.float64]:
    total = np.asarray(precision + recall, dtype=np.float64)
    return np.asarray(2 * precision * recall / np.where(total == 0, 1.0, total))


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
