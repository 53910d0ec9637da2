"""Tiles, blocks and launches of hard assignment in Triton, as pure functions of shape: the plan, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import pairwise
from typing import cast

from itm_kernels.triton import tiles

KEYS = 4
"""Keys of a slot in one step of a kernel: 36 and 100 keys are whole steps, 49 are 52."""
RAGGED_GROUPS = 5
"""Groups of unlike size that a slot walks, one after another, on average: fewer make more programs, more waste less."""
AGGREGATE_SEGMENTS, AGGREGATE_QUERIES = 16, 16


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched."""

    queries: int
    groups: int  # slots of a bundle: KEYS times as many columns
    width: int  # slice of D
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_Q": self.queries, "BLOCK_G": self.groups, "BLOCK_D": self.width}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# By kernel and bytes of an element; where four warps issue a product together (sm_90, sm_100), and where each issues
# its own out of registers. The largest that compile without spills; not timed yet. `largest` leaves its accumulator
# once in D; the gradients hold dz and the arg-max of a tile beside it; float32 is three products of its parts.
_WARPGROUP = {
    ("largest", 2): Tile(64, 32, 64, warps=8, stages=3),
    ("largest", 4): Tile(128, 16, 32, warps=8, stages=2),
    ("queries_gradient", 2): Tile(64, 32, 128, warps=8, stages=1),
    ("queries_gradient", 4): Tile(64, 16, 64, warps=8, stages=1),
    ("keys_gradient", 2): Tile(64, 16, 128, warps=8, stages=2),
    ("keys_gradient", 4): Tile(32, 16, 64, warps=8, stages=1),
}
_WARP = {
    ("largest", 2): Tile(128, 16, 64, warps=8, stages=3),
    ("largest", 4): Tile(64, 8, 32, warps=4, stages=2),
    ("queries_gradient", 2): Tile(64, 16, 128, warps=8, stages=1),
    ("queries_gradient", 4): Tile(32, 16, 64, warps=8, stages=1),
    ("keys_gradient", 2): Tile(32, 16, 128, warps=8, stages=2),
    ("keys_gradient", 4): Tile(32, 16, 32, warps=8, stages=1),
}


def tile(kernel: str, element_bytes: int, arch: str) -> Tile:
    """Tile of a kernel on an architecture (``"sm_90"``; a letter behind it does not matter)."""
    number = int("".join(c for c in arch if c.isdigit()))
    return (_WARPGROUP if 90 <= number < 120 else _WARP)[kernel, element_bytes]


@dataclass(frozen=True)
class Deal:
    """How groups of keys are dealt to the slots of bundles: the largest first, each to the slot that has the least.

    Groups stand by size. The first bundle takes what is left over by the others: there sizes differ most, and many
    small groups even the slots out.
    """

    slots: int  # of a bundle
    share: int  # groups of a bundle, on average of a slot
    bundles: int

    @property
    def most(self) -> int:
        """Groups of a bundle, rounded up to a power of two."""
        return 1 << (2 * self.slots * self.share - 1).bit_length()

    def bundle(self, number: int, groups: int) -> tuple[int, int]:
        """Where a bundle begins and ends among the groups by size."""
        last = groups - (self.bundles - 1 - number) * self.slots * self.share
        return (last - self.slots * self.share if number else 0), last


def deal(counts: Sequence[int], slots: int) -> Deal:
    """Groups of like size: one a slot, which spares nothing and leaves more programs."""
    share = 1 if len(set(counts)) <= 1 else RAGGED_GROUPS
    return Deal(slots, share, max(len(counts) // (slots * share), 1))


def useful_keys(counts: Sequence[int], element_bytes: int, arch: str) -> float:
    """Share of the key columns of ``largest`` that are keys."""
    if not counts:
        return 1.0
    ordered, chosen, walked = sorted(counts, reverse=True), deal(counts, tile("largest", element_bytes, arch).groups), 0
    for number in range(chosen.bundles):
        first, last = chosen.bundle(number, len(counts))
        lengths = [0] * chosen.slots
        for count in ordered[first:last]:
            heapreplace(lengths, lengths[0] + count)
        walked += chosen.slots * -(-max(lengths) // KEYS) * KEYS
    return sum(ordered) / walked


@dataclass(frozen=True)
class MaximaShape:
    """What the memory of a block depends on."""

    width: int
    element_bytes: int
    t2i: bool
    backward: bool
    arg_max_kept: bool
    copies_regions: bool
    copies_words: bool
    direct_regions: bool  # gradients accumulate in place
    direct_words: bool
    workspace_bytes: int

    def block_bytes(self, images: int, rows: int, most_rows: int, captions: int, words: int, most_words: int) -> int:
        """Everything that lives while a block of images x captions is worked on."""
        entries = images * words if self.t2i else captions * rows
        total = 4 * entries  # the maxima, then their gradient in their place
        if self.backward and not self.arg_max_kept:
            total += 4 * entries
        total += (self.copies_regions * rows + self.copies_words * words) * self.width * self.element_bytes
        if self.backward:
            # What cannot accumulate in place is gathered, added to and put back.
            total += 4 * self.width * ((not self.direct_regions) * 2 * rows + (not self.direct_words) * 2 * words)
        # Tables: where rows are and whose, and the order in which keys are walked.
        return total + 8 * 4 * (rows + words)


def choose_blocks(
    region_bounds: Sequence[int], word_bounds: Sequence[int], shape: MaximaShape
) -> tuple[list[tuple[int, int]], list[tuple[int, int]], int]:
    """Blocks of images, blocks of captions, and the workspace of the largest block."""
    # It asks a shape for its bytes and numbers alone.
    images, captions, used = tiles.choose_blocks(region_bounds, word_bounds, cast(tiles.Shape, shape))
    return list(pairwise(images)), list(pairwise(captions)), used


def launches(shape: MaximaShape, linear: bool, blocks: int) -> int:
    """Kernels of a phase for whole images and packed captions; a ragged side adds a few a block."""
    rows = 1
    if not shape.backward:
        return blocks * (rows + 2 + 2)  # by size, dealt; the largest, aggregated
    made = 0 if linear and shape.arg_max_kept else 3
    return blocks * (rows + max(made, 1) + 3)
