"""``regulated_scores``: every floor against the definition, in blocks, in torch's machinery."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import model_checks as checks
from helpers import Place
from itm_kernels import regulated_scores
from models import DROPPED, REGULATED, Case, model_batch, model_truth, run_model, scorer

OP = "regulated_scores"
CASES = [*REGULATED, *DROPPED]
# A case of each kind, for what does not hang on the number of steps.
FEW = [
    Case(OP, {"direction": "t2i", "regulator": "rcar", "steps": 2, "dropout": 0.4, "seed": 11}),
    Case(OP, {"direction": "i2t", "regulator": "rcr", "steps": 2}),
    Case(OP, {"direction": "t2i", "regulator": "rar", "steps": 1}),
]
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


# A norm over a single query leaves its sign: what the float32 floors then differ by is rounding alone.
@pytest.mark.parametrize(
    ("case", "sizes"),
    [(c, s) for c in FEW for s in SIZES if s.get("regions" if c.options["direction"] == "i2t" else "words") != 1],
    ids=str,
)
def test_sizes(fast_place: Place, case: Case, sizes: dict[str, Any]) -> None:
    checks.check_ladder(fast_place, case, 5, **sizes)


@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
@few
def test_sizes_in_float64(place64: Place, case: Case, sizes: dict[str, Any]) -> None:
    checks.check_float64(place64, case, 5, **sizes)


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


@few
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


@pytest.mark.parametrize("case", [c for c in REGULATED if c.steps()["alignment"]], ids=str)
def test_the_backward_of_eager_costs_at_most_3_3_forwards(case: Case) -> None:
    checks.check_backward_flops(case, 3.3)


@few
def test_peak_memory(fast_place: Place, case: Case) -> None:
    checks.check_peak(fast_place, case, 4 << 20)


def test_masks_follow_global_numbers(place: Place) -> None:
    """Half of the images, numbered from where they stood, have the scores of the whole batch."""
    case = FEW[0]
    made = model_batch(case, 12, images=6, captions=5).to(place.device)
    whole = run_model(made, place.floor).scores
    rows = dataclasses.replace(
        made.batch,
        regions=made.batch.regions[3:],
        words=made.batch.words[2:],
        word_counts=made.batch.word_counts[2:],
        grad_scores=made.batch.grad_scores[3:, 2:],
    )
    part = dataclasses.replace(made, batch=rows)
    got = run_model(part, place.floor, image_offset=3, caption_offset=2).scores
    assert (got - whole[3:, 2:]).abs().max() <= 2e-6
    assert (run_model(part, place.floor).scores - got).abs().max() > 1e-4


def test_dropout_changes_with_the_seed(place: Place) -> None:
    case = Case(OP, {"direction": "t2i", "regulator": "rar", "steps": 1})
    made = model_batch(case, 13).to(place.device)
    plain, one, again, other = (
        run_model(made, place.floor, dropout=dropout, seed=seed).scores
        for dropout, seed in ((0.0, 1), (0.4, 1), (0.4, torch.tensor(1)), (0.4, 2))
    )
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 1e-4
    assert (one - plain).abs().max() > 1e-4


@pytest.mark.usefixtures("fresh_compiler")
def test_new_seeds_and_offsets_compile_nothing_new() -> None:
    made = model_batch(FEW[0], 43)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def scores(seed: torch.Tensor, offset: int) -> torch.Tensor:
        return scorer(made, seed=seed, image_offset=offset)(made.tensors())

    frames = 0
    for step in range(12):
        got = scores(torch.tensor(step), 5 * step)
        assert torch.equal(got, scorer(made, seed=step, image_offset=5 * step)(made.tensors()))
        frames = counter.frame_count if step == 2 else frames
    assert counter.frame_count == frames <= 2  # an offset is a constant at first, then a number


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"direction": "both"}, ValueError, "direction must be one of t2i, i2t"),
        ({"regulator": "RCAR"}, ValueError, "regulator must be one of rar, rcr, rcar"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.0}, TypeError, "steps must be a whole number"),
        ({"steps": 3}, ValueError, r"must be \[steps, S, D\] with S = 10, D = 24, steps = 3, got \[2, 10, 24\]"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a finite number"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number of at least 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be within \[0, 1\)"),
        ({"dropout": "0.4"}, TypeError, "dropout must be a number"),
        ({"seed": -1}, ValueError, "seed must be within"),
        ({"seed": torch.tensor(-1)}, ValueError, "seed must be within"),
        ({"seed": torch.tensor([1])}, TypeError, r"seed must be a whole number or an int64 tensor \[\]"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number"),
        ({"image_offset": -1}, ValueError, "image_offset must be within"),
        ({"caption_offset": 2**31}, ValueError, "caption_offset must be within"),
        ({"regulator": "rcr"}, ValueError, "parameters.aggregation must be None"),
        ({"regulator": "rar"}, ValueError, "parameters.correspondence must be None"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"word_counts": [9, 1, 1, 1, 1, 10]}, ValueError, r"word_counts must be in 1..9, got 10 at position 5"),
    ],
    ids=str,
)
def test_options_that_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    made = model_batch(Case(OP, {"direction": "t2i", "regulator": "rcar", "steps": 2}), 14)
    options = {"direction": "t2i", "regulator": "rcar", "steps": 2, "word_counts": made.batch.word_counts, **change}
    counts = options.pop("word_counts")
    with pytest.raises(error, match=message):
        regulated_scores(made.batch.regions, made.batch.words, counts, made.parameters, **options)


def test_dropout_without_an_aggregation_is_refused() -> None:
    made = model_batch(Case(OP, {"direction": "t2i", "regulator": "rcr", "steps": 1}), 14)
    with pytest.raises(ValueError, match="dropout is RAR's"):
        regulated_scores(
            made.batch.regions,
            made.batch.words,
            made.batch.word_counts,
            made.parameters,
            regulator="rcr",
            steps=1,
            dropout=0.1,
        )


@pytest.mark.parametrize("what", ["shape", "dtype", "type", "missing", "record", "kind"])
def test_parameters_that_are_refused(what: str) -> None:
    made = model_batch(Case(OP, {"direction": "t2i", "regulator": "rcar", "steps": 2}), 15)
    parameters: Any = made.parameters
    correspondence, error, message = parameters.correspondence, ValueError, ""
    if what == "shape":
        wrong = correspondence._replace(gate_bias=correspondence.gate_bias[:, 1:])
        parameters, message = parameters._replace(correspondence=wrong), r"gate_bias must be \[steps, D\]"
    elif what == "dtype":
        wrong = correspondence._replace(gate_bias=correspondence.gate_bias.bfloat16())
        parameters, error, message = parameters._replace(correspondence=wrong), TypeError, "must be torch.float32"
    elif what == "type":
        wrong = correspondence._replace(gate_bias=[0.0])
        parameters, error, message = parameters._replace(correspondence=wrong), TypeError, "must be a tensor, got list"
    elif what == "missing":
        parameters, message = parameters._replace(score=None), "parameters.score must be there"
    elif what == "kind":
        parameters = parameters._replace(score=parameters.alignment)
        error, message = TypeError, "parameters.score must be ScoreParameters, got AlignmentParameters"
    else:
        parameters, error, message = tuple(parameters), TypeError, "must be RegulatedParameters, got tuple"
    with pytest.raises(error, match=message):
        regulated_scores(made.batch.regions, made.batch.words, made.batch.word_counts, parameters)


def test_parameters_beside_half_precision_may_be_float32(fast_place: Place) -> None:
    made = model_batch(FEW[0], 16, images=8, captions=8)
    half = made.to(torch.bfloat16)
    mixed = dataclasses.replace(half, parameters=half.parameters.of([p.float() for p in half.parameters.flat()]))
    mixed, half = mixed.to(fast_place.device), half.to(fast_place.device)
    got, its = run_model(mixed, fast_place.floor), run_model(half, fast_place.floor)
    assert torch.equal(got.scores, its.scores)
    assert got.gradients["alignment_weight"].dtype == torch.float32
    assert its.gradients["alignment_weight"].dtype == torch.bfloat16


def test_zero_vectors(place: Place) -> None:
    """Regions, words and whole captions of zeros: finite scores and gradients, those of the definition."""
    for case in FEW[1:]:
        made = model_batch(case, 17, shortest=3)
        made.batch.regions[0] = 0
        made.batch.regions[1, 0] = 0
        made.batch.words[1, :2] = 0
        true = model_truth(made)
        got = run_model(made.to(place.device), place.floor)
        assert (got.scores.cpu() - true.scores).abs().max() <= 1e-5
        assert all(tensor.isfinite().all() for tensor in got)
