"""How many words each caption has, in the forms that ops take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CaptionLayout:
    """The word counts of a batch, made once and reusable: no words in it, safe to keep over a CUDA graph.

    Every op takes one in the place of ``word_counts``; make it with :func:`caption_layout`.

    Attributes
    ----------
    counts
        ``[C]`` int64 on the host.
    offsets
        ``[C + 1]`` int64 on the device of the words: row of each caption's first word when words are packed.
    """

    counts: Tensor
    offsets: Tensor

    @property
    def num_captions(self) -> int:
        return self.counts.numel()

    @property
    def num_words(self) -> int:
        """N, all words of the batch."""
        return int(self.counts.sum())

    @property
    def longest(self) -> int:
        """W, words of the longest caption; 0 without captions."""
        return int(self.counts.max()) if self.counts.numel() else 0


def caption_layout(word_counts: Sequence[int] | Tensor, device: torch.device | str) -> CaptionLayout:
    """Lay out a batch of captions.

    Parameters
    ----------
    word_counts
        Words of each caption, all at least 1: a list, or an integer tensor ``[C]`` on the host. A device tensor would
        have to be read back, which no function here does; call ``.cpu()`` where that is wanted.
    device
        Where the words live.

    Raises
    ------
    TypeError, ValueError
        Counts that are no integers, not one-dimensional, below 1, or not on the host.
    """
    counts = host_counts("caption_layout", "word_counts", word_counts)
    if counts.device.type != "cpu":
        raise ValueError("caption_layout: word_counts must be on the host, got a tensor on " + str(counts.device))
    check_counts("caption_layout", "word_counts", counts, None)
    return CaptionLayout(counts, offsets_of(counts).to(device))


def offsets_of(counts: Tensor) -> Tensor:
    """``[C + 1]`` exclusive running sum of ``counts [C]``."""
    offsets = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def padded_words(
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
) -> tuple[Tensor, Tensor]:  # [C, W, D], [C, W] bool
    """Words with an axis of captions, and which of them count; rows of the padding hold anything."""
    counts = host_counts("padded_words", "word_counts", word_counts).to(words.device)
    if words.dim() == 3:
        counts = counts.clamp(1, words.shape[1])
    longest = words.shape[1] if words.dim() == 3 else int(counts.max()) if counts.numel() else 1
    number = torch.arange(longest, device=words.device)
    valid = number < counts[:, None]
    if words.dim() == 3:
        return words, valid
    rows = offsets_of(counts)[:-1, None] + number
    return words[rows.clamp(max=max(words.shape[0] - 1, 0))], valid


def host_counts(op: str, name: str, counts: Sequence[int] | Tensor | CaptionLayout) -> Tensor:
    """Counts in any accepted form -> int64 tensor ``[n]``, on the host or on the device they are on (never read)."""
    if isinstance(counts, CaptionLayout):
        return counts.counts
    if isinstance(counts, Tensor):
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(f"{op}: {name} must be integers, got {counts.dtype}")
        if counts.dim() != 1:
            raise ValueError(f"{op}: {name} must be one-dimensional, got shape {list(counts.shape)}")
        return counts.to(torch.int64)
    try:
        values = list(counts)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be a list, a tensor or a CaptionLayout, got {type(counts).__name__}"
        ) from None
    for value in values:
        # The plain int first: torch.compile knows it for its symbolic integers, and cannot ask those for an attribute.
        if isinstance(value, bool) or not (isinstance(value, int) or hasattr(value, "__index__")):
            raise TypeError(f"{op}: {name} must be integers, got {value!r}")
    return torch.tensor([int(value) for value in values], dtype=torch.int64, device="cpu")


def check_counts(op: str, name: str, counts: Tensor, most: int | None) -> None:
    """Raise unless host ``counts`` all lie in ``1..most``."""
    if not counts.numel():
        return
    least, largest = int(counts.min()), int(counts.max())
    if least < 1 or (most is not None and largest > most):
        allowed = f"in 1..{most}" if most is not None else "at least 1"
        wrong = (counts < 1) if most is None else (counts < 1) | (counts > most)
        at = int(wrong.nonzero()[0, 0])
        raise ValueError(f"{op}: {name} must be {allowed}, got {int(counts[at])} at position {at}")
