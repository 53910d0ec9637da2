"""Drop-in for the published SGRAF similarity encoder and its loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from itm_kernels.nn.similarity_reasoning import SimilarityReasoningScorer
from itm_kernels.ops.options import REASONINGS, WORKSPACE_BYTES
from itm_kernels.ops.triplet_loss import triplet_loss

__all__ = ["ContrastiveLoss", "EncoderSimilarity"]


class EncoderSimilarity(SimilarityReasoningScorer):
    """``EncoderSimilarity(embed_size, sim_dim, module_name="SAF", sgr_step=3)(img_emb, cap_emb, cap_lens) -> [I, C]``.

    Constructor, call, initialisation and state-dict keys are the published ones.

    Parameters
    ----------
    embed_size, sim_dim
        Joint width D and similarity width S.
    module_name
        ``"SAF"`` or ``"SGR"``.
    sgr_step
        Steps of SGR.
    """

    def __init__(self, embed_size: int, sim_dim: int, module_name: str = "SAF", sgr_step: int = 3) -> None:
        if module_name not in REASONINGS:
            raise ValueError(
                f"EncoderSimilarity: module_name must be one of {', '.join(REASONINGS)}, got {module_name!r}"
            )
        super().__init__(
            embed_size,
            sim_dim,
            reasoning=module_name,
            steps=sgr_step if module_name == "SGR" else 0,
            num_regions=36,
            dropout=0.4,
            workspace_bytes=WORKSPACE_BYTES,
            backend=None,
        )

    def forward(  # type: ignore[override]
        self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor
    ) -> Tensor:
        """Scores of images ``img_emb [I, R, D]`` and captions ``cap_emb [C, W, D]`` of lengths ``cap_lens [C]``."""
        return super().forward(img_emb, cap_emb, cap_lens)


class ContrastiveLoss(nn.Module):
    """``ContrastiveLoss(margin=0, max_violation=False)(scores)``: the hinge loss of a square score matrix."""

    def __init__(self, margin: float = 0, max_violation: bool = False) -> None:
        super().__init__()
        self.margin = margin
        self.max_violation = max_violation

    def forward(self, scores: Tensor) -> Tensor:
        """Loss of ``scores [B, B]``, matching pairs on the diagonal."""
        return triplet_loss(scores, margin=self.margin, hardest=self.max_violation)
