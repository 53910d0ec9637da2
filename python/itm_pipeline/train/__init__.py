"""Training: `train` for a configuration, `resume` for a run folder."""

from __future__ import annotations

from itm_pipeline.train.loop import Interrupted, TrainResult, resume, train

__all__ = ["Interrupted", "TrainResult", "resume", "train"]
