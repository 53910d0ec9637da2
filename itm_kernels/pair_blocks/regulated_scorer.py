"""The stages of RCAR's scorer on one block of pairs in order, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import (
    AlignmentParameters,
    CorrespondenceParameters,
    RegulatedParameters,
    ScoreParameters,
)
from itm_kernels.pair_blocks import aggregation, alignment, correspondence, score
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.parameters import at_step, like, zeros_of


class Gradients(NamedTuple):
    """Where those of parameters are added, float32."""

    alignment: AlignmentParameters | None
    correspondence: CorrespondenceParameters | None
    aggregation: aggregation.Gradients | None
    score: ScoreParameters | None

    @staticmethod
    def zeros_of(parameters: RegulatedParameters) -> Gradients:
        """Zeros for what is there."""
        of_aggregation = parameters.aggregation
        pooling = None if of_aggregation is None else aggregation.Gradients.zeros_of(of_aggregation)
        made = zeros_of(parameters._replace(aggregation=None))
        return Gradients(made.alignment, made.correspondence, pooling, made.score)

    def of(self, parameters: RegulatedParameters) -> RegulatedParameters:
        """As the gradients of the parameters, in their dtypes."""
        pooling = None
        if self.aggregation is not None:
            assert parameters.aggregation is not None
            pooling = self.aggregation.of(parameters.aggregation)
        made = RegulatedParameters(self.alignment, self.correspondence, pooling, self.score)
        return like(made, parameters)


class _Attended(NamedTuple):
    """A step's attention and alignment."""

    attention: alignment.Attention
    aligned: alignment.Aligned


class RegulatedScorer:
    """One block. Where no backward follows, of every stage the last result alone is held."""

    def __init__(self, block: PairBlock, parameters: RegulatedParameters, options: RegulatedOptions) -> None:
        self.block, self.parameters, self.options = block, parameters, options
        self.masks = aggregation.masks_of(block, options)
        self.steps: list[_Attended] = []
        self.regulated: list[correspondence.Regulated] = []
        self.pooled: list[aggregation.Pooled] = []
        self.end: alignment.Attention | None = None
        self.cosines: Tensor | None = None  # [rows, 1], at the end
        self.slopes: Tensor | None = None  # of these
        self.mean: Tensor | None = None

    def forward(self) -> Tensor:  # [G, segments]
        self.run()
        if self.cosines is not None:
            return aggregation.mean(self.block, self.cosines).view(self.block.groups, -1)
        return score.scores(self.block, self._vectors(), self._score())

    def run(self) -> None:
        """All stages but the score."""
        options, block = self.options, self.block
        products, temperatures = block.plain_products(), None
        for step in range(options.alignments):
            attention = alignment.attend(block, products, temperatures, options.temperature)
            del products
            aligned = alignment.align(block, attention.attended, self._of("alignment", step))
            self._hold(self.steps, _Attended(attention, aligned))
            del attention
            if step == 0 and options.regulator != "rcr":
                self.mean = aggregation.mean(block, aligned.vectors)
            if options.regulator == "rcar":
                self._pool(step)
            if step < options.corrections:
                before = self.regulated[-1] if self.regulated else None
                regulated = correspondence.regulate(
                    block, aligned.rounded, before, options.temperature, self._of("correspondence", step),
                    last=step == options.corrections - 1,
                )  # fmt: skip
                self._hold(self.regulated, regulated)
                products, temperatures = regulated.products, regulated.temperatures
                del before, regulated
                if not block.keeps:  # before the next attention is made, not after
                    self.steps.clear()
            del aligned
        if options.regulator == "rcr":
            self._find_cosines(alignment.attend(block, products, temperatures, options.temperature))
        if options.regulator == "rar":
            for step in range(options.steps):
                self._pool(step)

    def backward(self, grad_scores: Tensor, grads: Gradients) -> None:  # [G, segments], contiguous
        """Adds every gradient where it belongs. What a stage made is gone when its own backward is through."""
        options, block = self.options, self.block
        grad_products: Tensor | None = None  # of the attention of the step above
        grad_temperatures: Tensor | None = None
        grad_pooled: Tensor | None = None
        if self.end is not None:
            attention, self.end = self.end, None
            self._mean_cosines_backward(grad_scores, attention.attended)
            grad_products, grad_temperatures = alignment.attend_backward(
                block, attention, options.temperature, attention.attended
            )
            del attention
        else:
            assert grads.score is not None
            grad_pooled = score.backward(block, self._vectors(), self._score(), grad_scores, grads.score)
        grad_gates: Tensor | None = None
        if options.corrections > 1:
            grad_gates = block.floats(block.rows, block.width).zero_()
        for step in reversed(range(options.alignments)):
            attention, aligned = self.steps[step]
            grad_vectors: Tensor | None = None
            passed: Tensor | None = None  # to the temperatures of this step
            if step < options.corrections:
                assert grad_products is not None
                assert grad_temperatures is not None
                passed, grad_vectors = correspondence.regulate_backward(
                    block, self.regulated.pop(), aligned.rounded, grad_products, grad_temperatures, grad_gates,
                    self._of("correspondence", step), _at(grads.correspondence, step),
                )  # fmt: skip
                del grad_products
            if grad_vectors is None:
                grad_vectors = torch.zeros_like(aligned.vectors)
            if options.regulator == "rar":
                for aggregated in reversed(range(options.steps)):
                    grad_pooled = self._pool_backward(aggregated, grad_pooled, grads, grad_vectors)
            elif options.regulator == "rcar":
                grad_pooled = self._pool_backward(step, grad_pooled, grads, grad_vectors)
            if step == 0 and grad_pooled is not None:
                aggregation.mean_backward(block, grad_pooled, grad_vectors)
            grad_attended = alignment.align_backward(
                block, aligned, grad_vectors, self._of("alignment", step), _at(grads.alignment, step)
            )
            grad_products, grad_temperatures = alignment.attend_backward(
                block, attention, options.temperature, grad_attended
            )
            if passed is not None and step > 0:  # the first temperature is a constant
                grad_temperatures.add_(passed)
            del attention, aligned, grad_vectors, grad_attended
            self.steps.pop()
        assert grad_products is not None, "a scorer attends at least once"
        block.plain_products_backward(grad_products)

    def _hold(self, held: list[Any], made: Any) -> None:
        if not self.block.keeps:
            held.clear()
        held.append(made)

    def _of(self, stage: str, step: int) -> Any:
        """The parameters of a stage's step."""
        return _at(getattr(self.parameters, stage), step)

    def _vectors(self) -> Tensor:  # [pairs, S]
        assert self.mean is not None
        return self.pooled[-1].pooled if self.pooled else self.mean

    def _score(self) -> ScoreParameters:
        assert self.parameters.score is not None
        return self.parameters.score

    def _pool(self, step: int) -> None:
        of_step = self._of("aggregation", step)
        made = aggregation.pool(
            self.block, self.steps[-1].aligned, self._vectors(), of_step, self.masks._replace(step=step)
        )
        self._hold(self.pooled, made)

    def _pool_backward(self, step: int, grad_pooled: Tensor | None, grads: Gradients, grad_vectors: Tensor) -> Tensor:
        assert grad_pooled is not None
        aligned = self.steps[step if self.options.regulator == "rcar" else 0].aligned
        return aggregation.pool_backward(
            self.block, self.pooled.pop(), aligned, grad_pooled, self._of("aggregation", step),
            _at(grads.aggregation, step), grad_vectors, self.masks._replace(step=step),
        )  # fmt: skip

    def _find_cosines(self, attention: alignment.Attention) -> None:
        block = self.block
        self.cosines = block.floats(block.rows, 1)
        self.slopes = block.floats(3, block.rows) if block.keeps else None
        block.steps.cosine_rows(block, attention.attended, self.cosines, self.slopes)
        if block.keeps:
            self.end = attention

    def _mean_cosines_backward(self, grad_scores: Tensor, attended: Tensor) -> None:
        """That of the attended vectors takes their place."""
        assert self.slopes is not None
        self.block.steps.cosine_rows_backward(self.block, attended, self.slopes, grad_scores)


def _at(stage: Any, step: int) -> Any:
    """The tensors of one step of a stage that the options say is there."""
    return at_step(stage, step)
