"""``cross_attention_scores`` by the Gram form, in blocks, in plain PyTorch.

A cosine with the attended vector ``c_q = sum_k a_kq k`` needs no ``c_q``:

    q . c_q = sum_k a_kq s_kq            |c_q|^2 = a_q^T G a_q,   G = K K^T

so a block of scores is one library product ``S`` and an epilogue of size ``[I, R, C, W]``. The epilogue
(:func:`scores_of_products`) is differentiable; the backward makes ``S`` again, differentiates the epilogue by autograd
and applies the chain rule of the products by hand: ``dV = dS T``, ``dT = dS^T V``, ``(dG + dG^T) K``.

Captions are taken in order of length, so that a block is padded to its own longest caption and not to the batch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.attention_weights import feature_norm, focal
from itm_kernels.eager.blocks import Batch, Side
from itm_kernels.eager.norms import EPS, root
from itm_kernels.ops.options import ScoreOptions
from itm_kernels.ops.pairs import score_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


class Leaves(NamedTuple):
    """What the scores of a block depend on, and in the same order their gradients."""

    products: Tensor  # [I, R, C, W]
    region_gram: Tensor | None  # [I, R, R]; t2i
    word_gram: Tensor | None  # [C, W, W]; i2t
    region_norms: Tensor  # [I, R]
    word_norms: Tensor  # [C, W]


def scores_of_products(
    leaves: Leaves,
    region_valid: Tensor,  # [I, R] bool
    word_valid: Tensor,  # [C, W] bool
    options: ScoreOptions,
) -> Tensor:  # [I, C]
    """Everything of a score that comes after the inner products. Differentiable by autograd, compiles."""
    products, region_gram, word_gram, region_norms, word_norms = leaves
    scores = torch.zeros((), dtype=products.dtype, device=products.device)
    if region_gram is not None:
        scores = scores + _attend(products, region_gram, word_norms, region_valid, word_valid, options)
    if word_gram is not None:
        turned = products.permute(2, 3, 0, 1)
        scores = scores + _attend(turned, word_gram, region_norms, word_valid, region_valid, options).t()
    return scores


def _attend(
    products: Tensor,  # [A, K, B, Q]: keys of A groups, queries of B groups
    gram: Tensor,  # [A, K, K]
    query_norms: Tensor,  # [B, Q]
    key_valid: Tensor,  # [A, K]
    query_valid: Tensor,  # [B, Q]
    options: ScoreOptions,
) -> Tensor:  # [A, B]
    groups, keys, partners, queries = products.shape
    key_mask = key_valid[:, :, None, None]
    logits = options.lambda_softmax * feature_norm(products, query_valid, options.raw_feature_norm)
    weights = torch.softmax(logits.masked_fill(~key_mask, -torch.inf), dim=1)
    if options.focal != "none":
        weights = focal(weights, key_valid.sum(1)[:, None, None, None], options.focal)
    dot = (weights * products).sum(1)  # [A, B, Q]
    image = (gram @ weights.flatten(2)).view(groups, keys, partners, queries)
    quadratic = (weights * image).sum(1)
    cosine = dot / (query_norms * root(quadratic)).clamp(min=EPS)
    scores = _aggregate(cosine, query_valid, options)
    if options.peak_weight:
        scores = scores + options.peak_weight * _aggregate(weights.max(dim=1).values, query_valid, options)
    return scores


def _aggregate(x: Tensor, valid: Tensor, options: ScoreOptions) -> Tensor:  # [A, B, Q] -> [A, B]
    if options.agg_func == "LogSumExp":
        return torch.logsumexp((options.lambda_lse * x).masked_fill(~valid, -torch.inf), -1) / options.lambda_lse
    if options.agg_func == "Max":
        return x.masked_fill(~valid, -torch.inf).max(-1).values
    total = torch.where(valid, x, 0.0).sum(-1)
    return total if options.agg_func == "Sum" else total / valid.sum(-1)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: ScoreOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C]
    """Scores, block by block."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    scores = regions.new_empty(batch.images, batch.captions, dtype=score_dtype(regions.dtype))
    for rows, longest in batch.caption_blocks(workspace_bytes):
        captions = batch.captions_of(rows, longest)
        for start, stop in batch.image_blocks(rows, longest, _arrays(options), workspace_bytes):
            images = batch.images_of(start, stop)
            leaves = _leaves(images, captions, options)
            scores[start:stop, rows] = scores_of_products(leaves, images.valid, captions.valid, options)
    return scores


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    options: ScoreOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:
    """Gradients, block by block; float32 accumulators for half-precision inputs."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide = score_dtype(regions.dtype)
    grad_regions = torch.zeros(regions.shape, dtype=wide, device=regions.device)
    grad_words = torch.zeros(words.shape, dtype=wide, device=words.device)
    for rows, longest in batch.caption_blocks(workspace_bytes):
        captions = batch.captions_of(rows, longest)
        of_captions = torch.zeros(captions.vectors.shape, dtype=wide, device=words.device)
        for start, stop in batch.image_blocks(rows, longest, _arrays(options), workspace_bytes):
            images = batch.images_of(start, stop)
            grads = _differentiate(images, captions, options, grad_scores[start:stop, rows].to(wide))
            inner = grads.products.flatten(0, 1).flatten(1).to(regions.dtype)  # [I R, C W]
            of_images = (inner @ captions.flat()).view(images.vectors.shape).to(wide)
            of_captions += (inner.t() @ images.flat()).view(captions.vectors.shape)
            of_images += _through_gram_and_norms(images, grads.region_gram, grads.region_norms)
            of_captions += _through_gram_and_norms(captions, grads.word_gram, grads.word_norms)
            grad_regions[start:stop] += torch.where(images.valid[..., None], of_images, 0.0)
        batch.put_captions(grad_words, rows, captions.valid, of_captions)
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _differentiate(images: Side, captions: Side, options: ScoreOptions, grad_scores: Tensor) -> Leaves:
    """Gradients of the epilogue of a block; zero where a direction does not use a norm."""
    with torch.enable_grad():
        leaves = _leaves(images, captions, options)
        given = {name: t.requires_grad_() for name, t in leaves._asdict().items() if t is not None}
        scores = scores_of_products(leaves, images.valid, captions.valid, options)
    grads = torch.autograd.grad(scores, list(given.values()), grad_scores, materialize_grads=True)
    return leaves._replace(**dict(zip(given, grads, strict=True)))


def _leaves(images: Side, captions: Side, options: ScoreOptions) -> Leaves:
    products = images.flat() @ captions.flat().t()
    return Leaves(
        products.to(score_dtype(products.dtype)).view(*images.valid.shape, *captions.valid.shape),
        images.gram() if options.t2i else None,
        captions.gram() if options.i2t else None,
        images.norms(),
        captions.norms(),
    )


def _through_gram_and_norms(side: Side, grad_gram: Tensor | None, grad_norms: Tensor) -> Tensor:  # [G, K, D]
    wide = side.vectors.to(score_dtype(side.vectors.dtype))
    norms = side.norms()
    grad = torch.where(norms > 0, grad_norms / norms, 0.0)[..., None] * wide
    return grad if grad_gram is None else grad + (grad_gram + grad_gram.transpose(1, 2)) @ wide


def _arrays(options: ScoreOptions) -> int:
    """The epilogue and its autograd keep about ten arrays of [R, W] a pair in one direction."""
    return 10 * (int(options.t2i) + int(options.i2t))
