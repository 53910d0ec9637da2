"""Launches of the kernels: one function a step, the same sentence each: shapes, grid, launch on the current stream.

Keys and queries are blocks of rows (`rows.Block`), whichever side they are of; ``products`` is ``[queries, keys]``,
or a transposed view of that. A launch serves every direction asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.pair_blocks.rows import Block
from itm_kernels.triton import tiles
from itm_kernels.triton.directions import Direction, RowGradients, Rows
from itm_kernels.triton.kernels import aggregate as aggregate_kernels
from itm_kernels.triton.kernels import attend as attend_kernels
from itm_kernels.triton.kernels import attend_backward as attend_backward_kernels
from itm_kernels.triton.kernels import feature_norm as feature_norm_kernels
from itm_kernels.triton.kernels import gram as gram_kernels
from itm_kernels.triton.kernels import prepare as prepare_kernels


@dataclass(frozen=True)
class Launch:
    """What the launches of a call share."""

    options: ScoreOptions
    precision: str  # of products of float32 tiles: tf32 or tf32x3
    programs: int  # that fill the machine
    workspace_bytes: int

    @property
    def norm(self) -> str:
        """Kind of sum over a segment."""
        name = self.options.raw_feature_norm
        return {"clipped": "none", "no_norm": "none"}.get(name, name.removeprefix("clipped_"))

    @property
    def features(self) -> dict[str, Any]:
        """Constants of every kernel that meets products."""
        return {"NORM": self.norm, "CLIPPED": self.options.raw_feature_norm.startswith("clipped")}

    @property
    def attention(self) -> dict[str, Any]:
        """Constants of every kernel that makes weights."""
        return {**self.features, "FOCAL": self.options.focal, "PRECISION": self.precision}

    @property
    def peak(self) -> bool:
        return self.options.peak_weight != 0.0


@dataclass
class Known:
    """A block with what a direction needs of it as keys (Gram matrices) or queries (norms), and their gradients."""

    block: Block
    gram: Tensor | None  # [groups, most, most] float32
    norms: Tensor | None  # [n] float32
    described: bool = False  # whether these are made
    grad_gram: Tensor | None = None  # [parts, groups, most, most] float32, in the end all in the first
    own: Tensor | None = None  # [n] float32

    @property
    def rows(self) -> Rows:
        """As kernels take it."""
        block = self.block
        return Rows(
            block.rows, block.offsets, block.counts, self.gram, self.norms, block.groups, block.num_rows, block.most
        )

    @property
    def programs(self) -> int:
        """That describe it."""
        if self.gram is None:
            return _ceil(self.block.num_rows, tiles.GRAM_KEYS)
        return self.block.groups * _ceil(self.block.most, tiles.GRAM_KEYS) ** 2


def known(block: Block, *, keys: bool, queries: bool) -> Known:
    """Memory for what a direction needs of a block."""
    gram = _floats(block.rows, block.groups, block.most, block.most) if keys else None
    return Known(block, gram, _floats(block.rows, block.num_rows) if queries else None)


def direction(
    launch: Launch,
    keys: Known,
    queries: Known,
    products: Tensor,  # [queries, keys] by strides
    *,
    grad_scores: Tensor | None = None,  # [groups, segments], of the backward, as the next two
    grad_features: Tensor | None = None,  # in the type and strides of the products
    grad_direct: Tensor | None = None,
) -> Direction:
    """A direction, with memory for what its kernels leave."""
    assert keys.gram is not None
    assert queries.norms is not None
    backward = grad_scores is not None
    on, of = keys.block, queries.block
    factors = tops = None
    if launch.norm != "none":
        factors = _floats(products, of.groups, on.num_rows)
        tops = torch.empty_like(factors) if launch.norm == "softmax" else None
    made = Direction(
        products, factors, tops, keys.gram, queries.norms, on.offsets, on.counts, on.segments, of.offsets, of.counts,
        of.segments, _floats(products, tiles.PLANES[backward], on.groups, of.num_rows), of.num_rows, on.num_rows,
        on.groups, of.groups, on.most, *products.stride(),
    )  # fmt: skip
    if grad_scores is None:
        return made
    steps = _ceil(of.num_rows, tiles.GRAM_QUERIES)
    directions = launch.options.t2i + launch.options.i2t
    parts = tiles.splits(
        steps, on.groups, launch.programs, 4 * on.most**2, tiles.gram_budget(launch.workspace_bytes) // directions
    )
    keys.grad_gram = _floats(products, parts, on.groups, on.most, on.most)
    queries.own = _floats(products, of.num_rows)
    return made._replace(
        grad_scores=grad_scores, grad_features=grad_features, grad_direct=grad_direct, grad_gram=keys.grad_gram,
        own=queries.own, stride_group=grad_scores.stride(0), stride_segment=grad_scores.stride(1), parts=parts,
        tiles=_ceil(steps, parts),
    )  # fmt: skip


def prepare(launch: Launch, sides: Sequence[Known], directions: Sequence[Direction]) -> None:
    """Gram matrices and norms of the sides that have none yet, and factors of every key and segment."""
    new = [side for side in sides if not side.described]
    summed = directions if launch.norm != "none" else ()
    programs = sum(side.programs for side in new)
    programs += sum(d.num_segments * _ceil(d.num_keys, tiles.NORM_KEYS) for d in summed)
    for side in new:
        side.described = True
    if programs:
        prepare_kernels.prepare[(programs,)](
            tuple(side.rows for side in new), tuple(summed), sides[0].block.rows.shape[1],
            launch.options.lambda_softmax, SIDES=len(new), WAYS=len(summed), **launch.features,
            PRECISION=launch.precision, BLOCK_R=tiles.GRAM_KEYS, BLOCK_D=tiles.GRAM_WIDTH,
            BLOCK_Q=tiles.NORM_QUERIES, BLOCK_K=tiles.NORM_KEYS, num_warps=tiles.GRAM_WARPS,
        )  # fmt: skip


def attend(launch: Launch, chosen: tiles.Tiles, directions: Sequence[Direction], *, keep: bool) -> None:
    """Leave what is known of every query and key group; for the backward, more of it."""
    programs = sum(d.groups * _ceil(d.num_queries, chosen.block_q) for d in directions)
    attend_kernels.attend[(programs,)](
        tuple(directions), launch.options.lambda_softmax, KEEP=keep, **launch.attention, **chosen.constants,
        **chosen.launch,
    )  # fmt: skip


def aggregate(
    launch: Launch,
    state: Tensor,  # [planes, groups, queries] float32
    query_norms: Tensor,  # [n] float32
    keys: Block,
    queries: Block,
    scores: Tensor,  # [groups, segments]
    *,
    accumulate: bool,
    finished: bool,
) -> None:
    """Write (or add to) the scores from what is known of every query, or where it is ``finished`` from its cosine."""
    options = launch.options
    aggregate_kernels.aggregate[(keys.groups * _ceil(queries.groups, tiles.AGGREGATE_SEGMENTS),)](
        state, query_norms, queries.offsets, queries.counts, scores, queries.num_rows, keys.groups, queries.groups,
        *scores.stride(), options.lambda_lse, options.peak_weight, AGG=options.agg_func, PEAK=launch.peak,
        ACCUMULATE=accumulate, FINISHED=finished, BLOCK_S=tiles.AGGREGATE_SEGMENTS, BLOCK_L=tiles.AGGREGATE_QUERIES,
    )  # fmt: skip


def aggregate_backward(launch: Launch, directions: Sequence[Direction]) -> None:
    """Hand the gradient of every score out to the cosines of its queries."""
    options = launch.options
    programs = sum(d.groups * _ceil(d.num_segments, tiles.AGGREGATE_SEGMENTS) for d in directions)
    aggregate_kernels.aggregate_backward[(programs,)](
        tuple(directions), options.lambda_lse, options.peak_weight, WAYS=len(directions), AGG=options.agg_func,
        PEAK=launch.peak, BLOCK_S=tiles.AGGREGATE_SEGMENTS, BLOCK_L=tiles.AGGREGATE_QUERIES,
    )  # fmt: skip


def attend_backward(launch: Launch, chosen: tiles.Tiles, directions: Sequence[Direction]) -> None:
    """Gradients at logits and beside them, parts of dG, and what every query takes of itself."""
    programs = sum(
        d.groups * (_ceil(d.num_queries, chosen.block_q) + d.parts) + _ceil(d.num_queries, tiles.SUM_QUERIES)
        for d in directions
    )
    attend_backward_kernels.attend_backward[(programs,)](
        tuple(directions), launch.options.lambda_softmax, PEAK=launch.peak, **launch.attention, **chosen.constants,
        GRAM_Q=tiles.GRAM_QUERIES, SUM_G=tiles.SUM_GROUPS, SUM_Q=tiles.SUM_QUERIES, **chosen.launch,
    )  # fmt: skip


def feature_norm_backward(launch: Launch, directions: Sequence[Direction]) -> None:
    """Leave dS in the place of the (first) direct gradient, and every dG in that of its first part."""
    first = directions[0]
    owners = first.groups if len(directions) == 2 else _ceil(first.num_keys, tiles.NORM_KEYS)
    parts = sum(_ceil(d.groups * d.most**2, tiles.PART_ENTRIES) for d in directions)
    feature_norm_kernels.feature_norm_backward[(first.num_segments * owners + parts,)](
        tuple(directions), WAYS=len(directions), **launch.features, BLOCK_Q=tiles.NORM_QUERIES, BLOCK_K=tiles.NORM_KEYS,
        PAIR_Q=tiles.PAIR_QUERIES, PAIR_K=tiles.PAIR_KEYS, BLOCK_P=tiles.PART_ENTRIES,
        num_warps=tiles.PAIR_WARPS if len(directions) == 2 else tiles.NORM_WARPS,
    )  # fmt: skip


def add_gradients(launch: Launch, sides: Sequence[tuple[Known, Tensor, Tensor]]) -> None:
    """Add to gradients ([.., D] float32, from a block's first row on) what reaches the rows.

    Of each side: the block, its product with dS ([n, D] float32), the gradient.
    """
    width = sides[0][1].shape[1]
    told, programs = [], 0
    for side, product, gradient in sides:
        block = side.block
        grad_gram = None if side.grad_gram is None else side.grad_gram[0]
        told.append(
            RowGradients(
                block.rows, block.offsets, block.counts, grad_gram, side.own, product, gradient, block.groups,
                block.most, block.extent,
            )
        )  # fmt: skip
        programs += block.groups * _ceil(block.most, tiles.GRAM_KEYS) * _ceil(width, tiles.GRAM_WIDTH)
        side.grad_gram = side.own = None
    gram_kernels.add_gradients[(programs,)](
        tuple(told), width, SIDES=len(told), PRECISION=launch.precision, BLOCK_K=tiles.GRAM_KEYS,
        BLOCK_O=tiles.GRADIENT_KEYS, BLOCK_D=tiles.GRAM_WIDTH, num_warps=tiles.GRADIENT_WARPS,
    )  # fmt: skip


def _ceil(count: int, step: int) -> int:
    return -(-count // step)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
