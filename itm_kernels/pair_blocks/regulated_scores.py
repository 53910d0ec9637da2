"""``regulated_scores`` on a GPU: library products around a floor's kernels, every stage of a block, then the next.

A backward runs a block's stages again, each keeping what its own backward reads, and then these in reverse; the
gradients of regions, words and parameters add up in float32, in the order of the blocks. Steps of a scorer:

    products -> attention -> alignment vectors -> (RCR: products of the next step) -> (RAR: pooled vectors) -> score

Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import RegulatedParameters
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.regulated_scorer import RegulatedScorer
from itm_kernels.pair_blocks.rows import Side
from itm_kernels.pair_blocks.steps import Steps


def forward(
    steps: Steps,
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    with on_device(regions.device):
        images, captions = _sides(regions, words, word_counts, region_counts, word_offsets)
        blocks = _blocks(steps, images, captions, parameters, options, workspace_bytes, backward=False)
        scores = regions.new_empty(regions.shape[0], word_counts.shape[0], dtype=torch.float32)
        of_groups = scores if options.t2i else scores.t()
        parameters = _rounded(parameters, regions.dtype)
        for block, groups, segments in blocks.forward_blocks():
            of_groups[groups, segments] = RegulatedScorer(block, parameters, options).forward()
            del block  # before the next block's rows are made, not after
        return scores


def backward(
    steps: Steps,
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(regions.device):
        images, captions = _sides(regions, words, word_counts, region_counts, word_offsets)
        blocks = _blocks(steps, images, captions, parameters, options, workspace_bytes, backward=True)
        grad_scores = grad_scores.to(torch.float32)
        of_groups = grad_scores if options.t2i else grad_scores.t()
        given = parameters.flat()
        grads = RegulatedParameters.of([None if p is None else torch.zeros_like(p, dtype=torch.float32) for p in given])
        grad_regions, grad_words = images.gradient(), captions.gradient()
        sides = (grad_words, grad_regions) if options.t2i else (grad_regions, grad_words)
        parameters = _rounded(parameters, regions.dtype)
        for block, groups, segments in blocks.backward_blocks(*sides):
            scorer = RegulatedScorer(block, parameters, options)
            scorer.forward()
            scorer.backward(of_groups[groups, segments].contiguous(), grads)
            del block, scorer
        narrowed = [
            None if grad is None or p is None else grad.to(p.dtype) for grad, p in zip(grads.flat(), given, strict=True)
        ]
        return grad_regions.to(regions.dtype), grad_words.to(words.dtype), RegulatedParameters.of(narrowed)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sides(
    regions: Tensor, words: Tensor, word_counts: Tensor, region_counts: Tensor | None, word_offsets: Tensor | None
) -> tuple[Side, Side]:
    images = Side(regions, region_counts, what="region_counts")
    return images, Side(words, word_counts, offsets=word_offsets, what="word_counts")


def _rounded(parameters: RegulatedParameters, dtype: torch.dtype) -> RegulatedParameters:
    """Matrices, ``[steps, rows, columns]``, in the dtype of the inputs; vectors wide."""
    return RegulatedParameters.of(
        [None if p is None else p.to(dtype if p.dim() == 3 else torch.float32).contiguous() for p in parameters.flat()]
    )


def _blocks(
    steps: Steps,
    images: Side,
    captions: Side,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    workspace_bytes: int,
    *,
    backward: bool,
) -> PairBlocks:
    queries, keys = (captions, images) if options.t2i else (images, captions)
    element = queries.vectors.element_size()
    # Products, their norms (at most one a row) and weights, and the gradient on its way; kept of every step.
    made = options.alignments + 1 if backward else 1
    return PairBlocks(
        steps,
        queries,
        keys,
        row_bytes=_row_bytes(parameters, options, queries.width, element, backward=backward),
        matrices=made * (8 + element) + (4 if backward else 4 + element),
        workspace_bytes=workspace_bytes,
        backward=backward,
    )


def _row_bytes(
    parameters: RegulatedParameters, options: RegulatedOptions, width: int, element: int, *, backward: bool
) -> int:
    """What a block takes for one row, without what grows with its keys."""
    s = hidden = narrow = 0
    if parameters.alignment is not None:
        s = parameters.alignment.bias.shape[1]
    if parameters.correspondence is not None:
        hidden = parameters.correspondence.hidden_bias.shape[1]
        narrow = parameters.correspondence.temperature_hidden_bias.shape[1]
    rounded = element if element < 4 else 0  # float32 rows need no second copy
    pairs = 40 * s if options.aggregations else 12  # ten vectors a pair, which may be a single row
    chained = options.corrections > 1  # from gate to gate
    if not backward:
        return width * element * (2 + chained) + s * (8 + rounded) + (hidden + narrow) * (4 + rounded) + pairs + 32
    kept = width * element * (options.alignments + 1 + options.corrections * (2 + chained))
    kept += options.alignments * s * (4 + rounded) + options.aggregations * (4 * s + pairs)
    kept += options.corrections * (hidden * element + 4 * narrow)
    passing = width * (2 * element + 4 * chained) + s * (8 + 2 * rounded) + (hidden + narrow) * (4 + rounded)
    return kept + passing + pairs + 32 * (options.alignments + 1)
