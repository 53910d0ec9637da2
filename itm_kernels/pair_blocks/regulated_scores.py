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
from itm_kernels.pair_blocks.parameters import rounded
from itm_kernels.pair_blocks.regulated_scorer import Gradients, RegulatedScorer
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
        parameters = rounded(parameters, regions.dtype)
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
        given, grads = parameters, Gradients.zeros_of(parameters)
        grad_regions, grad_words = images.gradient(), captions.gradient()
        sides = (grad_words, grad_regions) if options.t2i else (grad_regions, grad_words)
        parameters = rounded(parameters, regions.dtype)
        for block, groups, segments in blocks.backward_blocks(*sides):
            scorer = RegulatedScorer(block, parameters, options)
            scorer.run()
            scorer.backward(of_groups[groups, segments].clone(memory_format=torch.contiguous_format), grads)
            del block, scorer
        return grad_regions.to(regions.dtype), grad_words.to(words.dtype), grads.of(given)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sides(
    regions: Tensor, words: Tensor, word_counts: Tensor, region_counts: Tensor | None, word_offsets: Tensor | None
) -> tuple[Side, Side]:
    images = Side(regions, region_counts, what="region_counts")
    return images, Side(words, word_counts, offsets=word_offsets, what="word_counts")


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
    row_bytes, pair_bytes = _bytes(parameters, options, queries.width, element, backward=backward)
    return PairBlocks(
        steps,
        queries,
        keys,
        row_bytes=row_bytes,
        pair_bytes=pair_bytes,
        matrices=made * (8 + element) + (4 if backward else 4 + element),
        workspace_bytes=workspace_bytes,
        backward=backward,
    )


def _bytes(
    parameters: RegulatedParameters, options: RegulatedOptions, width: int, element: int, *, backward: bool
) -> tuple[int, int]:
    """What a block takes for one row, without what grows with its keys, and for one pair."""
    s = hidden = narrow = 0
    if parameters.alignment is not None:
        s = parameters.alignment.bias.shape[1]
    if parameters.correspondence is not None:
        hidden = parameters.correspondence.hidden_bias.shape[1]
        narrow = parameters.correspondence.temperature_hidden_bias.shape[1]
    copied = element if element < 4 else 0  # float32 rows need no second copy
    of_pair = 40 * s if options.aggregations else 12  # ten vectors
    chained = options.corrections > 1  # from gate to gate
    wide, vectors, gates = width * element, s * (4 + copied), hidden * (4 + copied) + narrow * (4 + copied)
    if not backward:
        # What is attended to and its squares, or gated queries; before them the gates that are handed on.
        return wide * (2 + chained) + vectors + max(s * 4, gates) + 32, of_pair
    of_step = wide + vectors + (4 * s if options.regulator == "rcar" else 0)
    of_correction = wide * (2 + chained) + hidden * element + 4 * narrow
    kept = options.alignments * of_step + options.corrections * of_correction
    kept += 4 * s * options.aggregations if options.regulator == "rar" else 0
    # On the way back: squares and the gradient of the vectors; or that of gates, when the step above is gone.
    aligning, correcting = wide + vectors + s * element, wide + 4 * s + gates
    if options.corrections < options.alignments:
        correcting -= of_step
    if options.regulator == "rcr":
        kept += wide  # attends once more
    kept += 4 * width if chained else 0  # the gradient of the gates
    return kept + max(aligning, correcting) + 32 * (options.alignments + 1), of_pair * (1 + options.aggregations)
