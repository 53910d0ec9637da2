"""Drop-in for the published SCAN ``model.py``: replace its functions by an import of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from itm_kernels.compat.losses import PairwiseContrastiveLoss, by_cross_attn, required
from itm_kernels.ops.cross_attention_scores import cross_attention_scores

__all__ = ["ContrastiveLoss", "xattn_score_i2t", "xattn_score_t2i"]


def scan_scores(
    images: Tensor,
    captions: Tensor,
    cap_lens: Sequence[int] | Tensor,
    opt: Any,
    direction: str,
    peak_weight: float = 0.0,
) -> Tensor:
    """Scores with the options that SCAN's ``opt`` names."""
    name = f"xattn_score_{direction}"
    agg_func = required(opt, "agg_func", name)
    # The published code reads lambda_lse for this aggregation alone; 1 stands for "not used".
    lambda_lse = required(opt, "lambda_lse", f"{name} with LogSumExp") if agg_func == "LogSumExp" else 1.0
    return cross_attention_scores(
        images,
        captions,
        cap_lens,
        direction=direction,
        raw_feature_norm=required(opt, "raw_feature_norm", name),
        lambda_softmax=required(opt, "lambda_softmax", name),
        agg_func=agg_func,
        lambda_lse=lambda_lse,
        peak_weight=peak_weight,
    )


def xattn_score_t2i(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Words attend to regions: ``images [I, R, D]``, ``captions [C, W, D]`` -> ``[I, C]``.

    ``opt``: ``raw_feature_norm``, ``lambda_softmax``, ``agg_func`` and, for LogSumExp, ``lambda_lse``.
    """
    return scan_scores(images, captions, cap_lens, opt, "t2i")


def xattn_score_i2t(images: Tensor, captions: Tensor, cap_lens: Sequence[int] | Tensor, opt: Any) -> Tensor:
    """Regions attend to words; arguments as :func:`xattn_score_t2i`."""
    return scan_scores(images, captions, cap_lens, opt, "i2t")


class ContrastiveLoss(PairwiseContrastiveLoss):
    """SCAN's loss; ``opt.cross_attn`` is ``"t2i"`` or ``"i2t"``."""

    def scores(self, im: Tensor, s: Tensor, s_l: Sequence[int] | Tensor) -> Tensor:
        score = by_cross_attn(self.opt, t2i=xattn_score_t2i, i2t=xattn_score_i2t)
        return score(im, s, s_l, self.opt)
