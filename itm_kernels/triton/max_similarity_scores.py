"""``max_similarity_scores`` on the Triton floor: product and maximum in one kernel, block by block.

Forward, per block of images x captions: one kernel leaves the largest product of each query and group of keys, 1/K of
the products, and its arg-max where that is kept; another aggregates. Backward: the gradient of the maxima, then two
kernels that make dS on the chip from it and the arg-max,

    dQ += dS^T K           dK += dS Q

Sums and means with a kept arg-max need no product for that; the other aggregations, or without one, run the forward's
kernel again. Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from itm_kernels.ops.options import SimilarityOptions
from itm_kernels.pair_blocks.rows import Block, Side
from itm_kernels.triton import maxima_plan, packing
from itm_kernels.triton.configurations import arch_of
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
    arg_max: Tensor | None = None,  # [groups, queries] uint8: written, packed queries first
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    with _on(regions.device):
        batch = _Batch(
            regions, words, word_counts, region_counts, options, workspace_bytes, word_offsets, arg_max, False
        )
        scores = regions.new_empty(regions.shape[0], word_counts.shape[0], dtype=torch.float32)
        for c0, c1 in batch.caption_blocks:
            captions = packing.blocks((batch.captions, c0, c1))[0]
            for i0, i1 in batch.image_blocks:
                images = packing.blocks((batch.images, i0, i1))[0]
                pair = _Pair(batch, images, captions, (i0, i1), (c0, c1))
                pair.take_maxima(keep=arg_max is not None)
                pair.aggregate(scores[i0:i1, c0:c1])
                del images, pair  # before the next block's rows are made, not after
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
    word_offsets: Tensor | None = None,
    arg_max: Tensor | None = None,  # [groups, queries] uint8: read
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the inputs; accumulation in float32."""
    with _on(regions.device):
        batch = _Batch(
            regions, words, word_counts, region_counts, options, workspace_bytes, word_offsets, arg_max, True
        )
        grad_regions, grad_words = batch.images.gradient(), batch.captions.gradient()
        for c0, c1 in batch.caption_blocks:
            captions = packing.blocks((batch.captions, c0, c1))[0]
            of_captions = batch.captions.view_of(grad_words, c0, c1)
            direct = of_captions is not None
            if of_captions is None:
                of_captions = torch.zeros_like(captions.rows, dtype=torch.float32)
            for i0, i1 in batch.image_blocks:
                images = packing.blocks((batch.images, i0, i1))[0]
                pair = _Pair(batch, images, captions, (i0, i1), (c0, c1))
                pair.differentiate(grad_scores[i0:i1, c0:c1])
                of_images = batch.images.view_of(grad_regions, i0, i1)
                if of_images is None:
                    rows = torch.zeros_like(images.rows, dtype=torch.float32)
                    pair.add_gradients(rows, of_captions)
                    batch.images.add(grad_regions, i0, images, rows)
                    del rows
                else:
                    pair.add_gradients(of_images, of_captions)
                del images, of_images, pair
            if not direct:
                batch.captions.add(grad_words, c0, captions, of_captions)
            del captions, of_captions
        return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Batch:
    """Both sides, the blocks, and what launches share."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        options: SimilarityOptions,
        workspace_bytes: int,
        word_offsets: Tensor | None,
        arg_max: Tensor | None,
        backward: bool,
    ) -> None:
        self.options, self.arg_max, self.dealt = options, arg_max, _Dealt()
        self.images = Side(regions, region_counts, what="region_counts")
        self.captions = Side(words, word_counts, offsets=word_offsets, what="word_counts")
        self.image_blocks, self.caption_blocks, _ = maxima_plan.choose_blocks(
            self.images.bounds,
            self.captions.bounds,
            maxima_plan.MaximaShape(
                width=regions.shape[2],
                element_bytes=regions.dtype.itemsize,
                t2i=options.t2i,
                backward=backward,
                arg_max_kept=arg_max is not None,
                copies_regions=not self.images.is_view,
                copies_words=not self.captions.is_view,
                direct_regions=self.images.in_place,
                direct_words=self.captions.in_place,
                workspace_bytes=workspace_bytes,
            ),
        )
        self.arch = arch_of(regions.device)
        half = regions.dtype != torch.float32
        self.precision = "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

    def kept(self, i0: int, i1: int, c0: int, c1: int) -> Tensor | None:  # [groups, queries]
        """Where a block stands in the arg-max that outlives the forward."""
        if self.arg_max is None:
            return None
        side, groups, queries = (
            (self.captions, (i0, i1), (c0, c1)) if self.options.t2i else (self.images, (c0, c1), (i0, i1))
        )
        return self.arg_max[groups[0] : groups[1], side.bounds[queries[0]] : side.bounds[queries[1]]]


@dataclass
class _Dealt:
    """The keys whose walk is known, and that."""

    keys: Block | None = None
    bundles: int = 0
    tables: tuple[Tensor, ...] = ()


class _Pair:
    """A block of images x captions: keys, queries, and what is made of them."""

    def __init__(self, batch: _Batch, images: Block, captions: Block, i: tuple[int, int], c: tuple[int, int]) -> None:
        from itm_kernels.triton.kernels import maxima, maxima_backward

        self._forward, self._backward = maxima, maxima_backward
        self.options, self.arch = batch.options, batch.arch
        self.keys, self.queries = (images, captions) if self.options.t2i else (captions, images)
        self.width = self.keys.rows.shape[1]
        self.products = {"ALIGNED": self.width % 16 == 0, "PRECISION": batch.precision}
        self.arg_max = batch.kept(*i, *c)
        side, (start, stop) = (batch.images, i) if self.options.t2i else (batch.captions, c)
        self.sizes = [b - a for a, b in pairwise(side.bounds[start : stop + 1])]  # of groups, padding included
        self._dealt = batch.dealt
        self.maxima = self.keys.rows.new_empty(self.keys.groups, self.queries.num_rows, dtype=torch.float32)

    def _tile(self, kernel: str) -> maxima_plan.Tile:
        return maxima_plan.tile(kernel, self.keys.rows.element_size(), self.arch)

    def _deal(self, slots: int) -> tuple[int, tuple[Tensor, ...]]:
        """Bundles, and how their slots walk the keys: rows, ends of groups, and of each slot begin and length."""
        if self._dealt.keys is not self.keys:  # else made for these keys and other queries
            deal, device = maxima_plan.deal(self.sizes, slots), self.keys.rows.device
            order = torch.sort(self.keys.counts, stable=True, descending=True).indices
            of_keys = (torch.empty(self.keys.num_rows, dtype=torch.int32, device=device) for _ in range(2))
            of_slots = (torch.empty(deal.bundles * slots, dtype=torch.int32, device=device) for _ in range(2))
            tables = (*of_keys, *of_slots)
            self._forward.deal[(deal.bundles,)](
                order, self.keys.counts, self.keys.offsets, *tables, self.keys.groups, deal.bundles,
                SHARE=deal.share, BLOCK_G=slots, BLOCK_P=deal.most, num_warps=1,
            )  # fmt: skip
            self._dealt.keys, self._dealt.bundles, self._dealt.tables = self.keys, deal.bundles, tables
        return self._dealt.bundles, self._dealt.tables

    @property
    def _aggregation(self) -> dict[str, Any]:
        return {
            "AGG": self.options.agg_func,
            "BLOCK_S": maxima_plan.AGGREGATE_SEGMENTS,
            "BLOCK_L": maxima_plan.AGGREGATE_QUERIES,
        }

    def _by_group(self, scores: Tensor) -> Tensor:  # [images, captions] -> [groups, segments]
        return scores if self.options.t2i else scores.t()

    def take_maxima(self, *, keep: bool) -> None:
        """The largest product of each query and group, and the arg-max too."""
        tile = self._tile("largest")
        bundles, tables = self._deal(tile.groups)
        arg_max = self.arg_max if self.arg_max is not None else self.maxima
        self._forward.largest[(-(-self.queries.num_rows // tile.queries) * bundles,)](
            self.keys.rows, self.queries.rows, *tables, self.maxima, arg_max, self.queries.num_rows, self.width,
            arg_max.stride(0),
            KEEP=keep, **self.products, **tile.constants, **tile.launch,
        )  # fmt: skip

    def aggregate(self, scores: Tensor) -> None:  # [images, captions]
        scores = self._by_group(scores)
        rows = -(-self.queries.groups // maxima_plan.AGGREGATE_SEGMENTS)
        self._forward.aggregate_maxima[(rows * self.keys.groups,)](
            self.maxima, self.queries.offsets, self.queries.counts, scores, self.queries.num_rows, self.keys.groups,
            self.queries.groups, scores.stride(0), scores.stride(1), self.options.lambda_lse, **self._aggregation,
        )  # fmt: skip

    def differentiate(self, grad_scores: Tensor) -> None:  # [images, captions]
        """Leave the gradient of the maxima in their place, and an arg-max."""
        keep = self.arg_max is None
        if self.arg_max is None:
            # Wider than a byte: here keys may be any number.
            self.arg_max = torch.empty_like(self.maxima, dtype=torch.int32)
        if keep or not self.options.linear:
            self.take_maxima(keep=keep)
        grad_scores = self._by_group(grad_scores)
        rows = -(-self.queries.groups // maxima_plan.AGGREGATE_SEGMENTS)
        self._backward.aggregate_maxima_backward[(rows * self.keys.groups,)](
            self.maxima, self.queries.offsets, self.queries.counts, grad_scores, self.queries.num_rows,
            self.keys.groups, self.queries.groups, grad_scores.stride(0), grad_scores.stride(1),
            self.options.lambda_lse, **self._aggregation,
        )  # fmt: skip

    def add_gradients(self, of_images: Tensor, of_captions: Tensor) -> None:  # [n, D] float32
        """Add to the gradients of both sides' rows."""
        assert self.arg_max is not None
        of_keys, of_queries = (of_images, of_captions) if self.options.t2i else (of_captions, of_images)
        tile = self._tile("queries_gradient")
        programs = -(-self.queries.num_rows // tile.queries) * -(-self.width // tile.width)
        keys, queries = self.keys, self.queries
        self._backward.queries_gradient[(programs,)](
            keys.rows, keys.offsets, keys.counts, keys.segments, self.maxima, self.arg_max, queries.segments,
            of_queries, queries.num_rows, keys.num_rows, keys.groups, self.width, self.arg_max.stride(0),
            ALIKE=len(set(self.sizes)) == 1, **self.products, **tile.constants, **tile.launch,
        )  # fmt: skip
        tile = self._tile("keys_gradient")
        runs = -(-keys.num_rows // (maxima_plan.KEYS * tile.groups))
        self._backward.keys_gradient[(runs * -(-self.width // tile.width),)](
            queries.rows, keys.offsets, keys.segments, self.maxima, self.arg_max, queries.segments, of_keys,
            queries.num_rows, keys.num_rows, self.width, self.arg_max.stride(0), **self.products, **tile.constants,
            **tile.launch,
        )  # fmt: skip
