"""The encoders of the SCAN family (Lee et al. 2018, "Stacked Cross Attention for Image-Text Matching").

Parameter names are the published ones (`fc.*`, `mlp.*`, `embed.weight`, `rnn.*` or `cap_rnn.*`), so state dicts fit
both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

EPS = 1e-8


def l2norm(x: Tensor) -> Tensor:
    """Divide the last dimension by its length: `x / (sqrt(sum x^2) + 1e-8)`.

    The constant stands outside the root, as in the published code, where the derivative of the root at a zero vector is
    infinite. Here a zero vector stays zero and passes no gradient.

    Parameters
    ----------
    x
        [..., D]. Half precision is widened to float32 first: eight bits are too few for a sum of D squares.

    Returns
    -------
    Tensor
        [..., D], float32 (float64 for float64 input).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    square = wide.square().sum(-1, keepdim=True)
    zero = square == 0
    length = torch.where(zero, 1.0, square).sqrt()
    return torch.where(zero, 0.0, wide / (length + EPS))


class RegionMlp(nn.Module):
    """`W2 relu(BN(W1 x + b1)) + b2` over regions, as in RCAR (Diao et al. 2023) and VSE-infinity (Chen et al. 2021).

    The statistics of the BatchNorm are over all regions of all images. The published module makes a second BatchNorm
    that it never applies; its parameters are kept here as well, so that state dicts fit.

    Parameters
    ----------
    feature_dim, hidden_dim, embed_dim
        Widths of what comes in, of the layer between, and of what comes out.
    """

    def __init__(self, feature_dim: int, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(feature_dim, hidden_dim), nn.Linear(hidden_dim, embed_dim)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden_dim), nn.BatchNorm1d(embed_dim)])

    def forward(
        self,
        features: Tensor,  # [B, R, F]
    ) -> Tensor:  # [B, R, D]
        hidden = relu(self.bns[0](self.layers[0](features.flatten(0, 1))))
        out: Tensor = self.layers[1](hidden)
        return out.view(*features.shape[:2], -1)


class ImageEncoder(nn.Module):
    """Regions into the joint space: one linear map, an MLP beside it where asked for, and `l2norm`.

    Parameters
    ----------
    feature_dim
        Width F of the stored region features. They are used as stored.
    embed_dim
        Joint width D.
    mlp
        Whether a :class:`RegionMlp` of hidden width D / 2 adds to the linear map.
    """

    def __init__(self, feature_dim: int, embed_dim: int, *, mlp: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(feature_dim, embed_dim)
        self.mlp = RegionMlp(feature_dim, embed_dim // 2, embed_dim) if mlp else None
        bound = math.sqrt(6.0 / (feature_dim + embed_dim))
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        features: Tensor,  # [B, R, F]
    ) -> Tensor:  # [B, R, D], rows of length 1
        projected = self.fc(features)
        return l2norm(projected if self.mlp is None else projected + self.mlp(features))


class TextEncoder(nn.Module):
    """Words into the joint space: embedding, one bidirectional GRU whose two ways are averaged, and `l2norm`.

    Parameters
    ----------
    vocab_size
        Number of words. There is no padding index: padded places are never looked at, the sequences are packed.
    word_dim
        Width of the embedding.
    embed_dim
        Joint width D, the width of each way of the GRU.
    dropout
        Dropout of the embedded words in training.
    gru_name
        Name of the GRU in the state dict: "rnn", or "cap_rnn" as SGRAF calls it.
    """

    def __init__(
        self, vocab_size: int, word_dim: int, embed_dim: int, *, dropout: float = 0.0, gru_name: str = "rnn"
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.dropout = dropout
        self.gru_name = gru_name
        self.add_module(gru_name, nn.GRU(word_dim, embed_dim, batch_first=True, bidirectional=True))

    def forward(
        self,
        tokens: Tensor,  # [B, W] int64
        word_counts: Sequence[int] | Tensor,  # [B] on the host, 1..W, any order
    ) -> Tensor:  # [B, W, D]; rows of length 1, zeros where a caption has ended
        counts = torch.as_tensor(word_counts, dtype=torch.int64, device="cpu")
        embedded = self.embed(tokens)
        if self.training and self.dropout:
            embedded = dropout(embedded, self.dropout)
        packed = pack_padded_sequence(embedded, counts, batch_first=True, enforce_sorted=False)
        both, _ = self.get_submodule(self.gru_name)(packed)
        forward, backward = both.data.chunk(2, dim=-1)
        # Normalised before padding: padded rows are made of zeros afterwards and never meet the root.
        unit = PackedSequence(l2norm((forward + backward) / 2), *both[1:])
        words, _ = pad_packed_sequence(unit, batch_first=True, total_length=tokens.shape[1])
        return words
