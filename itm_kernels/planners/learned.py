"""Plans of the scorers that learn: their block loops are Python, so a plan goes through them and counts.

Launches are affine in the number of blocks, products in queries, keys and pairs: a few small rehearsals say all of a
batch of any size. Cuts are those that the floor itself makes of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from itm_kernels import native
from itm_kernels.native.cpu.pair_chunks import Chunks
from itm_kernels.native.cuda.machine import Machine
from itm_kernels.ops.parameters import SHAPES
from itm_kernels.pair_blocks.blocks import first_blocks
from itm_kernels.planners import Blocks, Plan, PlannedBatch
from itm_kernels.planners.rehearsal import Counted, rehearse, total

Cuts = list[tuple[int, int]]
TINY_WORKSPACE = 1  # every pair is a block of its own


@dataclass(frozen=True)
class Shapes:
    """Inputs without their values."""

    images: int
    regions: int
    word_counts: tuple[int, ...]  # [C]
    width: int
    dtype: torch.dtype
    device: str

    @property
    def captions(self) -> int:
        return len(self.word_counts)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Regions, padded words as models make them, counts on the host, offsets on the device."""
        longest = max(self.word_counts) + 1  # so that words are padded whatever the lengths
        counts = torch.tensor(self.word_counts)
        regions = self.zeros(self.images, self.regions, self.width)
        words = self.zeros(self.captions, longest, self.width)
        return regions, words, counts, self.zeros(self.captions + 1, dtype=torch.int64)

    def results(self) -> set[tuple[int, ...]]:
        """Shapes of scores and gradients, which are not workspace."""
        regions, words, *_ = self.sides() if self.device == "meta" else self._on_meta().sides()
        sides = {tuple(regions.shape), tuple(words.shape)}
        globals_ = {(self.images, self.width), (self.captions, self.width)}
        return sides | globals_ | {(self.images, self.captions), (2, self.captions)}

    def _on_meta(self) -> Shapes:
        return Shapes(self.images, self.regions, self.word_counts, self.width, self.dtype, "meta")


class ChunkCuts(NamedTuple):
    """How a call on the CPU is cut."""

    chunks: Chunks
    blocks: Cuts  # segments of queries
    keeps: list[bool]  # whether a first pass over a block keeps what a second one needs
    kept_bytes: int  # most that this takes


class Scorer(Hashable, Protocol):
    """What a planner says of its op; hashable, for what is counted once is not counted again."""

    @property
    def similarity_width(self) -> int:
        """S."""

    @property
    def t2i(self) -> bool:
        """Whether words are the queries."""

    def call(self, phase: str, shapes: Shapes, workspace_bytes: int) -> Callable[[], Any]:
        """One call of the native floor, on the CPU or (shapes on meta) as a GPU has it."""

    def results(self, shapes: Shapes) -> set[tuple[int, ...]]:
        """Shapes of the gradients of parameters."""

    def on_cpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> ChunkCuts:
        """How a call on the CPU is cut."""

    def keeps_on_gpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> bool:
        """Whether a pass over the images keeps what the next one needs."""


def parameters(
    parts: tuple[type, ...], steps: Sequence[int], sizes: dict[str, int], shapes: Shapes
) -> list[Tensor | None]:
    """Tensors of the stages in their order, each with so many steps; none where that is none."""
    made: list[Tensor | None] = []
    for part, count in zip(parts, steps, strict=True):
        letters = {**sizes, "steps": count, "D": shapes.width, "1": 1}
        for names in SHAPES[part]:
            made.append(shapes.zeros(*(letters[name] for name in names.split())) if count else None)
    return made


def shapes_of(batch: PlannedBatch, device: str) -> Shapes:
    return Shapes(batch.images, batch.regions, tuple(batch.word_counts.tolist()), batch.width, batch.dtype, device)


def on_cpu(scorer: Scorer, batch: PlannedBatch, phases: list[str], reason: str) -> Plan:
    """Chunk by chunk."""
    shapes = shapes_of(batch, "meta")
    blocks, launches, workspace, flops = {}, 0, 0, 0
    useful = 1.0
    if not shapes.images or not shapes.captions:
        return _nothing(phases)
    for phase in phases:
        chunks, query_cuts, keeps, kept_bytes = scorer.on_cpu(phase, shapes, batch.workspace_bytes)
        bounds = chunks.queries.bounds
        groups = len(chunks.keys.bounds) - 1
        sizes = [bounds[stop] - bounds[start] for start, stop in query_cuts]
        key_cuts = _steps(groups, chunks.groups_at_once(max(sizes)))
        blocks[phase] = _blocks(scorer.t2i, query_cuts, key_cuts)
        tiny = [_tiny(scorer, phase, shapes, few, keeps=False, device="cpu") for few in ((1, 1), (1, 2))]
        once = 2 * tiny[0].steps - tiny[1].steps
        launches += once
        for keeping in set(keeps):
            each = _tiny(scorer, phase, shapes, (1, 1), keeps=keeping, device="cpu").steps - once
            of_these = [size for size, kept in zip(sizes, keeps, strict=True) if kept == keeping]
            launches += each * sum(len(_steps(groups, chunks.groups_at_once(size))) for size in of_these)
        workspace = max(workspace, chunks.chunk_bytes + kept_bytes)
        flops += _flops(scorer, phase, shapes, query_cuts, keeps, device="cpu")
        if not scorer.t2i:  # keys of a chunk, alike in length, are padded to its longest
            lengths = sorted(shapes.word_counts)
            useful = sum(lengths) / sum((b - a) * lengths[b - 1] for a, b in key_cuts)
    return Plan("cpu-chunks", blocks, {}, launches, workspace, flops, useful, reason)


def on_gpu(scorer: Scorer, batch: PlannedBatch, phases: list[str], machine: Machine) -> Plan:
    """Block by block, on the meta device."""
    native.host()  # loads the library, whose schemas a rehearsal calls, or says why it is not there
    shapes = shapes_of(batch, "meta")
    blocks, launches, workspace, flops = {}, 0, 0, 0
    useful = 1.0
    if not shapes.images or not shapes.captions:
        return _nothing(phases)
    for phase in phases:
        call = scorer.call(phase, shapes, batch.workspace_bytes)
        counted: list[Counted] = []
        for queries, keys in ((1, 1), (1, 2), (2, 1)):
            with first_blocks(queries, keys) as first:
                counted.append(rehearse(call, "meta", but_for=shapes.results() | scorer.results(shapes)))
        query_cuts, key_cuts = first.all_blocks
        blocks[phase] = _blocks(scorer.t2i, query_cuts, key_cuts)
        launches += total([c.launches for c in counted], keys=len(key_cuts), queries=len(query_cuts))
        rows = _bounds(shapes, t2i=scorer.t2i)
        sizes = [rows[stop] - rows[start] for start, stop in query_cuts]
        keeps = [scorer.keeps_on_gpu(phase, shapes, batch.workspace_bytes)] * len(query_cuts)
        # A later block of queries may be larger than those that were gone through.
        peaks = [c.peak_bytes * max(sizes) // max(sizes[:n]) + 1 for c, n in zip(counted, (1, 1, 2), strict=True)]
        if keeps[0]:  # of every image, as long as a block of queries lasts; two blocks of images were gone through
            seen = key_cuts[min(1, len(key_cuts) - 1)][1]
            nodes = max(rows[stop] - rows[start] + stop - start for start, stop in query_cuts)
            # One more for the tables that are held meanwhile.
            peaks.append(peaks[1] + (shapes.images - seen + 1) * nodes * 4 * (scorer.similarity_width + 2))
        workspace = max(workspace, *peaks)
        flops += _flops(scorer, phase, shapes, query_cuts, keeps, device="meta")
        if not scorer.t2i:
            lengths = shapes.word_counts
            useful = sum(lengths) / sum((b - a) * max(lengths[a:b]) for a, b in key_cuts)
    reason = f"{machine.arch}: all stages of a block of pairs, library products around kernels"
    return Plan("cuda-pair-blocks", blocks, {}, launches, workspace, flops, useful, reason)


def _nothing(phases: list[str]) -> Plan:
    """Of a batch without pairs: no floor is asked."""
    return Plan("empty", {phase: Blocks((0,), (0,)) for phase in phases}, {}, 0, 0, 0, 1.0, "there is no pair")


def _steps(count: int, at_once: int) -> Cuts:
    return [(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def _bounds(shapes: Shapes, *, t2i: bool) -> list[int]:
    """Rows of queries."""
    lengths = shapes.word_counts if t2i else [shapes.regions] * shapes.images
    return [0, *accumulate(lengths)]


def _blocks(t2i: bool, queries: Cuts, keys: Cuts) -> Blocks:
    of_queries, of_keys = ((0, *(stop for _, stop in cuts)) for cuts in (queries, keys))
    return Blocks(of_keys, of_queries) if t2i else Blocks(of_queries, of_keys)


@lru_cache(maxsize=256)
def _of_small(scorer: Scorer, phase: str, small: Shapes, workspace_bytes: int) -> Counted:
    return rehearse(scorer.call(phase, small, workspace_bytes), small.device, but_for=small.results())


def _tiny(
    scorer: Scorer,
    phase: str,
    shapes: Shapes,
    sizes: tuple[int, int],  # segments of queries and groups of keys
    lengths: tuple[int, int] = (1, 1),  # of a segment, of a group
    *,
    keeps: bool,
    device: str,
) -> Counted:
    """A batch of few pairs, as wide as the real one; each pair a block of its own unless something is kept."""
    images, captions = sizes[::-1] if scorer.t2i else sizes
    regions, words = lengths[::-1] if scorer.t2i else lengths
    small = Shapes(images, regions, (words,) * captions, shapes.width, shapes.dtype, device)
    return _of_small(scorer, phase, small, 1 << 40 if keeps else TINY_WORKSPACE)


def _flops(scorer: Scorer, phase: str, shapes: Shapes, cuts: Cuts, keeps: list[bool], *, device: str) -> int:
    """Of all products: once, and for a pair of q queries and k keys ``c + a q + b q k + h q k^2``.

    Where no attended vector is formed its norm comes from Gram matrices: ``g k^2`` for a group of k keys in every block
    of queries, beside ``h``.
    """
    bounds = _bounds(shapes, t2i=scorer.t2i)
    groups = [shapes.regions] * shapes.images if scorer.t2i else list(shapes.word_counts)
    keys, squares = sum(groups), sum(k * k for k in groups)
    once = made = 0
    for keeping in set(keeps):
        one, longer, longest, wider, both, more = (
            _tiny(scorer, phase, shapes, *few, keeps=keeping, device=device).flops
            for few in (
                ((1, 1), (1, 1)),
                ((1, 1), (1, 2)),
                ((1, 1), (1, 3)),
                ((1, 1), (2, 1)),
                ((1, 1), (2, 2)),
                ((1, 2), (1, 1)),
            )
        )
        gh = (longest - 2 * longer + one) // 2
        b = longer - one - 3 * gh
        h = (both - wider - 2 * b) // 3 - gh
        g = gh - h
        a = wider - one - b - h
        c = more - one - a - b - gh
        once = one - c - a - b - gh
        for (start, stop), kept in zip(cuts, keeps, strict=True):
            if kept == keeping:
                rows = bounds[stop] - bounds[start]
                made += c * (stop - start) * len(groups) + g * squares
                made += rows * (a * len(groups) + b * keys + h * squares)
    return once + made
