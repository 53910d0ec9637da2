"""``regulated_scores`` in blocks, in plain PyTorch: the stages of a block chained, its backward by recomputation.

Forward and backward run the same function of a block, :func:`scores_of_block`. The backward differentiates it by
autograd, so a block's stages are computed once more and everything that they kept dies with the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.aggregation_regulator import Dropout, Numbers, mean_alignment, pool
from itm_kernels.eager.alignment_vectors import Attention, Block, align, attend, plain_products
from itm_kernels.eager.blocks import Batch, Side, room_for_blocks
from itm_kernels.eager.correspondence_regulator import gated_products, regulate
from itm_kernels.eager.norms import EPS
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import RegulatedParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


class Leaves(NamedTuple):
    """What the scores of a block depend on, all wide; in the same order their gradients."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D]
    parameters: tuple[Tensor, ...]


def scores_of_block(
    images: Side,
    captions: Side,
    numbers: Numbers,  # [I, 1] and [1, C], global
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    dtype: torch.dtype,
) -> Tensor:  # [I, C]
    """Every stage of every pair of a block. Differentiable by autograd."""
    if options.t2i:
        block = Block(captions, images, dtype)
    else:
        block = Block(images, captions, dtype)
        numbers = Numbers(numbers.images.t(), numbers.captions.t())
    scores = _scores(block, numbers, parameters, options)
    return scores if options.t2i else scores.t()


def _scores(block: Block, numbers: Numbers, parameters: RegulatedParameters, options: RegulatedOptions) -> Tensor:
    """``[H, G]``: groups of keys by groups of queries."""
    products = plain = plain_products(block)
    gate: Tensor | None = None
    temperature: float | Tensor = options.temperature
    pooled: Tensor | None = None
    valid = block.queries.valid
    dropout = Dropout(options.dropout, options.seed, numbers) if options.dropout else None
    alignments: Tensor | None = None
    for step in range(options.alignments):
        assert parameters.alignment is not None
        weight, bias = (tensor[step] for tensor in parameters.alignment)
        alignments = align(block, attend(block, products, temperature), weight, bias)
        if step == 0:
            pooled = mean_alignment(alignments, valid)
        if step < options.corrections:
            assert parameters.correspondence is not None
            gate, temperature = regulate(alignments, gate, temperature, parameters.correspondence, step, block.dtype)
            products = gated_products(block, gate)
        if options.regulator == "rcar":
            assert parameters.aggregation is not None
            assert pooled is not None
            pooled = pool(alignments, pooled, valid, parameters.aggregation, step, dropout, block.dtype)
    if options.regulator == "rcr":
        return mean_cosine(block, attend(block, products, temperature), plain)
    assert alignments is not None
    assert pooled is not None
    assert parameters.score is not None
    if options.regulator == "rar":
        for step in range(options.steps):
            assert parameters.aggregation is not None
            pooled = pool(alignments, pooled, valid, parameters.aggregation, step, dropout, block.dtype)
    return torch.sigmoid(pooled @ parameters.score.weight + parameters.score.bias)


def mean_cosine(block: Block, attention: Attention, plain: Tensor) -> Tensor:  # [H, K, G, Q] -> [H, G]
    """Mean over the queries of the cosine with the attended vector at length 1, which is not formed."""
    norms = attention.norms
    positive = norms > 0
    of_unit = torch.where(positive, (attention.weights * plain).sum(1) / (norms + EPS), 0.0)
    length = torch.where(positive, norms / (norms + EPS), 0.0)
    lengths = block.queries.norms() * length
    valid = block.queries.valid
    cosine = torch.where(valid, of_unit / lengths.clamp(min=EPS), 0.0)
    return cosine.sum(-1) / valid.sum(-1)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C]
    """Scores, block by block."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide = score_dtype(regions.dtype)
    scores = regions.new_empty(batch.images, batch.captions, dtype=wide)
    parameters = _widened(parameters, wide)
    size, room = _Size.of(regions, parameters, options), room_for_blocks(workspace_bytes, parameters)
    for rows, longest in batch.caption_blocks(room, size.word_bytes(max(batch.lengths))):
        captions = batch.captions_of(rows, longest).to(wide)
        for start, stop in batch.images_at_once(rows.shape[0] * size.pair_bytes(longest), room):
            images = batch.images_of(start, stop).to(wide)
            numbers = _numbers(start, stop, rows, options)
            scores[start:stop, rows] = scores_of_block(images, captions, numbers, parameters, options, regions.dtype)
    return scores


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients, block by block; wide accumulators."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide = score_dtype(regions.dtype)
    grad_regions = torch.zeros(regions.shape, dtype=wide, device=regions.device)
    grad_words = torch.zeros(words.shape, dtype=wide, device=words.device)
    given = parameters.flat()
    grad_parameters = [None if p is None else torch.zeros(p.shape, dtype=wide, device=p.device) for p in given]
    parameters = _widened(parameters, wide)
    size, room = _Size.of(regions, parameters, options), room_for_blocks(workspace_bytes, parameters)
    for rows, longest in batch.caption_blocks(room, size.word_bytes(max(batch.lengths))):
        captions = batch.captions_of(rows, longest).to(wide)
        of_captions = torch.zeros_like(captions.vectors)
        for start, stop in batch.images_at_once(rows.shape[0] * size.pair_bytes(longest), room):
            images = batch.images_of(start, stop).to(wide)
            numbers = _numbers(start, stop, rows, options)
            grads = _differentiate(
                images, captions, numbers, parameters, options, regions.dtype, grad_scores[start:stop, rows].to(wide)
            )
            grad_regions[start:stop] += torch.where(images.valid[..., None], grads.regions, 0.0)
            of_captions += grads.words
            present = [grad for grad in grad_parameters if grad is not None]
            for total, grad in zip(present, grads.parameters, strict=True):
                total += grad
        batch.put_captions(grad_words, rows, captions.valid, of_captions)
    narrowed = [
        None if grad is None or parameter is None else grad.to(parameter.dtype)
        for grad, parameter in zip(grad_parameters, given, strict=True)
    ]
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype), RegulatedParameters.of(narrowed)


def _differentiate(
    images: Side,
    captions: Side,
    numbers: Numbers,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    dtype: torch.dtype,
    grad_scores: Tensor,  # [I, C]
) -> Leaves:
    with torch.enable_grad():
        leaf_images, leaf_captions = images.as_leaf(), captions.as_leaf()
        flat = [None if p is None else p.detach().requires_grad_() for p in parameters.flat()]
        scores = scores_of_block(leaf_images, leaf_captions, numbers, RegulatedParameters.of(flat), options, dtype)
    leaves = [leaf_images.vectors, leaf_captions.vectors, *(p for p in flat if p is not None)]
    of_regions, of_words, *of_parameters = torch.autograd.grad(scores, leaves, grad_scores, materialize_grads=True)
    return Leaves(of_regions, of_words, tuple(of_parameters))


def _numbers(start: int, stop: int, rows: Tensor, options: RegulatedOptions) -> Numbers:  # [I, 1], [1, C]
    images = torch.arange(start, stop, device=rows.device) + options.image_offset
    return Numbers(images[:, None], (rows + options.caption_offset)[None])


def _widened(parameters: RegulatedParameters, dtype: torch.dtype) -> RegulatedParameters:
    return RegulatedParameters.of([None if p is None else p.to(dtype) for p in parameters.flat()])


class _Size(NamedTuple):
    """How much a block takes, backward included: counted over what autograd keeps for one query of one pair."""

    query_bytes: int
    key_bytes: int  # more of a query for each key that it has
    regions: int
    t2i: bool

    @staticmethod
    def of(regions: Tensor, parameters: RegulatedParameters, options: RegulatedOptions) -> _Size:
        width, elements = regions.shape[2], 0
        if parameters.alignment is not None:
            narrow = parameters.alignment.weight.shape[1]
            elements += options.alignments * (4 * width + 6 * narrow) + options.aggregations * 8 * narrow
            elements += 4 * width  # gradients on their way
            if options.dropout:
                elements += 8 * narrow  # 64-bit counters
        if parameters.correspondence is not None:
            hidden = parameters.correspondence.hidden_weight.shape[1]
            elements += options.corrections * (6 * width + 3 * hidden)
        itemsize = score_dtype(regions.dtype).itemsize
        return _Size(elements * itemsize, 12 * (1 + options.alignments) * itemsize, regions.shape[1], options.t2i)

    def pair_bytes(self, longest: int) -> int:
        """Of an image against a caption of so many words."""
        queries, keys = (longest, self.regions) if self.t2i else (self.regions, longest)
        return queries * (self.query_bytes + keys * self.key_bytes)

    def word_bytes(self, longest: int) -> int:
        """Of a word in a block of captions, with the queries that it makes for a handful of images."""
        return max(4 * self.pair_bytes(longest) // longest, 1)
