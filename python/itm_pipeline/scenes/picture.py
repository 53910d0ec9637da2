"""One picture of a split, from its seed to everything that is stored of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from itm_pipeline.scenes.draw import draw, visible_boxes
from itm_pipeline.scenes.features import region_features
from itm_pipeline.scenes.grammar import Caption, Speaker
from itm_pipeline.scenes.proposals import propose
from itm_pipeline.scenes.world import Scene, group_start, sample_scene, vary

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Picture:
    """A scene, its pixels and what is said about it.

    Attributes
    ----------
    image_id
        Seven digits: the split (1 train, 2 dev, 3 test), then the index in it; the same whatever the splits' sizes.
    scene, boxes
        The truth, and the visible box of each of its things: int64 [things, 4], x1 y1 x2 y2 in 0-based pixels.
    pixels
        uint8 [H, W, 3].
    captions
        Five of them.
    proposals, features
        float32 [36, 4] and float32 [36, F]; the features are those of the pixels at the proposals.
    """

    image_id: str
    scene: Scene
    boxes: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    captions: list[Caption]
    proposals: NDArray[np.float32]
    features: NDArray[np.float32]


def make_picture(seed: int, split: str, index: int) -> Picture:
    """Picture `index` of a split: a function of its arguments alone, so that any process can make any picture.

    Every picture of a run of near-duplicates (`world.GROUPS`) designs the run's first scene anew, then varies it.
    """
    number = SPLITS.index(split)
    first = group_start(index)
    scene = sample_scene(np.random.default_rng([seed, number, first, 0]))
    rng = np.random.default_rng([seed, number, index, 1])
    if index != first:
        scene = vary(scene, rng)
    pixels, owner = draw(scene, rng)
    boxes, _ = visible_boxes(owner, len(scene.things))
    centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in boxes.tolist()]
    captions = Speaker(scene, centres, rng).captions()
    proposals = propose(boxes, rng)
    features = region_features(pixels, proposals)
    return Picture(f"{number + 1}{index:06d}", scene, boxes, pixels, captions, proposals, features)
