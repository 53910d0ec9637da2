"""Drop-in for the published RCAR similarity encoder and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from itm_kernels.compat.losses import required
from itm_kernels.nn.regulated import RegulatedScorer
from itm_kernels.ops.triplet_loss import triplet_loss

__all__ = ["ContrastiveLoss", "EncoderSimilarity"]

REGULATORS = {"only_rar": ("rar", "rar_step"), "only_rcr": ("rcr", "rcr_step"), "coop_rcar": ("rcar", "rcar_step")}
"""Published name of a regulator, ours, and the option that holds its steps."""


class EncoderSimilarity(RegulatedScorer):
    """``EncoderSimilarity(opt, embed_dim, sim_dim)(img_emb, cap_emb, cap_lens) -> sims [I, C]``.

    Constructor, call, initialisation and state-dict keys are the published ones.

    Parameters
    ----------
    opt
        ``self_regulator`` (``"only_rar"``, ``"only_rcr"``, ``"coop_rcar"``), ``attn_type`` (``"t2i"``, ``"i2t"``), the
        steps of that regulator (``rar_step``, ``rcr_step`` or ``rcar_step``), ``t2i_smooth`` or ``i2t_smooth``.
    embed_dim, sim_dim
        Joint width D and similarity width S.
    """

    def __init__(self, opt: Any, embed_dim: int, sim_dim: int) -> None:
        name, used_for = required(opt, "self_regulator", "EncoderSimilarity"), "EncoderSimilarity"
        if name not in REGULATORS:
            raise ValueError(f"opt.self_regulator must be one of {', '.join(REGULATORS)}, got {name!r}")
        direction = required(opt, "attn_type", used_for)
        if direction not in ("t2i", "i2t"):
            raise ValueError(f"opt.attn_type must be 't2i' or 'i2t', got {direction!r}")
        regulator, steps = REGULATORS[name]
        super().__init__(
            embed_dim,
            sim_dim,
            direction=direction,
            regulator=regulator,
            steps=required(opt, steps, f"{used_for} with {name}"),
            temperature=required(opt, f"{direction}_smooth", f"{used_for} with {direction}"),
        )

    def forward(  # type: ignore[override]
        self, img_emb: Tensor, cap_emb: Tensor, cap_lens: Sequence[int] | Tensor
    ) -> Tensor:
        """Scores of images ``img_emb [I, R, D]`` and captions ``cap_emb [C, W, D]`` of lengths ``cap_lens [C]``."""
        return super().forward(img_emb, cap_emb, cap_lens)


class ContrastiveLoss(nn.Module):
    """``ContrastiveLoss(opt, margin=0, max_violation=False)(sims)``: the hinge loss of a square score matrix.

    ``max_violation_on()`` and ``max_violation_off()`` switch between hardest negatives and the sum over all, as the
    published warm-up does.
    """

    def __init__(self, opt: Any, margin: float = 0, max_violation: bool = False) -> None:
        super().__init__()
        self.opt = opt
        self.margin = margin
        self.max_violation = max_violation

    def max_violation_on(self) -> None:
        """Hardest negatives alone."""
        self.max_violation = True

    def max_violation_off(self) -> None:
        """The sum over all negatives."""
        self.max_violation = False

    def forward(self, sims: Tensor) -> Tensor:
        """Loss of scores ``sims [B, B]``, matching pairs on the diagonal."""
        return triplet_loss(sims, margin=self.margin, hardest=self.max_violation)
