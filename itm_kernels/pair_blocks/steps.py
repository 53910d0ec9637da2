"""The kernels a floor brings: what happens between the library's products on a block of pairs.

Row ``g * L + l`` of a buffer is query l facing key group g of a :class:`PairBlock`, pair ``g * segments + s`` is
segment s of it, and the nodes of SGRAF are its rows and then its pairs. Everything is float32 but what is said to be
*for products*, in the block's dtype. Sums run in one order, without atomics; sums over rows come back in parts, which
the caller adds up. Rows of the padding never count, and what a product reads of them is zero where it matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from itm_kernels.pair_blocks.blocks import PairBlock
    from itm_kernels.pair_blocks.records import Masks, Packing
    from itm_kernels.pair_blocks.rows import Block


class Packer(Protocol):
    """Rows of a side, packed or padded."""

    def pack(self, packings: tuple[Packing, ...], width: int) -> None:
        """Rows, offsets, counts and segments of each side."""

    def pad_groups(self, keys: Block, padded: Tensor) -> None:  # [G, K, D], for products
        """Zeros behind the last key of a group."""

    def add_padded(self, keys: Block, padded: Tensor, gradient: Tensor) -> None:  # [G, K, D], [.., D]
        """Into the rows of a gradient from the block's first group on, as ``keys.extent`` says."""


class AttentionSteps(Protocol):
    """Products to weights: ``a = softmax_k(t n)``, ``n`` the clipped products over their norm in the segment."""

    def attention_weights(
        self,
        block: PairBlock,
        products: Tensor,  # [G, K, L]
        temperatures: Tensor | None,  # [rows]; None: one number for all
        temperature: float,
        norms: Tensor,  # [G, segments, K], out: of the clipped products of each key over the queries of each segment
        weights: Tensor,  # [G, K, L], for products, out
    ) -> None:
        """Weights; zero for keys and queries of the padding."""

    def attention_weights_backward(
        self,
        block: PairBlock,
        products: Tensor,
        norms: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        grad: Tensor,  # [G, K, L] of the weights, overwritten by anything
        grad_temperatures: Tensor,  # [rows], out
        grad_products: Tensor,  # [G, K, L], for products, out
    ) -> None:
        """From weights to products; zero for keys and queries of the padding."""


class AlignmentSteps(Protocol):
    """``x = l2norm(weight (q - l2norm(c))^2 + bias)`` around its product."""

    def squared_differences(self, block: PairBlock, attended: Tensor, squares: Tensor, norms: Tensor) -> None:
        """``[rows, D]`` for products to ``[rows, D]`` for products; norms ``[rows]`` of what is attended to, out."""

    def squared_differences_backward(
        self, block: PairBlock, attended: Tensor, grad_squares: Tensor, norms: Tensor
    ) -> None:  # [rows, D] for products, overwritten by its gradient; the same; [rows]
        """Added to ``block.grad_queries`` as well."""

    def normalise_rows(self, rows: Tensor, bias: Tensor, norms: Tensor, rounded: Tensor) -> None:
        """``[n, S]`` in place behind a bias ``[S]``; norms ``[n]`` out; ``rounded`` for products, maybe the same."""

    def normalise_rows_backward(self, rows: Tensor, norms: Tensor, grad: Tensor, rounded: Tensor) -> None:
        """Gradient ``[n, S]`` at rows of length 1 to that before, in place; ``rounded`` as above."""


class GateSteps(Protocol):
    """RCR between its products."""

    def tanh_rows(self, rows: Tensor, bias: Tensor, out: Tensor) -> None:  # [n, H], [H], [n, H] maybe for products
        """``out = tanh(rows + bias)``."""

    def warm_rows(
        self,
        rows: Tensor,  # [n, U], overwritten by its tanh
        bias: Tensor,  # [U]
        weight: Tensor,  # [U]
        shift: Tensor,  # []
        before: Tensor | None,  # [n]; None: one number for all
        temperature: float,
        temperatures: Tensor,  # [n], out
    ) -> None:
        """``relu(weight . tanh(rows + bias) + shift + before)``."""

    def tanh_rows_backward(
        self, tangents: Tensor, grad: Tensor, factors: Tensor | None, out: Tensor
    ) -> Tensor:  # [n, H]; [n, H], or [n] times factors [H]; [n, H] maybe for products -> [parts, H]
        """Gradient before tanh, and its sums over the rows."""

    def gate_queries(
        self,
        block: PairBlock,
        bias: Tensor,  # [D]
        before: Tensor | None,  # [rows, D] for products; None: ones
        rows: Tensor,  # [rows, D] for products: z, overwritten by gated queries
        tangents: Tensor | None,  # [rows, D] for products, out
        gates: Tensor | None,  # [rows, D] for products, out; maybe the same as `before`
    ) -> None:
        """``t = tanh(z + b)``, ``e = clamp(t + e_before, -1, 1)``, ``rows = q e``."""

    def gate_queries_backward(
        self,
        block: PairBlock,
        before: Tensor | None,
        tangents: Tensor,
        grad: Tensor,  # [rows, D] for products: of gated queries, overwritten by that of z
        grad_gates: Tensor | None,  # [rows, D]: of the gates, overwritten by that of those before
    ) -> Tensor:  # [parts, D]
        """Added to ``block.grad_queries`` as well; sums are those of the bias."""


class PoolingSteps(Protocol):
    """RAR between its products: ``w = softmax_i(v . (K_i P))``, ``K = D tanh(k + bk)``, ``P = D tanh(p + bp)``."""

    def pool_rows(
        self,
        block: PairBlock,
        vectors: Tensor,  # [rows, S]
        keys: Tensor,  # [rows, S]: k, overwritten by its tanh
        key_bias: Tensor,  # [S]
        asked: Tensor,  # [pairs, S]: p, overwritten by its tanh
        asked_bias: Tensor,  # [S]
        value: Tensor,  # [S]
        masks: Masks,
        weights: Tensor,  # [rows], out
        pooled: Tensor,  # [pairs, S], out: rows summed by their weights, of length 1
        norms: Tensor,  # [pairs], out: before the normalisation
    ) -> None:
        """A step of a pair; weights of the padding are not written."""

    def pool_rows_backward(
        self,
        block: PairBlock,
        vectors: Tensor,
        keys: Tensor,  # after tanh
        asked: Tensor,  # after tanh
        value: Tensor,
        masks: Masks,
        weights: Tensor,
        pooled: Tensor,
        norms: Tensor,
        grad_pooled: Tensor,  # [pairs, S], overwritten by anything
        grad_vectors: Tensor,  # [rows, S], added to
        grad_keys: Tensor,  # [rows, S] for products, out, before tanh; maybe the same as `keys`
        grad_asked: Tensor,  # [pairs, S], out, before tanh
        grad_bias: Tensor,  # [pairs, S], out: of the key's bias
        grad_value: Tensor,  # [pairs, S], out
    ) -> None:
        """The way back; rows of the padding get zero in ``grad_keys``."""

    def mean_rows(self, block: PairBlock, vectors: Tensor, means: Tensor) -> None:  # [rows, S], [pairs, S]
        """Over the queries of each pair."""

    def mean_rows_backward(self, block: PairBlock, grad_means: Tensor, grad_vectors: Tensor) -> None:
        """``[pairs, S]`` added to ``[rows, S]``."""


class CosineSteps(Protocol):
    """The score of RCR alone."""

    def cosine_rows(self, block: PairBlock, attended: Tensor, cosines: Tensor, slopes: Tensor | None) -> None:
        """``[rows, D]`` for products to ``[rows]``; slopes ``[3, rows]`` for the backward."""

    def cosine_rows_backward(self, block: PairBlock, attended: Tensor, slopes: Tensor, grad_means: Tensor) -> None:
        """From the mean of each pair ``[G, segments]``; what is attended to is overwritten by its gradient."""


class Filter(NamedTuple):
    """SAF's parameters; one-element tensors stay on their device."""

    weight: Tensor  # [S]
    bias: Tensor  # []
    norm_weight: Tensor  # []
    norm_bias: Tensor  # []
    eps: float
    score_weight: Tensor | None  # [S]; None, as the next: no score is asked for
    score_bias: Tensor | None  # []


class NodeSteps(Protocol):
    """SGRAF: the whole of a pair, filtration, and the graph between its products."""

    def whole_squares(self, images: Tensor, captions: Tensor, squares: Tensor) -> None:
        """``[G, D]`` less ``[segments, D]``, squared: ``[pairs, D]``; all for products."""

    def whole_squares_backward(
        self, images: Tensor, captions: Tensor, grad_squares: Tensor, grad_images: Tensor, grad_captions: Tensor
    ) -> None:  # [G, D], [segments, D], [pairs, D] for products; [G, D], [segments, D] float32, added to
        """One order: captions for an image, images for a caption."""

    def node_logits(self, vectors: Tensor, by: Filter, logits: Tensor) -> None:  # [n, S], [n]
        """``weight . x + bias``."""

    def filtrate_nodes(
        self, block: PairBlock, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter, scores: Tensor
    ) -> None:  # [rows + pairs, S], [rows + pairs], [2, segments]; [G, segments] out
        """Batch normalisation, sigmoid, l1 weights over the nodes of a pair, their sum at length 1, its score."""

    def filtrate_nodes_backward(
        self,
        block: PairBlock,
        vectors: Tensor,
        logits: Tensor,
        statistics: Tensor,
        by: Filter,
        grad_scores: Tensor,  # [G, segments], contiguous
        means: Tensor | None,  # [2, segments]: of the slopes over the batch; None: the statistics are constants
        slopes: Tensor,  # [pairs, 2], out: sums of the gradient at normalised logits, and of it times these
        grad_nodes: Tensor | None,  # [rows + pairs, S], out; None: slopes alone
    ) -> Tensor | None:  # [parts, 2 S + 2]: of weight, score weight, bias, score bias
        """From scores to nodes."""

    def graph_attend(self, block: PairBlock, nodes: Tensor, asking: Tensor, shift: Tensor, gathered: Tensor) -> None:
        """Nodes ``[rows + pairs, S]`` summed by ``softmax_k((asking_i + shift) . x_k)`` over the nodes of the pair;

        asking, gathered ``[rows + pairs, S]``, or ``[pairs, S]`` where the whole alone asks; all for products.
        """

    def graph_attend_backward(
        self, block: PairBlock, nodes: Tensor, shift: Tensor, grad_gathered: Tensor, asking: Tensor, grad_nodes: Tensor
    ) -> Tensor:  # asking is overwritten by its gradient; [rows + pairs, S] float32 out -> [parts, S]
        """Sums are those of the shift."""

    def relu_rows(self, rows: Tensor, bias: Tensor, wide: Tensor | None) -> None:  # [n, S] for products, in place
        """``relu(rows + bias)``; ``wide`` takes it before it is rounded."""

    def relu_rows_backward(self, grad: Tensor, rows: Tensor) -> Tensor:  # [n, S]; [n, S] for products -> [parts, S]
        """Rows, as they came out, are overwritten by the gradient before relu; its sums over the rows."""


class Steps(
    Packer, AttentionSteps, AlignmentSteps, GateSteps, PoolingSteps, CosineSteps, NodeSteps, Protocol
):  # fmt: skip
    """All of a floor's."""
