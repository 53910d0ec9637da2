"""``cross_attention`` for many pairs at a time, padded, in plain PyTorch.

The pairs of a block are gathered, attended to in batched products, and differentiated by autograd; the backward makes
a block again. Nothing of the Gram form here: the attended vectors are what is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from itm_kernels.eager.attention_weights import attention_weights
from itm_kernels.eager.chosen_pairs import PairBlock, pair_blocks, put, valid_regions, valid_words
from itm_kernels.eager.norms import product
from itm_kernels.ops.attention_options import AttentionOptions
from itm_kernels.ops.pairs import score_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    pairs: Tensor,  # [P, 2]
    gate: Tensor | None,  # [P, Q, D]
    temperature: Tensor | None,  # [P, Q]
    options: AttentionOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [P, Q, K], [P, Q, D]
    """Weights and attended vectors, block by block."""
    queries, keys = (words, regions) if options.t2i else (regions, words)
    wide = score_dtype(regions.dtype)
    weights = regions.new_empty(pairs.shape[0], queries.shape[1], keys.shape[1], dtype=wide)
    attended = regions.new_empty(pairs.shape[0], queries.shape[1], regions.shape[2], dtype=wide)
    for block in _blocks(regions, words, word_counts, region_counts, pairs, workspace_bytes):
        leaves = _leaves(block, regions, words, gate, temperature)
        for outputs, of_block in zip((weights, attended), _attend(block, leaves, options, regions.dtype), strict=True):
            outputs[block.rows] = torch.where(block.named[:, None, None], of_block, torch.nan)
    return weights, attended


def backward(
    grad_weights: Tensor,  # [P, Q, K]
    grad_attended: Tensor,  # [P, Q, D]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    options: AttentionOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor | None, ...]:  # of regions, words, gate, temperature
    """Gradients, block by block; float32 accumulators for half-precision inputs."""
    wide = score_dtype(regions.dtype)
    given = [t for t in (regions, words, gate, temperature) if t is not None]
    totals = [torch.zeros(t.shape, dtype=wide, device=t.device) for t in given]
    for block in _blocks(regions, words, word_counts, region_counts, pairs, workspace_bytes):
        with torch.enable_grad():
            leaves = _leaves(block, regions, words, gate, temperature)
            asked = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
            outputs = _attend(block, leaves, options, regions.dtype)
        named = block.named[:, None, None]
        upstream = [torch.where(named, grad[block.rows].to(wide), 0.0) for grad in (grad_weights, grad_attended)]
        grads = torch.autograd.grad(outputs, asked, upstream, materialize_grads=True)
        places: list[Tensor | slice] = [block.images, block.captions, block.rows, block.rows]
        for total, place, grad in zip(totals, places, grads, strict=False):
            put(total, place, grad)
    made = iter([total.to(t.dtype) for total, t in zip(totals, given, strict=True)])
    return tuple(None if t is None else next(made) for t in (regions, words, gate, temperature))


def _blocks(
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    workspace_bytes: int,
) -> Iterator[PairBlock]:
    """So many pairs at a time that what autograd keeps of them fits the workspace."""
    most, longest, width = regions.shape[1], words.shape[1], regions.shape[2]
    # Both sides as they are, masked, gated and narrowed, their gradients, what the softmax keeps: counted, then seen.
    elements = 9 * (most + longest) * width + 14 * most * longest
    return pair_blocks(
        pairs,
        valid_regions(regions, region_counts),
        valid_words(words, word_counts),
        elements * score_dtype(regions.dtype).itemsize,
        workspace_bytes,
    )


def _leaves(
    block: PairBlock, regions: Tensor, words: Tensor, gate: Tensor | None, temperature: Tensor | None
) -> list[Tensor | None]:
    """What the attention of a block depends on, wide: regions, words, gate, temperature, each pair its own copy."""
    wide = score_dtype(regions.dtype)
    of_pairs = [None if t is None else t[block.rows].detach().to(wide, copy=True) for t in (gate, temperature)]
    return [regions[block.images].to(wide), words[block.captions].to(wide), *of_pairs]


def _attend(
    block: PairBlock, leaves: list[Tensor | None], options: AttentionOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # [b, Q, K], [b, Q, D]
    regions, words, gate, temperature = leaves
    assert regions is not None
    assert words is not None
    sides = [
        (torch.where(valid[..., None], vectors, 0.0), valid)
        for vectors, valid in ((words, block.word_valid), (regions, block.region_valid))
    ]
    (queries, query_valid), (keys, key_valid) = sides if options.t2i else sides[::-1]
    if gate is not None:
        queries = queries * torch.where(query_valid[..., None], gate, 1.0)
    products = product(keys, queries.transpose(1, 2), dtype)  # [b, K, Q]
    query_mask, of_queries = query_valid[:, None], None if temperature is None else temperature[:, None]
    weights = attention_weights(products, query_mask, key_valid[..., None], of_queries, options)
    weights = torch.where(query_mask, weights, 0.0).transpose(1, 2)
    return weights, product(weights, keys, dtype)
