"""``correspondence_regulator`` on the CPU, chunk by chunk: the gate, what the gated queries ask, and temperatures.

The gates of the steps before are made again from the hidden layers that the state brings. In a backward they pass on
the gradient of the gate, one step to the one before, in one array.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import correspondence
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import at_step, like, operand_dtype, rounded, zeros_of
from itm_kernels.native.cpu.stage_places import Place
from itm_kernels.native.packing import Packed
from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions


class Inputs(NamedTuple):
    """What the next attention is made from."""

    alignments: Tensor  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    hidden: Tensor | None  # [steps before, .., H]; None: this is the first
    temperatures: Tensor | None  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options


class Gradients(NamedTuple):
    """Of the three outputs."""

    scores: Tensor
    temperatures: Tensor
    hidden: Tensor


def forward(
    inputs: Inputs, parameters: CorrespondenceParameters, options: CorrespondenceOptions, *, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [.., H] float32
    """Attention scores, temperatures and hidden layer; zeros for what does not count."""
    batch = _Batch(inputs, parameters, options, workspace_bytes, backward=False)
    queries = inputs.alignments.shape[:-1]
    shapes = (*inputs.regions.shape[:2], *inputs.words.shape[:-1]), queries, (*queries, parameters.hidden_bias.shape[1])
    scores, temperatures, hidden = (torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    for chunk in batch.chunks.every():
        stage = _Stage(batch, chunk)
        place = stage.place
        place.put_queries(hidden, stage.gates[-1].hidden)
        place.put_queries(temperatures, stage.temperatures.values)
        place.put_products(scores, chunk.products_with(stage.gates[-1].gated, "gated products"))
    return scores, temperatures, hidden


def backward(
    upstream: Gradients,
    inputs: Inputs,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs."""
    batch = _Batch(inputs, parameters, options, workspace_bytes, backward=True)
    grads = zeros_of(parameters)
    sides = batch.chunks.queries, batch.chunks.keys
    grad_queries, grad_keys = (torch.zeros(side.shape, dtype=torch.float32, device="cpu") for side in sides)
    of_alignments, of_hidden, of_temperatures = (
        None if given is None else torch.zeros(given.shape, dtype=given.dtype, device="cpu")
        for given in (inputs.alignments, inputs.hidden, inputs.temperatures)
    )
    assert of_alignments is not None
    for chunk in batch.chunks.every_backward(grad_queries, grad_keys):
        stage = _Stage(batch, chunk)
        grad_vectors = stage.backward(upstream, grads, of_hidden, of_temperatures)
        stage.place.put_queries(of_alignments, grad_vectors)
    of_regions, of_words = (grad_keys, grad_queries) if options.t2i else (grad_queries, grad_keys)
    of_sides = of_regions.to(inputs.regions.dtype), of_words.to(inputs.words.dtype)
    return of_alignments, *of_sides, like(grads, parameters), of_hidden, of_temperatures


class _Batch:
    """Both sides packed, the parameters as the products want them, and the chunks."""

    def __init__(
        self,
        inputs: Inputs,
        parameters: CorrespondenceParameters,
        options: CorrespondenceOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.inputs, self.options = inputs, options
        given = inputs.regions.dtype
        self.dtype = dtype = operand_dtype(given)
        images = Packed(inputs.regions, inputs.region_counts, dtype)
        captions = Packed(inputs.words, inputs.word_counts, dtype)
        self.parameters = rounded(parameters, given)
        self.chunks = Chunks(
            *((captions, images) if options.t2i else (images, captions)),
            row_bytes=_row_bytes(parameters, options, inputs.regions.shape[2], dtype.itemsize, backward=backward),
            matrices=5 if backward else 3,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )


def _row_bytes(
    parameters: CorrespondenceParameters, options: CorrespondenceOptions, width: int, itemsize: int, *, backward: bool
) -> int:
    """What the buffers of a chunk take for one row, without what grows with its keys."""
    s, before = parameters.hidden_weight.shape[2], options.step
    hidden, of_temperature = parameters.hidden_bias.shape[1], parameters.temperature_hidden_bias.shape[1]
    widened = 4 * width if itemsize == 2 else 0  # what a product in float32 takes
    narrow = (s + hidden) * (itemsize + 8) + 4 * of_temperature + 32
    if not backward:
        return width * (itemsize + (4 if before else 0)) + narrow + hidden * (itemsize + 4) + widened
    kept = (before + 3) * width + (before + 2) * hidden  # tangents, gated queries and their gradient, hidden layers
    gates = 4 * width * (before + 1) if before else 0
    return kept * itemsize + gates + 2 * narrow + widened


class _Stage:
    """The stage on one chunk, and back."""

    def __init__(self, batch: _Batch, chunk: Chunk) -> None:
        self.batch, self.chunk = batch, chunk
        inputs, options = batch.inputs, batch.options
        self.place = Place(chunk, batch.chunks.queries, batch.chunks.keys, options.t2i)
        self.vectors = self.place.queries(inputs.alignments).to(batch.dtype)
        self.gates: list[correspondence.Gate] = []
        for step in range(options.step):
            assert inputs.hidden is not None
            self._gate(self.place.queries(inputs.hidden[step]).to(batch.dtype), step)
        hidden = correspondence.hide(chunk, self.vectors, self.of_step, options.step)
        self._gate(hidden, options.step)
        before = options.temperature if inputs.temperatures is None else self.place.queries(inputs.temperatures)
        self.temperatures = correspondence.warm(chunk, self.vectors, before, self.of_step, options.step)

    @property
    def of_step(self) -> CorrespondenceParameters:
        return at_step(self.batch.parameters, self.batch.options.step)

    def _gate(self, hidden: Tensor, step: int) -> None:
        before = self.gates[-1].gates if self.gates else None
        of_step, last = at_step(self.batch.parameters, step), step == self.batch.options.step
        made = correspondence.make_gate(self.chunk, hidden, before, of_step, step, last=last, asks=last)
        self.gates.append(made)

    def backward(
        self,
        upstream: Gradients,
        grads: CorrespondenceParameters,  # of all steps, added to
        of_hidden: Tensor | None,
        of_temperatures: Tensor | None,
    ) -> Tensor:  # [rows, S] float32
        """Gradient of the alignment vectors; all others are put where they belong."""
        chunk, place, step = self.chunk, self.place, self.batch.options.step
        of_step = at_step(grads, step)
        grad_vectors = chunk.workspace.floats("grad vectors", *self.vectors.shape).zero_()
        grad_gates = chunk.workspace.floats("grad gates", *self.gates[-1].gated.shape).zero_() if step else None
        grad_gated = correspondence.gated_backward(chunk, self.gates[-1], place.products(upstream.scores))
        grad_hidden = correspondence.gate_backward(chunk, self.gates[-1], grad_gated, grad_gates, self.of_step, of_step)
        grad_hidden.add_(place.queries(upstream.hidden))
        of_network = self.of_step, of_step, grad_vectors
        correspondence.hide_backward(chunk, self.gates[-1].hidden, self.vectors, grad_hidden, *of_network)
        grad_temperatures = correspondence.warm_backward(
            chunk, self.temperatures, self.vectors, place.queries(upstream.temperatures), *of_network
        )
        if of_temperatures is not None:
            place.put_queries(of_temperatures, grad_temperatures)
        for earlier in reversed(range(step)):
            assert of_hidden is not None
            nothing = chunk.wide().zero_()  # the gate alone of an earlier step is used
            parameters = at_step(self.batch.parameters, earlier), at_step(grads, earlier)
            layer = correspondence.gate_backward(chunk, self.gates[earlier], nothing, grad_gates, *parameters)
            place.put_queries(of_hidden[earlier], layer)
        return grad_vectors
