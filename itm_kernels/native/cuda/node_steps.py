"""Calls of SGRAF's CUDA kernels, as ``NodeSteps`` of :mod:`itm_kernels.pair_blocks.steps` asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.steps import Filter

# Runs of pairs that add up what they give the parameters, a warp each: 16 warps on each of 128 multiprocessors.
RUNS = 2048
# Rows of a part of a sum over rows, eight a warp; and the most parts, eight a multiprocessor.
PART_ROWS = 64
PARTS = 1024


class NodeSteps:
    """The whole of a pair, filtration, and the graph."""

    ops: Any
    """The raw kernels."""

    def whole_squares(self, images: Tensor, captions: Tensor, squares: Tensor) -> None:
        self.ops.block_whole_squares(images, captions, squares)

    def whole_squares_backward(
        self, images: Tensor, captions: Tensor, grad_squares: Tensor, grad_images: Tensor, grad_captions: Tensor
    ) -> None:
        self.ops.block_whole_squares_backward(images, captions, grad_squares, grad_images, grad_captions)

    def node_logits(self, vectors: Tensor, by: Filter, logits: Tensor) -> None:
        self.ops.block_node_logits(vectors, by.weight, by.bias, logits)

    def filtrate_nodes(
        self, block: PairBlock, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter, scores: Tensor
    ) -> None:
        self.ops.block_filtrate_nodes(
            vectors, block.queries.offsets, block.queries.counts, logits, statistics, by.norm_weight, by.norm_bias,
            by.eps, by.score_weight, by.score_bias, scores,
        )  # fmt: skip

    def filtrate_nodes_backward(
        self,
        block: PairBlock,
        vectors: Tensor,
        logits: Tensor,
        statistics: Tensor,
        by: Filter,
        grad_scores: Tensor,
        means: Tensor | None,
        slopes: Tensor,
        grad_nodes: Tensor | None,
    ) -> Tensor | None:
        queries, columns = block.queries, 2 * vectors.shape[1] + 2
        sums = None
        if grad_nodes is not None:
            sums = block.floats(min(block.pairs, RUNS), -(-columns // 4) * 4)  # rows begin at whole words
        self.ops.block_filtrate_nodes_backward(
            vectors, queries.offsets, queries.counts, 1 + queries.most, logits, statistics, by.norm_weight,
            by.norm_bias, by.eps, by.score_weight, by.score_bias, grad_scores, by.weight, means, slopes, grad_nodes,
            sums,
        )  # fmt: skip
        return None if sums is None else sums[:, :columns]

    def graph_attend(self, block: PairBlock, nodes: Tensor, asking: Tensor, shift: Tensor, gathered: Tensor) -> None:
        queries = block.queries
        self.ops.block_graph_attend(
            nodes, queries.offsets, queries.counts, block.pairs, 1 + queries.most, asking, shift, gathered
        )

    def graph_attend_backward(
        self, block: PairBlock, nodes: Tensor, shift: Tensor, grad_gathered: Tensor, asking: Tensor, grad_nodes: Tensor
    ) -> Tensor:
        queries = block.queries
        sums = block.floats(min(block.pairs, RUNS), nodes.shape[1])
        self.ops.block_graph_attend_backward(
            nodes, queries.offsets, queries.counts, block.pairs, 1 + queries.most, shift, grad_gathered, asking,
            grad_nodes, sums,
        )  # fmt: skip
        return sums

    def relu_rows(self, rows: Tensor, bias: Tensor, wide: Tensor | None) -> None:
        self.ops.block_relu_rows(rows, bias, wide)

    def relu_rows_backward(self, grad: Tensor, rows: Tensor) -> Tensor:
        parts = min(-(-rows.shape[0] // PART_ROWS), PARTS)
        sums = torch.empty(parts, rows.shape[1], dtype=torch.float32, device=rows.device)
        self.ops.block_relu_rows_backward(grad, rows, sums)
        return sums
