"""``max_similarity_scores`` on a GPU: library products around one kernel a block.

Forward, per block of images x captions: ``S`` by the library with queries as rows, then one kernel that takes the
maxima, aggregates them and writes a byte an entry of arg-max where the backward will want it. Backward: one kernel
writes ``dS``, the gradient of the maxima at their keys and zeros elsewhere, over ``S`` (which is made again only where
maxima or arg-max have to be), and the library finishes:

    dV += dS^T T          dT += dS V
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itm_kernels.native import host
from itm_kernels.native.cuda.products import add_product, empty_products, products_of
from itm_kernels.native.cuda.side import Block, Side
from itm_kernels.ops.options import SimilarityOptions

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels


class DeviceMaxima:
    """The block loop of one call."""

    def __init__(
        self,
        kernels: Kernels,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: Tensor,  # [C]
        word_offsets: Tensor | None,  # [C + 1]
        region_counts: Tensor | None,  # [I]
        options: SimilarityOptions,
        workspace_bytes: int,
        arg_max: Tensor | None,  # [groups, queries] uint8
        *,
        backward: bool,
    ) -> None:
        self.ops, self.machine = kernels.ops, kernels.machine
        self.options, self.arg_max = options, arg_max
        self.device, self.dtype = regions.device, regions.dtype
        # Images keep their length: region_counts mark what is valid, and the products of what is not are wasted.
        self.images = Side(self.ops, regions, region_counts, packs=False)
        self.captions = Side(self.ops, words, word_counts, offsets=word_offsets, packs=True)
        plan = host().plan_device_maxima(
            regions.shape[0],
            regions.shape[1],
            self.captions.bounds,
            regions.shape[2],
            element_bytes=self.dtype.itemsize,
            t2i=options.t2i,
            backward=backward,
            arg_max_kept=arg_max is not None,
            linear=options.linear,
            copies_regions=self.images.copies,
            copies_words=self.captions.copies,
            multiprocessors=self.machine.multiprocessors,
            workspace_bytes=workspace_bytes,
        )
        self.image_blocks = list(pairwise(plan.image_bounds))
        self.caption_blocks = list(pairwise(plan.caption_bounds))

    def forward(self) -> Tensor:  # [I, C]
        scores = self._floats(self.images.groups, self.captions.groups)
        for c0, c1 in self.caption_blocks:
            captions = self.captions.block(c0, c1)
            for i0, i1 in self.image_blocks:
                images = self.images.block(i0, i1)
                keys, queries = self._sides(images, captions)
                out = scores[i0:i1, c0:c1]
                products = products_of(queries.rows, keys.rows)
                self.ops.max_similarity_scores_tiles(
                    products, *self._arguments(keys, queries), self._kept(i0, i1, c0, c1),
                    out if self.options.t2i else out.t(),
                )  # fmt: skip
                del images, keys, queries, products  # before the next block's are made, not after
            del captions
        return scores

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the dtype of the inputs."""
        regions, words = self.images.vectors, self.captions.vectors
        grad_scores = grad_scores.to(torch.float32)
        grad_regions = self._floats(*regions.shape)
        grad_words = torch.empty(words.shape, dtype=self.dtype, device=self.device)
        for c0, c1 in self.caption_blocks:
            captions = self.captions.block(c0, c1)
            of_captions = self._floats(*captions.rows.shape)
            for i0, i1 in self.image_blocks:
                images = self.images.block(i0, i1)
                keys, queries = self._sides(images, captions)
                grad, arg_max = grad_scores[i0:i1, c0:c1], self._kept(i0, i1, c0, c1)
                if arg_max is not None and self.options.linear:
                    products = empty_products(queries.rows, keys.rows)
                else:
                    products = products_of(queries.rows, keys.rows)
                self.ops.max_similarity_scores_tiles_backward(
                    products, *self._arguments(keys, queries), arg_max, grad if self.options.t2i else grad.t()
                )
                grad_products = products.t() if self.options.t2i else products  # [regions, words]
                of_images = grad_regions[i0:i1].view(images.rows.shape)
                add_product(of_images, grad_products, captions.rows, first=c0 == 0)
                add_product(of_captions, grad_products.t(), images.rows, first=i0 == 0)
                del images, keys, queries, products, grad_products
            self.captions.put(grad_words, c0, c1, of_captions)
            del captions, of_captions
        return grad_regions.to(self.dtype), grad_words

    def _sides(self, images: Block, captions: Block) -> tuple[Block, Block]:  # keys, queries
        return (images, captions) if self.options.t2i else (captions, images)

    def _kept(self, i0: int, i1: int, c0: int, c1: int) -> Tensor | None:
        """The arg-max of a block, ``[groups, queries]``."""
        if self.arg_max is None:
            return None
        if self.options.t2i:
            return self.arg_max[i0:i1, self.captions.bounds[c0] : self.captions.bounds[c1]]
        return self.arg_max[c0:c1, self.images.bounds[i0] : self.images.bounds[i1]]

    def _arguments(self, keys: Block, queries: Block) -> tuple[Any, ...]:
        launch = host().maxima_launch(keys.groups, queries.rows.shape[0], queries.stride, self.machine.multiprocessors)
        if launch.shared_bytes > self.machine.shared_limit:
            raise RuntimeError(
                f"max_similarity_scores: {queries.stride} queries in one caption or image need {launch.shared_bytes} "
                f"bytes of shared memory, a block of threads has {self.machine.shared_limit}; "
                "backend='eager' takes them"
            )
        return (
            keys.offsets, keys.counts, keys.stride, queries.offsets, queries.counts, queries.stride,
            *self.options.codes(), launch.row_capacity, launch.splits,
        )  # fmt: skip

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)
