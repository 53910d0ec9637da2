"""How each op's work is planned, one module an op: ``on_cpu`` and ``on_gpu`` turn a batch into a :class:`Plan`.

Pure arithmetic, in C++ with the tile choice of the native floor; :func:`itm_kernels.plan` is the way in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
        Queries in a tile of the epilogue, by direction (on a CPU more where one query segment is longer; on a GPU of
        the last phase, and 0 where queries are taken one by one).
    launches
        Library products and kernels of all phases; of ops that learn on a GPU a few too many where a later block is
        larger than the first.
    workspace_bytes
        Most memory that lives beside inputs, gradients and scores.
    flops
        Of the library products; a multiply-add counts 2.
    useful_fraction
        Share of that arithmetic, on a GPU of the rows that the epilogue computes, that is not padding.
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


@dataclass(frozen=True)
class PlannedBatch:
    """What a plan is made for: I images with R regions against captions of these lengths, width D."""

    images: int
    regions: int
    word_counts: Tensor  # [C]
    width: int
    options: Any  # the op's record of options
    dtype: torch.dtype
    workspace_bytes: int
    similarity_width: int = 0
    """S; 0 for an op that has none."""

    @property
    def longest(self) -> int:
        """Words of the longest caption; 1 without captions."""
        return int(self.word_counts.max()) if self.word_counts.numel() else 1


def blocks_of(plans: dict[str, Any]) -> dict[str, Blocks]:
    """The cuts of plans by phase."""
    return {name: Blocks(tuple(p.image_bounds), tuple(p.caption_bounds)) for name, p in plans.items()}


def chosen_options(op: str, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Defaults of an op, overridden; ``TypeError`` on a name that it does not have."""
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise TypeError(f"plan: {op} has no option {', '.join(unknown)}; it has {', '.join(defaults)}")
    return {**defaults, **given}
