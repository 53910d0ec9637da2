"""The tokeniser against conventions written out here, against NLTK's, and its spans against the caption."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from itm_pipeline.data import token_spans, tokenize
from itm_pipeline.data.sentences import ABBREVIATIONS, sentence_spans

# The time an example takes says nothing on a busy machine.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CAPTIONS = {
    "A man in a blue hard-hat stands.": "a man in a blue hard-hat stands .",
    "Two dogs, one brown, run .": "two dogs , one brown , run .",
    "A dog's owner isn't here": "a dog 's owner is n't here",
    "They're sure it'll rain; we've seen it, I'd say I'm wet": (
        "they 're sure it 'll rain ; we 've seen it , i 'd say i 'm wet"
    ),
    "the boys' team, the boys'": "the boys ' team , the boys '",
    'A sign reading "STOP" hangs': "a sign reading `` stop '' hangs",
    '"Stop" says the sign "go."': "`` stop '' says the sign `` go . ''",
    'A shirt (with a "9") and [text]': "a shirt ( with a `` 9 '' ) and [ text ]",
    "The clock says 10:20, the price $1,000: cheap": "the clock says 10:20 , the price $ 1,000 : cheap",
    "You cannot say gonna, wanna or gimme": "you can not say gon na , wan na or gim me",
    "What? A dog!": "what ? a dog !",
    "wait ... what": "wait ... what",
    "A man -- or woman -- at #5 & co": "a man -- or woman -- at # 5 & co",
    "Café: naïve façade": "café : naïve façade",
    "A man. He runs. ": "a man . he runs .",
    "Near St. Patrick's in the U.S. on Main St.": "near st. patrick 's in the u.s. on main st .",
    'He said "hi." Then he left.': "he said `` hi . '' then he left .",
    "Team no. 5. in red": "team no . 5. in red",
    "half-pipe and/or T-shirt": "half-pipe and/or t-shirt",
    "": "",
    "   ": "",
    ".": ".",
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_conventions(caption: str) -> None:
    assert " ".join(tokenize(caption)) == CAPTIONS[caption]


# Opening apostrophes, long dashes and typographic quotes, where NLTK changed its rules in 3.9.3 and 3.10.1.
NEW_RULES = {
    "a 'no parking' sign of '09": "a ' no parking ' sign of ' 09",
    "a dog\u2014brown": "a dog \u2014 brown",
    "the man\u2019s \u201csign\u201d": "the man \u2019 s \u201c sign \u201d",
}


@pytest.mark.parametrize("caption", NEW_RULES)
def test_newer_conventions(caption: str) -> None:
    assert " ".join(tokenize(caption)) == NEW_RULES[caption]


@pytest.fixture(scope="module")
def nltk_tokens() -> Callable[[str], list[str]]:
    """``nltk.word_tokenize`` without its data: Punkt with the abbreviations of ours, then NLTK's word rules."""
    nltk = pytest.importorskip("nltk", reason="NLTK, which the tokens are compared with, is not installed")
    words = nltk.tokenize.NLTKWordTokenizer()
    if words.tokenize("'no m\u2014") != ["'", "no", "m", "\u2014"]:
        pytest.skip(f"NLTK {nltk.__version__} has older rules than those followed here (3.10.1)")
    parameters = nltk.tokenize.punkt.PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS) | {"u.s", "l.a", "a.m"}
    sentences = nltk.tokenize.punkt.PunktSentenceTokenizer(parameters)
    return lambda text: [word for part in sentences.tokenize(text.lower()) for word in words.tokenize(part)]


@pytest.mark.parametrize("caption", [*CAPTIONS, *NEW_RULES])
def test_same_tokens_as_nltk(caption: str, nltk_tokens: Callable[[str], list[str]]) -> None:
    assert tokenize(caption) == nltk_tokens(caption)


def _chunks() -> st.SearchStrategy[str]:
    core = [
        "a",
        "man",
        "dog",
        "he",
        "don't",
        "we've",
        "it's",
        "dogs'",
        "5",
        "1,000",
        "10:20",
        "st",
        "u.s",
        "mr",
        "cannot",
    ]
    core += ["gonna", "more'n", "l.a", "t-shirt", "half--pipe", "é"]
    before = ["", "", "", "", "(", '"', "'", "$", "#", "\u201c", "[", "``"]
    after = ["", "", "", "", ",", ":", ";", ".", "?", "!", "...", "?!", ")", '"', "\u201d", "'s", "%", "\u2014"]
    return st.tuples(st.sampled_from(before), st.sampled_from(core), st.sampled_from(after)).map("".join)


@settings(RELAXED, derandomize=True)
@given(chunks=st.lists(_chunks(), max_size=10), final=st.sampled_from(["", ".", " .", "!", '."', ' . "']))
def test_same_tokens_as_nltk_on_made_up_captions(
    chunks: list[str], final: str, nltk_tokens: Callable[[str], list[str]]
) -> None:
    caption = " ".join(chunks) + final
    assert tokenize(caption) == nltk_tokens(caption)


def test_sentences() -> None:
    text = 'a man. "he runs." (fast!) st. patrick vs. 5. they go... on u.s. soil group b. is here? yes'
    parts = [text[start:end] for start, end in sentence_spans(text)]
    assert parts == [
        "a man.",
        '"he runs."',
        "(fast!)",
        "st. patrick vs. 5. they go... on u.s. soil group b. is here?",
        "yes",
    ]


@RELAXED
@given(text=st.text(max_size=60) | st.text(alphabet="aSn't\"`.,:;?! ()-'İΣß\u2019\t\n", max_size=40))
@example("say ``\"hi''\" İ'll")
@example("İİ. cannot")
def test_spans_lead_back_to_the_caption(text: str) -> None:
    position = 0
    for token, start, end in token_spans(text):
        assert position <= start < end
        assert not text[position:start].strip(), "only white space is left out"
        source = text[start:end]
        if token in ("``", "''"):
            assert source in ("``", "''", '"')
        else:
            # The small final sigma depends on the letters around it, which the slice does not hold.
            assert token.replace("\u03c2", "\u03c3") == source.lower().replace("\u03c2", "\u03c3")
        position = end
    assert not text[position:].strip()


def test_spans_of_changed_quotes() -> None:
    caption = "A \"Go\" and ''no''"
    spans = token_spans(caption)
    assert [token for token, _, _ in spans] == ["a", "``", "go", "''", "and", "``", "no", "''"]
    assert [caption[start:end] for _, start, end in spans] == ["A", '"', "Go", '"', "and", "''", "no", "''"]
