"""``alignment_vectors`` on the CPU, chunk by chunk: attention, what it attends to, and how the query differs.

A backward makes the attention of a chunk again, from the products or the scores that were given for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import alignment
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import at_step, like, operand_dtype, rounded, zeros_of
from itm_kernels.native.cpu.stage_places import Place
from itm_kernels.native.packing import Packed
from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions


class Inputs(NamedTuple):
    """What is aligned, and how it attends."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    attention_scores: Tensor | None  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options


def forward(
    inputs: Inputs, parameters: AlignmentParameters, options: AlignmentOptions, *, workspace_bytes: int
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S] float32
    """Alignment vectors; zeros for what does not count."""
    batch = _Batch(inputs, parameters, options, workspace_bytes, backward=False)
    images, regions, _ = inputs.regions.shape
    queries = inputs.words.shape[:-1] if options.t2i else (regions, inputs.word_counts.shape[0])
    made = torch.zeros(images, *queries, parameters.bias.shape[1], dtype=torch.float32, device="cpu")
    for chunk in batch.chunks.every():
        batch.place(chunk).put_queries(made, batch.align(chunk)[1].vectors)
    return made


def backward(
    grad: Tensor,
    inputs: Inputs,
    parameters: AlignmentParameters,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs."""
    batch = _Batch(inputs, parameters, options, workspace_bytes, backward=True)
    grads, of_step = zeros_of(parameters), at_step(batch.parameters, 0)
    sides = batch.chunks.queries, batch.chunks.keys
    grad_queries, grad_keys = (torch.zeros(side.shape, dtype=torch.float32, device="cpu") for side in sides)
    scores, temperatures = inputs.attention_scores, inputs.temperatures
    of_scores, of_temperatures = (
        None if given is None else torch.zeros(given.shape, dtype=given.dtype, device="cpu")
        for given in (scores, temperatures)
    )
    for chunk in batch.chunks.every_backward(grad_queries, grad_keys):
        place = batch.place(chunk)
        attention, aligned = batch.align(chunk)
        grad_attended = alignment.align_backward(chunk, aligned, place.queries(grad), of_step, at_step(grads, 0))
        grad_weights = alignment.attended_backward(chunk, attention, grad_attended)
        grad_products, of_rows = alignment.attend_backward(chunk, attention, options.temperature, grad_weights)
        if of_temperatures is not None:
            place.put_queries(of_temperatures, of_rows)
        if of_scores is None:
            chunk.plain_products_backward(grad_products)
        else:
            place.put_products(of_scores, grad_products)
    of_regions, of_words = (grad_keys, grad_queries) if options.t2i else (grad_queries, grad_keys)
    of_sides = of_regions.to(inputs.regions.dtype), of_words.to(inputs.words.dtype)
    return *of_sides, like(grads, parameters), of_scores, of_temperatures


class _Batch:
    """Both sides packed, the parameters as the products want them, and the chunks."""

    def __init__(
        self,
        inputs: Inputs,
        parameters: AlignmentParameters,
        options: AlignmentOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.inputs, self.options = inputs, options
        given = inputs.regions.dtype
        dtype = operand_dtype(given)
        images = Packed(inputs.regions, inputs.region_counts, dtype)
        captions = Packed(inputs.words, inputs.word_counts, dtype)
        self.parameters = rounded(parameters, given)
        width, s = inputs.regions.shape[2], parameters.bias.shape[1]
        wide = (2 if backward else 1) * width * dtype.itemsize + (4 * width if dtype.itemsize == 2 else 0)
        self.chunks = Chunks(
            *((captions, images) if options.t2i else (images, captions)),
            row_bytes=wide + s * (dtype.itemsize + (12 if backward else 8)) + 32,
            matrices=6 if backward else 4,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )

    def place(self, chunk: Chunk) -> Place:
        return Place(chunk, self.chunks.queries, self.chunks.keys, self.options.t2i)

    def align(self, chunk: Chunk) -> tuple[alignment.Attention, alignment.Aligned]:
        """The stage on one chunk."""
        place, scores, temperatures = self.place(chunk), self.inputs.attention_scores, self.inputs.temperatures
        products = chunk.plain_products() if scores is None else place.products(scores)
        of_rows = None if temperatures is None else place.queries(temperatures)
        weights = chunk.workspace.take("weights", *products.shape)
        attention = alignment.attend(chunk, products, of_rows, self.options.temperature, weights)
        attended = alignment.attended(chunk, attention, 0)
        return attention, alignment.align(chunk, attended, at_step(self.parameters, 0), 0)
