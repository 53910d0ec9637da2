"""Where BFAN's keep-or-drop step is too close to call: pairs that rounding may decide either way."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from helpers import Batch
from itm_kernels.reference.cross_attention_scores import feature_norm


def excesses(weights: Tensor, focal: str) -> Tensor:  # [B, K, Q] -> [B, K, Q]
    """How far each weight lies above what it is compared with, relative to that; kept where positive."""
    if focal == "equal":
        return weights / weights.mean(1, keepdim=True) - 1
    share = weights.sqrt()
    return weights * share.sum(1, keepdim=True) / (weights * share).sum(1, keepdim=True) - 1


def undecided(batch: Batch, options: dict[str, Any], tolerance: float, rounding: torch.dtype | None = None) -> Tensor:
    """Pairs ``[I, C]`` (bool) where a key lies within ``tolerance`` of the threshold, or where rounding the inner
    products to ``rounding`` changes what is kept. Keys on the threshold exactly (all weights equal) are decided."""
    focal = options.get("focal")
    regions, words = batch.regions.double(), batch.words.double()
    close = torch.zeros(regions.shape[0], words.shape[0], dtype=torch.bool)
    if focal is None:
        return close
    direction = options.get("direction", "t2i")
    norm, sharpness = options.get("raw_feature_norm", "clipped_l2norm"), options.get("lambda_softmax", 9.0)

    def margins(products: Tensor) -> Tensor:  # [B, K, Q]
        return excesses(torch.softmax(sharpness * feature_norm(products, norm), dim=1), focal)

    def is_close(products: Tensor) -> Tensor:  # [B, K, Q] -> [B]
        exact = margins(products)
        found = (exact.abs() < tolerance) & (exact.abs() > 1e-14)
        if rounding is not None:
            rounded = margins(products.to(rounding).double())
            found |= ((rounded > 0) != (exact > 0)) | (rounded.abs() < tolerance)
        return found.flatten(1).any(1)

    # Images of one region count together.
    counts = torch.tensor(batch.region_counts or [regions.shape[1]] * regions.shape[0])
    for rows in counts.unique().tolist():
        images = counts == rows
        for c, n in enumerate(batch.word_counts):
            products = regions[images, :rows] @ words[c, :n].t()  # [B, r, w]
            if direction in ("t2i", "both"):
                close[images, c] |= is_close(products)
            if direction in ("i2t", "both"):
                close[images, c] |= is_close(products.transpose(1, 2))
    return close


def without(batch: Batch, pairs: Tensor) -> Batch:  # pairs [I, C] bool
    """The batch with no upstream gradient for some pairs, so that they are left out of every gradient."""
    return dataclasses.replace(batch, grad_scores=batch.grad_scores.masked_fill(pairs, 0.0))


def decided(batch: Batch, options: dict[str, Any], tolerance: float = 1e-5) -> tuple[Batch, Tensor]:
    """For float32: the batch without gradients of undecided pairs, and those pairs (a tenth of all at the most)."""
    pairs = undecided(batch, options, tolerance)
    assert pairs.sum() <= max(0.1 * pairs.numel(), 1) or options.get("raw_feature_norm") == "softmax"
    return without(batch, pairs), pairs
