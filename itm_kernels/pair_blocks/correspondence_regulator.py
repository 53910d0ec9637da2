"""``correspondence_regulator`` on a GPU, block by block: alignment vectors to the next step's attention.

Gates are the size of the vectors of a pair: those of the steps before are made again from their hidden layers, in a
chain that leads to this step's. A backward walks that chain back; gates pass on the gradient of the gate, one step to
the one before, in one array. Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions
from itm_kernels.pair_blocks import correspondence
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.parameters import at_step, like, rounded, zeros_of
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.rows import Side
from itm_kernels.pair_blocks.stage_places import Place
from itm_kernels.pair_blocks.steps import Steps


class Inputs(NamedTuple):
    """What the next attention is made from."""

    alignments: Tensor  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    hidden: Tensor | None  # [steps before, .., H]; None: this is the first
    temperatures: Tensor | None  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    word_offsets: Tensor | None = None  # [C + 1]


class Gradients(NamedTuple):
    """Of the three outputs."""

    scores: Tensor
    temperatures: Tensor
    hidden: Tensor


def forward(
    steps: Steps,
    inputs: Inputs,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [.., H] float32
    """Attention scores, temperatures and hidden layer; zeros for what does not count."""
    regions = inputs.regions
    with on_device(regions.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes, backward=False)
        queries = inputs.alignments.shape[:-1]
        layer = *queries, parameters.hidden_bias.shape[1]
        scores, temperatures, hidden = (
            regions.new_zeros(shape, dtype=torch.float32)
            for shape in ((*regions.shape[:2], *inputs.words.shape[:-1]), queries, layer)
        )
        for block, groups, segments in batch.blocks.forward_blocks():
            stage = _Stage(batch, Place(block, batch.blocks, groups, segments, options.t2i))
            place = stage.place
            place.put_products(scores, block.products_with(stage.gates[-1].gated))
            place.put_queries(temperatures, stage.warmed[0])
            place.put_queries(hidden, stage.hidden[-1])
            del block, stage, place  # before the next block's rows are made, not after
        return scores, temperatures, hidden


def backward(
    steps: Steps,
    upstream: Gradients,
    inputs: Inputs,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.regions.device):
        batch = _Batch(steps, inputs, parameters, options, workspace_bytes, backward=True)
        grads = zeros_of(parameters)
        of_queries, of_keys = batch.blocks.queries.gradient(), batch.blocks.keys.gradient()
        of_alignments, of_hidden, of_temperatures = (
            None if given is None else torch.zeros_like(given, memory_format=torch.contiguous_format)
            for given in (inputs.alignments, inputs.hidden, inputs.temperatures)
        )
        assert of_alignments is not None
        for block, groups, segments in batch.blocks.backward_blocks(of_queries, of_keys):
            stage = _Stage(batch, Place(block, batch.blocks, groups, segments, options.t2i))
            grad_vectors = stage.backward(upstream, grads, of_hidden, of_temperatures)
            stage.place.put_queries(of_alignments, grad_vectors)
            del block, stage, grad_vectors
        of_regions, of_words = (of_keys, of_queries) if options.t2i else (of_queries, of_keys)
        of_sides = of_regions.to(inputs.regions.dtype), of_words.to(inputs.words.dtype)
        return of_alignments, *of_sides, like(grads, parameters), of_hidden, of_temperatures


class _Batch:
    """The parameters as the products want them, and the blocks."""

    def __init__(
        self,
        steps: Steps,
        inputs: Inputs,
        parameters: CorrespondenceParameters,
        options: CorrespondenceOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.inputs, self.options = inputs, options
        images = Side(inputs.regions, inputs.region_counts, what="region_counts")
        captions = Side(inputs.words, inputs.word_counts, offsets=inputs.word_offsets, what="word_counts")
        self.parameters = rounded(parameters, inputs.regions.dtype)
        element, width = inputs.regions.element_size(), inputs.regions.shape[2]
        self.blocks = PairBlocks(
            steps,
            *((captions, images) if options.t2i else (images, captions)),
            row_bytes=_row_bytes(parameters, options, width, element, backward=backward),
            matrices=8 + 2 * element,  # products, read and rounded, or made and on their way
            workspace_bytes=workspace_bytes,
            backward=backward,
        )


def _row_bytes(
    parameters: CorrespondenceParameters, options: CorrespondenceOptions, width: int, element: int, *, backward: bool
) -> int:
    """What a block takes for one row, without what grows with its keys."""
    s, before = parameters.hidden_weight.shape[2], options.step
    hidden, of_temperature = parameters.hidden_bias.shape[1], parameters.temperature_hidden_bias.shape[1]
    narrow = s * (8 + element) + hidden * (8 + element) + of_temperature * 4 + 32
    if not backward:
        return width * element * (3 if before else 1) + narrow
    kept = before * (2 * width + hidden) * element  # tangents and gates, hidden layers
    passing = width * (3 * element + (4 if before else 0))  # tangents, gated queries, their gradient; of the gates
    return kept + passing + narrow + (s + hidden) * (4 + element) + of_temperature * (4 + element) + 32


class _Stage:
    """The stage on one block, and back."""

    def __init__(self, batch: _Batch, place: Place) -> None:
        self.batch, self.place = batch, place
        block, inputs, options = place.block, batch.inputs, batch.options
        self.vectors = place.queries(inputs.alignments).to(block.dtype)
        self.gates: list[correspondence.Gate] = []
        self.hidden: list[Tensor] = []  # beside the gates
        for step in range(options.step):
            assert inputs.hidden is not None
            self._gate(place.queries(inputs.hidden[step]).to(block.dtype), step)
        self._gate(correspondence.hide(block, self.vectors, self.of_step), options.step)
        before = None if inputs.temperatures is None else place.queries(inputs.temperatures)
        self.warmed = correspondence.warm(block, self.vectors, before, options.temperature, self.of_step)

    @property
    def of_step(self) -> CorrespondenceParameters:
        return at_step(self.batch.parameters, self.batch.options.step)

    def _gate(self, hidden: Tensor, step: int) -> None:
        """One more link of the chain; of the links before a backward alone asks."""
        block, last = self.place.block, step == self.batch.options.step
        before = self.gates[-1].gates if self.gates else None
        if not block.keeps:
            self.gates.clear()
            self.hidden.clear()
        made = correspondence.make_gate(block, hidden, before, at_step(self.batch.parameters, step), last=last)
        self.gates.append(made if last else made._replace(gated=hidden.new_empty(0)))
        self.hidden.append(hidden)

    def backward(
        self,
        upstream: Gradients,
        grads: CorrespondenceParameters,  # of all steps, added to
        of_hidden: Tensor | None,
        of_temperatures: Tensor | None,
    ) -> Tensor:  # [rows, S] float32
        """Gradient of the alignment vectors; all others are put where they belong."""
        place, step = self.place, self.batch.options.step
        block, of_step = place.block, at_step(grads, step)
        made, layer = self.gates.pop(), self.hidden.pop()
        grad_gates = block.floats(block.rows, block.width).zero_() if step else None
        grad_gated = correspondence.gated_backward(block, made, place.products(upstream.scores).to(block.dtype))
        after = correspondence.gate_backward(block, made, layer, grad_gated, grad_gates, self.of_step, of_step)
        after.add_(place.queries(upstream.hidden))
        grad_vectors = correspondence.hide_backward(block, layer, self.vectors, after, self.of_step, of_step)
        grad_temperatures = correspondence.warm_backward(
            block, self.warmed, self.vectors, place.queries(upstream.temperatures), self.of_step, of_step, grad_vectors
        )
        if of_temperatures is not None:
            place.put_queries(of_temperatures, grad_temperatures)
        del made, layer, after
        for earlier in reversed(range(step)):
            assert of_hidden is not None
            made, layer = self.gates.pop(), self.hidden.pop()
            nothing = grad_gated.zero_()  # the gate alone of an earlier step is used
            parameters = at_step(self.batch.parameters, earlier), at_step(grads, earlier)
            grad_hidden = correspondence.gate_backward(block, made, layer, nothing, grad_gates, *parameters)
            place.put_queries(of_hidden[earlier], grad_hidden)
        return grad_vectors
