"""Words of a caption in the manner of the Penn Treebank, as ``nltk.word_tokenize(text.lower())`` gives them.

The rules are those of NLTK from 3.10.1 on. Earlier ones, with which the published vocabularies were made, leave an
opening apostrophe with its word ("'no" of "a 'no parking' sign") and do not know every typographic sign. Here
they stand as places to cut: the text is never rewritten, a rule only marks positions between two characters, and so
every token knows where it stands in the caption. White space separates; beyond it

- brackets, ``; @ # $ % & ? ! *``, long dashes, ``--``, typographic quotes, backticks and runs of periods stand alone;
- a double quote, ``"`` or two apostrophes, becomes two backticks where it opens (at the start, behind a blank, an
  opening bracket or an opening quote) and two apostrophes elsewhere;
- a comma or a colon stands alone unless a digit follows (``10:20``, ``1,000``);
- a period stands alone only at the end of a sentence (see :mod:`itm_pipeline.data.sentences`);
- ``'s 'm 'd 'll 're 've n't`` and a closing apostrophe leave their word, an opening one leaves the word behind it;
- ``cannot d'ye gimme gonna gotta lemme more'n wanna`` fall in two.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right

from .sentences import sentence_spans

Span = tuple[str, int, int]

OPENING_QUOTE, CLOSING_QUOTE = "``", "''"

_STANDS_ALONE = re.compile(r"[;@#$%&?!«“„‘\u2012-\u2015]|\.{2,}|``|`")  # noqa: RUF001
_STANDS_ALONE_TOO = re.compile(r"[\[\](){}<>*»”’]|--")  # noqa: RUF001
_DOUBLE_QUOTE = re.compile(r"\"|''")
_QUOTE_OPENS_BEHIND = frozenset(" ([{<«“„‘`")  # noqa: RUF001
_MAY_FOLLOW_FINAL_PERIOD = frozenset("])}>\"'»”’ ")  # noqa: RUF001
_OPENING_APOSTROPHE = re.compile(r"(?<!\w)'(?=\w)(?!(?:[smdtn]|ll|re|ve)\b)")
_CLOSING_APOSTROPHE = re.compile(r"'(?!$)")
_SHORT_CLITIC = re.compile(r"'[smd]|'")
_LONG_CLITIC = re.compile(r"'ll|'re|'ve|n't")
_TWO_WORDS = re.compile(r"(can)not|(d)'ye|(gim)me|(gon)na|(got)ta|(lem)me|(more)'n|(wan)na")
_CHUNK = re.compile(r"\S+")


def tokenize(text: str) -> list[str]:
    """Lower-case tokens of ``text``; the module's description has the conventions."""
    return [token for token, _, _ in token_spans(text)]


def token_spans(text: str) -> list[Span]:
    """Tokens of ``text`` with the characters they came from.

    Parameters
    ----------
    text
        A caption of one or more sentences.

    Returns
    -------
    list of (token, start, end)
        ``text[start:end]`` is what the token was made of: its letters in upper or lower case, or the double quote that
        a token of two backticks or two apostrophes stands for. Spans ascend, do not overlap, and leave out nothing but
        white space.
    """
    lowered = text.lower()
    spans = [span for start, end in sentence_spans(lowered) for span in _Sentence(lowered[start:end]).spans(start)]
    if len(lowered) != len(text):
        # A few capitals become two characters in lower case; positions are then led back to the capital.
        origin = [index for index, character in enumerate(text) for _ in character.lower()]
        spans = [(token, origin[start], origin[end - 1] + 1) for token, start, end in spans]
    return spans


class _Sentence:
    """One lower-case sentence, without white space at its end, and where it is cut.

    The order of the rules matters: a clitic is known by the gap behind it, which an earlier rule may have made.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.cuts: set[int] = set()
        # Where double quotes start and the token each becomes; all characters of the opening ones.
        self.quotes: dict[int, str] = {}
        self.opening: set[int] = set()
        self._cut_quotes()
        self._cut_final_period()
        self._cut_commas()
        self._cut_all_out(_STANDS_ALONE)
        self._cut_clitics(_CLOSING_APOSTROPHE)
        self._cut_all_out(_STANDS_ALONE_TOO)
        self._cut_clitics(_SHORT_CLITIC)
        self._cut_clitics(_LONG_CLITIC)
        self._cut_two_words()

    def spans(self, offset: int) -> list[Span]:
        """Tokens and their positions, moved by ``offset``."""
        spans = []
        cuts = sorted(self.cuts)
        for chunk in _CHUNK.finditer(self.text):
            start, stop = chunk.span()
            for end in [*cuts[bisect_right(cuts, start) : bisect_left(cuts, stop)], stop]:
                token = self.quotes.get(start) or self.text[start:end]
                spans.append((token, start + offset, end + offset))
                start = end
        return spans

    def _cut_out(self, start: int, end: int) -> None:
        self.cuts.update((start, end))

    def _cut_all_out(self, pattern: re.Pattern[str]) -> None:
        for match in pattern.finditer(self.text):
            self._cut_out(*match.span())

    def _gap(self, position: int) -> bool:
        """Whether nothing joins the characters on both sides of ``position``."""
        text = self.text
        if position in self.cuts or position in (0, len(text)):
            return True
        return text[position - 1].isspace() or text[position].isspace()

    def _cut_quotes(self) -> None:
        for match in _DOUBLE_QUOTE.finditer(self.text):
            start, end = match.span()
            before = self.text[start - 1 : start]
            opens = before in _QUOTE_OPENS_BEHIND or (start == 1 and before == '"')
            if opens or (start == 0 and end == 1):
                self.opening.update(range(start, end))
            self.quotes[start] = OPENING_QUOTE if start in self.opening else CLOSING_QUOTE
            self._cut_out(start, end)
        for match in _OPENING_APOSTROPHE.finditer(self.text):
            if match.start() not in self.opening:
                self.cuts.add(match.end())

    def _cut_final_period(self) -> None:
        end = len(self.text)
        while end and self.text[end - 1] in _MAY_FOLLOW_FINAL_PERIOD and end - 1 not in self.opening:
            end -= 1
        if end > 1 and self.text[end - 1] == "." and self.text[end - 2] != ".":
            self._cut_out(end - 1, end)

    def _cut_commas(self) -> None:
        joined = -1
        for match in re.finditer("[,:]", self.text):
            start, end = match.span()
            after = self.text[end : end + 1]
            if start == joined or after.isdecimal():
                continue
            self._cut_out(start, end)
            # NLTK's rule takes the next character with it: of two commas the second stays with what follows.
            joined = end if after in (",", ":") else -1

    def _cut_clitics(self, pattern: re.Pattern[str]) -> None:
        """Cut a clitic off its word where a gap follows it."""
        for match in pattern.finditer(self.text):
            start, end = match.span()
            # "'s" inside a word is no clitic, yet its apostrophe may close a word in front of a cut.
            ends = self._gap(end) or (pattern is _SHORT_CLITIC and self._gap(start + 1))
            if ends and not self._gap(start) and self.text[start - 1] != "'":
                self.cuts.add(start)

    def _cut_two_words(self) -> None:
        for match in _TWO_WORDS.finditer(self.text):
            first_part = match.lastindex or 0
            # "wanna" falls apart as a whole chunk only, the others wherever they are a word.
            ends = self._gap(match.end()) or (match[first_part] != "wan" and self._word_ends(match.end()))
            if ends and (self._gap(match.start()) or self._word_ends(match.start())):
                self.cuts.update((match.start(), match.end(first_part), match.end()))

    def _word_ends(self, position: int) -> bool:
        """Whether the characters on both sides of ``position`` (which has two) are not letters of one word."""
        return not all(character.isalnum() or character == "_" for character in self.text[position - 1 : position + 1])
