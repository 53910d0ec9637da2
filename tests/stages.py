"""What tests of RCAR's and SGRAF's stages as ops share: random inputs by name, one run, a look at the opaque ops."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import itm_kernels
from helpers import SCORE_FLOOR, Batch, Place, random_batch
from itm_kernels.native import load_error
from itm_kernels.ops.parameters import (
    SHAPES,
    AggregationParameters,
    CorrespondenceParameters,
    FiltrationParameters,
    GraphParameters,
)

S, H, U = 6, 9, 5
FLOORS = [
    ("reference", torch.float64),
    ("eager", torch.float64),
    pytest.param("native", torch.float32, marks=pytest.mark.skipif(bool(load_error()), reason=str(load_error()))),
]
"""What runs on a CPU, each in the widest dtype that it takes."""
floors = pytest.mark.parametrize(("backend", "dtype"), FLOORS)
ROUNDING = {torch.float64: 1e-14, torch.float32: SCORE_FLOOR}
RECORDS: dict[str, Any] = {
    "correspondence_regulator": CorrespondenceParameters,
    "aggregation_regulator": AggregationParameters,
    "attention_filtration": FiltrationParameters,
    "similarity_graph": GraphParameters,
}
NORM = ("norm_weight", "norm_bias")
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A stage with options; ``given`` names the tensors beside its alignments that are there.

    The option ``steps`` is how many steps the parameters have, ``STEPS`` unless it says otherwise.
    """

    op: str
    options: dict[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join(str(part) for part in (*self.options.values(), *self.given)) or "plain"

    @property
    def t2i(self) -> bool:
        return self.options.get("direction", "t2i") == "t2i"

    def zero_gradients(self) -> tuple[str, ...]:
        """Parameters whose gradient is nothing but rounding: a bias before a softmax, or before a mean is taken off."""
        names = {"aggregation_regulator": ("value_bias",), "similarity_graph": ("key_bias",)}.get(self.op, ())
        return (*names, "bias") if self.options.get("training") else names


@dataclass(frozen=True)
class StageBatch:
    """Inputs of a stage by name, all that have a gradient. What does not count holds NaN."""

    case: Case
    tensors: dict[str, Tensor]
    batch: Batch
    buffers: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    """One for each output, float64."""

    def to(self, target: torch.dtype | str) -> StageBatch:
        """In another dtype, or on another device."""
        moved = {name: tensor.to(target) for name, tensor in self.tensors.items()}
        on_device = isinstance(target, str)
        buffers = tuple(b.to(target) if on_device or b.is_floating_point() else b for b in self.buffers)
        return dataclasses.replace(self, tensors=moved, buffers=buffers)

    def outputs(self, tensors: dict[str, Tensor], buffers: tuple[Tensor, ...] = (), **more: Any) -> tuple[Tensor, ...]:
        """Of the public function, as a tuple; its buffers are written to, or those of a copy."""
        case = self.case
        options = {name: value for name, value in {**case.options, **more}.items() if name != "steps"}
        function, counts = getattr(itm_kernels, case.op), self.batch.word_counts
        if case.op in ("alignment_vectors", "correspondence_regulator") or not case.t2i:
            options["region_counts"] = self.batch.region_counts
        if case.op == "alignment_vectors":
            options |= {name: tensors[name] for name in ("attention_scores", "temperature") if name in tensors}
            return (
                function(tensors["regions"], tensors["words"], counts, tensors["weight"], tensors["bias"], **options),
            )
        record = RECORDS[case.op]
        parameters = record(*(tensors.get(name) for name in record._fields if name not in NORM))
        if case.op == "correspondence_regulator":
            sides = tensors["regions"], tensors["words"]
            if "hidden" in tensors:
                # The scores of a state are for the next attention alone.
                options["state"] = itm_kernels.CorrespondenceState(
                    tensors["hidden"].new_empty(0), tensors["temperature"], tensors["hidden"]
                )
            return tuple(function(tensors["alignments"], *sides, counts, parameters, **options))
        if case.op == "aggregation_regulator":
            return (function(tensors["alignments"], tensors.get("pooled"), counts, parameters, **options),)
        if case.op == "attention_filtration":
            buffers = buffers or tuple(buffer.clone() for buffer in self.buffers)
            options["batch_norm"] = (*(tensors[name] for name in NORM), *buffers, 0.1, 1e-5)
        return (function(tensors["alignments"], tensors["global_alignments"], counts, parameters, **options),)

    def padded(self) -> StageBatch:
        """The axis of words as counts on a device have it: ``C W`` rows, NaN where a caption is at its end."""
        counts, longest = self.batch.word_counts, max(self.batch.word_counts)
        made = dict(self.tensors)
        for name, axis in words_axes(self.case, made).items():
            pieces = made[name].split(counts, dim=axis)
            filled = [filled_up(piece, axis, longest) for piece in pieces]
            made[name] = torch.stack(filled) if name == "words" else torch.cat(filled, dim=axis)
        return dataclasses.replace(self, tensors=made)


def filled_up(tensor: Tensor, axis: int, size: int, value: float = torch.nan) -> Tensor:
    """With ``value`` behind, up to ``size`` along an axis."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, size - tensor.shape[axis]), value=value)


def words_axes(case: Case, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which of the tensors have packed words, and where."""
    axes = {"words": 0, "attention_scores": 2}
    if case.t2i:
        axes |= {"alignments": 1, "temperature": 1, "hidden": 2}
    return {name: axis for name, axis in axes.items() if name in tensors}


def output_axes(case: Case) -> list[int | None]:
    """Where the outputs of :func:`run_stage` have packed words; None: nowhere."""
    of_queries = 1 if case.t2i else None
    if case.op == "alignment_vectors":
        return [of_queries]
    return [2, of_queries, of_queries] if case.op == "correspondence_regulator" else [None]


def stage_batch(case: Case, seed: int = 0, **sizes: Any) -> StageBatch:
    """Packed words, float64; matrices large enough to spread what they make, biases not zero."""
    sizes = {"images": 3, "captions": 4, "regions": 5, "words": 6, "width": 8, "region_counts": True, **sizes}
    batch = random_batch(seed, dtype=torch.float64, **sizes).packed()
    generator = torch.Generator().manual_seed(seed + 1)
    images, most, width = batch.regions.shape
    captions, rows = len(batch.word_counts), batch.words.shape[0]
    queries = [images, rows] if case.t2i else [images, most, captions]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def unit(*shape: int) -> Tensor:
        return F.normalize(normal(*shape), dim=-1)

    made: dict[str, Tensor] = {}
    if case.op in ("alignment_vectors", "correspondence_regulator"):
        made = {"regions": batch.regions, "words": batch.words}
    if case.op != "alignment_vectors":
        made["alignments"] = unit(*queries, S)
    optional = {
        "attention_scores": lambda: normal(images, most, rows) / 2,
        "temperature": lambda: normal(*queries).square() + 2,
        "hidden": lambda: normal(case.options.get("step", 0), *queries, H).tanh(),
        "pooled": lambda: unit(images, captions, S),
        "global_alignments": lambda: unit(images, captions, S),
    }
    made |= {name: make() for name, make in optional.items() if name in case.given}
    if case.op == "alignment_vectors":
        made |= {"weight": normal(S, width), "bias": normal(S) / 5}
    else:
        steps = case.options.get("steps", STEPS)
        letters = {"S": S, "D": width, "H": H, "U": U, "1": 1, "steps": steps}
        record = RECORDS[case.op]
        for name, shape in zip(record._fields, SHAPES[record], strict=True):
            axes = [letters[letter] for letter in shape.split()]
            gain = 1.0 if case.op == "similarity_graph" else 1.5  # nodes grow from step to step
            made[name] = normal(*axes) * (gain / axes[-1] ** 0.5 if len(axes) == 3 or name == "weight" else 0.4)
    _poison(case, made, batch.padding()[0])
    buffers: tuple[Tensor, ...] = ()
    if case.op == "attention_filtration":
        buffers = (normal(1) / 5, normal(1).square() + 0.5, torch.tensor(3))
    made_batch = StageBatch(case, made, batch, buffers, ())
    if images and captions:
        with torch.no_grad():
            shapes = [output.shape for output in made_batch.outputs(made, backend="reference")]
        shapes[-1] = shapes[-1][1:] if case.op == "correspondence_regulator" else shapes[-1]
        made_batch = dataclasses.replace(made_batch, upstream=tuple(normal(*shape) for shape in shapes))
    return made_batch


def _poison(case: Case, tensors: dict[str, Tensor], beyond: Tensor) -> None:  # [I, R]
    """NaN in what belongs to regions that do not count."""
    if "attention_scores" in tensors:
        tensors["attention_scores"][beyond] = torch.nan
    if not case.t2i:
        for name in ("alignments", "temperature"):
            if name in tensors:
                tensors[name][beyond] = torch.nan
        if "hidden" in tensors:
            tensors["hidden"][:, beyond] = torch.nan


@dataclass(frozen=True)
class StageResult:
    """What one forward and backward gave."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    buffers: tuple[Tensor, ...]


def run_stage(made: StageBatch, backend: str | None = None, **more: Any) -> StageResult:
    """Outputs, and gradients of their sum with the upstream gradients."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in made.tensors.items()}  # strides and all
    buffers = tuple(buffer.clone() for buffer in made.buffers)
    outputs = made.outputs(leaves, buffers, backend=backend, **more)
    if made.case.op == "correspondence_regulator":
        # The layers that came in go out again; what this step adds is the last one.
        outputs = (*outputs[:2], outputs[2][-1])
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), [g.to(o) for g, o in zip(made.upstream, outputs, strict=True)]
    )
    found = dict(zip(leaves, grads, strict=True))
    return StageResult(tuple(output.detach() for output in outputs), found, buffers)


def run_at(place: Place, made: StageBatch, **more: Any) -> StageResult:
    """The same on the floor and the device of a place; what it gave is on the host."""
    result = run_stage(made.to(place.device), place.floor, **more)
    return StageResult(
        tuple(output.cpu() for output in result.outputs),
        {name: grad.cpu() for name, grad in result.gradients.items()},
        tuple(buffer.cpu() for buffer in result.buffers),
    )


def truth_of(made: StageBatch, **more: Any) -> StageResult:
    """The definition in float64."""
    return run_stage(made.to(torch.float64), "reference", **more)


class _Recorder(TorchDispatchMode):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op, self.calls = op, list[tuple[Any, tuple[Any, ...]]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0].startswith(self.op):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@contextmanager
def recorded_calls(op: str) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Calls of the opaque forward and backward op: the op and its arguments."""
    with _Recorder(op) as recorder:
        yield recorder.calls
