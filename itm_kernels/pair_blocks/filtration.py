"""Attention filtration of a block (SAF): nodes to scores, and what crosses the images of a caption in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import FiltrationParameters, ScoreParameters
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.steps import Filter


class Gradients(NamedTuple):
    """Where gradients of parameters are added, float32."""

    filtration: FiltrationParameters
    score: ScoreParameters


def filter_of(filtration: FiltrationParameters, score: ScoreParameters | None, eps: float) -> Filter:
    """The parameters as the steps take them; ``score`` None: it is not asked for."""
    weight, *numbers = filtration
    bias, norm_weight, norm_bias = (number.view(()) for number in numbers if number is not None)
    of_score = (None, None) if score is None else (score.weight, score.bias.view(()))
    return Filter(weight, bias, norm_weight, norm_bias, eps, *of_score)


def find_logits(block: PairBlock, vectors: Tensor, by: Filter) -> Tensor:  # [rows + pairs, S] -> [rows + pairs]
    """What the batch normalisation sees of each node."""
    logits = block.floats(vectors.shape[0])
    block.steps.node_logits(vectors, by, logits)
    return logits


def filtrate(block: PairBlock, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter) -> Tensor:
    """Scores ``[G, segments]``; ``statistics [2, segments]`` are mean and biased variance."""
    scores = block.floats(block.groups, block.segments)
    block.steps.filtrate_nodes(block, vectors, logits, statistics, by, scores)
    return scores


def slopes(
    block: PairBlock, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter, grad_scores: Tensor
) -> Tensor:  # [2, segments] float64
    """Sums over a block's nodes of each caption: of the gradient at the normalised logits, and of it times these."""
    found = block.floats(block.pairs, 2)
    block.steps.filtrate_nodes_backward(block, vectors, logits, statistics, by, grad_scores, None, found, None)
    return over_groups(block, found)


def backward(
    block: PairBlock,
    vectors: Tensor,  # [rows + pairs, S] float32
    logits: Tensor,  # [rows + pairs]
    statistics: Tensor,  # [2, segments]
    by: Filter,
    grad_scores: Tensor,  # [G, segments], contiguous
    means: Tensor | None,  # [2, segments]
    grads: Gradients,  # added to
) -> Tensor:  # [rows + pairs, S] float32
    """Gradient of the nodes.

    ``means`` are those of the slopes over the batch, where it made the statistics; the gradient of the logits' bias is
    zero there, as their mean is taken off. None: statistics of elsewhere.
    """
    width = vectors.shape[1]
    grad_nodes, found = torch.empty_like(vectors), block.floats(block.pairs, 2)
    sums = block.steps.filtrate_nodes_backward(
        block, vectors, logits, statistics, by, grad_scores, means, found, grad_nodes
    )
    assert sums is not None, "nodes have a gradient"
    of_weight, of_score, of_bias, of_score_bias = sums.sum(0).split([width, width, 1, 1])
    of_norm_bias, of_norm_weight = found.sum(0, dtype=torch.float64).split(1)
    assert grads.filtration.norm_weight is not None
    assert grads.filtration.norm_bias is not None
    grads.filtration.weight.add_(of_weight)
    if means is None:
        grads.filtration.bias.add_(of_bias)
    grads.filtration.norm_weight.add_(of_norm_weight)
    grads.filtration.norm_bias.add_(of_norm_bias)
    grads.score.weight.add_(of_score)
    grads.score.bias.add_(of_score_bias)
    return grad_nodes


class Moments:
    """Mean and biased variance of the logits of each caption, gathered block by block.

    Sums over a pair are float32, of images float64. They are of deviations from the caption's mean over the first
    images, which is near that over all: the square of the difference, taken off in the end, is a part of the variance.
    """

    def __init__(self) -> None:
        self._images = 0
        self._middle: Tensor | None = None  # [segments]

    def _start(
        self, block: PairBlock, of_words: Tensor, of_wholes: Tensor
    ) -> Tensor:  # [G, L], [G, segments] -> [segments]
        segments, counts = block.queries.segments, block.queries.counts
        means = block.floats(block.pairs, 1)
        block.steps.mean_rows(block, of_words.reshape(-1, 1), means)
        middle = torch.lerp(
            of_wholes.mean(0), means.view(block.groups, -1).mean(0), (counts.double() / (counts + 1)).float()
        )
        self._near = middle[(segments - segments[0]).clamp_(min=0).long()]  # [L]; rows of the padding take any
        self._counts = counts.double()
        self._sums = torch.zeros(2, block.segments, dtype=torch.float64, device=of_wholes.device)
        return middle

    def add(self, block: PairBlock, logits: Tensor) -> None:  # [rows + pairs]
        """More images of the same captions."""
        of_words, of_wholes = (part.view(block.groups, -1) for part in logits.split([block.rows, block.pairs]))
        if self._middle is None:
            self._middle = self._start(block, of_words, of_wholes)
        powers = block.floats(logits.shape[0], 2)  # of deviations
        first, second = powers.unbind(1)
        torch.sub(of_words, self._near, out=first[: block.rows].view(of_words.shape))
        torch.sub(of_wholes, self._middle, out=first[block.rows :].view(of_wholes.shape))
        torch.mul(first, first, out=second)
        means = block.floats(block.pairs, 2)
        block.steps.mean_rows(block, powers[: block.rows], means)
        self._sums.addcmul_(over_groups(block, means), self._counts)
        self._sums.add_(over_groups(block, powers[block.rows :]))
        self._images += block.groups

    def statistics(self) -> Tensor:  # [2, segments] float64
        """Of what was added."""
        assert self._middle is not None, "there is an image"
        mean, square = self._sums / (self._images * (1 + self._counts))
        return torch.stack([self._middle + mean, (square - mean.square()).clamp_(min=0)])


def over_groups(block: PairBlock, of_pairs: Tensor) -> Tensor:  # [pairs, 2] -> [2, segments] float64
    """Sums over the images of each caption."""
    return of_pairs.view(block.groups, -1, 2).sum(0, dtype=torch.float64).t()
