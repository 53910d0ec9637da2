"""Captions from a small grammar, true of their scene by construction.

    caption   = ["a picture of"] body ["on a" background "background"]      the lead-in only where no verb follows
    body      = phrase relation phrase ["and" relation phrase]      the relations are those of the first phrase
              | phrase place
              | phrase {"," phrase} "and" phrase
    phrase    = number [size] [texture] [colour] noun               "two small striped circles", "an orange object"
    relation  = ["is" | "are"] ("left of" | "to the left of" | ... | "above" | "below")
    place     = "on the left" | "on the right" | "at the top" | "at the bottom"

A phrase means *exactly* the things that its words describe: "a red circle" is only said where one single red circle
is to be seen, "two circles" where there are two. A relation or a place holds for every thing of its phrases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from itm_pipeline.scenes.world import HEIGHT, WIDTH, Scene, relation_holds

NUMBERS = ("a", "two", "three", "four")
WORDS = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "dotted": ("dotted", "spotted"),
}
"""Attribute values with more than one word; the others are named as they are. A medium size is never said."""

RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
SPOKEN = ("size", "texture", "colour", "shape")
"""The attributes in the order in which a phrase names them."""

CAPTIONS = 5
"""Captions of every picture."""


@dataclass(frozen=True)
class Mention:
    """A phrase of a caption: its words, and the things (indices into the scene) that it means.

    `kind` is the type that Flickr30K Entities' markup gives it: "other" for things, "scene" for the background,
    "notvisual" for words that name nothing to be seen.
    """

    text: str
    things: tuple[int, ...] = ()
    kind: str = "other"


Caption = tuple["str | Mention", ...]
"""Words and phrases in the order of speech; the pieces are joined by blanks."""


def plain(caption: Caption) -> str:
    """The caption as `_caps.txt` has it."""
    return " ".join(piece if isinstance(piece, str) else piece.text for piece in caption)


def place_holds(place: str, centre: tuple[float, float]) -> bool:
    """Whether something centred at `centre` (x, y) stands in the left, right, top or bottom part of the picture."""
    x, y = centre[0] / WIDTH, centre[1] / HEIGHT
    return {"left": x < 0.36, "right": x > 0.64, "top": y < 0.36, "bottom": y > 0.64}[place]


class Speaker:
    """Says true things about one scene.

    Parameters
    ----------
    scene
        What there is.
    centres
        Centre (x, y) of every thing's visible box, in pixels: relations are about what can be seen.
    rng
        Chooses what to say and how.
    """

    def __init__(self, scene: Scene, centres: list[tuple[float, float]], rng: np.random.Generator) -> None:
        self.scene = scene
        self.centres = centres
        self.rng = rng

    def captions(self) -> list[Caption]:
        """`CAPTIONS` different captions, in random order: a rich one, and others that leave more and more out."""
        bodies: tuple[Callable[[], Caption | None], ...] = (
            self._rich,
            lambda: self._related(detail=1.0),
            lambda: self._related(detail=0.85),
            lambda: self._listed(detail=0.8),
            lambda: self._placed(detail=1.0) if self._chance(0.3) else self._listed(detail=0.7),
        )
        said: dict[str, Caption] = {}
        for number, body in enumerate(bodies, 1):
            tries = 0
            while len(said) < number:
                # Not every scene can say something in every form. All can be listed in full detail, in many ways.
                found = body() if tries < 20 else self._listed(detail=1.0)
                tries += 1
                if found is not None:
                    caption = self._framed(found)
                    said.setdefault(plain(caption), caption)
        captions = list(said.values())
        return [captions[i] for i in self.rng.permutation(CAPTIONS)]

    def _chance(self, odds: float) -> bool:
        return bool(self.rng.random() < odds)

    def _one_of(self, options: tuple[str, ...]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def phrase(self, target: int, detail: float) -> Mention | None:
        """A phrase that means `target` and whatever shares the words; None where that is too many to count.

        `detail` is the chance that an attribute is said; colour and shape are said more often than size and texture,
        and one of those two always. That a thing is plain goes without saying half of the time.
        """
        thing = self.scene.things[target]
        more = 1 - 0.4 * (1 - detail)
        odds = {
            "size": detail,
            "texture": detail * (0.5 if thing.texture == "plain" else 1),
            "colour": more,
            "shape": more,
        }
        values = {name: getattr(thing, name) for name in SPOKEN if self._chance(odds[name])}
        if not {"colour", "shape"} & values.keys():
            values["colour"] = thing.colour
        if values.get("size") == "medium":
            del values["size"]
        alike = tuple(
            i for i, t in enumerate(self.scene.things) if all(getattr(t, name) == v for name, v in values.items())
        )
        if len(alike) > len(NUMBERS):
            return None
        words = [self._one_of(WORDS.get(values[name], (values[name],))) for name in SPOKEN[:-1] if name in values]
        noun = values.get("shape", "object")
        if len(alike) > 1:
            noun += "es" if noun.endswith("s") else "s"
        words.append(noun)
        number = NUMBERS[len(alike) - 1]
        if number == "a" and words[0][0] in "aeiou":
            number = "an"
        return Mention(" ".join([number, *words]), alike)

    def _phrases(self, count: int, detail: float) -> list[Mention] | None:
        """Phrases about different things; None where this try found fewer than `count`."""
        found: list[Mention] = []
        for target in self.rng.permutation(len(self.scene.things)):
            mention = self.phrase(int(target), detail)
            taken = {i for other in found for i in other.things}
            if mention is not None and not taken & set(mention.things):
                found.append(mention)
            if len(found) == count:
                return found
        return None

    def _relation(self, first: Mention, second: Mention) -> str | None:
        """A relation that all things of `first` have to all of `second`, in words; None where there is none."""
        true = [
            name
            for name in RELATIONS
            if all(relation_holds(name, self.centres[a], self.centres[b]) for a in first.things for b in second.things)
        ]
        return self._one_of(RELATIONS[true[int(self.rng.integers(len(true)))]]) if true else None

    def _verb(self, subject: Mention) -> list[str]:
        return [("is" if len(subject.things) == 1 else "are")] if self._chance(0.5) else []

    def _related(self, detail: float) -> Caption | None:
        phrases = self._phrases(2, detail)
        relation = self._relation(*phrases) if phrases else None
        if phrases is None or relation is None:
            return None
        return (phrases[0], *self._verb(phrases[0]), relation, phrases[1])

    def _rich(self) -> Caption | None:
        phrases = self._phrases(3, 1.0)
        if phrases is None:
            return None
        first, second, third = phrases
        one, two = self._relation(first, second), self._relation(first, third)
        if one is None or two is None:
            return None
        return (first, *self._verb(first), one, second, "and", two, third)

    def _placed(self, detail: float) -> Caption | None:
        phrases = self._phrases(1, detail)
        if phrases is None:
            return None
        true = [p for p in PLACES if all(place_holds(p, self.centres[i]) for i in phrases[0].things)]
        return (phrases[0], PLACES[self._one_of(tuple(true))]) if true else None

    def _listed(self, detail: float) -> Caption | None:
        phrases = self._phrases(2 if self._chance(0.4) else 3, detail)
        if phrases is None:
            return None
        body: list[str | Mention] = [phrases[0]]
        for mention in phrases[1:-1]:
            body += [",", mention]
        return (*body, "and", phrases[-1])

    def _framed(self, body: Caption) -> Caption:
        """The body with a lead-in and a word about the background, or without."""
        lead: Caption = (Mention("a picture", kind="notvisual"), "of") if self._chance(0.1) else ()
        if {"is", "are"} & set(body):
            lead = ()
        if not self._chance(0.25):
            return (*lead, *body)
        return (*lead, *body, "on", Mention(f"a {self.scene.background} background", kind="scene"))
