"""Region features from nothing but the pixels of a region and its place in the picture.

Every region is sampled on a grid of `GRID` x `GRID` points, whatever its size, so that all regions of a picture are
worked on at once. A feature row is the concatenation of `GROUPS`:

=========  ======================================================================================================
colour     histogram of hue, lightness and grey over the whole region, and one over its middle (square roots)
gradient   histograms of gradient orientation, weighted by strength, in 4 x 4 cells (normalised, square roots)
outline    how much the colour of 6 x 6 cells differs from the mean colour along the region's border
texture    correlation of the lightness with itself at ten offsets, and a histogram of gradient strength
place      soft histograms of the centre's x and y, and the sides and the area of the box
=========  ======================================================================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Field = NDArray[np.float32]

GRID = 24
"""Sample points along a side of a region."""

HUES, LIGHTS, GREYS = 12, 3, 6
COLOUR_BINS = HUES * LIGHTS + GREYS
ORIENTATIONS, CELLS = 8, 4
OUTLINE = 6
OFFSETS = ((0, 2), (2, 0), (2, 2), (2, -2), (0, 4), (4, 0), (3, 3), (3, -3), (0, 7), (7, 0))
"""(rows, columns) at which the texture is compared with itself, in pixels: around the periods of patterns."""
STRENGTHS = (4.0, 8.0, 14.0, 22.0, 34.0, 52.0)
"""Edges of the histogram of gradient strength, in grey levels per pixel."""
PLACES = 7

GROUPS = {
    "colour": 2 * COLOUR_BINS,
    "gradient": CELLS * CELLS * ORIENTATIONS,
    "outline": OUTLINE * OUTLINE,
    "texture": len(OFFSETS) + len(STRENGTHS) + 1,
    "place": 2 * PLACES + 3,
}
"""Width of each part of a feature row, in order."""

FEATURE_DIM = sum(GROUPS.values())


def _colour_bins(image: Image.Image) -> NDArray[np.int32]:
    """Histogram bin of every pixel [H, W]: hue and lightness for coloured ones, lightness alone for greys."""
    hue, saturation, value = (np.asarray(band).astype(np.int32) for band in image.convert("HSV").split())
    # A twelfth of a turn is centred on pure red, so that noise does not throw red into both ends of the circle.
    hue_bin = (hue * HUES + 128) // 256 % HUES
    chroma = saturation * value // 255
    coloured = hue_bin * LIGHTS + value * LIGHTS // 256
    return np.where(chroma * 100 > 1800 + 12 * value, coloured, HUES * LIGHTS + value * GREYS // 256)


def _gradients(light: Field) -> tuple[Field, NDArray[np.int64]]:
    """Strength and orientation bin (unsigned) of the lightness gradient of every pixel [H, W]."""
    wide = np.pad(light, 1, mode="edge")
    gx = (wide[1:-1, 2:] - wide[1:-1, :-2]) * np.float32(0.5)
    gy = (wide[2:, 1:-1] - wide[:-2, 1:-1]) * np.float32(0.5)
    turn = np.arctan2(gy, gx) * np.float32(ORIENTATIONS / np.pi)
    return np.hypot(gx, gy), np.rint(turn).astype(np.int64) % ORIENTATIONS


def _sample_points(boxes: Field, size: tuple[int, int]) -> NDArray[np.int64]:
    """Flat pixel index [R, GRID, GRID] of the sample points of every box."""
    steps = (np.arange(GRID, dtype=np.float32) + np.float32(0.5)) / np.float32(GRID)
    xs = boxes[:, :1] + (boxes[:, 2:3] - boxes[:, :1]) * steps
    ys = boxes[:, 1:2] + (boxes[:, 3:4] - boxes[:, 1:2]) * steps
    columns = np.clip(np.rint(xs), 0, size[1] - 1).astype(np.int64)
    rows = np.clip(np.rint(ys), 0, size[0] - 1).astype(np.int64)
    return np.asarray(rows[:, :, None] * size[1] + columns[:, None, :])


def _histogram(
    bins: NDArray[np.integer], count: int, weights: Field | None = None, smooth: float = 0.0
) -> NDArray[np.float64]:
    """Square roots of the share of every bin, row by row: bins [R, K] -> [R, count]."""
    rows = len(bins)
    flat = (bins + np.arange(rows)[:, None] * count).ravel()
    totals = np.bincount(flat, None if weights is None else weights.ravel(), rows * count).reshape(rows, count)
    return np.asarray(np.sqrt(totals / (totals.sum(1, keepdims=True) + smooth + 1e-9)))


def _cells(samples: Field, cells: int) -> Field:
    """Mean over cells: [R, GRID, GRID, ...] -> [R, cells, cells, ...]."""
    step = GRID // cells
    regions, *_, rest = (*samples.shape[:1], samples.shape[3:])
    return np.asarray(samples.reshape(regions, cells, step, cells, step, *rest).mean((2, 4)))


def _outline(colour: Field) -> Field:
    """Colour distance of every cell [R, OUTLINE**2] from the border's mean colour, the largest being 1."""
    border = np.concatenate([colour[:, 0], colour[:, -1], colour[:, 1:-1, 0], colour[:, 1:-1, -1]], axis=1)
    distance = np.abs(_cells(colour, OUTLINE) - border.mean(1)[:, None, None]).sum(-1).reshape(len(colour), -1)
    return np.asarray(distance / (distance.max(1, keepdims=True) + np.float32(20)))


def _self_correlation(light: Field, points: NDArray[np.int64]) -> Field:
    """Correlation of the lightness with itself at `OFFSETS`, over the middle of every region: [R, len(OFFSETS)]."""
    height, width = light.shape
    rows, columns = points // width, points % width
    here = light.ravel()[points]
    here = here - here.mean((1, 2), keepdims=True)
    spread = (here * here).mean((1, 2)) + np.float32(60)
    found = []
    for down, right in OFFSETS:
        there = light[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
        there = there - there.mean((1, 2), keepdims=True)
        found.append((here * there).mean((1, 2)) / spread)
    return np.stack(found, axis=1)


def _place(boxes: Field, size: tuple[int, int]) -> Field:
    """Where a box is: soft histograms of its centre, its sides and its area as shares of the picture's."""
    height, width = size
    centres = np.linspace(0, 1, PLACES, dtype=np.float32)
    x = (boxes[:, :1] + boxes[:, 2:3]) / np.float32(2 * width)
    y = (boxes[:, 1:2] + boxes[:, 3:4]) / np.float32(2 * height)
    narrow = np.float32(PLACES - 1)
    near = [np.exp(np.float32(-0.5) * ((value - centres) * narrow) ** 2) for value in (x, y)]
    wide, high = (boxes[:, 2:3] - boxes[:, :1]) / width, (boxes[:, 3:4] - boxes[:, 1:2]) / height
    return np.concatenate([*near, 2 * wide, 2 * high, 2 * np.sqrt(wide * high)], axis=1)


def region_features(pixels: NDArray[np.uint8], boxes: Field) -> Field:
    """Features of the regions of one picture.

    Parameters
    ----------
    pixels
        uint8 [H, W, 3], RGB, as read from the picture's file.
    boxes
        float32 [R, 4], x1 y1 x2 y2 in 0-based pixels.

    Returns
    -------
    float32 [R, FEATURE_DIM]; the parts are those of `GROUPS`
    """
    size = pixels.shape[0], pixels.shape[1]
    # The mean of 3 x 3 pixels takes most of the noise away.
    image = Image.fromarray(pixels).filter(ImageFilter.BoxBlur(1))
    colour = np.asarray(image).astype(np.float32)
    light = np.float32(0.299) * colour[..., 0] + np.float32(0.587) * colour[..., 1] + np.float32(0.114) * colour[..., 2]
    strength, orientation = _gradients(light)
    points = _sample_points(boxes, size)
    regions = len(boxes)
    inner = slice(GRID // 4, GRID - GRID // 4)

    bins = _colour_bins(image).ravel()[points]
    whole = _histogram(bins.reshape(regions, -1), COLOUR_BINS)
    middle = _histogram(bins[:, inner, inner].reshape(regions, -1), COLOUR_BINS)

    power = strength.ravel()[points]
    cell = np.arange(GRID) // (GRID // CELLS)
    cell_of = (cell[:, None] * CELLS + cell[None, :]) * ORIENTATIONS
    turned = orientation.ravel()[points] + cell_of
    gradient = _histogram(
        turned.reshape(regions, -1), CELLS * CELLS * ORIENTATIONS, power.reshape(regions, -1), smooth=GRID * GRID * 2.0
    )
    strong = np.digitize(power[:, inner, inner], STRENGTHS).reshape(regions, -1)

    parts = (
        whole,
        middle,
        2 * gradient,
        0.5 * _outline(colour.reshape(-1, 3)[points]),
        _self_correlation(light, points[:, inner, inner]),
        _histogram(strong, len(STRENGTHS) + 1),
        _place(boxes, size),
    )
    features: Field = np.concatenate(parts, axis=1).astype(np.float32)
    return features
