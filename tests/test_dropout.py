"""Dropout's generator gives the published numbers, and its masks depend on nothing but seed and place."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from itm_kernels.ops.dropout import KEYS, POOLED, dropout_scale, philox, threshold

# Known answers of Random123 for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def masks(
    images: Tensor, captions: Tensor, queries: Tensor, channels: int = 32, *, step: int = 0, branch: int = KEYS,
    dropout: float = 0.4, seed: int = 1, dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    return dropout_scale(
        images, captions, queries, channels, step=step, branch=branch, dropout=dropout, seed=seed, dtype=dtype
    )


def grid(images: int, captions: int, queries: int, *, first: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers that broadcast to [images, captions, queries]."""
    return (
        torch.arange(first[0], first[0] + images)[:, None, None],
        torch.arange(first[1], first[1] + captions)[:, None],
        torch.arange(queries),
    )


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = words(key)
    found = philox(tuple(torch.tensor(word) for word in words(counter)), low + (high << 32))
    assert [int(word) for word in found] == words(expected)


def test_counters_of_many_places_are_those_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (4, 50), generator=generator)
    together = torch.stack(philox(tuple(counters), 2**40 + 7))
    for place in range(50):
        alone = torch.stack(philox(tuple(counters[:, place]), 2**40 + 7))
        assert torch.equal(together[:, place], alone)


@pytest.mark.parametrize("dropout", [0.1, 0.4, 0.9])
def test_as_many_are_dropped_as_asked(dropout: float) -> None:
    scale = masks(*grid(40, 25, 10), 64, dropout=dropout, dtype=torch.float64)
    kept = scale != 0
    assert torch.equal(scale[kept], torch.full_like(scale[kept], 1 / (1 - dropout)))
    # Five deviations of the mean of that many independent draws, and for the means along each axis as well.
    for axes in ((), (0,), (1,), (2,), (3,)):
        chances = kept.double().mean(tuple({0, 1, 2, 3} - set(axes)))
        draws = kept.numel() / chances.numel()
        deviation = (dropout * (1 - dropout) / draws) ** 0.5
        assert (chances - (1 - dropout)).abs().max() < 5 * deviation


def test_what_is_kept_is_decided_by_whole_numbers() -> None:
    # With probability 1 - 2^-24 only the largest number is kept; with 0 all are.
    assert threshold(0.0) == 0
    assert threshold(2.0**-24) == 1
    assert threshold(2.0**-25) == 1
    assert threshold(0.5) == 2**23
    assert threshold(1 - 2.0**-24) == 2**24 - 1
    assert (masks(*grid(3, 3, 3), dropout=0.0) == 1).all()


def test_an_element_is_kept_where_its_word_is_large() -> None:
    # The documented layout, element by element.
    images, captions, queries = torch.tensor(7), torch.tensor(11), torch.tensor(3)
    scale = masks(images, captions, queries, 10, step=2, branch=POOLED, dropout=0.25, seed=99)
    for channel in range(10):
        counter = (7, 11, 3, 2 * 2**24 + 2**23 + channel // 4)
        word = int(philox(tuple(torch.tensor(number) for number in counter), 99)[channel % 4])
        assert scale[channel] == (1 / 0.75 if word / 2**32 >= 0.25 else 0.0)


def test_a_number_that_is_exactly_the_probability_is_kept() -> None:
    place = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    upper = int(philox((*place, torch.tensor(0)), 99)[0]) >> 8
    kept, dropped = (masks(*place, 1, dropout=number / 2**24, seed=99) for number in (upper, upper + 1))
    assert kept != 0
    assert dropped == 0


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 31, 33])
def test_channels_need_not_come_in_fours(channels: int) -> None:
    found = masks(*grid(3, 4, 5), channels)
    assert found.shape == (3, 4, 5, channels)
    assert torch.equal(found, masks(*grid(3, 4, 5), 64)[..., :channels])


def test_a_block_has_the_mask_of_the_whole() -> None:
    whole = masks(*grid(8, 9, 6))
    block = masks(*grid(3, 4, 6, first=(2, 5)))
    assert torch.equal(block, whole[2:5, 5:9])
    # The last numbers that an offset reaches.
    last = 2**31 - 2
    assert torch.equal(masks(*grid(2, 2, 6, first=(last, last)))[1:, 1:], masks(*grid(1, 1, 6, first=(last + 1,) * 2)))


def test_masks_of_different_places_are_independent() -> None:
    places = grid(10, 10, 10)
    base = masks(*places, step=1)
    others = {
        "step": masks(*places, step=2),
        "branch": masks(*places, step=1, branch=POOLED),
        "seed": masks(*places, step=1, seed=2),
        "upper half of the seed": masks(*places, step=1, seed=1 + 2**32),
        "images": masks(*grid(10, 10, 10, first=(10, 0)), step=1),
        "captions": masks(*grid(10, 10, 10, first=(0, 10)), step=1),
        "image and caption exchanged": masks(places[1], places[0], places[2], step=1),
        "shifted query": base.roll(1, 2),
        "shifted channel": base.roll(1, 3),
    }
    for (name, mine), (other, its) in itertools.combinations({"base": base, **others}.items(), 2):
        # Exchanged, the ten pairs on the diagonal are the same by definition.
        kept = ~torch.eye(10, dtype=torch.bool)
        agreement = float(((mine != 0) == (its != 0))[kept].double().mean())
        # By chance 0.6^2 + 0.4^2 agree; 28,800 draws, five deviations.
        assert abs(agreement - 0.52) < 0.015, (name, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mask_is_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    scale = masks(*grid(4, 4, 4), dtype=dtype)
    assert scale.dtype == dtype
    assert torch.equal(scale != 0, masks(*grid(4, 4, 4), dtype=torch.float64) != 0)
