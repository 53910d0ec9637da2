"""The stages of RCAR and SGRAF in Triton's interpreter, against the definition; run by ``test_interpreter.py``.

Small sizes: the interpreter runs one program after another. What the scorers ask of the same kernels is in their own
suites; here it is what stages have of their own: their places in the tensors of a batch, what they start from, options.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import Place
from itm_kernels.ops import stages
from itm_kernels.pair_blocks import rows
from stage_suite import assert_half_ladder, assert_ladder, check, padded_out, spread_out
from stages import Case, recorded_calls, run_stage, stage_batch, truth_of

TRITON = Place("triton")
DROPPED = {"step": 1, "dropout": 0.4, "seed": 2**40 + 3, "image_offset": 2, "caption_offset": 9}
CASES = [
    *(
        case
        for direction in ("t2i", "i2t")
        for case in (
            Case("alignment_vectors", {"direction": direction}),
            Case("alignment_vectors", {"direction": direction}, ("attention_scores", "temperature")),
            Case("correspondence_regulator", {"direction": direction, "step": 0}),
            Case("correspondence_regulator", {"direction": direction, "step": 2}, ("hidden", "temperature")),
            Case("aggregation_regulator", {"direction": direction, "step": 0}),
            Case("aggregation_regulator", {"direction": direction, **DROPPED}, ("pooled",)),
        )
    ),
    *(Case("attention_filtration", {"training": training}, ("global_alignments",)) for training in (False, True)),
    *(Case("similarity_graph", {"steps": steps}, ("global_alignments",)) for steps in (1, 2)),
]
OPS = sorted({case.op for case in CASES})
SMALL: dict[str, Any] = {"images": 2, "captions": 3, "regions": 5, "words": 4, "width": 20, "shortest": 2}
# Statistics of a batch and a temperature of every query among them.
FEW = [case for case in CASES if case.given or case.op == "attention_filtration"]


def named(case: Case) -> str:
    """Test id."""
    return f"{case.op}-{case}"


cases = pytest.mark.parametrize("case", CASES, ids=named)


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    """Nothing here may be skipped: a floor that cannot run is a failure."""
    for op in OPS:
        assert TRITON.why_not(op, torch.float32) is None


@pytest.mark.usefixtures("poisoned_memory")
@cases
def test_every_stage(case: Case) -> None:
    check(TRITON, stage_batch(case, 3, **SMALL), least=0.05)  # so few nodes: some sums all but cancel


@cases
def test_blocks(case: Case) -> None:
    """One pair at a time gives what all at once give."""
    made = stage_batch(case, 5, **SMALL).to(torch.float32)
    got, whole = run_stage(made, "triton", workspace_bytes=1), run_stage(made, "triton")
    assert_ladder(got, whole, truth_of(made), case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", FEW, ids=named)
def test_counts_that_are_never_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts as if on a device: words keep their padding (NaN here), which is neither used nor given a gradient."""
    packed = stage_batch(case, 7, **SMALL).to(torch.float32)
    true, peer = (spread_out(packed, result) for result in (truth_of(packed), run_stage(packed, "eager")))
    monkeypatch.setattr(stages, "keeps_padding", lambda counts: True)
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_ladder(run_stage(padded_out(packed), "triton"), peer, true, case, least=0.05)


@pytest.mark.parametrize("case", FEW, ids=named)
def test_float16(case: Case) -> None:
    runs = []
    for seed in (6, 7, 8):
        made = stage_batch(case, seed, **{**SMALL, "images": 3, "shortest": 3}).to(torch.float16)
        runs.append((run_stage(made, "triton"), run_stage(made, "eager"), truth_of(made)))
    assert_half_ladder(runs, case)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    case = next(case for case in FEW if case.op == op)
    made = stage_batch(case, 9, **SMALL, region_counts=False).to(torch.float32)
    with recorded_calls(op) as calls:
        run_stage(made, "triton")
    assert len(calls) == 2
    for call, arguments in calls:
        given = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(call, given)
