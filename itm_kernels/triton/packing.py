"""Rows of a side packed by a kernel, where they are not packed as they are given."""

from __future__ import annotations

from itm_kernels.pair_blocks import rows
from itm_kernels.pair_blocks.records import Packing
from itm_kernels.pair_blocks.rows import Block, Side
from itm_kernels.triton import tiles


def blocks(*wanted: tuple[Side, int, int]) -> list[Block]:
    """Groups of sides, packed in one launch where there is anything to pack."""
    return rows.blocks(pack, *wanted)


def pack(packings: tuple[Packing, ...], width: int) -> None:
    """All of them in one launch."""
    from itm_kernels.triton.kernels import pack as kernels

    kernels.pack[(sum(packing.groups for packing in packings),)](
        packings, width, SIDES=len(packings), BLOCK_N=tiles.PACK_ROWS, BLOCK_D=tiles.NORM_WIDTH
    )
