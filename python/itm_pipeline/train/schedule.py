"""What changes from epoch to epoch: the learning rate and which negatives count.

Both are functions of the epoch alone, so a checkpoint that knows its epoch knows the state of the schedule.
"""

from __future__ import annotations

from itm_pipeline.config import TrainConfig

DECAY = 0.1


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of an epoch, counted from 0: `lr * 0.1 ** (epoch // lr_update)`."""
    return config.lr * DECAY ** (epoch // config.lr_update)


def hardest_negatives(config: TrainConfig, epoch: int) -> bool:
    """Whether the loss of this epoch, counted from 0, takes the hardest negatives instead of their sum."""
    return epoch >= config.warmup_epochs
