"""Words and their ids, in the JSON format of the published SCAN code."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tokenizer import tokenize

PAD, START, END, UNK = "<pad>", "<start>", "<end>", "<unk>"
MASK = "<mask>"
"""What stands for a hidden word, in vocabularies of models that train on such captions."""
SPECIAL_WORDS = (PAD, START, END, UNK)
"""The first four words of every vocabulary of the SCAN family, ids 0 to 3."""

# Captions whose ids are remembered, so that an epoch does not tokenise again what the one before did. The largest
# published training set has 566,435 captions; their ids take about 150 bytes each.
_REMEMBERED_CAPTIONS = 600_000


class Vocabulary:
    """Words with ids ``0 .. len - 1``; the first four are ``<pad> <start> <end> <unk>``.

    Parameters
    ----------
    words
        All words in the order of their ids, the four special ones first.

    Raises
    ------
    ValueError
        When the special words are not where they belong or a word occurs twice.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[: len(SPECIAL_WORDS)]) != SPECIAL_WORDS:
            raise ValueError(f"a vocabulary starts with {' '.join(SPECIAL_WORDS)}, got {list(words[:4])}")
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            word, count = Counter(self.words).most_common(1)[0]
            raise ValueError(f"the word {word!r} occurs {count} times in the vocabulary")
        self._encoded: dict[str, array[int]] = {}

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int = 4) -> Vocabulary:
        """Vocabulary of all tokens that occur at least ``min_count`` times in ``captions``.

        Ids depend on the counts alone, not on the order of the captions: most frequent first, equal counts in
        alphabetical order. (The published vocabularies hold the same words in the arbitrary order of a set.)
        """
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(tokenize(caption))
        kept = [word for word, count in counts.items() if count >= min_count and word not in SPECIAL_WORDS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls([*SPECIAL_WORDS, *kept])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Read ``{"idx": n, "word2idx": {word: id}, "idx2word": {id: word}}``.

        Raises
        ------
        UserError
            When the file is missing, is not such a JSON file, contradicts itself, or orders the special words as
            another model does.
        """
        path = Path(path)
        ids = _read_ids(path)
        words = [""] * len(ids)
        for word, index in ids.items():
            if not 0 <= index < len(ids):
                raise UserError(
                    f"{path}: the word {word!r} has id {index}, but {len(ids)} words have ids 0 to {len(ids) - 1}; "
                    "take a fresh copy of the file"
                )
            if words[index]:
                raise UserError(
                    f"{path}: the words {words[index]!r} and {word!r} share id {index}; take a fresh copy of the file"
                )
            words[index] = word
        for index, special in enumerate(SPECIAL_WORDS):
            if words[index : index + 1] != [special]:
                found = f"has id {ids[special]}" if special in ids else "is missing"
                raise UserError(
                    f"{path}: {special} {found}, it must have id {index}; this vocabulary belongs to another model "
                    f"(SCAN's family starts with {' '.join(SPECIAL_WORDS)}): give that model's own vocabulary file"
                )
        return cls(words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the published JSON format, to a temporary name first and renamed when complete."""
        path = Path(path)
        content = {
            "idx": len(self.words),
            "word2idx": {word: index for index, word in enumerate(self.words)},
            "idx2word": {str(index): word for index, word in enumerate(self.words)},
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def with_mask(self) -> Vocabulary:
        """This vocabulary, with `<mask>` behind its last word unless it has one already."""
        return self if MASK in self else Vocabulary([*self.words, MASK])

    def id_of(self, word: str) -> int:
        """Id of a word that the vocabulary holds; `KeyError` for others."""
        return self._ids[word]

    def tokens(self, caption: str) -> list[str]:
        """Tokens of ``caption`` between ``<start>`` and ``<end>``, one for each id of :meth:`encode`.

        Words outside the vocabulary are kept as they are written (in lower case).
        """
        return [START, *tokenize(caption), END]

    def encode(self, caption: str) -> list[int]:
        """Ids of :meth:`tokens`; a word outside the vocabulary becomes ``<unk>``."""
        ids = self._encoded.get(caption)
        if ids is None:
            unknown = self._ids[UNK]
            ids = array("i", [self._ids.get(token, unknown) for token in self.tokens(caption)])
            if len(self._encoded) < _REMEMBERED_CAPTIONS:
                self._encoded[caption] = ids
        return ids.tolist()

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._ids

    def __eq__(self, other: object) -> bool:
        return self.words == other.words if isinstance(other, Vocabulary) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self.words)} words, {self.fingerprint()[:12]})"

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the words in the order of their ids: equal exactly for equal vocabularies."""
        return hashlib.sha256(json.dumps(self.words).encode("ascii")).hexdigest()

    def require_fingerprint(self, expected: str, owner: str) -> None:
        """Refuse to go on with another vocabulary than the one that ``owner`` (a run, a checkpoint) was trained with.

        Raises
        ------
        UserError
            When ``expected`` is not this vocabulary's fingerprint.
        """
        found = self.fingerprint()
        if found != expected:
            raise UserError(
                f"{owner} was trained with another vocabulary (fingerprint {expected[:12]}, this one of {len(self)} "
                f"words has {found[:12]}): give the vocabulary file that it was trained with"
            )


def _read_ids(path: Path) -> dict[str, int]:
    try:
        content: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such vocabulary file; give its path, or let one be built from the captions"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a vocabulary JSON file") from None
    except ValueError as error:  # malformed JSON and bytes that are not UTF-8
        raise UserError(f"{path}: not a JSON file ({error}); give the vocabulary JSON of the published code") from None
    form = '{"idx": n, "word2idx": {word: id}, "idx2word": {id: word}}'
    if not isinstance(content, dict) or not {"idx", "word2idx", "idx2word"} <= content.keys():
        raise UserError(f"{path}: not a vocabulary; it must be {form}")
    ids, back = content["word2idx"], content["idx2word"]
    if not isinstance(ids, dict) or not isinstance(back, dict) or any(type(index) is not int for index in ids.values()):
        raise UserError(f"{path}: not a vocabulary; it must be {form} with whole numbers as ids")
    if back != {str(index): word for word, index in ids.items()}:
        raise UserError(f"{path}: word2idx and idx2word contradict each other; take a fresh copy of the file")
    if content["idx"] != len(ids):
        raise UserError(
            f"{path}: idx is {content['idx']} but there are {len(ids)} words; take a fresh copy of the file"
        )
    return ids
