"""Route, tiles and memory of the scores whose products stay on the chip, as pure functions of shape."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.triton.configurations import Table

SIZES = (16, 32, 36, 48, 64)
"""Regions of an image that a tile may hold, as 16, 32, 32 + 4, 32 + 16 and 64 columns."""
MOST_REGIONS = SIZES[-1]
LEAST_USEFUL = 0.9
"""Share of the rows of tiles that must be words."""
SEGMENTS = 16
"""Captions of a tile, the most: rows of the smallest matrix instruction, which sums over them."""


@dataclass(frozen=True)
class Tile:
    """How the kernel is launched."""

    rows: int  # of whole captions
    images: int
    main: int  # columns of an image, and how many more
    rest: int
    width: int  # slice of D
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernel names them."""
        return {
            "BLOCK_Q": self.rows, "BLOCK_S": SEGMENTS, "BLOCK_G": self.images, "MAIN": self.main, "REST": self.rest,
            "BLOCK_D": self.width,
        }  # fmt: skip

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# FLOP that a tile must do for each byte of rows it reads, to keep 0.4 of the tensor cores busy from the second-level
# cache: reckoned from rates (990 TFLOP/s and 5.5 TB/s on sm_90), as everything here not timed yet.
_LEAST_INTENSITY = {80: 27.0, 90: 72.0, 100: 90.0, 120: 27.0}

# By the most regions of an image; where four warps issue a product together (sm_90), where products stand in a memory
# of their own (sm_100), and where each warp issues its own out of registers. The largest that compile without spills,
# as everything of an image's cosines stands in registers beside the products; not timed yet.
_WARPGROUP = {16: (128, 8), 32: (128, 4), 36: (128, 2), 48: (128, 2), 64: (128, 1)}
_TENSOR_MEMORY = {16: (128, 8), 32: (128, 4), 36: (128, 4), 48: (128, 4), 64: (128, 1)}
_WARP = {16: (128, 4), 32: (128, 2), 36: (128, 2), 48: (64, 2), 64: (128, 1)}


def tile(regions: int, arch: str) -> Tile:
    """Tile for images of up to ``regions`` regions on an architecture (a letter behind its number does not matter)."""
    size = next(s for s in SIZES if regions <= s)
    main = 16 if size == 16 else 64 if size == 64 else 32
    number = int("".join(c for c in arch if c.isdigit()))
    rows, images = (_WARPGROUP if 90 <= number < 100 else _TENSOR_MEMORY if 100 <= number < 120 else _WARP)[size]
    return Tile(rows, images, main, size - main, width=64, warps=8, stages=3)


def least_intensity(arch: str) -> float:
    """What products on the chip must do for a byte on an architecture, or the nearest older one."""
    number = int("".join(c for c in arch if c.isdigit()))
    return _LEAST_INTENSITY[max((known for known in _LEAST_INTENSITY if known <= number), default=80)]


def tile_bounds(word_bounds: Sequence[int], rows: int) -> list[int]:
    """Captions cut into tiles: each as many as ``rows`` rows and SEGMENTS captions hold. The device cuts alike."""
    cuts = [0]
    while cuts[-1] < len(word_bounds) - 1:
        reach = bisect_right(word_bounds, word_bounds[cuts[-1]] + rows) - 1
        cuts.append(min(reach, cuts[-1] + SEGMENTS))
    return cuts


def useful_rows(word_bounds: Sequence[int], cuts: Sequence[int], rows: int) -> float:
    """Share of the rows of tiles that are words, where blocks of captions begin at ``cuts``."""
    blocks = ([bound - word_bounds[a] for bound in word_bounds[a : b + 1]] for a, b in pairwise(cuts))
    return word_bounds[-1] / (rows * sum(len(tile_bounds(bounds, rows)) - 1 for bounds in blocks))


def why_not(
    region_bounds: Sequence[int],
    word_bounds: Sequence[int],
    *,
    options: ScoreOptions,
    element_bytes: int,
    backward: bool,
    arch: Table,
) -> str | None:
    """Why products go through memory, or None."""
    if backward:
        return "the backward needs products more than once"
    if options.i2t:
        return "words as keys need sums over words and tiles of words at once"
    if options.raw_feature_norm == "softmax":
        return "raw_feature_norm='softmax' needs every caption's largest product first"
    if element_bytes != 2:
        return "float32 products are the library's"
    regions, words = (max(b - a for a, b in pairwise(bounds)) for bounds in (region_bounds, word_bounds))
    if regions > MOST_REGIONS:
        return f"an image has {regions} regions, a tile holds {MOST_REGIONS}"
    chosen = tile(regions, arch.arch)
    if words > chosen.rows:
        return f"a caption has {words} words, a tile holds {chosen.rows}"
    columns = chosen.images * regions
    intensity, least = chosen.rows * columns / (chosen.rows + columns), least_intensity(arch.arch)
    if intensity < least:
        return (
            f"tiles of {chosen.rows} words x {columns} regions do {intensity:.0f} FLOP a byte, {least:.0f} are needed"
        )
    if (useful := useful_rows(word_bounds, (0, len(word_bounds) - 1), chosen.rows)) < LEAST_USEFUL:
        return f"{useful:.2f} of the rows of its tiles are words, {LEAST_USEFUL} are needed"
    # A table's programs fill the machine sixteen times over.
    bundles = -(-(len(region_bounds) - 1) // chosen.images)
    programs, wanted = (len(tile_bounds(word_bounds, chosen.rows)) - 1) * bundles, arch.programs // 16
    if programs < wanted:
        return f"{programs} tiles do not fill {wanted} multiprocessors"
    return None
