"""The Triton floor in Triton's interpreter: what ``test_interpreter.py`` runs in a process of its own.

Small sizes, all kernels: groups of keys held in each class of columns and streamed, both directions, every option.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from focal import decided
from golden import CASES, golden_batch, golden_options, golden_result
from helpers import Batch, Place, Result, assert_ladder, label, option_pairs, random_batch, run, truth
from itm_kernels import cross_attention_scores
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS
from itm_kernels.pair_blocks import rows
from itm_kernels.triton import cross_attention_scores as triton_floor
from itm_kernels.triton import fused, fused_plan, packing, tiles
from memory import peak_bytes

OP = "cross_attention_scores"
FLOOR = "triton"


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    """Nothing here may be skipped: a floor that cannot run is a failure."""
    assert Place(FLOOR).why_not(OP, torch.float32) is None


def assert_fits(batch: Batch, **options: Any) -> None:
    batch, excused = decided(batch, options)
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    assert_ladder(run(batch, FLOOR, **options), peer, true, options, excused=excused)


@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_every_option(options: dict[str, Any]) -> None:
    assert_fits(random_batch(2, images=3, captions=4, shortest=3, region_counts=True), **options)


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(case: str) -> None:
    options, batch = golden_options(case), golden_batch(torch.float32)
    assert_ladder(run(batch, FLOOR, **options), run(batch, "eager", **options), golden_result(case), options)


@pytest.mark.parametrize("regions", [1, 7, 36, 64, 72, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"direction": "t2i", "raw_feature_norm": "clipped_l2norm", "focal": "prob", "agg_func": "Mean"},
        {"direction": "both", "raw_feature_norm": "softmax", "agg_func": "LogSumExp"},
    ],
    ids=label,
)
def test_group_sizes_held_and_streamed(regions: int, options: dict[str, Any]) -> None:
    assert_fits(random_batch(201, images=2, captions=3, regions=regions, words=11, width=20, shortest=4), **options)


@pytest.mark.parametrize("focal", [None, "equal", "prob"])
def test_streamed_keys_with_a_peak(focal: str | None) -> None:
    batch = random_batch(202, images=2, captions=3, regions=90, words=7, width=12, shortest=3)
    assert_fits(batch, focal=focal, peak_weight=0.5, agg_func="Max")


def test_groups_of_every_class_in_one_batch() -> None:
    counts = [3, 16, 17, 33, 49, 70, 90]
    batch = random_batch(203, images=2, captions=7, regions=5, words=90, width=12, word_counts=counts)
    assert_fits(batch, direction="both", agg_func="Sum", raw_feature_norm="l1norm")
    classes = tiles.present_classes(counts, True)
    assert classes == [*tiles.CLASSES, tiles.BEYOND]


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Batch, dict[str, Any]]:
    images, captions = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    regions = draw(st.sampled_from([1, 7, 20, 36]))
    counts = [1, *draw(st.lists(st.integers(1, 20), min_size=captions - 1, max_size=captions - 1))]
    batch = random_batch(
        draw(st.integers(0, 2**16)),
        images=images,
        captions=captions,
        regions=regions,
        words=max(counts),
        width=draw(st.integers(2, 40)),
        word_counts=counts,
        region_counts=draw(st.booleans()),
    )
    # Away from a norm over one query of random sign, where rounding is all that is left: every product positive.
    batch = dataclasses.replace(batch, regions=batch.regions + 1.5, words=batch.words + 1.5)
    form = draw(st.sampled_from(["padded", "packed", "permuted", "zero"]))
    if form == "zero":
        batch.regions[:, 0], batch.words[:, 0] = 0.0, 0.0
    if form == "permuted":
        turned = batch.regions.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        batch = dataclasses.replace(batch, regions=turned)
    options = {
        "direction": draw(st.sampled_from(DIRECTIONS)),
        "raw_feature_norm": draw(st.sampled_from(RAW_FEATURE_NORMS)),
        "agg_func": draw(st.sampled_from(AGG_FUNCS)),
        "workspace_bytes": draw(st.sampled_from([1, 1 << 16, 1 << 28])),
    }
    return (batch.packed() if form == "packed" else batch), options


@settings(max_examples=12)
@given(case=ragged())
def test_any_ragged_batch(case: tuple[Batch, dict[str, Any]]) -> None:
    batch, options = case
    true, got = truth(batch, **options), run(batch, FLOOR, **options)
    torch.testing.assert_close(got.scores.double(), true.scores, atol=5e-6, rtol=2e-6)
    for mine, real in zip(got.gradients(), true.gradients(), strict=True):
        assert mine.isfinite().all()
        scale = float(real.abs().max())
        assert float((mine.double() - real).abs().max()) <= 1e-4 * max(scale, 1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_many_blocks_are_one_block(direction: str) -> None:
    batch = random_batch(204, images=4, captions=5, region_counts=True, shortest=3)
    options = {"direction": direction}
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    for workspace_bytes in (1, 1 << 40):
        assert_ladder(run(batch, FLOOR, workspace_bytes=workspace_bytes, **options), peer, true, options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_runs_give_the_same_bits_and_leave_nothing_unwritten(direction: str) -> None:
    batch = random_batch(205, images=3, captions=4, region_counts=True)
    first, second = (run(batch, FLOOR, direction=direction) for _ in range(2))
    for mine, its in zip(first, second, strict=True):
        assert mine.isfinite().all()
        assert torch.equal(mine, its)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("norm", ["clipped_l2norm", "softmax", "no_norm"])
def test_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch, direction: str, norm: str) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    options = {"direction": direction, "raw_feature_norm": norm}
    batch = random_batch(206, images=3, captions=4, region_counts=True, shortest=3)
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_ladder(run(batch, FLOOR, **options), peer, true, options)


def test_a_layout_brings_its_offsets() -> None:
    batch = random_batch(207, images=2, captions=3, shortest=2)
    counts = torch.tensor(batch.word_counts)
    side = rows.Side(batch.words, counts, offsets=torch.tensor([0, *counts.cumsum(0).tolist()]))
    (block,) = packing.blocks((side, 1, 3))
    assert block.offsets.tolist() == [0, counts[1], counts[1] + counts[2]]
    assert torch.equal(block.rows, batch.packed().words[counts[0] :])


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_nan_stays_with_its_pair(direction: str) -> None:
    batch = random_batch(208, images=3, captions=4, shortest=4)
    clean = run(batch, FLOOR, direction=direction).scores
    batch.words[1, 2], batch.regions[2, 0] = torch.nan, torch.nan
    scores = run(batch, FLOOR, direction=direction).scores
    touched = torch.zeros_like(scores, dtype=torch.bool)
    touched[:, 1] = touched[2] = True
    assert scores[touched].isnan().all()
    assert torch.equal(scores[~touched], clean[~touched])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float16(direction: str) -> None:
    batch = random_batch(209, images=5, captions=8, regions=9, words=7, width=32, shortest=3).to(torch.float16)
    options = {"direction": direction, "agg_func": "Mean"}
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    assert_ladder(run(batch, FLOOR, **options), peer, true, options, noise=False)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck(direction: str) -> None:
    batch = random_batch(210, images=2, captions=3)
    inputs = [t.nan_to_num().requires_grad_() for t in (batch.regions, batch.words)]
    ours = (direction, "clipped_l2norm", 9.0, "LogSumExp", 6.0, "none", 0.0, 1 << 24, FLOOR)
    arguments = (*inputs, torch.tensor(batch.word_counts), None, None, *ours)
    torch.library.opcheck(torch.ops.itm_kernels.cross_attention_scores.default, arguments)
    detached = (*(t.detach() for t in inputs), *arguments[2:])
    torch.library.opcheck(
        torch.ops.itm_kernels.cross_attention_scores_backward.default, (batch.grad_scores.float(), *detached)
    )


def test_bfloat16_is_refused_here() -> None:
    reason = triton_floor.why_not(torch.device("cpu"), torch.bfloat16)
    assert reason is not None
    assert "interpreter" in reason


@pytest.mark.parametrize(
    ("direction", "form"), [("t2i", "whole"), ("i2t", "ragged"), ("both", "whole"), ("both", "float16")]
)
def test_memory_stays_within_the_bound(direction: str, form: str) -> None:
    bound = 1 << 18
    batch = random_batch(211, images=8, captions=10, regions=12, words=9, width=64, region_counts=form == "ragged")
    batch = batch.to(torch.float16) if form == "float16" else batch
    regions, words = (t.detach().requires_grad_() for t in (batch.regions, batch.words))
    options: dict[str, Any] = {"direction": direction, "workspace_bytes": bound, "backend": FLOOR}

    def scores_of(v: Tensor, t: Tensor) -> Tensor:
        return cross_attention_scores(v, t, batch.word_counts, region_counts=batch.region_counts, **options)

    forward = peak_bytes(lambda: scores_of(regions.detach(), words.detach()))
    scores = scores_of(regions, words)
    upstream = torch.ones_like(scores)
    backward = peak_bytes(lambda: torch.autograd.grad(scores, (regions, words), upstream))
    accumulators = 0 if form != "float16" else 4 * (regions.numel() + words.numel())
    assert forward - scores.nbytes <= bound
    assert backward - regions.nbytes - words.nbytes - accumulators <= bound


@pytest.fixture
def fused_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sends every forward that the kernel holds to it, float32 too and however few tiles; tiles of every launch."""
    launched: list[int] = []
    take = fused.take_scores

    def taken(*arguments: Any) -> None:
        launched.append(arguments[4].shape[0] - 1)
        take(*arguments)

    monkeypatch.setattr(fused_plan, "why_not", lambda *_, **call: "the backward" if call["backward"] else None)
    monkeypatch.setattr(fused, "take_scores", taken)
    yield launched
    assert launched


def assert_scores_fit(batch: Batch, **options: Any) -> None:
    """The ladder of scores alone: there is no other forward in the backward."""
    batch, excused = decided(batch, options) if "focal" in options else (batch, None)
    place = {"region_counts": batch.region_counts, **options}

    def scores_of(floor: str, dtype: torch.dtype) -> Result:
        scores = cross_attention_scores(
            batch.regions.to(dtype), batch.words.to(dtype), batch.word_counts, backend=floor, **place
        )
        return Result(scores, torch.zeros(1), torch.zeros(1))

    kind = batch.regions.dtype
    mine, peer, true = scores_of(FLOOR, kind), scores_of("eager", kind), scores_of("reference", torch.float64)
    assert_ladder(mine, peer, true, options, excused=excused, noise=kind == torch.float32)


FUSED_OPTIONS = [
    *({"raw_feature_norm": n} for n in RAW_FEATURE_NORMS if n != "softmax"),
    *({"agg_func": a, "peak_weight": 0.5} for a in AGG_FUNCS),
    *({"focal": f, "agg_func": "Mean"} for f in ("equal", "prob")),
]


@pytest.mark.usefixtures("fused_runs", "poisoned_memory")
@pytest.mark.parametrize("options", FUSED_OPTIONS, ids=label)
def test_products_on_the_chip_with_every_option(options: dict[str, Any]) -> None:
    assert_scores_fit(random_batch(2, images=3, captions=4, shortest=3, region_counts=True), **options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("regions", [1, 16, 20, 36, 41, 64])
def test_products_on_the_chip_in_every_tile(fused_runs: list[int], regions: int) -> None:
    """Several tiles of captions, several bundles of images, a width that is not a multiple of a slice."""
    batch = random_batch(212, images=5, captions=9, regions=regions, words=40, width=68, shortest=20)
    assert_scores_fit(batch, focal="prob", peak_weight=0.5, agg_func="Mean")
    assert fused_runs[0] > 1


def test_products_on_the_chip_in_many_blocks(fused_runs: list[int]) -> None:
    """Captions of one word too, more than a tile may have; ragged images."""
    counts = [1, 5, *[1] * 20, 9]
    batch = random_batch(213, images=3, captions=len(counts), words=9, word_counts=counts, region_counts=True)
    options = {"raw_feature_norm": "no_norm"}
    for workspace_bytes in (1 << 12, 1 << 28):
        assert_scores_fit(batch.packed(), workspace_bytes=workspace_bytes, **options)
    assert fused_runs[-1] > 1
    assert len(fused_runs) > 2


@pytest.mark.usefixtures("fused_runs", "poisoned_memory")
def test_products_on_the_chip_with_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_scores_fit(random_batch(206, images=3, captions=4, region_counts=True, shortest=3))


@pytest.mark.usefixtures("fused_runs")
def test_products_on_the_chip_from_halves() -> None:
    batch = random_batch(209, images=5, captions=8, regions=9, words=7, width=32, shortest=3).to(torch.float16)
    assert_scores_fit(batch, agg_func="Mean")


@pytest.mark.usefixtures("fused_runs")
def test_products_on_the_chip_keep_a_nan_with_its_pair_and_give_the_same_bits() -> None:
    batch = random_batch(208, images=3, captions=4, shortest=4)
    clean, again = (
        cross_attention_scores(batch.regions, batch.words, batch.word_counts, backend=FLOOR) for _ in range(2)
    )
    assert torch.equal(clean, again)
    batch.words[1, 2], batch.regions[2, 0] = torch.nan, torch.nan
    scores = cross_attention_scores(batch.regions, batch.words, batch.word_counts, backend=FLOOR)
    touched = torch.zeros_like(scores, dtype=torch.bool)
    touched[:, 1] = touched[2] = True
    assert scores[touched].isnan().all()
    assert torch.equal(scores[~touched], clean[~touched])


def test_products_on_the_chip_stay_within_the_bound(fused_runs: list[int]) -> None:
    bound = 1 << 17
    batch = random_batch(211, images=16, captions=40, regions=12, words=9, width=64, region_counts=True)

    def scores() -> Tensor:
        return cross_attention_scores(
            batch.regions, batch.words, batch.word_counts, region_counts=batch.region_counts, peak_weight=0.5,
            workspace_bytes=bound, backend=FLOOR,
        )  # fmt: skip

    assert peak_bytes(scores) - scores().nbytes <= bound
    assert len(fused_runs) > 2
