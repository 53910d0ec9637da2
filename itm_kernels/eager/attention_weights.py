"""From products to attention weights, for many pairs at a time: what scores, attention and constraints share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.eager.norms import EPS, root
from itm_kernels.ops.attention_options import AttentionOptions


def attention_weights(
    products: Tensor,  # [b, K, ..., Q]
    query_valid: Tensor,  # [b or 1, 1, ..., Q] bool
    key_valid: Tensor,  # [b, K, ..., 1] bool
    temperature: Tensor | None,  # as query_valid
    options: AttentionOptions,
) -> Tensor:  # [b, K, ..., Q]
    """Weights of pairs over their keys; columns of what is no query hold anything finite."""
    normalised = feature_norm(products, query_valid, options.raw_feature_norm)
    return of_normalised(normalised, query_valid, key_valid, temperature, options)


def of_normalised(
    normalised: Tensor,  # [b, K, ..., Q]
    query_valid: Tensor,
    key_valid: Tensor,
    temperature: Tensor | None,
    options: AttentionOptions,
) -> Tensor:  # [b, K, ..., Q]
    """Temperature, softmax over the keys, focal step."""
    if temperature is None:
        logits = options.lambda_softmax * normalised
    else:
        logits = torch.where(query_valid, temperature, 1.0) * normalised
    weights = torch.softmax(logits.masked_fill(~key_valid, -torch.inf), dim=1)
    if options.focal != "none":
        weights = focal(weights, key_valid.sum(1, keepdim=True), options.focal)
    return weights


def feature_norm(products: Tensor, query_valid: Tensor, name: str) -> Tensor:  # over the last axis
    """``raw_feature_norm``: each key over the valid queries."""
    if name == "softmax":
        return torch.softmax(products.masked_fill(~query_valid, -torch.inf), dim=-1)
    x = F.leaky_relu(products, 0.1) if name.startswith("clipped") else products
    if not name.endswith(("l2norm", "l1norm")):
        return x
    counted = torch.where(query_valid, x, 0.0)
    if name.endswith("l2norm"):
        norm = root((counted * counted).sum(-1, keepdim=True))
    else:
        norm = counted.abs().sum(-1, keepdim=True)
    return torch.where(norm > 0, x / (norm + EPS), 0.0)


def focal(weights: Tensor, keys: Tensor, name: str) -> Tensor:  # [A, K, ...]; keys: how many are valid
    """BFAN: drop the weakly attended keys, renormalise."""
    if name == "equal":
        kept = keys * weights - weights.sum(1, keepdim=True) > 0
    else:
        share = weights.detach().sqrt()
        kept = weights * share.sum(1, keepdim=True) - (weights * share).sum(1, keepdim=True) > 0
    kept = kept | ~kept.any(1, keepdim=True)
    weights = torch.where(kept, weights, 0.0)
    return weights / weights.sum(1, keepdim=True)
