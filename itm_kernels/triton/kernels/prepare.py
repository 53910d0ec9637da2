# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""What attention needs beside the products: Gram matrices and norms of rows, and a factor a key and segment.

    G = K K^T      |q|      factor = lambda / (norm_segment(x) + eps)

Owner: a program owns a block of one group's G (and the norms of its rows), some rows' norms, or one segment and some
keys of a direction. Read: rows, products. Written once; float32, no atomics. The trick is that these do not depend on
one another: they are one launch, for both sides and both directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments, forward_types, listed
from itm_kernels.triton.directions import Direction, Rows
from itm_kernels.triton.kernels.feature_norm import feature_norms
from itm_kernels.triton.kernels.gram import blocks_of_rows, describe


@triton.jit
def prepare(
    sides, directions, width, lambda_softmax, SIDES: tl.constexpr, WAYS: tl.constexpr,
    NORM: tl.constexpr, CLIPPED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for i in tl.static_range(SIDES):
        programs = blocks_of_rows(sides[i], BLOCK_R)
        if (program >= 0) & (program < programs):
            describe(sides[i], program, width, PRECISION, BLOCK_R, BLOCK_D)
        program -= programs
    for i in tl.static_range(WAYS):
        programs = directions[i].num_segments * tl.cdiv(directions[i].num_keys, BLOCK_K)
        if (program >= 0) & (program < programs):
            feature_norms(directions[i], program, lambda_softmax, NORM, CLIPPED, BLOCK_Q, BLOCK_K)
        program -= programs


def _builds() -> list[Build]:
    builds = []
    for element, (precision, _) in ARGUMENT_TYPES.items():
        constants = {"NORM": "l2norm", "CLIPPED": True, "PRECISION": precision, "BLOCK_R": tiles.GRAM_KEYS}
        constants |= {"BLOCK_D": tiles.GRAM_WIDTH, "BLOCK_Q": tiles.NORM_QUERIES, "BLOCK_K": tiles.NORM_KEYS}
        types = {"rows": f"*{element}", "offsets": "*i64", "counts": "*i64", "grams": "*fp32", "norms": "*fp32"}
        both = listed(Rows, types)
        keys, queries = listed(Rows, types, norms=None), listed(Rows, types, grams=None)
        attended = listed(Direction, forward_types(element), stride_key=1)
        for label, sides, directions in (
            ("one", (keys, queries), (attended,)),
            ("both", (both,), (attended, listed(Direction, forward_types(element), stride_query=1))),
        ):
            chosen = constants | {"SIDES": len(sides), "WAYS": len(directions)}
            signature = arguments(prepare, {"sides": sides, "directions": directions}, **chosen)
            builds.append(Build(prepare, signature, chosen, num_warps=tiles.GRAM_WARPS, labels=(element, label)))
    return builds


AHEAD_OF_TIME = _builds()
