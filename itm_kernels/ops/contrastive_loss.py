"""InfoNCE over all pairs of a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.triplet_loss import check_square, false_negatives

OP = "contrastive_loss"


def contrastive_loss(
    scores: Tensor,  # [B, B]
    *,
    temperature: float,
    image_groups: Tensor | None = None,  # [B]
    caption_groups: Tensor | None = None,  # [B]
) -> Tensor:
    r"""Symmetric InfoNCE loss of a batch whose matching pairs stand on the diagonal.

    .. math::

        \tfrac12 \operatorname{mean}_i\bigl[-\log \operatorname{softmax}_j(s_{ij} / \tau)_{i}\bigr] +
        \tfrac12 \operatorname{mean}_j\bigl[-\log \operatorname{softmax}_i(s_{ij} / \tau)_{j}\bigr]

    Parameters
    ----------
    scores
        ``[B, B]`` images x captions, floating.
    temperature
        :math:`\tau > 0`, divides the scores.
    image_groups, caption_groups
        ``[B]`` integers, both or neither: off the diagonal, equal groups are false negatives and left out of the sums.

    Returns
    -------
    Tensor
        Scalar in the dtype of ``scores``; 0 for an empty batch. Made of torch ops.

    Raises
    ------
    TypeError, ValueError
        Scores that are not square or floating, groups that do not fit, a temperature that is not positive.

    Notes
    -----
    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018, in both directions as in
    Radford et al., "CLIP", ICML 2021.
    """
    check_square(OP, scores)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{OP}: temperature must be a positive number, got {temperature}")
    masked = false_negatives(OP, scores, image_groups, caption_groups)
    if not scores.shape[0]:
        return scores.sum()
    logits = (scores / temperature).masked_fill(masked, -torch.inf)
    target = torch.arange(scores.shape[0], device=scores.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target))
