"""All floors of ``max_similarity_scores`` compute the same, in every option and size."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Batch, Place, Result, assert_exact, assert_ladder, label, random_batch, relative_error, score_error
from itm_kernels import caption_layout, max_similarity_scores
from similarity import OP, every_option, gradients, kept_arg_max, run, truth

CASES = every_option()
Case = tuple[tuple[str, Any], ...]


@functools.cache
def large(case: Case, region_counts: bool) -> tuple[Batch, Result, Result]:
    """A batch in the sizes of real pairs, the truth, and what eager makes of it in float32."""
    batch = random_batch(203, images=6, captions=7, regions=36, words=20, width=150, region_counts=region_counts)
    return batch, truth(batch, **dict(case)), run(batch, "eager", **dict(case))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", CASES, ids=label)
def test_eager_is_the_definition(options: dict[str, Any], region_counts: bool, packed: bool) -> None:
    batch = random_batch(202, region_counts=region_counts, dtype=torch.float64)
    batch = batch.packed() if packed else batch
    assert_exact(run(batch, "eager", **options), truth(batch, **options), scores=1e-12, gradients=1e-10)


@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", CASES, ids=label)
def test_float32_stays_on_the_ladder(place: Place, options: dict[str, Any], region_counts: bool) -> None:
    batch, true, peer = large(tuple(options.items()), region_counts)
    if place == Place("eager"):  # the ladder's own measure: sound in itself
        assert score_error(peer.scores, true.scores) <= 5e-6
        assert max(map(relative_error, peer.gradients(), true.gradients())) <= 5e-6
    else:
        assert_ladder(run(batch.to(place.device), place.floor, **options), peer, true, options)


@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_packed_words_give_what_padded_ones_do(place: Place, options: dict[str, Any]) -> None:
    batch, true, peer = large(tuple(options.items()), True)
    rows = ~batch.padding()[1]
    packed = run(batch.packed().to(place.device), place.floor, **options)
    of_packed = [Result(r.scores, r.grad_regions, r.grad_words[rows]) for r in (peer, true)]
    assert_ladder(packed, *of_packed, options)


@settings(max_examples=25)
@given(
    images=st.integers(1, 4),
    captions=st.integers(1, 5),
    regions=st.sampled_from([1, 2, 7, 36, 100]),
    words=st.sampled_from([1, 3, 17, 33]),
    width=st.sampled_from([1, 8, 37, 130]),
    ragged=st.booleans(),
    packed=st.booleans(),
    options=st.sampled_from(CASES),
)
def test_any_size(
    images: int,
    captions: int,
    regions: int,
    words: int,
    width: int,
    ragged: bool,
    packed: bool,
    options: dict[str, Any],
) -> None:
    batch = random_batch(
        204, images=images, captions=captions, regions=regions, words=words, width=width, region_counts=ragged
    )
    batch = batch.packed() if packed else batch
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    assert_exact(run(batch.to(torch.float64), "eager", **options), true, scores=1e-12, gradients=1e-9)
    if Place("native").why_not(OP, torch.float32) is None:
        assert_ladder(run(batch, "native", **options), peer, true, options)


@pytest.mark.parametrize("options", CASES[::2], ids=label)
def test_padding_is_never_used_and_gets_no_gradient(place: Place, options: dict[str, Any]) -> None:
    # Padding of a random batch is NaN; zeros and huge values there must give the same bits.
    batch = random_batch(205, region_counts=True)
    expected = run(batch.to(place.device), place.floor, **options)
    assert all(tensor.isfinite().all() for tensor in expected)
    for filler in (0.0, 1e30):
        other = random_batch(205, region_counts=True)
        for side, padding in zip((other.regions, other.words), other.padding(), strict=True):
            side[padding] = filler
        for mine, its in zip(run(other.to(place.device), place.floor, **options), expected, strict=True):
            assert torch.equal(mine, its)
    for gradient, padding in zip(expected.gradients(), batch.padding(), strict=True):
        assert (gradient.cpu()[padding] == 0).all()


def test_the_defaults(place: Place) -> None:
    batch = random_batch(206).to(place.device)
    spelt = run(batch, place.floor, direction="t2i", agg_func="Sum", lambda_lse=10.0)
    for mine, its in zip(run(batch, place.floor), spelt, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    "change",
    [
        {"direction": "i2t"},
        {"agg_func": "Mean"},
        {"agg_func": "Max"},
        {"agg_func": "Softmax"},
        {"lambda_lse": 5.0},
    ],
    ids=label,
)
def test_no_option_is_ignored(place: Place, change: dict[str, Any]) -> None:
    batch, base = random_batch(207).to(place.device), {"agg_func": "LogSumExp"}
    difference = run(batch, place.floor, **base).scores - run(batch, place.floor, **base | change).scores
    assert difference.abs().max() > 1e-3


def alike(seed: int) -> Batch:
    """Regions come in pairs of equals, and so do words: every maximum is reached twice."""
    batch = random_batch(seed, regions=12, words=8, word_counts=[8, 6, 4, 2, 8, 2])
    regions, words = batch.regions.clone(), batch.words.clone()
    regions[:, 1::2], words[:, 1::2] = regions[:, ::2], words[:, ::2]
    return dataclasses.replace(batch, regions=regions, words=words)


@pytest.mark.parametrize("options", CASES, ids=label)
def test_of_equal_maxima_the_first_is_taken(place: Place, options: dict[str, Any]) -> None:
    batch = alike(208)
    got = run(batch.to(place.device), place.floor, **options)
    assert_ladder(got, run(batch, "eager", **options), truth(batch, **options), options)
    keys = got.grad_regions if options["direction"] == "t2i" else got.grad_words
    assert not keys.cpu().nan_to_num()[:, 1::2].any()
    assert keys.cpu()[:, ::2].any()


@pytest.mark.parametrize("options", CASES, ids=label)
def test_a_nan_is_the_largest_and_travels_to_its_scores_alone(place: Place, options: dict[str, Any]) -> None:
    batch = random_batch(209, region_counts=True)
    clean = run(batch.to(place.device), place.floor, **options).scores.cpu()
    regions, words = batch.regions.clone(), batch.words.clone()
    regions[1, 0, 3] = torch.nan
    words[2, 0, 5] = torch.nan
    batch = dataclasses.replace(batch, regions=regions, words=words)
    found = run(batch.to(place.device), place.floor, **options).scores.cpu()
    assert found[1].isnan().all()
    assert found[:, 2].isnan().all()
    rest = torch.ones_like(found, dtype=torch.bool)
    rest[1], rest[:, 2] = False, False
    torch.testing.assert_close(found[rest], clean[rest], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", CASES, ids=label)
def test_one_key_is_its_own_maximum(place: Place, options: dict[str, Any]) -> None:
    batch = random_batch(210, regions=1 if options["direction"] == "t2i" else 5, words=1)
    got = run(batch.to(place.device), place.floor, **options)
    assert_ladder(got, run(batch, "eager", **options), truth(batch, **options), options)
    if options["direction"] == "t2i":
        expected = torch.einsum("ird,cwd->ic", batch.regions.double(), batch.words.double())
        torch.testing.assert_close(got.scores.cpu().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_more_keys_than_a_byte_counts(place: Place, direction: str, packed: bool) -> None:
    options = {"direction": direction, "agg_func": "LogSumExp"}
    batch = random_batch(211, images=2, captions=3, regions=300, words=290, width=16, shortest=250)
    batch = batch.packed() if packed else batch
    got = run(batch.to(place.device), place.floor, **options)
    assert_ladder(got, run(batch, "eager", **options), truth(batch, **options), options)
    # Padded shapes say so themselves, packed words may be captions of any length.
    arg_max = kept_arg_max(batch.to(place.device), place.floor, options)
    assert bool(arg_max.numel()) == (packed and direction == "i2t")
    assert not arg_max.any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", CASES, ids=label)
def test_a_kept_arg_max_changes_nothing(fast_place: Place, options: dict[str, Any], packed: bool) -> None:
    batch = random_batch(212, region_counts=True)
    batch = (batch.packed() if packed else batch).to(fast_place.device)
    kept, again = (gradients(batch, fast_place.floor, options, kept=way) for way in (True, False))
    for mine, its in zip(kept, again, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_the_arg_max_is_kept_while_it_fits_the_bound(fast_place: Place, direction: str) -> None:
    batch = random_batch(213, images=3, captions=4, regions=5, words=6).to(fast_place.device)
    shape = (3, 4 * 6) if direction == "t2i" else (4, 3 * 5)
    size = shape[0] * shape[1]
    options = {"direction": direction}
    fits = kept_arg_max(batch, fast_place.floor, options, size)
    assert (fits.shape, fits.dtype) == (shape, torch.uint8)
    assert fits.any()
    assert kept_arg_max(batch, fast_place.floor, options, size - 1).shape == (0,)
    packed = kept_arg_max(batch.packed(), fast_place.floor, options, 1 << 20)
    assert packed.shape == ((3, sum(batch.word_counts)) if direction == "t2i" else (4, 3 * 5))


def test_counts_in_every_form(place: Place) -> None:
    batch = random_batch(214, region_counts=True).to(place.device)
    expected = run(batch, place.floor).scores
    for counts in (
        tuple(batch.word_counts),
        torch.tensor(batch.word_counts, dtype=torch.int32),
        caption_layout(batch.word_counts, place.device),
    ):
        scores = max_similarity_scores(
            batch.regions, batch.words, counts, region_counts=torch.tensor(batch.region_counts), backend=place.floor
        )
        assert torch.equal(scores, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("floor", ["eager", "native", "triton"])
@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_nothing_waits_for_a_gpu(floor: str, options: dict[str, Any]) -> None:
    reason = Place(floor, "cuda").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    batch = random_batch(221, region_counts=True)
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    batch = batch.to("cuda")
    regions, words = (side.detach().requires_grad_() for side in (batch.regions, batch.words))
    counts, of_regions = (torch.tensor(each, device="cuda") for each in (batch.word_counts, batch.region_counts))
    upstream = batch.grad_scores.float()

    def call() -> Result:
        scores = max_similarity_scores(regions, words, counts, region_counts=of_regions, backend=floor, **options)
        return Result(scores.detach(), *torch.autograd.grad(scores, (regions, words), upstream))

    call()  # compiles, and fills the allocator
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_ladder(got, peer, true, options)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_defaults_of_torch_do_not_leak_in_and_inputs_are_not_written(place: Place, packed: bool) -> None:
    batch = random_batch(222, region_counts=True)
    batch = (batch.packed() if packed else batch).to(place.device)
    before = batch.regions.clone(), batch.words.clone()
    expected = run(batch, place.floor)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(batch, place.floor)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, its in zip(got, expected, strict=True):
        assert torch.equal(mine, its)
    for now, then in zip((batch.regions, batch.words), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))


@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_views_that_are_not_contiguous(place: Place, options: dict[str, Any]) -> None:
    batch = random_batch(215, region_counts=True)
    expected = run(batch.to(place.device), place.floor, **options)
    turned = dataclasses.replace(
        batch,
        regions=batch.regions.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        words=batch.words.transpose(0, 1).contiguous().transpose(0, 1),
    )
    got = run(turned.to(place.device), place.floor, **options)
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=2e-6)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_outputs_are_wholly_written(place: Place, options: dict[str, Any]) -> None:
    batch = random_batch(216, region_counts=True).to(place.device)
    for workspace_bytes in (1 << 20, 1):
        got = run(batch, place.floor, workspace_bytes=workspace_bytes, **options)
        assert all(tensor.isfinite().all() for tensor in got)


@pytest.mark.parametrize("options", CASES, ids=label)
def test_two_runs_give_the_same_bits(place: Place, options: dict[str, Any]) -> None:
    batch = random_batch(217, images=9, captions=11, regions=36, words=20, width=64, region_counts=True)
    batch = batch.to(place.device)
    for mine, its in zip(run(batch, place.floor, **options), run(batch, place.floor, **options), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(("images", "captions"), [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_an_empty_batch(place: Place, images: int, captions: int, direction: str) -> None:
    batch = random_batch(218, images=images, captions=captions).to(place.device)
    for form in (batch, batch.packed()):
        got = run(form, place.floor, direction=direction)
        assert got.scores.shape == (images, captions)
        assert got.scores.dtype == torch.float32
        for gradient, side in zip(got.gradients(), (form.regions, form.words), strict=True):
            assert gradient.shape == side.shape
            assert not gradient.any()


def test_vectors_of_zeros_are_ordinary(place: Place) -> None:
    batch = random_batch(219)
    regions = torch.zeros_like(batch.regions)
    batch = dataclasses.replace(batch, regions=regions)
    got = run(batch.to(place.device), place.floor)
    assert not got.scores.any()
    assert got.grad_regions[:, 0].any()  # all keys are equal: the first is taken
    assert not got.grad_regions[:, 1:].any()


@functools.cache
def half(dtype: torch.dtype, case: Case) -> tuple[Batch, Result, Result]:
    """A batch of over a thousand scores in half precision, its truth, and what eager makes of it."""
    # Few keys, wide apart: rounding then swaps few maxima, and those that it swaps weigh on every floor alike.
    batch = random_batch(220, images=40, captions=50, regions=9, words=7, width=64, shortest=3, dtype=dtype)
    return batch, truth(batch, **dict(case)), run(batch, "eager", **dict(case))


@pytest.mark.parametrize("options", CASES, ids=label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_on_the_ladder(fast_place: Place, dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch, true, peer = half(dtype, tuple(options.items()))
    if fast_place == Place("eager"):  # the ladder's own measure: sound in itself
        assert score_error(peer.scores, true.scores) <= (0.02 if options["agg_func"] == "Sum" else 5e-3)
    else:
        got = run(batch.to(fast_place.device), fast_place.floor, **options)
        assert_ladder(got, peer, true, options, noise=False)
