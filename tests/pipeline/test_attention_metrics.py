"""Attention Precision, Recall, F1 and the pointing game: answers known by hand, and a count in fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from itm_pipeline.errors import UserError
from itm_pipeline.metrics import attention, attention_curve

NUMBERS = ("precision", "recall", "f1", "mean_f1", "pointing")


def case(rows: list[tuple[list[float], list[int]]]) -> tuple[Any, Any, Any]:
    """Weights, relevant keys by their numbers, key counts; shorter rows are padded with what must not count."""
    longest = max(len(row) for row, _ in rows)
    weights = np.full((len(rows), longest), np.nan)
    relevant = np.ones((len(rows), longest), dtype=np.bool_)
    for q, (row, meant) in enumerate(rows):
        weights[q, : len(row)] = row
        relevant[q, : len(row)] = [key in meant for key in range(len(row))]
    return weights, relevant, np.array([len(row) for row, _ in rows])


def test_one_query_by_hand() -> None:
    # 1/n is 0.25: two are attended to, one of them rightly; two are meant.
    found = attention(*case([([0.5, 0.3, 0.1, 0.1], [0, 2])]))
    assert found == {
        "precision": 0.5, "recall": 0.5, "f1": 0.5, "mean_f1": 0.5, "pointing": 1.0, "queries": 1, "skipped": 0,
    }  # fmt: skip


def test_macro_and_micro_by_hand() -> None:
    rows = [
        ([0.7, 0.1, 0.1, 0.1], [0]),  # A {0}: P 1, R 1, F1 1
        ([0.4, 0.4, 0.1, 0.1], [1, 2, 3]),  # A {0, 1}: P 1/2, R 1/3, F1 2/5; points at 0
        ([0.6, 0.2, 0.2], [1]),  # of three keys, 1/n a third; A {0}: P 0, R 0, F1 0
    ]
    macro = attention(*case(rows))
    assert macro["precision"] == 0.5
    assert macro["recall"] == pytest.approx(4 / 9, abs=1e-15)
    assert macro["f1"] == pytest.approx(8 / 17, abs=1e-15)
    assert macro["mean_f1"] == pytest.approx(1.4 / 3, abs=1e-15)
    assert macro["pointing"] == pytest.approx(1 / 3, abs=1e-15)
    micro = attention(*case(rows), average="micro")
    assert micro["precision"] == 0.5  # 2 of 4
    assert micro["recall"] == 0.4  # 2 of 5
    assert micro["f1"] == pytest.approx(4 / 9, abs=1e-15)
    assert {name: micro[name] for name in ("mean_f1", "pointing", "queries")} == {
        name: macro[name] for name in ("mean_f1", "pointing", "queries")
    }


def test_nothing_attended_has_precision_zero() -> None:
    found = attention(*case([([0.25, 0.25, 0.25, 0.25], [3]), ([0.7, 0.1, 0.1, 0.1], [0])]))
    assert (found["precision"], found["recall"], found["mean_f1"]) == (0.5, 0.5, 0.5)
    assert found["pointing"] == 0.5, "of equal weights the first"
    both = attention(*case([([0.5, 0.5], [0]), ([0.5, 0.5], [1])]), average="micro")
    assert [both[name] for name in NUMBERS] == [0, 0, 0, 0, 0.5]


def test_queries_that_mean_nothing_are_skipped_and_counted() -> None:
    rows = [([0.9, 0.1], []), ([0.9, 0.1], [0]), ([0.9, 0.1], [])]
    assert attention(*case(rows)) == {**dict.fromkeys(NUMBERS, 1.0), "queries": 1, "skipped": 2}
    nothing = attention(*case(rows[:1]))
    assert all(math.isnan(nothing[name]) for name in NUMBERS)
    assert (nothing["queries"], nothing["skipped"]) == (0, 1)
    none = attention(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.bool_), [], average="micro")
    assert all(math.isnan(none[name]) for name in NUMBERS)
    assert (none["queries"], none["skipped"]) == (0, 0)


def test_the_threshold_is_that_of_each_query() -> None:
    # A weight of 0.3 lies above a quarter and below a half.
    rows = [([0.3, 0.7], [0]), ([0.3, 0.2, 0.25, 0.25], [0])]
    found = attention(*case(rows))
    assert (found["precision"], found["recall"]) == (0.5, 0.5)
    assert attention(*case(rows), threshold=0.29)["recall"] == 1.0
    assert attention(*case(rows), threshold=0.3)["recall"] == 0.0, "larger than the threshold, not as large"


@pytest.mark.parametrize("keys", [3, 7, 36, 49])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_even_attention_attends_to_nothing_in_any_precision(keys: int, dtype: torch.dtype) -> None:
    weights = torch.full((1, keys), 1 / keys, dtype=dtype)
    relevant = torch.ones(1, keys, dtype=torch.bool)
    assert attention(weights, relevant, [keys])["recall"] == 0.0
    weights[0, 0] *= 1.5
    assert attention(weights, relevant, torch.tensor([keys]))["recall"] == 1 / keys


def test_padding_is_never_looked_at() -> None:
    weights = np.array([[0.6, 0.4, 9.0], [0.1, 0.6, 0.3]])
    relevant = np.array([[True, False, True], [False, True, True]])
    found = attention(weights, relevant, [2, 3])
    assert [found[name] for name in NUMBERS] == [1.0, 0.75, pytest.approx(6 / 7), pytest.approx(5 / 6), 1.0]
    alone = attention(weights[:, :2], relevant[:, :2], [2, 2])
    assert alone["recall"] == 1.0


def by_fractions(
    weights: npt.NDArray[Any], relevant: npt.NDArray[np.bool_], counts: list[int], threshold: Any, average: str
) -> dict[str, float]:
    """The definition, one query after another, without rounding."""
    sums, judged, pointing, f1s = [Fraction(0)] * 5, 0, 0, []
    for row, meant, n in zip(weights.tolist(), relevant.tolist(), counts, strict=True):
        right = {j for j in range(n) if meant[j]}
        if not right:
            continue
        judged += 1
        bound = 1 / n if threshold is None else threshold
        attended = {j for j in range(n) if row[j] > bound}
        p = Fraction(len(attended & right), len(attended)) if attended else Fraction(0)
        r = Fraction(len(attended & right), len(right))
        f1s.append(2 * p * r / (p + r) if p + r else Fraction(0))
        pointing += row[:n].index(max(row[:n])) in right
        parts = [p, r, Fraction(len(attended & right)), Fraction(len(attended)), Fraction(len(right))]
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    if average == "macro":
        p, r = sums[0] / judged, sums[1] / judged
    else:
        p, r = (sums[2] / sums[3] if sums[3] else Fraction(0)), sums[2] / sums[4]
    f1 = 2 * p * r / (p + r) if p + r else Fraction(0)
    exact = (p, r, f1, sum(f1s) / judged, Fraction(pointing, judged))
    return dict(zip(NUMBERS, map(float, exact), strict=True))


def drawn(seed: int, queries: int, keys: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], list[int]]:
    """Weights of few values, zeros among them, so that equal ones are everywhere; every other query means something."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 6, (queries, keys)) / 8
    relevant = rng.random((queries, keys)) < 0.3
    counts = rng.integers(1, keys + 1, queries)
    relevant[::2, 0] = True
    return weights, relevant, counts.tolist()


@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 12),
    keys=st.integers(1, 9),
    threshold=st.sampled_from([None, 0.0, 0.125, 0.3, 0.75]),
    average=st.sampled_from(["macro", "micro"]),
)
def test_against_fractions(seed: int, queries: int, keys: int, threshold: float | None, average: str) -> None:
    weights, relevant, counts = drawn(seed, queries, keys)
    found = attention(weights, relevant, counts, threshold, average)
    expected = by_fractions(weights, relevant, counts, threshold, average)
    assert {name: found[name] for name in NUMBERS} == pytest.approx(expected, abs=1e-14)
    assert found["queries"] + found["skipped"] == queries


@given(
    seed=st.integers(0, 10_000),
    queries=st.integers(1, 12),
    keys=st.integers(1, 9),
    average=st.sampled_from(["macro", "micro"]),
)
def test_the_curve_is_the_metric_at_every_threshold(seed: int, queries: int, keys: int, average: str) -> None:
    weights, relevant, counts = drawn(seed, queries, keys)
    curve = attention_curve(weights, relevant, counts, average)
    judged = [q for q in range(queries) if relevant[q, : counts[q]].any()]
    every = sorted({0.0} | {w for q in judged for w in weights[q, : counts[q]].tolist()}, reverse=True)
    assert curve["threshold"] == every
    at = [attention(weights, relevant, counts, threshold, average) for threshold in every]
    for name in ("precision", "recall", "f1"):
        assert curve[name] == pytest.approx([found[name] for found in at], abs=1e-12)
    assert curve["best_f1"] == pytest.approx(max(found["f1"] for found in at), abs=1e-12)
    best = attention(weights, relevant, counts, curve["best_threshold"], average)
    assert best["f1"] == pytest.approx(curve["best_f1"], abs=1e-12)


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_long_curve_keeps_its_ends_and_its_best(average: str, dtype: type) -> None:
    rng = np.random.default_rng(1)
    weights = rng.dirichlet(np.full(36, 0.3), 400).astype(dtype)
    relevant = (rng.random(weights.shape) < 4 * weights) | (np.arange(36) == 0)
    counts = np.full(400, 36)
    whole = attention_curve(weights, relevant, counts, average, points=10**9)
    assert len(whole["f1"]) > 10_000
    short = attention_curve(weights, relevant, counts, average)
    assert 150 < len(short["f1"]) <= 201
    assert (short["best_f1"], short["best_threshold"]) == (whole["best_f1"], whole["best_threshold"])
    assert short["best_f1"] == max(short["f1"]) == max(whole["f1"])
    assert short["recall"][0] == 0.0
    assert short["recall"][-1] == pytest.approx(max(whole["recall"]))
    steps = np.diff(short["recall"])
    assert steps.max() < 0.02
    for point in (3, 77, -1):
        found = attention(weights, relevant, counts, short["threshold"][point], average)
        assert short["precision"][point] == pytest.approx(found["precision"], abs=1e-9)
        assert short["recall"][point] == pytest.approx(found["recall"], abs=1e-9)


def test_a_curve_of_nothing_is_empty() -> None:
    curve = attention_curve(*case([([0.5, 0.5], [])]))
    assert [curve[name] for name in ("threshold", "precision", "recall", "f1")] == [[], [], [], []]
    assert math.isnan(curve["best_f1"])


def test_tensors_with_gradients_are_taken() -> None:
    weights, relevant, counts = drawn(3, 6, 5)
    tensor = torch.tensor(weights, requires_grad=True)
    assert attention(tensor, torch.tensor(relevant), torch.tensor(counts)) == attention(weights, relevant, counts)


@pytest.mark.parametrize("metric", [attention, attention_curve])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones(3)}, r"weights must be floating-point \[Q, K\], got float64 \[3\]"),
        ({"weights": np.ones((2, 3), dtype=np.int64)}, "weights must be floating-point .*, got int64"),
        ({"weights": torch.ones(2, 3).bfloat16()}, "weights must be float16, float32 or float64, got bfloat16"),
        ({"relevant": np.ones((2, 3))}, r"relevant must be bool \[2, 3\] as weights, got float64"),
        (
            {"relevant": np.ones((3, 2), dtype=np.bool_)},
            r"relevant must be bool \[2, 3\] as weights, got bool \[3, 2\]",
        ),
        ({"key_counts": [3]}, r"key_counts must be integers \[2\], got int64 \[1\]"),
        ({"key_counts": [3.0, 1.0]}, r"key_counts must be integers \[2\], got float64"),
        ({"key_counts": [3, 4]}, r"key_counts must be in 1\.\.3, got 3 to 4"),
        ({"key_counts": [0, 3]}, r"key_counts must be in 1\.\.3, got 0 to 3"),
        ({"average": "mean"}, "average must be one of macro, micro, got 'mean'"),
    ],
    ids=str,
)
def test_refusals(metric: Any, change: dict[str, Any], message: str) -> None:
    given = {"weights": np.ones((2, 3)), "relevant": np.ones((2, 3), dtype=np.bool_), "key_counts": [3, 3], **change}
    with pytest.raises(ValueError, match=f"^{metric.__name__}: {message}"):
        metric(**given)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, "1/n"])
def test_thresholds_that_are_none(threshold: Any) -> None:
    with pytest.raises(ValueError, match="attention: threshold must be a finite number or None"):
        attention(np.ones((1, 1)), np.ones((1, 1), dtype=np.bool_), [1], threshold)


def test_nan_weights_are_told() -> None:
    weights = np.array([[0.5, 0.5], [0.5, np.nan]])
    with pytest.raises(UserError, match="an attention weight of query 1 is NaN"):
        attention(weights, np.ones((2, 2), dtype=np.bool_), [2, 2])
    assert attention(weights, np.ones((2, 2), dtype=np.bool_), [2, 1])["queries"] == 2, "padding may be anything"
