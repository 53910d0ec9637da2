"""The marked captions of `Sentences/ID.txt`: `[/EN#5/people/other a man] waves .`

A mark has the number of a chain, one type or several, and the words of a phrase. Chain 0 is not visual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from itm_pipeline.data.lines import read_lines
from itm_pipeline.entities.size import refuse_large
from itm_pipeline.errors import UserError

NOT_VISUAL = "0"

_OPENING = "[/EN#"
# No part of it can match what its neighbour matches, so it takes linear time on any text.
_MARK = re.compile(r"\[/EN#([0-9]{1,18})((?:/[^\s/\[\]]+)+)\s([^\[\]]*)\]")


@dataclass(frozen=True)
class Phrase:
    """Some words of a caption, and what they mean."""

    chain: str
    types: tuple[str, ...]
    start: int
    """First character in the text of its sentence."""
    end: int
    """Behind the last one."""


@dataclass(frozen=True)
class Sentence:
    """A caption without its marks, and the phrases that they marked, in order."""

    text: str
    phrases: tuple[Phrase, ...]


def read_sentences(path: Path) -> list[Sentence]:
    """All captions of an image.

    Raises
    ------
    UserError
        The file is missing, empty, too large or not UTF-8, or a line has a mark that cannot be read.
    """
    refuse_large(path)
    return [parse(line, f"{path} line {number}") for number, line in enumerate(read_lines(path, "caption"), start=1)]


def parse(line: str, where: str) -> Sentence:
    """Take the marks out of a caption; `where` names it in an error."""
    text, phrases, at = "", [], 0
    for mark in _MARK.finditer(line):
        chain, types, words = mark.groups()
        text += line[at : mark.start()]
        if not words.strip():
            raise UserError(f"{where}: the mark of chain {chain} holds no words; take a fresh copy of the file")
        phrases.append(Phrase(chain, tuple(types[1:].split("/")), len(text), len(text) + len(words)))
        text += words
        at = mark.end()
    text += line[at:]
    if _OPENING in text:
        shown = text[text.index(_OPENING) :][:30]
        raise UserError(
            f"{where}: {shown!r} is no mark of Flickr30K Entities, which look like [/EN#12/people a man]; "
            "take a fresh copy of the file"
        )
    return Sentence(text, tuple(phrases))
