"""Attention filtration of a block (SAF) up to the filtered vectors of its pairs, forward and backward.

    a_i = sigmoid(norm(logit_i))      w_i = a_i / (sum_j a_j + eps)      f = l2norm(sum_i w_i x_i)

Elementwise torch operations around the steps that know which rows are whose: this stage is left to itself where the
vectors are wanted, and it is all of it memory that is walked. The scorer, which wants a number a pair, has steps of its
own (:mod:`itm_kernels.pair_blocks.filtration`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.pair_blocks import filtration
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.stage_places import members
from itm_kernels.pair_blocks.steps import Filter

EPS = 1e-8


class Filtered(NamedTuple):
    """Filtered vectors, and what their backward reads."""

    vectors: Tensor  # [pairs, S] float32
    norms: Tensor  # [pairs], before the normalisation
    normalised: Tensor  # [rows + pairs], logits
    chances: Tensor  # [rows + pairs], sigmoids; 0 for rows of the padding
    totals: Tensor  # [pairs]


class Slopes(NamedTuple):
    """Of a block: gradients that reach the batch normalisation from above."""

    of_nodes: Tensor  # [rows + pairs, S], of the sums of nodes, at each of them
    of_normed: Tensor  # [rows + pairs], at what the normalisation gives
    of_pairs: Tensor  # [pairs, 2], sums of these, and of them times the normalised logits


def filtrate(block: PairBlock, nodes: Tensor, statistics: Tensor, by: Filter) -> Filtered:
    """Of ``nodes [rows + pairs, S]``; ``statistics [2, segments]`` are mean and biased variance."""
    mean, rate = statistics[0], 1 / (statistics[1] + by.eps).sqrt()
    normalised = filtration.find_logits(block, nodes, by).sub_(_of_segments(block, mean))
    normalised.mul_(_of_segments(block, rate))
    chances = torch.addcmul(by.norm_bias, normalised, by.norm_weight).sigmoid_()
    _words(block, chances).masked_fill_(block.queries.segments < 0, 0)
    totals = _sums(block, chances[:, None])[:, 0].add_(EPS)
    vectors = _sums(block, nodes * (chances / _of_pairs(block, totals))[:, None])
    norms = block.floats(block.pairs)
    block.steps.normalise_rows(vectors, torch.zeros_like(vectors[0]), norms, vectors)
    return Filtered(vectors, norms, normalised, chances, totals)


def slopes(block: PairBlock, nodes: Tensor, made: Filtered, grad: Tensor) -> Slopes:
    """From the gradient of the vectors ``[pairs, S]``, which is overwritten, to the batch normalisation."""
    block.steps.normalise_rows_backward(made.vectors, made.norms, grad, grad)
    of_nodes = _of_pairs(block, grad)
    of_weights = (of_nodes * nodes).sum(1)
    totals = _of_pairs(block, made.totals)
    middle = _sums(block, (of_weights * made.chances / totals)[:, None])[:, 0]
    of_chances = of_weights.sub_(_of_pairs(block, middle)).div_(totals)
    of_normed = torch.ops.aten.sigmoid_backward(of_chances, made.chances)
    of_pairs = _sums(block, torch.stack([of_normed, of_normed * made.normalised], dim=1))
    return Slopes(of_nodes, of_normed, of_pairs)


def backward(
    block: PairBlock,
    nodes: Tensor,  # [rows + pairs, S]
    made: Filtered,
    found: Slopes,
    statistics: Tensor,  # [2, segments]
    by: Filter,
    means: Tensor | None,  # [2, segments]
    grads: FiltrationParameters,  # added to
) -> Tensor:  # [rows + pairs, S]
    """Gradient of the nodes.

    ``means`` are those of the slopes over the batch, where it made the statistics; the gradient of the logits' bias is
    zero there, as their mean is taken off. None: statistics of elsewhere.
    """
    of_logits = found.of_normed
    if means is not None:
        of_logits = of_logits - _of_segments(block, means[0]) - made.normalised * _of_segments(block, means[1])
        _words(block, of_logits).masked_fill_(block.queries.segments < 0, 0)
    rate = by.norm_weight / (statistics[1] + by.eps).sqrt()
    of_logits = of_logits * _of_segments(block, rate)
    assert grads.norm_weight is not None
    assert grads.norm_bias is not None
    grads.weight.addmv_(nodes.t(), of_logits)
    if means is None:
        grads.bias.add_(of_logits.sum())
    of_norm_bias, of_norm_weight = found.of_pairs.sum(0, dtype=torch.float64).split(1)
    grads.norm_weight.add_(of_norm_weight)
    grads.norm_bias.add_(of_norm_bias)
    of_sums = found.of_nodes.mul_((made.chances / _of_pairs(block, made.totals))[:, None])
    return of_sums.addr_(of_logits, by.weight)


def _words(block: PairBlock, nodes: Tensor) -> Tensor:  # [rows + pairs] -> [G, L], a view
    return nodes[: block.rows].view(block.groups, -1)


def _sums(block: PairBlock, nodes: Tensor) -> Tensor:  # [rows + pairs, n] -> [pairs, n]
    """Over the nodes of every pair that count."""
    sums = block.floats(block.pairs, nodes.shape[1])
    block.steps.mean_rows(block, nodes[: block.rows], sums)
    counts = block.queries.counts.to(torch.float32)
    sums.view(block.groups, block.segments, -1).mul_(counts[:, None])
    return sums.add_(nodes[block.rows :])


def _of_segments(block: PairBlock, numbers: Tensor) -> Tensor:  # [segments] -> [rows + pairs]
    return _of_pairs(block, numbers.expand(block.groups, -1).reshape(-1))


def _of_pairs(block: PairBlock, numbers: Tensor) -> Tensor:  # [pairs, ..] -> [rows + pairs, ..]
    """At every node that of its pair."""
    own = numbers.unflatten(0, (block.groups, -1))
    made = numbers.new_empty(block.rows + block.pairs, *numbers.shape[1:])
    segments, _ = members(block.queries)
    torch.index_select(own, 1, segments, out=made[: block.rows].unflatten(0, (block.groups, -1)))
    made[block.rows :] = numbers
    return made
