"""Launches of the kernels between the library's products, as :class:`itm_kernels.pair_blocks.steps.Steps` asks.

Imports Triton: only where a kernel is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.records import Masks
from itm_kernels.pair_blocks.rows import Block
from itm_kernels.triton import directions, packing, tiles
from itm_kernels.triton.kernels import (
    cosines,
    gates,
    groups,
    pooling,
    regulated_attention,
    row_norms,
    squared_difference,
)
from itm_kernels.triton.node_steps import Nodes
from itm_kernels.triton.pair_tiles import (
    CHANNELS,
    GATED_ROWS,
    KEYS,
    POOLED_QUERIES,
    POOLED_ROWS,
    QUERIES,
    ROWS,
    SEGMENT_KEYS,
    SEGMENT_QUERIES,
    SUM_ROWS,
    SUM_WIDTH,
    WIDTH,
    over,
)


class _Packer:
    """Rows of a side."""

    def pack(self, packings: Any, width: int) -> None:
        packing.pack(packings, width)

    def pad_groups(self, keys: Block, padded: Tensor) -> None:
        groups.pad_groups[(_programs(padded),)](
            keys.rows, keys.offsets, keys.counts, padded, *padded.shape, BLOCK_N=tiles.PACK_ROWS,
            BLOCK_D=tiles.NORM_WIDTH,
        )  # fmt: skip

    def add_padded(self, keys: Block, padded: Tensor, gradient: Tensor) -> None:
        groups.add_padded[(_programs(padded),)](
            padded, keys.offsets, keys.counts, gradient, keys.groups, keys.most,
            0 if keys.extent is None else keys.extent, padded.shape[2], PACKED=keys.extent is None,
            BLOCK_N=tiles.PACK_ROWS, BLOCK_D=tiles.NORM_WIDTH,
        )  # fmt: skip


def _programs(padded: Tensor) -> int:  # [G, K, D]
    return padded.shape[0] * over(padded.shape[1], tiles.PACK_ROWS) * over(padded.shape[2], tiles.NORM_WIDTH)


class _Attention:
    """Products to weights."""

    def attention_weights(
        self,
        block: PairBlock,
        products: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        norms: Tensor,
        weights: Tensor,
    ) -> None:
        queries = block.queries
        regulated_attention.segment_norms[(block.pairs * over(block.most, SEGMENT_KEYS),)](
            products, queries.offsets, queries.counts, norms, *_sizes(block), BLOCK_Q=SEGMENT_QUERIES,
            BLOCK_K=SEGMENT_KEYS,
        )  # fmt: skip
        regulated_attention.attention_weights[(block.groups * over(block.num_queries, QUERIES),)](
            products, norms, block.keys.counts, queries.segments, temperatures, temperature, weights,
            *_sizes(block), WARMED=temperatures is not None, BLOCK_Q=QUERIES, BLOCK_K=KEYS,
        )  # fmt: skip

    def attention_weights_backward(
        self,
        block: PairBlock,
        products: Tensor,
        norms: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        grad: Tensor,
        grad_temperatures: Tensor,
        grad_products: Tensor,
    ) -> None:
        queries = block.queries
        regulated_attention.attention_weights_backward[(block.groups * over(block.num_queries, QUERIES),)](
            products, norms, block.keys.counts, queries.segments, temperatures, temperature, grad,
            grad_temperatures, *_sizes(block), WARMED=temperatures is not None, BLOCK_Q=QUERIES, BLOCK_K=KEYS,
        )  # fmt: skip
        regulated_attention.segment_norms_backward[(block.pairs * over(block.most, SEGMENT_KEYS),)](
            products, norms, queries.offsets, queries.counts, grad, grad_products, *_sizes(block),
            BLOCK_Q=SEGMENT_QUERIES, BLOCK_K=SEGMENT_KEYS,
        )  # fmt: skip


def _sizes(block: PairBlock) -> tuple[int, int, int]:
    return block.most, block.num_queries, block.segments


class _Alignment:
    """Alignment vectors around their product."""

    def squared_differences(self, block: PairBlock, attended: Tensor, squares: Tensor, norms: Tensor) -> None:
        squared_difference.squared_differences[(over(block.rows, ROWS),)](
            block.queries.rows, attended, squares, norms, block.rows, block.num_queries, block.width, BLOCK_N=ROWS,
            BLOCK_D=WIDTH,
        )  # fmt: skip

    def squared_differences_backward(
        self, block: PairBlock, attended: Tensor, grad_squares: Tensor, norms: Tensor
    ) -> None:
        slopes = block.floats(block.rows)
        squared_difference.attended_slopes[(over(block.rows, ROWS),)](
            block.queries.rows, attended, grad_squares, norms, slopes, block.rows, block.num_queries, block.width,
            BLOCK_N=ROWS, BLOCK_D=WIDTH,
        )  # fmt: skip
        programs = over(block.num_queries, SUM_ROWS) * over(block.width, SUM_WIDTH)
        squared_difference.squared_differences_backward[(programs,)](
            block.queries.rows, attended, grad_squares, norms, slopes, block.grad_queries, block.groups,
            block.num_queries, block.width, BLOCK_N=SUM_ROWS, BLOCK_D=SUM_WIDTH,
        )  # fmt: skip

    def normalise_rows(self, rows: Tensor, bias: Tensor, norms: Tensor, rounded: Tensor) -> None:
        row_norms.normalise_rows[(over(rows.shape[0], ROWS),)](
            rows, bias, norms, rounded, *rows.shape, ROUNDS=rounded is not rows, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )

    def normalise_rows_backward(self, rows: Tensor, norms: Tensor, grad: Tensor, rounded: Tensor) -> None:
        row_norms.normalise_rows_backward[(over(rows.shape[0], ROWS),)](
            rows, norms, grad, rounded, *rows.shape, ROUNDS=rounded is not grad, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )


class _Gates:
    """RCR between its products."""

    def tanh_rows(self, rows: Tensor, bias: Tensor, out: Tensor) -> None:
        count, width = rows.shape
        gates.tanh_rows[(over(count, ROWS) * over(width, WIDTH),)](
            rows, bias, out, count, width, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )

    def warm_rows(
        self,
        rows: Tensor,
        bias: Tensor,
        weight: Tensor,
        shift: Tensor,
        before: Tensor | None,
        temperature: float,
        temperatures: Tensor,
    ) -> None:
        gates.warm_rows[(over(rows.shape[0], ROWS),)](
            rows, bias, weight, shift, before, temperature, temperatures, *rows.shape, CHAINED=before is not None,
            BLOCK_N=ROWS, BLOCK_D=WIDTH,
        )  # fmt: skip

    def tanh_rows_backward(self, tangents: Tensor, grad: Tensor, factors: Tensor | None, out: Tensor) -> Tensor:
        count, width = tangents.shape
        sums = torch.empty(over(count, SUM_ROWS), width, dtype=torch.float32, device=tangents.device)
        gates.tanh_rows_backward[(sums.shape[0] * over(width, SUM_WIDTH),)](
            tangents, grad, factors, out, sums, count, width, OUTER=factors is not None, BLOCK_N=SUM_ROWS,
            BLOCK_D=SUM_WIDTH,
        )  # fmt: skip
        return sums

    def gate_queries(
        self,
        block: PairBlock,
        bias: Tensor,
        before: Tensor | None,
        rows: Tensor,
        tangents: Tensor | None,
        handed_on: Tensor | None,
    ) -> None:
        gates.gate_queries[(over(block.rows, ROWS) * over(block.width, WIDTH),)](
            block.queries.rows, bias, before, rows, tangents, handed_on, block.rows, block.num_queries, block.width,
            CHAINED=before is not None, KEEPS=tangents is not None, HANDS_ON=handed_on is not None, BLOCK_N=ROWS,
            BLOCK_D=WIDTH,
        )  # fmt: skip

    def gate_queries_backward(
        self, block: PairBlock, before: Tensor | None, tangents: Tensor, grad: Tensor, grad_gates: Tensor | None
    ) -> Tensor:
        sums = block.floats(over(block.num_queries, GATED_ROWS), block.width)
        gates.gate_queries_backward[(sums.shape[0] * over(block.width, SUM_WIDTH),)](
            block.queries.rows, before, tangents, grad, grad_gates, block.grad_queries, sums, block.groups,
            block.num_queries, block.width, CHAINED=before is not None, CARRIES=grad_gates is not None,
            BLOCK_N=GATED_ROWS, BLOCK_D=SUM_WIDTH,
        )  # fmt: skip
        return sums


class _Pooling:
    """RAR between its products."""

    def pool_rows(
        self,
        block: PairBlock,
        vectors: Tensor,
        keys: Tensor,
        key_bias: Tensor,
        asked: Tensor,
        asked_bias: Tensor,
        value: Tensor,
        masks: Masks,
        weights: Tensor,
        pooled: Tensor,
        norms: Tensor,
    ) -> None:
        queries, width, sizes = block.queries, keys.shape[1], (block.num_queries, block.segments)
        factors, logits = torch.empty_like(asked), torch.empty_like(weights)
        pooling.ask_pairs[(over(block.pairs, POOLED_ROWS) * over(width, CHANNELS),)](
            asked, asked_bias, value, factors, _words(masks), block.pairs, block.segments, width, **_drops(masks),
            BLOCK_N=POOLED_ROWS, BLOCK_S=CHANNELS,
        )  # fmt: skip
        pooling.pool_logits[(over(block.rows, POOLED_ROWS),)](
            keys, key_bias, factors, queries.segments, queries.offsets, _words(masks), logits, block.rows, *sizes,
            width, **_drops(masks), BLOCK_N=POOLED_ROWS, BLOCK_S=CHANNELS,
        )  # fmt: skip
        pooling.softmax_queries[(block.pairs,)](
            logits, queries.offsets, queries.counts, weights, *sizes, BLOCK_Q=POOLED_QUERIES
        )
        pooling.pool_rows[(block.pairs,)](
            vectors, weights, queries.offsets, queries.counts, pooled, norms, *sizes, width, BLOCK_Q=POOLED_QUERIES,
            BLOCK_S=CHANNELS,
        )  # fmt: skip

    def pool_rows_backward(
        self,
        block: PairBlock,
        vectors: Tensor,
        keys: Tensor,
        asked: Tensor,
        value: Tensor,
        masks: Masks,
        weights: Tensor,
        pooled: Tensor,
        norms: Tensor,
        grad_pooled: Tensor,
        grad_vectors: Tensor,
        grad_keys: Tensor,
        grad_asked: Tensor,
        grad_bias: Tensor,
        grad_value: Tensor,
    ) -> None:
        queries, width = block.queries, keys.shape[1]
        STEPS.normalise_rows_backward(pooled, norms, grad_pooled, grad_pooled)
        grad_weights = torch.empty_like(weights)
        self._rows_backward(block, vectors, weights, grad_pooled, grad_weights, grad_vectors)
        pooling.pool_logits_backward[(block.pairs * over(width, CHANNELS),)](
            keys, weights, grad_weights, asked, value, queries.offsets, queries.counts, _words(masks), grad_keys,
            grad_asked, grad_bias, grad_value, block.num_queries, block.segments, width, **_drops(masks),
            BLOCK_Q=POOLED_QUERIES, BLOCK_S=CHANNELS,
        )  # fmt: skip

    def mean_rows(self, block: PairBlock, vectors: Tensor, means: Tensor) -> None:
        queries, width = block.queries, vectors.shape[1]
        pooling.mean_rows[(block.pairs * over(width, CHANNELS),)](
            vectors, queries.offsets, queries.counts, means, block.num_queries, block.segments, width,
            BLOCK_Q=POOLED_QUERIES, BLOCK_S=CHANNELS,
        )  # fmt: skip

    def mean_rows_backward(self, block: PairBlock, grad_means: Tensor, grad_vectors: Tensor) -> None:
        self._rows_backward(block, None, None, grad_means, None, grad_vectors)

    def _rows_backward(
        self,
        block: PairBlock,
        vectors: Tensor | None,
        weights: Tensor | None,  # None: of a mean
        grad: Tensor,
        grad_weights: Tensor | None,
        grad_vectors: Tensor,
    ) -> None:
        queries = block.queries
        pooling.pool_rows_backward[(over(block.rows, POOLED_ROWS),)](
            vectors, weights, queries.segments, queries.counts, grad, grad_weights, grad_vectors, block.rows,
            block.num_queries, block.segments, grad.shape[1], WEIGHTED=weights is not None, BLOCK_N=POOLED_ROWS,
            BLOCK_S=CHANNELS,
        )  # fmt: skip


def _words(masks: Masks) -> directions.Masks:
    return directions.Masks(*masks[: len(directions.Masks._fields)])


def _drops(masks: Masks) -> dict[str, bool]:
    return {"DROPS": masks.drops, "GROUPS_ARE_IMAGES": masks.groups_are_images}


class _Cosines:
    """The score of RCR alone."""

    def cosine_rows(self, block: PairBlock, attended: Tensor, made: Tensor, slopes: Tensor | None) -> None:
        cosines.cosine_rows[(over(block.rows, ROWS),)](
            block.queries.rows, attended, made, slopes, block.rows, block.num_queries, block.width,
            KEEPS=slopes is not None, BLOCK_N=ROWS, BLOCK_D=WIDTH,
        )  # fmt: skip

    def cosine_rows_backward(self, block: PairBlock, attended: Tensor, slopes: Tensor, grad_means: Tensor) -> None:
        programs = over(block.num_queries, SUM_ROWS) * over(block.width, SUM_WIDTH)
        cosines.cosine_rows_backward[(programs,)](
            block.queries.rows, attended, slopes, block.queries.segments, block.queries.counts, grad_means,
            block.grad_queries, block.groups, block.num_queries, block.segments, block.width, BLOCK_N=SUM_ROWS,
            BLOCK_D=SUM_WIDTH,
        )  # fmt: skip


class TritonSteps(_Packer, _Attention, _Alignment, _Gates, _Pooling, _Cosines, Nodes):
    """All of them."""


STEPS: Any = TritonSteps()
