"""``cross_attention_scores`` inside torch's machinery: opcheck, torch.compile, autocast, fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from helpers import Batch, Place, random_batch, relative_error, run, score_error
from itm_kernels import caption_layout, cross_attention_scores, use_backend
from itm_kernels.reference import cross_attention_scores as reference

OP = "cross_attention_scores"
OPTIONS = ("both", "clipped_l2norm", 9.0, "LogSumExp", 6.0, "prob", 0.0, 1 << 24)


def arguments(batch: Batch, backend: str, *, requires_grad: bool) -> tuple[Any, ...]:
    counts = torch.tensor(batch.word_counts)
    of_regions = None if batch.region_counts is None else torch.tensor(batch.region_counts)
    regions, words = (t.nan_to_num().requires_grad_(requires_grad) for t in (batch.regions, batch.words))
    return regions, words, counts, None, of_regions, *OPTIONS, backend


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
def test_opcheck_forward(place: Place, requires_grad: bool, region_counts: bool) -> None:
    batch = random_batch(41, region_counts=region_counts).to(place.device)
    torch.library.opcheck(
        torch.ops.itm_kernels.cross_attention_scores.default,
        arguments(batch, place.floor, requires_grad=requires_grad),
    )


@pytest.mark.parametrize("form", ["padded", "packed", "empty"])
def test_opcheck_backward(place: Place, form: str) -> None:
    batch = random_batch(42, captions=0 if form == "empty" else 6, region_counts=True).to(place.device)
    batch = batch.packed() if form == "packed" else batch
    torch.library.opcheck(
        torch.ops.itm_kernels.cross_attention_scores_backward.default,
        (batch.grad_scores.float(), *arguments(batch, place.floor, requires_grad=False)),
    )


def compiled(counter: Any, **options: Any) -> Callable[..., Tensor]:
    @torch.compile(fullgraph=True, backend=counter)
    def loss(regions: Tensor, words: Tensor, counts: Any, upstream: Tensor) -> Tensor:
        # Ops around ours, so that there is a graph to be broken.
        return (cross_attention_scores(regions * 2, words, counts, **options) * upstream).sum()

    return loss


def assert_compiled_is_eager(loss: Callable[..., Tensor], batch: Batch, counts: Any, **options: Any) -> None:
    regions, words = (t.nan_to_num().requires_grad_() for t in (batch.regions, batch.words))
    upstream = batch.grad_scores.float()
    loss(regions, words, counts, upstream).backward()
    doubled, words_too = (regions.detach() * 2).requires_grad_(), words.detach().requires_grad_()
    scores = cross_attention_scores(doubled, words_too, counts, **options)
    scores.backward(upstream)
    assert relative_error(regions.grad, 2 * doubled.grad) <= 1e-6
    assert relative_error(words.grad, words_too.grad) <= 1e-6


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_fullgraph_forward_and_backward(place: Place) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    options = {"direction": "both", "backend": place.floor}
    loss = compiled(counter, **options)
    batch = random_batch(43, region_counts=False).to(place.device)
    assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts), **options)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_new_word_counts_compile_nothing_new() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    loss = compiled(counter)
    for seed in range(4):
        batch = random_batch(50 + seed)
        assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts))
    assert counter.frame_count == 1
    # Other sizes: one compilation more, for all of them.
    for captions, words in ((7, 10), (11, 13), (4, 17)):
        batch = random_batch(60 + captions, captions=captions, words=words)
        assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts))
    assert counter.frame_count == 2
    # Packed: N is another number in every batch.
    frames = 0
    for seed in range(4):
        batch = random_batch(70 + seed, captions=7).packed()
        assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts))
        frames = frames or counter.frame_count
    assert counter.frame_count <= frames + 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_caption_layout_compiles_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    loss = compiled(counter)
    for seed in range(4):
        batch = random_batch(80 + seed)
        assert_compiled_is_eager(loss, batch, caption_layout(batch.word_counts, "cpu"))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_lists_compile_too() -> None:
    # A list is part of the program to torch.compile: it recompiles, but it must not break the graph.
    loss = compiled("aot_eager")
    for seed in range(3):
        batch = random_batch(90 + seed)
        assert_compiled_is_eager(loss, batch, batch.word_counts)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "no_grad"])
def test_compile_for_evaluation(place: Place, requires_grad: bool) -> None:
    batch = random_batch(52, region_counts=True).to(place.device)
    expected = run(batch, place.floor).scores

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scores(regions: Tensor, words: Tensor) -> Tensor:
        return cross_attention_scores(
            regions, words, batch.word_counts, region_counts=batch.region_counts, backend=place.floor
        )

    regions = batch.regions.requires_grad_(requires_grad)
    with torch.no_grad() if requires_grad else torch.enable_grad():
        assert torch.equal(scores(regions, batch.words), expected)


@pytest.mark.parametrize("region_counts", [False, True], ids=["whole", "ragged"])
def test_a_dispatch_mode_may_look_on(place: Place, region_counts: bool) -> None:
    # A mode calls ops with autograd switched off around them, which floors that differentiate must not notice.
    batch = random_batch(53, region_counts=region_counts).to(place.device)
    expected = run(batch, place.floor)
    with FlopCounterMode(display=False):
        watched = run(batch, place.floor)
    for mine, its in zip(watched, expected, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.usefixtures("fresh_compiler")
def test_use_backend_reaches_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(44)
    loss = compiled("aot_eager")
    inputs = (batch.regions.nan_to_num(), batch.words.nan_to_num(), torch.tensor(batch.word_counts))
    loss(*inputs, batch.grad_scores.float())
    ran: list[bool] = []
    forward = reference.forward

    def watched(*args: Any, **rest: Any) -> Tensor:
        ran.append(True)
        return forward(*args, **rest)

    monkeypatch.setattr(reference, "forward", watched)
    with use_backend("reference"):
        loss(*inputs, batch.grad_scores.float())
    assert ran


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    batch = random_batch(45)
    assert_compiled_is_eager(compiled("inductor"), batch, torch.tensor(batch.word_counts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place: Place, dtype: torch.dtype) -> None:
    batch = random_batch(46, region_counts=True).to(place.device)
    plain = run(batch, place.floor, direction="both")
    with torch.autocast(place.device, dtype=dtype):
        under = run(batch, place.floor, direction="both")
    half = run(batch.to(dtype), place.floor, direction="both")
    # The products run in half precision ...
    assert torch.equal(under.scores, half.scores)
    assert score_error(under.scores, plain.scores) > 1e-5
    assert score_error(under.scores, plain.scores) < 2e-2
    # ... scores are float32, and gradients reach the float32 inputs.
    assert under.scores.dtype == torch.float32
    for mine, its in zip(under.gradients(), half.gradients(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its.float())


def test_autocast_leaves_float64_alone(place64: Place) -> None:
    batch = random_batch(47, dtype=torch.float64).to(place64.device)
    with torch.autocast(place64.device, dtype=torch.bfloat16):
        under = run(batch, place64.floor)
    for mine, its in zip(under, run(batch, place64.floor), strict=True):
        assert torch.equal(mine, its)


def test_autocast_brings_two_dtypes_together_only_when_on() -> None:
    batch = random_batch(48)
    with pytest.raises(TypeError, match="one dtype"):
        cross_attention_scores(batch.regions, batch.words.bfloat16(), batch.word_counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(dtype: torch.dtype) -> None:
    batch = random_batch(49, dtype=dtype)
    real = run(batch)
    with FakeTensorMode() as mode:
        regions, words = (mode.from_tensor(t).requires_grad_() for t in (batch.regions, batch.words))
        counts = mode.from_tensor(torch.tensor(batch.word_counts))
        scores = cross_attention_scores(regions, words, counts)
        grads = torch.autograd.grad(scores.sum(), (regions, words))
    for fake, its in zip((scores, *grads), real, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (its.shape, its.dtype, its.stride())
