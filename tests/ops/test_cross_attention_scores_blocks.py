"""Blocks of ``cross_attention_scores``: any bound gives the same results, blocks are cut, memory stays in the bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Batch, Place, assert_ladder, random_batch, run, truth
from itm_kernels import cross_attention_scores
from itm_kernels.eager import cross_attention_scores as eager
from itm_kernels.eager.blocks import Batch as EagerBatch
from itm_kernels.native.cpu import cross_attention_scores as native
from memory import peak_bytes

OP = "cross_attention_scores"
DIRECTIONS = ["t2i", "i2t", "both"]
MIB = 1 << 20


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_bound_gives_the_same_results(fast_place: Place, direction: str, region_counts: bool, packed: bool) -> None:
    batch = random_batch(171, images=7, captions=6, region_counts=region_counts, shortest=3)
    batch = batch.packed() if packed else batch
    options = {"direction": direction}
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    for workspace_bytes in (1, 20_000, 1 << 40):
        got = run(batch.to(fast_place.device), fast_place.floor, workspace_bytes=workspace_bytes, **options)
        assert_ladder(got, peer, true, options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each floor makes the products of a block, forward or backward."""
    counted = {"eager": 0, "native": 0}

    def counting(floor: str, original: Any) -> Any:
        def counted_call(*args: Any, **options: Any) -> Any:
            counted[floor] += 1
            return original(*args, **options)

        return counted_call

    monkeypatch.setattr(eager, "_leaves", counting("eager", eager._leaves))
    monkeypatch.setattr(native._Batch, "products", counting("native", native._Batch.products))
    return counted


@pytest.mark.parametrize("floor", ["eager", "native"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_smaller_bound_makes_more_blocks(calls: dict[str, int], floor: str, direction: str) -> None:
    if Place(floor).why_not(OP, torch.float32):
        pytest.skip(str(Place(floor).why_not(OP, torch.float32)))
    batch = random_batch(172, images=6, captions=8, regions=12, words=9, width=24, shortest=9)
    found = []
    for workspace_bytes in (1, 40_000, 80_000, 1 << 28):
        calls[floor] = 0
        run(batch, floor, direction=direction, workspace_bytes=workspace_bytes)
        found.append(calls[floor])
    assert found == sorted(found, reverse=True)
    assert found[0] == 2 * 6 * 8  # one image by one caption, forward and backward
    assert found[0] > found[1] > found[-1] == 2


def test_eager_pads_no_short_caption_to_a_long_one() -> None:
    batch = random_batch(173, captions=200, words=60, word_counts=[3] * 199 + [60])
    chosen = EagerBatch(batch.regions, batch.words, torch.tensor(batch.word_counts), None, None)
    blocks = chosen.caption_blocks(1 << 28)
    padded = sum(len(rows) * longest for rows, longest in blocks)
    assert padded <= 1.2 * sum(batch.word_counts)
    assert sorted(torch.cat([rows for rows, _ in blocks]).tolist()) == list(range(200))


def measured(batch: Batch, floor: str, direction: str, workspace_bytes: int) -> tuple[int, int]:
    """Peak bytes beside scores (forward), and beside gradients and their float32 accumulators (backward)."""
    regions, words = batch.regions.detach().requires_grad_(), batch.words.detach().requires_grad_()
    options: dict[str, Any] = {
        "region_counts": batch.region_counts,
        "direction": direction,
        "workspace_bytes": workspace_bytes,
        "backend": floor,
    }

    def scores_of(v: Tensor, t: Tensor) -> Tensor:
        return cross_attention_scores(v, t, batch.word_counts, **options)

    forward = peak_bytes(lambda: scores_of(regions.detach(), words.detach()))
    scores = scores_of(regions, words)
    upstream = torch.ones_like(scores)
    backward = peak_bytes(lambda: torch.autograd.grad(scores, (regions, words), upstream))
    wide = 0 if regions.dtype == torch.float32 else 4 * (regions.numel() + words.numel())
    return forward - scores.nbytes, backward - regions.nbytes - words.nbytes - wide


def formed(form: str, images: int = 64) -> Batch:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(form, torch.float32)
    batch = random_batch(
        174, images=images, captions=64, regions=36, words=30, width=256, region_counts=form == "ragged", dtype=dtype
    )
    if form == "strided":
        turned = batch.regions.transpose(0, 1).contiguous().transpose(0, 1)
        batch = dataclasses.replace(batch, regions=turned)
    return batch.packed() if form == "packed" else batch


FORMS = ("padded", "packed", "bfloat16", "float16", "strided", "ragged")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """The plan depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_within_the_bound_on_native(form: str, direction: str) -> None:
    if Place("native").why_not(OP, torch.float32):
        pytest.skip(str(Place("native").why_not(OP, torch.float32)))
    forward, backward = measured(formed(form), "native", direction, 4 * MIB)
    assert forward <= 4 * MIB
    assert backward <= 4 * MIB


@pytest.mark.parametrize("form", ["padded", "packed", "bfloat16", "strided", "ragged"])
def test_memory_stays_within_the_bound_on_eager(form: str) -> None:
    forward, backward = measured(formed(form, images=24), "eager", "both", 32 * MIB)
    assert forward <= 32 * MIB
    assert backward <= 32 * MIB


def test_memory_does_not_grow_with_the_batch() -> None:
    if Place("native").why_not(OP, torch.float32):
        pytest.skip(str(Place("native").why_not(OP, torch.float32)))
    sizes = [random_batch(175, images=n, captions=n, regions=36, words=16, width=64, shortest=16) for n in (32, 128)]
    small, large = (measured(batch, "native", "both", 2 * MIB) for batch in sizes)
    assert max(large) <= 1.5 * max(small)
    # All products at once would be 16 times as much.
    assert max(large) < 128 * 36 * 128 * 16 * 4 / 8
