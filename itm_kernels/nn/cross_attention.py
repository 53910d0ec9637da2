"""The scorers of SCAN, BFAN and PFAN as a module: options, no parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.cross_attention_scores import OP, cross_attention_scores
from itm_kernels.ops.options import WORKSPACE_BYTES, ScoreOptions, check_options


class CrossAttentionScorer(nn.Module):
    """Scores of every image against every caption; options as in :func:`itm_kernels.cross_attention_scores`.

    ``scorer(regions [I, R, D], words [C, W, D] or [N, D], word_counts [C], region_counts=None) -> [I, C]``

    Raises
    ------
    ValueError
        Unknown option names or unusable numbers, when the module is made.
    """

    def __init__(
        self,
        *,
        direction: str = "t2i",
        raw_feature_norm: str = "clipped_l2norm",
        lambda_softmax: float = 9.0,
        agg_func: str = "LogSumExp",
        lambda_lse: float = 6.0,
        focal: str | None = None,
        peak_weight: float = 0.0,
        workspace_bytes: int = WORKSPACE_BYTES,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_options(
            OP,
            ScoreOptions(
                direction, raw_feature_norm, lambda_softmax, agg_func, lambda_lse, focal or "none", peak_weight
            ),
        )
        self.direction = direction
        self.raw_feature_norm = raw_feature_norm
        self.lambda_softmax = lambda_softmax
        self.agg_func = agg_func
        self.lambda_lse = lambda_lse
        self.focal = focal
        self.peak_weight = peak_weight
        self.workspace_bytes = workspace_bytes
        self.backend = backend

    def forward(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
        *,
        region_counts: Sequence[int] | Tensor | None = None,  # [I]
    ) -> Tensor:  # [I, C]
        return cross_attention_scores(
            regions,
            words,
            word_counts,
            region_counts=region_counts,
            direction=self.direction,
            raw_feature_norm=self.raw_feature_norm,
            lambda_softmax=self.lambda_softmax,
            agg_func=self.agg_func,
            lambda_lse=self.lambda_lse,
            focal=self.focal,
            peak_weight=self.peak_weight,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        shown = ["direction", "raw_feature_norm", "lambda_softmax", "agg_func", "lambda_lse", "focal", "peak_weight"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
