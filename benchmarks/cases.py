"""What is measured: batches by name, with captions as long as real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

HISTOGRAM = Path(__file__).with_name("caption_lengths.json")


@dataclass(frozen=True)
class Case:
    """A batch of I images and C captions; letters of the glossary in words."""

    name: str
    images: int  # I
    captions: int  # C
    regions: int  # R
    width: int  # D

    @property
    def word_counts(self) -> list[int]:  # [C]
        """Longest first, as a batch is sorted for training."""
        return word_counts(self.captions)


def _square(batch: int) -> Case:
    return Case(f"b{batch}", batch, batch, regions=36, width=1024)


SIZES = (32, 128, 512, 1024, 2048, 4096, 8192, 16384)
CASES = {case.name: case for case in (Case("tiny", 8, 8, 5, 64), *map(_square, SIZES))}
"""``tiny`` shows that everything runs and measures nothing; the others are batches of SCAN and its kin."""

DEFAULT_CASES = {"cpu": ("b32", "b128"), "cuda": tuple(f"b{size}" for size in SIZES if size >= 128)}
"""What a run without ``--case`` takes; on a CPU b512 is minutes for every method, so it is asked for by name."""


def caption_lengths() -> dict[int, int]:
    """The committed histogram: words of a caption (with start and end) -> captions that have as many, ascending."""
    lengths = json.loads(HISTOGRAM.read_text(encoding="utf-8"))
    return {int(words): int(captions) for words, captions in lengths.items()}


def word_counts(captions: int) -> list[int]:
    """``captions`` word counts that represent the histogram, longest first.

    They are its quantiles at (c + 1/2) / C and not draws: the mean is that of the histogram at every C, and a run
    depends neither on a seed nor on the generator of a library's version.
    """
    lengths = caption_lengths()
    totals = list(accumulate(lengths.values()))
    counts = []
    for c in range(captions):
        place = (c + 0.5) / captions * totals[-1]
        counts.append(next(words for words, total in zip(lengths, totals, strict=True) if place < total))
    return counts[::-1]
