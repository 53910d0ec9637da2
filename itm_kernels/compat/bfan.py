"""Drop-in for the similarity of the published BFAN: both directions with the focal step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.compat.losses import PairwiseContrastiveLoss, required
from itm_kernels.ops.cross_attention_scores import cross_attention_scores

__all__ = ["ContrastiveLoss", "xattn_score"]


def xattn_score(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Mean cosine over words plus mean cosine over regions: ``images [I, R, D]``, ``captions [C, W, D]`` -> ``[I, C]``.

    ``opt``: ``focal_type`` (``"equal"`` or ``"prob"``) and ``lambda_softmax``.
    """
    focal = required(opt, "focal_type", "xattn_score")
    if focal not in ("equal", "prob"):
        raise ValueError(f"opt.focal_type must be 'equal' or 'prob', got {focal!r}")
    return cross_attention_scores(
        images,
        captions,
        cap_lens,
        direction="both",
        lambda_softmax=required(opt, "lambda_softmax", "xattn_score"),
        agg_func="Mean",
        focal=focal,
    )


class ContrastiveLoss(PairwiseContrastiveLoss):
    """BFAN's loss."""

    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor) -> Tensor:
        return xattn_score(im, s, s_l, self.opt)
