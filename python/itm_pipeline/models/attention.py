"""Attention weights of one pair by the plain formula, for pictures.

The scores never form these weights one pair at a time; here one pair is all there is, and the formula is short:
`s = v . t`, the raw norm over the words for every region, then a softmax over the regions (Lee et al. 2018, eq. 2-3).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from itm_pipeline.config import ModelConfig, RawFeatureNorm
from itm_pipeline.models.encoders import EPS, l2norm


def normalise_raw(products: Tensor, norm: RawFeatureNorm, axis: int) -> Tensor:
    """SCAN's `raw_feature_norm` of the region-word products.

    Parameters
    ----------
    products
        Products of regions and words, any shape.
    norm
        Name of the normalisation. `clipped` variants pass through a LeakyReLU of slope 0.1 first.
    axis
        The axis of the queries: what attends.

    Returns
    -------
    Tensor
        Same shape.
    """
    if norm == "softmax":
        return products.softmax(axis)
    clipped = leaky_relu(products, 0.1) if norm.startswith("clipped") else products
    if norm.endswith("l2norm"):
        return l2norm(clipped.transpose(axis, -1)).transpose(axis, -1)
    if norm.endswith("l1norm"):
        return clipped / (clipped.abs().sum(axis, keepdim=True) + EPS)
    return clipped


def word_attention(
    regions: Tensor,  # [R, D] of one image
    words: Tensor,  # [W, D] of one caption, without padding
    config: ModelConfig,
) -> Tensor:  # [W, R], rows sum to 1
    """How much every word attends to every region of its image.

    `ValueError` for models that attend the other way only (i2t), which have no such weights, and for other scorers
    than cross attention, whose weights are not drawn yet.
    """
    if config.scorer != "cross_attention":
        raise ValueError(f"word_attention: the weights of the scorer {config.scorer!r} are not drawn yet")
    if config.direction == "i2t":
        raise ValueError(
            "word_attention: an i2t model attends from regions to words, it has no weights of words over regions"
        )
    products = words @ regions.T
    weights = (config.lambda_softmax * normalise_raw(products, config.raw_feature_norm, axis=0)).softmax(-1)
    if config.focal is None:
        return weights
    # BFAN keeps a region when it is above the mean ("equal") or above the mean weighted by sqrt(weight) ("prob").
    if config.focal == "equal":
        threshold = weights.mean(-1, keepdim=True)
    else:
        threshold = weights.pow(1.5).sum(-1, keepdim=True) / weights.sqrt().sum(-1, keepdim=True)
    kept = weights > threshold
    kept |= ~kept.any(-1, keepdim=True)  # exactly uniform weights: nothing is above the mean, so all stay
    focused = torch.where(kept, weights, 0.0)
    return focused / focused.sum(-1, keepdim=True)
