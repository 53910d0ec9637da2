"""Definition of ``cross_attention_scores``: the published loop over captions, with the attended vectors formed.

For one caption of n words and all images, with queries q, keys k (t2i: words attend to regions; i2t: the reverse):

    s_kq = k . q
    z    = raw_feature_norm of s, for each key over the queries                       axis of the queries
    a_kq = softmax over keys of lambda z_kq                                           axis of the keys
    a    = focal(a)                                                                   BFAN only
    c_q  = sum_k a_kq k
    x_q  = (q . c_q) / max(|q| |c_q|, eps)
    score = agg_q x_q + peak_weight agg_q max_k a_kq                                  PFAN: t2i, 0.5

eps = 1e-8 is added to norms (outside the root) and is the floor of the product of two norms.

Sources: SCAN (ECCV 2018), BFAN (ACM MM 2019) and PFAN (IJCAI 2019) with their published code. Where that gives NaN or
stops, this definition goes on: a key whose products are all zero has a zero normalised row and no gradient through its
norm; one word, one region and one image are ordinary; where BFAN's strict comparison keeps no key, all are kept. A
maximum (``agg_func="Max"``, the peak) sends its gradient to the first arg-max. On the floor of the cosine no gradient
flows into the norms.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.ops.pairs import score_dtype

EPS = 1e-8


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: ScoreOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> Tensor:  # [I, C]
    """Scores by the literal formula. Differentiable by autograd."""
    dtype = score_dtype(regions.dtype)
    regions, words = regions.to(dtype), words.to(dtype)
    columns = []
    counts = _on_host(word_counts, words.shape[1] if words.dim() == 3 else None)
    starts = list(accumulate(counts, initial=0))
    for c, n in enumerate(counts):
        caption = words[c, :n] if words.dim() == 3 else words[starts[c] : starts[c] + n]  # [n, D]
        columns.append(_scores_of_caption(regions, caption, region_counts, options))
    return torch.stack(columns, dim=1)


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    options: ScoreOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(scores * grad_scores)`` by autograd of the literal formula."""
    with torch.enable_grad():
        regions, words = (t.detach().contiguous().requires_grad_() for t in (regions, words))
        scores = forward(regions, words, word_counts, region_counts, options)
        grad_regions, grad_words = torch.autograd.grad(scores, (regions, words), grad_scores.to(scores.dtype))
    return grad_regions, grad_words


def _on_host(counts: Tensor, most: int | None) -> list[int]:
    # The one place that may wait for a device: the definition is not a kernel.
    values: list[int] = counts.tolist()
    return values if counts.device.type == "cpu" or most is None else [min(max(n, 1), most) for n in values]


def _scores_of_caption(
    regions: Tensor,  # [I, R, D]
    caption: Tensor,  # [n, D]
    region_counts: Tensor | None,
    options: ScoreOptions,
) -> Tensor:  # [I]
    if region_counts is None:
        return _scores_of_images(regions, caption, options)
    # Images with as many regions are scored together, each group cut to what is valid.
    counts = _on_host(region_counts, regions.shape[1])
    order, parts = [], []
    for count in sorted(set(counts)):
        rows = [i for i, value in enumerate(counts) if value == count]
        order += rows
        parts.append(_scores_of_images(regions[rows, :count], caption, options))
    return torch.cat(parts)[torch.tensor(order, device=regions.device).argsort()]


def _scores_of_images(regions: Tensor, caption: Tensor, options: ScoreOptions) -> Tensor:  # [I, R, D], [n, D] -> [I]
    captions = caption.expand(regions.shape[0], -1, -1)  # [I, n, D]
    scores = torch.zeros((), dtype=regions.dtype, device=regions.device)
    if options.t2i:
        scores = scores + attend(queries=captions, keys=regions, options=options)
    if options.i2t:
        scores = scores + attend(queries=regions, keys=captions, options=options)
    return scores


def attend(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:  # [B, Q, D], [B, K, D] -> [B]
    """Scores of B pairs in one direction."""
    weights = attention_weights(queries, keys, options)  # [B, K, Q]
    attended = weights.transpose(1, 2) @ keys  # [B, Q, D]
    dot = (queries * attended).sum(-1)
    cosine = dot / (_norm(queries) * _norm(attended)).clamp(min=EPS)
    scores = aggregate(cosine, options)
    if options.peak_weight:
        scores = scores + options.peak_weight * aggregate(weights.max(dim=1).values, options)
    return scores


def attention_weights(queries: Tensor, keys: Tensor, options: ScoreOptions) -> Tensor:  # -> [B, K, Q]
    """Attention over the keys, one distribution for each query."""
    products = keys @ queries.transpose(1, 2)  # [B, K, Q]
    weights = torch.softmax(options.lambda_softmax * feature_norm(products, options.raw_feature_norm), dim=1)
    return weights if options.focal == "none" else focal(weights, options.focal)


def feature_norm(products: Tensor, name: str) -> Tensor:  # [B, K, Q] -> [B, K, Q]
    """``raw_feature_norm``: each key over the queries."""
    if name == "softmax":
        return torch.softmax(products, dim=2)
    x = F.leaky_relu(products, 0.1) if name.startswith("clipped") else products
    if name.endswith("l2norm"):
        norm = _norm(x).unsqueeze(2)
    elif name.endswith("l1norm"):
        norm = x.abs().sum(2, keepdim=True)
    else:
        return x
    return torch.where(norm > 0, x / (norm + EPS), 0.0)


def focal(weights: Tensor, name: str) -> Tensor:  # [B, K, Q] -> [B, K, Q]
    """BFAN: keep what lies above the mean (``equal``) or the weighted mean (``prob``), renormalise."""
    if name == "equal":
        kept = weights.shape[1] * weights - weights.sum(1, keepdim=True) > 0
    else:
        share = weights.sqrt()
        kept = weights * share.sum(1, keepdim=True) - (weights * share).sum(1, keepdim=True) > 0
    kept = (kept | ~kept.any(1, keepdim=True)).to(weights.dtype)  # a constant for autograd, as published
    return weights * kept / (weights * kept).sum(1, keepdim=True)


def aggregate(x: Tensor, options: ScoreOptions) -> Tensor:  # [B, Q] -> [B]
    """``agg_func`` over the queries."""
    if options.agg_func == "LogSumExp":
        return torch.logsumexp(options.lambda_lse * x, dim=1) / options.lambda_lse
    if options.agg_func == "Max":
        return x.max(dim=1).values
    return x.sum(1) if options.agg_func == "Sum" else x.mean(1)


def _norm(x: Tensor) -> Tensor:  # [..., D] -> [...]
    """Euclidean norm with gradient zero at zero."""
    square = (x * x).sum(-1)
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
