"""The end of a scorer without aggregation: mean cosine of queries and what they attend to, which is not formed.

p = sum_k a_k s_k        |c|^2 = a^T G a, G the Gram matrix of a group's keys
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native.cpu.alignment import Attention
from itm_kernels.native.cpu.pair_chunks import Chunk, multiply


class MeanCosine:
    """The end of one chunk."""

    def __init__(self, chunk: Chunk, plain: Tensor, attention: Attention) -> None:  # [G, K, L] float32
        self.chunk, self.plain, self.attention = chunk, plain, attention
        keys = chunk.keys.float()
        self.keys = keys
        gram = torch.bmm(keys, keys.transpose(1, 2))
        self.images = multiply(gram, attention.weights, chunk.workspace.floats("images", *plain.shape))
        self.query_norms = torch.linalg.vector_norm(chunk.wide_queries, dim=1)

    def forward(self) -> Tensor:  # [G, segments]
        """Scores."""
        chunk = self.chunk
        scores = torch.empty(chunk.groups, chunk.segment_numbers.shape[0], dtype=torch.float32, device="cpu")
        cosines = chunk.workspace.floats("cosines", chunk.rows)
        torch.ops.itm_kernels_native.mean_cosines(
            self.plain, self.attention.weights, self.images, self.query_norms, chunk.offsets, cosines, scores
        )
        return scores

    def backward(self, grad_scores: Tensor) -> tuple[Tensor, Tensor]:  # [G, segments] -> twice [G, K, L] float32
        """Gradients of plain products and weights. Through Gram matrix and norms: added to keys and queries."""
        chunk = self.chunk
        floats, shape, weights = chunk.workspace.floats, self.plain.shape, self.attention.weights
        grad_plain, scaled = floats("grad plain", *shape), floats("scaled weights", *shape)
        grad_norms = floats("cosines", chunk.groups, shape[2])
        torch.ops.itm_kernels_native.mean_cosines_backward(
            self.plain, weights, self.query_norms, chunk.offsets, grad_scores.contiguous(), self.images, grad_norms,
            grad_plain, scaled,
        )  # fmt: skip
        assert chunk.grad_keys is not None
        assert chunk.grad_queries is not None
        grad_gram = torch.bmm(scaled, weights.transpose(1, 2))  # symmetric
        chunk.grad_keys.baddbmm_(grad_gram, self.keys, alpha=2)
        # On the floor of the cosine nothing reaches the norms; nor does it where a query is zero.
        scale = torch.where(self.query_norms > 0, grad_norms.sum(0) / self.query_norms, 0.0)
        chunk.grad_queries.addcmul_(chunk.wide_queries, scale[:, None])
        return grad_plain, self.images
