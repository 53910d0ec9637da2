"""Golden vectors of the published SCAN, BFAN and PFAN, as batches and options of our op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers import Batch, Result

FOLDER = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.stem for prefix in ("scan", "bfan", "pfan") for path in FOLDER.glob(f"{prefix}_*.npz"))


def golden_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """The inputs that all cases share."""
    with np.load(FOLDER / "inputs.npz") as data:
        return Batch(
            torch.from_numpy(data["images"]).to(dtype),
            torch.from_numpy(data["captions"]).to(dtype),
            data["lengths"].tolist(),
            None,
            torch.from_numpy(data["grad_scores"]),
        )


def golden_result(case: str) -> Result:
    """Scores in float64, gradients as stored (float32)."""
    with np.load(FOLDER / f"{case}.npz") as data:
        return Result(*(torch.from_numpy(data[name]) for name in ("scores", "grad_images", "grad_captions")))


def published_options(case: str) -> dict[str, Any]:
    """The options of the published run, under the published names."""
    with np.load(FOLDER / f"{case}.npz") as data:
        options: dict[str, Any] = json.loads(str(data["options"]))
    return options


def golden_options(case: str) -> dict[str, Any]:
    """The same as options of ``cross_attention_scores``."""
    options = published_options(case)
    model = options.pop("model")
    if model == "bfan":
        return {
            "direction": "both",
            "focal": options["focal_type"],
            "lambda_softmax": options["lambda_softmax"],
            "agg_func": "Mean",
        }
    direction = options.pop("cross_attn")
    # The published PFAN adds half of the aggregated largest weight in t2i, and nothing in i2t.
    peak = 0.5 if model == "pfan" and direction == "t2i" else 0.0
    return {"direction": direction, "peak_weight": peak, **options}


def hinge_loss() -> dict[str, np.ndarray]:
    """Scores, margin, and the published hinge losses with their gradients."""
    with np.load(FOLDER / "hinge_loss.npz") as data:
        return dict(data)
