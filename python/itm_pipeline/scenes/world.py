"""What a scene is: things with a shape, a colour, a texture and a size, and where they stand to each other.

Nothing here draws. A `Scene` is the truth that the rasteriser turns into pixels and the grammar into captions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

WIDTH, HEIGHT = 208, 156
"""Size of every picture in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "hexagon", "crescent", "bar")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "orange": (235, 140, 40),
    "yellow": (235, 215, 60),
    "green": (60, 160, 65),
    "cyan": (70, 200, 205),
    "blue": (55, 85, 200),
    "purple": (130, 60, 170),
    "pink": (240, 140, 185),
    "brown": (125, 80, 45),
    "white": (240, 240, 240),
    "black": (30, 30, 30),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES: dict[str, tuple[float, float]] = {"small": (8.5, 11.0), "medium": (13.0, 16.5), "large": (20.0, 25.0)}
"""Range of the radius of the circle around a thing, in pixels."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "dark": (76, 76, 84),
    "light": (196, 196, 190),
    "sandy": (190, 168, 128),
    "bluish": (128, 150, 178),
    "greenish": (132, 160, 128),
}
TEXTURE_ODDS = (0.46, 0.18, 0.18, 0.18)
SIZE_ODDS = (0.3, 0.4, 0.3)

FEWEST, MOST = 3, 7
"""Number of things in a scene."""

MOST_ALIKE = 4
"""Things of one shape, colour and texture in a scene: as many as captions count."""

GROUPS = (1, 2, 1, 2, 1, 2)
"""Sizes of the runs of near-duplicates that follow each other in a split, over and over."""

NEAREST = 0.8
"""Smallest distance between two centres, in units of the two radii together: edges may overlap, centres not."""

CLEAR = 12.0
"""How many pixels must separate two centres before a caption may say left, right, above or below."""

ATTRIBUTES = ("shape", "colour", "texture", "size")


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `x`, `y` is its centre and `radius` that of the circle around it, in pixels."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Things, later ones in front of earlier ones, before a background."""

    things: tuple[Thing, ...]
    background: str


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    """Whether a thing centred at `first` is clearly left of, right of, above or below one centred at `second`.

    Parameters
    ----------
    relation : {"left", "right", "above", "below"}
    first, second : (x, y) in pixels, y growing downwards

    Notes
    -----
    "Clearly" asks for `CLEAR` pixels along the axis of the relation and at least 0.7 times as much as across it.
    """
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= CLEAR and along >= 0.7 * abs(across)


def group_start(index: int) -> int:
    """Index of the first picture of the run of near-duplicates to which picture `index` of a split belongs."""
    start = index - index % sum(GROUPS)
    for size in GROUPS:
        if index < start + size:
            return start
        start += size
    raise AssertionError("the sizes of GROUPS cover every remainder")


def _radius(size: str, rng: np.random.Generator) -> float:
    return float(rng.uniform(*SIZES[size]))


def _pick(names: tuple[str, ...], rng: np.random.Generator, odds: tuple[float, ...] | None = None) -> str:
    return names[int(rng.choice(len(names), p=odds))]


def _gap(x: float, y: float, radius: float, others: Iterable[Thing]) -> float:
    """Smallest distance of a centre from the centres of others, in units of the two radii together."""
    return min((float(np.hypot(x - o.x, y - o.y)) / (radius + o.radius) for o in others), default=np.inf)


def _placed(radius: float, others: list[Thing], rng: np.random.Generator) -> tuple[float, float] | None:
    """A centre for a thing among others where at most their edges meet; None where no try found one."""
    edge = 0.75 * radius  # a thing may leave the picture by a quarter of its radius
    for _ in range(30):
        x, y = float(rng.uniform(edge, WIDTH - edge)), float(rng.uniform(edge, HEIGHT - edge))
        if _gap(x, y, radius, others) >= NEAREST:
            return x, y
    return None


def _turn(rng: np.random.Generator) -> float:
    return float(rng.uniform(-0.2, 0.2))


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene of `FEWEST` to `MOST` things.

    Shapes and colours come from a short list of the scene's own, so that things of one scene share attributes: a
    caption has to bind colour to shape, and counted phrases ("two red circles") are common.
    """
    count = int(rng.integers(FEWEST, MOST + 1))
    shapes = tuple(SHAPES[i] for i in rng.choice(len(SHAPES), 4, replace=False))
    colours = tuple(tuple(COLOURS)[i] for i in rng.choice(len(COLOURS), 4, replace=False))
    background = _pick(tuple(BACKGROUNDS), rng)
    things: list[Thing] = []
    while len(things) < count:
        size = _pick(tuple(SIZES), rng, SIZE_ODDS)
        radius = _radius(size, rng)
        centre = _placed(radius, things, rng)
        if centre is None:  # too crowded: begin again with other sizes
            things = []
            continue
        texture = _pick(TEXTURES, rng, TEXTURE_ODDS)
        things.append(Thing(_pick(shapes, rng), _pick(colours, rng), texture, size, *centre, radius, _turn(rng)))
        if len(things) == count and not _tellable(things):
            things = []
    return Scene(tuple(things), background)


def _other(names: tuple[str, ...], current: str, rng: np.random.Generator) -> str:
    return _pick(tuple(name for name in names if name != current), rng)


def _altered(thing: Thing, attribute: str, rng: np.random.Generator) -> Thing:
    if attribute == "size":
        size = _other(tuple(SIZES), thing.size, rng)
        return replace(thing, size=size, radius=_radius(size, rng))
    if attribute == "shape":
        return replace(thing, shape=_other(SHAPES, thing.shape, rng))
    if attribute == "colour":
        return replace(thing, colour=_other(tuple(COLOURS), thing.colour, rng))
    return replace(thing, texture=_other(TEXTURES, thing.texture, rng))


def _moved(things: tuple[Thing, ...], rng: np.random.Generator) -> list[Thing]:
    """Every thing shifted and turned a little."""
    moved = []
    for thing in things:
        x = float(np.clip(thing.x + rng.uniform(-6, 6), 0.75 * thing.radius, WIDTH - 0.75 * thing.radius))
        y = float(np.clip(thing.y + rng.uniform(-6, 6), 0.75 * thing.radius, HEIGHT - 0.75 * thing.radius))
        moved.append(replace(thing, x=x, y=y, angle=_turn(rng)))
    return moved


def _changed(things: list[Thing], rng: np.random.Generator) -> list[Thing] | None:
    """The same things but for one attribute, one relation or one count; None where the change has no room."""
    things = list(things)
    change = _pick((*ATTRIBUTES, "swap", "remove", "repeat"), rng)
    first, second = (int(i) for i in rng.choice(len(things), 2, replace=False))
    a, b = things[first], things[second]
    if change == "swap":
        if (a.shape, a.colour, a.texture, a.size) == (b.shape, b.colour, b.texture, b.size):
            return None
        things[first], things[second] = replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)
    elif change == "remove":
        if len(things) == FEWEST:
            return None
        del things[first]
    elif change == "repeat":
        centre = _placed(a.radius, things, rng)
        if len(things) == MOST or centre is None:
            return None
        things.append(replace(a, x=centre[0], y=centre[1], angle=_turn(rng)))
    else:
        things[first] = _altered(a, change, rng)
    return things


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """A near-duplicate: everything moved a little, and one attribute, one relation or one count changed."""
    while True:  # a shape that is new to the scene is always allowed, so this ends
        things = _changed(list(scene.things), rng)
        if things is None or _crowded(things) or not _tellable(things):
            continue
        moved = _moved(tuple(things), rng)
        return Scene(tuple(things if _crowded(moved) else moved), scene.background)


def _crowded(things: list[Thing]) -> bool:
    return any(_gap(t.x, t.y, t.radius, things[:i]) < NEAREST for i, t in enumerate(things))


def _tellable(things: list[Thing]) -> bool:
    """Whether captions have enough to say: three kinds of things at least, none of them too many to count."""
    kinds = Counter((thing.shape, thing.colour, thing.texture) for thing in things)
    return len(kinds) >= FEWEST and max(kinds.values()) <= MOST_ALIKE
