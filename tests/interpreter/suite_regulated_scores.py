"""``regulated_scores`` in Triton's interpreter, against the definition; run by ``test_interpreter.py``.

Small sizes: the interpreter runs one program after another. Groups, segments, rows and slices of the width all end in
the middle of a tile somewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import model_checks as checks
from helpers import Place, score_error
from itm_kernels.ops.dropout import dropout_scale
from itm_kernels.pair_blocks import rows
from itm_kernels.pair_blocks.aggregation import masks_at
from itm_kernels.triton.directions import Masks
from models import (
    DROPPED,
    REGULATED,
    Case,
    assert_half_ladder,
    assert_model_ladder,
    model_batch,
    run_model,
)

OP = "regulated_scores"
TRITON = Place("triton")
FEW = [
    Case(OP, {"direction": "t2i", "regulator": "rcar", "steps": 2, "dropout": 0.4, "seed": 11}),
    Case(OP, {"direction": "i2t", "regulator": "rcr", "steps": 1}),
]
SMALL: dict[str, Any] = {"images": 2, "captions": 3, "regions": 5, "words": 4, "width": 20, "similarity": 6}
few = pytest.mark.parametrize("case", FEW, ids=str)


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    """Nothing here may be skipped: a floor that cannot run is a failure."""
    assert TRITON.why_not(OP, torch.float32) is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [*REGULATED, *DROPPED], ids=str)
def test_every_option(case: Case) -> None:
    number = [*REGULATED, *DROPPED].index(case)
    checks.check_ladder(TRITON, case, 3, packed=number % 2 == 1, region_counts=number % 3 > 0, shortest=2, **SMALL)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (FEW[0], {"regions": 1}),
        (FEW[1], {"words": 1, "regions": 7}),
        (FEW[0], {"images": 1, "captions": 1, "regions": 36, "words": 17, "similarity": 70}),
        (FEW[1], {"images": 1, "captions": 2, "regions": 70, "words": 35, "width": 265}),
        (FEW[0], {"images": 1, "captions": 1, "regions": 130, "words": 3}),
    ],
    ids=str,
)
def test_sizes(case: Case, sizes: dict[str, Any]) -> None:
    """More keys than a walk holds, more queries than a tile, channels and columns beyond a slice."""
    checks.check_ladder(TRITON, case, 5, **{**SMALL, **sizes})


@few
def test_blocks(case: Case) -> None:
    """One pair at a time, a few, all at once: the same results."""
    made = checks.prepared(case, 7, packed=case is FEW[1], region_counts=True, shortest=2, **SMALL)
    true, peer = checks.references(made, "eager")
    for workspace_bytes in (1, 40_000):
        assert_model_ladder(run_model(made.batch, "triton", workspace_bytes=workspace_bytes), peer, true, case)


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_two_runs_give_the_same_bits(case: Case) -> None:
    made = model_batch(case, 8, region_counts=True, **SMALL)
    for mine, its in zip(run_model(made, "triton"), run_model(made, "triton"), strict=True):
        assert torch.equal(mine, its)
        assert mine.isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    made = checks.prepared(case, 9, region_counts=True, shortest=2, **SMALL)
    true, peer = checks.references(made, "eager")
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_model_ladder(run_model(made.batch, "triton"), peer, true, case)


@few
def test_float16(case: Case) -> None:
    runs = []
    for seed in (6, 7):
        sizes = {**SMALL, "images": 4, "captions": 3, "width": 32, "similarity": 16}
        made = checks.prepared(case, seed, dtype=torch.float16, shortest=3, **sizes)
        true, peer = checks.references(made, "eager")
        runs.append((run_model(made.batch, "triton"), peer, true))
    assert_half_ladder(runs, case)


def test_parameters_beside_half_precision_may_be_float32() -> None:
    half = model_batch(FEW[0], 16, **SMALL).to(torch.float16)
    mixed = dataclasses.replace(half, parameters=half.parameters.of([p.float() for p in half.parameters.flat()]))
    got, its = run_model(mixed, "triton"), run_model(half, "triton")
    assert torch.equal(got.scores, its.scores)
    assert got.gradients["alignment_weight"].dtype == torch.float32
    assert its.gradients["alignment_weight"].dtype == torch.float16


def test_masks_are_those_of_the_definition() -> None:
    """Bit for bit, far into the batch and with a seed of 63 bits."""
    from itm_kernels.triton.kernels import pooling

    pairs, segments, width, seed = 6, 2, 70, 2**62 + 2**31 + 5
    first = (2**31 - 3, 12345)
    value = torch.ones(width)
    for groups_are_images in (True, False):
        pooled, asked = torch.full((pairs, width), 20.0), torch.empty(pairs, width)  # tanh(20) is 1
        masks = masks_at(first, seed, 0.4, t2i=groups_are_images)._replace(step=3)
        pooling.ask_pairs[(2,)](
            pooled, torch.zeros(width), value, asked, Masks(*masks[: len(Masks._fields)]), pairs, segments, width,
            DROPS=True, GROUPS_ARE_IMAGES=groups_are_images, BLOCK_N=16, BLOCK_S=64,
        )  # fmt: skip
        group, segment = torch.arange(pairs) // segments + first[0], torch.arange(pairs) % segments + first[1]
        images, captions = (group, segment) if groups_are_images else (segment, group)
        true = dropout_scale(
            images, captions, torch.zeros(1, dtype=torch.int64), width, step=3, branch=1, dropout=0.4, seed=seed,
            dtype=torch.float64,
        )  # fmt: skip
        assert torch.equal(asked > 0, true > 0)
        torch.testing.assert_close(asked.double(), true, rtol=1e-6, atol=0)


def test_masks_follow_global_numbers() -> None:
    """Half of the images, numbered from where they stood, have the scores of the whole batch."""
    made = model_batch(FEW[0], 12, **{**SMALL, "images": 3})
    whole = run_model(made, "triton").scores
    part = dataclasses.replace(
        made,
        batch=dataclasses.replace(
            made.batch,
            regions=made.batch.regions[1:],
            words=made.batch.words[2:],
            word_counts=made.batch.word_counts[2:],
            grad_scores=made.batch.grad_scores[1:, 2:],
        ),
    )
    got = run_model(part, "triton", image_offset=1, caption_offset=2).scores
    assert (got - whole[1:, 2:]).abs().max() <= 2e-6
    assert (run_model(part, "triton").scores - got).abs().max() > 1e-4


def test_zero_vectors() -> None:
    """Regions and words of zeros: finite scores and gradients, those of the definition."""
    for case in FEW:
        made = checks.prepared(case, 17, shortest=3, **SMALL)
        made.batch.batch.regions[0] = 0
        made.batch.batch.words[1, :2] = 0
        true, got = checks.model_truth(made.batch), run_model(made.batch, "triton")
        assert score_error(got.scores, true.scores) <= 1e-5
        assert all(tensor.isfinite().all() for tensor in got)


def test_opcheck() -> None:
    made = model_batch(FEW[0], 41, **SMALL)
    given = checks.arguments(made, "triton", requires_grad=False)
    torch.library.opcheck(torch.ops.itm_kernels.regulated_scores.default, given)
    torch.library.opcheck(
        torch.ops.itm_kernels.regulated_scores_backward.default, (made.batch.grad_scores.float(), *given)
    )
