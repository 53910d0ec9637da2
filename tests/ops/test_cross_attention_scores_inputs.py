"""Forms of the inputs of ``cross_attention_scores``: strides, packed words, counts in any guise; none is written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import Batch, Place, random_batch, run, unit
from itm_kernels import caption_layout, cross_attention_scores

OP = "cross_attention_scores"

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "width first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], 3)[..., 0],
    "a slice of wider ones": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], 2)[..., : t.shape[2]],
    "a slice of more": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]],
    "at an odd offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def gradients_of(batch: Batch, place: Place, regions: Tensor, words: Tensor, **options: Any) -> list[Tensor]:
    """Scores and gradients of the very tensors given (a detached view keeps its strides)."""
    inputs = [t.detach().requires_grad_() for t in (regions, words)]
    scores = cross_attention_scores(
        *inputs, batch.word_counts, region_counts=batch.region_counts, backend=place.floor, **options
    )
    return [scores.detach(), *torch.autograd.grad(scores, inputs, batch.grad_scores.to(scores.dtype))]


@pytest.mark.parametrize("direction", ["t2i", "both"])
@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(place: Place, view: str, region_counts: bool, direction: str) -> None:
    batch = random_batch(121, region_counts=region_counts).to(place.device)
    expected = run(batch, place.floor, direction=direction)
    regions, words = VIEWS[view](batch.regions), VIEWS[view](batch.words)
    for mine, its in zip(gradients_of(batch, place, regions, words, direction=direction), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_expanded_inputs(place: Place, direction: str) -> None:
    # One image and one caption, seen several times through a stride of zero.
    batch = random_batch(122, images=4, captions=3, word_counts=[9, 5, 2]).to(place.device)
    caption = unit(1, 9, 24, generator=torch.Generator().manual_seed(1)).float().to(place.device)
    regions, words = batch.regions[:1].expand(4, -1, -1), caption.expand(3, -1, -1)
    solid = Batch(regions.contiguous(), words.contiguous(), batch.word_counts, None, batch.grad_scores)
    expected = run(solid, place.floor, direction=direction)
    for mine, its in zip(gradients_of(batch, place, regions, words, direction=direction), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_packed_words_are_padded_words(place: Place, direction: str, region_counts: bool) -> None:
    batch = random_batch(123, region_counts=region_counts)
    valid = ~batch.padding()[1]
    padded = run(batch.to(place.device), place.floor, direction=direction)
    packed = run(batch.packed().to(place.device), place.floor, direction=direction)
    torch.testing.assert_close(packed.scores, padded.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed.grad_regions, padded.grad_regions, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packed.grad_words, padded.grad_words[valid.to(place.device)], atol=1e-6, rtol=1e-5)


def test_packed_words_with_strides(place: Place) -> None:
    batch = random_batch(124).packed().to(place.device)
    expected = run(batch, place.floor)
    strided = torch.stack([batch.words, torch.full_like(batch.words, torch.nan)], 2)[..., 0]
    for mine, its in zip(gradients_of(batch, place, batch.regions, strided), expected, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-6, rtol=1e-5)


COUNTS: dict[str, Callable[[list[int]], Any]] = {
    "tuple": tuple,
    "int64": torch.tensor,
    "int32": lambda counts: torch.tensor(counts, dtype=torch.int32),
    "uint8": lambda counts: torch.tensor(counts, dtype=torch.uint8),
    "strided": lambda counts: torch.tensor([counts, counts]).t()[:, 0],
    "numpy": np.array,
    "numpy integers": lambda counts: [np.int32(n) for n in counts],
    "tensors of one": lambda counts: [torch.tensor(n) for n in counts],
    "range-like": lambda counts: (n for n in counts),
}


@pytest.mark.parametrize("form", COUNTS)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_word_counts_in_any_form(place: Place, form: str, packed: bool) -> None:
    batch = random_batch(125).to(place.device)
    batch = batch.packed() if packed else batch
    expected = cross_attention_scores(batch.regions, batch.words, batch.word_counts, backend=place.floor)
    counts = COUNTS[form](batch.word_counts)
    assert torch.equal(cross_attention_scores(batch.regions, batch.words, counts, backend=place.floor), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_caption_layout_for_word_counts(place: Place, packed: bool) -> None:
    batch = random_batch(126).to(place.device)
    batch = batch.packed() if packed else batch
    expected = cross_attention_scores(batch.regions, batch.words, batch.word_counts, backend=place.floor)
    layout = caption_layout(batch.word_counts, place.device)
    for _ in range(2):  # reusable
        assert torch.equal(cross_attention_scores(batch.regions, batch.words, layout, backend=place.floor), expected)


@pytest.mark.parametrize("form", COUNTS)
def test_region_counts_in_any_form(place: Place, form: str) -> None:
    batch = random_batch(127, region_counts=True).to(place.device)
    assert batch.region_counts is not None
    expected = run(batch, place.floor).scores
    counts = COUNTS[form](batch.region_counts)
    got = cross_attention_scores(
        batch.regions, batch.words, batch.word_counts, region_counts=counts, backend=place.floor
    )
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_counts_on_the_gpu_are_clamped(direction: str) -> None:
    batch = random_batch(128, region_counts=True).to("cuda")
    words, regions = batch.words.nan_to_num(), batch.regions.nan_to_num()
    counts = torch.tensor(batch.word_counts, device="cuda")
    of_regions = torch.tensor(batch.region_counts, device="cuda")
    expected = cross_attention_scores(
        regions, words, batch.word_counts, region_counts=batch.region_counts, direction=direction
    )
    got = cross_attention_scores(regions, words, counts, region_counts=of_regions, direction=direction)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    beyond = cross_attention_scores(regions, words, counts + 1000, region_counts=of_regions + 1000, direction=direction)
    full = [words.shape[1]] * words.shape[0]
    torch.testing.assert_close(
        beyond, cross_attention_scores(regions, words, full, direction=direction), atol=1e-6, rtol=0
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["list", "device"])
def test_no_op_waits_for_the_gpu(form: str) -> None:
    batch = random_batch(128).to("cuda")
    words, regions = batch.words.nan_to_num().requires_grad_(), batch.regions.requires_grad_()
    counts = batch.word_counts if form == "list" else torch.tensor(batch.word_counts, device="cuda")
    upstream = batch.grad_scores.float()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_attention_scores(regions, words, counts).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_inputs_are_never_written(place: Place, dtype: torch.dtype, direction: str) -> None:
    if place.why_not(OP, dtype):
        pytest.skip(str(place.why_not(OP, dtype)))
    batch = random_batch(129, region_counts=True, dtype=dtype).to(place.device)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    counts, of_regions = torch.tensor(batch.word_counts), torch.tensor(batch.region_counts)
    upstream = batch.grad_scores.float() if dtype != torch.float64 else batch.grad_scores
    given = (batch.regions.view(bits), batch.words.view(bits), counts, of_regions, upstream)
    before = [t.clone() for t in given]
    regions, words = batch.regions.detach().requires_grad_(), batch.words.detach().requires_grad_()
    for _ in range(2):
        scores = cross_attention_scores(
            regions, words, counts, region_counts=of_regions, direction=direction, backend=place.floor
        )
        scores.backward(upstream)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_outputs(place: Place, dtype: torch.dtype) -> None:
    if place.why_not(OP, dtype):
        pytest.skip(str(place.why_not(OP, dtype)))
    got = run(random_batch(130, dtype=dtype).to(place.device), place.floor, direction="both")
    assert got.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {gradient.dtype for gradient in got.gradients()} == {dtype}
    assert all(value.is_contiguous() for value in got)
    assert all(value.device.type == place.device for value in got)


def test_defaults_of_torch_do_not_leak_in(place: Place) -> None:
    batch = random_batch(131, region_counts=True).to(place.device)
    expected = run(batch, place.floor, direction="both")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(batch, place.floor, direction="both")
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, its in zip(got, expected, strict=True):
        assert torch.equal(mine, its)
