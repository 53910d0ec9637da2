"""One module per op, by the op's name.

A module has ``DIRECTIONS``, ``METHODS`` and ``workload(case, direction, dtype, device) -> Workload``; with ``LARGEST``,
images or captions of the largest batch by kind of device, where an output stands for every query of every pair. An op
joins by a module of its own and its name in ``OPS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch

from benchmarks.cases import Case
from benchmarks.contender import Contender
from benchmarks.parity import Part, Tolerance

OPS = (
    "cross_attention_scores",
    "max_similarity_scores",
    "regulated_scores",
    "similarity_reasoning_scores",
    "alignment_vectors",
    "correspondence_regulator",
    "aggregation_regulator",
    "attention_filtration",
    "similarity_graph",
)


class Workload(Protocol):
    """An op on one batch, in one direction and dtype."""

    case: Case
    direction: str
    dtype: torch.dtype
    device: torch.device
    num_words: int  # N
    tolerance: Tolerance

    def flops(self, phase: str) -> int:
        """The least that the op needs, padding not counted; a multiply-add is 2."""

    def contender(self, method: str) -> Contender | str:
        """A method ready to run, or the reason why it cannot."""

    def truth(self) -> Sequence[Part]:
        """Scores and gradients by the definition in float64, of as much of the batch as is affordable."""


class OpModule(Protocol):
    DIRECTIONS: tuple[str, ...]
    METHODS: tuple[str, ...]
    workload: Callable[[Case, str, torch.dtype, torch.device], Workload]


def load(op: str) -> OpModule:
    return cast(OpModule, importlib.import_module(f"{__name__}.{op}"))


def fits(op: str, case: Case, device: torch.device) -> bool:
    """Whether a batch is small enough for an op whose output is as large as an intermediate of the others."""
    largest: dict[str, int] | None = getattr(load(op), "LARGEST", None)
    return largest is None or max(case.images, case.captions) <= largest[device.type]
