"""The stages of SGRAF's scorer on one block of pairs in order, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters, ScoreParameters
from itm_kernels.pair_blocks import filtration, graph, nodes, score
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.nodes import Nodes, Transforms, Wholes
from itm_kernels.pair_blocks.parameters import at_step
from itm_kernels.pair_blocks.steps import Filter


class Model(NamedTuple):
    """The parameters, rounded, as the stages want them."""

    transforms: Transforms
    filter: Filter | None
    steps: list[graph.Step]
    score: ScoreParameters
    temperature: float

    @staticmethod
    def of(parameters: ReasoningParameters, options: ReasoningOptions) -> Model:
        """Of rounded parameters."""
        of_filter = parameters.filtration
        return Model(
            Transforms.of(parameters),
            None if of_filter is None else filtration.filter_of(of_filter, parameters.score, options.eps),
            graph.steps_of(parameters.graph),
            parameters.score,
            options.temperature,
        )


class Gradients(NamedTuple):
    """Where gradients of parameters are added, float32; those of a graph are its merged steps'."""

    parameters: ReasoningParameters
    graph: graph.Step | None

    @property
    def of_filter(self) -> filtration.Gradients:
        """SAF's."""
        assert self.parameters.filtration is not None
        return filtration.Gradients(self.parameters.filtration, self.parameters.score)


class Found(NamedTuple):
    """What one pass over a block leaves for another."""

    nodes: Nodes
    logits: Tensor  # [rows + pairs], SAF's


class Passed(NamedTuple):
    """What SAF needs of the captions of a block from elsewhere."""

    statistics: Tensor  # [2, segments]
    means: Tensor | None = None
    """Of the slopes over the batch ``[2, segments]``; None: the statistics are constants."""


class ReasoningScorer:
    """One block. Where no backward follows, of every step the last result alone is held."""

    def __init__(self, block: PairBlock, model: Model, wholes: Wholes, found: Found | None = None) -> None:
        self.block, self.model, self.wholes = block, model, wholes
        self.nodes: Nodes | None = None if found is None else found.nodes
        self.logits: Tensor | None = None if found is None else found.logits
        self.steps: list[graph.Reasoned] = []
        self.whole: Tensor | None = None  # [pairs, S] float32, after all steps

    def find_logits(self) -> Found:
        """Nodes and SAF's logits, where they are not there."""
        assert self.model.filter is not None
        made = self.nodes or self._align(nodes.attend(self.block, self.model.temperature).attended)
        if self.logits is None:
            self.logits = filtration.find_logits(self.block, made.vectors, self.model.filter)
        return Found(made, self.logits)

    def slopes(self, grad_scores: Tensor, statistics: Tensor) -> Tensor:  # [G, segments] -> [2, segments] float64
        """What reaches the statistics of the captions from this block."""
        assert self.model.filter is not None
        made, logits = self.find_logits()
        return filtration.slopes(self.block, made.vectors, logits, statistics, self.model.filter, grad_scores)

    def forward(self, passed: Passed | None) -> Tensor:  # [G, segments]
        if self.nodes is None:
            self._align(nodes.attend(self.block, self.model.temperature).attended)
        if self.model.filter is None:
            return score.scores(self.block, self._reason(), self.model.score)
        assert passed is not None
        made, logits = self.find_logits()
        return filtration.filtrate(self.block, made.vectors, logits, passed.statistics, self.model.filter)

    def backward(self, grad_scores: Tensor, passed: Passed | None, grads: Gradients) -> None:
        """Adds every gradient where it belongs; ``grad_scores [G, segments]`` are contiguous."""
        attention = nodes.attend(self.block, self.model.temperature)
        made = self._align(attention.attended)
        if self.model.filter is None:
            grad_nodes = self._graph_backward(grad_scores, grads)
        else:
            assert passed is not None
            _, logits = self.find_logits()
            grad_nodes = filtration.backward(
                self.block, made.vectors, logits, passed.statistics, self.model.filter, grad_scores, passed.means,
                grads.of_filter,
            )  # fmt: skip
        nodes.backward(
            self.block, attention, made, grad_nodes, self.wholes, self.model.temperature, self.model.transforms,
            Transforms.of(grads.parameters),
        )  # fmt: skip

    def _align(self, attended: Tensor) -> Nodes:
        """Nodes from what the words attend to, where they are not there."""
        if self.nodes is None:
            rounds = bool(self.model.steps)
            self.nodes = nodes.transform(self.block, attended, self.wholes, self.model.transforms, rounds=rounds)
        return self.nodes

    def _reason(self) -> Tensor:  # [pairs, S] float32
        """The whole of each pair, after all steps."""
        assert self.nodes is not None
        self.whole, of_step = self.nodes.vectors[self.block.rows :], self.nodes.rounded
        for number, step in enumerate(self.model.steps):
            last = number == len(self.model.steps) - 1
            made = graph.reason(self.block, of_step, step, last=last)
            of_step = made.after
            if self.block.keeps:
                self.steps.append(made)
            if made.wide is not None:
                self.whole = made.wide
        return self.whole

    def _graph_backward(self, grad_scores: Tensor, grads: Gradients) -> Tensor:  # [rows + pairs, S]
        whole = self._reason()
        grad = score.backward(self.block, whole, self.model.score, grad_scores, grads.parameters.score)
        assert self.nodes is not None
        if grads.graph is None:
            every = torch.zeros_like(self.nodes.vectors)
            every[self.block.rows :] = grad
            return every
        for number in reversed(range(len(self.model.steps))):
            step, of_step = self.model.steps[number], at_step(grads.graph, number)
            grad = graph.reason_backward(self.block, self.steps.pop(), step, of_step, grad)
        return grad
