"""``alignment_vectors`` on a GPU, block by block: attention, what it attends to, and how the query differs.

A backward makes the attention of a block again, from the products or the scores that were given for them. Sums run in
one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions
from itm_kernels.pair_blocks import alignment
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.parameters import at_step, like, rounded, zeros_of
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.rows import Side
from itm_kernels.pair_blocks.stage_places import Place
from itm_kernels.pair_blocks.steps import Steps


class Inputs(NamedTuple):
    """What is aligned, and how it attends."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    attention_scores: Tensor | None  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    word_offsets: Tensor | None = None  # [C + 1]


def forward(
    steps: Steps, inputs: Inputs, parameters: AlignmentParameters, options: AlignmentOptions, *, workspace_bytes: int
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S] float32
    """Alignment vectors; zeros for what does not count."""
    regions, words = inputs.regions, inputs.words
    with on_device(regions.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes, backward=False)
        queries = words.shape[:-1] if options.t2i else (regions.shape[1], inputs.word_counts.shape[0])
        made = regions.new_zeros(regions.shape[0], *queries, parameters.bias.shape[1], dtype=torch.float32)
        for block, groups, segments in batch.blocks.forward_blocks():
            place = Place(block, batch.blocks, groups, segments, options.t2i)
            place.put_queries(made, batch.align(place)[1].vectors)
            del block, place  # before the next block's rows are made, not after
        return made


def backward(
    steps: Steps,
    grad: Tensor,
    inputs: Inputs,
    parameters: AlignmentParameters,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.regions.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes, backward=True)
        grads, of_step = zeros_of(parameters), at_step(batch.parameters, 0)
        of_queries, of_keys = batch.blocks.queries.gradient(), batch.blocks.keys.gradient()
        of_scores, of_temperatures = (
            None if given is None else torch.zeros_like(given, memory_format=torch.contiguous_format)
            for given in (inputs.attention_scores, inputs.temperatures)
        )
        for block, groups, segments in batch.blocks.backward_blocks(of_queries, of_keys):
            place = Place(block, batch.blocks, groups, segments, options.t2i)
            attention, aligned = batch.align(place)
            upstream = place.queries(grad)
            grad_attended = alignment.align_backward(block, aligned, upstream, of_step, at_step(grads, 0))
            del aligned, upstream
            grad_products, of_rows = alignment.attend_backward(block, attention, options.temperature, grad_attended)
            if of_temperatures is not None:
                place.put_queries(of_temperatures, of_rows)
            if of_scores is None:
                block.plain_products_backward(grad_products)
            else:
                place.put_products(of_scores, grad_products)
            del block, place, attention, grad_attended, grad_products, of_rows
        of_regions, of_words = (of_keys, of_queries) if options.t2i else (of_queries, of_keys)
        of_sides = of_regions.to(inputs.regions.dtype), of_words.to(inputs.words.dtype)
        return *of_sides, like(grads, parameters), of_scores, of_temperatures


class _Batch:
    """The parameters as the products want them, and the blocks."""

    def __init__(
        self,
        steps: Steps,
        inputs: Inputs,
        parameters: AlignmentParameters,
        options: AlignmentOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.inputs, self.options = inputs, options
        images = Side(inputs.regions, inputs.region_counts, what="region_counts")
        captions = Side(inputs.words, inputs.word_counts, offsets=inputs.word_offsets, what="word_counts")
        self.parameters = rounded(parameters, inputs.regions.dtype)
        element, width, s = inputs.regions.element_size(), inputs.regions.shape[2], parameters.bias.shape[1]
        # Attended vectors and squares; alignment vectors, rounded and on their way to or from their place.
        of_vectors = s * (12 + element) + (s * (4 + element) if backward else 0)
        self.blocks = PairBlocks(
            steps,
            *((captions, images) if options.t2i else (images, captions)),
            row_bytes=2 * width * element + of_vectors + 64,
            # Products, their norms (at most one a row) and weights; given scores on their way; a gradient of weights.
            matrices=8 + element + (8 if inputs.attention_scores is not None else 0) + (4 if backward else 0),
            workspace_bytes=workspace_bytes,
            backward=backward,
        )

    def align(self, place: Place) -> tuple[alignment.Attention, alignment.Aligned]:
        """The stage on one block."""
        block, scores, temperatures = place.block, self.inputs.attention_scores, self.inputs.temperatures
        products = block.plain_products() if scores is None else place.products(scores)
        of_rows = None if temperatures is None else place.queries(temperatures)
        attention = alignment.attend(block, products, of_rows, self.options.temperature)
        return attention, alignment.align(block, attention.attended, at_step(self.parameters, 0))
