"""Batches of captions with their images: which, in which order, and as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError
from .precomp import PrecompSplit
from .vocabulary import Vocabulary

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B captions, each with its image; row ``b`` of every field belongs to the ``b``-th caption asked for."""

    features: Tensor
    """``[B, R, F]`` float32, the regions of each caption's image as stored."""
    tokens: Tensor
    """``[B, W]`` int64 word ids, ``W`` the longest caption of the batch, zero (``<pad>``) behind each caption's end."""
    word_counts: list[int]
    """Words of each caption, ``<start>`` and ``<end>`` included; at least 2."""
    image_index: Tensor
    """``[B]`` int64 index of the unique image; captions of equal images are false negatives of each other."""
    caption_index: Tensor
    """``[B]`` int64 index of the caption in its split."""

    def __len__(self) -> int:
        return len(self.word_counts)


class CaptionSampler:
    """Shuffled batches of caption indices: a pure function of ``(seed, epoch)``.

    The last batch of an epoch is smaller when ``batch_size`` does not divide the captions, as in the published code,
    or left out with ``drop_last``.

    Parameters
    ----------
    num_captions, batch_size, seed
        Captions of the split, captions of a batch, a non-negative seed.
    drop_last
        Leave out a last batch that is not full.

    Attributes
    ----------
    current_epoch, next_batch
        Where the sampler stands: the batches before ``next_batch`` of ``current_epoch`` have been handed out.

    Raises
    ------
    ValueError
        When a number is out of range, or ``drop_last`` would leave no batch at all.
    """

    def __init__(self, num_captions: int, batch_size: int, seed: int, drop_last: bool = False) -> None:
        if num_captions < 1 or batch_size < 1 or seed < 0:
            raise ValueError(
                "num_captions and batch_size must be at least 1 and seed at least 0, "
                f"got {num_captions}, {batch_size} and {seed}"
            )
        if drop_last and num_captions < batch_size:
            raise ValueError(f"drop_last with {num_captions} captions and batch_size {batch_size} leaves no batch")
        self.num_captions = num_captions
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.current_epoch = 0
        self.next_batch = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        full, rest = divmod(self.num_captions, self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def order(self, epoch: int) -> Indices:
        """All caption indices ``[num_captions]`` in the order of ``epoch``."""
        # The raw stream of a bit generator is guaranteed by NumPy never to change; Generator.permutation is not.
        keys = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_captions)
        return np.argsort(keys, kind="stable").astype(np.int64)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Indices]:
        """Index arrays of ``epoch``, from batch ``start_batch`` on; ``start_batch == len(self)`` yields nothing.

        A batch counts as used (``next_batch``) from the moment it is handed out, so a state saved after the step on
        a batch continues with the next one.
        """
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(f"epoch {epoch}, batch {start_batch}: an epoch has batches 0 to {len(self)}")
        order = self.order(epoch)
        self.current_epoch, self.next_batch = epoch, start_batch
        for batch in range(start_batch, len(self)):
            self.next_batch = batch + 1
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def state_dict(self) -> dict[str, Any]:
        """Settings and position, as plain numbers that JSON keeps."""
        return {
            "num_captions": self.num_captions,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "epoch": self.current_epoch,
            "next_batch": self.next_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the position of ``state``; go on with ``epoch(current_epoch, next_batch)``.

        Raises
        ------
        UserError
            When ``state`` was saved with other settings or other data: the order would not be continued.
        """
        mine = self.state_dict()
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise UserError(f"the sampler's saved state lacks {', '.join(missing)}; resume from another checkpoint")
        for name in ("num_captions", "batch_size", "seed", "drop_last"):
            if state[name] != mine[name]:
                raise UserError(
                    f"the run to resume had {name} {state[name]}, now it is {mine[name]}: "
                    "resume with the same data and settings, or start a new run"
                )
        if state["epoch"] < 0 or not 0 <= state["next_batch"] <= len(self):
            raise UserError(
                f"the sampler's saved position (epoch {state['epoch']}, batch {state['next_batch']}) lies outside an "
                f"epoch of {len(self)} batches; resume from another checkpoint"
            )
        self.current_epoch, self.next_batch = state["epoch"], state["next_batch"]


def make_batch(
    split: PrecompSplit,
    vocabulary: Vocabulary,
    indices: Sequence[int] | Indices,
    *,
    edit: Callable[[int, list[int]], list[int]] | None = None,
    longest_first: bool = False,
) -> Batch:
    """Gather captions ``indices`` and their images.

    Parameters
    ----------
    split, vocabulary
        Where the captions and features come from, and the ids of their words.
    indices
        ``[B]`` caption indices, ``B >= 1``, repeats allowed.
    edit
        What becomes of the ids of a caption: called with its index and its ids, gives at least one id.
    longest_first
        Sort by the number of words, longest first, equal ones as given. By default the given order is kept.

    Raises
    ------
    ValueError, IndexError
        When there is no index, or one lies outside the split.
    """
    captions = np.asarray(indices, dtype=np.int64)
    if captions.ndim != 1 or captions.size == 0:
        raise ValueError(f"indices must be [B] with B at least 1, got {list(captions.shape)}")
    if captions.min() < 0 or captions.max() >= split.num_captions:
        raise IndexError(f"caption {captions.min()} or {captions.max()} lies outside 0 to {split.num_captions - 1}")
    encoded = [vocabulary.encode(split.captions[index]) for index in captions]
    if edit is not None:
        encoded = [edit(int(index), ids) for index, ids in zip(captions, encoded, strict=True)]
    if longest_first:
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
        captions, encoded = captions[order], [encoded[row] for row in order]
    word_counts = [len(ids) for ids in encoded]
    tokens = torch.zeros(len(encoded), max(word_counts), dtype=torch.int64)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = torch.as_tensor(ids)
    return Batch(
        features=gather_rows(split, split.row_of(captions)),
        tokens=tokens,
        word_counts=word_counts,
        image_index=torch.from_numpy(np.array(split.image_of(captions), dtype=np.int64)),
        caption_index=torch.from_numpy(captions.copy()),
    )


def gather_rows(split: PrecompSplit, rows: Indices) -> Tensor:
    """Feature rows ``rows [B]`` as a ``[B, R, F]`` float32 tensor in their own memory.

    Rows are read in the order of the file, so that a map of a file on a disk reads forwards, and copied once, straight
    to where they belong.
    """
    features = np.asarray(split.features)  # the map itself without memmap's costly indexing; copies nothing
    # NumPy asks the system for huge pages: filling its memory takes a third of the time of filling torch's.
    gathered = np.empty((len(rows), *features.shape[1:]), dtype=np.float32)
    for position in np.argsort(rows, kind="stable"):
        gathered[position] = features[rows[position]]
    return torch.from_numpy(gathered)
