"""Options of the score ops: their names, their checks, one frozen record."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from numbers import Real

WORKSPACE_BYTES = 256 * 2**20
"""Bound on the memory of one call, unless the call says otherwise."""

DIRECTIONS = ("t2i", "i2t", "both")
# The order of the next three is that of the enumerations in csrc/common/options.h.
RAW_FEATURE_NORMS = ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm")
AGG_FUNCS = ("LogSumExp", "Max", "Sum", "Mean")
FOCALS = ("none", "equal", "prob")
# Of hard assignment. In C++ they are one enumeration with those above, "Softmax" the last.
SIMILARITY_DIRECTIONS = ("t2i", "i2t")
SIMILARITY_AGG_FUNCS = (*AGG_FUNCS, "Softmax")
# Of the ops that learn: RCAR's and SGRAF's.
QUERY_DIRECTIONS = ("t2i", "i2t")
REGULATORS = ("rar", "rcr", "rcar")
REASONINGS = ("SAF", "SGR")


@dataclass(frozen=True)
class ScoreOptions:
    """Options of ``cross_attention_scores``, checked; ``focal`` is ``"none"`` where the public argument is None."""

    direction: str
    raw_feature_norm: str
    lambda_softmax: float
    agg_func: str
    lambda_lse: float
    focal: str
    peak_weight: float

    @property
    def t2i(self) -> bool:
        return self.direction in ("t2i", "both")

    @property
    def i2t(self) -> bool:
        return self.direction in ("i2t", "both")

    def as_arguments(self) -> tuple[str, str, float, str, float, str, float]:
        """In the order of the op's schema."""
        return astuple(self)

    def codes(self) -> tuple[int, int, int, float, float, float]:
        """As the native kernels take them: feature norm, focal, aggregation, lambdas, peak weight."""
        return (
            RAW_FEATURE_NORMS.index(self.raw_feature_norm),
            FOCALS.index(self.focal),
            AGG_FUNCS.index(self.agg_func),
            self.lambda_softmax,
            self.lambda_lse,
            self.peak_weight,
        )


def number(op: str, name: str, value: object) -> float:
    """``value`` as a float, or ``TypeError``: text that looks like a number is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return float(value)


def check_options(op: str, options: ScoreOptions) -> None:
    """Raise ``ValueError`` on a name that is not known or a number that is not usable."""
    for name, value, allowed in (
        ("direction", options.direction, DIRECTIONS),
        ("raw_feature_norm", options.raw_feature_norm, RAW_FEATURE_NORMS),
        ("agg_func", options.agg_func, AGG_FUNCS),
    ):
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if options.focal not in FOCALS:
        raise ValueError(f"{op}: focal must be None, 'equal' or 'prob', got {options.focal!r}")
    for name, number in (
        ("lambda_softmax", options.lambda_softmax),
        ("lambda_lse", options.lambda_lse),
        ("peak_weight", options.peak_weight),
    ):
        if not math.isfinite(number):
            raise ValueError(f"{op}: {name} must be a finite number, got {number}")
    if options.lambda_lse <= 0:
        raise ValueError(f"{op}: lambda_lse must be positive, got {options.lambda_lse}")
    if options.peak_weight and options.direction != "t2i":
        raise ValueError(
            f"{op}: peak_weight is PFAN's, defined for direction 't2i' alone; got {options.peak_weight} with "
            f"{options.direction!r}"
        )


@dataclass(frozen=True)
class SimilarityOptions:
    """Options of ``max_similarity_scores``, checked."""

    direction: str
    agg_func: str
    lambda_lse: float

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    @property
    def i2t(self) -> bool:
        return self.direction == "i2t"

    @property
    def linear(self) -> bool:
        """Whether the gradient of the aggregation is the same whatever it aggregates."""
        return self.agg_func in ("Sum", "Mean")

    def as_arguments(self) -> tuple[str, str, float]:
        """In the order of the op's schema."""
        return astuple(self)

    def codes(self) -> tuple[int, float]:
        """As the native kernels take them: aggregation and its lambda."""
        return SIMILARITY_AGG_FUNCS.index(self.agg_func), self.lambda_lse


def check_similarity_options(op: str, options: SimilarityOptions) -> None:
    """Raise ``ValueError`` on a name that is not known or a number that is not usable."""
    for name, value, allowed in (
        ("direction", options.direction, SIMILARITY_DIRECTIONS),
        ("agg_func", options.agg_func, SIMILARITY_AGG_FUNCS),
    ):
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if not math.isfinite(options.lambda_lse):
        raise ValueError(f"{op}: lambda_lse must be a finite number, got {options.lambda_lse}")
    if options.lambda_lse <= 0:
        raise ValueError(f"{op}: lambda_lse must be positive, got {options.lambda_lse}")


def check_workspace_bytes(op: str, value: object) -> None:
    """Raise unless ``value`` is a whole number of bytes, at least one."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: workspace_bytes must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{op}: workspace_bytes must be positive, got {value}")


@dataclass(frozen=True)
class RegulatedOptions:
    """Options of ``regulated_scores``, checked."""

    direction: str
    regulator: str
    steps: int
    temperature: float
    dropout: float
    seed: int
    image_offset: int
    caption_offset: int

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    @property
    def alignments(self) -> int:
        """How many alignment stages run."""
        return 1 if self.regulator == "rar" else self.steps

    @property
    def corrections(self) -> int:
        """How many RCR stages run."""
        return {"rar": 0, "rcr": self.steps, "rcar": self.steps - 1}[self.regulator]

    @property
    def aggregations(self) -> int:
        """How many RAR stages run."""
        return 0 if self.regulator == "rcr" else self.steps

    def as_arguments(self) -> tuple[str, str, int, float, float, int, int]:
        """In the order of the op's schema, where the seed is a tensor and stands before them."""
        first = self.direction, self.regulator, self.steps, self.temperature, self.dropout
        return (*first, self.image_offset, self.caption_offset)


def check_regulated_options(op: str, options: RegulatedOptions) -> None:
    """Raise ``ValueError`` on a name that is not known or a number that is not usable."""
    for name, value, allowed in (
        ("direction", options.direction, QUERY_DIRECTIONS),
        ("regulator", options.regulator, REGULATORS),
    ):
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    least = 1 if options.regulator == "rcar" else 0
    if options.steps < least:
        raise ValueError(
            f"{op}: steps must be at least {least} with regulator {options.regulator!r}, got {options.steps}"
        )
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise ValueError(f"{op}: temperature must be a finite number of at least 0, got {options.temperature}")
    check_dropout(op, options.dropout, options.seed)
    if options.dropout and options.regulator == "rcr":
        raise ValueError(f"{op}: dropout is RAR's, regulator 'rcr' has none; got {options.dropout}")
    for name, offset in (("image_offset", options.image_offset), ("caption_offset", options.caption_offset)):
        if not 0 <= offset < 2**31:
            raise ValueError(f"{op}: {name} must be within 0..2^31 - 1, got {offset}")


def check_dropout(op: str, dropout: float, seed: int) -> None:
    """Raise unless ``dropout`` is a probability below 1 and ``seed`` fits 63 bits."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be within [0, 1), got {dropout}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed must be within 0..2^63 - 1, got {seed}")


@dataclass(frozen=True)
class ReasoningOptions:
    """Options of ``similarity_reasoning_scores``, checked. ``temperature`` is the published 9."""

    reasoning: str
    steps: int
    training: bool
    eps: float
    temperature: float = 9.0

    @property
    def batch_statistics(self) -> bool:
        """Whether the statistics of the batch normalise."""
        return self.reasoning == "SAF" and self.training

    def as_arguments(self) -> tuple[str, int, bool, float]:
        """In the order of the op's schema."""
        return self.reasoning, self.steps, self.training, self.eps


def check_reasoning_options(op: str, options: ReasoningOptions) -> None:
    """Raise ``ValueError`` on a number that is not usable."""
    if options.steps < 0:
        raise ValueError(f"{op}: steps must be at least 0, got {options.steps}")
    if not (math.isfinite(options.eps) and options.eps > 0):
        raise ValueError(f"{op}: eps of batch_norm must be positive, got {options.eps}")


def whole(op: str, name: str, value: object) -> int:
    """``value`` as an int, or ``TypeError``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")
    return value
