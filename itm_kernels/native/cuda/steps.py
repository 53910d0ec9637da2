"""Calls of the CUDA kernels between the library's products, as :class:`itm_kernels.pair_blocks.steps.Steps` asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm_kernels.native.cuda.node_steps import NodeSteps
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.records import Masks, Packing
from itm_kernels.pair_blocks.rows import Block

# Of gradients that come back in parts, as in csrc/cuda/correspondence_regulator_kernel.cuh.
SUM_ROWS = 16
GATED_QUERIES = 4


class _Kernels:
    """What all of them call."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        """The raw kernels: ``torch.ops.itm_kernels_native``, or the same emulated."""


class _Packer(_Kernels):
    """Rows of a side."""

    def pack(self, packings: tuple[Packing, ...], width: int) -> None:
        for side in packings:
            self.ops.block_pack_groups(
                side.vectors, side.bounds, side.valid, side.extent, side.rows, side.offsets, side.counts, side.segments
            )

    def pad_groups(self, keys: Block, padded: Tensor) -> None:
        self.ops.block_pad_groups(keys.rows, keys.offsets, keys.counts, padded)

    def add_padded(self, keys: Block, padded: Tensor, gradient: Tensor) -> None:
        self.ops.block_add_padded(padded, keys.offsets, keys.counts, keys.extent or 0, gradient)


class _Attention(_Kernels):
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
        self.ops.block_attention_weights(
            products, block.keys.counts, queries.offsets, queries.counts, queries.most, temperatures, temperature,
            norms, weights,
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
        self.ops.block_attention_weights_backward(
            products, norms, block.keys.counts, queries.offsets, queries.counts, queries.most, temperatures,
            temperature, grad, grad_temperatures, grad_products,
        )  # fmt: skip


class _Alignment(_Kernels):
    """Alignment vectors around their product."""

    def squared_differences(self, block: PairBlock, attended: Tensor, squares: Tensor, norms: Tensor) -> None:
        self.ops.block_squared_differences(block.queries.rows, attended, squares, norms)

    def squared_differences_backward(
        self, block: PairBlock, attended: Tensor, grad_squares: Tensor, norms: Tensor
    ) -> None:
        self.ops.block_squared_differences_backward(
            block.queries.rows, attended, grad_squares, norms, block.grad_queries
        )

    def normalise_rows(self, rows: Tensor, bias: Tensor, norms: Tensor, rounded: Tensor) -> None:
        self.ops.block_normalise_rows(rows, bias, norms, None if rounded is rows else rounded)

    def normalise_rows_backward(self, rows: Tensor, norms: Tensor, grad: Tensor, rounded: Tensor) -> None:
        self.ops.block_normalise_rows_backward(rows, norms, grad, None if rounded is grad else rounded)


class _Gates(_Kernels):
    """RCR between its products."""

    def tanh_rows(self, rows: Tensor, bias: Tensor, out: Tensor) -> None:
        self.ops.block_tanh_rows(rows, bias, out)

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
        self.ops.block_warm_rows(rows, bias, weight, shift, before, temperature, temperatures)

    def tanh_rows_backward(self, tangents: Tensor, grad: Tensor, factors: Tensor | None, out: Tensor) -> Tensor:
        count, width = tangents.shape
        sums = torch.empty(_over(count, SUM_ROWS), width, dtype=torch.float32, device=tangents.device)
        self.ops.block_tanh_rows_backward(tangents, grad, factors, out, sums)
        return sums

    def gate_queries(
        self,
        block: PairBlock,
        bias: Tensor,
        before: Tensor | None,
        rows: Tensor,
        tangents: Tensor | None,
        gates: Tensor | None,
    ) -> None:
        self.ops.block_gate_queries(block.queries.rows, bias, before, rows, tangents, gates)

    def gate_queries_backward(
        self, block: PairBlock, before: Tensor | None, tangents: Tensor, grad: Tensor, grad_gates: Tensor | None
    ) -> Tensor:
        sums = block.floats(_over(block.num_queries, GATED_QUERIES), block.width)
        self.ops.block_gate_queries_backward(
            block.queries.rows, before, tangents, grad, grad_gates, block.grad_queries, sums
        )
        return sums


def _over(count: int, at_once: int) -> int:
    return -(-count // at_once)


class _Pooling(_Kernels):
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
        self.ops.block_pool_rows(
            vectors, block.queries.offsets, block.queries.counts, *_dropout(masks), key_bias, asked_bias, value, keys,
            asked, weights, pooled, norms,
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
        self.ops.block_pool_rows_backward(
            vectors, block.queries.offsets, block.queries.counts, *_dropout(masks), value, keys, asked, weights, pooled,
            norms, grad_pooled, torch.empty_like(weights), grad_vectors, grad_keys, grad_asked, grad_bias, grad_value,
        )  # fmt: skip

    def mean_rows(self, block: PairBlock, vectors: Tensor, means: Tensor) -> None:
        self.ops.block_mean_rows(vectors, block.queries.offsets, block.queries.counts, means)

    def mean_rows_backward(self, block: PairBlock, grad_means: Tensor, grad_vectors: Tensor) -> None:
        self.ops.block_mean_rows_backward(grad_means, block.queries.offsets, block.queries.counts, grad_vectors)


def _dropout(masks: Masks) -> tuple[bool, int, int, int, int, int, float]:
    """As the kernels take it; a threshold of 0 drops nothing."""
    seed = (masks.seed_low & 0xFFFFFFFF) | (masks.seed_high & 0xFFFFFFFF) << 32
    numbers = (masks.first_group, masks.first_segment, masks.step, seed)
    return (masks.groups_are_images, *numbers, masks.threshold if masks.drops else 0, masks.scale)


class _Cosines(_Kernels):
    """The score of RCR alone."""

    def cosine_rows(self, block: PairBlock, attended: Tensor, cosines: Tensor, slopes: Tensor | None) -> None:
        self.ops.block_cosine_rows(block.queries.rows, attended, cosines, slopes)

    def cosine_rows_backward(self, block: PairBlock, attended: Tensor, slopes: Tensor, grad_means: Tensor) -> None:
        queries = block.queries
        self.ops.block_cosine_rows_backward(
            queries.rows, attended, slopes, queries.segments, queries.counts, grad_means, block.grad_queries
        )


class DeviceSteps(_Packer, _Attention, _Alignment, _Gates, _Pooling, _Cosines, NodeSteps):
    """All of them."""
