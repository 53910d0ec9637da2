"""Finding the words of one tokeniser in the text of another, by their letters.

Entities' captions are cut at blanks ("Clyde 's Farm"), the model's own tokens are not the same. Both texts are reduced
to letters and digits in lower case; where these are equal, the k-th letter of one is the k-th of the other.
"""

from __future__ import annotations

from itertools import zip_longest

from itm_pipeline.data import token_spans
from itm_pipeline.entities.sentences import Phrase, Sentence
from itm_pipeline.errors import UserError


def letters_of(text: str) -> tuple[str, list[int]]:
    """Letters and digits in lower case, and the character of `text` that each comes from."""
    found = [(letter, index) for index, sign in enumerate(text) for letter in sign.lower() if letter.isalnum()]
    return "".join(letter for letter, _ in found), [index for _, index in found]


def align(sentence: Sentence, caption: str, where: str, caption_where: str) -> list[tuple[int, Phrase]]:
    """Tokens of a caption that lie in its phrases.

    Parameters
    ----------
    sentence
        The caption as Entities have it.
    caption
        The caption as the model reads it.
    where, caption_where
        What names the two in an error.

    Returns
    -------
    list of (token, phrase)
        Number of the token in `tokenize(caption)`, from 0; start and end, which the model adds, are not counted. A
        token belongs to a phrase that it shares a letter or digit with; tokens without any (a comma) to none.

    Raises
    ------
    UserError
        The letters of the two differ.
    """
    (ours, origin), (theirs, places) = letters_of(sentence.text), letters_of(caption)
    if ours != theirs:
        at = next(k for k, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
        raise UserError(
            f"{where} and {caption_where} are not the same caption: letter {at + 1} begins "
            f"{_shown(sentence.text, origin, at)} in the one, {_shown(caption, places, at)} in the other; "
            "the files must have the same captions in the same order"
        )
    token_of = [-1] * len(caption)
    for token, (_, start, end) in enumerate(token_spans(caption)):
        token_of[start:end] = [token] * (end - start)
    found = []
    for phrase in sentence.phrases:
        tokens = {token_of[place] for place, at in zip(places, origin, strict=True) if phrase.start <= at < phrase.end}
        found += [(token, phrase) for token in sorted(tokens)]
    return found


def _shown(text: str, origin: list[int], at: int) -> str:
    return repr(text[origin[at] :][:20]) if at < len(origin) else "nothing"
