"""Captions with words hidden, replaced or left out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itm_pipeline.data import CaptionAugmentation, Vocabulary
from itm_pipeline.data.vocabulary import MASK

WORDS = Vocabulary.build([" ".join(f"word{n}" for n in range(96))], min_count=1)
VOCABULARY = WORDS.with_mask()
MASKED = VOCABULARY.id_of(MASK)
START, END = 1, 2


def test_the_mask_is_the_last_word_and_comes_once() -> None:
    assert VOCABULARY.words == (*WORDS.words, MASK)
    assert VOCABULARY.with_mask() is VOCABULARY
    assert MASK not in Vocabulary.build(["a <mask> b", MASK], min_count=1)


def test_a_vocabulary_without_mask_is_refused() -> None:
    with pytest.raises(KeyError):
        CaptionAugmentation(WORDS, 0.2, seed=0)


def test_shares_are_the_published_ones() -> None:
    """Of 100,000 words: 20 % change, half of them to the mask, a tenth to any word, the others leave."""
    augmentation = CaptionAugmentation(VOCABULARY, 0.2, seed=1)
    word, count = 7, 100
    seen: Counter[int] = Counter()
    for caption in range(1000):
        changed = augmentation(0, caption, [START, *[word] * count, END])
        assert (changed[0], changed[-1]) == (START, END)
        seen.update(changed[1:-1])
    total = 1000 * count
    kept, masked = seen.pop(word), seen.pop(MASKED)
    replaced = sum(seen.values())
    left_out = total - kept - masked - replaced
    # Five standard deviations of a share of 100,000 are at most 0.8 per cent; other ids hold 99 of 101 replacements.
    assert kept / total == pytest.approx(0.8 + 0.02 / 101, abs=0.007)
    assert masked / total == pytest.approx(0.1 + 0.02 / 101, abs=0.005)
    assert replaced / total == pytest.approx(0.02 * 99 / 101, abs=0.0025)
    assert left_out / total == pytest.approx(0.08, abs=0.0045)
    # Any word of the vocabulary, special ones included, about 20 times each.
    assert set(seen) == set(range(len(VOCABULARY))) - {word, MASKED}
    assert max(seen.values()) < 50


@given(
    length=st.integers(0, 30),
    share=st.floats(1e-3, 1),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    caption=st.integers(0, 10**7),
)
def test_ends_stay_and_the_same_place_gives_the_same_words(
    length: int, share: float, seed: int, epoch: int, caption: int
) -> None:
    ids = [START, *range(4, 4 + length), END]
    changed = CaptionAugmentation(VOCABULARY, share, seed)(epoch, caption, ids)
    assert (changed[0], changed[-1]) == (START, END)
    assert 2 <= len(changed) <= len(ids)
    assert all(0 <= word < len(VOCABULARY) for word in changed)
    assert CaptionAugmentation(VOCABULARY, share, seed)(epoch, caption, ids) == changed
    assert ids == [START, *range(4, 4 + length), END]  # what was given is left alone


def test_seed_epoch_and_caption_all_tell() -> None:
    ids = [START, *range(4, 60), END]
    seen = {
        tuple(CaptionAugmentation(VOCABULARY, 0.5, seed)(epoch, caption, ids))
        for seed in range(3)
        for epoch in range(3)
        for caption in range(3)
    }
    assert len(seen) == 27


def test_a_share_of_one_leaves_no_word_as_it_was() -> None:
    augmentation = CaptionAugmentation(VOCABULARY, 1.0, seed=0)
    lengths = [len(augmentation(0, caption, [START, *range(4, 24), END])) for caption in range(300)]
    assert sum(lengths) / 300 == pytest.approx(2 + 20 * 0.6, abs=0.7)
