"""``cross_attention_scores`` on the Triton floor: library products around fused epilogues, block by block.

Per block of images x captions: ``S`` by torch's library product, then kernels that turn products into scores
(``kernels/``); where the plan says ``triton-fused``, one kernel with ``S`` on the chip. The backward makes ``S`` again,
turns it into ``dS``, and library products finish:

    dV += dS T           dT += dS^T V          dK += (dG + dG^T) K  (Gram matrices of the keys, both directions)

Caption blocks are the outer loop. Nothing of size [I, C, W, D] exists; sums run in one order, without atomics; all on
the current stream, without waiting for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.triton import interprets, load_error, tiles
from itm_kernels.triton.configurations import arch_of, table
from itm_kernels.triton.rows import Block, Side

if TYPE_CHECKING:  # imports Triton, which may be missing until a kernel is asked for
    from itm_kernels.triton.epilogue import Attention, Launch


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    if dtype == torch.float64:
        return "the Triton kernels accumulate in float32; float64 runs on eager and reference"
    reason = load_error()
    if reason is not None:
        return reason
    if device.type == "cpu":
        if not interprets():
            return (
                "Triton compiles for GPUs; on the CPU its interpreter runs, where TRITON_INTERPRET=1 is set at import"
            )
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes products of bfloat16 wrongly"
        return None
    if device.type != "cuda":
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return None  # nothing to ask: what is missing is the device, not the kernels
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"sm_80 or newer is needed, this device is sm_{major}{minor}"


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: ScoreOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    with _on(regions.device):
        batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, word_offsets, False)
        scores = regions.new_empty(regions.shape[0], word_counts.shape[0], dtype=torch.float32)
        for c0, c1 in batch.plan.caption_blocks:
            captions = batch.prepare(batch.captions.block(c0, c1), keys=options.i2t, queries=options.t2i)
            starts = batch.tile_starts(captions, c0, c1)
            for i0, i1 in batch.plan.image_blocks:
                images = batch.prepare(batch.images.block(i0, i1), keys=options.t2i, queries=options.i2t)
                out = scores[i0:i1, c0:c1]
                if starts is not None:
                    batch.fused(images, captions, starts, out)
                    continue
                products = batch.products(images, captions)
                if options.t2i:
                    batch.t2i(images, captions, products).aggregate(out, accumulate=False)
                if options.i2t:
                    batch.i2t(images, captions, products).aggregate(out.t(), accumulate=options.t2i)
                del images  # before the next block's rows are made, not after
            del captions
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
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the inputs; accumulation in float32."""
    with _on(regions.device):
        batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, word_offsets, True)
        grad_regions, grad_words = batch.images.gradient(), batch.captions.gradient()
        for c0, c1 in batch.plan.caption_blocks:
            captions = batch.prepare(batch.captions.block(c0, c1), keys=options.i2t, queries=options.t2i)
            of_captions = batch.captions.view_of(grad_words, c0, c1)
            direct = of_captions is not None
            if of_captions is None:
                of_captions = torch.zeros_like(captions.block.rows, dtype=torch.float32)
            for i0, i1 in batch.plan.image_blocks:
                images = batch.prepare(batch.images.block(i0, i1), keys=options.t2i, queries=options.i2t)
                grad_products = batch.backward_block(images, captions, grad_scores[i0:i1, c0:c1])
                of_images = batch.images.view_of(grad_regions, i0, i1)
                if of_images is None:
                    rows = torch.zeros_like(images.block.rows, dtype=torch.float32)
                    _add_product(rows, grad_products.t(), captions.block.rows)
                    images.add_own_gradient(rows, batch.launch.precision)
                    batch.images.add(grad_regions, i0, images.block, rows)
                    del rows
                else:
                    _add_product(of_images, grad_products.t(), captions.block.rows)
                    images.add_own_gradient(of_images, batch.launch.precision)
                _add_product(of_captions, grad_products, images.block.rows)
                captions.add_own_gradient(of_captions, batch.launch.precision)
                del images, of_images
            if not direct:
                batch.captions.add(grad_words, c0, captions.block, of_captions)
            del captions, of_captions
        return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif left.device.type == "cuda":
        out.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        out.addmm_(left.float(), right.float())


class _Rows:
    """A block with what a direction needs of it as keys (Gram matrices) or queries (norms), and their gradients."""

    def __init__(self, block: Block, gram: Tensor | None, norms: Tensor | None) -> None:
        self.block, self.gram, self.norms = block, gram, norms
        self.grad_gram: Tensor | None = None
        self.own: Tensor | None = None

    def add_own_gradient(self, gradient: Tensor, precision: str) -> None:  # [n, D]
        from itm_kernels.triton import epilogue

        epilogue.add_own_gradient(self.block, self.grad_gram, self.own, gradient, precision)
        self.grad_gram = self.own = None


class _Batch:
    """Both sides, the plan, and the buffers that every block's products use in turn."""

    launch: Launch

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        options: ScoreOptions,
        workspace_bytes: int,
        word_offsets: Tensor | None,
        backward: bool,
    ) -> None:
        from itm_kernels.triton import epilogue

        self._epilogue, self.options, self._backward = epilogue, options, backward
        self.images = Side(regions, region_counts, what="region_counts")
        self.captions = Side(words, word_counts, offsets=word_offsets, what="word_counts")
        arch = arch_of(regions.device)
        self.plan = tiles.plan_scores(
            self.images.bounds,
            self.captions.bounds,
            regions.shape[2],
            options=options,
            element_bytes=regions.dtype.itemsize,
            backward=backward,
            arch=arch,
            workspace_bytes=workspace_bytes,
            copies_regions=not self.images.is_view,
            copies_words=not self.captions.is_view,
            direct_regions=self.images.in_place,
            direct_words=self.captions.in_place,
            known={"t2i": not self.images.padded, "i2t": not self.captions.padded},
        )
        half = regions.dtype != torch.float32
        # Attention weights meet the float32 Gram matrix: ten bits of each are enough behind half-precision products.
        precision = "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.launch = epilogue.Launch(options, precision, table(arch).programs, workspace_bytes)
        self._buffers: dict[str, Tensor] = {}
        self._like = regions

    def prepare(self, block: Block, *, keys: bool, queries: bool) -> _Rows:
        gram = self._epilogue.gram(block, self.launch.precision) if keys else None
        return _Rows(block, gram, self._epilogue.row_norms(block) if queries else None)

    def _buffer(self, name: str, shape: torch.Size) -> Tensor:
        """Reused from block to block."""
        size = shape.numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            del buffer  # a larger one takes its place: not both at once
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)

    def products(self, images: _Rows, captions: _Rows) -> Tensor:  # [words, rows of regions]
        """S of a block, with the keys of the (first) direction contiguous."""
        words, rows = captions.block.rows, images.block.rows
        if self.options.t2i:
            shape = torch.Size((words.shape[0], rows.shape[0]))
            return torch.mm(words, rows.t(), out=self._buffer("products", shape))
        shape = torch.Size((rows.shape[0], words.shape[0]))
        return torch.mm(rows, words.t(), out=self._buffer("products", shape)).t()

    def t2i(self, images: _Rows, captions: _Rows, products: Tensor) -> Attention:
        """Words attend to regions."""
        assert images.gram is not None
        assert captions.norms is not None
        return self._epilogue.Attention(
            self.launch, self.plan.tiles["t2i"], images.block, captions.block, images.gram, captions.norms, products,
            backward=self._backward,
        )  # fmt: skip

    def i2t(self, images: _Rows, captions: _Rows, products: Tensor) -> Attention:
        """Regions attend to words."""
        assert captions.gram is not None
        assert images.norms is not None
        return self._epilogue.Attention(
            self.launch, self.plan.tiles["i2t"], captions.block, images.block, captions.gram, images.norms,
            products.t(), backward=self._backward,
        )  # fmt: skip

    def tile_starts(self, captions: _Rows, start: int, stop: int) -> Tensor | None:
        """Tiles of a block of captions, where products stay on the chip."""
        if self.plan.fused is None:
            return None
        from itm_kernels.triton import fused

        bounds = self.captions.bounds[start : stop + 1]
        return fused.tile_starts(captions.block, [b - bounds[0] for b in bounds], self.plan.fused.rows)

    def fused(self, images: _Rows, captions: _Rows, starts: Tensor, scores: Tensor) -> None:
        """Scores of a block, S on the chip."""
        from itm_kernels.triton import fused

        assert self.plan.fused is not None
        assert images.gram is not None
        assert captions.norms is not None
        fused.take_scores(
            self.launch, self.plan.fused, images.block, captions.block, starts, images.gram, captions.norms, scores
        )

    def _like_products(self, name: str, products: Tensor) -> Tensor:
        """A buffer with the strides of the products."""
        if products.is_contiguous():
            return self._buffer(name, products.shape)
        return self._buffer(name, products.t().shape).t()

    def backward_block(
        self, images: _Rows, captions: _Rows, grad_scores: Tensor
    ) -> Tensor:  # [words, rows of regions]: dS
        """dS of a block; what reaches rows through Gram matrices and norms is left with them."""
        products = self.products(images, captions)
        features, direct = (self._like_products(name, products) for name in ("features", "direct"))
        both = self.options.t2i and self.options.i2t
        # One direction: dS takes the place of S. Two: the second still needs S.
        out = self._like_products("gradients", products) if both else products
        if self.options.t2i:
            attention = self.t2i(images, captions, products)
            images.grad_gram, captions.own = attention.backward(grad_scores, features, direct, out, accumulate=False)
            del attention
        if self.options.i2t:
            attention = self.i2t(images, captions, products)
            captions.grad_gram, images.own = attention.backward(
                grad_scores.t(), features.t(), direct.t(), out.t(), accumulate=both
            )
        return out
