"""Dropout by counters: Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

A mask is a function of the seed and of where an element stands in the whole batch, so it depends on neither blocks nor
tiles nor floors, and a backward makes it again instead of keeping it. Four channels share one counter:

    key     = seed mod 2^32, seed / 2^32
    counter = image, caption, query, step * 2^24 + branch * 2^23 + channel / 4
    word    = channel mod 4

with the global index of image and caption. An element is kept when the upper 24 bits of its word are at least
``ceil(p 2^24)``, that is when a number uniform in [0, 1) is at least p; what is kept is divided by ``1 - p``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEYS, POOLED = 0, 1
"""Branches of an aggregation step: the alignment vectors (per query), and the pooled vector (query 0)."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits for each counter of four words; int64 tensors that broadcast, values 0..2^32 - 1."""
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    a, b, c, d = counter
    for _ in range(_ROUNDS):
        # Multiplication of int64 wraps, and the bits of the product are those of the unsigned one.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _LOW) ^ b ^ keys[0],
            second & _LOW,
            (first >> 32 & _LOW) ^ d ^ keys[1],
            first & _LOW,
        )
        keys = [(key + weyl) & _LOW for key, weyl in zip(keys, _WEYL, strict=True)]
    return a, b, c, d


def dropout_scale(
    images: Tensor,  # int64, global numbers
    captions: Tensor,  # int64, global numbers
    queries: Tensor,  # int64; 0 for the pooled branch
    channels: int,
    *,
    step: int,
    branch: int,
    dropout: float,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:  # [..., channels]
    """What to multiply with: 0 or ``1 / (1 - dropout)``. The index tensors broadcast to the leading shape."""
    place = step * 2**24 + branch * 2**23 + torch.arange((channels + 3) // 4, device=images.device)
    index = (images[..., None], captions[..., None], queries[..., None], place)
    words = torch.stack(torch.broadcast_tensors(*philox(index, seed)), dim=-1).flatten(-2)[..., :channels]
    return (words >> 8 >= threshold(dropout)).to(dtype) / (1 - dropout)


def threshold(dropout: float) -> int:
    """Least value of a word's upper 24 bits that is kept: whole numbers, so that every floor decides alike."""
    return math.ceil(dropout * 2**24)


def seed_tensor(op: str, seed: int | Tensor) -> Tensor:  # -> [] int64 on the host
    """A seed as an op takes it: as a tensor, whose value is no part of a compiled program."""
    if not isinstance(seed, Tensor):
        return torch.tensor(seed, dtype=torch.int64, device="cpu")
    if seed.dtype != torch.int64 or seed.dim() or seed.device.type != "cpu":
        raise TypeError(
            f"{op}: seed must be a whole number or an int64 tensor [] on the host, got {seed.dtype} "
            f"{list(seed.shape)} on {seed.device}"
        )
    return seed


def seed_value(op: str, seed: Tensor) -> int:
    """Its number, or ``ValueError``."""
    value = int(seed)
    if value < 0:
        raise ValueError(f"{op}: seed must be within 0..2^63 - 1, got {value}")
    return value
