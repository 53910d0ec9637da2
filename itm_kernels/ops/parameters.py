"""Parameters of the ops that learn: SGRAF's and RCAR's, one record a stage, and the checks of their shapes.

A stage that runs several times with weights of its own each time has them stacked along a first axis of steps. Letters:
``S`` similarity width, ``H`` hidden width of RCR's gate (published: 2 S), ``U`` hidden width of its temperature
(published: S / 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import ReasoningOptions, RegulatedOptions
from itm_kernels.ops.pairs import DTYPES


class AlignmentParameters(NamedTuple):
    """``l2norm(weight (q - c)^2 + bias)``."""

    weight: Tensor  # [steps, S, D]
    bias: Tensor  # [steps, S]


class CorrespondenceParameters(NamedTuple):
    """RCR: two small networks on an alignment vector, one for the gate and one for the temperature of the next step."""

    hidden_weight: Tensor  # [steps, H, S]
    hidden_bias: Tensor  # [steps, H]
    gate_weight: Tensor  # [steps, D, H]
    gate_bias: Tensor  # [steps, D]
    temperature_hidden_weight: Tensor  # [steps, U, S]
    temperature_hidden_bias: Tensor  # [steps, U]
    temperature_weight: Tensor  # [steps, U]
    temperature_bias: Tensor  # [steps]


class AggregationParameters(NamedTuple):
    """RAR: attention over the alignment vectors of a pair, asked by its pooled vector."""

    key_weight: Tensor  # [steps, S, S], of the alignment vectors
    key_bias: Tensor  # [steps, S]
    pooled_weight: Tensor  # [steps, S, S], of the pooled vector
    pooled_bias: Tensor  # [steps, S]
    value_weight: Tensor  # [steps, S]
    value_bias: Tensor  # [steps]


class FiltrationParameters(NamedTuple):
    """SAF: one attention weight a node, through a batch normalisation of one channel.

    ``norm_weight`` and ``norm_bias`` are the affine part of that normalisation. The op takes them from its argument
    ``batch_norm`` and fills them in for the floors; a caller leaves them out.
    """

    weight: Tensor  # [S]
    bias: Tensor  # [1]
    norm_weight: Tensor | None = None  # [1]
    norm_bias: Tensor | None = None  # [1]


class GraphParameters(NamedTuple):
    """SGR: attention among the nodes of a pair."""

    query_weight: Tensor  # [steps, S, S]
    query_bias: Tensor  # [steps, S]
    key_weight: Tensor  # [steps, S, S]
    key_bias: Tensor  # [steps, S]
    node_weight: Tensor  # [steps, S, S]
    node_bias: Tensor  # [steps, S]


class ScoreParameters(NamedTuple):
    """``sigmoid(weight . pooled + bias)``."""

    weight: Tensor  # [S]
    bias: Tensor  # [1]


class RegulatedParameters(NamedTuple):
    """Of ``regulated_scores``; None for what the regulator does not have.

    ``"rar"`` with s steps: 1 alignment, s aggregations, a score. ``"rcr"``: s alignments and s correspondences.
    ``"rcar"``: s alignments, s - 1 correspondences, s aggregations, a score.
    """

    alignment: AlignmentParameters | None
    correspondence: CorrespondenceParameters | None
    aggregation: AggregationParameters | None
    score: ScoreParameters | None

    def flat(self) -> list[Tensor | None]:
        """The tensors in their order, None for those that are not there."""
        return _flat(self, REGULATED_PARTS)

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> RegulatedParameters:
        """The inverse of :meth:`flat`."""
        return RegulatedParameters(*_grouped(tensors, REGULATED_PARTS))


class ReasoningParameters(NamedTuple):
    """Of ``similarity_reasoning_scores``: ``filtration`` for SAF, ``graph`` for SGR, None for the other.

    The two alignments have one step.
    """

    local_alignment: AlignmentParameters
    global_alignment: AlignmentParameters
    filtration: FiltrationParameters | None
    graph: GraphParameters | None
    score: ScoreParameters

    def flat(self) -> list[Tensor | None]:
        """The tensors in their order, None for those that are not there."""
        return _flat(self, REASONING_PARTS)

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> ReasoningParameters:
        """The inverse of :meth:`flat`."""
        return ReasoningParameters(*_grouped(tensors, REASONING_PARTS))


REGULATED_PARTS = (AlignmentParameters, CorrespondenceParameters, AggregationParameters, ScoreParameters)
REASONING_PARTS = (
    AlignmentParameters,
    AlignmentParameters,
    FiltrationParameters,
    GraphParameters,
    ScoreParameters,
)


def field_names(record: type, parts: tuple[type, ...]) -> list[str]:
    """A name for each of the flat tensors: stage and field."""
    stages = record._fields  # type: ignore[attr-defined]
    return [f"{stage}_{field}" for stage, part in zip(stages, parts, strict=True) for field in part._fields]  # type: ignore[attr-defined]


def _flat(parameters: tuple[tuple[Tensor | None, ...] | None, ...], parts: tuple[type, ...]) -> list[Tensor | None]:
    tensors: list[Tensor | None] = []
    for given, part in zip(parameters, parts, strict=True):
        tensors += [None] * len(part._fields) if given is None else list(given)  # type: ignore[attr-defined]
    return tensors


def _grouped(tensors: Sequence[Tensor | None], parts: tuple[type, ...]) -> list[Any]:
    groups: list[Any] = []
    rest = list(tensors)
    for part in parts:
        count = len(part._fields)  # type: ignore[attr-defined]
        mine, rest = rest[:count], rest[count:]
        groups.append(None if mine[0] is None else part(*mine))
    return groups


def check_regulated(op: str, parameters: RegulatedParameters, options: RegulatedOptions, regions: Tensor) -> None:
    """Raise unless the parameters are those that ``options`` need, in shapes that fit ``regions`` and each other."""
    if not isinstance(parameters, RegulatedParameters):
        raise TypeError(f"{op}: parameters must be RegulatedParameters, got {type(parameters).__name__}")
    wanted = {
        "alignment": options.alignments > 0,
        "correspondence": options.corrections > 0,
        "aggregation": options.aggregations > 0,
        "score": options.regulator != "rcr",
    }
    described = f"regulator {options.regulator!r} with {options.steps} steps"
    for name, needed in wanted.items():
        _check_presence(op, name, getattr(parameters, name), needed, described)
    _check_kinds(op, parameters, REGULATED_PARTS)
    if parameters.alignment is None:
        return
    s, d = _similarity_width(op, parameters.alignment, "alignment"), regions.shape[2]
    _check(op, "alignment", parameters.alignment, {"S": s, "D": d, "steps": options.alignments}, regions)
    if parameters.correspondence is not None:
        sizes = {"S": s, "D": d, "steps": options.corrections}
        sizes["H"] = size_of(parameters.correspondence.hidden_weight, 1)
        sizes["U"] = size_of(parameters.correspondence.temperature_hidden_weight, 1)
        _check(op, "correspondence", parameters.correspondence, sizes, regions)
    if parameters.aggregation is not None:
        _check(op, "aggregation", parameters.aggregation, {"S": s, "steps": options.aggregations}, regions)
    if parameters.score is not None:
        _check(op, "score", parameters.score, {"S": s}, regions)


def with_norm(op: str, parameters: ReasoningParameters, weight: Tensor, bias: Tensor) -> ReasoningParameters:
    """The parameters with the affine part of ``batch_norm`` filled in."""
    filtration = getattr(parameters, "filtration", None)
    if not isinstance(filtration, FiltrationParameters):
        return parameters  # refused by check_reasoning
    if filtration.norm_weight is not None or filtration.norm_bias is not None:
        raise ValueError(
            f"{op}: norm_weight and norm_bias of parameters.filtration must be None: batch_norm brings them"
        )
    return parameters._replace(filtration=filtration._replace(norm_weight=weight, norm_bias=bias))


def check_reasoning(op: str, parameters: ReasoningParameters, options: ReasoningOptions, regions: Tensor) -> None:
    """Raise unless the parameters are those that ``options`` need, in shapes that fit ``regions`` and each other."""
    if not isinstance(parameters, ReasoningParameters):
        raise TypeError(f"{op}: parameters must be ReasoningParameters, got {type(parameters).__name__}")
    described = f"reasoning {options.reasoning!r}"
    _check_presence(op, "filtration", parameters.filtration, options.reasoning == "SAF", described)
    _check_presence(op, "graph", parameters.graph, options.reasoning == "SGR" and options.steps > 0, described)
    for name in ("local_alignment", "global_alignment", "score"):
        _check_presence(op, name, getattr(parameters, name), True, described)
    _check_kinds(op, parameters, REASONING_PARTS)
    s = _similarity_width(op, parameters.local_alignment, "local_alignment")
    for name in ("local_alignment", "global_alignment"):
        sizes = {"S": s, "D": regions.shape[2], "steps": 1}
        _check(op, name, getattr(parameters, name), sizes, regions)
    if parameters.filtration is not None:
        _check(op, "filtration", parameters.filtration, {"S": s}, regions)
    if parameters.graph is not None:
        _check(op, "graph", parameters.graph, {"S": s, "steps": options.steps}, regions)
    _check(op, "score", parameters.score, {"S": s}, regions)


def _check_presence(op: str, name: str, given: object, needed: bool, described: str) -> None:
    if needed and given is None:
        raise ValueError(f"{op}: parameters.{name} must be there for {described}, got None")
    if not needed and given is not None:
        raise ValueError(f"{op}: parameters.{name} must be None for {described}: there it has no use")


def _check_kinds(op: str, parameters: tuple[object, ...], parts: tuple[type, ...]) -> None:
    stages = parameters._fields  # type: ignore[attr-defined]
    for stage, given, kind in zip(stages, parameters, parts, strict=True):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{op}: parameters.{stage} must be {kind.__name__}, got {type(given).__name__}")


def size_of(tensor: object, axis: int) -> int:
    """Its size there; -1 for what is no tensor or has no such axis, which a check of the whole shape then refuses."""
    there = isinstance(tensor, Tensor) and -tensor.dim() <= axis < tensor.dim()
    return int(tensor.shape[axis]) if there else -1  # type: ignore[attr-defined]


def _similarity_width(op: str, alignment: AlignmentParameters, name: str) -> int:
    width = size_of(alignment.weight, 1)
    if width < 1:
        raise ValueError(f"{op}: parameters.{name}.weight must be [steps, S, D] with S of at least 1")
    return width


SHAPES: dict[type, tuple[str, ...]] = {
    AlignmentParameters: ("steps S D", "steps S"),
    CorrespondenceParameters: (
        "steps H S",
        "steps H",
        "steps D H",
        "steps D",
        "steps U S",
        "steps U",
        "steps U",
        "steps",
    ),
    AggregationParameters: ("steps S S", "steps S", "steps S S", "steps S", "steps S", "steps"),
    FiltrationParameters: ("S", "1", "1", "1"),
    GraphParameters: ("steps S S", "steps S", "steps S S", "steps S", "steps S S", "steps S"),
    ScoreParameters: ("S", "1"),
}
"""Shape of every field, in the letters above."""


def _check(op: str, stage: str, given: tuple[Tensor | None, ...], sizes: dict[str, int], regions: Tensor) -> None:
    _check_fields(op, f"parameters.{stage}", given, sizes, regions, "regions")


def check_stage(
    op: str, kind: type, given: object, sizes: dict[str, int], beside: Tensor, named: str = "regions"
) -> None:
    """Raise unless ``given`` is a record of ``kind`` with these sizes; ``beside`` gives dtype and device."""
    if not isinstance(given, kind):
        raise TypeError(f"{op}: parameters must be {kind.__name__}, got {type(given).__name__}")
    _check_fields(op, "parameters", given, sizes, beside, named)  # type: ignore[arg-type]


def _check_fields(
    op: str, record: str, given: tuple[Tensor | None, ...], sizes: dict[str, int], beside: Tensor, named: str
) -> None:
    kind = type(given)
    for field, letters, tensor in zip(kind._fields, SHAPES[kind], given, strict=True):  # type: ignore[attr-defined]
        name = f"{record}.{field}"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        names = letters.split()
        wanted = [1 if letter == "1" else sizes[letter] for letter in names]
        if list(tensor.shape) != wanted:
            shown = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in names)
            raise ValueError(f"{op}: {name} must be [{', '.join(names)}] with {shown}, got {list(tensor.shape)}")
        check_parameter(op, name, tensor, beside, named)


def check_parameter(op: str, name: str, tensor: Tensor, beside: Tensor, named: str = "regions") -> None:
    """Raise unless a parameter lies where the regions lie, in their dtype or, beside half precision, in float32."""
    if tensor.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device} as {named} are, got {tensor.device}")
    half = beside.dtype in (torch.bfloat16, torch.float16)
    allowed = (beside.dtype, torch.float32) if half else (beside.dtype,)
    if tensor.dtype not in allowed or tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")
