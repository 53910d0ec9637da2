"""``cross_attention_scores`` on the CPU: library products around the C++ epilogue, block by block.

Per block of images x captions: ``S = V T^T`` by torch's BLAS, then one call that turns products into scores. The
backward makes ``S`` again, one call turns it into ``dS`` in place, and three library products finish:

    dV += dS T           dT += dS^T V          dK += 2 dG K  (Gram matrices of the keys, both directions)

Caption blocks are the outer loop: the packed words and their gradient are made once per block and stay in workspace,
while the gradient of the regions accumulates where it belongs. Nothing of size [I, C, W, D] exists, a block of S is
consumed while it is in the cache, and sums run in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from itm_kernels.native import host
from itm_kernels.native.packing import Packed
from itm_kernels.ops.options import ScoreOptions


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: ScoreOptions,
    *,
    workspace_bytes: int,
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, backward=False)
    scores = _floats(regions.shape[0], word_counts.shape[0])
    for c0, c1 in batch.caption_blocks:
        captions = _Block(batch.captions, c0, c1, with_gram=options.i2t, with_norms=options.t2i)
        for i0, i1 in batch.image_blocks:
            images = _Block(batch.images, i0, i1, with_gram=options.t2i, with_norms=options.i2t)
            out = scores[i0:i1, c0:c1]
            products, turned = batch.products(images, captions, options)
            if products is not None:
                _epilogue(products, images, captions, options, out, accumulate=False)
            if turned is not None:
                _epilogue(turned, captions, images, options, out.t(), accumulate=options.t2i)
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
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the inputs; accumulation in float32."""
    batch = _Batch(regions, words, word_counts, region_counts, options, workspace_bytes, backward=True)
    grad_scores = grad_scores.to(torch.float32)
    grad_regions, grad_words = batch.images.gradient(), batch.captions.gradient()
    for c0, c1 in batch.caption_blocks:
        captions = _Block(batch.captions, c0, c1, with_gram=options.i2t, with_norms=options.t2i)
        of_captions = batch.captions.view_of(grad_words, c0, c1)
        direct = of_captions is not None
        if of_captions is None:
            of_captions = batch.words_gradient(captions.rows)
        for i0, i1 in batch.image_blocks:
            images = _Block(batch.images, i0, i1, with_gram=options.t2i, with_norms=options.i2t)
            grad_products = _backward_block(batch, images, captions, options, grad_scores[i0:i1, c0:c1])
            of_images = batch.images.view_of(grad_regions, i0, i1)
            if of_images is None:
                rows = _floats(*images.rows.shape)
                _add_product(rows, grad_products, captions.rows, first=True)
                images.add_own_gradient(rows)
                batch.images.put(grad_regions, i0, i1, rows, add=c0 > 0)
                del rows
            else:
                _add_product(of_images, grad_products, captions.rows, first=c0 == 0)
                images.add_own_gradient(of_images)
            _add_product(of_captions, grad_products.t(), images.rows, first=i0 == 0)
            captions.add_own_gradient(of_captions)
            del images, of_images  # before the next block's are made, not after
        if not direct:
            batch.captions.put(grad_words, c0, c1, of_captions, add=False)
        del captions, of_captions
    return grad_regions.to(regions.dtype), grad_words.to(words.dtype)


def _backward_block(
    batch: _Batch, images: _Block, captions: _Block, options: ScoreOptions, grad_scores: Tensor
) -> Tensor:  # [rows of regions, words]: dS
    products, turned = batch.products(images, captions, options)
    if products is not None:
        _epilogue_backward(products, images, captions, options, grad_scores)
    if turned is not None:
        _epilogue_backward(turned, captions, images, options, grad_scores.t())
    if products is None:
        assert turned is not None
        return turned.t()
    return products if turned is None else products.add_(turned.t())


def _epilogue(
    products: Tensor, keys: _Block, queries: _Block, options: ScoreOptions, scores: Tensor, *, accumulate: bool
) -> None:
    torch.ops.itm_kernels_native.cross_attention_scores_epilogue(
        products, keys.gram, keys.offsets, queries.offsets, queries.norms, *options.codes(), accumulate, scores
    )


def _epilogue_backward(
    products: Tensor, keys: _Block, queries: _Block, options: ScoreOptions, grad_scores: Tensor
) -> None:
    assert keys.gram is not None
    grad_gram = torch.empty_like(keys.gram)
    grad_norms = _floats(keys.gram.shape[0], products.shape[1])
    torch.ops.itm_kernels_native.cross_attention_scores_epilogue_backward(
        products, keys.gram, keys.offsets, queries.offsets, queries.norms, *options.codes(), grad_scores, grad_gram,
        grad_norms,
    )  # fmt: skip
    keys.grad_gram, queries.grad_norms = grad_gram, grad_norms.sum(0)


def _floats(*shape: int) -> Tensor:
    """Fresh memory, whatever the default dtype and device are set to."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _add_product(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """``out = left @ right``, or ``+=``; in float32 whatever the operands are."""
    if left.dtype != torch.float32:
        product = left @ right
        out.copy_(product) if first else out.add_(product)
    elif first:
        torch.mm(left, right, out=out)
    else:
        out.addmm_(left, right)


@dataclass
class _Block:
    """Some groups of one side: rows, and what a direction needs of them as keys (Gram) or queries (norms)."""

    rows: Tensor  # [n, D]
    offsets: Tensor  # [groups + 1]
    gram: Tensor | None = None  # [groups, K, K] float32
    norms: Tensor | None = None  # [n] float32
    grad_gram: Tensor | None = None
    grad_norms: Tensor | None = None  # [n]

    def __init__(self, side: Packed, start: int, stop: int, *, with_gram: bool, with_norms: bool) -> None:
        self.rows, self.offsets = side.rows(start, stop), side.offsets_of(start, stop)
        if with_gram:
            self.gram = _floats(stop - start, side.most, side.most)
            torch.ops.itm_kernels_native.gram(self.rows, self.offsets, self.gram)
        if with_norms:
            self.norms = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float32)

    def add_own_gradient(self, gradient: Tensor) -> None:  # [n, D]
        """What reaches the rows through their own Gram matrices and norms."""
        if self.grad_gram is not None:
            torch.ops.itm_kernels_native.gram_backward(self.grad_gram, self.rows, self.offsets, gradient)
        if self.grad_norms is not None:
            assert self.norms is not None
            # On the floor of the cosine the gradient is zero; so is it where the norm is.
            scale = torch.where(self.norms > 0, self.grad_norms / self.norms, 0.0)
            gradient.addcmul_(self.rows.to(gradient.dtype), scale[:, None])


class _Batch:
    """Both sides packed, the plan, and one buffer that every block's products use in turn."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        options: ScoreOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        # float16 has no fast product on most CPUs and loses nothing in float32.
        self.dtype = torch.bfloat16 if regions.dtype == torch.bfloat16 else torch.float32
        self.images = Packed(regions, region_counts, self.dtype)
        self.captions = Packed(words, word_counts, self.dtype)
        plan = host().plan_scores(
            self.images.bounds,
            self.captions.bounds,
            regions.shape[2],
            element_bytes=self.dtype.itemsize,
            t2i=options.t2i,
            i2t=options.i2t,
            backward=backward,
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

    def products(
        self, images: _Block, captions: _Block, options: ScoreOptions
    ) -> tuple[Tensor | None, Tensor | None]:  # [rows of regions, words], [words, rows of regions]
        """S with keys as rows: as it is for t2i, turned for i2t; one library product either way."""
        rows, words = images.rows.shape[0], captions.rows.shape[0]
        products = turned = None
        if options.t2i:
            products = torch.mm(images.rows, captions.rows.t(), out=self._buffer("products", rows, words, self.dtype))
        if options.i2t:
            turned = self._buffer("turned", words, rows, self.dtype)
            if products is None:
                torch.mm(captions.rows, images.rows.t(), out=turned)
            else:
                turned.copy_(products.t())
        return products, turned

    def words_gradient(self, rows: Tensor) -> Tensor:
        return self._buffer("words", rows.shape[0], rows.shape[1], torch.float32)
