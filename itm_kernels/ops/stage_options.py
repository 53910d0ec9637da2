"""Options of the stages of RCAR and SGRAF as ops of their own: their checks, one frozen record a stage."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from itm_kernels.ops.options import QUERY_DIRECTIONS, check_dropout

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AlignmentOptions:
    """Options of ``alignment_vectors``, checked. ``temperature`` counts where no tensor of temperatures is given."""

    direction: str
    temperature: float

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    def as_arguments(self) -> tuple[str, float]:
        """In the order of the op's schema."""
        return astuple(self)


@dataclass(frozen=True)
class CorrespondenceOptions:
    """Options of ``correspondence_regulator``, checked. ``temperature`` counts where no state brings temperatures."""

    direction: str
    step: int
    temperature: float

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    def as_arguments(self) -> tuple[str, int, float]:
        """In the order of the op's schema."""
        return astuple(self)


@dataclass(frozen=True)
class AggregationOptions:
    """Options of ``aggregation_regulator``, checked."""

    direction: str
    step: int
    dropout: float
    seed: int
    image_offset: int
    caption_offset: int

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    def as_arguments(self) -> tuple[str, int, float, int, int, int]:
        """In the order of the op's schema."""
        return astuple(self)


@dataclass(frozen=True)
class FiltrationOptions:
    """Options of ``attention_filtration``, checked."""

    training: bool
    eps: float

    def as_arguments(self) -> tuple[bool, float]:
        """In the order of the op's schema."""
        return astuple(self)


def product_dtype(alignments: torch.dtype, matrices: torch.dtype) -> torch.dtype:
    """Of the products of a stage that sees no regions: that of the alignments, or of narrower matrices.

    Alignments leave their op in float32 beside half precision, so that a model in half precision chains as it is.
    """
    return matrices if alignments == torch.float32 and matrices in HALVES else alignments


def check_direction(op: str, direction: str) -> None:
    """Raise ``ValueError`` on a direction that is not known."""
    if direction not in QUERY_DIRECTIONS:
        raise ValueError(f"{op}: direction must be one of {', '.join(QUERY_DIRECTIONS)}, got {direction!r}")


def check_temperature(op: str, temperature: float) -> None:
    """Raise ``ValueError`` unless it is finite and at least 0."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{op}: temperature must be a finite number of at least 0, got {temperature}")


def check_step(op: str, step: int, steps: int) -> None:
    """Raise ``ValueError`` unless parameters of that step are there."""
    if not 0 <= step < steps:
        raise ValueError(f"{op}: step must be within 0..{steps - 1}, the steps of parameters, got {step}")


def check_aggregation_options(op: str, options: AggregationOptions, steps: int) -> None:
    """Raise ``ValueError`` on a name that is not known or a number that is not usable."""
    check_direction(op, options.direction)
    check_step(op, options.step, steps)
    check_dropout(op, options.dropout, options.seed)
    for name, offset in (("image_offset", options.image_offset), ("caption_offset", options.caption_offset)):
        if not 0 <= offset < 2**31:
            raise ValueError(f"{op}: {name} must be within 0..2^31 - 1, got {offset}")


def check_filtration_options(op: str, options: FiltrationOptions) -> None:
    """Raise ``ValueError`` on a number that is not usable."""
    if not (math.isfinite(options.eps) and options.eps > 0):
        raise ValueError(f"{op}: eps of batch_norm must be positive, got {options.eps}")
