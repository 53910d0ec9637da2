"""Region proposals: true boxes jittered, boxes merged, and background; shuffled, so that their order tells nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from itm_pipeline.scenes.world import HEIGHT, WIDTH

Boxes = NDArray[np.float32]

REGIONS = 36
"""Proposals of a picture."""

JITTER = (0.06, 0.12, 0.2)
"""How far the sides of the copies of a true box may move, as a share of the box: a good, a fair and a poor hit."""

MERGED = 5
"""Boxes around two neighbours."""

SMALLEST = 6.0
"""Shortest side of a proposal in pixels."""


def intersection_over_union(ones: NDArray[np.number], others: NDArray[np.number]) -> NDArray[np.float64]:
    """IoU [K, L] of boxes [K, 4] with boxes [L, 4], a side being x2 - x1."""
    one, other = ones[:, None].astype(np.float64), others[None].astype(np.float64)
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    inner = np.clip(sides, 0, None).prod(-1)
    areas = (one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1)
    return np.asarray(inner / np.maximum(areas - inner, 1e-9))


def _inside(boxes: NDArray[np.floating]) -> Boxes:
    """Boxes cut to the picture, none thinner than `SMALLEST`."""
    limits = np.array([WIDTH - 1, HEIGHT - 1], np.float64)
    low = np.clip(boxes[:, :2], 0, limits - SMALLEST)
    high = np.clip(np.maximum(boxes[:, 2:], low + SMALLEST), 0, limits)
    inside: Boxes = np.concatenate([low, high], axis=1).astype(np.float32)
    return inside


def _jittered(boxes: NDArray[np.int64], amount: float, rng: np.random.Generator) -> Boxes:
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    return _inside(boxes + rng.uniform(-amount, amount, boxes.shape) * np.concatenate([sides, sides], axis=1))


def _merged(boxes: NDArray[np.int64], rng: np.random.Generator) -> Boxes:
    """Boxes around the closest pairs of things."""
    first, second = np.triu_indices(len(boxes), 1)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    order = np.argsort(np.linalg.norm(middle[first] - middle[second], axis=1), kind="stable")[:MERGED]
    first, second = first[order], second[order]
    low = np.minimum(boxes[first, :2], boxes[second, :2])
    high = np.maximum(boxes[first, 2:], boxes[second, 2:])
    return _jittered(np.concatenate([low, high], axis=1), 0.05, rng)


def _background(boxes: NDArray[np.int64], count: int, rng: np.random.Generator) -> Boxes:
    """Boxes anywhere that hit no thing well (IoU below 0.3)."""
    found = np.zeros((0, 4), np.float32)
    while len(found) < count:
        sides = np.exp(rng.uniform(np.log(14), np.log(80), (REGIONS, 2)))
        corners = rng.uniform(0, 1, (REGIONS, 2)) * (np.array([WIDTH - 1, HEIGHT - 1]) - sides)
        tried = _inside(np.concatenate([corners, corners + sides], axis=1))
        found = np.concatenate([found, tried[intersection_over_union(tried, boxes).max(1) < 0.3]])
    return found[:count]


def propose(boxes: NDArray[np.int64], rng: np.random.Generator) -> Boxes:
    """Proposals for a picture whose things have these visible boxes.

    Parameters
    ----------
    boxes
        int64 [things, 4], x1 y1 x2 y2 in 0-based pixels.
    rng
        Moves, chooses and shuffles.

    Returns
    -------
    float32 [REGIONS, 4], x1 y1 x2 y2 in 0-based pixels, inside the picture
    """
    made = [_jittered(boxes, amount, rng) for amount in JITTER]
    made.append(_merged(boxes, rng))
    made.append(_background(boxes, REGIONS - sum(len(part) for part in made), rng))
    return np.concatenate(made)[rng.permutation(REGIONS)]
