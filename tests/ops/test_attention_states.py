"""``attention_states`` and ``RegulatedScorer.attention_states``: what the scores of chosen pairs rest on."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers import random_batch
from itm_kernels.nn import RegulatedScorer

PAIRS = torch.tensor([[0, 0], [3, 1], [3, 5], [4, 2]])


def scorer_of(direction: str, regulator: str, steps: int) -> RegulatedScorer:
    torch.manual_seed(0)
    made = RegulatedScorer(24, 10, direction=direction, regulator=regulator, steps=steps).double().eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)
    return made


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_the_last_attention_gives_the_scores_of_rcr(direction: str, steps: int, packed: bool) -> None:
    batch = random_batch(1, region_counts=True, shortest=2, dtype=torch.float64)
    batch = batch.packed() if packed else batch
    scorer = scorer_of(direction, "rcr", steps)
    states = scorer.attention_states(
        batch.regions, batch.words, batch.word_counts, PAIRS, region_counts=batch.region_counts
    )
    assert len(states) == steps + 1
    scores = scorer(batch.regions, batch.words, batch.word_counts, region_counts=batch.region_counts)
    padded = random_batch(1, region_counts=True, shortest=2, dtype=torch.float64)
    assert padded.region_counts is not None
    for p, (image, caption) in enumerate(PAIRS.tolist()):
        regions = padded.regions[image, : padded.region_counts[image]]
        words = padded.words[caption, : padded.word_counts[caption]]
        queries, keys = (words, regions) if direction == "t2i" else (regions, words)
        weights = states[-1].weights[p, : len(queries), : len(keys)]
        assert torch.allclose(weights.sum(1), torch.ones(len(queries), dtype=torch.float64))
        cosine = F.cosine_similarity(queries, weights @ keys, dim=1).mean()
        assert (cosine - scores[image, caption]).abs() <= 1e-7  # 1e-8 stands beside the norm there


def test_gates_begin_with_ones_and_change_step_by_step() -> None:
    batch = random_batch(2, shortest=9)
    states = scorer_of("t2i", "rcar", 3).float().attention_states(batch.regions, batch.words, batch.word_counts, PAIRS)
    assert len(states) == 3
    assert (states[0].gate == 1).all()
    assert (states[0].temperature == 10).all()
    for before, after in itertools.pairwise(states):
        assert after.gate.shape == (4, 9, 24)
        assert after.temperature.shape == (4, 9)
        assert after.weights.shape == (4, 9, 12)
        assert (after.gate.abs() <= 1).all()
        assert (after.temperature >= 0).all()
        assert not torch.equal(before.gate, after.gate)
        assert not torch.equal(before.temperature, after.temperature)


def test_without_rcr_there_is_one_attention() -> None:
    batch = random_batch(3)
    assert (
        len(scorer_of("i2t", "rar", 2).float().attention_states(batch.regions, batch.words, batch.word_counts, PAIRS))
        == 1
    )


def test_gradients_reach_the_parameters() -> None:
    batch = random_batch(4, shortest=9)
    scorer = scorer_of("t2i", "rcar", 2).float()
    scorer.attention_states(batch.regions, batch.words, batch.word_counts, PAIRS)[-1].weights[..., 0].sum().backward()
    gradient = scorer.rcr_modules[0].get_parameter("rcr_matrix_w.2.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([[0, 0]], TypeError, "pairs must be an int64 tensor, got list"),
        (torch.zeros(1, 2), TypeError, "pairs must be an int64 tensor, got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"pairs must be \[P, 2\]"),
        (torch.tensor([[5, 0]]), ValueError, r"image within 0..4, got 5"),
        (torch.tensor([[0, -1]]), ValueError, r"caption within 0..5, got -1"),
    ],
    ids=str,
)
def test_pairs_that_are_refused(pairs: object, error: type[Exception], message: str) -> None:
    batch = random_batch(5)
    with pytest.raises(error, match=message):
        scorer_of("t2i", "rcr", 1).float().attention_states(batch.regions, batch.words, batch.word_counts, pairs)
