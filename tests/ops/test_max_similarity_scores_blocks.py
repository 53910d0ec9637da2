"""Blocks of ``max_similarity_scores``: any bound gives the same results, blocks are cut, memory stays in the bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers import Batch, Place, assert_ladder, label, random_batch
from itm_kernels import max_similarity_scores, native
from itm_kernels.layout import offsets_of
from memory import peak_bytes
from similarity import OP, every_option, kept_arg_max, run, truth

MIB = 1 << 20


@pytest.fixture
def built() -> None:
    reason = Place("native").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", every_option(), ids=label)
def test_any_bound_gives_the_same_results(
    fast_place: Place, options: dict[str, Any], region_counts: bool, packed: bool
) -> None:
    batch = random_batch(231, images=7, captions=6, region_counts=region_counts, shortest=3)
    batch = batch.packed() if packed else batch
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    for workspace_bytes in (1, 20_000, 1 << 40):  # of these the first keeps no arg-max
        got = run(batch.to(fast_place.device), fast_place.floor, workspace_bytes=workspace_bytes, **options)
        assert_ladder(got, peer, true, options)


def planned(images: int, captions: int, words: int, workspace_bytes: int, **options: Any) -> Any:
    regions = offsets_of(torch.full((images,), 36)).tolist()
    return native.host().plan_max_similarity(
        regions,
        offsets_of(torch.full((captions,), words)).tolist(),
        1024,
        workspace_bytes=workspace_bytes,
        **{
            "element_bytes": 4, "t2i": True, "backward": False, "arg_max_kept": False, "copies_regions": False,
            "threads": 2, **options,
        },
    )  # fmt: skip


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("t2i", [True, False])
@pytest.mark.parametrize("phase", ["forward", "backward", "backward, kept"])
def test_the_plan_stays_in_the_bound_and_covers_the_batch(phase: str, t2i: bool) -> None:
    options = {"t2i": t2i, "backward": phase != "forward", "arg_max_kept": phase == "backward, kept"}
    blocks = []
    for workspace_bytes in (4 * MIB, 16 * MIB, 256 * MIB):
        for batch in (32, 1024, 8192):
            plan = planned(batch, batch, 14, workspace_bytes, **options)
            assert 0 < plan.workspace_bytes <= workspace_bytes
            for bounds in (plan.image_bounds, plan.caption_bounds):
                assert (bounds[0], bounds[-1]) == (0, batch)
                assert bounds == sorted(set(bounds))
        blocks.append(len(plan.image_bounds) * len(plan.caption_bounds))
    assert blocks[0] > blocks[-1]


@pytest.mark.usefixtures("built")
def test_a_kept_arg_max_saves_the_products_of_the_backward() -> None:
    forward = planned(128, 128, 14, 256 * MIB)
    again, kept = (planned(128, 128, 14, 256 * MIB, backward=True, arg_max_kept=way) for way in (False, True))
    product = 2 * 128 * 36 * 128 * 14 * 1024
    assert forward.flops == product
    assert again.flops - product == kept.flops == 3 * product // 36
    assert kept.launches < again.launches


def formed(form: str) -> Batch:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(form, torch.float32)
    batch = random_batch(
        232, images=64, captions=64, regions=36, words=30, width=256, region_counts=form == "ragged", dtype=dtype
    )
    return batch.packed() if form == "packed" else batch


def measured(batch: Batch, floor: str, workspace_bytes: int, **options: Any) -> tuple[int, int]:
    """Peak bytes beside scores and the kept arg-max (forward), gradients and float32 accumulators (backward)."""
    regions, words = batch.regions.detach().requires_grad_(), batch.words.detach().requires_grad_()
    kept = kept_arg_max(batch, floor, options, workspace_bytes)
    options |= {"region_counts": batch.region_counts, "workspace_bytes": workspace_bytes, "backend": floor}
    forward = peak_bytes(lambda: max_similarity_scores(regions, words, batch.word_counts, **options))
    scores = max_similarity_scores(regions, words, batch.word_counts, **options)
    upstream = torch.ones_like(scores)
    backward = peak_bytes(lambda: torch.autograd.grad(scores, (regions, words), upstream))
    wide = 0 if regions.dtype == torch.float32 else 4 * (regions.numel() + words.numel())
    return forward - scores.nbytes - kept.nbytes, backward - regions.nbytes - words.nbytes - wide


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The plan depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads", "built")
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("form", ["padded", "packed", "bfloat16", "float16", "ragged"])
def test_memory_stays_within_the_bound_on_native(form: str, direction: str) -> None:
    forward, backward = measured(formed(form), "native", 3 * MIB, direction=direction, agg_func="LogSumExp")
    assert forward <= 3 * MIB
    assert backward <= 3 * MIB


@pytest.mark.parametrize("form", ["padded", "packed", "bfloat16", "ragged"])
def test_memory_stays_within_the_bound_on_eager(form: str) -> None:
    forward, backward = measured(formed(form), "eager", 32 * MIB, agg_func="LogSumExp")
    assert forward <= 32 * MIB
    assert backward <= 32 * MIB


def test_autograd_keeps_inputs_and_bytes(fast_place: Place) -> None:
    batch = random_batch(233, images=8, captions=9, region_counts=True).to(fast_place.device)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    for workspace_bytes, kept in ((1 << 20, 8 * 9 * 9), (1, 0)):
        saved.clear()
        regions, words = batch.regions.detach().requires_grad_(), batch.words.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            max_similarity_scores(
                regions, words, batch.word_counts, region_counts=batch.region_counts,
                workspace_bytes=workspace_bytes, backend=fast_place.floor,
            )  # fmt: skip
        inputs = batch.regions.nbytes + batch.words.nbytes + 8 * (8 + 9)  # and the counts
        assert sum(tensor.nbytes for tensor in saved) == inputs + kept
