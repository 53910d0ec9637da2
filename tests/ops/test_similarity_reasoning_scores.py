"""``similarity_reasoning_scores``: every floor against the definition, in blocks, in torch's machinery."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import model_checks as checks
from helpers import Place
from itm_kernels import similarity_reasoning_scores
from itm_kernels.reference import similarity_reasoning_scores as reference
from models import REASONED, Case, ModelBatch, model_batch, model_truth, run_model, scorer

OP = "similarity_reasoning_scores"
CASES = REASONED
# A case of each kind, for what does not hang on the number of steps.
FEW = [case for case in REASONED if case.options.get("steps", 3) == 3]
TRAINING = FEW[1]
SIZES: list[dict[str, Any]] = [
    {"regions": 1},
    {"regions": 7, "words": 1},
    {"images": 1, "captions": 1},
    {"regions": 36, "words": 14, "width": 40, "similarity": 16},
    {"regions": 100, "words": 30, "width": 21, "similarity": 7},
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
few = pytest.mark.parametrize("case", FEW, ids=str)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@cases
def test_every_option(fast_place: Place, case: Case, packed: bool) -> None:
    checks.check_ladder(fast_place, case, 3, packed=packed, region_counts=True, shortest=2)


@cases
def test_float64(place64: Place, case: Case) -> None:
    checks.check_float64(place64, case, 4, region_counts=True, shortest=1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@few
def test_sizes(fast_place: Place, case: Case, sizes: dict[str, Any]) -> None:
    checks.check_ladder(fast_place, case, 5, **sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_half_precision(fast_place: Place, case: Case, dtype: torch.dtype) -> None:
    sizes = {"images": 10, "captions": 10, "width": 32, "similarity": 16, "shortest": 4}
    checks.check_half(fast_place, case, dtype, range(6, 18), **sizes)


@few
def test_blocks(fast_place: Place, case: Case) -> None:
    checks.check_blocks(fast_place, case, 7)


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_two_runs_give_the_same_bits(place: Place, case: Case) -> None:
    checks.check_repeats(place, case, 8)


@few
def test_empty(place: Place, case: Case) -> None:
    checks.check_empty(place, case)


@cases
def test_gradcheck(place64: Place, case: Case) -> None:
    checks.check_gradcheck(place64, case, 9)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@few
def test_opcheck(place: Place, case: Case, requires_grad: bool, packed: bool) -> None:
    checks.check_opcheck(place, case, requires_grad=requires_grad, packed=packed)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "grad"])
@few
def test_compile(place: Place, case: Case, requires_grad: bool) -> None:
    checks.check_compile(place, case, requires_grad=requires_grad)


# In training the buffers are written in place, which torch.func refuses, as for torch's own layer.
@pytest.mark.parametrize("case", [case for case in FEW if case != TRAINING], ids=str)
def test_torch_func_grad(place: Place, case: Case) -> None:
    checks.check_func_grad(place, case)


@few
def test_differentiating_twice_and_forward_mode_raise(place: Place, case: Case) -> None:
    checks.check_twice_raises(place, case)


@few
def test_autograd_keeps_inputs_and_parameters(place: Place, case: Case) -> None:
    checks.check_saved_bytes(place, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@few
def test_autocast(place: Place, case: Case, dtype: torch.dtype) -> None:
    checks.check_autocast(place, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@few
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case, dtype: torch.dtype) -> None:
    checks.check_fake_shapes(case, dtype)


@few
def test_forms_of_word_counts(place: Place, case: Case) -> None:
    checks.check_layout(place, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_backward_of_eager_costs_at_most_3_3_forwards(case: Case) -> None:
    checks.check_backward_flops(case, 3.3)


@few
def test_peak_memory(fast_place: Place, case: Case) -> None:
    checks.check_peak(fast_place, case, 4 << 20)


def logits_of_captions(made: ModelBatch) -> list[torch.Tensor]:
    """What the batch normalisation sees of each caption, caught on its way through the definition."""
    seen: list[torch.Tensor] = []
    original = reference.node_logits

    def caught(*args: Any) -> torch.Tensor:
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(reference, "node_logits", caught)
        scorer(made, "reference")(made.tensors())
    return seen


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "running"])
def test_saf_updates_its_buffers_as_the_loop_over_captions_does(place: Place, momentum: float | None) -> None:
    made = model_batch(TRAINING, 18)
    # torch's own layer, asked for one caption after another, as the published loop asks it.
    norm = torch.nn.BatchNorm1d(1, momentum=momentum)
    for buffer, before in zip(norm.buffers(), made.buffers, strict=True):
        buffer.copy_(before)
    for logits in logits_of_captions(made):
        norm(logits.reshape(-1, 1))
    got = run_model(made.to(place.device), place.floor, momentum=momentum).buffers
    for mine, its in zip(got, norm.buffers(), strict=True):
        torch.testing.assert_close(mine.cpu(), its, rtol=2e-6, atol=2e-6)
    assert int(got[2]) == 7 + len(made.batch.word_counts)


def test_evaluation_leaves_the_buffers_alone(place: Place) -> None:
    made = model_batch(FEW[0], 19).to(place.device)
    for mine, before in zip(run_model(made, place.floor).buffers, made.buffers, strict=True):
        assert torch.equal(mine, before)


def test_pairs_of_a_training_batch_know_each_other(place: Place) -> None:
    """Statistics run over all images: without one of them the scores of the others move, in evaluation they do not."""
    for case, moves in ((TRAINING, True), (FEW[0], False)):
        made = model_batch(case, 20, images=4).to(place.device)
        fewer = dataclasses.replace(
            made,
            batch=dataclasses.replace(
                made.batch, regions=made.batch.regions[:3], grad_scores=made.batch.grad_scores[:3]
            ),
            extras={**made.extras, "image_global": made.extras["image_global"][:3]},
        )
        change = (run_model(fewer, place.floor).scores - run_model(made, place.floor).scores[:3]).abs().max()
        assert (change > 1e-4) if moves else (change <= 1e-6)


def call(made: ModelBatch, **change: Any) -> torch.Tensor:
    """SAF in evaluation with some arguments changed."""
    norm = (made.extras["norm_weight"], made.extras["norm_bias"], *made.buffers, 0.1, 1e-5)
    arguments = {
        "image_global": made.extras["image_global"],
        "caption_global": made.extras["caption_global"],
        "parameters": made.parameters,
        "reasoning": "SAF",
        "batch_norm": norm,
        **change,
    }
    batch = made.batch
    return similarity_reasoning_scores(batch.regions, batch.words, batch.word_counts, **arguments)


NORM = (torch.ones(1), torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor(0), 0.1, 1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reasoning": "saf"}, ValueError, "reasoning must be one of SAF, SGR"),
        ({"steps": 3}, ValueError, "steps must be None with reasoning 'SAF'"),
        ({"reasoning": "SGR"}, ValueError, "batch_norm must be None with reasoning 'SGR'"),
        ({"reasoning": "SGR", "batch_norm": None}, ValueError, "parameters.filtration must be None"),
        ({"batch_norm": None}, TypeError, r"batch_norm must be a tuple \(weight, bias"),
        ({"batch_norm": (*NORM, "group")}, NotImplementedError, "group must be None"),
        ({"batch_norm": (torch.ones(2), *NORM[1:])}, ValueError, r"weight must be a tensor of shape \[1\], got \[2\]"),
        ({"batch_norm": (*NORM[:5], 2.0, 1e-5)}, ValueError, "momentum must be None or within 0..1"),
        ({"batch_norm": (*NORM[:5], 0.1, 0.0)}, ValueError, "eps of batch_norm must be positive"),
        ({"image_global": torch.zeros(4, 24)}, ValueError, r"image_global must be \[I, D\] with I = 5 and D = 24"),
        ({"caption_global": torch.zeros(6, 23)}, ValueError, r"caption_global must be \[C, D\] with C = 6 and D = 24"),
        ({"caption_global": None}, TypeError, "caption_global must be a tensor, got NoneType"),
        ({"image_global": torch.zeros(5, 24).double()}, TypeError, "image_global must be torch.float32"),
        ({"parameters": ()}, TypeError, "parameters must be ReasoningParameters, got tuple"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes must be a whole number"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = model_batch(FEW[0], 14)
    with pytest.raises(error, match=message):
        call(made, **change)


def test_the_norm_comes_with_batch_norm_alone() -> None:
    made = model_batch(FEW[0], 14)
    filtration = made.parameters.filtration._replace(norm_weight=torch.ones(1))
    with pytest.raises(ValueError, match="batch_norm brings them"):
        call(made, parameters=made.parameters._replace(filtration=filtration))


def test_zero_vectors(place: Place) -> None:
    """Regions, words and whole captions of zeros: finite scores and gradients, those of the definition."""
    for case in FEW:
        made = model_batch(case, 17, shortest=3)
        made.batch.regions[0] = 0
        made.batch.regions[1, 0] = 0
        made.batch.words[1, :2] = 0
        true = model_truth(made)
        got = run_model(made.to(place.device), place.floor)
        assert (got.scores.cpu() - true.scores).abs().max() <= 1e-5
        assert all(tensor.isfinite().all() for tensor in got)
