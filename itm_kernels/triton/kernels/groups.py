# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""Ragged groups of packed rows as padded groups for batched library products, and gradients the way back.

    out[g, k] = rows[offset_g + k], 0 past the group's last      gradient[place_g + k] += padded[g, k]

Owner: a program owns some keys of one group and some columns. Read: rows that count, once. Nothing is computed or one
number is added: the same bits always, no atomics. Never in memory: indices of rows. The trick: only ragged groups come
here; where all are alike the packed rows are the padded groups already.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton import tiles
from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments


@triton.jit
def _owned(groups, most, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Group, keys and columns of a program."""
    program = tl.program_id(0)
    across, down = tl.cdiv(width, BLOCK_D), tl.cdiv(most, BLOCK_N)
    group = (program // (across * down)).to(tl.int64)
    o_key = (program // across % down) * BLOCK_N + tl.arange(0, BLOCK_N)
    return group, o_key, (program % across) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def pad_groups(
    rows, offsets, counts, out, groups, most, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    group, o_key, o_column = _owned(groups, most, width, BLOCK_N, BLOCK_D)
    first, count = tl.load(offsets + group), tl.load(counts + group)
    at = o_key.to(tl.int64)[:, None] * width + o_column[None, :]
    m_column = (o_column < width)[None, :]
    x = tl.load(rows + first * width + at, mask=(o_key < count)[:, None] & m_column, other=0.0)
    tl.store(out + group * most * width + at, x, mask=(o_key < most)[:, None] & m_column)


@triton.jit
def add_padded(
    padded, offsets, counts, gradient, groups, most, extent, width, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    group, o_key, o_column = _owned(groups, most, width, BLOCK_N, BLOCK_D)
    count = tl.load(counts + group)
    place = tl.load(offsets + group) if PACKED else group * extent
    at = o_key.to(tl.int64)[:, None] * width + o_column[None, :]
    mask = (o_key < count)[:, None] & (o_column < width)[None, :]
    total = tl.load(gradient + place * width + at, mask=mask, other=0.0)
    total += tl.load(padded + group * most * width + at, mask=mask, other=0.0)
    tl.store(gradient + place * width + at, total, mask=mask)


def _builds() -> list[Build]:
    blocks = {"BLOCK_N": tiles.PACK_ROWS, "BLOCK_D": tiles.NORM_WIDTH}
    tables = {"offsets": "*i64", "counts": "*i64"}
    builds = []
    for element in ARGUMENT_TYPES:
        types = tables | {"rows": f"*{element}", "out": f"*{element}"}
        signature = arguments(pad_groups, types, **blocks)
        builds.append(Build(pad_groups, signature, blocks, tensor_cores=False, labels=(element,)))
    for packed in (True, False):
        constants = blocks | {"PACKED": packed}
        signature = arguments(add_padded, tables | {"padded": "*fp32", "gradient": "*fp32"}, **constants)
        labels = ("packed" if packed else "padded",)
        builds.append(Build(add_padded, signature, constants, tensor_cores=False, labels=labels))
    return builds


AHEAD_OF_TIME = _builds()
