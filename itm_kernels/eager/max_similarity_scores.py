"""``max_similarity_scores`` in blocks, in plain PyTorch.

A block of images x captions is one library product ``S``, a maximum over its keys and an aggregation over queries of
size 1/K of it. The gradient of a maximum is its arg-max: with ``dz`` the gradient of the maxima, ``dS`` is zero but for
``dS[arg_kq, q] = dz_q``, and ``dV = dS T``, ``dT = dS^T V`` are library products of that block.

The arg-max comes from the forward where it was kept, and then sums and means make no ``S`` in their backward. The block
of ``dS`` is K times larger than what stands in it; on a GPU the dense product still is the faster way for K up to about
100, and ``index_add`` sums in no fixed order there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from itm_kernels.eager.blocks import Batch, Side
from itm_kernels.layout import offsets_of
from itm_kernels.ops.options import SimilarityOptions
from itm_kernels.ops.pairs import score_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
    arg_max: Tensor | None = None,  # [groups, queries] uint8: written
) -> Tensor:  # [I, C]
    """Scores, block by block."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    kept = None if arg_max is None else _Kept(arg_max, regions, words, word_counts, options)
    scores = regions.new_empty(batch.images, batch.captions, dtype=score_dtype(regions.dtype))
    for block in _blocks(batch, workspace_bytes):
        best, key = _largest(_products(block, options), block.keys(options))
        found = aggregate(best, block.queries(options).valid, options)
        scores[block.start : block.stop, block.rows] = found if options.t2i else found.t()
        if kept is not None:
            kept.put(block, key)
    return scores


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
    arg_max: Tensor | None = None,  # [groups, queries] uint8: read
) -> tuple[Tensor, Tensor]:
    """Gradients, block by block; float32 accumulators for half-precision inputs."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    kept = None if arg_max is None else _Kept(arg_max, regions, words, word_counts, options)
    wide = score_dtype(regions.dtype)
    grad_regions = torch.zeros(regions.shape, dtype=wide, device=regions.device)
    grad_words = torch.zeros(words.shape, dtype=wide, device=words.device)
    of_captions: Tensor | None = None
    for block in _blocks(batch, workspace_bytes):
        if of_captions is None:
            of_captions = torch.zeros(block.captions.vectors.shape, dtype=wide, device=words.device)
        grad = grad_scores[block.start : block.stop, block.rows].to(wide)
        inner = _grad_products(block, options, grad if options.t2i else grad.t(), kept).to(regions.dtype)
        of_images = (inner @ block.captions.flat()).view(block.images.vectors.shape).to(wide)
        of_captions += (inner.t() @ block.images.flat()).view(of_captions.shape)
        grad_regions[block.start : block.stop] += torch.where(block.images.valid[..., None], of_images, 0.0)
        if block.stop == batch.images:
            batch.put_captions(grad_words, block.rows, block.captions.valid, of_captions)
            of_captions = None
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def aggregate(z: Tensor, valid: Tensor, options: SimilarityOptions) -> Tensor:  # [A, B, Q], [B, Q] -> [A, B]
    """``agg_func`` over the valid queries. Differentiable by autograd."""
    scaled = options.lambda_lse * z
    if options.agg_func == "LogSumExp":
        return torch.logsumexp(scaled.masked_fill(~valid, -torch.inf), -1) / options.lambda_lse
    if options.agg_func == "Softmax":
        return (torch.softmax(scaled.masked_fill(~valid, -torch.inf), -1) * z).sum(-1)
    if options.agg_func == "Max":
        return z.masked_fill(~valid, -torch.inf).max(-1).values
    total = torch.where(valid, z, 0.0).sum(-1)
    return total if options.agg_func == "Sum" else total / valid.sum(-1)


@dataclass
class _Block:
    """Images ``start`` to ``stop`` against the captions ``rows``; ``first`` counts the captions of earlier blocks."""

    start: int
    stop: int
    rows: Tensor
    numbers: list[int]
    images: Side
    captions: Side

    def keys(self, options: SimilarityOptions) -> Side:
        return self.images if options.t2i else self.captions

    def queries(self, options: SimilarityOptions) -> Side:
        return self.captions if options.t2i else self.images


# Products, their mask, dS and what is in passing: as many as scores by attention keep in one direction.
ARRAYS = 10


def _blocks(batch: Batch, workspace_bytes: int) -> Iterator[_Block]:
    """All blocks, captions the outer loop."""
    first = 0
    for rows, longest in batch.caption_blocks(workspace_bytes):
        captions = batch.captions_of(rows, longest)
        numbers = batch.order[first : first + rows.shape[0]]
        for start, stop in batch.image_blocks(rows, longest, ARRAYS, workspace_bytes):
            yield _Block(start, stop, rows, numbers, batch.images_of(start, stop), captions)
        first += rows.shape[0]


def _products(block: _Block, options: SimilarityOptions) -> Tensor:  # [A, K, B, Q]: keys of A groups, queries of B
    products = block.images.flat() @ block.captions.flat().t()
    products = products.to(score_dtype(products.dtype)).view(*block.images.valid.shape, *block.captions.valid.shape)
    return products if options.t2i else products.permute(2, 3, 0, 1)


def _largest(products: Tensor, keys: Side) -> tuple[Tensor, Tensor]:  # [A, K, B, Q] -> [A, B, Q] twice
    found = products.masked_fill(~keys.valid[:, :, None, None], -torch.inf).max(dim=1)
    return found.values, found.indices


def _grad_products(
    block: _Block, options: SimilarityOptions, grad_scores: Tensor, kept: _Kept | None
) -> Tensor:  # [I R, C W]
    keys, queries = block.keys(options), block.queries(options)
    if kept is None:
        best, key = _largest(_products(block, options), keys)
    else:
        key = kept.get(block)
        if options.linear:
            best = grad_scores.new_zeros(key.shape)  # any point will do
        else:
            best = _products(block, options).gather(1, key[:, None]).squeeze(1)
    with torch.enable_grad():
        best.requires_grad_()
        scores = aggregate(best, queries.valid, options)
    (grad,) = torch.autograd.grad(scores, best, grad_scores)
    # Padding has no gradient; where a query is padding, its key is any.
    grad = torch.where(queries.valid, grad, 0.0)
    shape = (*keys.valid.shape, *queries.valid.shape)
    inner = grad.new_zeros(shape).scatter_(1, key[:, None], grad[:, None])  # [A, K, B, Q]
    inner = inner if options.t2i else inner.permute(2, 3, 0, 1)
    return inner.flatten(2).flatten(0, 1)


class _Kept:
    """Where a block stands in the arg-max: the rows of regions or words are its columns, padding with them."""

    def __init__(
        self, arg_max: Tensor, regions: Tensor, words: Tensor, word_counts: Tensor, options: SimilarityOptions
    ) -> None:
        self.t2i = options.t2i
        self.counts = word_counts
        self.starts: Tensor | None = None
        if not options.t2i:
            self.table = arg_max.view(word_counts.shape[0], *regions.shape[:2])  # [C, I, R]
        elif words.dim() == 3:
            self.table = arg_max.view(regions.shape[0], *words.shape[:2])  # [I, C, W]
        else:
            self.table = arg_max  # [I, N]
            self.starts = offsets_of(word_counts)

    def _columns(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Of a block of packed words: column of each valid word in the table, and its place in the padded block."""
        assert self.starts is not None
        # On the host, where the counts of packed words are: a mask on the device would have to be read back.
        number = torch.arange(block.captions.valid.shape[1], device="cpu")
        valid = number < self.counts[block.numbers, None]
        columns = (self.starts[block.numbers, None] + number)[valid]
        return tuple(index.to(self.table.device) for index in (columns, valid.flatten().nonzero()[:, 0]))  # type: ignore[return-value]

    def put(self, block: _Block, key: Tensor) -> None:  # [A, B, Q]
        key = key.to(torch.uint8)
        if not self.t2i:
            self.table[block.rows, block.start : block.stop] = key
        elif self.starts is None:
            self.table[block.start : block.stop, block.rows, : key.shape[2]] = key
        else:
            columns, places = self._columns(block)
            self.table[block.start : block.stop, columns] = key.flatten(1)[:, places]

    def get(self, block: _Block) -> Tensor:  # [A, B, Q] int64
        if not self.t2i:
            return self.table[block.rows, block.start : block.stop].long()
        longest = block.captions.valid.shape[1]
        if self.starts is None:
            return self.table[block.start : block.stop, block.rows, :longest].long()
        columns, places = self._columns(block)
        key = self.table.new_zeros(block.stop - block.start, len(block.numbers) * longest, dtype=torch.int64)
        key[:, places] = self.table[block.start : block.stop, columns].long()
        return key.view(-1, len(block.numbers), longest)
