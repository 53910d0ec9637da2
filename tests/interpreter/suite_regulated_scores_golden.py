"""The published RCAR's vectors through ``regulated_scores`` in Triton's interpreter; run by ``test_interpreter.py``."""

from __future__ import annotations

import pytest

from golden_models import REGULATED_CASES
from golden_runs import check_golden
from helpers import Place


@pytest.mark.parametrize("case", REGULATED_CASES)
def test_golden_vectors(case: str) -> None:
    check_golden(Place("triton"), case)
