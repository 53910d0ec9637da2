"""What a call would do, without doing it: blocks, tiles, launches, workspace, arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm_kernels import native
from itm_kernels.backends import why_not
from itm_kernels.layout import CaptionLayout, check_counts, host_counts, offsets_of
from itm_kernels.ops.cross_attention_scores import OP, WORKSPACE_BYTES
from itm_kernels.ops.options import ScoreOptions, check_options

PHASES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Blocks:
    """Cuts of a batch: block k of images is ``images[k]`` to ``images[k + 1]``; captions alike; all pairs of both."""

    images: tuple[int, ...]
    captions: tuple[int, ...]

    @property
    def count(self) -> int:
        return max(len(self.images) - 1, 0) * max(len(self.captions) - 1, 0)


@dataclass(frozen=True)
class Plan:
    """The plan of one call.

    Attributes
    ----------
    route
        Name of the way the work is done.
    blocks
        Cuts by phase, ``"forward"`` and ``"backward"``.
    tiles
        Queries in a tile of the epilogue, by direction (more where one query segment is longer).
    launches
        Library products and kernels of all phases.
    workspace_bytes
        Most memory that lives beside inputs, gradients and scores.
    flops
        Of the library products; a multiply-add counts 2.
    useful_fraction
        Share of that arithmetic that is not padding.
    reason
        Why this route.
    """

    route: str
    blocks: dict[str, Blocks]
    tiles: dict[str, int]
    launches: int
    workspace_bytes: int
    flops: int
    useful_fraction: float
    reason: str


def plan(
    op: str,
    I: int,  # noqa: E741 - the project's letter for images
    C: int,
    R: int,
    word_counts: Sequence[int] | Tensor | CaptionLayout | None,  # [C]
    D: int,
    *,
    W: int | None = None,
    S: int | None = None,
    direction: str = "t2i",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    arch: str | None = None,
    phase: str = "forward+backward",
    workspace_bytes: int = WORKSPACE_BYTES,
    **options: Any,
) -> Plan:
    """Plan ``op`` on the native floor for I images with R regions against C captions, width D.

    Parameters
    ----------
    op
        ``"cross_attention_scores"``.
    word_counts
        ``[C]`` on the host; None with ``W``: only the padded size is known and every caption counts W words.
    S
        Similarity width of the ops that have one; an error for scores.
    device, arch
        ``"cpu"``. On a GPU this version has no native kernels, and no plan for them.
    phase
        ``"forward"``, ``"backward"`` or ``"forward+backward"``.
    options
        Options of the op, checked; none of the others changes the plan of scores.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit.
    RuntimeError
        No native floor for this op, device and dtype; the message carries the reason.
    """
    if op != OP:
        raise ValueError(f"plan: op must be {OP}, got {op!r}")
    if S is not None:
        raise ValueError(f"plan: {op} has no similarity width S, got {S}")
    if phase not in PHASES:
        raise ValueError(f"plan: phase must be one of {', '.join(PHASES)}, got {phase!r}")
    for name, value, least in (
        ("I", I, 0),
        ("C", C, 0),
        ("R", R, 1),
        ("D", D, 1),
        ("workspace_bytes", workspace_bytes, 1),
    ):
        if value < least:
            raise ValueError(f"plan: {name} must be at least {least}, got {value}")
    score_options = _score_options(direction, options)
    device = torch.device(device)
    reason = why_not("native", op, device, dtype)
    if reason is not None:
        raise RuntimeError(f"plan: {op} has no native plan on {device.type} with {dtype}: {reason}")
    if arch is not None:
        raise ValueError(f"plan: arch names a GPU architecture, but device is {device.type}; got {arch!r}")
    counts, known = _counts(C, word_counts, W)

    regions = torch.full((I,), R, dtype=torch.int64)
    half = dtype == torch.bfloat16
    phases = [name for name in ("forward", "backward") if name in phase]
    plans = {
        name: native.host().plan_scores(
            offsets_of(regions).tolist(),
            offsets_of(counts).tolist(),
            D,
            element_bytes=2 if half else 4,
            t2i=score_options.t2i,
            i2t=score_options.i2t,
            backward=name == "backward",
            copies_regions=dtype == torch.float16,  # widened to float32 block by block
            threads=torch.get_num_threads(),
            workspace_bytes=workspace_bytes,
        )
        for name in phases
    }
    keys = {"t2i": R, "i2t": int(counts.max()) if C else 1}
    return Plan(
        route="cpu-blocked",
        blocks={name: Blocks(tuple(p.image_bounds), tuple(p.caption_bounds)) for name, p in plans.items()},
        tiles={name: native.host().tile_width(keys[name]) for name in ("t2i", "i2t") if direction in (name, "both")},
        launches=sum(p.launches for p in plans.values()),
        workspace_bytes=max(p.workspace_bytes for p in plans.values()),
        flops=sum(p.flops for p in plans.values()),
        useful_fraction=1.0,  # packed words: the products hold no padding
        reason=(
            "library products in blocks that stay in the cache, one C++ epilogue a block and direction"
            + ("" if known else f"; word counts are not known, every caption counts W = {W} words")
        ),
    )


def _score_options(direction: str, options: dict[str, Any]) -> ScoreOptions:
    defaults: dict[str, Any] = {
        "raw_feature_norm": "clipped_l2norm",
        "lambda_softmax": 9.0,
        "agg_func": "LogSumExp",
        "lambda_lse": 6.0,
        "focal": None,
        "peak_weight": 0.0,
    }
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise TypeError(f"plan: {OP} has no option {', '.join(unknown)}; it has {', '.join(defaults)}")
    chosen = {**defaults, **options}
    chosen["focal"] = chosen["focal"] or "none"
    made = ScoreOptions(direction=direction, **chosen)
    check_options("plan", made)
    return made


def _counts(
    captions: int, word_counts: Sequence[int] | Tensor | CaptionLayout | None, longest: int | None
) -> tuple[Tensor, bool]:
    if word_counts is None:
        if longest is None or longest < 1:
            raise ValueError(f"plan: without word_counts, W must say the padded length, got {longest}")
        return torch.full((captions,), longest, dtype=torch.int64), False
    counts = host_counts("plan", "word_counts", word_counts)
    if counts.device.type != "cpu":
        raise ValueError(f"plan: word_counts must be on the host, got a tensor on {counts.device}")
    if counts.numel() != captions:
        raise ValueError(f"plan: word_counts must be [C] with C = {captions}, got [{counts.numel()}]")
    check_counts("plan", "word_counts", counts, longest)
    return counts, True
