"""triplet_loss: the published hinge loss, and its masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from itm_kernels import triplet_loss

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "hinge_loss.npz"


@pytest.mark.parametrize(("hardest", "name"), [(True, "max"), (False, "sum")])
def test_golden(hardest: bool, name: str) -> None:
    golden = np.load(GOLDEN)
    scores = torch.tensor(golden["scores"], requires_grad=True)
    loss = triplet_loss(scores, margin=float(golden["margin"]), hardest=hardest)
    loss.backward()
    assert abs(loss.item() - float(golden[f"loss_{name}"])) < 1e-9
    np.testing.assert_allclose(scores.grad.numpy(), golden[f"grad_{name}"], atol=1e-12)


def literal_loss(scores: list[list[float]], margin: float, hardest: bool, masked: set[tuple[int, int]]) -> float:
    """The definition, entry by entry."""
    size, total = len(scores), 0.0
    rows: list[list[float]] = [[0.0] for _ in range(size)]
    columns: list[list[float]] = [[0.0] for _ in range(size)]
    for i in range(size):
        for j in range(size):
            if i == j or (i, j) in masked:
                continue
            rows[i].append(max(0.0, margin + scores[i][j] - scores[i][i]))
            columns[j].append(max(0.0, margin + scores[i][j] - scores[j][j]))
    pick = max if hardest else sum
    for entries in rows + columns:
        total += pick(entries)
    return total


@pytest.mark.parametrize("hardest", [True, False])
def test_groups_mask_false_negatives(hardest: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 6, dtype=torch.float64)
    groups = torch.tensor([3, 1, 3, 2, 1, 0])
    masked = {(i, j) for i in range(6) for j in range(6) if i != j and groups[i] == groups[j]}
    assert masked
    loss = triplet_loss(scores, margin=0.3, hardest=hardest, image_groups=groups, caption_groups=groups)
    assert loss.item() == pytest.approx(literal_loss(scores.tolist(), 0.3, hardest, masked), abs=1e-12)
    unmasked = triplet_loss(scores, margin=0.3, hardest=hardest)
    assert unmasked.item() == pytest.approx(literal_loss(scores.tolist(), 0.3, hardest, set()), abs=1e-12)
    assert unmasked > loss


def test_groups_never_mask_the_diagonal() -> None:
    scores = torch.zeros(2, 2, requires_grad=True)
    different = torch.tensor([0, 1])
    triplet_loss(scores, image_groups=different, caption_groups=different).backward()
    assert (scores.grad.diagonal() < 0).all()


@pytest.mark.parametrize("hardest", [True, False])
def test_gradcheck_and_compile(hardest: bool) -> None:
    torch.manual_seed(1)
    scores = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: triplet_loss(s, hardest=hardest), scores)
    compiled = torch.compile(lambda s: triplet_loss(s, hardest=hardest), fullgraph=True)
    torch.testing.assert_close(compiled(scores), triplet_loss(scores, hardest=hardest))


def test_small_batches() -> None:
    assert triplet_loss(torch.zeros(0, 0)).item() == 0
    assert triplet_loss(torch.tensor([[0.3]])).item() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"scores": torch.zeros(2, 3)}, ValueError, r"\[B, B\].*\[2, 3\]"),
        ({"scores": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "floating.*int64"),
        ({"scores": torch.zeros(2, 2), "margin": float("nan")}, ValueError, "margin.*nan"),
        ({"scores": torch.zeros(2, 2), "image_groups": torch.arange(2)}, ValueError, "both or neither"),
        (
            {"scores": torch.zeros(2, 2), "image_groups": torch.zeros(3, dtype=torch.int64),
             "caption_groups": torch.zeros(2, dtype=torch.int64)},
            ValueError, r"image_groups must be \[B\] with B = 2, got \[3\]",
        ),
        (
            {"scores": torch.zeros(2, 2), "image_groups": torch.zeros(2), "caption_groups": torch.zeros(2)},
            TypeError, "image_groups must be an integer tensor",
        ),
    ],
)  # fmt: skip
def test_refusals(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"triplet_loss: .*{words}"):
        triplet_loss(**arguments)
