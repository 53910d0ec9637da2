"""Captions with words hidden, replaced or left out, as RCAR trains on (after BERT, and VSE-infinity's `drop`)."""

from __future__ import annotations

import numpy as np

from .vocabulary import MASK, Vocabulary

MASKED, REPLACED = 0.5, 0.1
"""Shares of the words that change; the others of them are left out."""


class CaptionAugmentation:
    """Changes each word of a caption with one probability; the first and the last id, its ends, stay.

    Of the words that change, half become ``<mask>``, a tenth any word of the vocabulary, special ones included, and
    the others are left out. What becomes of a caption is a pure function of ``(seed, epoch, caption)``, so a run that
    is resumed anywhere sees the same captions.

    Parameters
    ----------
    vocabulary
        Must hold ``<mask>`` (:meth:`Vocabulary.with_mask`).
    share
        Probability that a word changes.
    seed
        A non-negative number.

    Raises
    ------
    KeyError
        The vocabulary has no ``<mask>``.
    """

    def __init__(self, vocabulary: Vocabulary, share: float, seed: int) -> None:
        self.size = len(vocabulary)
        self.mask = vocabulary.id_of(MASK)
        self.share = share
        self.seed = seed

    def __call__(self, epoch: int, caption: int, ids: list[int]) -> list[int]:
        """Ids of caption number ``caption`` in ``epoch``, from its ids ``<start> ... <end>``; at least those two."""
        # The raw stream is guaranteed by NumPy never to change. A spawn key keeps apart from the sampler, which draws
        # the order of an epoch from (seed, epoch) alone.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch], spawn_key=(caption,)))
        # Of 64 bits the upper 53 make a number uniform in [0, 1).
        start, *words, end = ids
        chances = (bits.random_raw(len(words)) >> np.uint64(11)).astype(np.float64) * 2.0**-53 / self.share
        others = (bits.random_raw(len(words)) % np.uint64(self.size)).tolist()
        changed = [start]
        for word, chance, other in zip(words, chances.tolist(), others, strict=True):
            if chance >= 1:
                changed.append(word)
            elif chance < MASKED:
                changed.append(self.mask)
            elif chance < MASKED + REPLACED:
                changed.append(other)
        return [*changed, end]
