"""What the steps of a block are told, by name, where it is more than tensors and sizes.

Fields are tensors and numbers as a kernel takes them; one that is None is not there for the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Packing(NamedTuple):
    """One side of a block, as it is given and as kernels take it."""

    vectors: Any  # [groups, extent, width] or [n, width], by strides
    bounds: Any  # [groups + 1] int64: first rows, counted from any number; None: `extent` rows each
    valid: Any  # [groups]: rows that count of `extent`; None: all
    rows: Any  # [n, width], out; None: they may be read where they are
    offsets: Any  # out, as the next two
    counts: Any
    segments: Any
    groups: Any
    extent: Any
    stride_group: Any  # None: packed
    stride_row: Any
    stride_column: Any


class Masks(NamedTuple):
    """Where the dropout masks of a block come from: numbers in the whole batch, and what a word must reach."""

    first_group: Any
    first_segment: Any
    step: Any
    seed_low: Any  # 32 bits each, as signed numbers
    seed_high: Any
    threshold: Any  # of the upper 24 bits
    scale: Any  # of what is kept
    drops: Any
    groups_are_images: Any
