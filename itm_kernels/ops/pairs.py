"""Checks that every op over images x captions shares: shapes, dtypes, devices, counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from itm_kernels.layout import CaptionLayout, check_counts, host_counts

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Counts = Sequence[int] | Tensor | CaptionLayout


def check_pairs(
    op: str,
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Counts,
    region_counts: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Raise on anything that does not fit; return word counts, word offsets (a layout's, else None), region counts.

    All int64. Values of counts are looked at in :func:`check_count_values`, inside the op: under ``torch.compile`` they
    do not exist yet here.
    """
    for name, tensor in (("regions", regions), ("words", words)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if regions.dim() != 3:
        raise ValueError(f"{op}: regions must be [I, R, D], got {list(regions.shape)}")
    width = regions.shape[2]
    if words.dim() not in (2, 3) or words.shape[-1] != width:
        raise ValueError(
            f"{op}: words must be [C, W, D] or packed [N, D] with D = {width} as in regions, got {list(words.shape)}"
        )
    if regions.shape[1] < 1 or width < 1 or (words.dim() == 3 and words.shape[1] < 1):
        raise ValueError(
            f"{op}: R, W and D must be at least 1, got regions {list(regions.shape)} and words {list(words.shape)}"
        )
    if regions.dtype != words.dtype:
        raise TypeError(f"{op}: regions and words must have one dtype, got {regions.dtype} and {words.dtype}")
    if regions.device != words.device:
        raise ValueError(f"{op}: regions and words must be on one device, got {regions.device} and {words.device}")

    counts = host_counts(op, "word_counts", word_counts)
    if words.dim() == 3 and counts.shape[0] != words.shape[0]:
        raise ValueError(
            f"{op}: word_counts must be [C] with C = {words.shape[0]} as in words, got [{counts.shape[0]}]"
        )
    if words.dim() == 2 and counts.device.type != "cpu":
        raise ValueError(f"{op}: packed words need word_counts on the host, got a tensor on {counts.device}")
    _check_device(op, "word_counts", counts, regions)
    offsets = word_counts.offsets if isinstance(word_counts, CaptionLayout) else None
    if offsets is not None and offsets.device != regions.device:
        raise ValueError(
            f"{op}: word_counts is a CaptionLayout on {offsets.device}, regions and words are on {regions.device}"
        )
    if region_counts is None:
        return counts, offsets, None
    of_regions = host_counts(op, "region_counts", region_counts)
    if of_regions.shape[0] != regions.shape[0]:
        raise ValueError(
            f"{op}: region_counts must be [I] with I = {regions.shape[0]} as in regions, got [{of_regions.shape[0]}]"
        )
    _check_device(op, "region_counts", of_regions, regions)
    return counts, offsets, of_regions


def _check_device(op: str, name: str, counts: Tensor, regions: Tensor) -> None:
    if counts.device.type != "cpu" and counts.device != regions.device:
        raise ValueError(f"{op}: {name} must be on the host or on {regions.device}, got {counts.device}")


def check_count_values(
    op: str, regions: Tensor, words: Tensor, word_counts: Tensor, region_counts: Tensor | None
) -> None:
    """Raise ``ValueError`` on counts out of range, where they are on the host; counts on a device are never read."""
    if word_counts.device.type == "cpu":
        check_counts(op, "word_counts", word_counts, words.shape[1] if words.dim() == 3 else None)
        if words.dim() == 2 and int(word_counts.sum()) != words.shape[0]:
            raise ValueError(
                f"{op}: packed words must be [N, D] with N = {int(word_counts.sum())}, the sum of word_counts, "
                f"got {list(words.shape)}"
            )
    if region_counts is not None and region_counts.device.type == "cpu":
        check_counts(op, "region_counts", region_counts, regions.shape[1])


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, floating tensors in its dtype (float64 stays); otherwise as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and accumulation: float64 for float64 input, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
