"""Drop-in for the similarity of the published PFAN (public variant): SCAN, and half the peak of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.compat.losses import PairwiseContrastiveLoss, by_cross_attn
from itm_kernels.compat.scan import scan_scores, xattn_score_i2t

__all__ = ["ContrastiveLoss", "xattn_score_i2t", "xattn_score_t2i"]

PEAK_WEIGHT = 0.5


def xattn_score_t2i(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Words attend to regions, with the peak: ``images [I, R, D]``, ``captions [C, W, D]`` -> ``[I, C]``.

    ``opt`` as in :func:`itm_kernels.compat.scan.xattn_score_t2i`. The published i2t has no peak: it is SCAN's.
    """
    return scan_scores(images, captions, cap_lens, opt, "t2i", peak_weight=PEAK_WEIGHT)


class ContrastiveLoss(PairwiseContrastiveLoss):
    """PFAN's loss; ``opt.cross_attn`` is ``"t2i"`` or ``"i2t"``."""

    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor) -> Tensor:
        score = by_cross_attn(self.opt, t2i=xattn_score_t2i, i2t=xattn_score_i2t)
        return score(im, s, s_l, self.opt)
