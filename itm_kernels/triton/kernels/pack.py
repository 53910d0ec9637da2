# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Ragged groups as packed rows: the rows, where each group begins, how many count, and whose each is.

    out[offset_g + k] = vectors[g, k]

Owner: a program owns one group of one side. Read: rows that count, once. Never in memory: indices of rows. Nothing is
computed: the same bits always. The trick: what would be ten small launches (differences, searches, gathers) a block is
one, for both sides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.pair_blocks.records import Packing
from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments, listed


@triton.jit
def _pack_group(side, group, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    if side.bounds is None:
        first = group.to(tl.int64) * side.extent
        last = first + side.extent
    else:
        zero = tl.load(side.bounds)
        first = tl.load(side.bounds + group) - zero
        last = tl.load(side.bounds + group + 1) - zero
    extent = (last - first).to(tl.int32)
    count = extent
    if side.valid is not None:
        count = tl.minimum(tl.maximum(tl.load(side.valid + group).to(tl.int32), 1), extent)
    tl.store(side.offsets + group, first)
    tl.store(side.counts + group, count.to(tl.int64))
    if group == side.groups - 1:
        tl.store(side.offsets + group + 1, last)
    for start in range(0, extent, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        tl.store(side.segments + first + row, tl.where(row < count, group, -1), mask=row < extent)
        if side.rows is not None:
            source = side.vectors
            if side.stride_group is None:
                source += first * side.stride_row
            else:
                source += group.to(tl.int64) * side.stride_group
            for column in range(0, width, BLOCK_D):
                o_column = column + tl.arange(0, BLOCK_D)
                at = row.to(tl.int64)[:, None] * side.stride_row + o_column.to(tl.int64)[None, :] * side.stride_column
                m_column = (o_column < width)[None, :]
                x = tl.load(source + at, mask=(row < count)[:, None] & m_column, other=0.0)
                out = side.rows + first * width + row[:, None] * width + o_column[None, :]
                tl.store(out, x, mask=(row < extent)[:, None] & m_column)


@triton.jit
def pack(sides, width, SIDES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    program = tl.program_id(0)
    for i in tl.static_range(SIDES):
        if (program >= 0) & (program < sides[i].groups):
            _pack_group(sides[i], program, width, BLOCK_N, BLOCK_D)
        program -= sides[i].groups


def _builds() -> list[Build]:
    blocks = {"BLOCK_N": tiles.PACK_ROWS, "BLOCK_D": tiles.NORM_WIDTH}
    tables = {"offsets": "*i64", "counts": "*i64", "segments": "*i32"}
    builds = []
    for element in ARGUMENT_TYPES:
        rows = {"vectors": f"*{element}", "rows": f"*{element}"}
        ragged = listed(Packing, rows | tables | {"bounds": "*i64"}, valid=None, stride_column=1)
        masked = listed(Packing, rows | tables | {"valid": "*i64"}, bounds=None, stride_column=1)
        packed = listed(Packing, rows | tables | {"bounds": "*i64"}, valid=None, rows=None, stride_group=None)
        for label, sides in (("ragged", (masked, ragged)), ("packed", (packed,))):
            constants = blocks | {"SIDES": len(sides)}
            builds.append(
                Build(pack, arguments(pack, {"sides": sides}, **constants), constants, tensor_cores=False,
                      labels=(element, label))
            )  # fmt: skip
    return builds


AHEAD_OF_TIME = _builds()
