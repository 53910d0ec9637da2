"""CaptionLayout: word counts laid out once, and the checks of counts that every op uses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from itm_kernels import CaptionLayout, caption_layout
from itm_kernels.layout import check_counts, host_counts, offsets_of


@pytest.mark.parametrize(
    "counts", [[3, 1, 5], (3, 1, 5), torch.tensor([3, 1, 5], dtype=torch.int32), np.array([3, 1, 5]), iter([3, 1, 5])],
    ids=["list", "tuple", "tensor", "array", "iterator"],
)  # fmt: skip
def test_a_layout_from_anything(counts: Any) -> None:
    layout = caption_layout(counts, "cpu")
    assert layout.counts.tolist() == [3, 1, 5]
    assert layout.offsets.tolist() == [0, 3, 4, 9]
    assert layout.counts.dtype == layout.offsets.dtype == torch.int64
    assert (layout.num_captions, layout.num_words, layout.longest) == (3, 9, 5)


def test_an_empty_layout() -> None:
    layout = caption_layout([], "cpu")
    assert layout.offsets.tolist() == [0]
    assert (layout.num_captions, layout.num_words, layout.longest) == (0, 0, 0)


def test_offsets_live_with_the_words_and_counts_on_the_host() -> None:
    layout = caption_layout([3, 1], torch.device("meta"))
    assert layout.offsets.device.type == "meta"
    assert layout.counts.device.type == "cpu"


def test_a_layout_cannot_be_changed() -> None:
    layout = caption_layout([3, 1], "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.counts = torch.tensor([1])  # type: ignore[misc]


def test_the_callers_counts_stay_theirs() -> None:
    counts = torch.tensor([3, 1])
    layout = caption_layout(counts, "cpu")
    assert counts.tolist() == [3, 1]
    assert layout.offsets.data_ptr() != counts.data_ptr()


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([3, 0], ValueError, "caption_layout: word_counts must be at least 1, got 0 at position 1"),
        ([-2], ValueError, "caption_layout: word_counts must be at least 1, got -2 at position 0"),
        (torch.tensor([1.0]), TypeError, "caption_layout: word_counts must be integers, got torch.float32"),
        (torch.tensor([[1]]), ValueError, "caption_layout: word_counts must be one-dimensional, got shape [1, 1]"),
        (["3"], TypeError, "caption_layout: word_counts must be integers, got '3'"),
        (3, TypeError, "caption_layout: word_counts must be a list, a tensor or a CaptionLayout, got int"),
        (torch.empty(2, dtype=torch.int64, device="meta"), ValueError,
         "caption_layout: word_counts must be on the host, got a tensor on meta"),
    ],
)  # fmt: skip
def test_refusals(counts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        caption_layout(counts, "cpu")


def test_offsets_are_exclusive_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 100, (1000,), generator=generator)
    offsets = offsets_of(counts)
    assert offsets[0] == 0
    assert torch.equal(offsets.diff(), counts)


def test_host_counts_copies_a_layouts_counts_through() -> None:
    layout = CaptionLayout(torch.tensor([2, 3]), torch.tensor([0, 2, 5]))
    assert host_counts("op", "word_counts", layout) is layout.counts


def test_host_counts_never_reads_a_device() -> None:
    counts = torch.empty(3, dtype=torch.int32, device="meta")
    kept = host_counts("op", "word_counts", counts)
    assert kept.device.type == "meta"
    assert kept.dtype == torch.int64


@pytest.mark.parametrize("most", [None, 7])
def test_check_counts_lets_the_allowed_pass(most: int | None) -> None:
    check_counts("op", "counts", torch.tensor([1, 7]), most)
    check_counts("op", "counts", torch.tensor([], dtype=torch.int64), most)


def test_check_counts_names_the_first_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"^op: counts must be in 1\.\.7, got 8 at position 1$"):
        check_counts("op", "counts", torch.tensor([7, 8, 0]), 7)
