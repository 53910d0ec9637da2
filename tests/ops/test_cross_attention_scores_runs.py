"""Runs of ``cross_attention_scores``: same bits every time, everything written, any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from helpers import Place, Result, assert_ladder, label, option_pairs, random_batch, run, truth

OP = "cross_attention_scores"
DIRECTIONS = ["t2i", "i2t", "both"]


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_bits(one: Result, other: Result) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(one, other, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_every_output_is_written(fast_place: Place, options: dict[str, Any]) -> None:
    assert torch.empty(3).isnan().all()  # the poison works
    batch = random_batch(141, region_counts=True).to(fast_place.device)
    got = run(batch, fast_place.floor, **options)
    assert all(value.isfinite().all() for value in got)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("form", ["padded", "packed", "whole", "bfloat16", "no images", "no captions", "many blocks"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_output_is_written_in_every_form(place: Place, direction: str, form: str) -> None:
    sizes = {"images": 0 if form == "no images" else 5, "captions": 0 if form == "no captions" else 6}
    batch = random_batch(142, region_counts=form not in ("whole", "no images"), **sizes).to(place.device)
    if form in ("packed", "whole"):
        batch = batch.packed()
    if form == "bfloat16":
        batch = batch.to(torch.bfloat16)
    got = run(batch, place.floor, direction=direction, workspace_bytes=1 if form == "many blocks" else 1 << 28)
    assert all(value.isfinite().all() for value in got)


@pytest.mark.parametrize("workspace_bytes", [1 << 18, 1 << 28])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_runs_give_the_same_bits(fast_place: Place, direction: str, workspace_bytes: int) -> None:
    batch = random_batch(143, images=20, captions=12, regions=36, words=20, width=64, region_counts=True)
    batch = batch.to(fast_place.device)
    first = run(batch, fast_place.floor, direction=direction, workspace_bytes=workspace_bytes)
    for _ in range(3):
        assert same_bits(run(batch, fast_place.floor, direction=direction, workspace_bytes=workspace_bytes), first)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_threads(direction: str, count: int) -> None:
    """Same bits at one number of threads; between numbers the library's products may sum in another order."""
    place = Place("native")
    reason = place.why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    batch = random_batch(144, images=20, captions=12, regions=36, words=20, width=64, shortest=3)
    peer, true = run(batch, "eager", direction=direction), truth(batch, direction=direction)
    torch.set_num_threads(count)
    first = run(batch, "native", direction=direction)
    assert_ladder(first, peer, true, {})
    assert same_bits(run(batch, "native", direction=direction), first)
    torch.set_num_threads(1)
    alone = run(batch, "native", direction=direction)
    for mine, its in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5, equal_nan=False)


def test_the_order_of_a_batch_is_kept(place: Place) -> None:
    # Floors sort captions by length or cut them into blocks; the columns come back where they belong.
    batch = random_batch(145, images=6, captions=9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    turned = type(batch)(
        batch.regions, batch.words[order], [batch.word_counts[c] for c in order], None, batch.grad_scores[:, order]
    )
    expected = run(batch.to(place.device), place.floor, direction="both")
    got = run(turned.to(place.device), place.floor, direction="both")
    torch.testing.assert_close(got.scores, expected.scores[:, order], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.grad_words, expected.grad_words[order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.grad_regions, expected.grad_regions, atol=1e-6, rtol=1e-5)
