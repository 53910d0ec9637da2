"""``regulated_scores`` on the CPU: every stage of the scorer on one chunk of pairs, then the next chunk.

A backward runs a chunk's stages again, each keeping what its own backward reads, and then these in reverse; the
gradients of regions, words and parameters add up in float32, in the order of the chunks. Steps of a scorer:

    products -> attention -> alignment vectors -> (RCR: products of the next step) -> (RAR: pooled vectors) -> score
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu import aggregation, alignment, correspondence
from itm_kernels.native.cpu.mean_cosine import MeanCosine
from itm_kernels.native.cpu.pair_chunks import Chunk, Chunks
from itm_kernels.native.cpu.parameters import at_step, like, operand_dtype, rounded, zeros_of
from itm_kernels.native.packing import Packed
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import RegulatedParameters


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
) -> Tensor:  # [I, C] float32
    """Scores, chunk by chunk."""
    batch = Batch(regions, words, word_counts, region_counts, parameters, options, workspace_bytes, backward=False)
    scores = torch.empty(regions.shape[0], word_counts.shape[0], dtype=torch.float32, device="cpu")
    of_groups = scores if options.t2i else scores.t()
    for chunk in batch.chunks.every():
        of_groups[chunk.group_numbers, chunk.segments] = _Scorer(chunk, batch.parameters, options).forward()
    return scores


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients in the dtypes of the inputs."""
    batch = Batch(regions, words, word_counts, region_counts, parameters, options, workspace_bytes, backward=True)
    grad_scores = grad_scores.to(torch.float32)
    of_groups = grad_scores if options.t2i else grad_scores.t()
    grads = zeros_of(parameters)
    sides = batch.chunks.queries, batch.chunks.keys
    grad_queries, grad_keys = (torch.zeros(side.shape, dtype=torch.float32, device="cpu") for side in sides)
    for chunk in batch.chunks.every_backward(grad_queries, grad_keys):
        scorer = _Scorer(chunk, batch.parameters, options)
        scorer.forward()
        scorer.backward(of_groups[chunk.group_numbers, chunk.segments], grads)
    of_regions, of_words = (grad_keys, grad_queries) if options.t2i else (grad_queries, grad_keys)
    return of_regions.to(regions.dtype), of_words.to(words.dtype), like(grads, parameters)


class Batch:
    """Both sides packed, the parameters as the products want them, and the chunks."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        parameters: RegulatedParameters,
        options: RegulatedOptions,
        workspace_bytes: int,
        *,
        backward: bool,
    ) -> None:
        dtype = operand_dtype(regions.dtype)
        images, captions = Packed(regions, region_counts, dtype), Packed(words, word_counts, dtype)
        self.parameters = rounded(parameters, regions.dtype)
        self.chunks = Chunks(
            *((captions, images) if options.t2i else (images, captions)),
            row_bytes=_row_bytes(parameters, options, regions.shape[2], dtype.itemsize, backward=backward),
            matrices=2 * (options.alignments + 3) if backward else 4,
            workspace_bytes=workspace_bytes,
            backward=backward,
        )


def _row_bytes(
    parameters: RegulatedParameters, options: RegulatedOptions, width: int, itemsize: int, *, backward: bool
) -> int:
    """What the buffers of a chunk take for one row, without what grows with its keys."""
    s = 0 if parameters.alignment is None else parameters.alignment.bias.shape[1]
    hidden = 0
    if parameters.correspondence is not None:
        hidden = parameters.correspondence.hidden_bias.shape[1]
        hidden += parameters.correspondence.temperature_hidden_bias.shape[1]
    pairs = 32 * s if options.aggregations else 0  # eight vectors a pair, which may be a single row
    chained = options.corrections > 1  # from gate to gate
    widened = 4 * width if itemsize == 2 else 0  # what a product in float32 takes
    if not backward:
        return (width + 2 * s + hidden) * itemsize + 4 * (s + hidden + width * chained) + pairs + widened
    kept = width * (options.alignments + 2 * options.corrections)
    kept += s * options.alignments + hidden * options.corrections
    floats = s * (options.alignments + options.aggregations + 1) + hidden * options.corrections
    floats += width * chained * options.corrections
    return (kept + width + hidden) * itemsize + 4 * floats + pairs + widened


class _Attended(NamedTuple):
    """A step's attention and alignment."""

    attention: alignment.Attention
    aligned: alignment.Aligned


class _Scorer:
    """The stages of one chunk in order, and back."""

    def __init__(self, chunk: Chunk, parameters: RegulatedParameters, options: RegulatedOptions) -> None:
        self.chunk, self.parameters, self.options = chunk, parameters, options
        self.dropout = aggregation.Dropout.of(chunk, options)
        self.steps: list[_Attended] = []
        self.regulated: list[correspondence.Regulated] = []
        self.pooled: list[aggregation.Pooled] = []
        self.end: MeanCosine | None = None
        self.mean: Tensor | None = None

    def forward(self) -> Tensor:  # [G, segments]
        options, chunk = self.options, self.chunk
        products = plain = chunk.plain_products()
        temperatures: Tensor | None = None
        for step in range(options.alignments):
            weights = chunk.workspace.take(chunk.name("weights", step), *products.shape)
            attention = alignment.attend(chunk, products, temperatures, options.temperature, weights)
            attended = alignment.attended(chunk, attention, step)
            aligned = alignment.align(chunk, attended, self._of("alignment", step), step)
            self.steps.append(_Attended(attention, aligned))
            if step == 0 and options.regulator != "rcr":
                self.mean = aggregation.mean(chunk, aligned.vectors)
            if options.regulator == "rcar":
                self._pool(step)
            if step < options.corrections:
                before = self.regulated[-1] if self.regulated else None
                last = step == options.corrections - 1
                regulated = correspondence.regulate(
                    chunk, aligned.rounded, before, options.temperature, self._of("correspondence", step), step,
                    last=last,
                )  # fmt: skip
                self.regulated.append(regulated)
                products, temperatures = regulated.products, regulated.temperatures.values
        if options.regulator == "rcr":
            weights = chunk.workspace.floats("weights at the end", *plain.shape)
            self.end = MeanCosine(
                chunk, plain, alignment.attend(chunk, products, temperatures, options.temperature, weights)
            )
            return self.end.forward()
        if options.regulator == "rar":
            for step in range(options.steps):
                self._pool(step)
        return torch.sigmoid(self._logits()).view(chunk.groups, -1)

    def backward(self, grad_scores: Tensor, grads: RegulatedParameters) -> None:  # [G, segments]
        """Adds every gradient where it belongs."""
        options, chunk = self.options, self.chunk
        grad_products: Tensor | None = None  # of the attention of the step above
        grad_temperatures: Tensor | None = None
        grad_pooled: Tensor | None = None
        grad_plain: Tensor | None = None  # of the products themselves, beside that of attention
        if self.end is not None:
            grad_plain, grad_weights = self.end.backward(grad_scores)
            grad_products, grad_temperatures = alignment.attend_backward(
                chunk, self.end.attention, options.temperature, grad_weights
            )
        else:
            grad_pooled = self._score_backward(grad_scores, grads)
        grad_gates: Tensor | None = None
        if options.corrections > 1:
            grad_gates = chunk.workspace.floats("grad gates", chunk.rows, chunk.queries.shape[1]).zero_()
        for step in reversed(range(options.alignments)):
            attention, aligned = self.steps[step]
            grad_vectors = chunk.workspace.floats("grad vectors", *aligned.vectors.shape).zero_()
            if options.regulator == "rar":
                for aggregated in reversed(range(options.steps)):
                    grad_pooled = self._pool_backward(aggregated, grad_pooled, grads, grad_vectors)
            elif options.regulator == "rcar":
                grad_pooled = self._pool_backward(step, grad_pooled, grads, grad_vectors)
            if step == 0 and grad_pooled is not None:
                aggregation.mean_backward(chunk, grad_pooled, grad_vectors)
            passed: Tensor | None = None  # to the temperatures of this step
            if step < options.corrections:
                assert grad_products is not None
                assert grad_temperatures is not None
                passed = correspondence.regulate_backward(
                    chunk, self.regulated[step], aligned.rounded, grad_products, grad_temperatures, grad_gates,
                    self._of("correspondence", step), at_step(grads.correspondence, step), grad_vectors,
                )  # fmt: skip
            grad_attended = alignment.align_backward(
                chunk, aligned, grad_vectors, self._of("alignment", step), at_step(grads.alignment, step)
            )
            grad_weights = alignment.attended_backward(chunk, attention, grad_attended)
            grad_products, grad_temperatures = alignment.attend_backward(
                chunk, attention, options.temperature, grad_weights
            )
            if passed is not None:
                grad_temperatures.add_(passed)
        assert grad_products is not None, "a scorer attends at least once"
        if grad_plain is not None:
            grad_products.add_(grad_plain)
        chunk.plain_products_backward(grad_products)

    def _of(self, stage: str, step: int) -> Any:
        """The parameters of a stage's step."""
        return at_step(getattr(self.parameters, stage), step)

    def _pooled(self) -> Tensor:  # [pairs, S]
        assert self.mean is not None
        return self.pooled[-1].pooled if self.pooled else self.mean

    def _pool(self, step: int) -> None:
        of_step = self._of("aggregation", step)
        vectors = self.steps[-1].aligned.as_vectors()
        self.pooled.append(aggregation.pool(self.chunk, vectors, self._pooled(), of_step, self.dropout, step))

    def _pool_backward(
        self, step: int, grad_pooled: Tensor | None, grads: RegulatedParameters, grad_vectors: Tensor
    ) -> Tensor:
        assert grad_pooled is not None
        vectors = self.steps[step if self.options.regulator == "rcar" else 0].aligned.as_vectors()
        return aggregation.pool_backward(
            self.chunk, self.pooled[step], vectors, grad_pooled, self._of("aggregation", step),
            at_step(grads.aggregation, step), grad_vectors, self.dropout, step,
        )  # fmt: skip

    def _logits(self) -> Tensor:  # [pairs]
        score = self.parameters.score
        assert score is not None
        return self._pooled() @ score.weight + score.bias

    def _score_backward(self, grad_scores: Tensor, grads: RegulatedParameters) -> Tensor:  # [pairs, S]
        score = self.parameters.score
        assert score is not None
        assert grads.score is not None
        scores = torch.sigmoid(self._logits())
        grad_logits = grad_scores.flatten() * scores * (1 - scores)
        grads.score.weight.addmv_(self._pooled().t(), grad_logits)
        grads.score.bias.add_(grad_logits.sum())
        return grad_logits[:, None] * score.weight
