"""Options of the score ops: their names, their checks, one frozen record."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from numbers import Real

DIRECTIONS = ("t2i", "i2t", "both")
# The order of the next three is that of the enumerations in csrc/common/options.h.
RAW_FEATURE_NORMS = ("softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm", "clipped", "no_norm")
AGG_FUNCS = ("LogSumExp", "Max", "Sum", "Mean")
FOCALS = ("none", "equal", "prob")
# Of hard assignment. In C++ they are one enumeration with those above, "Softmax" the last.
SIMILARITY_DIRECTIONS = ("t2i", "i2t")
SIMILARITY_AGG_FUNCS = (*AGG_FUNCS, "Softmax")


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
