"""Hard assignment (CHAN, ColBERT, FILIP, ColPali) as a module: options, no parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from itm_kernels.layout import CaptionLayout
from itm_kernels.ops.max_similarity_scores import OP, max_similarity_scores
from itm_kernels.ops.options import WORKSPACE_BYTES, SimilarityOptions, check_similarity_options, check_workspace_bytes


class MaxSimilarityScorer(nn.Module):
    """Scores of every image against every caption; options as in :func:`itm_kernels.max_similarity_scores`.

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
        agg_func: str = "Sum",
        lambda_lse: float = 10.0,
        workspace_bytes: int = WORKSPACE_BYTES,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_similarity_options(OP, SimilarityOptions(direction, agg_func, lambda_lse))
        check_workspace_bytes(OP, workspace_bytes)
        self.direction = direction
        self.agg_func = agg_func
        self.lambda_lse = lambda_lse
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
        return max_similarity_scores(
            regions,
            words,
            word_counts,
            region_counts=region_counts,
            direction=self.direction,
            agg_func=self.agg_func,
            lambda_lse=self.lambda_lse,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ("direction", "agg_func", "lambda_lse"))
