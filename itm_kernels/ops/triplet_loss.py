"""Hinge loss over all pairs of a batch, summed or with the hardest negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OP = "triplet_loss"


def triplet_loss(
    scores: Tensor,  # [B, B]
    *,
    margin: float = 0.2,
    hardest: bool = True,
    image_groups: Tensor | None = None,  # [B]
    caption_groups: Tensor | None = None,  # [B]
) -> Tensor:
    r"""Triplet hinge loss of a batch whose matching pairs stand on the diagonal.

    .. math::

        \ell^c_{ij} = [m + s_{ij} - s_{ii}]_+, \quad \ell^i_{ij} = [m + s_{ij} - s_{jj}]_+, \quad i \ne j

    summed over all pairs, or (``hardest``) :math:`\sum_i \max_j \ell^c_{ij} + \sum_j \max_i \ell^i_{ij}`. A sum and
    never a mean, as published: gradients grow with the batch.

    Parameters
    ----------
    scores
        ``[B, B]`` images x captions, floating.
    margin
        Hinge margin m.
    hardest
        Only the hardest negative of each image and of each caption (VSE++); otherwise all.
    image_groups, caption_groups
        ``[B]`` integers, both or neither: what an image or caption shows. Off the diagonal, equal groups are false
        negatives (the same image drawn twice with two captions) and left out.

    Returns
    -------
    Tensor
        Scalar in the dtype of ``scores``. Made of torch ops, it runs on every device and differentiates at will.

    Raises
    ------
    TypeError, ValueError
        Scores that are not square or floating, groups that do not fit.

    Notes
    -----
    Faghri et al., "VSE++", BMVC 2018, and the published SCAN code; masking by groups is ours.
    """
    check_square(OP, scores)
    if not math.isfinite(margin):
        raise ValueError(f"{OP}: margin must be a finite number, got {margin}")
    masked = false_negatives(OP, scores, image_groups, caption_groups)
    masked = masked | torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    positive = scores.diagonal()
    of_captions = (margin + scores - positive[:, None]).clamp(min=0).masked_fill(masked, 0)
    of_images = (margin + scores - positive[None, :]).clamp(min=0).masked_fill(masked, 0)
    if hardest and scores.shape[0]:
        return of_captions.max(dim=1).values.sum() + of_images.max(dim=0).values.sum()
    return of_captions.sum() + of_images.sum()


def check_square(op: str, scores: Tensor) -> None:
    """Raise unless ``scores`` is a floating ``[B, B]`` tensor."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"{op}: scores must be a floating tensor, got {found}")
    if scores.dim() != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"{op}: scores must be [B, B], matching pairs on the diagonal, got {list(scores.shape)}")


def false_negatives(op: str, scores: Tensor, image_groups: Tensor | None, caption_groups: Tensor | None) -> Tensor:
    """``[B, B]`` bool: off the diagonal and of equal groups."""
    size = scores.shape[0]
    if image_groups is None and caption_groups is None:
        return torch.zeros(size, size, dtype=torch.bool, device=scores.device)
    if image_groups is None or caption_groups is None:
        raise ValueError(f"{op}: image_groups and caption_groups must be given both or neither")
    for name, groups in (("image_groups", image_groups), ("caption_groups", caption_groups)):
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
            found = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
            raise TypeError(f"{op}: {name} must be an integer tensor, got {found}")
        if groups.shape != (size,):
            raise ValueError(f"{op}: {name} must be [B] with B = {size}, got {list(groups.shape)}")
        if groups.device != scores.device:
            raise ValueError(f"{op}: {name} must be on {scores.device} as scores, got {groups.device}")
    same = image_groups[:, None] == caption_groups[None, :]
    return same & ~torch.eye(size, dtype=torch.bool, device=scores.device)
