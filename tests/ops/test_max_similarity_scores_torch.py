"""``max_similarity_scores`` inside torch's machinery: gradcheck, opcheck, compile, torch.func, autocast, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import Batch, Place, label, random_batch, relative_error, score_error
from itm_kernels import caption_layout, max_similarity_scores, use_backend
from itm_kernels.reference import max_similarity_scores as reference
from similarity import OP, WORKSPACE_BYTES, arguments, every_option, run


def clean(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.regions.nan_to_num(), batch.words.nan_to_num()


@pytest.mark.parametrize("workspace_bytes", [WORKSPACE_BYTES, 1], ids=["kept", "again"])
@pytest.mark.parametrize("options", every_option(), ids=label)
def test_gradcheck(place64: Place, options: dict[str, Any], workspace_bytes: int) -> None:
    batch = random_batch(241, images=2, captions=3, regions=4, words=3, width=5, dtype=torch.float64)
    batch = batch.packed().to(place64.device)
    leaves = batch.regions.requires_grad_(), batch.words.requires_grad_()

    def scores(regions: Tensor, words: Tensor) -> Tensor:
        return max_similarity_scores(
            regions, words, batch.word_counts, workspace_bytes=workspace_bytes, backend=place64.floor, **options
        )

    assert torch.autograd.gradcheck(scores, leaves)


@pytest.mark.parametrize("differentiated", [False, True], ids=["plain", "kept"])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_opcheck_forward(place: Place, direction: str, differentiated: bool) -> None:
    batch = random_batch(242, region_counts=True).to(place.device)
    regions, words, *rest = arguments(batch, place.floor, {"direction": direction, "agg_func": "Softmax"})
    leaves = [side.nan_to_num().requires_grad_(differentiated) for side in (regions, words)]
    torch.library.opcheck(torch.ops.itm_kernels.max_similarity_scores.default, (*leaves, *rest, differentiated))


@pytest.mark.parametrize("form", ["padded", "packed", "empty"])
def test_opcheck_backward(place: Place, form: str) -> None:
    batch = random_batch(243, captions=0 if form == "empty" else 6, region_counts=True).to(place.device)
    batch = batch.packed() if form == "packed" else batch
    inputs = arguments(batch, place.floor, {"agg_func": "LogSumExp"})
    _, arg_max = torch.ops.itm_kernels.max_similarity_scores(*inputs, True)
    for kept in (arg_max, arg_max.new_empty(0)):
        torch.library.opcheck(
            torch.ops.itm_kernels.max_similarity_scores_backward.default, (batch.grad_scores.float(), kept, *inputs)
        )


def compiled(counter: Any, **options: Any) -> Callable[..., Tensor]:
    @torch.compile(fullgraph=True, backend=counter)
    def loss(regions: Tensor, words: Tensor, counts: Any, upstream: Tensor) -> Tensor:
        # Ops around ours, so that there is a graph to be broken.
        return (max_similarity_scores(regions * 2, words, counts, **options) * upstream).sum()

    return loss


def assert_compiled_is_eager(loss: Callable[..., Tensor], batch: Batch, counts: Any, **options: Any) -> None:
    regions, words = (side.requires_grad_() for side in clean(batch))
    upstream = batch.grad_scores.float()
    loss(regions, words, counts, upstream).backward()
    doubled, words_too = (regions.detach() * 2).requires_grad_(), words.detach().requires_grad_()
    max_similarity_scores(doubled, words_too, counts, **options).backward(upstream)
    assert relative_error(regions.grad, 2 * doubled.grad) <= 1e-6
    assert relative_error(words.grad, words_too.grad) <= 1e-6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("workspace_bytes", [WORKSPACE_BYTES, 1], ids=["kept", "again"])
def test_compile_fullgraph_forward_and_backward(place: Place, workspace_bytes: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    options = {"agg_func": "LogSumExp", "backend": place.floor, "workspace_bytes": workspace_bytes}
    loss = compiled(counter, **options)
    for seed in (244, 245):  # new word counts compile nothing new
        batch = random_batch(seed).to(place.device)
        assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts), **options)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_other_sizes_packed_words_layouts_and_lists() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    loss = compiled(counter, direction="i2t")
    for captions, words in ((7, 10), (11, 13), (4, 17)):
        batch = random_batch(246 + captions, captions=captions, words=words)
        assert_compiled_is_eager(loss, batch, torch.tensor(batch.word_counts), direction="i2t")
    assert counter.frame_count == 2
    packed = random_batch(246).packed()
    for counts in (torch.tensor(packed.word_counts), caption_layout(packed.word_counts, "cpu"), packed.word_counts):
        assert_compiled_is_eager(loss, packed, counts, direction="i2t")


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_for_evaluation(place: Place) -> None:
    batch = random_batch(247, region_counts=True).to(place.device)
    expected = run(batch, place.floor).scores

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scores(regions: Tensor, words: Tensor) -> Tensor:
        return max_similarity_scores(
            regions, words, batch.word_counts, region_counts=batch.region_counts, backend=place.floor
        )

    assert torch.equal(scores(batch.regions, batch.words), expected)
    with torch.no_grad():
        assert torch.equal(scores(batch.regions.requires_grad_(), batch.words), expected)


def test_func_grad(place: Place) -> None:
    batch = random_batch(248, region_counts=True).to(place.device)
    expected = run(batch, place.floor, agg_func="Softmax")

    def loss(regions: Tensor, words: Tensor) -> Tensor:
        scores = max_similarity_scores(
            regions, words, batch.word_counts, region_counts=batch.region_counts, agg_func="Softmax",
            backend=place.floor,
        )  # fmt: skip
        return (scores * batch.grad_scores.float()).sum()

    for mine, its in zip(torch.func.grad(loss, (0, 1))(batch.regions, batch.words), expected.gradients(), strict=True):
        assert torch.equal(mine, its)


def test_gradients_of_one_side_alone(place: Place) -> None:
    batch = random_batch(249).to(place.device)
    expected = run(batch, place.floor)
    for side in (0, 1):
        leaves = [t.detach().clone().requires_grad_(number == side) for number, t in enumerate(clean(batch))]
        scores = max_similarity_scores(*leaves, batch.word_counts, backend=place.floor)
        scores.backward(batch.grad_scores.float())
        assert torch.equal(leaves[side].grad, expected.gradients()[side])
        assert leaves[1 - side].grad is None


def test_a_second_derivative_is_refused(place: Place) -> None:
    batch = random_batch(250).to(place.device)
    regions, words = (side.requires_grad_() for side in clean(batch))
    scores = max_similarity_scores(regions, words, batch.word_counts, backend=place.floor)
    (grad,) = torch.autograd.grad(scores.sum(), regions, create_graph=True)
    with pytest.raises(RuntimeError, match="max_similarity_scores: can be differentiated once, not twice"):
        grad.square().sum().backward()


@pytest.mark.usefixtures("fresh_compiler")
def test_use_backend_reaches_compiled_code_and_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(251)
    loss = compiled("aot_eager")
    ran: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(reference, name)

        def call(*args: Any, **rest: Any) -> Any:
            ran.append(name)
            return original(*args, **rest)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(reference, name, watched(name))
    regions, words = (side.requires_grad_() for side in clean(batch))
    with use_backend("reference"):
        value = loss(regions, words, torch.tensor(batch.word_counts), batch.grad_scores.float())
    value.backward()
    assert ran[0] == "forward"
    assert "backward" in ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(place: Place, dtype: torch.dtype) -> None:
    batch = random_batch(252, region_counts=True).to(place.device)
    plain = run(batch, place.floor)
    with torch.autocast(place.device, dtype=dtype):
        under = run(batch, place.floor)
    half = run(batch.to(dtype), place.floor)
    assert torch.equal(under.scores, half.scores)
    assert 1e-5 < score_error(under.scores, plain.scores) < 3e-2
    assert under.scores.dtype == torch.float32
    for mine, its in zip(under.gradients(), half.gradients(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, its.float())


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(dtype: torch.dtype, direction: str, form: str) -> None:
    batch = random_batch(253, dtype=dtype)
    batch = batch.packed() if form == "packed" else batch
    for workspace_bytes in (WORKSPACE_BYTES, 1):
        real = arguments(batch, "eager", {"direction": direction}, workspace_bytes)
        outputs = torch.ops.itm_kernels.max_similarity_scores(*real, True)
        grads = torch.ops.itm_kernels.max_similarity_scores_backward(batch.grad_scores, outputs[1], *real)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in real]
            fake_outputs = torch.ops.itm_kernels.max_similarity_scores(*fake, True)
            fake_grads = torch.ops.itm_kernels.max_similarity_scores_backward(
                mode.from_tensor(batch.grad_scores), fake_outputs[1], *fake
            )
        for mine, its in zip((*fake_outputs, *fake_grads), (*outputs, *grads), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (its.shape, its.dtype, its.stride())


def test_the_module_under_test() -> None:
    assert max_similarity_scores.__name__ == OP
