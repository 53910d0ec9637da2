"""The CUDA kernels of both score ops, emulated: what the suites of the ops do not ask of them.

Any sizes at all, counts that only the device knows, GPUs of other sizes, and the launches that a plan promises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import emulated
from focal import decided
from helpers import Batch, Result, assert_ladder, random_batch, run, truth
from itm_kernels import cross_attention_scores, max_similarity_scores
from itm_kernels.native import devices
from itm_kernels.native.cuda import side
from itm_kernels.native.cuda.machine import Machine, machine_of_arch
from itm_kernels.native.devices import Kernels
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS, SIMILARITY_AGG_FUNCS

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SMALL = Machine("sm_90", 227 * 1024, multiprocessors=2)
OPS = {"cross_attention_scores": cross_attention_scores, "max_similarity_scores": max_similarity_scores}


def use(monkeypatch: pytest.MonkeyPatch, machine: Machine, ops: Any = None) -> None:
    kernels = Kernels(ops or emulated.library(), machine)
    monkeypatch.setattr(devices, "kernels_for", lambda device: kernels)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Ragged lengths with 1, odd widths, zero vectors, permuted layouts, more images than captions or fewer."""
    batch = random_batch(
        draw(st.integers(0, 1 << 16)),
        images=draw(st.integers(1, 6)),
        captions=draw(st.integers(1, 9)),
        regions=draw(st.sampled_from([1, 7, 36, 100])),
        words=draw(st.sampled_from([1, 5, 20, 45])),
        width=draw(st.sampled_from([5, 8, 23, 48])),
        region_counts=draw(st.booleans()),
    )
    if draw(st.booleans()):
        batch.words[0, 0] = 0.0
        batch.regions[0, 0] = 0.0
    if draw(st.booleans()):
        batch = batch.packed()
    if draw(st.booleans()):
        turned = batch.regions.transpose(0, 2).contiguous().transpose(0, 2)
        batch = Batch(turned, batch.words, batch.word_counts, batch.region_counts, batch.grad_scores)
    return batch


@settings(max_examples=40)
@given(
    batch=batches(),
    direction=st.sampled_from(DIRECTIONS),
    norm=st.sampled_from(RAW_FEATURE_NORMS),
    agg=st.sampled_from(AGG_FUNCS),
    workspace=st.sampled_from([1, 40_000, 1 << 28]),
)
def test_any_batch_stays_on_the_ladder(batch: Batch, direction: str, norm: str, agg: str, workspace: int) -> None:
    options = {"direction": direction, "raw_feature_norm": norm, "agg_func": agg}
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, SMALL)
        got = run(batch, "native", workspace_bytes=workspace, **options)
    peer, true = run(batch, "eager", **options), truth(batch, **options)
    if min(batch.region_counts or [batch.regions.shape[1]]) > 1 and min(batch.word_counts) > 1:
        assert_ladder(got, peer, true, options)
        return
    # A norm over one query: everything cancels, and what is left is rounding.
    for mine, real in zip(got, true, strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), real.double(), rtol=2e-3, atol=2e-4)


@settings(max_examples=30)
@given(
    batch=batches(),
    direction=st.sampled_from(["t2i", "i2t"]),
    agg=st.sampled_from(SIMILARITY_AGG_FUNCS),
    workspace=st.sampled_from([1, 40_000, 1 << 28]),
)
def test_any_batch_of_hard_assignment(batch: Batch, direction: str, agg: str, workspace: int) -> None:
    options: dict[str, Any] = {"direction": direction, "agg_func": agg, "op": max_similarity_scores}
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, SMALL)
        got = run(batch, "native", workspace_bytes=workspace, **options)
    true = truth(batch, **options)
    for mine, real in zip(got, true, strict=True):
        torch.testing.assert_close(mine.double(), real.double(), rtol=1e-4, atol=2e-5)


def clean(batch: Batch) -> Batch:
    """Zeros where padding is, for counts that let it in."""
    return Batch(
        batch.regions.nan_to_num(), batch.words.nan_to_num(), batch.word_counts, batch.region_counts, batch.grad_scores
    )


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_counts_on_the_device_are_never_read(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    """Every group keeps its padded length then; the result is that of counts on the host."""
    use(monkeypatch, SMALL)
    batch = random_batch(301, images=7, captions=9, regions=11, words=13, width=24, region_counts=True)
    for name, op in OPS.items():
        if direction == "both" and name == "max_similarity_scores":
            continue
        expected = run(batch, "native", op=op, direction=direction)
        with monkeypatch.context() as patch:
            patch.setattr(side, "known", lambda counts: False)
            patch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("counts were read back"))
            got = run(batch, "native", op=op, direction=direction)
        for mine, real in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, real, rtol=2e-5, atol=2e-6)


def test_counts_on_the_device_are_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SMALL)
    monkeypatch.setattr(side, "known", lambda counts: False)
    batch = clean(random_batch(302, captions=3, words=6, width=16, word_counts=[6, 4, 1]))
    wild = torch.tensor([99, 4, -7])
    kernels = devices.kernels_for(torch.device("cuda"))
    assert kernels is not None
    found = devices_scores(kernels, batch, wild)
    assert torch.equal(found, devices_scores(kernels, batch, torch.tensor([6, 4, 1])))


def devices_scores(kernels: Kernels, batch: Batch, counts: Tensor) -> Tensor:
    from itm_kernels.native.cuda.cross_attention_scores import DeviceScores
    from itm_kernels.ops.options import ScoreOptions

    options = ScoreOptions("t2i", "clipped_l2norm", 9.0, "LogSumExp", 6.0, "none", 0.0)
    return DeviceScores(
        kernels, batch.regions, batch.words, counts, None, None, options, 1 << 24, backward=False
    ).forward()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_other_gpus_give_the_same(monkeypatch: pytest.MonkeyPatch, arch: str, direction: str) -> None:
    """Less shared memory makes other tiles, more multiprocessors more splits; both stay on the ladder."""
    batch = random_batch(303, images=6, captions=150, regions=36, words=20, width=32, shortest=3)
    options = {"direction": direction}
    peer, true = run(batch, "eager", **options), truth(batch, **options)
    use(monkeypatch, machine_of_arch(arch))
    assert_ladder(run(batch, "native", **options), peer, true, options)


@pytest.mark.parametrize("focal", ["equal", "prob"])
@pytest.mark.parametrize(("regions", "words"), [(36, 20), (90, 30), (130, 10)], ids=["few", "many", "wide"])
def test_focal_and_peak_in_every_kernel(monkeypatch: pytest.MonkeyPatch, focal: str, regions: int, words: int) -> None:
    use(monkeypatch, SMALL)
    options = {"focal": focal, "agg_func": "Mean", "peak_weight": 0.5, "lambda_softmax": 20.0}
    batch = random_batch(304, images=3, captions=5, regions=regions, words=words, width=24, shortest=3)
    batch, close = decided(batch, options)
    peer, true = run(batch, "eager", **options), truth(batch, **options)
    assert_ladder(run(batch, "native", **options), peer, true, options, excused=close)


class Counting:
    """Raw kernels that count their launches; library products are counted beside them."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.launches = ops, 0

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.ops, name)

        def counted(*args: Any) -> Any:
            self.launches += 1
            return kernel(*args)

        return counted


@pytest.mark.parametrize("workspace", [60_000, 1 << 28])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("op", OPS)
def test_no_more_launches_than_planned(
    monkeypatch: pytest.MonkeyPatch, op: str, direction: str, workspace: int
) -> None:
    if direction == "both" and op == "max_similarity_scores":
        pytest.skip("hard assignment has one direction at a time")
    counting = Counting(emulated.library())
    use(monkeypatch, machine_of_arch("sm_90"), counting)
    mm = torch.mm

    def counted_mm(*args: Any, **more: Any) -> Tensor:
        counting.launches += 1
        return mm(*args, **more)

    monkeypatch.setattr(torch, "mm", counted_mm)
    batch = random_batch(305, images=12, captions=14, regions=9, words=8, width=16)
    got: Result = run(batch, "native", op=OPS[op], direction=direction, workspace_bytes=workspace)
    assert torch.isfinite(got.scores).all()

    from itm_kernels import plan

    planned = plan(
        op,
        12,
        14,
        9,
        batch.word_counts,
        16,
        direction=direction,
        device="cuda",
        arch="sm_90",
        workspace_bytes=workspace,
    )
    # Accumulated products after the first are addmm, which is not counted here.
    assert 0 < counting.launches <= planned.launches
