"""Every floor of ``cross_attention_scores`` meets the golden vectors of the published SCAN, BFAN and PFAN."""

from __future__ import annotations

import pytest
import torch

from golden import CASES, golden_batch, golden_options, golden_result
from helpers import Place, assert_exact, assert_ladder, run

OP = "cross_attention_scores"


def test_the_cases_are_there() -> None:
    families = {case.split("_")[0] for case in CASES}
    assert families == {"scan", "bfan", "pfan"}
    assert len(CASES) == 24


@pytest.mark.parametrize("case", CASES)
def test_float64(place64: Place, case: str) -> None:
    batch = golden_batch().to(place64.device)
    assert_exact(run(batch, place64.floor, **golden_options(case)), golden_result(case))


@pytest.mark.parametrize("case", CASES)
def test_float64_packed(place64: Place, case: str) -> None:
    batch, golden = golden_batch(), golden_result(case)
    rows = ~batch.padding()[1]
    got = run(batch.packed().to(place64.device), place64.floor, **golden_options(case))
    assert_exact(got, type(golden)(golden.scores, golden.grad_regions, golden.grad_words[rows]))


@pytest.mark.parametrize("case", CASES)
def test_float32(place: Place, case: str) -> None:
    options = golden_options(case)
    batch = golden_batch(torch.float32)
    peer = run(batch, "eager", **options)
    assert_ladder(run(batch.to(place.device), place.floor, **options), peer, golden_result(case), options)
