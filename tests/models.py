"""What tests of the ops with parameters share: cases, random batches with parameters, one run, and the ladder.

A case is an op with options. Its inputs, parameters among them, are a dict of tensors by name, and so are its
gradients, so that one set of checks (``model_checks.py``) serves every such op.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from helpers import GRADIENT_FLOOR, SCORE_FLOOR, Batch, random_batch, relative_error, score_error, unit
from itm_kernels import regulated_scores, similarity_reasoning_scores
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import (
    REASONING_PARTS,
    REGULATED_PARTS,
    SHAPES,
    ReasoningParameters,
    RegulatedParameters,
    field_names,
)

# Gradients through RCR's clamp, which starts on its own edge: entries on the other side of it in float32 differ whole.
CLAMP_GRADIENT_FLOOR = 2e-4
SIDES = ("regions", "words")
GLOBALS = ("image_global", "caption_global")
NORM = ("norm_weight", "norm_bias")


@dataclass(frozen=True)
class Case:
    """An op with parameters, and options."""

    op: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(str(value) for value in self.options.values())

    @property
    def regulated(self) -> bool:
        return self.op == "regulated_scores"

    def steps(self) -> dict[str, int]:
        """Steps of every stage; 0: it is not there."""
        if self.regulated:
            made = RegulatedOptions(**{**DEFAULTS, **self.options})
            return {
                "alignment": made.alignments,
                "correspondence": made.corrections,
                "aggregation": made.aggregations,
                "score": int(made.regulator != "rcr"),
            }
        saf = self.options["reasoning"] == "SAF"
        graph = 0 if saf else self.options.get("steps", 3)
        return {"local_alignment": 1, "global_alignment": 1, "filtration": int(saf), "graph": graph, "score": 1}

    def gradient_floor(self) -> float:
        return CLAMP_GRADIENT_FLOOR if self.regulated and self.steps()["correspondence"] else GRADIENT_FLOOR

    def zero_gradients(self) -> tuple[str, ...]:
        """Parameters whose gradient is nothing but rounding: a bias before a softmax, or before a mean is taken off."""
        names = ["aggregation_value_bias", "graph_key_bias"]
        if self.options.get("training"):
            names.append("filtration_bias")
        return tuple(names)


DEFAULTS: dict[str, Any] = {
    "direction": "t2i",
    "regulator": "rcar",
    "steps": 2,
    "temperature": 10.0,
    "dropout": 0.0,
    "seed": 0,
    "image_offset": 0,
    "caption_offset": 0,
}

REGULATED = [
    Case("regulated_scores", {"direction": direction, "regulator": regulator, "steps": steps})
    for direction in ("t2i", "i2t")
    for regulator, steps in [("rar", 0), ("rar", 3), ("rcr", 0), ("rcr", 2), ("rcar", 1), ("rcar", 3)]
]
DROPPED = [
    Case(
        "regulated_scores", {"direction": direction, "regulator": regulator, "steps": 2, "dropout": 0.4, "seed": 2**40}
    )
    for direction, regulator in [("t2i", "rar"), ("t2i", "rcar"), ("i2t", "rcar")]
]
REASONED = [
    Case("similarity_reasoning_scores", {"reasoning": "SAF", "training": False}),
    Case("similarity_reasoning_scores", {"reasoning": "SAF", "training": True}),
    *(Case("similarity_reasoning_scores", {"reasoning": "SGR", "steps": steps}) for steps in (0, 1, 3)),
]


@dataclass(frozen=True)
class ModelBatch:
    """Inputs of an op with parameters. ``regions`` and ``words`` hold NaN where they are padding."""

    case: Case
    batch: Batch
    extras: dict[str, Tensor]
    """Global vectors, affine part of the batch normalisation."""
    parameters: Any
    buffers: tuple[Tensor, ...] = ()
    """Running mean and variance, number of batches."""

    def to(self, target: torch.dtype | str) -> ModelBatch:
        """In another dtype, or on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(target) if tensor.is_floating_point() or isinstance(target, str) else tensor

        return dataclasses.replace(
            self,
            batch=self.batch.to(target),
            extras={name: moved(tensor) for name, tensor in self.extras.items()},
            parameters=self.parameters.of([None if p is None else moved(p) for p in self.parameters.flat()]),
            buffers=tuple(moved(buffer) for buffer in self.buffers),
        )

    def packed(self) -> ModelBatch:
        return dataclasses.replace(self, batch=self.batch.packed())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has a gradient, by name."""
        parts = REGULATED_PARTS if self.case.regulated else REASONING_PARTS
        names = field_names(type(self.parameters), parts)
        given = zip(names, self.parameters.flat(), strict=True)
        sides = {"regions": self.batch.regions, "words": self.batch.words}
        return {**sides, **self.extras, **{name: tensor for name, tensor in given if tensor is not None}}


def model_batch(case: Case, seed: int, *, similarity: int = 10, gain: float | None = None, **sizes: Any) -> ModelBatch:
    """A batch with parameters that spread the scores: ``gain`` times the published initialisation, biases not zero.

    The gain is 3 by default, and 1 for a graph, whose nodes grow with every step until the scores saturate.
    """
    batch = random_batch(seed, **sizes)
    gain = gain or (1.0 if case.options.get("reasoning") == "SGR" else 3.0)
    generator = torch.Generator().manual_seed(seed + 1)
    width, dtype = batch.regions.shape[2], batch.regions.dtype
    letters = {"S": similarity, "D": width, "H": 2 * similarity, "U": max(similarity // 2, 1), "1": 1}

    def tensor(shape: str, steps: int) -> Tensor:
        axes = [steps if letter == "steps" else letters[letter] for letter in shape.split()]
        inner = axes[1:] if "steps" in shape else axes
        scale = gain * (6 / (sum(inner) if len(inner) > 1 else inner[0] + 1)) ** 0.5 if inner != [1] and inner else 0.3
        if len(inner) < 2 and shape not in ("S", "steps S", "steps U"):
            scale = 0.3
        return ((torch.rand(axes, generator=generator, dtype=torch.float64) * 2 - 1) * scale).to(dtype)

    parts = REGULATED_PARTS if case.regulated else REASONING_PARTS
    record = RegulatedParameters if case.regulated else ReasoningParameters
    groups = []
    for (_, steps), part in zip(case.steps().items(), parts, strict=True):
        groups.append(None if not steps else part(*(tensor(shape, steps) for shape in SHAPES[part])))
    parameters = record(*groups)
    if case.regulated:
        return ModelBatch(case, batch, {}, parameters)
    images, captions = batch.regions.shape[0], len(batch.word_counts)
    extras = {
        "image_global": unit(images, width, generator=generator).to(dtype),
        "caption_global": unit(captions, width, generator=generator).to(dtype),
    }
    buffers: tuple[Tensor, ...] = ()
    if parameters.filtration is not None:
        extras["norm_weight"], extras["norm_bias"] = parameters.filtration[2:]
        parameters = parameters._replace(filtration=parameters.filtration._replace(norm_weight=None, norm_bias=None))
        mean, variance = (torch.rand(1, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
        buffers = (mean.to(dtype), variance.to(dtype), torch.tensor(7))
    return ModelBatch(case, batch, extras, parameters, buffers)


@dataclass(frozen=True)
class ModelResult:
    """What one forward and backward gave."""

    scores: Tensor
    gradients: dict[str, Tensor]
    buffers: tuple[Tensor, ...]

    def __iter__(self) -> Any:
        return iter((self.scores, *self.gradients.values(), *self.buffers))


def scorer(
    made: ModelBatch, backend: str | None = None, *, momentum: float | None = 0.1, **more: Any
) -> Callable[..., Tensor]:
    """The op as a function of its tensors by name; buffers are written to copies, which ``scorer.buffers`` holds."""
    buffers = tuple(buffer.clone() for buffer in made.buffers)

    def scores(tensors: dict[str, Tensor]) -> Tensor:
        names = list(made.tensors())
        parts = REGULATED_PARTS if made.case.regulated else REASONING_PARTS
        flat = [tensors.get(name) if name in names else None for name in field_names(type(made.parameters), parts)]
        parameters = made.parameters.of(flat)
        arguments = [tensors["regions"], tensors["words"], made.batch.word_counts]
        options = {**made.case.options, **more, "region_counts": made.batch.region_counts, "backend": backend}
        if made.case.regulated:
            return regulated_scores(*arguments, parameters, **options)
        if made.buffers:
            options["batch_norm"] = (*(tensors[name] for name in NORM), *buffers, momentum, 1e-5)
        return similarity_reasoning_scores(*arguments, *(tensors[name] for name in GLOBALS), parameters, **options)

    scores.buffers = buffers  # type: ignore[attr-defined]
    return scores


def run_model(made: ModelBatch, backend: str | None = None, **more: Any) -> ModelResult:
    """Scores, and gradients of ``sum(scores * grad_scores)``."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.tensors().items()}
    op = scorer(made, backend, **more)
    scores = op(tensors)
    upstream = made.batch.grad_scores.to(scores)
    grads = torch.autograd.grad(scores, list(tensors.values()), upstream)
    return ModelResult(scores.detach(), dict(zip(tensors, grads, strict=True)), op.buffers)  # type: ignore[attr-defined]


def model_truth(made: ModelBatch, **more: Any) -> ModelResult:
    """The definition in float64, on the host."""
    return run_model(made.to("cpu").to(torch.float64), "reference", **more)


def errors_of(got: ModelResult, true: ModelResult, case: Case) -> dict[str, float]:
    """Largest error of a score, relative error of gradients and buffers.

    Where a gradient is, or may cancel to, nothing but rounding, its error is relative to the largest of a parameter's.
    """
    of_parameters = [float(grad.norm()) for name, grad in true.gradients.items() if name not in SIDES]
    scale = max(of_parameters, default=0.0) or 1.0
    errors = {"scores": score_error(got.scores, true.scores)}
    for name, real in true.gradients.items():
        mine = got.gradients[name].cpu().double()
        if name in case.zero_gradients() or real.numel() == 1:
            errors[f"gradient of {name}"] = float((mine - real).norm()) / scale
        else:
            errors[f"gradient of {name}"] = relative_error(mine, real)
    for number, (mine, real) in enumerate(zip(got.buffers, true.buffers, strict=True)):
        errors[f"buffer {number}"] = relative_error(mine, real)
    return errors


def floor_of(name: str, case: Case) -> float:
    """Noise of float32."""
    return SCORE_FLOOR if name == "scores" or name.startswith("buffer") else case.gradient_floor()


def assert_model_ladder(got: ModelResult, peer: ModelResult, true: ModelResult, case: Case) -> None:
    """``got`` is no further from the truth than twice its ``peer`` (same inputs), or the float32 noise floor."""
    its = errors_of(peer, true, case)
    for name, error in errors_of(got, true, case).items():
        bound = max(2 * its[name], floor_of(name, case))
        assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def assert_half_ladder(runs: list[tuple[ModelResult, ModelResult, ModelResult]], case: Case) -> None:
    """The same in half precision, over several batches ``(got, peer, true)`` and without a floor.

    The median batch counts, and of its scores the root mean square: where a few small sums cancel, one batch comes out
    well and another badly, whoever computes it.
    """

    def errors(which: int) -> list[dict[str, float]]:
        found = [errors_of(run[which], run[2], case) for run in runs]
        for run, of_run in zip(runs, found, strict=True):
            of_run["scores"] = relative_error(run[which].scores, run[2].scores)
        return found

    mine, its = errors(0), errors(1)
    for name in mine[0]:
        error, bound = (statistics.median(of_run[name] for of_run in side) for side in (mine, its))
        assert error <= 2 * bound, f"{name}: error {error:.2e} above {2 * bound:.2e}"


def assert_model_exact(got: ModelResult, true: ModelResult, case: Case) -> None:
    """float64 floors: scores absolutely, gradients relatively."""
    assert score_error(got.scores, true.scores) <= 1e-9
    for name, real in true.gradients.items():
        mine = got.gradients[name]
        if name in case.zero_gradients():
            assert float((mine - real).norm()) <= 1e-9, name
        else:
            assert relative_error(mine, real) <= 1e-6, name
    for mine, real in zip(got.buffers, true.buffers, strict=True):
        torch.testing.assert_close(mine.double(), real.double(), rtol=1e-9, atol=1e-9)
