"""How much boxes overlap."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def overlaps(
    boxes: npt.NDArray[Any],  # [R, 4] x1 y1 x2 y2
    others: npt.NDArray[Any],  # [G, 4]
) -> npt.NDArray[np.float64]:  # [R, G]
    """Intersection over union; a side is x2 - x1, boxes without an area overlap nothing."""
    one, other = np.asarray(boxes, dtype=np.float64)[:, None], np.asarray(others, dtype=np.float64)[None]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    shared = sides.clip(min=0).prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).clip(min=0).prod(axis=-1) for box in (one, other)]
    union = areas[0] + areas[1] - shared
    return np.asarray(shared / np.where(union > 0, union, 1.0))
