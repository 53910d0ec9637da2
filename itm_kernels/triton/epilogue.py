"""Launches of the kernels: one function a step, the same sentence each: shapes, grid, launch on the current stream.

Keys and queries are blocks of rows (`rows.Block`), whichever side they are of; ``products`` is ``[queries, keys]``,
or a transposed view of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm_kernels.ops.options import ScoreOptions
from itm_kernels.triton import tiles
from itm_kernels.triton.kernels import aggregate as aggregate_kernels
from itm_kernels.triton.kernels import attend as attend_kernels
from itm_kernels.triton.kernels import attend_backward as attend_backward_kernels
from itm_kernels.triton.kernels import feature_norm as feature_norm_kernels
from itm_kernels.triton.kernels import gram as gram_kernels
from itm_kernels.triton.rows import Block


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
    def attention(self) -> dict[str, Any]:
        """Constants of every kernel that makes weights."""
        return {
            "NORM": self.norm,
            "CLIPPED": self.options.raw_feature_norm.startswith("clipped"),
            "FOCAL": self.options.focal,
            "PRECISION": self.precision,
        }

    @property
    def peak(self) -> bool:
        return self.options.peak_weight != 0.0


@dataclass
class Attention:
    """One direction of one block: keys, queries, products, and what is made of them."""

    launch: Launch
    classes: dict[str, tuple[tiles.Tile, ...]]  # kernel -> of key groups
    keys: Block
    queries: Block
    gram: Tensor  # [groups, most, most] float32
    query_norms: Tensor  # [n] float32
    products: Tensor  # [queries, keys]
    state: Tensor  # [planes, groups, queries] float32
    factors: Tensor  # [segments, keys] float32
    tops: Tensor

    def __init__(
        self,
        launch: Launch,
        classes: dict[str, tuple[tiles.Tile, ...]],
        keys: Block,
        queries: Block,
        gram: Tensor,
        query_norms: Tensor,
        products: Tensor,
        *,
        backward: bool,
    ) -> None:
        self.launch, self.classes, self.keys, self.queries = launch, classes, keys, queries
        self.gram, self.query_norms, self.products = gram, query_norms, products
        self.state = _floats(products, tiles.PLANES[backward], keys.groups, queries.num_rows)
        self._feature_norms()
        self._attend(keep=backward)

    @property
    def _strides(self) -> tuple[int, int]:
        return self.products.stride(0), self.products.stride(1)

    def _feature_norms(self) -> None:
        """Factor of every key and segment; nothing where features are taken as they are."""
        launch, keys, queries = self.launch, self.keys, self.queries
        self.factors = self.tops = self.gram  # a pointer that is never read
        if launch.norm == "none":
            return
        self.factors = _floats(self.products, queries.groups, keys.num_rows)
        self.tops = torch.empty_like(self.factors) if launch.norm == "softmax" else self.factors
        grid = (queries.groups * -(-keys.num_rows // tiles.NORM_KEYS),)
        feature_norm_kernels.feature_norms[grid](
            self.products, self.factors, self.tops, queries.offsets, queries.counts, keys.num_rows, *self._strides,
            launch.options.lambda_softmax, NORM=launch.norm, CLIPPED=launch.attention["CLIPPED"],
            BLOCK_Q=tiles.NORM_QUERIES, BLOCK_K=tiles.NORM_KEYS,
        )  # fmt: skip

    @property
    def _inputs(self) -> tuple[Tensor, ...]:
        queries, keys = self.queries, self.keys
        return self.factors, self.tops, self.gram, queries.segments, keys.offsets, keys.counts, self.state

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.queries.num_rows, self.keys.num_rows, self.keys.groups, self.keys.most

    def _over_keys(self, tile: tiles.Tile, **more: Any) -> dict[str, Any]:
        """Constants of a kernel over one class of key groups."""
        columns = {"MAIN": tile.main, "REST": tile.rest} if tile.held else {"BLOCK_K": tile.main}
        shared = {"FLOOR": tile.floor, "BLOCK_Q": tile.block_q, **self.launch.attention, **more}
        return {**shared, **columns, "num_warps": tile.num_warps, "num_stages": tile.num_stages}

    def _tiles_of_queries(self, tile: tiles.Tile) -> int:
        return -(-self.queries.num_rows // tile.block_q)

    def _attend(self, *, keep: bool) -> None:
        last = (*self._sizes, *self._strides, self.launch.options.lambda_softmax)
        for tile in self.classes["attend"]:
            kernel = attend_kernels.attend if tile.held else attend_kernels.attend_streamed
            grid = (self.keys.groups * self._tiles_of_queries(tile),)
            kernel[grid](self.products, *self._inputs, *last, **self._over_keys(tile, KEEP=keep))

    def aggregate(self, scores: Tensor, *, accumulate: bool) -> None:  # [groups, segments]
        """Write (or add to) the scores."""
        aggregate(
            self.launch, self.state, self.query_norms, self.keys, self.queries, scores, accumulate=accumulate,
            finished=False,
        )  # fmt: skip

    def backward(
        self,
        grad_scores: Tensor,  # [groups, segments]
        grad_features: Tensor,  # [queries, keys], scratch in the type and strides of the products, as the next two
        grad_direct: Tensor,
        grad_products: Tensor,  # may be the products themselves
        *,
        accumulate: bool,
    ) -> tuple[Tensor, Tensor]:  # [parts, groups, most, most], [queries]
        """Write (or add to) dS; return the parts of dG and what every query takes of itself through its norm."""
        options, keys, queries = self.launch.options, self.keys, self.queries
        aggregate_kernels.aggregate_backward[_segment_grid(keys, queries)](
            self.state, self.query_norms, queries.offsets, queries.counts, grad_scores, queries.num_rows, keys.groups,
            queries.groups, *grad_scores.stride(), options.lambda_lse, options.peak_weight, AGG=options.agg_func,
            PEAK=self.launch.peak, BLOCK_S=tiles.AGGREGATE_SEGMENTS, BLOCK_L=tiles.AGGREGATE_QUERIES,
        )  # fmt: skip
        own = _floats(self.products, queries.num_rows)
        aggregate_kernels.query_norm_gradient[(-(-queries.num_rows // tiles.SUM_QUERIES),)](
            self.state, self.query_norms, queries.segments, own, queries.num_rows, keys.groups,
            BLOCK_G=tiles.SUM_GROUPS, BLOCK_Q=tiles.SUM_QUERIES,
        )  # fmt: skip
        self._attend_backward(grad_features, grad_direct)
        grad_gram = self._gram_gradient()
        grid = (queries.groups * -(-keys.num_rows // tiles.NORM_KEYS),)
        feature_norm_kernels.feature_norm_backward[grid](
            self.products, grad_features, grad_direct, grad_products, queries.offsets, queries.counts, keys.segments,
            keys.num_rows, *self._strides, NORM=self.launch.norm, CLIPPED=self.launch.attention["CLIPPED"],
            ACCUMULATE=accumulate, BLOCK_Q=tiles.NORM_QUERIES, BLOCK_K=tiles.NORM_KEYS,
        )  # fmt: skip
        return grad_gram, own

    def _attend_backward(self, grad_features: Tensor, grad_direct: Tensor) -> None:
        last = (*self._sizes, *self._strides, self.launch.options.lambda_softmax)
        outputs = (self.query_norms, grad_features, grad_direct)
        for tile in self.classes["attend_backward"]:
            kernels = attend_backward_kernels
            kernel = kernels.attend_backward if tile.held else kernels.attend_backward_streamed
            grid = (self.keys.groups * self._tiles_of_queries(tile),)
            kernel[grid](self.products, *self._inputs, *outputs, *last, **self._over_keys(tile, PEAK=self.launch.peak))

    def _gram_gradient(self) -> Tensor:  # [parts, groups, most, most]
        """Parts of dG: as many as keep the machine busy, all added afterwards."""
        classes, keys = self.classes["gram_gradient"], self.keys
        parts = tiles.splits(
            min(self._tiles_of_queries(tile) for tile in classes), keys.groups, self.launch.programs,
            4 * keys.most**2, tiles.gram_budget(self.launch.workspace_bytes),
        )  # fmt: skip
        # Every class writes its own groups; a streamed one writes the first part alone.
        make = torch.empty if len(classes) == 1 and classes[0].held else torch.zeros
        grad_gram = make((parts, keys.groups, keys.most, keys.most), dtype=torch.float32, device=self.products.device)
        factors, tops, _, *tables = self._inputs
        inputs = (self.products, factors, tops, *tables, self.query_norms, grad_gram, *self._sizes)
        last = (*self._strides, self.launch.options.lambda_softmax)
        for tile in classes:
            constants = self._over_keys(tile, PEAK=self.launch.peak)
            if tile.held:
                each = -(-self._tiles_of_queries(tile) // parts)
                attend_backward_kernels.gram_gradient[(keys.groups * parts,)](*inputs, each, *last, **constants)
            else:
                blocks = -(-keys.most // tile.main)
                grid = (keys.groups * blocks * blocks,)
                attend_backward_kernels.gram_gradient_streamed[grid](*inputs, *last, **constants)
        return grad_gram


def _segment_grid(keys: Block, queries: Block) -> tuple[int]:
    return (keys.groups * -(-queries.groups // tiles.AGGREGATE_SEGMENTS),)


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
    aggregate_kernels.aggregate[_segment_grid(keys, queries)](
        state, query_norms, queries.offsets, queries.counts, scores, queries.num_rows, keys.groups, queries.groups,
        *scores.stride(), options.lambda_lse, options.peak_weight, AGG=options.agg_func, PEAK=launch.peak,
        ACCUMULATE=accumulate, FINISHED=finished, BLOCK_S=tiles.AGGREGATE_SEGMENTS, BLOCK_L=tiles.AGGREGATE_QUERIES,
    )  # fmt: skip


def gram(block: Block, precision: str) -> Tensor:  # [groups, most, most] float32
    """Gram matrix of every group."""
    out = _floats(block.rows, block.groups, block.most, block.most)
    side = -(-block.most // tiles.GRAM_KEYS)
    gram_kernels.gram[(block.groups * side * side,)](
        block.rows, block.offsets, block.counts, out, block.most, block.rows.shape[1], PRECISION=precision,
        BLOCK_K=tiles.GRAM_KEYS, BLOCK_D=tiles.GRAM_WIDTH, num_warps=tiles.GRAM_WARPS,
    )  # fmt: skip
    return out


def row_norms(block: Block) -> Tensor:  # [n] float32
    """Length of every row."""
    out = _floats(block.rows, block.num_rows)
    gram_kernels.row_norms[(-(-block.num_rows // tiles.NORM_ROWS),)](
        block.rows, out, block.num_rows, block.rows.shape[1], BLOCK_N=tiles.NORM_ROWS, BLOCK_D=tiles.NORM_WIDTH
    )
    return out


def add_own_gradient(
    block: Block,
    grad_gram: Tensor | None,  # [parts, groups, most, most]
    own: Tensor | None,  # [n]
    gradient: Tensor,  # [n, D] float32
    precision: str,
) -> None:
    """Add what reaches rows through their own Gram matrices and norms."""
    if grad_gram is not None and grad_gram.shape[0] > 1:
        grad_gram = grad_gram.sum(0)  # once, not once a slice of D
    width = block.rows.shape[1]
    down, across = -(-block.most // tiles.GRAM_KEYS), -(-width // tiles.GRAM_WIDTH)
    gram_kernels.own_gradient[(block.groups * down * across,)](
        block.rows, block.offsets, block.counts, gradient if grad_gram is None else grad_gram,
        gradient if own is None else own, gradient, block.most, width,
        HAS_GRAM=grad_gram is not None, HAS_OWN=own is not None, PRECISION=precision,
        BLOCK_K=tiles.GRAM_KEYS, BLOCK_D=tiles.GRAM_WIDTH, num_warps=tiles.GRAM_WARPS,
    )  # fmt: skip


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
