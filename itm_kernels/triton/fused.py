"""Launches of the route whose products stay on the chip: tiles of captions, cosines, scores (t2i)."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.pair_blocks.rows import Block
from itm_kernels.triton import fused_plan
from itm_kernels.triton.epilogue import Launch, aggregate
from itm_kernels.triton.kernels import fused as kernels


def tile_starts(queries: Block, bounds: list[int], rows: int) -> Tensor:  # [tiles + 1] int64
    """First segment of every tile, made on the device: a captured graph copies nothing from the host.

    ``bounds`` are the segments' rows on the host, which know how many tiles there are.
    """
    tiles = len(fused_plan.tile_bounds(bounds, rows)) - 1
    starts = torch.empty(tiles + 1, dtype=torch.int64, device=queries.offsets.device)
    kernels.pack_segments[(1,)](
        queries.offsets, starts, tiles, queries.groups, rows, BLOCK_S=fused_plan.SEGMENTS, num_warps=1
    )
    return starts


def take_scores(
    launch: Launch,
    tile: fused_plan.Tile,
    keys: Block,
    queries: Block,
    starts: Tensor,  # [tiles + 1] int64
    gram: Tensor,  # [groups, most, most] float32
    query_norms: Tensor,  # [n] float32
    scores: Tensor,  # [groups, segments]
) -> None:
    """Write the scores of a block."""
    planes = 2 if launch.peak else 1
    state = torch.empty((planes, keys.groups, queries.num_rows), dtype=torch.float32, device=scores.device)
    tiles, width = starts.shape[0] - 1, keys.rows.shape[1]
    kernels.attend_fused[(tiles * -(-keys.groups // tile.images),)](
        keys.rows, queries.rows, gram, query_norms, keys.offsets, keys.counts, queries.offsets, queries.segments,
        starts, state, queries.num_rows, keys.groups, tiles, keys.most, width, launch.options.lambda_softmax,
        PEAK=launch.peak, ALIGNED=width % 16 == 0, **launch.attention, **tile.constants, **tile.launch,
    )  # fmt: skip
    aggregate(launch, state, query_norms, keys, queries, scores, accumulate=False, finished=True)
