"""Fragments drawn for CCS: what may be drawn, how often, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from itm_kernels import attention_constraints, caption_layout, swapped_regions, swapped_words
from itm_kernels.ops import swapped_fragments

START, END = 1, 2
TOKENS = torch.tensor(
    [
        [START, 10, 11, END, 0],
        [START, 10, 12, 13, END],
        [START, 11, END, 0, 0],  # the image of the first
        [START, 12, 12, END, 0],
    ]
)
COUNTS, GROUPS = [4, 5, 3, 4], [7, 8, 7, 9]


def drawn(times: int, **options: Any) -> Tensor:  # [times, C, W]
    generator = torch.Generator().manual_seed(0)
    made = [
        swapped_words(TOKENS, COUNTS, GROUPS, special=(START, END), generator=generator, **options)
        for _ in range(times)
    ]
    return torch.stack(made)


def allowed(caption: int, word: int) -> list[int]:
    """Rows that may be drawn, by the sentence of the definition."""
    return [
        c * 5 + w
        for c in range(4)
        for w in range(COUNTS[c])
        if GROUPS[c] != GROUPS[caption] and TOKENS[c, w] != TOKENS[caption, word] and TOKENS[c, w] not in (START, END)
    ]


@pytest.mark.parametrize("rounds", [0, swapped_fragments._ROUNDS], ids=["listed", "drawn again"])
def test_words_are_uniform_over_what_is_allowed(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swapped_fragments, "_ROUNDS", rounds)
    made = drawn(2000)
    for c in range(4):
        for w in range(5):
            rows, times = made[:, c, w].unique(return_counts=True)
            if w >= COUNTS[c]:
                assert rows.tolist() == [-1]
                continue
            expected = allowed(c, w)
            assert rows.tolist() == expected
            mean = 2000 / len(expected)
            # Chi-square with one degree less than there are rows; 30 is beyond 1e-4 for up to seven.
            assert ((times - mean) ** 2 / mean).sum() < 30


def test_packed_rows_name_the_same_words() -> None:
    padded, packed = drawn(20), drawn(20, packed=True)
    tokens = torch.cat([row[:n] for row, n in zip(TOKENS, COUNTS, strict=True)])
    asked = padded >= 0
    assert torch.equal(asked, packed >= 0)
    assert torch.equal(tokens[packed[asked]], TOKENS.flatten()[padded[asked]])


def test_no_candidate_is_minus_one() -> None:
    assert (swapped_words(TOKENS, COUNTS, [1, 1, 1, 1]) == -1).all()
    alike = torch.full((3, 2), 5)
    assert (swapped_words(alike, [2, 2, 1], [0, 1, 2]) == -1).all()
    assert (swapped_words(TOKENS, COUNTS, GROUPS, special=range(14)) == -1).all()
    assert swapped_words(TOKENS[:0], [], []).shape == (0, 5)
    # One candidate in the whole batch, for one word.
    tokens = torch.tensor([[5, 5], [5, 6]])
    assert swapped_words(tokens, [2, 2], [0, 1], special=[5]).tolist() == [[3, 3], [-1, -1]]


def test_a_generator_repeats_itself_and_a_large_batch_keeps_the_rules() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 40, (300, 12), generator=generator)
    counts = torch.randint(1, 13, (300,), generator=generator)
    groups = torch.arange(300) // 5
    first, second = (
        swapped_words(tokens, counts, groups, special=[3], generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(first, second)
    valid = torch.arange(12) < counts[:, None]
    assert torch.equal(first >= 0, valid)
    row = first[valid]
    caption = valid.nonzero()[:, 0]
    assert (groups[row // 12] != groups[caption]).all()
    assert (tokens.flatten()[row] != tokens[valid]).all()
    assert (tokens.flatten()[row] != 3).all()
    assert (row % 12 < counts[row // 12]).all()
    other = swapped_words(tokens, caption_layout(counts, "cpu"), groups, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first, other)


def test_regions_are_uniform_over_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    groups, counts = [4, 5, 4, 6], [3, 2, 3, 1]
    made = torch.stack([swapped_regions(groups, 3, region_counts=counts, generator=generator) for _ in range(2000)])
    for i in range(4):
        expected = [j * 3 + r for j in range(4) if groups[j] != groups[i] for r in range(counts[j])]
        for r in range(3):
            rows, times = made[:, i, r].unique(return_counts=True)
            assert rows.tolist() == (expected if r < counts[i] else [-1])
            mean = 2000 / len(rows)
            assert ((times - mean) ** 2 / mean).sum() < 35
    assert (swapped_regions([1, 1], 4) == -1).all()
    assert swapped_regions(torch.tensor([1, 2]), 2).tolist()[0][0] in (2, 3)


def test_the_op_takes_what_is_drawn() -> None:
    regions, words = torch.randn(4, 6, 8), torch.randn(4, 5, 8)
    of_words = swapped_words(TOKENS, COUNTS, GROUPS, special=(START, END))
    made = attention_constraints(regions, words, COUNTS, swapped=of_words)
    assert torch.equal(made.ccs_valid, torch.arange(5) < torch.tensor(COUNTS)[:, None])
    packed = torch.cat([row[:n] for row, n in zip(words, COUNTS, strict=True)])
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    both = [
        attention_constraints(
            regions, given, COUNTS, swapped=swapped_words(TOKENS, COUNTS, GROUPS, packed=as_rows, generator=generator)
        ).ccs
        for given, as_rows, generator in zip((words, packed), (False, True), generators, strict=True)
    ]
    assert torch.equal(*both)
    made = attention_constraints(regions, words, COUNTS, direction="i2t", swapped=swapped_regions(GROUPS, 6))
    assert made.ccs_valid.all()


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": [[1]]}, TypeError, "tokens must be an int64 tensor, got list"),
    ({"tokens": TOKENS.int()}, TypeError, "tokens must be an int64 tensor, got torch.int32"),
    ({"tokens": TOKENS[0]}, ValueError, "tokens must be [C, W], got [5]"),
    ({"tokens": TOKENS.to("meta")}, ValueError, "tokens must be on the host, got a tensor on meta"),
    ({"word_counts": [4, 5, 3]}, ValueError, "word_counts must be [4], got [3]"),
    ({"word_counts": [4, 6, 3, 4]}, ValueError, "word_counts must be in 1..5, got 6 at position 1"),
    ({"image_groups": [1, 2]}, ValueError, "image_groups must be [4], got [2]"),
    ({"image_groups": [0.5] * 4}, TypeError, "image_groups must be integers, got 0.5"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_of_words(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"tokens": TOKENS, "word_counts": COUNTS, "image_groups": GROUPS, **change}
    with pytest.raises(error) as raised:
        swapped_words(**given)
    assert str(raised.value) == f"swapped_words: {message}"


def test_refusals_of_regions() -> None:
    for given, error, message in (
        (([1, 2], 0), ValueError, "regions must be at least 1, got 0"),
        (([1, 2], 2.0), TypeError, "regions must be a whole number, got 2.0"),
        (
            (torch.tensor([1, 2], device="meta"), 2),
            ValueError,
            "image_groups must be on the host, got a tensor on meta",
        ),
    ):
        with pytest.raises(error) as raised:
            swapped_regions(*given)
        assert str(raised.value) == f"swapped_regions: {message}"
    with pytest.raises(ValueError, match=r"region_counts must be \[2\], got \[1\]"):
        swapped_regions([1, 2], 3, region_counts=[1])
