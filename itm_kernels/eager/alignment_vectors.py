"""Alignment vectors of a block of pairs, in plain PyTorch: ``l2norm(W (q - c)^2 + b)``.

A block has queries of some groups and keys of others; which are regions and which words is the direction's matter. The
norm of the attended vector comes from the Gram matrix of the keys, ``|sum_k a_k k|^2 = a^T G a``, so that the attended
vector itself is walked once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.eager.blocks import Batch, Side
from itm_kernels.eager.norms import l2norm, linear, over_norm, product, root
from itm_kernels.eager.stage_blocks import Place, accumulators, differentiate, places, zeros_of
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions


class Block(NamedTuple):
    """Queries of G groups against keys of H groups: H x G pairs."""

    queries: Side  # [G, Q, D]
    keys: Side  # [H, K, D]
    dtype: torch.dtype  # of the products


class Attention(NamedTuple):
    """Weights of a block, and the norm of what they attend to."""

    weights: Tensor  # [H, K, G, Q]
    norms: Tensor  # [H, G, Q], |sum_k a_k k|


def plain_products(block: Block) -> Tensor:  # [H, K, G, Q]
    """Inner products of every key and every query."""
    flat = product(block.keys.flat(), block.queries.flat().t(), block.dtype)
    products: Tensor = flat.view(*block.keys.valid.shape, *block.queries.valid.shape)
    return products


def attend(
    block: Block,
    products: Tensor,  # [H, K, G, Q]
    temperature: float | Tensor,  # or [H, G, Q]
) -> Attention:
    """Softmax over the keys of ``temperature`` times the clipped products, each key normalised over its queries."""
    clipped = F.leaky_relu(products, 0.1)
    counted = torch.where(block.queries.valid, clipped, 0.0)
    normalised = over_norm(clipped, root((counted * counted).sum(-1, keepdim=True)))
    by_key = temperature if isinstance(temperature, float) else temperature[:, None]
    logits = (by_key * normalised).masked_fill(~block.keys.valid[:, :, None, None], -torch.inf)
    weights = torch.softmax(logits, dim=1)
    image = (block.keys.gram() @ weights.flatten(2)).view(weights.shape)
    return Attention(weights, root((weights * image).sum(1)))


def align(
    block: Block,
    attention: Attention,
    weight: Tensor,  # [S, D]
    bias: Tensor,  # [S]
) -> Tensor:  # [H, G, Q, S]
    """Alignment vectors of every query of every pair."""
    return l2norm(linear(squared_difference(block, attention), weight, bias, block.dtype))


def squared_difference(block: Block, attention: Attention) -> Tensor:  # [H, G, Q, D]
    """``(q - c)^2`` with the attended vector at length 1."""
    scaled = over_norm(attention.weights, attention.norms[:, None])
    context = product(scaled.flatten(2).transpose(1, 2), block.keys.vectors, block.dtype)  # [H, G Q, D]
    difference = block.queries.flat() - context
    squares: Tensor = (difference * difference).unflatten(1, block.queries.valid.shape)
    return squares


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AlignmentParameters,  # of one step
    attention_scores: Tensor | None,  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    """Alignment vectors, block by block."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    weight, bias = (tensor[0].to(wide) for tensor in parameters)
    queries = words.shape[:-1] if options.t2i else (regions.shape[1], batch.captions)
    vectors = torch.zeros(batch.images, *queries, bias.shape[0], dtype=wide, device=regions.device)
    for place in places(batch, options.t2i, _query_bytes(batch, bias), workspace_bytes):
        of_pairs = place.products(attention_scores), place.queries(temperatures)
        sides = place.images.vectors, place.captions.vectors
        place.put_queries(vectors, _vectors_of_block(place, options, dtype, *sides, weight, bias, *of_pairs)[0])
    return vectors


def backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AlignmentParameters,
    attention_scores: Tensor | None,
    temperatures: Tensor | None,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients, block by block; wide accumulators."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    weight, bias = (tensor[0].to(wide) for tensor in parameters)
    of_regions, of_words, of_weight, of_bias = accumulators([regions, words, weight, bias])
    of_scores = None if attention_scores is None else zeros_of(attention_scores)
    of_temperatures = None if temperatures is None else zeros_of(temperatures)
    for place in places(batch, options.t2i, _query_bytes(batch, bias), workspace_bytes):
        of_pairs = place.products(attention_scores), place.queries(temperatures)
        inputs = [place.images.vectors, place.captions.vectors, weight, bias, *of_pairs]
        upstream = place.queries(grad)
        assert upstream is not None
        found = differentiate(partial(_vectors_of_block, place, options, dtype), inputs, [upstream])
        regions_here, words_here, weight_here, bias_here, scores_here, temperatures_here = found
        place.add_sides(of_regions, of_words, regions_here, words_here)
        of_weight += weight_here
        of_bias += bias_here
        if of_scores is not None:
            place.put_products(of_scores, scores_here)
        if of_temperatures is not None:
            place.put_queries(of_temperatures, temperatures_here)
    narrowed = AlignmentParameters(of_weight[None].to(parameters.weight.dtype), of_bias[None].to(parameters.bias.dtype))
    return of_regions.to(dtype), of_words.to(dtype), narrowed, of_scores, of_temperatures


def _vectors_of_block(
    place: Place,
    options: AlignmentOptions,
    dtype: torch.dtype,
    regions: Tensor,  # [i, R, D]
    words: Tensor,  # [c, w, D]
    weight: Tensor,
    bias: Tensor,
    products: Tensor | None,  # [H, K, G, Q]
    temperatures: Tensor | None,  # [H, G, Q]
) -> tuple[Tensor]:  # [H, G, Q, S]
    sides = Side(words, place.captions.valid), Side(regions, place.images.valid)
    block = Block(*sides, dtype) if options.t2i else Block(sides[1], sides[0], dtype)
    products = plain_products(block) if products is None else products
    attention = attend(block, products, options.temperature if temperatures is None else temperatures)
    return (torch.where(block.queries.valid[..., None], align(block, attention, weight, bias), 0.0),)


def _query_bytes(batch: Batch, bias: Tensor) -> int:
    """What autograd keeps for one query of one pair, and its gradients on their way."""
    keys = max(batch.regions.shape[1], *batch.lengths)
    elements: int = 24 * keys + 8 * batch.regions.shape[2] + 6 * bias.shape[0]
    return elements * bias.element_size()
