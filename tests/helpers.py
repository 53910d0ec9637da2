"""What tests of score ops share: places, random batches, one run, and the tolerances of the correctness ladder."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import emulated
from itm_kernels import cross_attention_scores
from itm_kernels.backends import why_not
from itm_kernels.ops.options import AGG_FUNCS, DIRECTIONS, RAW_FEATURE_NORMS

FOCALS = (None, "equal", "prob")
SCORE_FLOOR = 1e-6
SUM_SCORE_FLOOR = 1e-5
GRADIENT_FLOOR = 5e-6


@dataclass(frozen=True)
class Place:
    """A floor on a device: where an op is run."""

    floor: str
    device: str = "cpu"
    emulated: bool = False
    """The floor's CUDA kernels, emulated on CPU tensors (``emulated.py``)."""

    def __str__(self) -> str:
        return f"{self.floor}-{'emulated' if self.emulated else self.device}"

    def why_not(self, op: str, dtype: torch.dtype) -> str | None:
        """The reason this place cannot run ``op``, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        if self.emulated and (reason := emulated.why_not()):
            return reason
        if self.emulated and importlib.util.find_spec(f"itm_kernels.native.cuda.{op}") is None:
            return f"{op} has no CUDA kernels in this version"
        return why_not(self.floor, op, self.device, dtype)


@dataclass(frozen=True)
class Batch:
    """Inputs of a score op and the upstream gradient. ``regions`` and ``words`` hold NaN where they are padding."""

    regions: Tensor  # [I, R, D]
    words: Tensor  # [C, W, D] or [N, D]
    word_counts: list[int]  # [C]
    region_counts: list[int] | None  # [I]
    grad_scores: Tensor  # [I, C] float64

    def to(self, target: torch.dtype | str) -> Batch:
        """In another dtype, or on another device."""
        moved = {"regions": self.regions.to(target), "words": self.words.to(target)}
        if isinstance(target, str):
            moved["grad_scores"] = self.grad_scores.to(target)
        return dataclasses.replace(self, **moved)

    def packed(self) -> Batch:
        """The same captions as ``[N, D]`` rows."""
        rows = [caption[:n] for caption, n in zip(self.words, self.word_counts, strict=True)]
        return dataclasses.replace(self, words=torch.cat(rows) if rows else self.words.flatten(0, 1))

    def padding(self) -> tuple[Tensor, Tensor]:  # [I, R] bool, [C, W] bool
        """Where padded regions and words are not valid."""
        counts = self.region_counts or [self.regions.shape[1]] * self.regions.shape[0]
        return tuple(
            torch.arange(side.shape[1])[None] >= torch.tensor(valid, dtype=torch.int64)[:, None]
            for side, valid in ((self.regions, counts), (self.words, self.word_counts))
        )


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    """Random float64 vectors of length 1 along the last axis."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def random_batch(
    seed: int,
    *,
    images: int = 5,
    captions: int = 6,
    regions: int = 12,
    words: int = 9,
    width: int = 24,
    region_counts: bool = False,
    word_counts: list[int] | None = None,
    shortest: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Unit vectors as the encoders make them; ragged captions, the longest and the ``shortest`` among them.

    ``region_counts=True`` makes the images ragged as well. ``word_counts`` overrides the drawn ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def ragged(groups: int, most: int) -> list[int]:
        least = min(shortest, most)
        counts = torch.randint(least, most + 1, (groups,), generator=generator).tolist()
        counts[:2] = [most, least][: len(counts[:2])]
        return counts

    v = unit(images, regions, width, generator=generator).to(dtype)
    t = unit(captions, words, width, generator=generator).to(dtype)
    counts = ragged(captions, words) if word_counts is None else word_counts
    of_regions = ragged(images, regions) if region_counts else None
    grad = torch.randn(images, captions, generator=generator, dtype=torch.float64)
    batch = Batch(v, t, counts, of_regions, grad)
    for side, padding in zip((v, t), batch.padding(), strict=True):
        side[padding] = torch.nan
    return batch


@dataclass(frozen=True)
class Result:
    """What one forward and backward gave."""

    scores: Tensor  # [I, C]
    grad_regions: Tensor
    grad_words: Tensor

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.grad_regions, self.grad_words

    def __iter__(self) -> Any:
        return iter((self.scores, self.grad_regions, self.grad_words))


def run(
    batch: Batch, backend: str | None = None, *, op: Callable[..., Tensor] = cross_attention_scores, **options: Any
) -> Result:
    """Scores of a score op, and gradients of ``sum(scores * grad_scores)``."""
    regions = batch.regions.detach().requires_grad_()
    words = batch.words.detach().requires_grad_()
    scores = op(regions, words, batch.word_counts, region_counts=batch.region_counts, backend=backend, **options)
    grads = torch.autograd.grad(scores, (regions, words), batch.grad_scores.to(scores.dtype))
    return Result(scores.detach(), *grads)


def truth(batch: Batch, *, op: Callable[..., Tensor] = cross_attention_scores, **options: Any) -> Result:
    """The definition in float64, on the host."""
    return run(batch.to("cpu").to(torch.float64), "reference", op=op, **options)


def score_error(got: Tensor, true: Tensor) -> float:
    """Largest absolute difference; NaN where one has a NaN."""
    return float((got.cpu().double() - true.cpu().double()).abs().max()) if got.numel() else 0.0


def relative_error(got: Tensor, true: Tensor) -> float:
    """Difference over ``true`` in the Euclidean norm (absolute where ``true`` is nothing but float64's rounding)."""
    got, true = got.cpu().double(), true.cpu().double()
    scale = float(true.norm())
    return float((got - true).norm()) / (scale if scale > 1e-12 else 1.0)


def score_floor(options: dict[str, Any]) -> float:
    """Noise floor of float32 scores."""
    return SUM_SCORE_FLOOR if options.get("agg_func") == "Sum" else SCORE_FLOOR


def assert_ladder(
    got: Result,
    peer: Result,
    true: Result,
    options: dict[str, Any],
    *,
    noise: bool = True,
    excused: Tensor | None = None,  # [I, C] bool
) -> None:
    """``got`` is no further from the truth than twice its ``peer`` (eager, same inputs), or the float32 noise floor.

    ``noise=False`` takes the floor away, as for half precision. Scores of ``excused`` pairs are left out (give their
    gradients no weight with ``focal.without``). The bounds are for ordinary batches: in a norm over a single query
    everything cancels, and what is left is rounding.
    """
    kept = slice(None) if excused is None else ~excused
    real = true.scores.cpu()[kept]
    bound = max(2 * score_error(peer.scores.cpu()[kept], real), score_floor(options) if noise else 0.0)
    error = score_error(got.scores.cpu()[kept], real)
    assert error <= bound, f"scores: error {error:.2e} above {bound:.2e}"
    for name, mine, its, real in zip(
        ("regions", "words"), got.gradients(), peer.gradients(), true.gradients(), strict=True
    ):
        bound = max(2 * relative_error(its, real), GRADIENT_FLOOR if noise else 0.0)
        error = relative_error(mine, real)
        assert error <= bound, f"gradient of the {name}: relative error {error:.2e} above {bound:.2e}"


def assert_exact(got: Result, true: Result, *, scores: float = 1e-9, gradients: float = 1e-6) -> None:
    """float64 floors: scores absolutely, gradients relatively."""
    error = score_error(got.scores, true.scores)
    assert error <= scores, f"scores: error {error:.2e} above {scores:.0e}"
    for name, mine, real in zip(("regions", "words"), got.gradients(), true.gradients(), strict=True):
        error = relative_error(mine, real)
        assert error <= gradients, f"gradient of the {name}: relative error {error:.2e} above {gradients:.0e}"


def every_option() -> list[dict[str, Any]]:
    """Directions x norms x aggregations x focal steps, and PFAN's peak: everything the op can be asked for."""
    cases = [
        {"direction": d, "raw_feature_norm": n, "agg_func": a, "focal": f}
        for d, n, a, f in itertools.product(DIRECTIONS, RAW_FEATURE_NORMS, AGG_FUNCS, FOCALS)
    ]
    peaks = [
        {"direction": "t2i", "raw_feature_norm": n, "agg_func": a, "focal": f, "peak_weight": 0.5}
        for n, a, f in itertools.product(RAW_FEATURE_NORMS, AGG_FUNCS, FOCALS)
    ]
    return cases + peaks


def option_pairs() -> list[dict[str, Any]]:
    """A cover: any two values of any two options meet in some case (peak with direction t2i alone)."""
    cases: list[dict[str, Any]] = []
    for n, norm in enumerate(RAW_FEATURE_NORMS):
        for a, agg in enumerate(AGG_FUNCS):
            # Modulo 3 this map from (n, a) to (direction, focal) is one to one, so every pair of those comes up too.
            case = {"direction": DIRECTIONS[(n + a) % 3], "focal": FOCALS[(n + 2 * a) % 3]}
            cases.append({**case, "raw_feature_norm": norm, "agg_func": agg})
    for n, norm in enumerate(RAW_FEATURE_NORMS):
        case = {"direction": "t2i", "focal": FOCALS[n % 3], "agg_func": AGG_FUNCS[n % 4]}
        cases.append({**case, "raw_feature_norm": norm, "peak_weight": 0.5})
    return cases


def label(options: dict[str, Any]) -> str:
    """Test id of a case."""
    return "-".join(str(value) for value in options.values() if value is not None)
