"""The fused route of ``cross_attention_scores`` (sm_90a): as near to the truth as eager, whatever form inputs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
from focal import undecided
from helpers import Batch, Place, assert_ladder, label, option_pairs, random_batch, run, score_error, truth
from itm_kernels import caption_layout, cross_attention_scores, plan
from itm_kernels.native import devices, load_error
from itm_kernels.native.cuda import fused_scores, side
from itm_kernels.native.devices import Kernels

OP = "cross_attention_scores"
ROUTE = "ITM_SCORES_ROUTE"
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = Path(__file__).parents[2] / "benchmarks" / "caption_lengths.json"

pytestmark = pytest.mark.skipif(load_error() is not None, reason=str(load_error()))


@pytest.fixture(
    params=[
        pytest.param(Place("native", emulated=True), id="emulated"),
        pytest.param(Place("native", "cuda"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Where the fused kernel runs, asked for by the environment."""
    found: Place = request.param
    reason = found.why_not(OP, torch.bfloat16)
    if reason is None and found.device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        reason = "this GPU is no sm_90"
    if reason is not None:
        pytest.skip(reason)
    if found.emulated:
        kernels = Kernels(emulated.library(), emulated.GPU)
        monkeypatch.setattr(devices, "kernels_for", lambda device: kernels)
    monkeypatch.setenv(ROUTE, "fused")
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time the route was taken."""
    taken: list[str] = []
    original = fused_scores.forward

    def counting(scores: Any) -> Tensor:
        taken.append("fused")
        return original(scores)

    monkeypatch.setattr(fused_scores, "forward", counting)
    return taken


def drawn(seed: int, **sizes: Any) -> Batch:
    return random_batch(seed, **{"regions": 36, "width": 96, "words": 20, "shortest": 3, **sizes})


def scores_of(batch: Batch, place: Place, **options: Any) -> Tensor:  # [I, C]
    batch = batch.to(place.device)
    return cross_attention_scores(batch.regions, batch.words, batch.word_counts, backend="native", **options).cpu()


def assert_fits(batch: Batch, place: Place, *, excused: Tensor | None = None, **options: Any) -> None:
    """Scores no further from the truth than twice what eager makes of the same inputs."""
    got, true = scores_of(batch, place, **options), truth(batch, **options).scores
    kept = slice(None) if excused is None else ~excused
    peer = run(batch, "eager", **options).scores
    assert score_error(got[kept], true[kept]) <= 2 * score_error(peer[kept], true[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_every_option(place: Place, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {**options, "direction": "t2i", "lambda_softmax": 5.0, "lambda_lse": 3.0}
    focal = options["focal"] is not None
    # Few words where rounding decides what BFAN keeps: enough pairs are left that it does not decide.
    batch = drawn(181, images=6, captions=12, words=4 if focal else 20, dtype=dtype)
    excused = undecided(batch, options, 2e-4, rounding=dtype)
    assert (~excused).sum() >= 5
    assert_fits(batch, place, excused=excused, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_here_and_backward_on_tiles(place: Place, calls: list[str], dtype: torch.dtype) -> None:
    batch = drawn(182, images=5, captions=7, dtype=dtype)
    got = run(batch.to(place.device), "native")
    assert calls == ["fused"]
    assert_ladder(got, run(batch, "eager"), truth(batch), {}, noise=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_other_route(place: Place, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    # Products are summed in another order, so that a few of them round to their neighbour.
    batch = drawn(183, images=9, captions=30, width=128, dtype=dtype)
    fused = scores_of(batch, place)
    monkeypatch.setenv(ROUTE, "tiles")
    torch.testing.assert_close(fused, scores_of(batch, place), rtol=0, atol=2e-3 if dtype == torch.bfloat16 else 2e-4)


@pytest.mark.parametrize("images", [1, 3, 4, 5, 8])
def test_images(place: Place, images: int) -> None:
    assert_fits(drawn(184, images=images, captions=5, dtype=torch.bfloat16), place)


@pytest.mark.parametrize("width", [8, 60, 64, 65, 200, 512])
def test_widths(place: Place, width: int) -> None:
    # More slices than stages, fewer, and widths that end within one. Towards one side, as encoders' vectors are.
    batch = drawn(185, images=4, captions=5, width=width, dtype=torch.bfloat16)
    assert_fits(Batch(batch.regions.abs(), batch.words.abs(), batch.word_counts, None, batch.grad_scores), place)


@pytest.mark.parametrize(
    "word_counts",
    [[1], [128], [1, 128, 1], [65, 64, 64, 63, 2], [3] * 45, [127, 2, 126, 1] * 3],
    ids=["one word", "a full tile", "1-128-1", "halves", "short", "no two fit"],
)
def test_captions(place: Place, word_counts: list[int]) -> None:
    batch = drawn(186, images=10, captions=len(word_counts), words=max(word_counts), word_counts=word_counts, width=32,
                  dtype=torch.bfloat16)  # fmt: skip
    assert_fits(batch, place, agg_func="Mean")


def test_more_tiles_than_a_panel_and_a_machine(place: Place) -> None:
    batch = drawn(187, images=13, captions=290, words=2, word_counts=[2, 1] * 145, width=16, dtype=torch.bfloat16)
    assert_fits(batch, place, agg_func="Mean", raw_feature_norm="no_norm")


def test_no_pairs(place: Place) -> None:
    batch = drawn(188, images=2, captions=3, dtype=torch.bfloat16).to(place.device)
    assert cross_attention_scores(batch.regions[:0], batch.words, batch.word_counts, backend="native").shape == (0, 3)
    assert cross_attention_scores(batch.regions, batch.words[:0], [], backend="native").shape == (2, 0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("norm", ["softmax", "clipped_l2norm"])
def test_nothing_is_read_before_it_is_written(place: Place, norm: str) -> None:
    batch = drawn(189, images=5, captions=9, width=100, dtype=torch.float16)
    got = scores_of(batch, place, raw_feature_norm=norm, peak_weight=0.5)
    assert got.isfinite().all()
    assert torch.equal(got, scores_of(batch, place, raw_feature_norm=norm, peak_weight=0.5))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_blocks_and_forms_give_the_same_bits(place: Place, packed: bool) -> None:
    batch = drawn(190, images=11, captions=17, dtype=torch.bfloat16)
    expected = scores_of(batch, place)
    batch = batch.packed() if packed else batch
    for workspace_bytes in (1, 300_000, 1 << 40):
        assert torch.equal(scores_of(batch, place, workspace_bytes=workspace_bytes), expected)
    layout = caption_layout(batch.word_counts, place.device)
    here = batch.to(place.device)
    assert torch.equal(cross_attention_scores(here.regions, here.words, layout, backend="native").cpu(), expected)


@pytest.mark.parametrize("width", [96, 97])
def test_strides_do_not_matter(place: Place, width: int) -> None:
    batch = drawn(191, images=5, captions=6, width=width, dtype=torch.float16).to(place.device)
    expected = scores_of(batch, place)
    views = (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    )
    for view in views:
        got = cross_attention_scores(view(batch.regions), view(batch.words), batch.word_counts, backend="native")
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("bound", [1, 1 << 28])
def test_counts_that_the_host_may_not_read(place: Place, monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    batch = drawn(192, images=5, captions=11, dtype=torch.float16)
    expected = scores_of(batch, place)
    monkeypatch.setattr(side, "known", lambda counts: False)  # as if they were on a device, every caption costs W words
    assert torch.equal(scores_of(batch, place, workspace_bytes=bound), expected)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "multiplies float16 and bfloat16, not torch.float32"),
        ({"regions": 35}, {}, "images of 36 regions"),
        ({"region_counts": True}, {}, "images of 36 regions, all valid"),
        ({"words": 129}, {}, "a caption of 129 words does not fit"),
        ({}, {"direction": "i2t"}, "direction t2i alone"),
        ({}, {"direction": "both"}, "direction t2i alone"),
    ],
    ids=["float32", "regions", "ragged images", "long captions", "i2t", "both"],
)
def test_it_refuses_with_the_reason(place: Place, change: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    batch = drawn(193, **{"images": 2, "captions": 3, "dtype": torch.bfloat16, **change}).to(place.device)
    with pytest.raises(RuntimeError, match=f"{ROUTE}=fused, but .*{reason}"):
        run(batch, "native", **options)


def test_a_route_that_does_not_exist(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROUTE, "fast")
    with pytest.raises(ValueError, match=f"{ROUTE} must be tiles or fused, got 'fast'"):
        scores_of(drawn(194, dtype=torch.bfloat16), place)


def test_nobody_is_sent_here_unasked(place: Place, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ROUTE)
    scores_of(drawn(195, images=2, captions=2, dtype=torch.bfloat16), place)
    assert not calls


@pytest.mark.parametrize("batch", [1, 32, 128, 1024, 8192, 65536])
def test_plan(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    lengths = [int(length) for length, count in json.loads(LENGTHS.read_text()).items() for _ in range(count)]
    generator = torch.Generator().manual_seed(batch)
    counts = [lengths[i] for i in torch.randint(len(lengths), (batch,), generator=generator).tolist()]
    arguments = (OP, batch, batch, 36, counts, 1024)
    gpu: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "arch": "sm_90a"}
    backward = plan(*arguments, phase="backward", **gpu)
    assert plan(*arguments, phase="forward", **gpu).route == "cuda-tiles"
    monkeypatch.setenv(ROUTE, "fused")
    made = plan(*arguments, phase="forward", **gpu)
    assert made.route == "cuda-fused"
    assert "not measured on a GPU yet" in made.reason
    assert made.workspace_bytes <= 256 * 2**20
    assert made.launches <= 9 * made.blocks["forward"].count
    assert made.useful_fraction >= (0.9 if batch >= 1024 else 0.85 if batch >= 128 else 0.01)
    both = plan(*arguments, **gpu)
    assert both.blocks == {**made.blocks, **backward.blocks}
    assert both.flops == made.flops + backward.flops
    assert "backward by cuda-tiles" in both.reason


def test_plan_refuses_as_the_op_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROUTE, "fused")
    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "phase": "forward"}
    with pytest.raises(RuntimeError, match="written for sm_90a, this is sm_80"):
        plan(OP, 4, 4, 36, [3] * 4, 64, arch="sm_80", **arguments)
    with pytest.raises(RuntimeError, match="images of 36 regions"):
        plan(OP, 4, 4, 37, [3] * 4, 64, arch="sm_90a", **arguments)
