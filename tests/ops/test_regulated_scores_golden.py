"""The published RCAR's vectors through every floor of ``regulated_scores`` that works in blocks."""

from __future__ import annotations

import pytest

from golden_models import REGULATED_CASES
from golden_runs import check_golden
from helpers import Place

OP = "regulated_scores"


@pytest.mark.parametrize("case", REGULATED_CASES)
def test_golden_vectors(fast_place: Place, case: str) -> None:
    check_golden(fast_place, case)
