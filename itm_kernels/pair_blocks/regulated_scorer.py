"""The stages of RCAR's scorer on one block of pairs in order, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import RegulatedParameters
from itm_kernels.pair_blocks import aggregation, alignment, correspondence
from itm_kernels.pair_blocks.blocks import PairBlock


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
        self.slopes: Tensor | None = None  # of the cosines at the end
        self.mean: Tensor | None = None

    def forward(self) -> Tensor:  # [G, segments]
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
            del aligned
        if options.regulator == "rcr":
            return self._mean_cosines(alignment.attend(block, products, temperatures, options.temperature))
        if options.regulator == "rar":
            for step in range(options.steps):
                self._pool(step)
        return torch.sigmoid(self._logits()).view(block.groups, -1)

    def backward(self, grad_scores: Tensor, grads: RegulatedParameters) -> None:  # [G, segments], contiguous
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
            grad_pooled = self._score_backward(grad_scores, grads)
        grad_gates: Tensor | None = None
        if options.corrections > 1:
            grad_gates = block.floats(block.rows, block.width).zero_()
        for step in reversed(range(options.alignments)):
            attention, aligned = self.steps[step]
            grad_vectors = torch.zeros_like(aligned.vectors)
            if options.regulator == "rar":
                for aggregated in reversed(range(options.steps)):
                    grad_pooled = self._pool_backward(aggregated, grad_pooled, grads, grad_vectors)
            elif options.regulator == "rcar":
                grad_pooled = self._pool_backward(step, grad_pooled, grads, grad_vectors)
            if step == 0 and grad_pooled is not None:
                aggregation.mean_backward(block, grad_pooled, grad_vectors)
            passed: Tensor | None = None  # to the temperatures of this step
            if step < options.corrections:
                assert grad_products is not None
                assert grad_temperatures is not None
                passed = correspondence.regulate_backward(
                    block, self.regulated.pop(), aligned.rounded, grad_products, grad_temperatures, grad_gates,
                    self._of("correspondence", step), _at(grads.correspondence, step), grad_vectors,
                )  # fmt: skip
                del grad_products
            grad_attended = alignment.align_backward(
                block, aligned, grad_vectors, self._of("alignment", step), _at(grads.alignment, step)
            )
            grad_products, grad_temperatures = alignment.attend_backward(
                block, attention, options.temperature, grad_attended
            )
            if passed is not None:
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

    def _pool(self, step: int) -> None:
        of_step = self._of("aggregation", step)
        made = aggregation.pool(
            self.block, self.steps[-1].aligned, self._vectors(), of_step, self.masks._replace(step=step)
        )
        self._hold(self.pooled, made)

    def _pool_backward(
        self, step: int, grad_pooled: Tensor | None, grads: RegulatedParameters, grad_vectors: Tensor
    ) -> Tensor:
        assert grad_pooled is not None
        aligned = self.steps[step if self.options.regulator == "rcar" else 0].aligned
        return aggregation.pool_backward(
            self.block, self.pooled.pop(), aligned, grad_pooled, self._of("aggregation", step),
            _at(grads.aggregation, step), grad_vectors, self.masks._replace(step=step),
        )  # fmt: skip

    def _logits(self) -> Tensor:  # [pairs]
        score = self.parameters.score
        assert score is not None
        return self._vectors() @ score.weight + score.bias

    def _score_backward(self, grad_scores: Tensor, grads: RegulatedParameters) -> Tensor:  # [pairs, S]
        score = self.parameters.score
        assert score is not None
        assert grads.score is not None
        scores = torch.sigmoid(self._logits())
        grad_logits = grad_scores.flatten() * scores * (1 - scores)
        grads.score.weight.addmv_(self._vectors().t(), grad_logits)
        grads.score.bias.add_(grad_logits.sum())
        return grad_logits[:, None] * score.weight

    def _mean_cosines(self, attention: alignment.Attention) -> Tensor:  # [G, segments]
        block = self.block
        made = block.floats(block.rows, 1)
        slopes = block.floats(3, block.rows) if block.keeps else None
        block.steps.cosine_rows(block, attention.attended, made, slopes)
        if block.keeps:
            self.end, self.slopes = attention, slopes
        return aggregation.mean(block, made).view(block.groups, -1)

    def _mean_cosines_backward(self, grad_scores: Tensor, attended: Tensor) -> None:
        """That of the attended vectors takes their place."""
        assert self.slopes is not None
        self.block.steps.cosine_rows_backward(self.block, attended, self.slopes, grad_scores)


def _at(stage: Any, step: int) -> Any:
    """The tensors of one step of a stage."""
    return type(stage)(*(tensor[step] for tensor in stage))
