"""The fused route of ``cross_attention_scores``: product and scores in one kernel for sm_90a, forward alone.

Per block of images x captions: both sides are packed into the tiles that the tensor cores read, the Gram matrices into
half precision, and one kernel makes the scores; the products never reach memory. Captions are the outer loop, so that
their tiles are made once. Nothing has been measured on a GPU yet, hence nobody is sent here who did not ask for it.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from itm_kernels.native import host
from itm_kernels.ops.options import ScoreOptions

if TYPE_CHECKING:
    from itm_kernels.native.cuda.cross_attention_scores import DeviceScores
    from itm_kernels.native.cuda.machine import Machine
    from itm_kernels.native.cuda.side import Block

ROUTE = "ITM_SCORES_ROUTE"
UNMEASURED = f"not measured on a GPU yet, hence taken only where {ROUTE}=fused asks for it"


def asked_for() -> bool:
    """Whether the environment asks for this route.

    Raises
    ------
    ValueError
        The variable has another value than the two it may have.
    """
    route = os.environ.get(ROUTE, "tiles")
    if route not in ("tiles", "fused"):
        raise ValueError(f"{ROUTE} must be tiles or fused, got {route!r}")
    return route == "fused"


def why_not(
    machine: Machine, dtype: torch.dtype, options: ScoreOptions, *, regions: int, ragged: bool, longest: int
) -> str | None:
    """The reason this route cannot make the scores, or None; ``longest``: words of a caption, padding included."""
    sizes = host().FusedSizes
    if not machine.arch.startswith("sm_90"):
        return f"it is written for sm_90a, this is {machine.arch}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it multiplies float16 and bfloat16, not {dtype}"
    if options.i2t:
        return "it has the direction t2i alone"
    if regions != sizes.regions or ragged:
        return f"it takes images of {sizes.regions} regions, all valid"
    if longest > sizes.words:
        return f"a caption of {longest} words does not fit its tiles of {sizes.words}"
    return None


def refuse(reason: str) -> RuntimeError:
    """What is raised where the route was asked for and cannot run."""
    return RuntimeError(f"cross_attention_scores: {ROUTE}=fused, but {reason}")


def has_kernels(ops: Any, device: torch.device) -> bool:
    """Whether the library was built with this route's kernels: they are a library of their own."""
    key = "CUDA" if device.type == "cuda" else "CPU"
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.name}::fused_scores_of_tiles", key)


def forward(scores: DeviceScores) -> Tensor:  # [I, C] float32
    """Scores by this route.

    Raises
    ------
    RuntimeError
        It cannot run here; the message says why.
    """
    images, captions, options = scores.images, scores.captions, scores.options
    longest = max((stop - start for start, stop in pairwise(captions.bounds)), default=1)
    reason = why_not(
        scores.machine,
        scores.dtype,
        options,
        regions=images.vectors.shape[1],
        ragged=images.counts is not None,
        longest=longest,
    )
    if reason is None and not has_kernels(scores.ops, scores.device):
        reason = "the CUDA kernels were built without sm_90a"
    if reason is not None:
        raise refuse(reason)
    plan = host().plan_fused_scores(
        images.groups,
        captions.bounds,
        images.vectors.shape[2],
        copies_regions=images.copies,
        copies_words=captions.copies,
        workspace_bytes=scores.workspace_bytes,
    )
    out = torch.empty(images.groups, captions.groups, dtype=torch.float32, device=scores.device)
    for c0, c1 in pairwise(plan.caption_bounds):
        words = scores.block(captions, c0, c1, keys=False, queries=True)
        tiles = host().fused_word_tiles(captions.bounds[c0 : c1 + 1])
        table, word_tiles = _word_tiles(scores.ops, words, tiles)
        for i0, i1 in pairwise(plan.image_bounds):
            regions = scores.block(images, i0, i1, keys=True, queries=False)
            region_tiles, gram, gram_scale = _region_tiles(scores.ops, regions)
            scores.ops.fused_scores_of_tiles(
                word_tiles, region_tiles, table, gram, gram_scale, words.offsets, words.counts, words.stride,
                words.norms, *options.codes(), scores.machine.multiprocessors, out[i0:i1, c0:c1],
            )  # fmt: skip
            del regions, region_tiles, gram, gram_scale  # before the next block's are made, not after
        del words, table, word_tiles
    return out


def _word_tiles(ops: Any, words: Block, tiles: int) -> tuple[Tensor, Tensor]:
    """First caption of each tile [tiles + 1], and the tiles; whole captions, as many as fit."""
    sizes = host().FusedSizes
    table = words.rows.new_empty(tiles + 1, dtype=torch.int32)
    ops.fused_scores_captions(words.offsets, words.groups, words.stride, table)
    packed = words.rows.new_empty(tiles, _slices(words.rows), sizes.words, sizes.slice)
    ops.fused_scores_tiles(words.rows, words.offsets, words.groups, words.stride, table, packed)
    return table, packed


def _region_tiles(ops: Any, regions: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of four images, their Gram matrices as the kernel reads them, and what those were divided by."""
    sizes = host().FusedSizes
    tiles = -(-regions.groups // sizes.images)
    packed = regions.rows.new_empty(tiles, _slices(regions.rows), sizes.images * sizes.regions, sizes.slice)
    ops.fused_scores_tiles(regions.rows, None, 0, 0, None, packed)
    gram = regions.rows.new_empty(tiles * sizes.images, sizes.gram_elements, dtype=torch.float16)
    scale = regions.rows.new_empty(tiles * sizes.images, dtype=torch.float32)
    ops.fused_scores_gram(regions.gram, gram, scale)
    return packed, gram, scale


def _slices(rows: Tensor) -> int:
    return -(-rows.shape[1] // int(host().FusedSizes.slice))
