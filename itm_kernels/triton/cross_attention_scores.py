"""``cross_attention_scores`` on the Triton floor: library products around fused epilogues, block by block.

Per block of images x captions: ``S`` by torch's library product, then kernels that turn products into scores
(``kernels/``); where the plan says ``triton-fused``, one kernel with ``S`` on the chip. The backward makes ``S`` again,
turns it into ``dS``, and library products finish:

    dV += dS^T T         dT += dS V          dK += (dG + dG^T) K  (Gram matrices of the keys, both directions)

Caption blocks are the outer loop. Nothing of size [I, C, W, D] exists; sums run in one order, without atomics; all on
the current stream, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.pair_blocks.rows import Side
from itm_kernels.triton import interprets, load_error, packing, tiles
from itm_kernels.triton.configurations import arch_of, table

if TYPE_CHECKING:  # imports Triton, which may be missing until a kernel is asked for
    from itm_kernels.triton.epilogue import Known, Launch


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
        for c0, c1, i0, i1, images, captions in batch.blocks():
            batch.score(images, captions, (c0, c1), scores[i0:i1, c0:c1])
            del images, captions  # before the next block's rows are made, not after
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
        for c0, c1, i0, i1, images, captions in batch.blocks():
            into = batch.images.rows_of(grad_regions, i0), batch.captions.rows_of(grad_words, c0)
            batch.differentiate(images, captions, grad_scores[i0:i1, c0:c1], *into)
            del images, captions, into
        return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` in float32, whatever the operands are; in ``out`` where the library can."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


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
            known={"t2i": not self.images.padded, "i2t": not self.captions.padded},
        )
        half = regions.dtype != torch.float32
        # Attention weights meet the float32 Gram matrix: ten bits of each are enough behind half-precision products.
        precision = "tf32" if half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        self.launch = epilogue.Launch(options, precision, table(arch).programs, workspace_bytes)
        self._buffers: dict[str, Tensor] = {}
        self._starts: tuple[tuple[int, int], Tensor] | tuple[None, None] = (
            None,
            None,
        )  # a block of captions, its tiles
        self._like = regions

    def blocks(self) -> Iterator[tuple[int, int, int, int, Known, Known]]:
        """Captions ``c0`` to ``c1``, images ``i0`` to ``i1``, and both sides of the block, images first."""
        known, options = self._epilogue.known, self.options
        for c0, c1 in self.plan.caption_blocks:
            captions: Known | None = None
            for i0, i1 in self.plan.image_blocks:
                if captions is None:
                    of_images, of_captions = packing.blocks((self.images, i0, i1), (self.captions, c0, c1))
                    captions = known(of_captions, keys=options.i2t, queries=options.t2i)
                    del of_captions
                else:
                    (of_images,) = packing.blocks((self.images, i0, i1))
                images = known(of_images, keys=options.t2i, queries=options.i2t)
                del of_images
                yield c0, c1, i0, i1, images, captions
                del images  # before the next block's rows are made, not after
            del captions

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Reused from block to block."""
        size = shape.numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            del buffer  # a larger one takes its place: not both at once
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    def _products(self, images: Known, captions: Known) -> Tensor:  # [words, rows of regions]
        """S of a block, with the keys of the (first) direction contiguous."""
        words, regions = captions.block.rows, images.block.rows
        if self.options.t2i:
            return torch.mm(words, regions.t(), out=self._like_products("products", words, regions))
        return torch.mm(regions, words.t(), out=self._like_products("products", words, regions).t()).t()

    def _like_products(self, name: str, words: Tensor, regions: Tensor) -> Tensor:  # [words, rows of regions]
        """A buffer with the strides of the products."""
        shape = words.shape[0], regions.shape[0]
        if self.options.t2i:
            return self._buffer(name, torch.Size(shape))
        return self._buffer(name, torch.Size(shape[::-1])).t()

    def score(self, images: Known, captions: Known, cut: tuple[int, int], scores: Tensor) -> None:
        """Scores of a block: images x captions ``cut``."""
        epilogue, launch, options = self._epilogue, self.launch, self.options
        if self.plan.fused is not None:
            epilogue.prepare(launch, (images, captions), ())
            self._fused(images, captions, cut, scores)
            return
        products = self._products(images, captions)
        directions = []
        if options.t2i:
            directions.append(epilogue.direction(launch, images, captions, products))
        if options.i2t:
            directions.append(epilogue.direction(launch, captions, images, products.t()))
        epilogue.prepare(launch, (images, captions), directions)
        epilogue.attend(launch, self.plan.tiles["attend"], directions, keep=False)
        ways = [(images, captions, scores)] if options.t2i else []
        ways += [(captions, images, scores.t())] if options.i2t else []
        for at, (d, (keys, queries, out)) in enumerate(zip(directions, ways, strict=True)):
            epilogue.aggregate(
                launch, d.state, d.query_norms, keys.block, queries.block, out, accumulate=at > 0, finished=False
            )

    def _fused(self, images: Known, captions: Known, cut: tuple[int, int], scores: Tensor) -> None:
        """Scores of a block, S on the chip."""
        from itm_kernels.triton import fused

        assert self.plan.fused is not None
        assert images.gram is not None
        assert captions.norms is not None
        if self._starts[0] != cut:
            first, last = cut
            bounds = [bound - self.captions.bounds[first] for bound in self.captions.bounds[first : last + 1]]
            self._starts = cut, fused.tile_starts(captions.block, bounds, self.plan.fused.rows)
        fused.take_scores(
            self.launch, self.plan.fused, images.block, captions.block, self._starts[1], images.gram, captions.norms,
            scores,
        )  # fmt: skip

    def differentiate(
        self,
        images: Known,
        captions: Known,
        grad_scores: Tensor,  # [images, captions]
        of_images: Tensor,  # [.., D] float32: gradients, from the block's first row on, as the next
        of_captions: Tensor,
    ) -> None:
        """Add what a block gives to the gradients of its rows."""
        epilogue, launch = self._epilogue, self.launch
        regions, words = images.block.rows, captions.block.rows
        products = self._products(images, captions)
        directions = []
        if self.options.t2i:
            scratch = [self._like_products(f"t2i {name}", words, regions) for name in ("features", "direct")]
            directions.append(
                epilogue.direction(
                    launch, images, captions, products, grad_scores=grad_scores, grad_features=scratch[0],
                    grad_direct=scratch[1],
                )
            )  # fmt: skip
        if self.options.i2t:
            scratch = [self._like_products(f"i2t {name}", words, regions).t() for name in ("features", "direct")]
            directions.append(
                epilogue.direction(
                    launch, captions, images, products.t(), grad_scores=grad_scores.t(), grad_features=scratch[0],
                    grad_direct=scratch[1],
                )
            )  # fmt: skip
        epilogue.prepare(launch, (images, captions), directions)
        epilogue.attend(launch, self.plan.tiles["attend"], directions, keep=True)
        epilogue.aggregate_backward(launch, directions)
        epilogue.attend_backward(launch, self.plan.tiles["attend_backward"], directions)
        epilogue.feature_norm_backward(launch, directions)
        grad_products = directions[0].grad_direct if self.options.t2i else directions[0].grad_direct.t()
        del directions
        for_images = _product(grad_products.t(), words, self._buffer("of images", regions.shape, torch.float32))
        for_captions = _product(grad_products, regions, self._buffer("of captions", words.shape, torch.float32))
        epilogue.add_gradients(launch, ((images, for_images, of_images), (captions, for_captions, of_captions)))
