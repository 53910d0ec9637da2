"""Derivatives of ``cross_attention_scores``: against finite differences, through torch.func, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from helpers import Batch, Place, label, option_pairs, random_batch, relative_error, run, truth
from itm_kernels import cross_attention_scores, use_backend

OP = "cross_attention_scores"


def score_of(batch: Batch, place: Place, **options: Any) -> Any:
    """The op as a function of its two differentiable inputs."""

    def scores(regions: Tensor, words: Tensor) -> Tensor:
        return cross_attention_scores(
            regions, words, batch.word_counts, region_counts=batch.region_counts, backend=place.floor, **options
        )

    return scores


@pytest.mark.parametrize("options", option_pairs(), ids=label)
def test_gradcheck(place64: Place, options: dict[str, Any]) -> None:
    # Finite differences of every entry on eager, of one random direction (fast mode) on the slow definition.
    batch = random_batch(21, images=2, captions=2, regions=3, words=3, width=3, region_counts=True, dtype=torch.float64)
    batch = batch.packed()
    inputs = [t.nan_to_num().to(place64.device).requires_grad_() for t in (batch.regions, batch.words)]
    fast = place64.floor == "reference"
    assert torch.autograd.gradcheck(score_of(batch, place64, **options), inputs, nondet_tol=0.0, fast_mode=fast)


@pytest.mark.parametrize("options", option_pairs()[::4], ids=label)
def test_gradcheck_of_padded_words(place64: Place, options: dict[str, Any]) -> None:
    batch = random_batch(21, images=2, captions=2, regions=3, words=3, width=3, region_counts=True, dtype=torch.float64)
    inputs = [t.nan_to_num().to(place64.device).requires_grad_() for t in (batch.regions, batch.words)]
    assert torch.autograd.gradcheck(score_of(batch, place64, **options), inputs, nondet_tol=0.0, fast_mode=True)


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_torch_func_grad_is_autograd(place: Place, direction: str) -> None:
    batch = random_batch(22).to(place.device)
    scores = score_of(batch, place, direction=direction)
    weights = batch.grad_scores.float()
    found = torch.func.grad(lambda v, t: (scores(v, t) * weights).sum(), argnums=(0, 1))(batch.regions, batch.words)
    for mine, its in zip(found, run(batch, place.floor, direction=direction).gradients(), strict=True):
        assert torch.equal(mine, its)


def test_torch_func_vjp(place: Place) -> None:
    batch = random_batch(23).to(place.device)
    scores, pull = torch.func.vjp(score_of(batch, place), batch.regions, batch.words)
    expected = run(batch, place.floor)
    assert torch.equal(scores, expected.scores)
    for mine, its in zip(pull(batch.grad_scores.float()), expected.gradients(), strict=True):
        assert torch.equal(mine, its)


def test_forward_mode_raises_instead_of_being_zero(place: Place) -> None:
    batch = random_batch(24).to(place.device)
    scores = score_of(batch, place)
    inputs = (batch.regions, batch.words)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(scores, inputs, inputs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        scores(forward_ad.make_dual(batch.regions, batch.regions), batch.words)


def test_vmap_raises(place: Place) -> None:
    batch = random_batch(24).to(place.device)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(score_of(batch, place), in_dims=(0, None))(batch.regions[None], batch.words)


def first_gradient(batch: Batch, place: Place, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """Regions that require grad, and d loss / d regions with its graph."""
    regions = batch.regions.detach().requires_grad_()
    scores = score_of(batch, place)(regions, batch.words)
    # The upstream gradient of a squared loss depends on the regions, that of a sum is a constant.
    loss = scores.square().sum() if weighted else scores.sum()
    (gradient,) = torch.autograd.grad(loss, regions, create_graph=True)
    return regions, gradient


@pytest.mark.parametrize("weighted", [True, False], ids=["squared", "sum"])
def test_differentiating_twice_raises(place: Place, weighted: bool) -> None:
    # A gradient penalty beside another loss: the other term alone must not pass for the whole.
    regions, gradient = first_gradient(random_batch(25).to(place.device), place, weighted=weighted)
    with pytest.raises(RuntimeError, match=r"once|twice"):
        (gradient.square().sum() + regions.square().sum()).backward()


def test_torch_func_grad_twice_raises(place: Place) -> None:
    batch = random_batch(25).to(place.device)
    scores = score_of(batch, place)

    def penalty(regions: Tensor) -> Tensor:
        return torch.func.grad(lambda v: scores(v, batch.words).sum())(regions).square().sum()

    with pytest.raises(RuntimeError, match=r"once|twice"):
        torch.func.grad(penalty)(batch.regions)


@pytest.mark.parametrize("wanted", ["regions", "words"])
def test_one_input_alone(place: Place, wanted: str) -> None:
    batch = random_batch(26).to(place.device)
    expected = run(batch, place.floor)
    inputs = {"regions": batch.regions.clone(), "words": batch.words.clone()}
    inputs[wanted].requires_grad_()
    scores = cross_attention_scores(**inputs, word_counts=batch.word_counts, backend=place.floor)
    scores.backward(batch.grad_scores.float())
    assert torch.equal(inputs[wanted].grad, getattr(expected, f"grad_{wanted}"))
    assert inputs["words" if wanted == "regions" else "regions"].grad is None


def test_one_tensor_as_both_inputs(place: Place) -> None:
    batch = random_batch(27, images=4, captions=4, regions=6, words=6, shortest=6).to(place.device)
    shared = batch.regions.clone().requires_grad_()
    scores = cross_attention_scores(shared, shared, [6] * 4, backend=place.floor)
    scores.backward(batch.grad_scores.float())
    twin = type(batch)(batch.regions, batch.regions, [6] * 4, None, batch.grad_scores)
    expected = sum(truth(twin).gradients())
    assert relative_error(shared.grad, expected) <= 1e-5


def test_no_graph_without_need(place: Place) -> None:
    batch = random_batch(28).to(place.device)
    assert not score_of(batch, place)(batch.regions, batch.words).requires_grad
    regions = batch.regions.clone().requires_grad_()
    with torch.no_grad():
        assert not score_of(batch, place)(regions, batch.words).requires_grad
    with torch.inference_mode():
        scores = score_of(batch, place)(batch.regions, batch.words)
    assert torch.equal(scores, run(batch, place.floor).scores)


def test_the_opaque_op_alone_records_nothing() -> None:
    batch = random_batch(28)
    regions = batch.regions.requires_grad_()
    options = ("t2i", "clipped_l2norm", 9.0, "LogSumExp", 6.0, "none", 0.0, 1 << 20, "auto")
    scores = torch.ops.itm_kernels.cross_attention_scores(
        regions, batch.words, torch.tensor(batch.word_counts), None, None, *options
    )
    assert not scores.requires_grad


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_autograd_keeps_the_inputs_alone(place: Place, direction: str) -> None:
    batch = random_batch(29, images=20, captions=30, region_counts=True).to(place.device)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = batch.regions.requires_grad_(), batch.words.requires_grad_()
        scores = score_of(batch, place, direction=direction)(*inputs)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    allowed = sum(tensor.nbytes for tensor in inputs) + 2 * scores.nbytes
    assert 0 < sum(held.values()) <= allowed


@pytest.mark.parametrize("floor", ["reference", "eager", "native"])
def test_the_backward_runs_on_the_floor_of_its_forward(floor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(30)
    expected = run(batch, floor)
    regions = batch.regions.requires_grad_()
    with use_backend(floor):
        scores = cross_attention_scores(regions, batch.words, batch.word_counts)

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("another floor ran")

    for other in {"reference", "eager", "native"} - {floor}:
        monkeypatch.setattr(f"itm_kernels.{other}.{OP}.backward", refuse)
    scores.backward(batch.grad_scores.float())
    assert torch.equal(regions.grad, expected.grad_regions)


@pytest.mark.parametrize("form", ["expanded", "transposed", "float64"])
def test_any_upstream_gradient(place: Place, form: str) -> None:
    batch = random_batch(31).to(place.device)
    upstream = batch.grad_scores.float()
    if form == "expanded":  # as a sum sends it
        upstream = upstream[:1, :1].expand_as(upstream)
    elif form == "transposed":
        upstream = upstream.t().contiguous().t()
    regions, words = batch.regions.clone().requires_grad_(), batch.words.clone().requires_grad_()
    scores = score_of(batch, place)(regions, words)
    if form == "float64":  # a later op in double precision
        (scores.double() * upstream.double()).sum().backward()
    else:
        scores.backward(upstream)
    plain = type(batch)(batch.regions, batch.words, batch.word_counts, None, upstream.contiguous().double())
    for mine, its in zip((regions.grad, words.grad), run(plain, place.floor).gradients(), strict=True):
        assert torch.equal(mine, its)


def test_gradients_accumulate(place: Place) -> None:
    batch = random_batch(32).to(place.device)
    once = run(batch, place.floor).grad_regions
    regions = batch.regions.requires_grad_()
    for _ in range(2):
        score_of(batch, place)(regions, batch.words).backward(batch.grad_scores.float())
    assert torch.equal(regions.grad, 2 * once)
