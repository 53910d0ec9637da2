"""Where one sentence of a caption ends and the next begins.

The Treebank rules split a period off its word at the end of a sentence only ("a hat." gives two tokens, "st. patrick"
keeps its period), so a caption of several sentences has to be cut first. The published code leaves that to Punkt, whose
parameters are trained on newspapers and shipped as a data file. Here it is a small rule for lower-case captions:

- ``?`` and ``!`` end a sentence; so does a period;
- but a period does not behind a known abbreviation ("st."), letters with periods between them ("u.s."), an ellipsis
  ("..."), or a single letter or a number that goes on in lower case ("group a. they", "no 5. in");
- closing quotes and brackets behind the mark, a space between or not, belong to the sentence that it ends.

Limits: abbreviations that one list has and the other not, and Punkt's collocations and its look at the word that
follows. The difference is a period that stands alone or stays with its word, inside a caption of several sentences.
"""

from __future__ import annotations

import re

_TITLES = ("mr", "mrs", "ms", "dr", "prof", "rev", "hon", "gen", "col", "maj", "capt", "lt", "sgt", "sen", "rep", "gov")
_NAMES = ("jr", "sr", "st", "mt", "ave", "blvd", "inc", "corp", "co", "ltd", "bros", "dept")
_MONTHS = ("jan", "feb", "mar", "apr", "aug", "sept", "oct", "nov", "dec")
ABBREVIATIONS = frozenset((*_TITLES, *_NAMES, *_MONTHS, "vs", "etc", "approx"))
"""Words whose period does not end a sentence, in lower case and without the period."""

_CHUNK = re.compile(r"\S+")
# A mark can end a sentence when white space follows, or a character that cannot continue a word.
_MARK = re.compile(r"""[.?!](?=\s|[?!)}\]"';*:@({\[‘’“”«»])""")  # noqa: RUF001
_CLOSERS = re.compile(r"""["')\]}‘’“”«»]+(?=\s|--|$)""")  # noqa: RUF001
_LAST_WORD = re.compile(r"""[‘’“”«»]?(?:[^\s?!)}\]";*:@({\[‘’“”«»&#`.-]|[.-](?![.-]))*$""")  # noqa: RUF001
_INITIAL = re.compile(r"[^\W\d]")
_DOTTED_LETTERS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Spans ``(start, end)`` of the sentences of the lower-case ``text``, without the white space between them."""
    spans = []
    start = 0
    text = text.rstrip()
    for chunk in _CHUNK.finditer(text):
        marks = [mark.end() for mark in _MARK.finditer(text, chunk.start(), chunk.end() + 1)]
        # Of several marks in one chunk ("what?!" he) the last one decides where to cut.
        if not marks or not _ends_sentence(text, max(start, chunk.start()), marks[-1]):
            continue
        end = marks[-1]
        start_of_next = _skip_space(text, end)
        closers = _CLOSERS.match(text, start_of_next)
        if closers:
            end, start_of_next = closers.end(), _skip_space(text, closers.end())
        spans.append((start, end))
        start = start_of_next
    spans.append((start, len(text)))
    return [(start, end) for start, end in spans if start < end]


def _ends_sentence(text: str, start: int, end: int, look_ahead: bool = True) -> bool:
    """Whether a sentence ends with the mark at ``end - 1``, the last of the chunk that begins at ``start``."""
    chunk = text[start : end - 1]
    if text[end - 1] != "." or "?" in chunk or "!" in chunk:
        return True
    if chunk.endswith("."):
        return False
    following = _CHUNK.match(text, _skip_space(text, end))
    if following and look_ahead:
        # Punkt judges both chunks together: a sentence that ends inside the second one ends behind the first too.
        inner = [mark.end() for mark in _MARK.finditer(text, *following.span())]
        if inner and _ends_sentence(text, following.start(), inner[-1], look_ahead=False):
            return True
    found = _LAST_WORD.search(chunk)
    word = found.group() if found else ""
    if word.rpartition("-")[2] in ABBREVIATIONS or _DOTTED_LETTERS.fullmatch(word):
        return False
    if _INITIAL.fullmatch(word) or _NUMBER.fullmatch(word):
        follower = following.group()[0] if following else ""
        return not (follower.islower() or follower in tuple(";:,.!?"))
    return True


def _skip_space(text: str, position: int) -> int:
    return position + len(text[position:]) - len(text[position:].lstrip())
