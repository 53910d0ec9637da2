"""``cross_attention_scores`` on a GPU: library products around one fused kernel a direction, block by block.

Per block of images x captions: ``S`` by the library with queries as rows (words, where t2i is asked for), then one
kernel that turns products into scores. The backward makes ``S`` again, one kernel turns it into ``dS`` in place and
sums dG, and the library finishes:

    dV += dS^T T          dT += dS V          dK += (dG + dG^T) K  (one kernel with the way through the norms)

Caption blocks are the outer loop: the packed words and their gradient are made once per block and stay in workspace,
while the gradient of the regions accumulates where it belongs, in float32. In ``both`` the second direction reads the
same ``S`` by other strides. Nothing is read back: sizes come from counts on the host, or are padded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itm_kernels.native import host
from itm_kernels.native.cuda import fused_scores
from itm_kernels.native.cuda.products import add_product, products_of
from itm_kernels.native.cuda.side import Block, Side
from itm_kernels.ops.options import ScoreOptions

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels


class DeviceScores:
    """The block loop of one call."""

    def __init__(
        self,
        kernels: Kernels,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: Tensor,  # [C]
        word_offsets: Tensor | None,  # [C + 1]
        region_counts: Tensor | None,  # [I]
        options: ScoreOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.ops, self.machine = ops, machine = kernels.ops, kernels.machine
        self.options, self.is_backward = options, backward
        self.workspace_bytes = workspace_bytes
        self.device, self.dtype = regions.device, regions.dtype
        # Images keep their length: region_counts mark what is valid, and the products of what is not are wasted.
        self.images = Side(ops, regions, region_counts, packs=False)
        self.captions = Side(ops, words, word_counts, offsets=word_offsets, packs=True)
        plan = host().plan_device_scores(
            regions.shape[0],
            regions.shape[1],
            self.captions.bounds,
            regions.shape[2],
            element_bytes=self.dtype.itemsize,
            t2i=options.t2i,
            i2t=options.i2t,
            backward=backward,
            copies_regions=self.images.copies,
            copies_words=self.captions.copies,
            softmax=options.raw_feature_norm == "softmax",
            shared_limit=machine.shared_limit,
            multiprocessors=machine.multiprocessors,
            workspace_bytes=workspace_bytes,
        )
        self.image_blocks = list(pairwise(plan.image_bounds))
        self.caption_blocks = list(pairwise(plan.caption_bounds))

    def forward(self) -> Tensor:  # [I, C]
        if fused_scores.asked_for():
            return fused_scores.forward(self)
        scores = self._floats(self.images.groups, self.captions.groups)
        for c0, c1 in self.caption_blocks:
            captions = self.block(self.captions, c0, c1, keys=self.options.i2t, queries=self.options.t2i)
            for i0, i1 in self.image_blocks:
                images = self.block(self.images, i0, i1, keys=self.options.t2i, queries=self.options.i2t)
                out = scores[i0:i1, c0:c1]
                products = self._products(images, captions)
                if self.options.t2i:
                    self._epilogue(products, images, captions, out, accumulate=False)
                if self.options.i2t:
                    if self.options.t2i:
                        products = products.t()
                    self._epilogue(products, captions, images, out.t(), accumulate=self.options.t2i)
                del images, products  # before the next block's are made, not after
            del captions
        return scores

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients in the dtype of the inputs."""
        regions, words = self.images.vectors, self.captions.vectors
        grad_scores = grad_scores.to(torch.float32)
        grad_regions = self._floats(*regions.shape)
        grad_words = torch.empty(words.shape, dtype=self.dtype, device=self.device)
        for c0, c1 in self.caption_blocks:
            captions = self.block(self.captions, c0, c1, keys=self.options.i2t, queries=self.options.t2i)
            of_captions = self._floats(*captions.rows.shape)
            for i0, i1 in self.image_blocks:
                images = self.block(self.images, i0, i1, keys=self.options.t2i, queries=self.options.i2t)
                of_images = grad_regions[i0:i1].view(images.rows.shape)
                grad_products = self._grad_products(images, captions, grad_scores[i0:i1, c0:c1])  # [regions, words]
                add_product(of_images, grad_products, captions.rows, first=c0 == 0)
                add_product(of_captions, grad_products.t(), images.rows, first=i0 == 0)
                del grad_products
                self._add_own_gradient(images, of_images)
                self._add_own_gradient(captions, of_captions)
                del images
            self.captions.put(grad_words, c0, c1, of_captions)
            del captions, of_captions
        return grad_regions.to(self.dtype), grad_words

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def block(self, side: Side, start: int, stop: int, *, keys: bool, queries: bool) -> Block:
        block = side.block(start, stop)
        if keys:
            block.gram = self._floats(block.groups, block.stride, block.stride)
        if queries:
            block.norms = self._floats(block.rows.shape[0])
        self.ops.gram_of_groups(block.rows, *block.where, block.gram, block.norms)
        return block

    def _products(self, images: Block, captions: Block) -> Tensor:  # queries as rows; t2i's where both are asked for
        if self.options.t2i:
            return products_of(captions.rows, images.rows)
        return products_of(images.rows, captions.rows)

    def _launch(self, products: Tensor, keys: Block, queries: Block) -> Any:
        launch = host().scores_launch(
            keys.groups,
            keys.stride,
            products.shape[0],
            queries.stride,
            element_bytes=self.dtype.itemsize,
            uniform=queries.uniform,
            backward=self.is_backward,
            softmax=self.options.raw_feature_norm == "softmax",
            shared_limit=self.machine.shared_limit,
            multiprocessors=self.machine.multiprocessors,
        )
        if launch.shared_bytes > self.machine.shared_limit:
            raise RuntimeError(
                f"cross_attention_scores: {keys.stride} keys and {queries.stride} queries in one image or caption need "
                f"{launch.shared_bytes} bytes of shared memory, a block of threads has {self.machine.shared_limit}; "
                "backend='eager' takes them"
            )
        return launch

    def _epilogue(
        self, products: Tensor, keys: Block, queries: Block, scores: Tensor, *, accumulate: bool
    ) -> None:  # [queries, keys] -> [groups, segments]
        launch = self._launch(products, keys, queries)
        self.ops.cross_attention_scores_tiles(
            products, keys.gram, keys.offsets, keys.counts, queries.offsets, queries.counts, queries.stride,
            queries.norms, *self.options.codes(), launch.tiles, launch.row_capacity, launch.splits, accumulate, scores,
        )  # fmt: skip

    def _grad_products(self, images: Block, captions: Block, grad_scores: Tensor) -> Tensor:  # [regions, words]
        products = self._products(images, captions)
        if not self.options.t2i:
            self._epilogue_backward(products, captions, images, grad_scores.t(), None, products)
            return products
        addend = None
        if self.options.i2t:  # reads S by columns and leaves it as it is; t2i then overwrites it
            turned = torch.empty_like(products.t(), memory_format=torch.contiguous_format)
            self._epilogue_backward(products.t(), captions, images, grad_scores.t(), None, turned)
            addend = turned.t()
        self._epilogue_backward(products, images, captions, grad_scores, addend, products)
        return products.t()

    def _epilogue_backward(
        self, products: Tensor, keys: Block, queries: Block, grad_scores: Tensor, addend: Tensor | None, out: Tensor
    ) -> None:
        launch = self._launch(products, keys, queries)
        assert keys.gram is not None
        keys.grad_gram = self._floats(launch.splits, *keys.gram.shape)
        queries.grad_norms = self._floats(launch.group_blocks, products.shape[0])
        scratch = None if launch.tiles else self._floats(2, *products.shape)
        self.ops.cross_attention_scores_tiles_backward(
            products, keys.gram, keys.offsets, keys.counts, queries.offsets, queries.counts, queries.stride,
            queries.norms, *self.options.codes(), launch.tiles, launch.row_capacity, launch.splits, grad_scores, addend,
            scratch, out, keys.grad_gram, queries.grad_norms,
        )  # fmt: skip

    def _add_own_gradient(self, block: Block, gradient: Tensor) -> None:  # [n, D] float32
        """What reaches the rows through their own Gram matrices and norms."""
        self.ops.gram_of_groups_backward(
            block.rows, *block.where, block.grad_gram, block.grad_norms, block.norms, gradient
        )
        block.grad_gram = block.grad_norms = None
