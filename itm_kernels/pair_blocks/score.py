"""The score of a pair, ``sigmoid(weight . x + bias)``, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.ops.parameters import ScoreParameters
from itm_kernels.pair_blocks.blocks import PairBlock


def scores(block: PairBlock, vectors: Tensor, score: ScoreParameters) -> Tensor:  # [pairs, S] -> [G, segments]
    """Scores of all pairs."""
    made = torch.addmv(score.bias.expand(block.pairs), vectors, score.weight)
    return made.sigmoid_().view(block.groups, -1)


def backward(
    block: PairBlock,
    vectors: Tensor,  # [pairs, S]
    score: ScoreParameters,
    grad_scores: Tensor,  # [G, segments]
    grads: ScoreParameters,  # added to
) -> Tensor:  # [pairs, S]
    """Gradient of the vectors."""
    made = scores(block, vectors, score)
    grad_logits = torch.ops.aten.sigmoid_backward(grad_scores, made).view(-1)
    grads.weight.addmv_(vectors.t(), grad_logits)
    block.add_sum(grads.bias, grad_logits[:, None])
    return torch.outer(grad_logits, score.weight)
