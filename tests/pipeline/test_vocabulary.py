"""Vocabularies: which words, which ids, the published file format, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itm_pipeline.data import Vocabulary, tokenize
from itm_pipeline.errors import UserError

# The time an example takes says nothing on a busy machine.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPECIAL = ["<pad>", "<start>", "<end>", "<unk>"]
CAPTIONS = ["A dog runs.", "The dog, a dog!", "a DOG isn't a cat.", "A cat runs."]


def write_vocabulary(path: Path, words: list[str], **changes: object) -> Path:
    """The published form, written without the code under test."""
    content: dict[str, object] = {
        "idx": len(words),
        "word2idx": {word: index for index, word in enumerate(words)},
        "idx2word": {str(index): word for index, word in enumerate(words)},
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


def test_words_from_their_count_on() -> None:
    # a 5 (one of them in "The dog, a dog!"), dog 4, "." 3, cat 2, runs 2
    assert Vocabulary.build(CAPTIONS, min_count=4).words == (*SPECIAL, "a", "dog")
    assert Vocabulary.build(CAPTIONS).words == (*SPECIAL, "a", "dog"), "the published rule: four times"
    assert Vocabulary.build(CAPTIONS, min_count=2).words == (*SPECIAL, "a", "dog", ".", "cat", "runs")
    with pytest.raises(ValueError, match="min_count"):
        Vocabulary.build(CAPTIONS, min_count=0)


@RELAXED
@given(
    captions=st.lists(st.lists(st.sampled_from(["a", "man", "dog", ".", "the", "<unk>"]), min_size=1).map(" ".join)),
    min_count=st.integers(1, 5),
    data=st.data(),
)
def test_build_counts_and_ignores_order(captions: list[str], min_count: int, data: st.DataObject) -> None:
    vocabulary = Vocabulary.build(captions, min_count)
    counts = Counter(token for caption in captions for token in tokenize(caption))
    assert set(vocabulary.words) == set(SPECIAL) | {word for word, count in counts.items() if count >= min_count}
    shuffled = data.draw(st.permutations(captions))
    assert Vocabulary.build(shuffled, min_count) == vocabulary


def test_encode_and_tokens_go_together() -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.tokens("A zebra runs.") == ["<start>", "a", "zebra", "runs", ".", "<end>"]
    expected = [1, vocabulary.words.index("a"), 3, vocabulary.words.index("runs"), vocabulary.words.index("."), 2]
    assert vocabulary.encode("A zebra runs.") == expected
    first = vocabulary.encode("A zebra runs.")
    first.append(99)
    assert vocabulary.encode("A zebra runs.") == expected, "the caller's list is the caller's"
    assert vocabulary.encode("") == [1, 2]
    # A special word written in a caption is text, not a command.
    assert vocabulary.tokens("<end>") == ["<start>", "<", "end", ">", "<end>"]


def test_saved_file_has_the_published_form(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    path = tmp_path / "vocab.json"
    vocabulary.save(path)
    content = json.loads(path.read_text())
    assert content["idx"] == len(vocabulary) == 9
    assert content["word2idx"]["<pad>"] == 0
    assert content["word2idx"]["dog"] == 5
    assert content["idx2word"]["5"] == "dog"
    assert Vocabulary.load(path) == vocabulary
    assert [entry.name for entry in tmp_path.iterdir()] == ["vocab.json"], "no temporary file stays"


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocab.json"
    Vocabulary.build(CAPTIONS, min_count=2).save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        Vocabulary.build(CAPTIONS, min_count=1).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["vocab.json"]


def test_loads_more_words_than_the_base(tmp_path: Path) -> None:
    # RCAR, CHAN and VSE-infinity add a word of their own at the end.
    vocabulary = Vocabulary.load(write_vocabulary(tmp_path / "v.json", [*SPECIAL, "dog", "<mask>"]))
    assert len(vocabulary) == 6
    assert "<mask>" in vocabulary
    assert "cat" not in vocabulary


def test_fingerprint_tells_vocabularies_apart(tmp_path: Path) -> None:
    one = Vocabulary([*SPECIAL, "dog", "cat"])
    assert one.fingerprint() == Vocabulary([*SPECIAL, "dog", "cat"]).fingerprint()
    assert (
        len({Vocabulary([*SPECIAL, *words]).fingerprint() for words in (["dog", "cat"], ["cat", "dog"], ["dogcat"])})
        == 3
    )
    # The value is written into runs, so it must stay what it is.
    assert one.fingerprint() == "ca8b84c452ff84d8d09f581082e0a1f78dd88cb27c9d6c2c5e56dc84751eeec7"
    one.require_fingerprint(one.fingerprint(), "run")
    with pytest.raises(UserError, match=r"^runs/1 was trained with another vocabulary .*: give the vocabulary file"):
        Vocabulary([*SPECIAL, "cat"]).require_fingerprint(one.fingerprint(), "runs/1")


NAAF = ["<pad>", "<unk>", "<start>", "<end>", "dog"]
REFUSED: dict[str, tuple[list[str], dict[str, object], str]] = {
    "another model's order": (
        NAAF,
        {},
        r"<start> has id 2, it must have id 1; this vocabulary belongs to another model",
    ),
    "no special words": (["dog", "cat", "a", "b"], {}, r"<pad> is missing, it must have id 0"),
    "too short": (SPECIAL[:3], {}, r"<unk> is missing, it must have id 3"),
    "wrong idx": ([*SPECIAL, "dog"], {"idx": 4}, r"idx is 4 but there are 5 words"),
    "contradiction": ([*SPECIAL, "dog"], {"idx2word": {"0": "<pad>"}}, r"contradict each other"),
    "ids that are text": ([*SPECIAL], {"word2idx": {"<pad>": "0"}}, r"whole numbers as ids"),
    "id out of range": (
        [],
        {"idx": 1, "word2idx": {"a": 7}, "idx2word": {"7": "a"}},
        r"'a' has id 7, but 1 words have",
    ),
    "a list": ([], {"word2idx": []}, r"not a vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(case: str, tmp_path: Path) -> None:
    words, changes, message = REFUSED[case]
    path = write_vocabulary(tmp_path / "vocab.json", words, **changes)
    with pytest.raises(UserError, match=message) as caught:
        Vocabulary.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[1, 2]", "not a vocabulary"),
        (b'{"idx": 1}', "not a vocabulary"),
        (None, "no such vocabulary file"),
    ],
)
def test_malformed_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Vocabulary.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Vocabulary.load(tmp_path)


def test_constructor_refuses() -> None:
    with pytest.raises(ValueError, match="starts with <pad>"):
        Vocabulary(["dog"])
    with pytest.raises(ValueError, match="'dog' occurs 2 times"):
        Vocabulary([*SPECIAL, "dog", "dog"])
