"""The order of captions, exact resumption, and what stands in a batch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itm_pipeline.data import CaptionSampler, PrecompSplit, Vocabulary, make_batch
from itm_pipeline.errors import UserError

# The time an example takes says nothing on a busy machine.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CAPTIONS = [
    "a dog",
    "a dog runs",
    "the dog",
    "dog",
    "runs a lot",
    "a cat",
    "cat",
    "the cat",
    "a cat sits down",
    "it sits",
]


@pytest.fixture(params=["a row per image", "a row per caption"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> PrecompSplit:
    features = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.save(tmp_path / "train_ims.npy", features if request.param == "a row per image" else features.repeat(5, axis=0))
    (tmp_path / "train_caps.txt").write_text("\n".join(CAPTIONS) + "\n")
    return PrecompSplit(tmp_path, "train")


@RELAXED
@given(num=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_in_batches(num: int, size: int, seed: int, epoch: int) -> None:
    sampler = CaptionSampler(num, size, seed)
    batches = list(sampler.epoch(epoch))
    assert len(batches) == len(sampler)
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size
    assert np.concatenate(batches).dtype == np.int64
    assert sorted(np.concatenate(batches).tolist()) == list(range(num))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, size: int = 100) -> list[int]:
        return [int(index) for batch in CaptionSampler(100, size, seed).epoch(epoch) for index in batch]

    assert order(1, 2) == order(1, 2, size=7), "the batch size cuts the same order"
    assert len({tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16
    used = CaptionSampler(100, 10, 1)
    list(used.epoch(5))
    assert np.array_equal(next(iter(used.epoch(2))), order(1, 2)[:10]), "earlier epochs leave no trace"


def test_the_order_never_changes() -> None:
    # Runs are resumed with later versions too; these numbers were written down once.
    assert CaptionSampler(10, 10, 0).order(0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert CaptionSampler(10, 10, 7).order(3).tolist() == [2, 4, 7, 3, 5, 1, 8, 9, 0, 6]


def test_every_caption_comes_first_about_equally_often() -> None:
    firsts = np.bincount([CaptionSampler(5, 1, 0).order(epoch)[0] for epoch in range(2000)], minlength=5)
    assert firsts.min() > 330, firsts  # 400 expected, standard deviation 18


def test_drop_last() -> None:
    kept, cut = CaptionSampler(10, 4, 3), CaptionSampler(10, 4, 3, drop_last=True)
    assert [len(batch) for batch in kept.epoch(0)] == [4, 4, 2]
    assert [batch.tolist() for batch in cut.epoch(0)] == [batch.tolist() for batch in kept.epoch(0)][:2]
    assert len(CaptionSampler(8, 4, 3)) == len(CaptionSampler(8, 4, 3, drop_last=True)) == 2
    with pytest.raises(ValueError, match="leaves no batch"):
        CaptionSampler(3, 4, 0, drop_last=True)


@RELAXED
@given(
    num=st.integers(1, 40), size=st.integers(1, 9), epoch=st.integers(0, 3), stop=st.integers(1, 45), drop=st.booleans()
)
def test_resume_in_the_middle_of_an_epoch(num: int, size: int, epoch: int, stop: int, drop: bool) -> None:
    drop = drop and num >= size
    whole = [batch.tolist() for batch in CaptionSampler(num, size, 5, drop).epoch(epoch)]
    first = CaptionSampler(num, size, 5, drop)
    seen = [batch.tolist() for batch in itertools.islice(first.epoch(epoch), stop)]
    state = json.loads(json.dumps(first.state_dict()))
    second = CaptionSampler(num, size, 5, drop)
    second.load_state_dict(state)
    rest = [batch.tolist() for batch in second.epoch(second.current_epoch, second.next_batch)]
    assert seen + rest == whole
    assert len(rest) == max(0, len(whole) - stop)


def test_state_counts_a_batch_as_used_when_it_is_handed_out() -> None:
    sampler = CaptionSampler(10, 4, 3)
    iterator = sampler.epoch(2)
    assert sampler.state_dict()["next_batch"] == 0
    for used in (1, 2, 3):
        next(iterator)
        assert sampler.state_dict() == {
            "num_captions": 10, "batch_size": 4, "seed": 3, "drop_last": False, "epoch": 2, "next_batch": used,
        }  # fmt: skip
    assert list(iterator) == []
    assert sampler.state_dict()["next_batch"] == 3
    assert list(sampler.epoch(2, 3)) == []


def test_states_that_do_not_fit_are_refused() -> None:
    state = CaptionSampler(10, 4, 3).state_dict()
    for name, value in (("num_captions", 12), ("batch_size", 5), ("seed", 4), ("drop_last", True)):
        with pytest.raises(UserError, match=rf"had {name} {value}, now it is "):
            CaptionSampler(10, 4, 3).load_state_dict({**state, name: value})
    with pytest.raises(UserError, match="lacks next_batch, seed"):
        CaptionSampler(10, 4, 3).load_state_dict({k: v for k, v in state.items() if k not in ("seed", "next_batch")})
    for position in ({"next_batch": 4}, {"next_batch": -1}, {"epoch": -1}):
        with pytest.raises(UserError, match="lies outside"):
            CaptionSampler(10, 4, 3).load_state_dict({**state, **position})


def test_numbers_out_of_range_are_refused() -> None:
    for arguments in ((0, 4, 0), (4, 0, 0), (4, 4, -1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            CaptionSampler(*arguments)
    for epoch, start in ((-1, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match="an epoch has batches 0 to 3"):
            next(CaptionSampler(10, 4, 3).epoch(epoch, start))


def test_a_batch_holds_what_was_asked_for_in_that_order(split: PrecompSplit) -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    indices = np.array([8, 0, 3, 9, 3])
    batch = make_batch(split, vocabulary, indices)
    assert len(batch) == 5
    assert batch.features.dtype == torch.float32
    assert batch.features.shape == (5, 3, 4)
    for position, index in enumerate(indices):
        assert np.array_equal(batch.features[position].numpy(), split.features[split.image_rows[index // 5]])
    assert batch.image_index.tolist() == [1, 0, 0, 1, 0]
    assert batch.caption_index.tolist() == [8, 0, 3, 9, 3]
    assert batch.image_index.dtype == batch.caption_index.dtype == batch.tokens.dtype == torch.int64
    assert batch.word_counts == [6, 4, 3, 4, 3]
    assert batch.tokens.shape == (5, 6)
    for position, index in enumerate(indices):
        count = batch.word_counts[position]
        assert batch.tokens[position, :count].tolist() == vocabulary.encode(CAPTIONS[index])
        assert not batch.tokens[position, count:].any()


def test_a_batch_is_independent_of_its_sources(split: PrecompSplit) -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=1)
    indices = np.array([1, 2])
    batch = make_batch(split, vocabulary, indices)
    batch.features.zero_()
    batch.caption_index.zero_()
    assert indices.tolist() == [1, 2]
    assert np.abs(split.features).sum() > 0
    assert make_batch(split, vocabulary, [1, 2]).features.abs().sum() > 0


def test_indices_outside_the_split_are_refused(split: PrecompSplit) -> None:
    vocabulary = Vocabulary.build(CAPTIONS)
    for indices in ([0, 10], [-1]):
        with pytest.raises(IndexError, match="outside 0 to 9"):
            make_batch(split, vocabulary, indices)
    for bad in ([], [[0, 1]]):
        with pytest.raises(ValueError, match=r"indices must be \[B\]"):
            make_batch(split, vocabulary, bad)  # type: ignore[arg-type]


def test_captions_are_edited_and_sorted_together_with_what_belongs_to_them(split: PrecompSplit) -> None:
    vocabulary = Vocabulary.build(CAPTIONS, 1)
    asked = [3, 8, 0, 7, 1]
    plain = make_batch(split, vocabulary, asked)

    def edit(caption: int, ids: list[int]) -> list[int]:
        return [*ids[:-1], *[4] * (caption % 3), ids[-1]]

    batch = make_batch(split, vocabulary, asked, edit=edit, longest_first=True)
    # Words of captions 3, 8, 0, 7, 1 with both ends, and what the edit adds: 3+0, 6+2, 4+0, 4+1, 5+1.
    assert batch.caption_index.tolist() == [8, 1, 7, 0, 3]
    assert batch.word_counts == [8, 6, 5, 4, 3]
    for row, caption in enumerate(batch.caption_index.tolist()):
        ids = batch.tokens[row, : batch.word_counts[row]].tolist()
        assert ids == edit(caption, vocabulary.encode(CAPTIONS[caption]))
        assert batch.tokens[row, batch.word_counts[row] :].sum() == 0
        was = asked.index(caption)
        assert torch.equal(batch.features[row], plain.features[was])
        assert batch.image_index[row] == plain.image_index[was]
    # Equally long ones keep their order.
    same = make_batch(split, vocabulary, [7, 0, 2], longest_first=True)
    assert same.caption_index.tolist() == [7, 0, 2]
