"""What the stages of RCAR and SGRAF share as ops: packing words, the tensors that a stage hands to the next.

Publicly the words of a batch are one axis, ``N``. Where their counts are on the host they are packed, and inside an op
the axis is ``N`` as well. Counts on a device are never read, every caption keeps its padding, and inside an op the axis
is ``C, W``: the number of dimensions tells which. Regions, padded always, need no second form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from itm_kernels.layout import check_counts, host_counts, offsets_of
from itm_kernels.ops.pairs import DTYPES, Counts, check_count_values
from itm_kernels.ops.parameters import check_parameter
from itm_kernels.ops.stage_options import product_dtype


def keeps_padding(counts: Tensor) -> bool:
    """Whether captions keep their padding: counts on a device cannot say where one ends."""
    return counts.device.type != "cpu"


def query_words(op: str, regions: Tensor, words: Tensor, counts: Tensor, region_counts: Tensor | None) -> Tensor:
    """Words as they go into the op, ``[N, D]`` or ``[C, W, D]``; what padding is left out has no gradient."""
    if words.dim() == 2 or keeps_padding(counts):
        return words
    check_count_values(op, regions, words, counts, region_counts)
    captions, longest, width = words.shape
    offsets = offsets_of(counts)
    caption = torch.repeat_interleave(torch.arange(captions, device="cpu"), counts)  # [N]
    rows = torch.arange(caption.shape[0], device="cpu") - offsets[caption] + caption * longest
    if words.device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(words.device, non_blocking=True)
    return words.reshape(captions * longest, width).index_select(0, rows)


def split_words(tensor: Tensor, axis: int, counts: Tensor) -> Tensor:
    """The public axis of words as it is inside the op: ``N``, or ``C, W`` where captions keep their padding."""
    captions = counts.shape[0]
    return tensor.unflatten(axis, (captions, -1)) if captions and keeps_padding(counts) else tensor


def joined_words(tensor: Tensor, axis: int, counts: Tensor) -> Tensor:
    """The inverse of :func:`split_words`."""
    return tensor.flatten(axis, axis + 1) if keeps_padding(counts) else tensor


def check_alignments(
    op: str,
    alignments: Tensor,  # [I, N, S], or [I, R, C, S]
    word_counts: Counts,
    region_counts: Sequence[int] | Tensor | None,
    direction: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Raise on anything that does not fit; return word counts, word offsets (a layout's, else None), region counts.

    Values of counts are looked at in :func:`check_rows`, inside the op.
    """
    if not isinstance(alignments, Tensor):
        raise TypeError(f"{op}: alignments must be a tensor, got {type(alignments).__name__}")
    if alignments.dtype not in DTYPES:
        raise TypeError(f"{op}: alignments must be float64, float32, bfloat16 or float16, got {alignments.dtype}")
    t2i = direction == "t2i"
    if alignments.dim() != (3 if t2i else 4):
        wanted = "[I, N, S]" if t2i else "[I, R, C, S]"
        raise ValueError(
            f"{op}: alignments must be {wanted} with direction {direction!r}, got {list(alignments.shape)}"
        )
    if alignments.shape[-1] < 1 or (not t2i and alignments.shape[1] < 1):
        raise ValueError(f"{op}: R and S must be at least 1, got alignments {list(alignments.shape)}")
    counts = host_counts(op, "word_counts", word_counts)
    captions = counts.shape[0]
    _check_device(op, "word_counts", counts, alignments)
    if not t2i and alignments.shape[2] != captions:
        raise ValueError(
            f"{op}: word_counts must be [C] with C = {alignments.shape[2]} as in alignments, got [{captions}]"
        )
    if (
        t2i
        and counts.device.type != "cpu"
        and alignments.shape[1] != captions * (alignments.shape[1] // max(captions, 1))
    ):
        raise ValueError(
            f"{op}: alignments must be [I, C W, S] with C = {captions} where word_counts are on a device, "
            f"got {list(alignments.shape)}"
        )
    offsets = getattr(word_counts, "offsets", None)
    if offsets is not None and offsets.device != alignments.device:
        raise ValueError(
            f"{op}: word_counts is a CaptionLayout on {offsets.device}, alignments are on {alignments.device}"
        )
    if region_counts is None:
        return counts, offsets, None
    if t2i:
        raise ValueError(
            f"{op}: region_counts must be None with direction 't2i': alignments have rows of words alone there"
        )
    of_regions = host_counts(op, "region_counts", region_counts)
    if of_regions.shape[0] != alignments.shape[0]:
        raise ValueError(
            f"{op}: region_counts must be [I] with I = {alignments.shape[0]} as in alignments, "
            f"got [{of_regions.shape[0]}]"
        )
    _check_device(op, "region_counts", of_regions, alignments)
    return counts, offsets, of_regions


def products_like(op: str, alignments: Tensor, matrix: object) -> tuple[Tensor, str]:
    """What the parameters of a stage are checked against, and its name: the alignments, or narrower matrices."""
    if not isinstance(matrix, Tensor) or product_dtype(alignments.dtype, matrix.dtype) == alignments.dtype:
        return alignments, "alignments"
    check_parameter(op, "alignments", alignments, matrix, "parameters")
    return matrix, "parameters"


def check_rows(op: str, alignments: Tensor, word_counts: Tensor, region_counts: Tensor | None, direction: str) -> None:
    """Raise ``ValueError`` on counts out of range, where they are on the host; counts on a device are never read."""
    if word_counts.device.type == "cpu":
        packed = direction == "t2i" and alignments.dim() == 3
        padded = direction == "t2i" and not packed
        check_counts(op, "word_counts", word_counts, alignments.shape[2] if padded else None)
        if packed and int(word_counts.sum()) != alignments.shape[1]:
            raise ValueError(
                f"{op}: alignments must be [I, N, S] with N = {int(word_counts.sum())}, the sum of word_counts, "
                f"got {list(alignments.shape)}"
            )
    if region_counts is not None and region_counts.device.type == "cpu":
        check_counts(op, "region_counts", region_counts, alignments.shape[1])


def check_beside(
    op: str, name: str, tensor: object, shape: dict[str, int], beside: Tensor, named: str = "regions"
) -> None:
    """Raise unless ``tensor`` has this shape, by letters, and the dtype of a parameter beside ``beside``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if list(tensor.shape) != list(shape.values()):
        shown = ", ".join(f"{letter} = {size}" for letter, size in shape.items())
        raise ValueError(f"{op}: {name} must be [{', '.join(shape)}] with {shown}, got {list(tensor.shape)}")
    check_parameter(op, name, tensor, beside, named)


def _check_device(op: str, name: str, counts: Tensor, beside: Tensor) -> None:
    if counts.device.type != "cpu" and counts.device != beside.device:
        raise ValueError(f"{op}: {name} must be on the host or on {beside.device}, got {counts.device}")
