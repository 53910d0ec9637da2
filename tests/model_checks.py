"""What the suites of the ops with parameters do; a test module says with which op and cases."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from helpers import Place, relative_error, score_error
from itm_kernels import caption_layout
from memory import peak_bytes
from models import (
    Case,
    ModelBatch,
    ModelResult,
    assert_half_ladder,
    assert_model_exact,
    assert_model_ladder,
    model_batch,
    model_truth,
    run_model,
    scorer,
)


class Made:
    """A batch under the key that made it, for a cache."""

    def __init__(self, batch: ModelBatch, *key: Any) -> None:
        self.batch, self.key = batch, str(key)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Made) and other.key == self.key


@functools.lru_cache(maxsize=64)
def references(made: Made, peer: str) -> tuple[ModelResult, ModelResult]:
    """The definition in float64, and the peer in the batch's own dtype."""
    return model_truth(made.batch), run_model(made.batch, peer)


def peer_of(place: Place, made: Made) -> str:
    """Whose errors are the measure: eager's, and for eager itself those of the definition in the same dtype.

    (In half precision the definition works in float32, no measure for a floor that multiplies in half precision.)
    """
    return "reference" if place.floor == "eager" and made.batch.batch.regions.dtype == torch.float32 else "eager"


def prepared(case: Case, seed: int, *, packed: bool = False, dtype: torch.dtype = torch.float32, **sizes: Any) -> Made:
    """A batch in its dtype, as padded or packed words."""
    made = model_batch(case, seed, **sizes).to(dtype)
    return Made(made.packed() if packed else made, case.op, case, seed, packed, dtype, sizes)


def check_ladder(place: Place, case: Case, seed: int, **how: Any) -> None:
    """One forward and backward held against the definition in float64, by the errors of the place's peer."""
    made = prepared(case, seed, **how)
    true, peer = references(made, peer_of(place, made))
    got = run_model(made.batch.to(place.device), place.floor)
    assert_model_ladder(got, peer, true, case)


def check_half(place: Place, case: Case, dtype: torch.dtype, seeds: range, **how: Any) -> None:
    """Half precision over several batches, which are at least 1,000 scores."""
    runs = []
    for seed in seeds:
        made = prepared(case, seed, dtype=dtype, **how)
        true, peer = references(made, peer_of(place, made))
        runs.append((run_model(made.batch.to(place.device), place.floor), peer, true))
    assert sum(true.scores.numel() for _, _, true in runs) >= 1000
    assert_half_ladder(runs, case)


def check_float64(place: Place, case: Case, seed: int, **how: Any) -> None:
    made = prepared(case, seed, dtype=torch.float64, **how)
    assert_model_exact(run_model(made.batch.to(place.device), place.floor), model_truth(made.batch), case)


def check_blocks(place: Place, case: Case, seed: int) -> None:
    """Any bound gives the same results."""
    for packed in (False, True):
        made = prepared(case, seed, packed=packed, images=5, captions=6, region_counts=True, shortest=2)
        true, peer = references(made, peer_of(place, made))
        for workspace_bytes in (1, 200_000, 1 << 40):
            got = run_model(made.batch.to(place.device), place.floor, workspace_bytes=workspace_bytes)
            assert_model_ladder(got, peer, true, case)


def check_repeats(place: Place, case: Case, seed: int) -> None:
    """Two runs give the same bits, in fresh memory full of NaN."""
    made = prepared(case, seed, region_counts=True).batch.to(place.device)
    for mine, its in zip(run_model(made, place.floor), run_model(made, place.floor), strict=True):
        assert torch.equal(mine, its)
        assert mine.isfinite().all()


def check_empty(place: Place, case: Case) -> None:
    """No image, or no caption: empty scores, gradients of zeros, buffers as they were."""
    for sizes in ({"images": 0}, {"captions": 0}):
        made = model_batch(case, 5, **sizes).to(place.device)
        got = run_model(made, place.floor)
        assert got.scores.numel() == 0
        for name, grad in got.gradients.items():
            assert not grad.any(), name
        for buffer, before in zip(got.buffers, made.buffers, strict=True):
            assert torch.equal(buffer, before)


def check_gradcheck(place: Place, case: Case, seed: int) -> None:
    made = model_batch(
        case, seed, similarity=4, images=2, captions=2, regions=3, words=3, width=5, region_counts=True
    ).to(torch.float64)
    made = made.packed().to(place.device)
    tensors = {name: t.nan_to_num().detach().clone().requires_grad_() for name, t in made.tensors().items()}

    def scores(*values: Tensor) -> Tensor:
        # Anew every time: in training a call writes to the buffers.
        return scorer(made, place.floor)(dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(scores, list(tensors.values()), nondet_tol=0.0, fast_mode=True)


def arguments(made: ModelBatch, backend: str, *, requires_grad: bool) -> tuple[Any, ...]:
    """Of the opaque op, in its order."""
    given = made.tensors()
    tensors = {name: t.nan_to_num().detach().clone().requires_grad_(requires_grad) for name, t in given.items()}
    recorded: list[tuple[Any, ...]] = []
    module = importlib.import_module(f"itm_kernels.ops.{made.case.op}")
    original = module.differentiable

    def record(signature: Any, values: list[Tensor | None], rest: tuple[Any, ...]) -> Any:
        recorded.append((*values, *rest))
        return original(signature, values, rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "differentiable", record)
        scorer(made, backend)(tensors)
    (found,) = recorded
    return found


def check_opcheck(place: Place, case: Case, *, requires_grad: bool, packed: bool) -> None:
    made = prepared(case, 41, packed=packed, region_counts=True).batch.to(place.device)
    given = arguments(made, place.floor, requires_grad=requires_grad)
    torch.library.opcheck(getattr(torch.ops.itm_kernels, case.op).default, given)
    if not requires_grad:
        backward = getattr(torch.ops.itm_kernels, f"{case.op}_backward").default
        given = _with_statistics(case, given, place)
        torch.library.opcheck(backward, (made.batch.grad_scores.float(), *given))


def _with_statistics(case: Case, given: tuple[Any, ...], place: Place) -> tuple[Any, ...]:
    if case.regulated:
        return given
    outputs = getattr(torch.ops.itm_kernels, case.op).default(*given)
    return (*given[:7], outputs[1], *given[8:])  # the backward gets the statistics that the forward returned


def check_compile(place: Place, case: Case, *, requires_grad: bool) -> None:
    """One graph, forward and backward, the results of the op as it stands."""
    made = prepared(case, 43).batch.to(place.device)
    counter = CompileCounterWithBackend("aot_eager")
    tensors = {
        name: t.nan_to_num().detach().clone().requires_grad_(requires_grad) for name, t in made.tensors().items()
    }
    upstream = made.batch.grad_scores.float()
    op = scorer(made, place.floor)

    @torch.compile(fullgraph=True, backend=counter)
    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return (op(tensors) * upstream).sum()

    found = loss(tensors)
    plain = run_model(made, place.floor)
    assert score_error(found.detach(), (plain.scores * upstream).sum()) <= 1e-5
    if requires_grad:
        grads = torch.autograd.grad(found, list(tensors.values()))
        for (name, real), mine in zip(plain.gradients.items(), grads, strict=True):
            if name not in case.zero_gradients():
                assert relative_error(mine, real) <= 1e-6, name
    assert counter.frame_count == 1


def check_func_grad(place: Place, case: Case) -> None:
    made = prepared(case, 22).batch.to(place.device)
    upstream = made.batch.grad_scores.float()
    op = scorer(made, place.floor)
    found = torch.func.grad(lambda tensors: (op(tensors) * upstream).sum())(made.tensors())
    for name, real in run_model(made, place.floor).gradients.items():
        assert torch.equal(found[name], real), name


def check_twice_raises(place: Place, case: Case) -> None:
    made = prepared(case, 25).batch.to(place.device)
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.tensors().items()}
    scores = scorer(made, place.floor)(tensors)
    (gradient,) = torch.autograd.grad(scores.sum(), tensors["regions"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once|twice"):
        (gradient.square().sum() + tensors["regions"].square().sum()).backward()
    inputs = made.tensors()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(scorer(made, place.floor), (inputs,), (inputs,))


def check_saved_bytes(place: Place, case: Case) -> None:
    """Autograd keeps inputs, parameters and no more than four times the scores."""
    made = prepared(case, 29, images=20, captions=30, region_counts=True).batch.to(place.device)
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.tensors().items()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = scorer(made, place.floor)(tensors)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    allowed = sum(tensor.nbytes for tensor in tensors.values()) + 4 * scores.nbytes
    assert 0 < sum(held.values()) <= allowed


def check_autocast(place: Place, case: Case, dtype: torch.dtype) -> None:
    """Products in half precision, float32 scores and float32 gradients of float32 parameters."""
    made = prepared(case, 46, region_counts=True).batch.to(place.device)
    with torch.autocast(place.device, dtype=dtype):
        under = run_model(made, place.floor)
    plain = run_model(made, place.floor)
    assert under.scores.dtype == torch.float32
    assert 1e-6 < score_error(under.scores, plain.scores) < 0.1
    for name, grad in under.gradients.items():
        assert grad.dtype == torch.float32, name


def check_fake_shapes(case: Case, dtype: torch.dtype) -> None:
    made = prepared(case, 49, dtype=dtype).batch
    real = run_model(made)
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(t).requires_grad_() for name, t in made.tensors().items()}
        fakes = dataclasses.replace(made, buffers=tuple(mode.from_tensor(b) for b in made.buffers))
        scores = scorer(fakes)(tensors)
        grads = torch.autograd.grad(scores.sum(), list(tensors.values()))
    for fake, its in zip((scores, *grads), (real.scores, *real.gradients.values()), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (its.shape, its.dtype, its.stride())


def check_layout(place: Place, case: Case) -> None:
    """A list, a tensor and a layout of the counts give the same bits."""
    made = prepared(case, 51, packed=True).batch.to(place.device)
    expected = run_model(made, place.floor)
    for counts in (torch.tensor(made.batch.word_counts), caption_layout(made.batch.word_counts, place.device)):
        same = dataclasses.replace(made, batch=dataclasses.replace(made.batch, word_counts=counts))
        for mine, its in zip(run_model(same, place.floor), expected, strict=True):
            assert torch.equal(mine, its)


def check_backward_flops(case: Case, most: float) -> None:
    """The backward of eager, recomputation included, costs at most so many forwards.

    A counter sees nothing inside an opaque op, so the floor's functions are called as they are.
    """
    # As many channels to an image's regions as published: it is their product that costs.
    sizes = {"images": 8, "captions": 12, "regions": 36, "words": 14, "width": 256, "similarity": 256}
    made = prepared(case, 61, shortest=6, **sizes).batch
    given = arguments(made, "eager", requires_grad=False)
    head = 6 if case.regulated else 8
    contract = importlib.import_module(f"itm_kernels.ops.{case.op}")
    eager = importlib.import_module(f"itm_kernels.eager.{case.op}")
    regions, words, counts, _, region_counts, *extras = given[:head]
    parameters, options, _, _ = contract._split(*extras if case.regulated else (), given[head:])
    inputs = (regions, words, counts, region_counts)
    bound = {"workspace_bytes": 32 << 20}  # several blocks
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        if case.regulated:
            eager.forward(*inputs, parameters, options, **bound)
        else:
            _, statistics = eager.forward(*inputs, *extras[:2], parameters, extras[2], options, **bound)
    upstream = made.batch.grad_scores.float()
    with torch.no_grad(), FlopCounterMode(display=False) as backward:
        if case.regulated:
            eager.backward(upstream, *inputs, parameters, options, **bound)
        else:
            eager.backward(upstream, *inputs, *extras[:2], parameters, statistics, options, **bound)
    ratio = backward.get_total_flops() / forward.get_total_flops()
    assert 2 < ratio <= most, f"the backward costs {ratio:.2f} forwards"


def check_peak(place: Place, case: Case, workspace_bytes: int) -> None:
    """What a step allocates beyond inputs, gradients and scores stays within the bound."""
    made = prepared(case, 63, similarity=64, images=16, captions=16, regions=36, words=14, width=256, shortest=6).batch
    made = made.to(place.device)
    inputs = sum(tensor.nbytes for tensor in made.tensors().values())
    peak = peak_bytes(lambda: run_model(made, place.floor, workspace_bytes=workspace_bytes))
    # Beside the op: the test's own clones of the inputs, gradients, scores and their gradient.
    allowed = workspace_bytes + 2 * inputs + 4 * 4 * made.batch.grad_scores.numel()
    assert peak <= allowed, f"peak {peak} above {allowed}"
