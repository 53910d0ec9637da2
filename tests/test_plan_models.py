"""plan() of the scorers that learn: what it says is what runs, on the CPU and block by block on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from itm_kernels import native, plan
from itm_kernels.native.cuda.machine import machine_of_arch
from itm_kernels.planners import PlannedBatch, learned, regulated_scores, similarity_reasoning_scores
from itm_kernels.planners.rehearsal import Counted, rehearse
from memory import peak_bytes

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason="no native library")

PLANNERS = {"regulated_scores": regulated_scores, "similarity_reasoning_scores": similarity_reasoning_scores}
CASES = [
    ("regulated_scores", {}),
    ("regulated_scores", {"direction": "i2t", "steps": 3}),
    ("regulated_scores", {"regulator": "rcr"}),
    ("regulated_scores", {"direction": "i2t", "regulator": "rar", "dropout": 0.4}),
    ("similarity_reasoning_scores", {"training": True}),
    ("similarity_reasoning_scores", {}),
    ("similarity_reasoning_scores", {"reasoning": "SGR"}),
    ("similarity_reasoning_scores", {"reasoning": "SGR", "steps": 0}),
]
SIZES: dict[str, Any] = {"I": 6, "C": 7, "R": 5, "word_counts": [9, 3, 7, 5, 8, 2, 6], "D": 96, "S": 16}
cases = pytest.mark.parametrize(("op", "options"), CASES, ids=[f"{op}-{given}" for op, given in CASES])


def whole_call(op: str, options: dict[str, Any], phase: str, device: str, workspace_bytes: int) -> Counted:
    """What a call does, from its first block to its last."""
    planner = PLANNERS[op]
    rest = dict(options)
    chosen = planner.options_of(rest.pop("direction", "t2i"), rest)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    counts = torch.tensor(SIZES["word_counts"])
    batch = PlannedBatch(SIZES["I"], SIZES["R"], counts, SIZES["D"], chosen, dtype, workspace_bytes, SIZES["S"])
    shapes = learned.shapes_of(batch, device)
    machine = None if device == "cpu" else machine_of_arch("sm_90a")
    scorer = planner.scorer_of(batch, machine)
    results = shapes.results() | scorer.results(shapes)
    return rehearse(scorer.call(phase, shapes, workspace_bytes), device, but_for=results)


@cases
@pytest.mark.parametrize("workspace_bytes", [1, 60_000, 400_000, 1 << 28])
def test_on_the_cpu_it_is_what_runs(op: str, options: dict[str, Any], workspace_bytes: int) -> None:
    counts = []
    for phase in ("forward", "backward"):
        made = plan(op, **SIZES, **options, phase=phase, workspace_bytes=workspace_bytes)
        ran = whole_call(op, options, phase, "cpu", workspace_bytes)
        assert made.launches == ran.steps, phase
        if options.get("direction") != "i2t":  # there the keys of a chunk are padded
            assert made.flops == ran.flops, phase
        assert made.flops <= ran.flops <= made.flops / made.useful_fraction + 1, phase
        counts.append(made.blocks[phase].count)
    assert (max(counts) > 1) == (workspace_bytes < 1 << 28)


@cases
@pytest.mark.parametrize("workspace_bytes", [1, 200_000, 1 << 28])
def test_on_a_gpu_it_is_what_runs(op: str, options: dict[str, Any], workspace_bytes: int) -> None:
    gpu = {"device": "cuda", "arch": "sm_90a", "dtype": torch.bfloat16}
    for phase in ("forward", "backward"):
        made = plan(op, **SIZES, **options, phase=phase, workspace_bytes=workspace_bytes, **gpu)
        ran = whole_call(op, options, phase, "meta", workspace_bytes)
        assert made.launches == ran.launches, phase
        if options.get("direction") != "i2t":
            assert made.flops == ran.flops, phase
        assert made.workspace_bytes >= ran.peak_bytes, phase
        assert (made.blocks[phase].count > 1) == (workspace_bytes < 1 << 28), phase


@pytest.mark.parametrize(("op", "options"), [CASES[0], CASES[4], CASES[6]])
def test_workspace_covers_what_is_held(op: str, options: dict[str, Any]) -> None:
    """What torch's allocator hands out on the CPU, results and their like aside."""
    bound = 8 << 20
    sizes = {**SIZES, "D": 256, "S": 64, "I": 24, "C": 24, "R": 20, "word_counts": [12] * 24}
    planner = PLANNERS[op]
    chosen = planner.options_of("t2i", dict(options))
    batch = PlannedBatch(24, 20, torch.tensor([12] * 24), 256, chosen, torch.float32, bound, 64)
    shapes = learned.shapes_of(batch, "cpu")
    inputs = 4 * 256 * (24 * 20 + 24 * 12)
    for phase in ("forward", "backward"):
        made = plan(op, **sizes, **options, phase=phase, workspace_bytes=bound)
        peak = peak_bytes(planner.scorer_of(batch, None).call(phase, shapes, bound))
        assert made.workspace_bytes <= bound
        # Beside it gradients of both sides.
        assert peak <= made.workspace_bytes + inputs, phase


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nodes_that_are_kept_are_counted(dtype: torch.dtype) -> None:
    """Those of all images, while SAF in training has a block of captions."""
    chosen = similarity_reasoning_scores.options_of("t2i", {"training": True})
    counts = [9, 3, 7, 5, 8, 2] * 10
    batch = PlannedBatch(400, 5, torch.tensor(counts), 256, chosen, dtype, 12 << 20, 32)
    shapes = learned.shapes_of(batch, "meta")
    scorer = similarity_reasoning_scores.scorer_of(batch, machine_of_arch("sm_90a"))
    native.host()
    for phase in ("forward", "backward"):
        assert scorer.keeps_on_gpu(phase, shapes, 12 << 20)
        made = plan(
            "similarity_reasoning_scores", 400, 60, 5, counts, 256, S=32, training=True, phase=phase, dtype=dtype,
            workspace_bytes=12 << 20, device="cuda", arch="sm_90a",
        )  # fmt: skip
        results = shapes.results() | scorer.results(shapes)
        ran = rehearse(scorer.call(phase, shapes, 12 << 20), "meta", but_for=results)
        assert len(made.blocks[phase].images) > 3  # more than a rehearsal sees
        assert ran.peak_bytes <= made.workspace_bytes <= 12 << 20, phase
        assert made.workspace_bytes <= 1.3 * ran.peak_bytes, phase


@pytest.mark.parametrize(
    ("op", "more", "error", "words"),
    [
        ("regulated_scores", {"S": None}, ValueError, "S, which must be at least 1, got None"),
        ("regulated_scores", {"S": 0}, ValueError, "at least 1, got 0"),
        ("regulated_scores", {"regulator": "rcx"}, ValueError, "regulator must be one of"),
        ("regulated_scores", {"direction": "both"}, ValueError, "direction must be one of"),
        ("regulated_scores", {"focal": None}, TypeError, "no option focal"),
        ("similarity_reasoning_scores", {"direction": "i2t"}, ValueError, "direction of .* is t2i"),
        ("similarity_reasoning_scores", {"reasoning": "SGRAF"}, ValueError, "SAF, SGR, got 'SGRAF'"),
        ("similarity_reasoning_scores", {"steps": 3}, ValueError, "steps are SGR's"),
    ],
)
def test_refusals(op: str, more: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan(op, **{**SIZES, **more})


def test_an_empty_batch_has_a_plan() -> None:
    for op in PLANNERS:
        for device in ({}, {"device": "cuda", "arch": "sm_90a"}):
            made = plan(op, 0, 7, 5, SIZES["word_counts"], 32, S=8, **device)
            assert (made.launches, made.flops, made.workspace_bytes) == (0, 0, 0)
            assert plan(op, 3, 0, 5, [], 32, S=8, **device).blocks["forward"].count == 0
