"""The rasteriser: a scene becomes pixels, and a map of which thing each pixel shows.

Shapes are signed distances (negative inside) in the thing's own turned coordinates, so that edges are one pixel soft.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from itm_pipeline.scenes.world import BACKGROUNDS, COLOURS, HEIGHT, WIDTH, Scene, Thing

Field = NDArray[np.float32]

NOISE = 11.0
"""Standard deviation of the pixel noise, in grey levels of 255."""


def _half_planes(u: Field, v: Field, angles: tuple[float, ...], offset: float) -> Field:
    """Signed distance to the convex polygon whose sides face `angles` (degrees) at `offset` from the centre."""
    sides = [u * np.float32(np.cos(np.radians(a))) + v * np.float32(np.sin(np.radians(a))) for a in angles]
    return np.asarray(np.maximum.reduce(sides) - np.float32(offset))


def _box(u: Field, v: Field, half_width: float, half_height: float) -> Field:
    return np.asarray(np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height)))


def _disc(u: Field, v: Field, radius: float) -> Field:
    return np.asarray(np.hypot(u, v) - np.float32(radius))


def _star(u: Field, v: Field, radius: float) -> Field:
    """Five points: where a fifth of the plane, folded onto one half point, lies beyond the point's side."""
    wedge = np.float32(2 * np.pi / 5)
    turn = np.arctan2(u, -v)
    folded = np.abs(turn - wedge * np.round(turn / wedge))
    length = np.hypot(u, v)
    along, across = length * np.cos(folded), length * np.sin(folded)
    inner = 0.42 * radius
    corner = (inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5))
    side = np.array([corner[0] - radius, corner[1]])
    normal = np.array([side[1], -side[0]]) / np.hypot(*side)
    return np.asarray(np.float32(normal[0]) * (along - np.float32(radius)) + np.float32(normal[1]) * across)


def signed_distance(shape: str, u: Field, v: Field, radius: float) -> Field:
    """Distance in pixels to the edge of a shape that fits a circle of `radius`, negative inside."""
    r = radius
    if shape == "circle":
        return _disc(u, v, 0.9 * r)
    if shape == "square":
        return _box(u, v, 0.76 * r, 0.76 * r)
    if shape == "triangle":
        return _half_planes(u, v + np.float32(-0.15 * r), (90, 210, 330), 0.52 * r)
    if shape == "star":
        return _star(u, v, r)
    if shape == "cross":
        return np.minimum(_box(u, v, 0.92 * r, 0.3 * r), _box(u, v, 0.3 * r, 0.92 * r))
    if shape == "diamond":
        return _half_planes(u, v, (37, 143, 217, 323), 0.62 * r)
    if shape == "ring":
        return np.asarray(np.abs(_disc(u, v, 0.68 * r)) - np.float32(0.25 * r))
    if shape == "hexagon":
        return _half_planes(u, v, (30, 90, 150, 210, 270, 330), 0.82 * r)
    if shape == "crescent":
        return np.maximum(_disc(u, v, 0.92 * r), -_disc(u - np.float32(0.42 * r), v, 0.76 * r))
    if shape == "bar":
        return _box(u, v, 0.98 * r, 0.36 * r)
    raise ValueError(f"signed_distance: no such shape {shape!r}")


def _marked(texture: str, u: Field, v: Field, period: float) -> NDArray[np.bool_] | None:
    """Where the second tone of a texture goes; None for a plain thing."""
    if texture == "plain":
        return None
    if texture == "striped":
        return np.asarray(np.mod(u * np.float32(0.8) + v * np.float32(0.6), period) < period / 2)
    s, t = np.mod(u, period) - period / 2, np.mod(v, period) - period / 2
    if texture == "dotted":
        return s * s + t * t < (0.33 * period) ** 2
    if texture == "checked":
        return (s < 0) ^ (t < 0)
    raise ValueError(f"_marked: no such texture {texture!r}")


def _paint(canvas: Field, owner: NDArray[np.int8], thing: Thing, number: int, rng: np.random.Generator) -> None:
    """Draw one thing over `canvas` [H, W, 3] and write its number where it covers at least half a pixel."""
    reach = thing.radius + 2
    x0, x1 = max(int(thing.x - reach), 0), min(int(thing.x + reach) + 1, WIDTH)
    y0, y1 = max(int(thing.y - reach), 0), min(int(thing.y + reach) + 1, HEIGHT)
    dx = np.arange(x0, x1, dtype=np.float32)[None, :] - np.float32(thing.x)
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(thing.y)
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    cover = np.clip(np.float32(0.5) - signed_distance(thing.shape, u, v, thing.radius), 0, 1)
    colour = np.array(COLOURS[thing.colour], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
    # The second tone goes towards black for light colours and towards white for dark ones: always a visible step.
    second = colour * np.float32(0.5) if colour.mean() > 95 else colour + np.float32(0.45) * (255 - colour)
    marked = _marked(thing.texture, u, v, float(rng.uniform(6.0, 8.5)))
    tone = colour if marked is None else np.where(marked[..., None], second, colour)
    patch = canvas[y0:y1, x0:x1]
    patch += cover[..., None] * (tone - patch)
    owner[y0:y1, x0:x1][cover >= 0.5] = number


def _blot(canvas: Field, rng: np.random.Generator, tone: Field, strength: float, size: tuple[float, float]) -> None:
    """A soft turned ellipse: the clutter behind the things, and the scratches in front of them."""
    long, thin = rng.uniform(*size), rng.uniform(1.0, 3.0) if size[0] > 15 else rng.uniform(4.0, 12.0)
    x, y, angle = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(0, np.pi)
    reach = long + 2
    x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 1, WIDTH)
    y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 1, HEIGHT)
    dx = np.arange(x0, x1, dtype=np.float32)[None, :] - np.float32(x)
    dy = np.arange(y0, y1, dtype=np.float32)[:, None] - np.float32(y)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (cos * dx + sin * dy) / np.float32(long), (cos * dy - sin * dx) / np.float32(thin)
    cover = np.clip((1 - np.hypot(u, v)) * np.float32(thin), 0, 1) * np.float32(strength)
    patch = canvas[y0:y1, x0:x1]
    patch += cover[..., None] * (tone - patch)


def _smooth_field(rng: np.random.Generator, spread: float) -> Field:
    """A slowly varying field [H, W] around 1: uneven light."""
    coarse = (1 + spread * rng.standard_normal((4, 5))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def draw(scene: Scene, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Pixels of a scene and the thing that each of them shows.

    Returns
    -------
    pixels : uint8 [HEIGHT, WIDTH, 3], RGB
    owner : int8 [HEIGHT, WIDTH], the index into `scene.things` of the thing in front, -1 for the background
    """
    base = np.array(BACKGROUNDS[scene.background], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
    canvas = np.empty((HEIGHT, WIDTH, 3), np.float32)
    canvas[:] = base
    owner = np.full((HEIGHT, WIDTH), -1, np.int8)
    colours = list(COLOURS.values())
    for _ in range(int(rng.integers(8, 15))):
        tint = np.array(colours[int(rng.integers(len(colours)))], np.float32)
        _blot(canvas, rng, tint, float(rng.uniform(0.15, 0.5)), (6.0, 14.0))
    for number, thing in enumerate(scene.things):
        _paint(canvas, owner, thing, number, rng)
    for _ in range(int(rng.integers(2, 6))):
        _blot(canvas, rng, base * np.float32(rng.uniform(0.7, 1.2)), 0.9, (18.0, 45.0))
    canvas *= _smooth_field(rng, 0.09)[..., None]
    canvas += np.float32(NOISE) * rng.standard_normal(canvas.shape, np.float32)
    # 64 levels: under the noise nobody sees the steps, and the files are a third smaller.
    return np.clip(np.rint(canvas * np.float32(1 / 4)) * 4, 0, 252).astype(np.uint8), owner


def visible_boxes(owner: NDArray[np.int8], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Boxes of the visible part of every thing, and the number of pixels in it.

    Returns
    -------
    boxes : int64 [count, 4], first and last pixel in x1 y1 x2 y2 order, 0-based, both ends inside the picture
    areas : int64 [count]; a thing without a visible pixel has area 0 and a box of zeros
    """
    boxes = np.zeros((count, 4), np.int64)
    areas = np.zeros(count, np.int64)
    for number in range(count):
        mask = owner == number
        areas[number] = int(mask.sum())
        if areas[number]:
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            boxes[number] = columns[0], rows[0], columns[-1], rows[-1]
    return boxes, areas
