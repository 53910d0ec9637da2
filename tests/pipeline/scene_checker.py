"""Reads a caption of the scenes with a parser of its own, and says whether it is true of what was drawn.

It shares no code with the grammar that made the captions: words, numbers and relations are spelled out here again.
"""

from __future__ import annotations

import re
from typing import Any

SIZE = {"small": "small", "little": "small", "large": "large", "big": "large"}
TEXTURE = {"plain": "plain", "striped": "striped", "dotted": "dotted", "spotted": "dotted", "checked": "checked"}
COLOUR = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "white", "black"]
NOUN = ["circle", "square", "triangle", "star", "cross", "diamond", "ring", "hexagon", "crescent", "bar", "object"]
NUMBER = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}

PHRASE = (
    rf"(?P<number>{'|'.join(NUMBER)})(?: (?P<size>{'|'.join(SIZE)}))?(?: (?P<texture>{'|'.join(TEXTURE)}))?"
    rf"(?: (?P<colour>{'|'.join(COLOUR)}))? (?P<noun>{'|'.join(NOUN)})(?P<plural>e?s)?"
)
ANY_PHRASE = re.sub(r"\?P<\w+>", "?:", PHRASE)
RELATION = "(?:to the )?left of|(?:to the )?right of|above|below"
CAPTION = re.compile(
    rf"(?:a picture of )?(?:"
    rf"(?P<subject>{ANY_PHRASE}) (?:(?P<verb>is|are) )?(?P<relation>{RELATION}) (?P<other>{ANY_PHRASE})"
    rf"(?: and (?P<relation2>{RELATION}) (?P<other2>{ANY_PHRASE}))?"
    rf"|(?P<placed>{ANY_PHRASE}) (?P<place>on the left|on the right|at the top|at the bottom)"
    rf"|(?P<listed>{ANY_PHRASE}(?: , {ANY_PHRASE})* and {ANY_PHRASE})"
    rf")(?: on a (?P<background>\w+) background)?"
)

Scene = dict[str, Any]


def meant(phrase: str, scene: Scene) -> list[int]:
    """Indices of the things that fit the words of a phrase; AssertionError where number or grammar are wrong."""
    found = re.fullmatch(PHRASE, phrase)
    assert found, f"not a phrase: {phrase!r}"
    wanted: dict[str, str] = {}
    if found["size"]:
        wanted["size"] = SIZE[found["size"]]
    if found["texture"]:
        wanted["texture"] = TEXTURE[found["texture"]]
    if found["colour"]:
        wanted["colour"] = found["colour"]
    if found["noun"] != "object":
        wanted["shape"] = found["noun"]
    fitting = [i for i, t in enumerate(scene["things"]) if all(t[name] == value for name, value in wanted.items())]
    assert len(fitting) == NUMBER[found["number"]], f"{phrase!r} fits {len(fitting)} things"
    assert bool(found["plural"]) == (len(fitting) > 1), f"wrong plural: {phrase!r}"
    article = "an" if re.match(r"an? [aeiou]", phrase) else "a"
    assert len(fitting) > 1 or found["number"] == article, f"wrong article: {phrase!r}"
    return fitting


def _centre(thing: dict[str, Any]) -> tuple[float, float]:
    x1, y1, x2, y2 = thing["box"]
    return (x1 + x2) / 2, (y1 + y2) / 2


def _related(scene: Scene, ones: list[int], relation: str, others: list[int]) -> bool:
    for one in ones:
        for other in others:
            (x, y), (s, t) = _centre(scene["things"][one]), _centre(scene["things"][other])
            along = {"left": s - x, "right": x - s, "above": t - y, "below": y - t}[
                relation.removeprefix("to the ").removesuffix(" of")
            ]
            if along < 12:
                return False
    return True


def _at(scene: Scene, ones: list[int], place: str, size: tuple[int, int]) -> bool:
    for one in ones:
        x, y = _centre(scene["things"][one])
        share = {"left": x / size[1], "right": 1 - x / size[1], "top": y / size[0], "bottom": 1 - y / size[0]}
        if share[place.split()[-1]] > 0.4:
            return False
    return True


def phrases(caption: str) -> list[str]:
    """The phrases about things that a caption holds, in order."""
    return [found[0] for found in re.finditer(rf"\b{ANY_PHRASE}\b", caption)]


def is_true(caption: str, scene: Scene, size: tuple[int, int]) -> bool:
    """Whether a caption is true of a scene (a line of `{split}_scenes.jsonl`) in a picture of `size` (height, width).

    AssertionError where it is not a caption of the grammar, or a phrase does not fit the number of things it says.
    """
    found = CAPTION.fullmatch(caption)
    assert found, f"not a caption: {caption!r}"
    things = [meant(phrase, scene) for phrase in phrases(caption)]
    assert len({i for group in things for i in group}) == sum(map(len, things)), f"a thing named twice: {caption!r}"
    if found["background"] and found["background"] != scene["background"]:
        return False
    if found["place"]:
        return _at(scene, things[0], found["place"], size)
    if found["verb"]:
        assert found["verb"] == ("is" if len(things[0]) == 1 else "are"), f"wrong verb: {caption!r}"
    pairs = [(found["relation"], 1), (found["relation2"], 2)]
    return all(_related(scene, things[0], relation, things[at]) for relation, at in pairs if relation)
