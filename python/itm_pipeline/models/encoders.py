"""The encoders of the SCAN family (Lee et al. 2018, "Stacked Cross Attention for Image-Text Matching").

Parameter names are the published ones (`fc.*`, `embed.weight`, `rnn.*`), so state dicts fit both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
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


class ImageEncoder(nn.Module):
    """Regions into the joint space: one linear map and `l2norm`.

    Parameters
    ----------
    feature_dim
        Width F of the stored region features. They are used as stored.
    embed_dim
        Joint width D.
    """

    def __init__(self, feature_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(feature_dim, embed_dim)
        bound = math.sqrt(6.0 / (feature_dim + embed_dim))
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self,
        features: Tensor,  # [B, R, F]
    ) -> Tensor:  # [B, R, D], rows of length 1
        return l2norm(self.fc(features))


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
    """

    def __init__(self, vocab_size: int, word_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        self.rnn = nn.GRU(word_dim, embed_dim, batch_first=True, bidirectional=True)

    def forward(
        self,
        tokens: Tensor,  # [B, W] int64
        word_counts: Sequence[int] | Tensor,  # [B] on the host, 1..W, any order
    ) -> Tensor:  # [B, W, D]; rows of length 1, zeros where a caption has ended
        counts = torch.as_tensor(word_counts, dtype=torch.int64, device="cpu")
        packed = pack_padded_sequence(self.embed(tokens), counts, batch_first=True, enforce_sorted=False)
        both, _ = self.rnn(packed)
        forward, backward = both.data.chunk(2, dim=-1)
        # Normalised before padding: padded rows are made of zeros afterwards and never meet the root.
        unit = PackedSequence(l2norm((forward + backward) / 2), *both[1:])
        words, _ = pad_packed_sequence(unit, batch_first=True, total_length=tokens.shape[1])
        return words
