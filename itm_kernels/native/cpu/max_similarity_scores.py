"""``max_similarity_scores`` on the CPU: a library product and a C++ maximum forward, no product backward.

Forward, per block of images x captions: ``S`` by torch's BLAS with keys as rows, then one call that takes the maxima
and aggregates them. Backward: of a query's K products one has a gradient, so with the arg-max at hand

    dz = dagg(z) with z_q = q . k_arg          dk_arg += dz_q q          dq += dz_q k_arg

are gathered multiply-adds, 1/K of a library product each; groups of keys own the first two, queries the last. Where the
forward kept no arg-max, ``S`` is made again for it, block by block.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from itm_kernels.native import host
from itm_kernels.native.packing import Packed
from itm_kernels.ops.options import SimilarityOptions


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    arg_max: Tensor | None = None,  # [groups, queries] uint8: written, packed queries first
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, arg_max, backward=False)
    scores = _floats(regions.shape[0], word_counts.shape[0])
    for c0, c1 in batch.caption_blocks:
        captions = _Block(batch.captions, c0, c1)
        for i0, i1 in batch.image_blocks:
            images = _Block(batch.images, i0, i1)
            keys, queries = (images, captions) if options.t2i else (captions, images)
            batch.take_maxima(keys, queries, _by_group(scores[i0:i1, c0:c1], options), batch.kept(keys, queries))
            del images, keys, queries  # before the next block's rows are made, not after
        del captions
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
    arg_max: Tensor | None = None,  # [groups, queries] uint8: read
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the inputs; accumulation in float32."""
    batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, arg_max, backward=True)
    grad_scores = grad_scores.to(torch.float32)
    grad_regions, grad_words = batch.images.gradient(), batch.captions.gradient()
    for c0, c1 in batch.caption_blocks:
        captions = _Block(batch.captions, c0, c1)
        of_captions = batch.captions.view_of(grad_words, c0, c1)
        direct = of_captions is not None
        if of_captions is None:
            of_captions = _floats(*captions.rows.shape)
        for i0, i1 in batch.image_blocks:
            images = _Block(batch.images, i0, i1)
            grad = _by_group(grad_scores[i0:i1, c0:c1], options)
            of_images = batch.images.view_of(grad_regions, i0, i1)
            if of_images is None:
                rows = _floats(*images.rows.shape)
                batch.differentiate(images, captions, grad, rows, False, of_captions, i0 > 0)
                batch.images.put(grad_regions, i0, i1, rows, add=c0 > 0)
                del rows
            else:
                batch.differentiate(images, captions, grad, of_images, c0 > 0, of_captions, i0 > 0)
            del images, of_images
        if not direct:
            batch.captions.put(grad_words, c0, c1, of_captions, add=False)
        del captions, of_captions
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _by_group(scores: Tensor, options: SimilarityOptions) -> Tensor:  # [images, captions] -> [groups, segments]
    return scores if options.t2i else scores.t()


def _floats(*shape: int) -> Tensor:
    """Fresh memory, whatever the default dtype and device are set to."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Block:
    """Some groups of one side."""

    def __init__(self, side: Packed, start: int, stop: int) -> None:
        self.rows = side.rows(start, stop)  # [n, D]
        self.offsets = side.offsets_of(start, stop)  # [groups + 1]
        self.groups = slice(start, stop)
        self.span = side.span(start, stop)  # of all packed rows


class _Batch:
    """Both sides packed, the plan, and buffers that every block uses in turn."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        options: SimilarityOptions,
        workspace_bytes: int,
        arg_max: Tensor | None,
        *,
        backward: bool,
    ) -> None:
        # float16 has no fast product on most CPUs and loses nothing in float32.
        self.dtype = torch.bfloat16 if regions.dtype == torch.bfloat16 else torch.float32
        self.options, self.arg_max = options, arg_max
        self.images = Packed(regions, region_counts, self.dtype)
        self.captions = Packed(words, word_counts, self.dtype)
        plan = host().plan_max_similarity(
            self.images.bounds,
            self.captions.bounds,
            regions.shape[2],
            element_bytes=self.dtype.itemsize,
            t2i=options.t2i,
            backward=backward,
            arg_max_kept=arg_max is not None,
            copies_regions=not self.images.is_view,
            threads=torch.get_num_threads(),
            workspace_bytes=workspace_bytes,
        )
        self.image_blocks = list(pairwise(plan.image_bounds))
        self.caption_blocks = list(pairwise(plan.caption_bounds))
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Reused from block to block, so that it stays in the cache."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            del buffer  # a larger one takes its place: not both at once
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(rows * columns, dtype=dtype, device="cpu")
        return buffer[: rows * columns].view(rows, columns)

    def kept(self, keys: _Block, queries: _Block) -> Tensor | None:
        """What the forward keeps of a block."""
        return None if self.arg_max is None else self.arg_max[keys.groups, queries.span]

    def take_maxima(self, keys: _Block, queries: _Block, scores: Tensor, arg_max: Tensor | None) -> None:
        """Write scores ``[groups, segments]`` and the arg-max of a block."""
        products = self._buffer("products", keys.rows.shape[0], queries.rows.shape[0], self.dtype)
        torch.mm(keys.rows, queries.rows.t(), out=products)
        if arg_max is None:
            arg_max = products.new_empty(0, products.shape[1], dtype=torch.uint8)
        torch.ops.itm_kernels_native.max_similarity_scores_epilogue(
            products, keys.offsets, queries.offsets, *self.options.codes(), scores, arg_max
        )

    def differentiate(
        self,
        images: _Block,
        captions: _Block,
        grad_scores: Tensor,  # [groups, segments]
        grad_regions: Tensor,
        add_regions: bool,
        grad_words: Tensor,
        add_words: bool,
    ) -> None:
        """Write or add the gradients of a block's rows."""
        if self.options.t2i:
            keys, queries = images, captions
            grad_keys, add_keys, grad_queries, add_queries = grad_regions, add_regions, grad_words, add_words
        else:
            keys, queries = captions, images
            grad_keys, add_keys, grad_queries, add_queries = grad_words, add_words, grad_regions, add_regions
        groups, segments, lanes = *grad_scores.shape, queries.rows.shape[0]
        arg_max = self.kept(keys, queries)
        if arg_max is None:
            # Wider than a byte: here keys may be any number.
            arg_max = self._buffer("arg_max", groups, lanes, torch.int32)
            self.take_maxima(keys, queries, self._buffer("scores", groups, segments, torch.float32), arg_max)
        grad_maxima = self._buffer("grad_maxima", groups, lanes, torch.float32)
        torch.ops.itm_kernels_native.max_similarity_scores_keys_backward(
            keys.rows, queries.rows, keys.offsets, queries.offsets, arg_max, *self.options.codes(), grad_scores,
            add_keys, grad_maxima, grad_keys,
        )  # fmt: skip
        torch.ops.itm_kernels_native.max_similarity_scores_queries_backward(
            keys.rows, keys.offsets, arg_max, grad_maxima, add_queries, grad_queries
        )
