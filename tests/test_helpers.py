"""Test helpers are tested: a tolerance that nothing fails is no tolerance."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from focal import decided, excesses, undecided, without
from golden import CASES, golden_batch, golden_options, golden_result, hinge_loss, published_options
from helpers import (
    FOCALS,
    GRADIENT_FLOOR,
    Place,
    Result,
    assert_exact,
    assert_ladder,
    every_option,
    label,
    option_pairs,
    random_batch,
    relative_error,
    run,
    score_error,
    score_floor,
    truth,
    unit,
)
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS


def results(scores: float = 0.0, regions: float = 0.0, words: float = 0.0) -> Result:
    """A result of ones, each part off by that much."""
    one = torch.ones(2, 3, dtype=torch.float64)
    return Result(one + scores, one + regions, one + words)


def test_random_batches_repeat_and_differ() -> None:
    first, again, other = random_batch(1), random_batch(1), random_batch(2)
    assert torch.equal(first.regions, again.regions)
    assert torch.equal(first.words.nan_to_num(), again.words.nan_to_num())
    assert first.word_counts == again.word_counts
    assert not torch.equal(first.regions, other.regions)


def test_a_random_batch_is_ragged_and_its_padding_is_poison() -> None:
    batch = random_batch(3, region_counts=True, words=9, regions=12)
    assert batch.region_counts is not None
    assert (max(batch.word_counts), min(batch.word_counts)) == (9, 1)
    assert (max(batch.region_counts), min(batch.region_counts)) == (12, 1)
    for side, padding in zip((batch.regions, batch.words), batch.padding(), strict=True):
        assert padding.any()
        assert torch.equal(side.isnan().all(-1), padding)
        assert torch.equal(side.isnan().any(-1), padding)
        torch.testing.assert_close(side[~padding].norm(dim=-1), torch.ones(int((~padding).sum())))


def test_shortest_is_kept() -> None:
    assert min(random_batch(4, captions=200, shortest=3).word_counts) == 3
    assert random_batch(4, captions=2, word_counts=[2, 4]).word_counts == [2, 4]


def test_packed_batches_hold_the_valid_words_in_order() -> None:
    batch = random_batch(5)
    packed = batch.packed()
    assert packed.words.shape == (sum(batch.word_counts), batch.words.shape[2])
    assert packed.words.isfinite().all()
    assert torch.equal(packed.words, batch.words[~batch.padding()[1]])
    assert random_batch(5, captions=0).packed().words.shape == (0, 24)


def test_batches_move_between_dtypes() -> None:
    batch = random_batch(6).to(torch.bfloat16)
    assert batch.regions.dtype == batch.words.dtype == torch.bfloat16
    assert batch.grad_scores.dtype == torch.float64


def test_unit_vectors() -> None:
    vectors = unit(4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4, 5, dtype=torch.float64))


def test_errors() -> None:
    assert score_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert score_error(torch.empty(0, 3), torch.empty(0, 3)) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == 0.5
    assert relative_error(torch.tensor([0.0, 0.5]), torch.full((2,), 1e-17)) == pytest.approx(0.5)


def test_nan_is_an_error_everywhere() -> None:
    nan = results(scores=torch.nan)
    with pytest.raises(AssertionError, match="scores"):
        assert_ladder(nan, results(), results(), {})
    with pytest.raises(AssertionError, match="scores"):
        assert_exact(nan, results())
    with pytest.raises(AssertionError, match="words"):
        assert_ladder(results(words=torch.nan), results(), results(), {})


@pytest.mark.parametrize("part", ["scores", "regions", "words"])
def test_the_ladder_is_the_noise_floor_or_twice_the_peer(part: str) -> None:
    floor = 1e-6 if part == "scores" else GRADIENT_FLOOR
    perfect, options = results(), {"agg_func": "Mean"}
    assert_ladder(results(**{part: 0.9 * floor}), perfect, perfect, options)
    with pytest.raises(AssertionError, match=part):
        assert_ladder(results(**{part: 1.1 * floor}), perfect, perfect, options)
    assert_ladder(results(**{part: 1.9e-3}), results(**{part: 1e-3}), perfect, options)
    with pytest.raises(AssertionError, match=part):
        assert_ladder(results(**{part: 2.1e-3}), results(**{part: 1e-3}), perfect, options)
    with pytest.raises(AssertionError, match=part):
        assert_ladder(results(**{part: 0.9 * floor}), perfect, perfect, options, noise=False)


def test_the_ladder_leaves_out_excused_scores_alone() -> None:
    got, excused = results(), torch.zeros(2, 3, dtype=torch.bool)
    got.scores[1, 2] += 1
    excused[1, 2] = True
    assert_ladder(got, results(), results(), {}, excused=excused)
    got.scores[0, 0] += 1
    with pytest.raises(AssertionError, match="scores"):
        assert_ladder(got, results(), results(), {}, excused=excused)


def test_floors_of_scores() -> None:
    assert score_floor({"agg_func": "Sum"}) == 1e-5
    assert score_floor({"agg_func": "Max"}) == score_floor({}) == 1e-6


@pytest.mark.parametrize(("part", "off"), [("scores", 2e-9), ("regions", 2e-6), ("words", 2e-6)])
def test_exact(part: str, off: float) -> None:
    assert_exact(results(**{part: off / 4}), results())
    with pytest.raises(AssertionError, match=part):
        assert_exact(results(**{part: off}), results())


def test_truth_is_float64_of_the_same_inputs() -> None:
    batch = random_batch(7, dtype=torch.bfloat16)
    true = truth(batch)
    assert {value.dtype for value in true} == {torch.float64}
    assert torch.equal(true.scores, run(batch.to(torch.float64), "reference").scores)


def test_every_option_is_every_option() -> None:
    cases = every_option()
    assert len(cases) == len({label(case) for case in cases}) == 3 * 7 * 4 * 3 + 7 * 4 * 3


def test_any_two_options_meet() -> None:
    cases = option_pairs()
    assert len(cases) < 50
    values = {"direction": DIRECTIONS, "raw_feature_norm": RAW_FEATURE_NORMS, "agg_func": AGG_FUNCS, "focal": FOCALS}
    for one, other in itertools.combinations(values, 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(values[one], values[other])), (one, other)
    peaks = [case for case in cases if "peak_weight" in case]
    assert all(case["direction"] == "t2i" for case in peaks)
    for name in ("raw_feature_norm", "agg_func", "focal"):
        assert {case[name] for case in peaks} == set(values[name])


def test_places_have_names_and_reasons() -> None:
    assert str(Place("eager")) == "eager-cpu"
    assert Place("eager").why_not("cross_attention_scores", torch.float64) is None
    assert Place("native").why_not("cross_attention_scores", torch.float64)
    if not torch.cuda.is_available():
        assert Place("eager", "cuda").why_not("cross_attention_scores", torch.float32) == "there is no CUDA device"


def test_excesses_are_the_published_comparisons() -> None:
    weights = torch.softmax(torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    equal = 7 * weights - weights.sum(1, keepdim=True) > 0
    assert torch.equal(excesses(weights, "equal") > 0, equal)
    # The published form: differences weighted by the other key's square root, summed over the other keys.
    differences = weights[:, :, None] - weights[:, None]  # [B, key, other, Q]
    prob = (differences * weights.sqrt()[:, None]).sum(2) > 0
    assert torch.equal(excesses(weights, "prob") > 0, prob)


def test_undecided_pairs_are_those_on_the_edge() -> None:
    batch = random_batch(8, images=3, captions=4, regions=6, words=5, shortest=5, dtype=torch.float64)
    options = {"direction": "both", "focal": "equal", "lambda_softmax": 20.0}
    assert not undecided(batch, {"direction": "both"}, 1.0).any()
    assert not undecided(batch, options, 1e-12).any()
    assert undecided(batch, options, 10.0).all()
    # All alike is decided: every weight lies on the threshold, and all are kept.
    alike = dataclasses.replace(batch, regions=batch.regions[:, :1].expand(-1, 6, -1))
    assert not undecided(alike, options | {"direction": "t2i"}, 1e-12).any()


def test_undecided_finds_real_flips() -> None:
    batch = random_batch(9, images=30, captions=30, regions=9, words=7, width=64, shortest=3, dtype=torch.bfloat16)
    options = {"direction": "both", "focal": "equal", "lambda_softmax": 20.0, "agg_func": "Mean"}
    error = (run(batch, "eager", **options).scores - truth(batch, **options).scores).abs()
    flips = undecided(batch, options, 2e-3, rounding=torch.bfloat16)
    assert error[flips].max() > 2 * error[~flips].max()


def test_undecided_of_ragged_images_is_that_of_each_alone() -> None:
    batch = random_batch(10, images=6, captions=5, region_counts=True, dtype=torch.float64)
    options = {"direction": "both", "focal": "prob", "lambda_softmax": 20.0}
    together = undecided(batch, options, 0.05)
    assert together.any()
    assert not together.all()
    assert batch.region_counts is not None
    for i, n in enumerate(batch.region_counts):
        alone = dataclasses.replace(batch, regions=batch.regions[i : i + 1, :n], region_counts=None)
        assert torch.equal(undecided(alone, options, 0.05)[0], together[i])


def test_without_takes_gradients_of_pairs_away() -> None:
    batch = random_batch(11)
    pairs = torch.zeros(5, 6, dtype=torch.bool)
    pairs[2] = True
    less = without(batch, pairs)
    assert not less.grad_scores[2].any()
    assert torch.equal(less.grad_scores[:2], batch.grad_scores[:2])
    assert not run(less, "eager").grad_regions[2].any()


def test_decided_will_not_excuse_everything() -> None:
    batch = random_batch(12, images=3, captions=4, regions=6, words=5, shortest=5)
    with pytest.raises(AssertionError):
        decided(batch, {"direction": "both", "focal": "equal", "raw_feature_norm": "l2norm"}, 10.0)


def test_golden_vectors_are_whole() -> None:
    batch = golden_batch()
    assert batch.regions.shape == (4, 36, 64)
    assert batch.words.shape == (5, 11, 64)
    assert batch.regions.dtype == torch.float64
    for case in CASES:
        golden = golden_result(case)
        assert golden.scores.shape == (4, 5)
        assert golden.grad_regions.shape == batch.regions.shape
        assert golden.grad_words.shape == batch.words.shape
        assert not golden.grad_words[batch.padding()[1]].any()
        assert golden_options(case)["direction"] in ("t2i", "i2t", "both")


def test_golden_options_are_the_published_ones() -> None:
    assert golden_options("bfan_prob") == {
        "direction": "both", "focal": "prob", "lambda_softmax": 20.0, "agg_func": "Mean",
    }  # fmt: skip
    assert golden_options("pfan_t2i_mean")["peak_weight"] == 0.5
    assert golden_options("pfan_i2t_mean")["peak_weight"] == 0.0
    options = golden_options("scan_i2t_l1norm_lse")
    assert options["lambda_softmax"] == published_options("scan_i2t_l1norm_lse")["lambda_softmax"]
    assert options["raw_feature_norm"] == "l1norm"
    assert options["lambda_lse"] == 5.0


def test_the_hinge_vectors_are_whole() -> None:
    loss = hinge_loss()
    assert loss["scores"].shape == (7, 7)
    assert {"margin", "loss_max", "grad_max", "loss_sum", "grad_sum"} < set(loss)
