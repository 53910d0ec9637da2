"""``similarity_reasoning_scores`` on the CPU: every stage of SGRAF on one chunk of pairs, then the next chunk.

A backward runs a chunk's stages again and then these in reverse; gradients add up in float32, in the order of the
chunks. SAF's training statistics run over all images of a caption: a block of captions is passed twice, once for its
statistics (in the backward: for the gradient that reaches them), once for the rest. Between the passes its nodes are
kept where a quarter of the workspace holds those of one caption; the second pass of a backward then has the attention
to make again, not the products with the alignment's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import filtration, graph, nodes
from itm_kernels.native.cpu.filtration import Filter, Kept, Place
from itm_kernels.native.cpu.nodes import Transforms, Wholes
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import at_step, like, operand_dtype, rounded, zeros_of
from itm_kernels.native.packing import Packed
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters


class Inputs(NamedTuple):
    """What is scored."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    image_global: Tensor  # [I, D]
    caption_global: Tensor  # [C, D]


def forward(
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C], [2, C] or [2, 0] float32
    """Scores, chunk by chunk, and the statistics that normalised them."""
    batch = Batch(inputs, parameters, options, workspace_bytes, backward=False)
    scores = torch.empty(batch.images, batch.captions, dtype=torch.float32, device="cpu")
    used = torch.empty(2, batch.captions if batch.filter else 0, dtype=torch.float32, device="cpu")
    if statistics is not None:
        used.copy_(statistics)
    for start, stop in batch.blocks():
        _score_block(batch, start, stop, scores, used)
    return scores, used


def _score_block(batch: Batch, start: int, stop: int, scores: Tensor, used: Tensor) -> None:
    """Scores of a block of captions, and its statistics. What is kept goes with the block: memory for one is enough."""
    kept = batch.first_pass(start, stop) if batch.options.batch_statistics else None
    if kept is not None:
        used[:, start:stop] = kept.statistics()
    statistics = used[:, start:stop].contiguous()
    for scorer in batch.scorers(start, stop, kept):
        scores[scorer.chunk.group_numbers, start:stop] = scorer.forward(statistics)


def backward(
    grad_scores: Tensor,  # [I, C]
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients in the dtypes of the inputs."""
    batch = Batch(inputs, parameters, options, workspace_bytes, backward=True)
    grads = _Gradients.zeros_of(inputs, parameters)
    for start, stop in batch.blocks():
        of_block = None if statistics is None else statistics[:, start:stop].float().contiguous()
        _differentiate_block(batch, start, stop, grad_scores[:, start:stop].float(), of_block, grads)
    of_parameters = grads.parameters
    if batch.parameters.graph is not None:
        of_parameters = of_parameters._replace(graph=graph.unmerged(batch.parameters.graph, grads.steps))
    of_inputs = (grads.regions, grads.words, grads.image_global, grads.caption_global)
    narrowed = (grad.to(inputs.regions.dtype) for grad in of_inputs)
    return (*narrowed, like(of_parameters, parameters))  # type: ignore[return-value]


def _differentiate_block(
    batch: Batch,
    start: int,
    stop: int,
    grad_scores: Tensor,  # [I, captions]
    statistics: Tensor | None,  # [2, captions]
    grads: _Gradients,
) -> None:
    """Adds the gradients of a block of captions."""
    kept: Kept | None = None
    means: Tensor | None = None
    if batch.options.batch_statistics:
        assert statistics is not None, "the forward made them"
        kept, means = batch.first_pass_backward(start, stop, statistics, grad_scores)
    words = batch.words
    of_words = words.view_of(grads.words, start, stop)
    direct = of_words is not None
    if of_words is None:
        rows = words.bounds[stop] - words.bounds[start]
        of_words = batch.chunks.workspace.floats("grad queries", rows, words.shape[-1]).zero_()
    for scorer in batch.scorers(start, stop, kept, keeps=True, grad_queries=of_words):
        batch.chunks.start_backward(scorer.chunk, grads.regions)
        scorer.backward(grad_scores[scorer.chunk.group_numbers], statistics, means, grads)
        batch.chunks.finish_backward(scorer.chunk, grads.regions)
    if not direct:
        words.put(grads.words, start, stop, of_words, add=False)


class _Gradients(NamedTuple):
    """Accumulators, float32. Those of the graph are its merged steps'."""

    regions: Tensor
    words: Tensor
    image_global: Tensor
    caption_global: Tensor
    parameters: ReasoningParameters
    steps: list[graph.Step]

    @staticmethod
    def zeros_of(inputs: Inputs, parameters: ReasoningParameters) -> _Gradients:
        given = (inputs.regions, inputs.words, inputs.image_global, inputs.caption_global)
        regions, words, image_global, caption_global = (
            torch.zeros(tensor.shape, dtype=torch.float32, device="cpu") for tensor in given
        )
        of_parameters = zeros_of(parameters._replace(graph=None))
        steps = graph.zeros_of(parameters.graph)
        return _Gradients(regions, words, image_global, caption_global, of_parameters, steps)


class Batch:
    """Both sides packed, the parameters as the products want them, and the chunks."""

    def __init__(
        self,
        inputs: Inputs,
        parameters: ReasoningParameters,
        options: ReasoningOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        dtype = operand_dtype(inputs.regions.dtype)
        self.regions = Packed(inputs.regions, inputs.region_counts, dtype)
        self.words = Packed(inputs.words, inputs.word_counts, dtype)
        self.images, self.captions = inputs.regions.shape[0], inputs.word_counts.shape[0]
        self.image_global = inputs.image_global.to(dtype).contiguous()
        self.caption_global = inputs.caption_global.to(dtype).contiguous()
        self.options, self.workspace_bytes = options, workspace_bytes
        self.parameters = rounded(parameters, inputs.regions.dtype)
        self.transforms = _transforms(self.parameters)
        self.steps = graph.steps_of(self.parameters.graph)
        self.chunks = Chunks(
            self.words,
            self.regions,
            row_bytes=self._row_bytes(inputs.regions.shape[2], dtype.itemsize, backward=backward),
            matrices=4 if backward else 3,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )

    @cached_property
    def filter(self) -> Filter | None:
        """SAF's; it is read here, where a plan, whose parameters have no values, does not come."""
        of_filter, score = self.parameters.filtration, self.parameters.score
        return None if of_filter is None else Filter.of(of_filter, score, self.options.eps)

    @property
    def width(self) -> int:
        return self.transforms.words.bias.shape[0]

    def _row_bytes(self, width: int, itemsize: int, *, backward: bool) -> int:
        """What the buffers of a chunk take for one word of one image, without what grows with its keys."""
        per_word = 1 + self.captions / self.words.num_rows  # nodes
        of_node = 4 * (self.width + 4) + self.width * itemsize
        of_node += self.width * itemsize * 3 * (len(self.steps) if backward else min(len(self.steps), 1))
        wide = 1 if not backward else 2
        if backward:
            of_node += 4 * self.width
        return int((wide + per_word - 1) * width * itemsize + per_word * of_node) + 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First and last caption of each block; for training statistics few enough that their nodes can be kept."""
        for start, stop in self.chunks.query_blocks():
            if self.options.batch_statistics:
                yield from filtration.parts_that_fit(start, stop, self.fit)
            else:
                yield start, stop

    def fit(self, start: int, stop: int) -> bool:
        """Whether a quarter of the workspace holds the nodes of captions ``start`` to ``stop`` against all images."""
        return self.bytes_of_nodes(start, stop) <= self.workspace_bytes // 4

    def bytes_of_nodes(self, start: int, stop: int) -> int:
        """What they take."""
        count = self.images * (self.words.bounds[stop] - self.words.bounds[start] + stop - start)
        return 4 * count * (self.width + 2)

    def scorers(
        self, start: int, stop: int, kept: Kept | None, *, keeps: bool = False, grad_queries: Tensor | None = None
    ) -> Iterator[_Scorer]:
        """The chunks of a block, and what was kept of them."""
        chunks = self.chunks.of_block(start, stop, keeps=keeps, grad_queries=grad_queries)
        places: Iterable[Place | None] = repeat(None) if kept is None else kept.places
        for chunk, place in zip(chunks, places, strict=False):
            yield _Scorer(self, chunk, start, stop, place)

    def first_pass(self, start: int, stop: int) -> Kept:
        """Logits of a block of captions against all images."""
        kept = self._kept(start, stop)
        for _ in self._passing(start, stop, kept):
            pass
        return kept

    def first_pass_backward(self, start: int, stop: int, statistics: Tensor, upstream: Tensor) -> tuple[Kept, Tensor]:
        """The same, and what the statistics pass back: means of the slopes, ``[2, captions]``."""
        kept = self._kept(start, stop)
        slopes = torch.zeros(stop - start, 2, dtype=torch.float64, device="cpu")
        for scorer in self._passing(start, stop, kept):
            slopes += scorer.slopes(statistics, upstream[scorer.chunk.group_numbers])
        return kept, (slopes / kept.numbers()[:, None]).t().float().contiguous()

    def _kept(self, start: int, stop: int) -> Kept:
        offsets = self.words.offsets_of(start, stop)
        return Kept(self.chunks.workspace, offsets, self.images, self.width, keeps=self.fit(start, stop))

    def _passing(self, start: int, stop: int, kept: Kept) -> Iterator[_Scorer]:
        for chunk in self.chunks.of_block(start, stop):
            scorer = _Scorer(self, chunk, start, stop, kept.add(chunk))
            scorer.align()
            scorer.find_logits()
            yield scorer


def _transforms(parameters: ReasoningParameters) -> Transforms:
    """The two alignments, which have one step."""
    both = (parameters.local_alignment, parameters.global_alignment)
    return Transforms(*(at_step(of, 0) for of in both))


class _Scorer:
    """The stages of one chunk in order, and back."""

    def __init__(self, batch: Batch, chunk: Chunk, start: int, stop: int, place: Place | None) -> None:
        self.batch, self.chunk, self.place = batch, chunk, place
        self.captions = slice(start, stop)
        self.wholes = Wholes(batch.image_global[chunk.group_numbers], batch.caption_global[start:stop])
        vectors, norms = (None, None) if place is None else (place.vectors, place.norms)
        self.known = vectors is not None
        """Whether the nodes need not be made; only true of a second pass."""
        self.nodes = nodes.room(chunk, batch.width, vectors, norms)
        self.steps: list[graph.Reasoned] = []

    def align(self) -> None:
        """Make the nodes."""
        made = nodes.compare(self.chunk, self.wholes, self.batch.options.temperature)
        nodes.transform(self.chunk, made, self.batch.transforms, self.nodes)
        self.made = made

    def find_logits(self) -> Tensor:
        """SAF's, where they are kept if they are."""
        assert self.batch.filter is not None
        count = self.chunk.rows + self.chunk.pairs
        out = self.chunk.workspace.floats("logits", count) if self.place is None else self.place.logits
        return filtration.logits(self.nodes.vectors, self.batch.filter, out)

    def slopes(self, statistics: Tensor, grad_scores: Tensor) -> Tensor:
        """What reaches the statistics of the captions from this chunk."""
        assert self.batch.filter is not None
        assert self.place is not None
        of_nodes = (self.nodes.vectors, self.place.logits)
        return filtration.slopes(self.chunk, *of_nodes, statistics, self.batch.filter, grad_scores)

    def forward(self, statistics: Tensor) -> Tensor:  # [G, segments]
        if not self.known:
            self.align()
        if self.batch.filter is not None:
            logits = self.find_logits() if self.place is None else self.place.logits
            return filtration.filtrate(self.chunk, self.nodes.vectors, logits, statistics, self.batch.filter)
        return torch.sigmoid(self._graph_logits()).view(self.chunk.groups, -1)

    def backward(self, grad_scores: Tensor, statistics: Tensor | None, means: Tensor | None, grads: _Gradients) -> None:
        """Adds every gradient where it belongs."""
        chunk, batch = self.chunk, self.batch
        made = nodes.compare(chunk, self.wholes, batch.options.temperature)
        if not self.known:
            nodes.transform(chunk, made, batch.transforms, self.nodes)
        if batch.filter is not None:
            logits = self.find_logits() if self.place is None else self.place.logits
            of_filter = grads.parameters.filtration
            assert of_filter is not None
            assert statistics is not None
            grad_nodes = filtration.backward(
                chunk, self.nodes.vectors, logits, statistics, batch.filter, grad_scores, means,
                filtration.Gradients(of_filter, grads.parameters.score),
            )  # fmt: skip
        else:
            grad_nodes = self._graph_backward(grad_scores, grads)
        wholes = self.wholes._replace(grad_images=grads.image_global, grad_captions=grads.caption_global[self.captions])
        nodes.backward(
            chunk, made, self.nodes, grad_nodes, wholes, batch.options.temperature, batch.transforms,
            _transforms(grads.parameters),
        )  # fmt: skip

    def _whole(self) -> Tensor:  # [pairs, S] float32
        """The node of every pair as a whole, after all steps."""
        wide = self.steps[-1].wide if self.steps else self.nodes.vectors[self.chunk.rows :]
        assert wide is not None, "the last step makes it"
        return wide

    def _graph_logits(self) -> Tensor:  # [pairs]
        steps, of_step = self.batch.steps, self.nodes.rounded
        for number, step in enumerate(steps):
            made = graph.reason(self.chunk, of_step, step, number, last=number == len(steps) - 1)
            self.steps.append(made)
            of_step = made.after
        score = self.batch.parameters.score
        return self._whole() @ score.weight + score.bias

    def _graph_backward(self, grad_scores: Tensor, grads: _Gradients) -> Tensor:  # [rows + pairs, S]
        score, of_score = self.batch.parameters.score, grads.parameters.score
        scores = torch.sigmoid(self._graph_logits())
        grad_logits = grad_scores.flatten() * scores * (1 - scores)
        of_score.weight.addmv_(self._whole().t(), grad_logits)
        of_score.bias.add_(grad_logits.sum())
        grad = grad_logits[:, None] * score.weight
        if not self.steps:
            every = self.chunk.workspace.floats("grad nodes", *self.nodes.vectors.shape).zero_()
            every[self.chunk.rows :] = grad
            return every
        for made, step, of_step in zip(self.steps[::-1], self.batch.steps[::-1], grads.steps[::-1], strict=True):
            grad = graph.reason_backward(self.chunk, made, step, of_step, grad)
        return grad
