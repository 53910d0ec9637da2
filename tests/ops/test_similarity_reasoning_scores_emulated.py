"""``similarity_reasoning_scores`` on its CUDA kernels, emulated: what the suite of the op does not ask of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
import model_checks as checks
from helpers import Place
from itm_kernels.native import devices
from itm_kernels.native.devices import Kernels
from itm_kernels.pair_blocks import rows
from models import Case, assert_model_ladder, model_batch, run_model

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

OP = "similarity_reasoning_scores"
EMULATED = Place("native", emulated=True)
CASES = [
    Case(OP, {"reasoning": "SAF", "training": False}),
    Case(OP, {"reasoning": "SAF", "training": True}),
    Case(OP, {"reasoning": "SGR", "steps": 2}),
]
SMALL: dict[str, Any] = {"images": 3, "captions": 4, "regions": 5, "words": 6, "width": 20, "similarity": 8}
# Those that stay well conditioned with a few numbers a caption: statistics of a batch do not.
FEW = [CASES[0], CASES[2]]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the op is given."""
    made = Kernels(emulated.library(), emulated.GPU)
    monkeypatch.setattr(devices, "kernels_for", lambda device: made)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 264, "similarity": 264},  # more than a warp takes at once, in whole words
        {"width": 261, "similarity": 259},  # and one by one
        {"width": 1, "similarity": 1},
        {"words": 70, "images": 2, "captions": 2},  # several tiles of nodes
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: Case, sizes: dict[str, Any]) -> None:
    checks.check_ladder(EMULATED, case, 5, region_counts=True, shortest=2, **{**SMALL, **sizes})


@given(st.data())
@settings(max_examples=20)
def test_any_sizes(data: st.DataObject) -> None:
    draw = data.draw
    case = draw(st.sampled_from(FEW))
    sizes = {
        "images": draw(st.integers(3, 6)), "captions": draw(st.integers(3, 8)),
        "regions": draw(st.sampled_from([5, 7, 36])), "words": draw(st.sampled_from([4, 9, 20])),
        "width": draw(st.sampled_from([15, 16, 24, 33])), "similarity": draw(st.sampled_from([7, 8, 12])),
        "region_counts": draw(st.booleans()), "packed": draw(st.booleans()), "shortest": 3,
    }  # fmt: skip
    made = checks.prepared(case, draw(st.integers(0, 1 << 16)), **sizes)
    true, peer = checks.references(made, "eager")
    workspace_bytes = draw(st.sampled_from([1, 50_000, 1 << 30]))
    assert_model_ladder(run_model(made.batch, "native", workspace_bytes=workspace_bytes), peer, true, case)


@pytest.mark.usefixtures("poisoned_memory")
@cases
def test_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    made = checks.prepared(case, 9, region_counts=True, shortest=2, **SMALL)
    true, peer = checks.references(made, "eager")
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    for workspace_bytes in (1, 1 << 30):
        assert_model_ladder(run_model(made.batch, "native", workspace_bytes=workspace_bytes), peer, true, case)


@cases
def test_rows_that_begin_anywhere(case: Case) -> None:
    """Not at multiples of 16 bytes."""
    made = checks.prepared(case, 10, shortest=2, **SMALL).batch
    sides = {
        name: torch.cat([side.flatten()[:1], side.flatten()])[1:].view_as(side)
        for name, side in (("regions", made.batch.regions), ("words", made.batch.words))
    }
    same = dataclasses.replace(made, batch=dataclasses.replace(made.batch, **sides))
    true, peer = checks.references(checks.Made(same, str(case), "anywhere"), "eager")
    assert_model_ladder(run_model(same, "native"), peer, true, case)


@cases
def test_whatever_the_default_dtype_is(case: Case) -> None:
    made = model_batch(case, 13, shortest=2, **SMALL).to(torch.float32)
    expected = run_model(made, "native").scores
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(run_model(made, "native").scores, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@cases
def test_a_nan_stays_in_its_caption(case: Case) -> None:
    made = model_batch(case, 1, shortest=3).to(torch.float32)
    made.batch.words[2, 0, 0] = math.nan
    scores = run_model(made, "native").scores
    assert scores[:, 2].isnan().all()
    assert scores[:, [0, 1, 3, 4, 5]].isfinite().all()


@cases
def test_published_widths(case: Case) -> None:
    """Many channels make nodes much alike: gradients of biases are small differences."""
    sizes = {"images": 4, "captions": 4, "regions": 36, "words": 14, "width": 1024, "similarity": 256}
    checks.check_ladder(EMULATED, case, 3, shortest=6, **sizes)
