"""``correspondence_regulator`` on every floor, its state, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itm_kernels import CorrespondenceParameters, CorrespondenceState, correspondence_regulator
from stage_suite import StageSuite, refused
from stages import Case, floors, stage_batch

OP = "correspondence_regulator"


class TestCorrespondenceRegulator(StageSuite):
    cases = tuple(
        Case(OP, {"direction": direction, "step": step}, ("hidden", "temperature") if step else ())
        for direction in ("t2i", "i2t")
        for step in (0, 1, 2)
    )


@floors
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_hidden_layers_add_up(direction: str, backend: str, dtype: torch.dtype) -> None:
    case = Case(OP, {"direction": direction, "step": 2}, ("hidden", "temperature"))
    made = stage_batch(case, 1, region_counts=False).to(dtype)
    _, _, hidden = made.outputs(made.tensors, backend=backend)
    assert hidden.shape[0] == 3
    assert torch.equal(hidden[:2], made.tensors["hidden"])


@floors
def test_a_gate_of_ones_leaves_the_plain_products(backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP), 2, region_counts=False).to(dtype)
    tensors = {**made.tensors, "gate_weight": torch.zeros_like(made.tensors["gate_weight"])}
    tensors["gate_bias"] = torch.full_like(made.tensors["gate_bias"], 9.0)  # tanh is 1: the clamp holds the gate at 1
    scores = made.outputs(tensors, backend=backend)[0]
    torch.testing.assert_close(scores, made.tensors["regions"] @ made.tensors["words"].t())


@floors
def test_the_first_temperature_is_an_option(backend: str, dtype: torch.dtype) -> None:
    made = stage_batch(Case(OP), 3).to(dtype)
    ten = made.outputs(made.tensors, backend=backend)[1]
    four = made.outputs(made.tensors, backend=backend, temperature=4.0)[1]
    torch.testing.assert_close(ten - four, torch.full_like(ten, 6.0))  # the relu passes both


def inputs(step: int = 0) -> dict[str, Any]:
    """A call that works: 2 images of 3 regions, 3 captions of 6 words in all, D = 4, S = 5, H = 7, U = 2, 2 steps."""
    made = {
        "alignments": torch.randn(2, 6, 5),
        "regions": torch.randn(2, 3, 4),
        "words": torch.randn(6, 4),
        "word_counts": [3, 1, 2],
        "parameters": CorrespondenceParameters(
            torch.randn(2, 7, 5),
            torch.randn(2, 7),
            torch.randn(2, 4, 7),
            torch.randn(2, 4),
            torch.randn(2, 2, 5),
            torch.randn(2, 2),
            torch.randn(2, 2),
            torch.randn(2),
        ),
        "step": step,
    }
    if step:
        made["state"] = state()
    return made


def state(*, steps: int = 1, words: int = 6, temperatures: int = 6, width: int = 7) -> CorrespondenceState:
    return CorrespondenceState(torch.randn(2, 3, 6), torch.ones(2, temperatures), torch.randn(steps, 2, words, width))


def changed(**fields: Any) -> CorrespondenceParameters:
    return inputs()["parameters"]._replace(**fields)


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "alignments": (
        {"alignments": torch.randn(2, 5, 5)},
        ValueError,
        "alignments must be [I, N, S] with I = 2, N = 6, S = 5, got [2, 5, 5]",
    ),
    "alignments of regions": (
        {"direction": "i2t"},
        ValueError,
        "alignments must be [I, R, C, S] with I = 2, R = 3, C = 3, S = 5, got [2, 6, 5]",
    ),
    "alignments dtype": (
        {"alignments": torch.randn(2, 6, 5).double()},
        TypeError,
        "alignments must be torch.float32, got torch.float64",
    ),
    "regions": (
        {"regions": torch.randn(3, 4)},
        ValueError,
        "regions must be [I, R, D], got [3, 4]",
    ),
    "direction": ({"direction": "t2t"}, ValueError, "direction must be one of t2i, i2t, got 't2t'"),
    "parameters": ({"parameters": None}, TypeError, "parameters must be CorrespondenceParameters, got NoneType"),
    "gate weight": (
        {"parameters": changed(gate_weight=torch.randn(2, 7, 4))},
        ValueError,
        "parameters.gate_weight must be [steps, D, H] with D = 4, steps = 2, H = 7, got [2, 7, 4]",
    ),
    "temperature weight dtype": (
        {"parameters": changed(temperature_weight=torch.randn(2, 2).half())},
        TypeError,
        "parameters.temperature_weight must be torch.float32, got torch.float16",
    ),
    "step": ({"step": 2}, ValueError, "step must be within 0..1, the steps of parameters, got 2"),
    "step no number": ({"step": 0.0}, TypeError, "step must be a whole number, got 0.0"),
    "no state": ({"step": 1}, ValueError, "state must be that of step 0 in step 1, got None"),
    "state": (
        {"step": 1, "state": (1, 2, 3)},
        TypeError,
        "state must be a CorrespondenceState, got tuple",
    ),
    "state of another step": (
        {"step": 1, "state": state(steps=2)},
        ValueError,
        "state.hidden must be [steps, I, N, H] with steps = 1, I = 2, N = 6, H = 7, got [2, 2, 6, 7]",
    ),
    "state of other words": (
        {"step": 1, "state": state(temperatures=5)},
        ValueError,
        "state.temperature must be [I, N] with I = 2, N = 6, got [2, 5]",
    ),
    "temperature beside a state": (
        {"step": 1, "state": state(), "temperature": 3.0},
        ValueError,
        "temperature is that of the first step alone and state brings its own, got 3.0",
    ),
    "temperature": (
        {"temperature": float("inf")},
        ValueError,
        "temperature must be a finite number of at least 0, got inf",
    ),
    "workspace": ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes must be a whole number, got 1.5"),
    "backend": (
        {"backend": "fast"},
        ValueError,
        "backend must be one of reference, eager, native, triton, got 'fast'",
    ),
}


@pytest.mark.parametrize("change", REFUSALS, ids=str)
def test_refusals(change: str) -> None:
    arguments, error, message = REFUSALS[change]
    refused(correspondence_regulator, error, message, {**inputs(), **arguments})


@pytest.mark.parametrize("step", [0, 1])
def test_the_call_that_refusals_change_works(step: int) -> None:
    made = correspondence_regulator(**inputs(step))
    assert [list(tensor.shape) for tensor in made] == [[2, 3, 6], [2, 6], [step + 1, 2, 6, 7]]
