"""What the ``ContrastiveLoss`` modules of SCAN, BFAN and PFAN share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from itm_kernels.ops.triplet_loss import triplet_loss


class PairwiseContrastiveLoss(nn.Module, ABC):
    """``ContrastiveLoss(opt, margin=0, max_violation=False)(im, s, s_l)``: the hinge loss of the model's own scores.

    Parameters
    ----------
    opt
        Options of the scores.
    margin
        Hinge margin.
    max_violation
        Hardest negatives instead of the sum over all.
    """

    def __init__(self, opt: Any, margin: float = 0, max_violation: bool = False) -> None:
        super().__init__()
        self.opt = opt
        self.margin = margin
        self.max_violation = max_violation

    @abstractmethod
    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor) -> Tensor:
        """``[I, C]`` scores of images ``im [I, R, D]`` and captions ``s [C, W, D]``."""

    def forward(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor) -> Tensor:
        """Loss of a batch of matching images ``[B, R, D]`` and captions ``[B, W, D]`` of lengths ``s_l``."""
        return triplet_loss(self.scores(im, s, s_l), margin=self.margin, hardest=self.max_violation)


def required(opt: Any, name: str, used_for: str) -> Any:
    """``opt.name``, or one sentence that says what is missing."""
    try:
        return getattr(opt, name)
    except AttributeError:
        raise ValueError(f"opt.{name} is needed for {used_for}, but opt has no such attribute") from None


def by_cross_attn(opt: Any, *, t2i: Callable[..., Tensor], i2t: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that ``opt.cross_attn`` names."""
    direction = required(opt, "cross_attn", "ContrastiveLoss")
    if direction not in ("t2i", "i2t"):
        raise ValueError(f"opt.cross_attn must be 't2i' or 'i2t', got {direction!r}")
    return t2i if direction == "t2i" else i2t
