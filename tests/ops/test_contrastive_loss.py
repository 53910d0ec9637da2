"""contrastive_loss: InfoNCE in both directions, and its masks."""

from __future__ import annotations

import math

import pytest
import torch

from itm_kernels import contrastive_loss


def literal_loss(scores: list[list[float]], temperature: float, masked: set[tuple[int, int]]) -> float:
    size = len(scores)
    total = 0.0
    for i in range(size):
        row = [math.exp(scores[i][j] / temperature) for j in range(size) if (i, j) not in masked]
        column = [math.exp(scores[j][i] / temperature) for j in range(size) if (j, i) not in masked]
        total += math.log(sum(row)) + math.log(sum(column)) - 2 * scores[i][i] / temperature
    return total / (2 * size)


@pytest.mark.parametrize("grouped", [False, True])
def test_equals_its_definition(grouped: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 5, dtype=torch.float64)
    groups = torch.tensor([0, 1, 0, 2, 1]) if grouped else None
    masked = set()
    if groups is not None:
        masked = {(i, j) for i in range(5) for j in range(5) if i != j and groups[i] == groups[j]}
    loss = contrastive_loss(scores, temperature=0.07, image_groups=groups, caption_groups=groups)
    assert loss.item() == pytest.approx(literal_loss(scores.tolist(), 0.07, masked), abs=1e-10)


def test_gradcheck_with_groups() -> None:
    torch.manual_seed(1)
    scores = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(
        lambda s: contrastive_loss(s, temperature=0.5, image_groups=groups, caption_groups=groups), scores
    )


def test_empty_batch_is_zero() -> None:
    assert contrastive_loss(torch.zeros(0, 0), temperature=1.0).item() == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="contrastive_loss: temperature must be a positive number"):
        contrastive_loss(torch.zeros(2, 2), temperature=temperature)


def test_refuses_shape() -> None:
    with pytest.raises(ValueError, match=r"contrastive_loss: scores must be \[B, B\]"):
        contrastive_loss(torch.zeros(2, 3), temperature=1.0)
