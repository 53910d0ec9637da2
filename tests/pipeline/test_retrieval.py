"""Recalls and ranks against a literal argsort, the rule for ties, memory, and what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itm_pipeline.errors import UserError
from itm_pipeline.metrics import five_fold, retrieval, retrieval_ranks

# The time an example takes says nothing on a busy machine.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

KEYS = [f"{way}_{key}" for way in ("i2t", "t2i") for key in ("r1", "r5", "r10", "medr", "meanr")]


def published(scores: npt.NDArray[np.float64], per_image: int) -> dict[str, float]:
    """The published protocol, word by word: sort every row, take positions; images in steps of ``per_image``."""
    images = len(scores)
    i2t = np.zeros(images)
    for image in range(images):
        order = np.argsort(scores[image])[::-1]
        i2t[image] = min(
            np.where(order == caption)[0][0] for caption in range(image * per_image, (image + 1) * per_image)
        )
    t2i = np.zeros(images * per_image)
    for image in range(images):
        for k in range(per_image):
            order = np.argsort(scores.T[image * per_image + k])[::-1]
            t2i[image * per_image + k] = np.where(order == image)[0][0]
    result = {}
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        for at in (1, 5, 10):
            result[f"{way}_r{at}"] = 100.0 * len(np.where(ranks < at)[0]) / len(ranks)
        result[f"{way}_medr"] = np.floor(np.median(ranks)) + 1
        result[f"{way}_meanr"] = ranks.mean() + 1
    result["rsum"] = sum(value for key, value in result.items() if key[4:] in ("r1", "r5", "r10"))
    return result


def distinct_scores(images: int, per_image: int, seed: int, skill: float = 0.0) -> npt.NDArray[np.float64]:
    """Scores without ties; ``skill`` lifts the right pairs."""
    rng = np.random.default_rng(seed)
    scores = rng.permutation(images * images * per_image).reshape(images, -1) / (images * images * per_image)
    own = np.arange(images * per_image) // per_image
    scores[own, np.arange(images * per_image)] += skill + 1e-7
    return scores


@RELAXED
@given(
    images=st.integers(1, 30),
    per_image=st.integers(1, 5),
    seed=st.integers(0, 1000),
    skill=st.sampled_from([0.0, 0.3, 0.7]),
)
def test_equal_to_the_published_protocol_without_ties(images: int, per_image: int, seed: int, skill: float) -> None:
    scores = distinct_scores(images, per_image, seed, skill)
    expected = published(scores, per_image)
    result = retrieval(scores, per_image)
    assert list(result) == [*KEYS, "rsum"]
    assert result == pytest.approx(expected, abs=1e-9)
    assert all(type(value) is float for value in result.values())


def test_a_worked_example() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.2], [0.8, 0.3, 0.4, 0.6]])
    # Image 0: its best caption (0.9) comes first. Image 1: its best (0.6) comes behind 0.8.
    # Captions: 0.9 > 0.8; 0.1 < 0.3; 0.4 < 0.5; 0.6 > 0.2.
    image_ranks, caption_ranks = retrieval_ranks(scores, 2)
    assert image_ranks.tolist() == [0, 1]
    assert caption_ranks.tolist() == [0, 1, 1, 0]
    result = retrieval(scores, 2)
    assert result["i2t_r1"] == result["t2i_r1"] == 50.0
    assert result["i2t_r5"] == result["t2i_r10"] == 100.0
    assert result["i2t_medr"] == 1.0
    assert result["i2t_meanr"] == 1.5
    assert result["rsum"] == 500.0


def test_ties_count_against_the_model() -> None:
    image_ranks, caption_ranks = retrieval_ranks(np.zeros((4, 20)))
    assert image_ranks.tolist() == [15] * 4, "behind the captions of all other images, not behind its own"
    assert caption_ranks.tolist() == [3] * 20
    assert retrieval(np.full((60, 300), 0.5))["rsum"] == 0.0


@RELAXED
@given(images=st.integers(1, 8), per_image=st.integers(1, 3), seed=st.integers(0, 1000))
def test_ties_take_the_worst_order_of_equal_scores(images: int, per_image: int, seed: int) -> None:
    # Few values, so ties everywhere; the worst order is that in which the right pairs are a hair smaller.
    scores = np.random.default_rng(seed).integers(0, 3, (images, images * per_image)).astype(np.float64)
    own = np.arange(images * per_image) // per_image
    lowered = scores.copy()
    lowered[own, np.arange(images * per_image)] -= 0.5
    image_ranks, caption_ranks = retrieval_ranks(scores, per_image)
    for image in range(images):
        mine = slice(image * per_image, (image + 1) * per_image)
        others = np.delete(lowered[image], np.arange(images * per_image)[mine])
        assert image_ranks[image] == np.sum(others > lowered[image, mine].max())
    for caption in range(images * per_image):
        others = np.delete(lowered[:, caption], own[caption])
        assert caption_ranks[caption] == np.sum(others > lowered[own[caption], caption])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_dtypes(dtype: type) -> None:
    scores = (distinct_scores(6, 5, 3) * 180).round().astype(dtype)  # whole numbers, exact in every dtype
    assert retrieval(scores) == retrieval(scores.astype(np.float64))


def test_takes_maps_views_and_tensors(tmp_path: Path) -> None:
    scores = distinct_scores(12, 5, 4, 0.4).astype(np.float32)
    expected = retrieval(scores)
    np.save(tmp_path / "scores.npy", scores)
    assert retrieval(np.load(tmp_path / "scores.npy", mmap_mode="r")) == expected
    assert retrieval(torch.from_numpy(scores).requires_grad_()) == expected
    wide = np.zeros((24, 120), dtype=np.float32)
    wide[::2, ::2] = scores
    assert retrieval(wide[::2, ::2]) == expected
    assert retrieval(np.asfortranarray(scores)) == expected


@pytest.mark.parametrize("block_scores", [1, 7 * 35, 100_000])
def test_blocks_do_not_change_the_ranks(block_scores: int) -> None:
    scores = distinct_scores(17, 5, 5, 0.2)
    expected = retrieval_ranks(scores, block_scores=17 * 85)
    for found, wanted in zip(retrieval_ranks(scores, block_scores=block_scores), expected, strict=True):
        assert np.array_equal(found, wanted)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    # 64 MB on disk; a sort of all rows would take twice as much, a mask of its size 16 MB.
    scores = np.lib.format.open_memmap(tmp_path / "s.npy", mode="w+", dtype=np.float32, shape=(1800, 9000))
    scores[:] = np.random.default_rng(0).random((1, 9000), dtype=np.float32)
    tracemalloc.start()
    try:
        retrieval(scores)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * 2**20


def test_infinite_scores_are_ranked() -> None:
    scores = np.full((3, 3), -np.inf)
    np.fill_diagonal(scores, [np.inf, 1.0, 0.0])
    assert retrieval(scores, 1)["rsum"] == 600.0


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 2), (9, 49)])
@pytest.mark.parametrize("block_scores", [100, 10_000])
def test_nan_is_refused_by_place(row: int, column: int, block_scores: int) -> None:
    scores = distinct_scores(10, 5, 0)
    scores[row, column] = np.nan
    with pytest.raises(UserError, match=rf"^the score of image {row} and caption {column} is NaN"):
        retrieval_ranks(scores, block_scores=block_scores)


def test_shapes_are_refused() -> None:
    for shape, per_image in (((3, 14), 5), ((3,), 1), ((0, 0), 5), ((3, 3, 1), 1), ((5, 1), 5)):
        with pytest.raises(ValueError, match=r"must be \[I, I \* "):
            retrieval(np.zeros(shape), per_image)
    with pytest.raises(ValueError, match="captions_per_image must be at least 1"):
        retrieval(np.zeros((3, 3)), 0)
    with pytest.raises(ValueError, match="real numbers"):
        retrieval(np.zeros((3, 15), dtype=complex))


def test_five_fold_is_the_mean_over_consecutive_folds() -> None:
    scores = distinct_scores(20, 5, 9, 0.5)
    parts = [published(scores[f * 4 : f * 4 + 4, f * 20 : f * 20 + 20], 5) for f in range(5)]
    expected = {key: np.mean([part[key] for part in parts]) for key in parts[0]}
    result = five_fold(scores)
    assert result == pytest.approx(expected)
    assert result["rsum"] == pytest.approx(sum(result[key] for key in KEYS if "_r1" in key or "_r5" in key))
    assert five_fold(scores, folds=1) == pytest.approx(retrieval(scores))
    assert five_fold(scores, folds=5) != pytest.approx(retrieval(scores)), "folds are easier than the whole"


def test_five_fold_refuses() -> None:
    with pytest.raises(ValueError, match="12 images do not divide into 5 folds"):
        five_fold(np.zeros((12, 60)))
    with pytest.raises(ValueError, match="into 0 folds"):
        five_fold(np.zeros((10, 50)), folds=0)
    with pytest.raises(ValueError, match=r"must be \[I"):
        five_fold(np.zeros((10, 40)))
