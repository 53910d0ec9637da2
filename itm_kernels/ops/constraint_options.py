"""What ``attention_constraints`` shares with its floors: the record of options, the checks of pairs and swaps."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from itm_kernels.ops.attention_options import AttentionOptions, check_attention_options, check_indices

SWAPS = ("query", "content")


@dataclass(frozen=True)
class ConstraintOptions(AttentionOptions):
    """Options of ``attention_constraints``, checked."""

    swap: str
    detach_swapped: bool
    ccr_margin: float
    ccs_margin: float

    def as_arguments(self) -> tuple[str, str, float, str, str, bool, float, float]:  # type: ignore[override]
        """In the order of the op's schema."""
        return astuple(self)


def check_constraint_options(op: str, options: ConstraintOptions) -> None:
    """Raise on a name that is not known or a number that is not usable."""
    check_attention_options(op, options)
    if options.swap not in SWAPS:
        raise ValueError(f"{op}: swap must be one of {', '.join(SWAPS)}, got {options.swap!r}")
    if not isinstance(options.detach_swapped, bool):
        raise TypeError(f"{op}: detach_swapped must be True or False, got {options.detach_swapped!r}")
    for name, margin in (("ccr_margin", options.ccr_margin), ("ccs_margin", options.ccs_margin)):
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"{op}: {name} must be a finite number of at least 0, got {margin}")


def pair_indices(op: str, pairs: object, regions: Tensor, captions: int) -> Tensor | None:  # [P, 2]
    """``pairs`` as the op takes them: those given, the diagonal of a square batch for None, None for ``"all"``."""
    images, device = regions.shape[0], regions.device
    if pairs is None:
        if images != captions:
            raise ValueError(
                f"{op}: pairs must be given where I and C differ, got None with I = {images}, C = {captions}"
            )
        return torch.arange(images, device=device)[:, None].repeat(1, 2)
    if isinstance(pairs, str):
        if pairs != "all":
            raise ValueError(f"{op}: pairs must be None, 'all' or [P, 2] indices, got {pairs!r}")
        return None
    check_indices(op, pairs, regions)
    assert isinstance(pairs, Tensor)
    return pairs


def every_pair(regions: Tensor, words: Tensor) -> Tensor:  # [I, R, D], [C, W, D] -> [I C, 2]
    """Every image with every caption, pair ``i C + c``."""
    images, captions, device = regions.shape[0], words.shape[0], regions.device
    image = torch.arange(images, device=device)[:, None].expand(images, captions)
    return torch.stack([image, torch.arange(captions, device=device).expand(images, captions)], -1).flatten(0, 1)


def check_swapped(op: str, swapped: object, shape: dict[str, int], beside: Tensor) -> None:
    """Raise unless ``swapped`` can be rows of fragments, by the letters of its shape; values are looked at inside."""
    if not isinstance(swapped, Tensor) or swapped.dtype != torch.int64:
        got = swapped.dtype if isinstance(swapped, Tensor) else type(swapped).__name__
        raise TypeError(f"{op}: swapped must be an int64 tensor, got {got}")
    if list(swapped.shape) != list(shape.values()):
        shown = ", ".join(f"{letter} = {size}" for letter, size in shape.items())
        raise ValueError(f"{op}: swapped must be [{', '.join(shape)}] with {shown}, got {list(swapped.shape)}")
    if swapped.device.type != "cpu" and swapped.device != beside.device:
        raise ValueError(f"{op}: swapped must be on the host or on {beside.device}, got {swapped.device}")


def check_swapped_values(op: str, swapped: Tensor, rows: int, counts: Tensor | None, most: int) -> None:
    """Raise ``ValueError`` on a row that is none of ``rows``, or one of the padding, where the host can see it.

    ``counts`` are of groups of ``most`` rows; None: no padding to look for.
    """
    if swapped.device.type != "cpu":
        return
    wrong = (swapped < -1) | (swapped >= rows)
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: swapped must be within 0..{rows - 1}, or -1, got {int(swapped[tuple(at)])} at {at}")
    if counts is None or counts.device.type != "cpu" or not rows:
        return
    row = swapped.clamp(min=0)
    wrong = (swapped >= 0) & (row % most >= counts[row // most])
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise ValueError(f"{op}: swapped must not name padding, got row {int(swapped[tuple(at)])} at {at}")


def padded_rows(swapped: Tensor, counts: Tensor, longest: int) -> Tensor:
    """Rows of packed words ``[N, D]`` as rows of padded ones, ``[C W, D]``; what names no row still names none."""
    words = int(counts.sum())
    position = torch.arange(longest, device=counts.device)
    of_packed = (torch.arange(counts.shape[0], device=counts.device)[:, None] * longest + position)[
        position < counts[:, None]
    ].to(swapped.device)
    if not words:
        return swapped
    beyond = counts.shape[0] * longest
    rows = torch.where(swapped < words, of_packed[swapped.clamp(0, words - 1)], beyond)
    return torch.where(swapped < 0, swapped, rows)
