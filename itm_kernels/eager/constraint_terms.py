"""The terms of CCR and CCS from inner products alone, for many pairs at a time.

No attended vector is formed. With the weights w of a query over n keys, u = 1 - w, products s = K q and s~ = K q~, and
the Gram matrix G = K K^T of the keys:

    q . a = w . s        q . a^ = u . s / (n - 1)        q~ . a = w . s~
    |a|^2 = w^T G w      |a^|^2 = u^T G u / (n - 1)^2

The keys are an image's or a caption's, b of them; the axes behind are of whatever attends to them: the queries of one
partner each, or of several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.eager.attention_weights import attention_weights, of_normalised
from itm_kernels.eager.norms import EPS, root
from itm_kernels.ops.constraint_options import ConstraintOptions

CPU_BLOCK_BYTES = 32 * 2**20
"""Larger blocks are slower on a CPU: they work in memory that no block before them has touched."""


class Products(NamedTuple):
    """What the terms depend on."""

    plain: Tensor  # [b, K, ..., Q]
    gated: Tensor  # [b, K, ..., Q]; the plain ones where there is no gate
    swapped: Tensor | None  # [b, K, ..., Q]: column q is of the fragment swapped for query q
    gram: Tensor  # [b, K, K]
    norms: Tensor  # [b or 1, ..., Q]
    swapped_norms: Tensor | None  # [b, ..., Q]


def terms_of_products(
    products: Products,
    query_valid: Tensor,  # [b or 1, 1, ..., Q] bool
    key_valid: Tensor,  # [b, K, ..., 1] bool
    temperature: Tensor | None,  # as query_valid
    options: ConstraintOptions,
) -> tuple[Tensor, Tensor | None]:  # [b, ..., Q] each
    """Both terms of every query, valid or not. Differentiable by autograd."""
    plain, gated, swapped, gram, norms, swapped_norms = products
    weights = attention_weights(gated, query_valid, key_valid, temperature, options)
    length = _length(weights, gram)
    own = _cosine((weights * plain).sum(1), norms * length)
    ignored = torch.where(key_valid, 1 - weights, 0.0) / (key_valid.sum(1, keepdim=True) - 1).clamp(min=1)
    rest = _cosine((ignored * plain).sum(1), norms * _length(ignored, gram))
    ccr = torch.relu(options.ccr_margin - own + rest)
    if swapped is None or swapped_norms is None:
        return ccr, None
    if options.swap == "query":
        rival = _cosine((weights * swapped).sum(1), swapped_norms * length)
    else:
        normalised = _norm_with_swapped(gated, swapped, query_valid, options.raw_feature_norm)
        theirs = of_normalised(normalised, query_valid, key_valid, temperature, options)
        rival = _cosine((theirs * plain).sum(1), norms * _length(theirs, gram))
    return ccr, torch.relu(options.ccs_margin - own + rival)


def arrays_of(options: ConstraintOptions, queries: int, *, swaps: bool) -> int:
    """How many arrays of the size of the products the terms and their autograd keep: counted, then seen."""
    if not swaps or options.swap == "query":
        return 26
    return 50 + 4 * queries * (options.raw_feature_norm == "softmax")


def lengths_of(vectors: Tensor) -> Tensor:  # [..., D] -> [...]
    """Euclidean norms; the gradient at zero is zero."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def _length(weights: Tensor, gram: Tensor) -> Tensor:  # [b, K, ..., Q], [b, K, K] -> [b, ..., Q]
    return root((weights * (gram @ weights.flatten(2)).view(weights.shape)).sum(1))


def _cosine(dot: Tensor, norms: Tensor) -> Tensor:
    return dot / norms.clamp(min=EPS)


def _norm_with_swapped(products: Tensor, swapped: Tensor, query_valid: Tensor, name: str) -> Tensor:
    """``raw_feature_norm`` of the swapped products, each alone in the place of its query's among the others'."""
    itself = torch.eye(products.shape[-1], dtype=torch.bool, device=products.device)
    if name == "softmax":
        without = itself | ~query_valid[..., None, :]  # [b or 1, 1, ..., Q, Q]
        # Finite: of no other query at all, minus infinity would have no gradient.
        lowest = torch.finfo(products.dtype).min / 4
        others = torch.logsumexp(products[..., None, :].masked_fill(without, lowest), -1)
        return torch.sigmoid(swapped - others)
    if name.startswith("clipped"):
        products, swapped = F.leaky_relu(products, 0.1), F.leaky_relu(swapped, 0.1)
    if not name.endswith(("l2norm", "l1norm")):
        return swapped
    # Sums over the others, and not a total less one's own: that would cancel.
    counted, others = torch.where(query_valid, products, 0.0), (~itself).to(products.dtype)
    if name.endswith("l2norm"):
        norm = root((counted * counted) @ others + swapped * swapped)
    else:
        norm = counted.abs() @ others + swapped.abs()
    return torch.where(norm > 0, swapped / (norm + EPS), 0.0)
