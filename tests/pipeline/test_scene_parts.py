"""The parts of the scenes on their own: what may stand in a scene, what is drawn, and what a relation means."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from itm_pipeline.scenes.draw import draw, signed_distance, visible_boxes
from itm_pipeline.scenes.world import (
    FEWEST,
    GROUPS,
    HEIGHT,
    MOST,
    SHAPES,
    WIDTH,
    Scene,
    Thing,
    group_start,
    relation_holds,
    sample_scene,
    vary,
)


def kind(thing: Thing) -> tuple[str, str, str, str]:
    return thing.shape, thing.colour, thing.texture, thing.size


def test_relations_by_hand() -> None:
    assert relation_holds("left", (10, 50), (60, 52))
    assert relation_holds("right", (60, 52), (10, 50))
    assert relation_holds("above", (50, 10), (52, 60))
    assert relation_holds("below", (52, 60), (50, 10))
    assert not relation_holds("left", (10, 50), (18, 50)), "too close"
    assert not relation_holds("left", (10, 10), (30, 90)), "mostly above"
    assert not relation_holds("right", (10, 50), (60, 52))


def test_relations_are_each_others_opposites() -> None:
    rng = np.random.default_rng(0)
    for one, two in rng.uniform(0, 150, (300, 2, 2)).tolist():
        for name, opposite in (("left", "right"), ("above", "below")):
            assert relation_holds(name, tuple(one), tuple(two)) == relation_holds(opposite, tuple(two), tuple(one))
            assert not (
                relation_holds(name, tuple(one), tuple(two)) and relation_holds(opposite, tuple(one), tuple(two))
            )


def test_runs_of_near_duplicates_cover_every_index() -> None:
    starts = [group_start(i) for i in range(3 * sum(GROUPS))]
    assert all(start <= i for i, start in enumerate(starts))
    run_starts = [i for i, start in enumerate(starts) if i == start]
    assert [b - a for a, b in pairwise(run_starts)] == [*GROUPS, *GROUPS, *GROUPS][:-1]


def scenes(count: int) -> list[Scene]:
    return [sample_scene(np.random.default_rng([1, i])) for i in range(count)]


def test_a_variant_differs_in_one_thing_alone() -> None:
    changes = set()
    for i, scene in enumerate(scenes(120)):
        variant = vary(scene, np.random.default_rng([2, i]))
        assert FEWEST <= len(variant.things) <= MOST
        old, new = sorted(map(kind, scene.things)), sorted(map(kind, variant.things))
        if old == new:
            changes.add("swap")
            order = [kind(t) for t in scene.things]
            moved = sum(a != b for a, b in zip(order, (kind(t) for t in variant.things), strict=True))
            assert moved in (0, 2)
            continue
        gone, came = [k for k in old if old.count(k) > new.count(k)], [k for k in new if new.count(k) > old.count(k)]
        assert len(set(gone)) <= 1
        assert len(set(came)) <= 1
        if gone and came:
            differing = [a != b for a, b in zip(gone[0], came[0], strict=True)]
            assert sum(differing) == 1
            changes.add(("shape", "colour", "texture", "size")[differing.index(True)])
        else:
            changes.add("remove" if gone else "repeat")
    assert changes == {"shape", "colour", "texture", "size", "swap", "remove", "repeat"}


def test_everything_drawn_can_be_seen() -> None:
    for i, scene in enumerate(scenes(60)):
        variant = vary(scene, np.random.default_rng([3, i]))
        pixels, owner = draw(variant, np.random.default_rng([4, i]))
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        boxes, areas = visible_boxes(owner, len(variant.things))
        for thing, box, area in zip(variant.things, boxes, areas, strict=True):
            assert area > 0.25 * thing.radius**2
            assert 0 <= box[0] < box[2] < WIDTH
            assert 0 <= box[1] < box[3] < HEIGHT


def test_boxes_hold_the_visible_pixels_and_no_more() -> None:
    owner = np.full((HEIGHT, WIDTH), -1, np.int8)
    owner[10:21, 30:51] = 0
    owner[15:40, 40:60] = 1  # in front of 0
    boxes, areas = visible_boxes(owner, 3)
    assert boxes.tolist() == [[30, 10, 50, 20], [40, 15, 59, 39], [0, 0, 0, 0]]
    assert areas.tolist() == [11 * 21 - 6 * 11, 25 * 20, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fits_its_circle_and_is_no_other_shape(shape: str) -> None:
    steps = np.arange(-40, 41, dtype=np.float32)
    u, v = np.meshgrid(steps, steps)
    radius = 30.0
    inside = {name: signed_distance(name, u, v, radius) <= 0 for name in SHAPES}
    share = inside[shape].sum() / (np.pi * radius**2)
    assert 0.2 < share < 0.9
    assert (np.hypot(u, v)[inside[shape]] <= 1.1 * radius).all()
    for other in set(SHAPES) - {shape}:
        union = (inside[shape] | inside[other]).sum()
        assert (inside[shape] & inside[other]).sum() / union < 0.9, other


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="blob"):
        signed_distance("blob", np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), 5.0)
