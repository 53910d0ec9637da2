"""One method of one op on one batch: what can be called, timed and weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
PHASES = (FORWARD, BOTH)
HALF = (torch.bfloat16, torch.float16)

PRODUCT = "product"
"""The method that every op has: its algorithmic FLOPs as bare library products, the yardstick of rho and eta."""


@dataclass(frozen=True)
class Contender:
    """A method ready to run.

    Attributes
    ----------
    calls
        By phase: runs it and returns what it made (scores; then the gradients).
    graph
        The forward recorded for autograd, for counting what it keeps; None where there is no autograd.
    owned_bytes
        By phase: bytes of scores, gradients and float32 accumulators of half-precision gradients that a call makes
        anew. They are the op's results and no part of its extra memory.
    needed_bytes
        By phase: roughly what a call takes from the device's memory, where that may be more than there is.
    preparation_s
        Roughly how long the first calls take beyond their work: a compiler's time.
    """

    method: str
    backend: str
    dtype: torch.dtype
    device: torch.device
    calls: dict[str, Callable[[], Sequence[Tensor]]]
    graph: Callable[[], Tensor] | None
    owned_bytes: dict[str, int]
    needed_bytes: dict[str, int]
    preparation_s: float = 0.0


def differentiable(
    method: str,
    backend: str,
    scores_of: Callable[..., Tensor],
    leaves: Sequence[Tensor],  # require grad
    grad_scores: Tensor,
    extra_bytes: dict[str, int],  # by phase, roughly, beyond scores and gradients
    preparation_s: float = 0.0,
) -> Contender:
    """A contender from a function of its inputs that autograd differentiates."""

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (scores_of(*leaves),)

    def forward_backward() -> Sequence[Tensor]:
        scores = scores_of(*leaves)
        return (scores.detach(), *torch.autograd.grad(scores, leaves, grad_scores))

    dtype = leaves[0].dtype
    scores_bytes = grad_scores.numel() * grad_scores.element_size()
    per_element = dtype.itemsize + (4 if dtype in HALF else 0)
    grad_bytes = sum(leaf.numel() for leaf in leaves) * per_element
    owned = {FORWARD: scores_bytes, BOTH: scores_bytes + grad_bytes}
    return Contender(
        method,
        backend,
        dtype,
        grad_scores.device,
        {FORWARD: forward, BOTH: forward_backward},
        lambda: scores_of(*leaves),
        owned,
        {phase: owned[phase] + extra_bytes.get(phase, 0) for phase in PHASES},
        preparation_s,
    )
