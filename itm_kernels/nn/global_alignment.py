"""SGRAF's global vectors: self-attention over the regions of an image, and over the words of a caption.

``g`` is the mean, ``p = softmax(u . (tanh(W1 x) * tanh(W2 g)))`` over the fragments, the global vector
``l2norm(sum p x)``; images with batch normalisation inside both tanh. Once per image and once per caption, so this is
plain PyTorch. Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from itm_kernels.nn.linear import linear

EPS = 1e-8


class VisualSelfAttention(nn.Module):
    """``[I, R, D] -> [I, D]``. The batch normalisation has a channel for every region: R is fixed, order matters."""

    def __init__(self, embed_dim: int, num_regions: int, dropout: float) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(
            linear(embed_dim, embed_dim), nn.BatchNorm1d(num_regions), nn.Tanh(), nn.Dropout(dropout)
        )
        self.embedding_global = nn.Sequential(
            linear(embed_dim, embed_dim), nn.BatchNorm1d(embed_dim), nn.Tanh(), nn.Dropout(dropout)
        )
        self.embedding_common = nn.Sequential(linear(embed_dim, 1))

    def forward(self, regions: Tensor) -> Tensor:  # [I, R, D] -> [I, D]
        local, whole = self.embedding_local(regions), self.embedding_global(regions.mean(1))
        logits = self.embedding_common(local * whole[:, None])  # [I, R, 1]
        return _unit((torch.softmax(logits, dim=1).to(regions.dtype) * regions).sum(1))


class TextSelfAttention(nn.Module):
    """``[C, W, D]`` with ``[C, W]`` valid ``-> [C, D]``."""

    def __init__(self, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding_local = nn.Sequential(linear(embed_dim, embed_dim), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_global = nn.Sequential(linear(embed_dim, embed_dim), nn.Tanh(), nn.Dropout(dropout))
        self.embedding_common = nn.Sequential(linear(embed_dim, 1))

    def forward(self, words: Tensor, valid: Tensor) -> Tensor:  # [C, W, D], [C, W] bool -> [C, D]
        words = torch.where(valid[..., None], words, 0.0)  # what stands in the padding may be anything
        mean = words.sum(1) / valid.sum(1, keepdim=True)
        local, whole = self.embedding_local(words), self.embedding_global(mean.to(words.dtype))
        logits = self.embedding_common(local * whole[:, None]).squeeze(-1)
        weights = torch.softmax(logits.masked_fill(~valid, -torch.inf), dim=1)
        return _unit((weights[..., None].to(words.dtype) * words).sum(1))


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (length + EPS)
