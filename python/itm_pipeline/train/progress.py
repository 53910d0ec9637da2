"""Where a run stands, and the sums it carries from step to step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass
class Progress:
    """Position of a run. Epochs and batches count from 0 and name what comes next."""

    epoch: int = 0
    batch: int = 0
    """Next batch of the epoch; the number of batches, where the epoch only lacks its evaluation."""
    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in training and evaluation, over all resumptions."""
    best_rsum: float | None = None
    best_epoch: int | None = None
    """Epoch of the best rsum, counted from 1 as people do."""
    last_rsum: float | None = None


@dataclass
class Window:
    """Sums over a stretch of steps; exact in JSON, which keeps every bit of a double."""

    loss: float = 0.0
    constraints: float = 0.0
    """CCR and CCS, which `loss` does not hold."""
    captions: int = 0
    steps: int = 0
    seconds: float = 0.0

    def add(self, other: Window) -> None:
        """Add the sums of another stretch."""
        self.loss += other.loss
        self.constraints += other.constraints
        self.captions += other.captions
        self.steps += other.steps
        self.seconds += other.seconds

    @property
    def mean_loss(self) -> float:
        """Loss per step."""
        return self.loss / max(self.steps, 1)

    @property
    def mean_constraints(self) -> float:
        """CCR and CCS per step."""
        return self.constraints / max(self.steps, 1)

    @property
    def loss_per_caption(self) -> float:
        """Loss per caption; the loss of a step is a sum over its captions, and the last batch may be small."""
        return self.loss / max(self.captions, 1)

    @property
    def images_per_s(self) -> float:
        """Captions, each with its image, per second."""
        return self.captions / max(self.seconds, 1e-9)


def as_values(state: Progress | Window) -> dict[str, Any]:
    """Plain JSON values."""
    return dataclasses.asdict(state)
