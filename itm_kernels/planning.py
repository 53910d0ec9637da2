"""What a call will do, without doing it: blocks, tiles, launches, workspace, arithmetic."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from itm_kernels.backends import why_not
from itm_kernels.layout import CaptionLayout, check_counts, host_counts
from itm_kernels.native.cuda.machine import Machine, machine_of, machine_of_arch
from itm_kernels.native.devices import FLOAT64
from itm_kernels.ops.options import WORKSPACE_BYTES
from itm_kernels.planners import Blocks, Plan, PlannedBatch

__all__ = ["Blocks", "Plan", "plan"]

OPS = ("cross_attention_scores", "max_similarity_scores", "regulated_scores", "similarity_reasoning_scores")
WITH_SIMILARITY = ("regulated_scores", "similarity_reasoning_scores")
PHASES = ("forward", "backward", "forward+backward")


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
        ``"cross_attention_scores"``, ``"max_similarity_scores"``, ``"regulated_scores"`` or
        ``"similarity_reasoning_scores"``.
    word_counts
        ``[C]`` on the host; None with ``W``: only the padded size is known and every caption counts W words.
    S
        Similarity width, for the last two ops; an error for the others. Their hidden widths are as published: 2 S of
        the gate, S / 2 of the temperature.
    device, arch
        ``"cpu"``, or ``"cuda"`` with an architecture such as ``"sm_80"`` or ``"sm_90a"``: None is the visible GPU, else
        ``"sm_90a"``. A plan is arithmetic: it needs neither a GPU nor the CUDA kernels.
    phase
        ``"forward"``, ``"backward"`` or ``"forward+backward"``.
    options
        Options of the op, checked. Instead of ``batch_norm`` and its state ``similarity_reasoning_scores`` takes
        ``eps``.

    Raises
    ------
    ValueError, TypeError
        Arguments that do not fit.
    RuntimeError
        No native floor for this op, device and dtype; the message carries the reason.
    """
    if op not in OPS:
        raise ValueError(f"plan: op must be one of {', '.join(OPS)}, got {op!r}")
    planner = importlib.import_module(f"itm_kernels.planners.{op}")
    if op not in WITH_SIMILARITY and S is not None:
        raise ValueError(f"plan: {op} has no similarity width S, got {S}")
    if op in WITH_SIMILARITY and (S is None or S < 1):
        raise ValueError(f"plan: {op} has a similarity width S, which must be at least 1, got {S}")
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
    chosen = planner.options_of(direction, options)
    device = torch.device(device)
    machine = _machine(device, arch)
    if machine is None:
        reason = why_not("native", op, device, dtype)
        if reason is not None:
            raise RuntimeError(f"plan: {op} has no native plan on {device.type} with {dtype}: {reason}")
    elif dtype == torch.float64:
        raise RuntimeError(f"plan: {op} has no native plan on {device.type} with {dtype}: {FLOAT64}")
    counts, known = _counts(C, word_counts, W)
    batch = PlannedBatch(I, R, counts, D, chosen, dtype, workspace_bytes, S or 0)
    phases = [name for name in ("forward", "backward") if name in phase]
    made: Plan = planner.on_cpu(batch, phases) if machine is None else planner.on_gpu(batch, phases, machine)
    if known:
        return made
    return replace(made, reason=f"{made.reason}; word counts are not known, every caption counts W = {W} words")


def _machine(device: torch.device, arch: str | None) -> Machine | None:
    """The GPU to plan for: the architecture named, else the visible one, else an H100; None for a CPU."""
    if device.type == "cpu":
        if arch is not None:
            raise ValueError(f"plan: arch names a GPU architecture, but device is {device.type}; got {arch!r}")
        return None
    if device.type != "cuda":
        raise RuntimeError(f"plan: the native kernels run on CPUs and CUDA GPUs, not on {device.type}")
    if arch is not None:
        return machine_of_arch(arch)
    return machine_of(device) if torch.cuda.is_available() else machine_of_arch("sm_90a")


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
