"""``similarity_reasoning_scores`` on a GPU: every stage of SGRAF on one block of pairs, then the next block.

A backward runs a block's stages again and then these in reverse; gradients add up in float32, in the order of the
blocks. SAF's training statistics run over all images of a caption: a block of captions is passed twice, once for its
statistics (in the backward: for the gradient that reaches them), once for the rest. Between the passes its nodes are
kept where a quarter of the workspace holds those of any caption, in blocks of as many captions as fit; the second pass
of a backward then has the attention to make again, not the products with the alignment's weights.

Sums run in one order, without atomics; all on the current stream, without waiting for it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters
from itm_kernels.pair_blocks import graph
from itm_kernels.pair_blocks.blocks import PairBlock, PairBlocks
from itm_kernels.pair_blocks.filtration import Moments
from itm_kernels.pair_blocks.nodes import Wholes
from itm_kernels.pair_blocks.parameters import like, rounded, zeros_of
from itm_kernels.pair_blocks.reasoning_scorer import Found, Gradients, Model, Passed, ReasoningScorer
from itm_kernels.pair_blocks.regulated_scores import on_device
from itm_kernels.pair_blocks.rows import Side
from itm_kernels.pair_blocks.steps import Steps

Span = tuple[int, int]
"""First and last caption of a block of queries."""


class Inputs(NamedTuple):
    """What is scored."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: Tensor  # [C]
    region_counts: Tensor | None  # [I]
    image_global: Tensor  # [I, D]
    caption_global: Tensor  # [C, D]
    word_offsets: Tensor | None = None  # [C + 1]


def forward(
    steps: Steps,
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C], [2, C] or [2, 0] float32
    """Scores, block by block, and the statistics that normalised them."""
    with on_device(inputs.regions.device):
        batch = Batch(steps, inputs, parameters, options, workspace_bytes, backward=False)
        scores = batch.floats(batch.images, batch.captions)
        used = batch.floats(2, batch.captions if options.reasoning == "SAF" else 0)
        if statistics is not None:
            used.copy_(statistics)
        for span in batch.blocks.query_blocks():
            columns = slice(*span)
            passed: Passed | None = None
            found: list[Found] = []
            if options.batch_statistics:
                moments, found = batch.first_pass(span)
                used[:, columns] = moments.statistics()
            if options.reasoning == "SAF":
                passed = Passed(used[:, columns].contiguous())
            for block, groups, segments in batch.blocks.forward_blocks([span]):
                scorer = batch.scorer(block, groups, segments, found)
                scores[groups, segments] = scorer.forward(passed)
                del block, scorer  # before the next block's rows are made, not after
        return scores, used


def backward(
    steps: Steps,
    grad_scores: Tensor,  # [I, C]
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    with on_device(inputs.regions.device):
        batch = Batch(steps, inputs, parameters, options, workspace_bytes, backward=True)
        grad_scores = grad_scores.to(torch.float32)
        grads = Gradients(zeros_of(parameters._replace(graph=None)), graph.zeros_of(parameters.graph))
        of_words, of_regions = batch.words.gradient(), batch.regions.gradient()
        of_images, of_captions = (batch.floats(n, batch.width).zero_() for n in (batch.images, batch.captions))
        for span in batch.blocks.query_blocks():
            passed: Passed | None = None
            found: list[Found] = []
            if statistics is not None and options.reasoning == "SAF":
                passed = Passed(statistics[:, slice(*span)].to(torch.float32).contiguous())
            if options.batch_statistics:
                assert passed is not None, "the forward made them"
                means, found = batch.first_pass_backward(span, grad_scores, passed.statistics)
                passed = passed._replace(means=means)
            for block, groups, segments in batch.blocks.backward_blocks(of_words, of_regions, [span]):
                scorer = batch.scorer(block, groups, segments, found)
                scorer.wholes = scorer.wholes._replace(
                    grad_images=of_images[groups], grad_captions=of_captions[segments]
                )
                scorer.backward(_copied(grad_scores[groups, segments]), passed, grads)
                del block, scorer
        of_parameters = grads.parameters
        if grads.graph is not None:
            assert batch.parameters.graph is not None
            of_parameters = of_parameters._replace(graph=graph.unmerged(batch.parameters.graph, grads.graph))
        dtype = inputs.regions.dtype
        of_inputs = (grad.to(dtype) for grad in (of_regions, of_words, of_images, of_captions))
        return (*of_inputs, like(of_parameters, parameters))  # type: ignore[return-value]


class Batch:
    """Both sides, the parameters as the products want them, and the blocks."""

    def __init__(
        self,
        steps: Steps | None,  # None: only how it is cut will be asked for
        inputs: Inputs,
        parameters: ReasoningParameters,
        options: ReasoningOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        self.regions = Side(inputs.regions, inputs.region_counts, what="region_counts")
        self.words = Side(inputs.words, inputs.word_counts, offsets=inputs.word_offsets, what="word_counts")
        self.images, self.captions = inputs.regions.shape[0], inputs.word_counts.shape[0]
        self.width, self._device = inputs.regions.shape[2], inputs.regions.device
        self._wholes = Wholes(inputs.image_global.contiguous(), inputs.caption_global.contiguous())
        self.parameters = rounded(parameters, inputs.regions.dtype)
        self._model = Model.of(self.parameters, options)
        channels = parameters.local_alignment.bias.shape[1]
        shortest = min(b - a for a, b in pairwise(self.words.bounds))
        kept = 4 * self.images * (channels + 2) * (1 + 1 / shortest)  # bytes of a word, and its part of the whole
        most_queries = int(workspace_bytes / 4 / kept)
        self.keeps = options.batch_statistics and most_queries >= self.words.most
        element = inputs.regions.element_size()
        row_bytes, pair_bytes = _bytes(self.words, channels, len(self._model.steps), element, backward=backward)
        self.blocks = PairBlocks(
            steps,
            self.words,
            self.regions,
            row_bytes=row_bytes,
            pair_bytes=pair_bytes,
            # Products, their norms (at most one a row) and weights, in a backward that of the weights as well.
            matrices=8 + element + (4 if backward else 0),
            workspace_bytes=workspace_bytes - (workspace_bytes // 4 if self.keeps else 0),
            backward=backward,
            most_queries=most_queries if self.keeps else None,
        )

    def floats(self, *shape: int) -> Tensor:
        """Not initialised, float32."""
        return torch.empty(shape, dtype=torch.float32, device=self._device)

    def scorer(self, block: PairBlock, groups: slice, segments: slice, found: list[Found]) -> ReasoningScorer:
        """Of one block; what a first pass has found is taken off its list."""
        wholes = Wholes(self._wholes.images[groups], self._wholes.captions[segments])
        return ReasoningScorer(block, self._model, wholes, found.pop(0) if found else None)

    def first_pass(self, span: Span) -> tuple[Moments, list[Found]]:
        """Statistics of a block of captions over all images, and what is kept of its nodes."""
        moments, kept = Moments(), []
        for block, groups, segments in self.blocks.forward_blocks([span]):
            found = self.scorer(block, groups, segments, []).find_logits()
            moments.add(block, found.logits)
            if self.keeps:
                kept.append(found)
            del block, found
        return moments, kept

    def first_pass_backward(
        self, span: Span, grad_scores: Tensor, statistics: Tensor
    ) -> tuple[Tensor, list[Found]]:  # [I, C] and [2, segments] -> [2, segments]
        """What the statistics pass back, as means of the slopes; and the same of the nodes."""
        total, counts, kept = torch.zeros_like(statistics, dtype=torch.float64), None, []
        for block, groups, segments in self.blocks.forward_blocks([span]):
            scorer = self.scorer(block, groups, segments, [])
            total += scorer.slopes(_copied(grad_scores[groups, segments]), statistics)
            if self.keeps:
                kept.append(scorer.find_logits())
            counts = block.queries.counts
            del block, scorer
        assert counts is not None, "there is an image"
        return (total / (self.images * (1 + counts))).to(torch.float32), kept


def _copied(grad_scores: Tensor) -> Tensor:
    """Always, so that every block launches alike."""
    return grad_scores.clone(memory_format=torch.contiguous_format)


def _bytes(words: Side, channels: int, steps: int, element: int, *, backward: bool) -> tuple[int, int]:
    """What a block takes for one word of one image without what grows with its regions, and for one pair."""
    d, s = words.width * element, channels * 4
    copy = channels * element if element < 4 else 0  # float32 rows need none for products
    of_node = s + 24
    if steps:  # asking, gathered and reasoned nodes, and edges
        of_node += copy + 3 * channels * element * (steps if backward else 1) + 4 * (1 + words.most) + 12
    if backward:  # the gradient of nodes and its copy; at both ends of a step, parts of a bias, that of edges
        of_node += s + copy + 8 + (s + s // 16 + 4 * (1 + words.most) if steps else 0)
    # Attended vectors and squares, a product on its way to the nodes; of a pair, parts of the sums of parameters.
    made = s if copy else 0
    return 2 * d + made + 32 + of_node, d + made + of_node + (3 * s + 32 if backward else s)
