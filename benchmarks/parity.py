"""Nothing is timed that computes something else: outputs are held against the definition first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors in L2."""

    scores: float
    gradients: float

    def __add__(self, more: Tolerance) -> Tolerance:
        return Tolerance(self.scores + more.scores, self.gradients + more.gradients)


TOLERANCE = {
    torch.float32: Tolerance(1e-6, 1e-5),
    torch.float16: Tolerance(1e-4, 5e-3),
    torch.bfloat16: Tolerance(1e-3, 3e-2),
}
"""Ten to thirty times what is seen at D = 1024: this catches a method that skips work or loses digits. The test suite
holds every floor to less."""


class ParityError(AssertionError):
    """A method that does not compute what the definition says."""


@dataclass(frozen=True)
class Part:
    """What a part of one output must be."""

    name: str
    output: int  # which of the outputs: 0 the scores, then gradients
    index: Any  # what of it
    expected: Tensor  # float64


def assert_parity(method: str, outputs: Sequence[Tensor], truth: Sequence[Part], tolerance: Tolerance) -> float:
    """Compare outputs with the truth, as far as there are outputs; return the largest relative error.

    Raises
    ------
    ParityError
        An error above its tolerance, or one that is not a number; the message names method, output and error.
    """
    worst = 0.0
    for part in truth:
        if part.output >= len(outputs):
            continue
        found = outputs[part.output][part.index].to(torch.float64)
        if found.shape != part.expected.shape:
            raise ParityError(
                f"{method}: {part.name} are {list(found.shape)}, the definition has {list(part.expected.shape)}"
            )
        error = float((found - part.expected).norm() / part.expected.norm())
        allowed = tolerance.scores if part.output == 0 else tolerance.gradients
        if not error <= allowed:
            raise ParityError(f"{method}: {part.name} are off by {error:.2e} (relative L2), allowed is {allowed:.0e}")
        worst = max(worst, error)
    return worst
