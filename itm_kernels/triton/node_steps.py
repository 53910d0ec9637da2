"""Launches of SGRAF's kernels between the library's products: :class:`itm_kernels.pair_blocks.steps.NodeSteps`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.steps import Filter
from itm_kernels.triton.kernels import filtration, graph, whole_squares
from itm_kernels.triton.pair_tiles import (
    GRAPH_CHANNELS,
    GRAPH_NODES,
    ROWS,
    SUM_ROWS,
    SUM_WIDTH,
    WEIGHTS,
    WHOLE_ROWS,
    WIDTH,
    edge_channels,
    filtration_tile,
    over,
)


class Nodes:
    """The whole of a pair, filtration, and the graph between its products."""

    def whole_squares(self, images: Tensor, captions: Tensor, squares: Tensor) -> None:
        pairs, width = squares.shape
        whole_squares.whole_squares[(over(pairs, ROWS) * over(width, WIDTH),)](
            images, captions, squares, pairs, captions.shape[0], width, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )

    def whole_squares_backward(
        self, images: Tensor, captions: Tensor, grad_squares: Tensor, grad_images: Tensor, grad_captions: Tensor
    ) -> None:
        segments = captions.shape[0]
        of_images, of_captions = (images, grad_images, segments), (captions, grad_captions, 1)
        for (own, grad, stride), (other, _, its_stride) in ((of_images, of_captions), (of_captions, of_images)):
            whole_squares.whole_squares_backward[(own.shape[0] * over(own.shape[1], SUM_WIDTH),)](
                own, other, grad_squares, grad, other.shape[0], stride, its_stride, own.shape[1], BLOCK_N=WHOLE_ROWS,
                BLOCK_D=SUM_WIDTH,
            )  # fmt: skip

    def node_logits(self, vectors: Tensor, by: Filter, logits: Tensor) -> None:
        filtration.node_logits[(over(vectors.shape[0], ROWS),)](
            vectors, by.weight, by.bias, logits, *vectors.shape, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )

    def filtrate_nodes(
        self, block: PairBlock, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter, scores: Tensor
    ) -> None:
        nodes, channels = filtration_tile(vectors.shape[1])
        weights = _weights(block, logits, statistics, by)
        filtration.filtrate_nodes[(block.pairs,)](
            vectors, weights, block.queries.offsets, block.queries.counts, by.score_weight, by.score_bias, scores,
            *_sizes(block), vectors.shape[1], BLOCK_Q=nodes, BLOCK_S=channels,
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
        nodes, channels = filtration_tile(vectors.shape[1])
        sums = None if grad_nodes is None else block.floats(block.pairs, 2 * vectors.shape[1] + 2)
        weights = _weights(block, logits, statistics, by)
        filtration.filtrate_nodes_backward[(block.pairs,)](
            vectors, logits, weights, block.queries.offsets, block.queries.counts, statistics, by.weight,
            by.norm_weight, by.eps, by.score_weight, by.score_bias, grad_scores, means, slopes, grad_nodes, sums,
            *_sizes(block), vectors.shape[1], BATCH=means is not None, DESCENDS=grad_nodes is not None, BLOCK_Q=nodes,
            BLOCK_S=channels,
        )  # fmt: skip
        return sums

    def graph_attend(self, block: PairBlock, nodes: Tensor, asking: Tensor, shift: Tensor, gathered: Tensor) -> None:
        edges = _edges(block, nodes, asking, shift, None)
        graph.graph_gather[(block.pairs * over(nodes.shape[1], GRAPH_CHANNELS),)](
            nodes, block.queries.offsets, block.queries.counts, *edges, gathered, asking.shape[0], *_sizes(block),
            block.queries.most + 1, nodes.shape[1], BLOCK_S=GRAPH_CHANNELS, **_products(nodes, asking),
        )  # fmt: skip

    def graph_attend_backward(
        self, block: PairBlock, nodes: Tensor, shift: Tensor, grad_gathered: Tensor, asking: Tensor, grad_nodes: Tensor
    ) -> Tensor:
        sums = block.floats(block.pairs, nodes.shape[1])
        edges = _edges(block, nodes, asking, shift, grad_gathered)
        graph.graph_nodes_backward[(block.pairs * over(nodes.shape[1], GRAPH_CHANNELS),)](
            nodes, asking, shift, grad_gathered, block.queries.offsets, block.queries.counts, *edges, grad_nodes, sums,
            asking.shape[0], *_sizes(block), block.queries.most + 1, nodes.shape[1], BLOCK_S=GRAPH_CHANNELS,
            **_products(nodes, asking),
        )  # fmt: skip
        return sums

    def relu_rows(self, rows: Tensor, bias: Tensor, wide: Tensor | None) -> None:
        count, width = rows.shape
        graph.relu_rows[(over(count, ROWS) * over(width, WIDTH),)](
            rows, bias, wide, count, width, WIDENS=wide is not None, BLOCK_N=ROWS, BLOCK_D=WIDTH
        )

    def relu_rows_backward(self, grad: Tensor, rows: Tensor) -> Tensor:
        count, width = rows.shape
        sums = torch.empty(over(count, SUM_ROWS), width, dtype=torch.float32, device=rows.device)
        graph.relu_rows_backward[(sums.shape[0] * over(width, SUM_WIDTH),)](
            grad, rows, sums, count, width, BLOCK_N=SUM_ROWS, BLOCK_D=SUM_WIDTH
        )
        return sums


def _sizes(block: PairBlock) -> tuple[int, int, int]:
    return block.rows, block.num_queries, block.segments


def _weights(block: PairBlock, logits: Tensor, statistics: Tensor, by: Filter) -> Tensor:  # [rows + pairs]
    """Sigmoids of the normalised logits, 0 for words of the padding."""
    weights = torch.empty_like(logits)
    filtration.node_weights[(over(logits.shape[0], WEIGHTS),)](
        logits, block.queries.segments, statistics, by.norm_weight, by.norm_bias, by.eps, weights, block.pairs,
        *_sizes(block), BLOCK_N=WEIGHTS,
    )  # fmt: skip
    return weights


def _edges(
    block: PairBlock, nodes: Tensor, asking: Tensor, shift: Tensor, grad_gathered: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Products of a step and what their softmax needs a row, as its kernels read them."""
    rows, most, how = asking.shape[0], block.queries.most + 1, _products(nodes, asking)
    planes = 1 if grad_gathered is None else 2
    products, tops = block.floats(planes, rows, most), block.floats(planes + 1, rows)
    tiles = 1 if how["WHOLE"] else over(most, GRAPH_NODES)
    graph.graph_edges[(block.pairs * tiles,)](
        nodes, asking, shift, grad_gathered, block.queries.offsets, block.queries.counts, products, tops, rows,
        *_sizes(block), tiles, most, nodes.shape[1], BACKWARD=grad_gathered is not None,
        BLOCK_S=edge_channels(nodes.element_size()), **how,
    )  # fmt: skip
    return products, tops


def _products(nodes: Tensor, asking: Tensor) -> dict[str, Any]:
    """Whether the whole alone asks, and how float32 tiles are multiplied."""
    exact = nodes.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {
        "WHOLE": asking.shape[0] != nodes.shape[0],
        "PRECISION": "tf32x3" if exact else "tf32",
        "BLOCK_N": GRAPH_NODES,
    }
