"""Blocks, tiles and launches of the Triton scores, as pure functions of shape: the plan, without running it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.triton import fused_plan
from itm_kernels.triton.configurations import Table, table

# Tiles that only stream memory: wide along keys, which are contiguous, and as deep as most captions.
NORM_QUERIES, NORM_KEYS, NORM_WARPS = 16, 128, 4
AGGREGATE_SEGMENTS, AGGREGATE_QUERIES = 16, 16
SUM_GROUPS, SUM_QUERIES = 16, 64
GRAM_KEYS, GRAM_WIDTH, GRAM_WARPS = 64, 32, 8
GRADIENT_KEYS, GRADIENT_WARPS = 32, 8
PACK_ROWS, NORM_WIDTH = 16, 256
STREAMED_KEYS = 32
# Queries of one step of dG, whose sums stand in registers beside the weights of these.
GRAM_QUERIES = 32
# A pair of both directions: words of most captions, regions of most images.
PAIR_QUERIES, PAIR_KEYS, PAIR_WARPS = 16, 64, 8
PART_ENTRIES = 1024
# A dot takes 16 columns or more.
LEAST_COLUMNS = 16
# float32 planes of a query's state against a key group (kernels.words): forward, backward.
PLANES = {False: 3, True: 7}
# The caching allocator hands out multiples of 512 bytes and rounds large blocks up to 2 MiB: part of the bound is left
# to it, and to the tables of a block (offsets, segments), which are small and not counted one by one.
SLACK = 0.9
# Bytes a GPU moves in the time of one launch (about 4 us at 4 TB/s): what a block costs however small it is.
BYTES_PER_LAUNCH = 1 << 24
# Rows of a block: 128 strides of this length stay within 32 bits (kernels.words.within).
LARGEST_SIDE = 1 << 23


@dataclass(frozen=True)
class Tiles:
    """How the key groups of a launch meet queries: one or both directions, in the order t2i, i2t."""

    classes: tuple[tuple[tuple[int, int, int], ...], ...]  # (floor, main, rest): floor + 1 to main + rest keys, held
    streamed: tuple[int, ...]  # groups of more keys are walked in chunks; -1: there are none
    block_q: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """As the kernels name them."""
        floors, mains, rests = (tuple(tuple(c[at] for c in held) for held in self.classes) for at in range(3))
        columns = {"FLOORS": floors, "MAINS": mains, "RESTS": rests, "STREAMED": self.streamed}
        return columns | {"BLOCK_Q": self.block_q, "BLOCK_K": STREAMED_KEYS}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def columns(self, direction: int, keys: int) -> int:
        """Columns that a group of so many keys costs."""
        for floor, main, rest in self.classes[direction]:
            if floor < keys <= main + rest:
                return main + rest
        return -(-keys // STREAMED_KEYS) * STREAMED_KEYS


@dataclass(frozen=True)
class ScorePlan:
    """What a call does, without doing it."""

    route: str
    image_bounds: tuple[int, ...]
    caption_bounds: tuple[int, ...]
    tiles: dict[str, Tiles]  # by kernel
    launches: int
    workspace_bytes: int
    flops: int
    useful_fraction: float  # of the arithmetic, and of the rows of products and tiles
    useful_keys: float  # of the key columns of tiles
    reason: str
    fused: fused_plan.Tile | None = None  # of the route that keeps products on the chip

    @property
    def image_blocks(self) -> list[tuple[int, int]]:
        return list(pairwise(self.image_bounds))

    @property
    def caption_blocks(self) -> list[tuple[int, int]]:
        return list(pairwise(self.caption_bounds))


def key_columns(keys: int) -> tuple[int, int]:
    """A group of ``keys`` as two powers of two, or one: 36 is 32 + 16 and not 64, 50 is 64."""
    main = max(1 << (keys.bit_length() - 1), LEAST_COLUMNS)
    if main >= keys:
        return main, 0
    rest = max(1 << (keys - main - 1).bit_length(), LEAST_COLUMNS)
    return (main, rest) if rest < main else (2 * main, 0)


CLASSES = (16, 32, 48, 64, 80)
"""Key columns that tiles may hold. Captions as key groups differ: a program takes the class of its group, and 15 words
cost 16 columns."""

BEYOND = 1 << 20
"""Stands for all larger groups."""


def class_of(keys: int) -> int:
    """Smallest class that holds a group."""
    return next((columns for columns in CLASSES if keys <= columns), BEYOND)


def choose_tiles(kernel: str, present: Sequence[Iterable[int]], element_bytes: int, arch: Table) -> Tiles:
    """The classes of each direction: held while accumulators and Gram matrix fit, streamed beyond.

    The largest class of a launch decides on its warps: registers are those of the largest anyway.
    """
    most = arch.largest(kernel, element_bytes)
    held = [sorted(columns for columns in classes if columns <= most) for classes in present]
    beyond = [max(classes) > most for classes in present]
    chosen = arch.find(kernel, most if any(beyond) else max(max(columns) for columns in held), element_bytes)
    assert chosen is not None
    floors = dict(zip(CLASSES, (0, *CLASSES), strict=False))
    return Tiles(
        classes=tuple(tuple((floors[c], *key_columns(c)) for c in columns) for columns in held),
        streamed=tuple(most if past else -1 for past in beyond),
        block_q=chosen.block_q,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def splits(tiles: int, groups: int, programs: int, bytes_per_part: int = 0, budget: int = 0) -> int:
    """Runs that the query tiles are cut into, so that groups x runs fill the machine and parts of dG stay in budget."""
    wanted = min(tiles, -(-programs // groups))
    if bytes_per_part:
        wanted = min(wanted, budget // max(groups * bytes_per_part, 1))
    return max(wanted, 1)


def gram_budget(workspace_bytes: int) -> int:
    """Parts of dG that are added up afterwards: a sixteenth of the bound."""
    return workspace_bytes // 16


@dataclass(frozen=True)
class Shape:
    """What the memory of a block depends on."""

    width: int
    element_bytes: int
    options: ScoreOptions
    backward: bool
    copies_regions: bool
    copies_words: bool
    workspace_bytes: int

    def block_bytes(self, images: int, rows: int, most_rows: int, captions: int, words: int, most_words: int) -> int:
        """Everything that lives while a block of images x captions is worked on."""
        element, width = self.element_bytes, self.width
        t2i, i2t = self.options.t2i, self.options.i2t
        norm = self.options.raw_feature_norm
        tables = 0 if norm in ("clipped", "no_norm") else 8 if norm == "softmax" else 4
        # S; its gradient through logits and beside them, of either direction. dS takes the place of the latter.
        buffers = 1 if not self.backward else 1 + 2 * (t2i + i2t)
        total = buffers * rows * words * element
        planes = 4 * PLANES[self.backward]
        total += captions * rows * tables + images * words * planes if t2i else 0
        total += images * words * tables + captions * rows * planes if i2t else 0
        total += (self.copies_regions * rows + self.copies_words * words) * width * element
        gram = (images * most_rows**2 if t2i else 0) + (captions * most_words**2 if i2t else 0)
        total += 4 * gram + 8 * 4 * (rows + words)
        if self.backward:
            total += 8 * gram + gram_budget(self.workspace_bytes)
            total += 4 * width * (rows + words)  # products with dS, before they are added where they belong
        return total


@dataclass(frozen=True)
class FusedShape(Shape):
    """What the memory of a block depends on where products stay on the chip."""

    def block_bytes(self, images: int, rows: int, most_rows: int, captions: int, words: int, most_words: int) -> int:
        """Everything that lives while a block of images x captions is worked on."""
        total = 4 * images * words * (2 if self.options.peak_weight else 1)
        total += (self.copies_regions * rows + self.copies_words * words) * self.width * self.element_bytes
        # Beside the tables of rows: of captions, and of the tiles.
        return total + 4 * images * most_rows**2 + 8 * 4 * (rows + words) + 8 * 4 * captions


def _cut(bounds: Sequence[int], blocks: int) -> list[int]:
    """Groups in order, cut into about ``blocks`` runs of as many rows: no sliver at the end."""
    groups = len(bounds) - 1
    if blocks >= groups:
        return list(range(groups + 1))
    share = -(-bounds[-1] // blocks)
    cuts = [0]
    while cuts[-1] < groups:
        reach = bisect_right(bounds, share * len(cuts)) - 1
        cuts.append(min(max(reach, cuts[-1] + 1), groups))
    return cuts


def choose_blocks(
    region_bounds: Sequence[int], word_bounds: Sequence[int], shape: Shape
) -> tuple[list[int], list[int], int]:
    """Image bounds, caption bounds and the workspace of the largest block.

    Tries more and more caption blocks, each with the most images that fit, and takes what moves the fewest bytes:
    regions (and in the backward their float32 gradients) pass once a caption block, words once, and every block pays
    its launches. Blocks of images alone would let the gradient of all words pass once an image block.
    """
    images, captions = len(region_bounds) - 1, len(word_bounds) - 1
    regions = [b - a for a, b in pairwise(region_bounds)]
    words = [b - a for a, b in pairwise(word_bounds)]
    most_rows, most_words = max(regions), max(words)
    bound = int(shape.workspace_bytes * SLACK)
    best: tuple[tuple[int, int], list[int], list[int], int] | None = None
    wanted = -(-word_bounds[-1] // LARGEST_SIDE)
    while True:
        caption_cuts = _cut(word_bounds, wanted)
        spans = [(b - a, word_bounds[b] - word_bounds[a]) for a, b in pairwise(caption_cuts)]
        widest_captions, widest_words = max(s[0] for s in spans), max(s[1] for s in spans)

        def size(count: int, rows: int, captions: int = widest_captions, words: int = widest_words) -> int:
            return shape.block_bytes(count, rows, most_rows, captions, words, most_words)

        # The most images whose block fits, by rows of the largest image.
        fits, over = 0, min(images, LARGEST_SIDE // most_rows) + 1
        while over - fits > 1:
            middle = (fits + over) // 2
            if size(middle, min(middle * most_rows, region_bounds[-1])) <= bound:
                fits = middle
            else:
                over = middle
        step = max(fits, 1)
        blocks = -(-images // step)
        step = -(-images // blocks)  # even blocks: no sliver at the end
        passes = len(spans)
        moved = shape.width * shape.element_bytes * (passes * region_bounds[-1] + blocks * word_bounds[-1])
        if shape.backward:
            moved += 8 * shape.width * (passes * region_bounds[-1] + blocks * word_bounds[-1])
        used = size(step, min(step * most_rows, region_bounds[-1]))
        # What fits comes first; where nothing does, the smallest.
        cost = (1, used) if used > bound else (0, moved + passes * blocks * 12 * BYTES_PER_LAUNCH)
        if best is None or cost < best[0]:
            image_cuts = [*range(0, images, step), images]
            best = (cost, image_cuts, caption_cuts, used)
        if wanted >= captions:
            break
        wanted = min(wanted + max(wanted // 2, 1), captions)  # 1, 2, 3, 4, 6, 9, ...
    return best[1], best[2], best[3]


KNOWN = {"t2i": True, "i2t": True}


def plan_scores(
    region_bounds: Sequence[int],  # [I + 1]
    word_bounds: Sequence[int],  # [C + 1]
    width: int,
    *,
    options: ScoreOptions,
    element_bytes: int,
    backward: bool,
    arch: str,
    workspace_bytes: int,
    copies_regions: bool = False,
    copies_words: bool = True,
    known: dict[str, bool] = KNOWN,
    useful_rows: float = 1.0,
) -> ScorePlan:
    """Plan one phase of the scores on a GPU of architecture ``arch``.

    ``known`` says of each direction's keys whether their counts are on the host. Where they are not, bounds are those
    of the padding, and ``useful_rows`` is the fraction of rows that count, if the caller knows it.
    """
    chosen = table(arch)
    memory = (copies_regions, copies_words, workspace_bytes)
    why_not_fused = fused_plan.why_not(
        region_bounds, word_bounds, options=options, element_bytes=element_bytes, backward=backward, arch=chosen
    )
    if why_not_fused is None:
        fused = FusedShape(width, element_bytes, options, backward, *memory)
        return _fused_plan(region_bounds, word_bounds, fused, chosen, known=known, useful_rows=useful_rows)
    shape = Shape(width, element_bytes, options, backward, *memory)
    image_cuts, caption_cuts, used = choose_blocks(region_bounds, word_bounds, shape)
    groups = {"t2i": region_bounds, "i2t": word_bounds}
    directions = [name for name, on in (("t2i", options.t2i), ("i2t", options.i2t)) if on]
    counts = {name: [b - a for a, b in pairwise(groups[name])] for name in directions}
    present = [present_classes(counts[name], known[name]) for name in directions]
    tiles = {name: choose_tiles(name, present, element_bytes, chosen) for name in kernels(backward)}
    attend = tiles["attend"]
    rows, words = region_bounds[-1], word_bounds[-1]
    fractions, needed, done = [], rows * words * width, rows * words * width
    for at, name in enumerate(directions):
        bounds, cuts = (word_bounds, caption_cuts) if name == "t2i" else (region_bounds, image_cuts)
        queries = [bounds[b] - bounds[a] for a, b in pairwise(cuts)]
        walked = sum(-(-q // attend.block_q) * attend.block_q for q in queries)
        fractions.append(sum(queries) / walked)
        # Beside the products: weights times the Gram matrix, a square of the keys for each query and group.
        needed += sum(queries) * sum(keys * keys for keys in counts[name])
        done += walked * sum(attend.columns(at, keys) ** 2 for keys in counts[name])
    fractions.append(needed / done)
    products = 3 if backward else 1  # S; backward: S again, dV, dT
    return ScorePlan(
        route="triton-blocked",
        image_bounds=tuple(image_cuts),
        caption_bounds=tuple(caption_cuts),
        tiles=tiles,
        launches=launches(
            len(directions), len(image_cuts) - 1, len(caption_cuts) - 1, element_bytes, backward, copies_regions
        ),
        workspace_bytes=used,
        flops=2 * products * rows * words * width,
        useful_fraction=min(fractions) * useful_rows,
        useful_keys=min(
            sum(counts[name]) / sum(attend.columns(at, keys) for keys in counts[name])
            for at, name in enumerate(directions)
        ),
        reason=(
            f"library products in blocks, Triton epilogues; not fused: {why_not_fused}; "
            + "; ".join(f"{name} {describe(attend, at)}" for at, name in enumerate(directions))
            + ("" if all(known.values()) else "; counts are on the device alone, every group costs its padding")
            + f"; configurations of {chosen.arch}"
        ),
    )


def _fused_plan(
    region_bounds: Sequence[int], word_bounds: Sequence[int], shape: FusedShape, chosen: Table, *,
    known: dict[str, bool], useful_rows: float,
) -> ScorePlan:  # fmt: skip
    """The plan of a forward whose products stay on the chip."""
    most = max(b - a for a, b in pairwise(region_bounds))
    tile = fused_plan.tile(most, chosen.arch)
    image_cuts, caption_cuts, used = choose_blocks(region_bounds, word_bounds, shape)
    columns = sum(-(-(b - a) // tile.images) for a, b in pairwise(image_cuts)) * tile.images * (tile.main + tile.rest)
    blocks = (len(image_cuts) - 1) * (len(caption_cuts) - 1)
    return ScorePlan(
        route="triton-fused",
        image_bounds=tuple(image_cuts),
        caption_bounds=tuple(caption_cuts),
        tiles={},
        # Gram matrices, cosines, scores; of captions rows and tiles, of images rows where they are copied.
        launches=3 * blocks + 2 * (len(caption_cuts) - 1) + shape.copies_regions * (blocks - len(caption_cuts) + 1),
        workspace_bytes=used,
        flops=2 * region_bounds[-1] * word_bounds[-1] * shape.width,
        useful_fraction=fused_plan.useful_rows(word_bounds, caption_cuts, tile.rows) * useful_rows,
        useful_keys=region_bounds[-1] / columns,
        reason=(
            f"products stay on the chip: tiles of whole captions, {tile.rows} words, against {tile.images} images of "
            + (f"{tile.main} + {tile.rest}" if tile.rest else f"{tile.main}")
            + " columns"
            + ("" if all(known.values()) else "; counts are on the device alone, every group costs its padding")
            + f"; tiles of {chosen.arch}"
        ),
        fused=tile,
    )


def kernels(backward: bool) -> tuple[str, ...]:
    """Kernels over key groups of a phase."""
    return ("attend", "attend_backward") if backward else ("attend",)


def present_classes(counts: Iterable[int], known: bool) -> list[int]:
    """Classes of key groups to launch for; where counts are on the device alone, all up to the padded size."""
    present = {class_of(count) for count in counts}
    return sorted(present if known else {c for c in (*CLASSES, BEYOND) if c <= max(present)})


def describe(tiles: Tiles, direction: int) -> str:
    """Tiles in words."""
    parts = [f"{main} + {rest}" if rest else f"{main}" for _, main, rest in tiles.classes[direction]]
    if tiles.streamed[direction] >= 0:
        parts.append(f"chunks of {STREAMED_KEYS} (more than {tiles.streamed[direction]} keys)")
    return "keys as " + ", ".join(parts)


def launches(
    directions: int, image_blocks: int, caption_blocks: int, element_bytes: int, backward: bool, copies_regions: bool
) -> int:
    """Kernels and library products launched (one fewer a block of captions where these are whole)."""
    blocks = image_blocks * caption_blocks
    # Rows and tables of a side: of captions and of the images they meet first at once.
    total = blocks if copies_regions else caption_blocks
    if not backward:
        # The product; Gram matrices, norms and factors; attention; of each direction the scores.
        return total + blocks * (3 + directions)
    # The same but for the scores; gradients of the aggregate, of the attention, of the factors; two products; all that
    # comes back to the rows. Once: gradients are zero at first, and at last in the type of the inputs.
    return total + blocks * 9 + 2 + (2 if element_bytes == 2 else 0)
