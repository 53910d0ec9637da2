"""The most dynamic shared memory that plans give the kernels of a file: one function a file, of the file's name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from includes import files_of
from itm_kernels import native

CSRC = Path(__file__).parents[2] / "csrc"


COUNTS = [*range(1, 130), 144, 196, 256, 400, 576, 600]
"""Regions of an image, words of a caption."""


def cross_attention_scores(limit: int) -> int:
    options = itertools.product((2, 4), *3 * [(False, True)])
    return max(
        native.host()
        .scores_launch(
            groups=1024,
            most_keys=keys,
            rows=16 * queries,
            most_queries=queries,
            element_bytes=element_bytes,
            uniform=uniform,
            backward=backward,
            softmax=softmax,
            shared_limit=limit,
            multiprocessors=132,
        )
        .shared_bytes
        for element_bytes, uniform, backward, softmax in options
        for keys, queries in itertools.product(COUNTS, COUNTS)
    )


def max_similarity_scores(limit: int) -> int:
    return max(
        native.host().maxima_launch(groups=1024, rows=16 * n, most_queries=n, multiprocessors=132).shared_bytes
        for n in COUNTS
    )


def fused_scores(limit: int) -> int:
    # One size, of operands, products and tables; the table of captions takes less: 4 bytes a word of a block.
    return int(native.host().FusedSizes.shared_bytes)


def alignment_vectors(limit: int) -> int:
    # kStagedBytes of csrc/cuda/pair_attention_kernel.cuh: a pair that needs more stays in memory.
    return 48 * 1024


def aggregation_regulator(limit: int) -> int:
    # One float32 vector of the similarity width, which is 256 as published.
    return 4 * 4096


def attention_filtration(limit: int) -> int:
    # kMostNodeBytes of csrc/common/node_tiles.h: pairs that need more are refused.
    return 99 * 1024


def similarity_graph(limit: int) -> int:
    return attention_filtration(limit)


def asked_by(source: str, limit: int) -> int:
    """Bytes by the plans of the op of that name; 0 for files whose kernels use none.

    Raises
    ------
    KeyError
        The file's kernels use dynamic shared memory, and nothing here says how much.
    """
    path = CSRC / source
    # The words of kernels are everywhere; where they are said counts.
    if not any("shared_memory()" in file.read_text() for file in files_of(path) if file.name != "words.h"):
        return 0
    plan: Callable[[int], int] = globals()[path.stem]
    return plan(limit)
