"""The drawn scenes: their files, the truth of their captions, their regions, and when they are made anew."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import itm_pipeline.scenes.build as build
from itm_pipeline.data.precomp import PrecompSplit
from itm_pipeline.errors import UserError
from itm_pipeline.scenes import make_scenes
from itm_pipeline.scenes.cache import MARKER
from itm_pipeline.scenes.features import FEATURE_DIM, region_features
from itm_pipeline.scenes.proposals import intersection_over_union
from scene_checker import is_true, meant, phrases

SIZES = {"train": 30, "dev": 6, "test": 8}
MARK = re.compile(r"\[/EN#(\d+)/(\w+) ([^\]]+)\]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("made") / "scenes", **SIZES, seed=3, processes=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scenes(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}_scenes.jsonl").read_text().splitlines()]


def captions(folder: Path, split: str) -> list[list[str]]:
    lines = (folder / f"{split}_caps.txt").read_text().splitlines()
    return [lines[at : at + 5] for at in range(0, len(lines), 5)]


def each_picture(folder: Path) -> list[tuple[dict[str, Any], list[str]]]:
    return [pair for s in SIZES for pair in zip(scenes(folder, s), captions(folder, s), strict=True)]


# The files


@pytest.mark.parametrize("split", SIZES)
def test_the_precomputed_layout(folder: Path, split: str) -> None:
    opened = PrecompSplit(folder, split)
    count = SIZES[split]
    assert (opened.num_images, opened.num_captions, opened.captions_per_image) == (count, 5 * count, 5)
    assert opened.features.shape == (count, 36, FEATURE_DIM)
    assert opened.features.dtype == np.float32
    assert opened.image_ids == [scene["id"] for scene in scenes(folder, split)]
    ids = (folder / f"{split}_ids.txt").read_text().split()
    assert ids == [i for i in opened.image_ids for _ in range(5)]
    assert opened.boxes is not None
    assert opened.sizes is not None
    assert opened.boxes.dtype == np.float32
    assert opened.sizes.dtype == np.int64


def test_every_picture_has_its_three_files_and_an_id_of_its_own(folder: Path) -> None:
    ids = [scene["id"] for scene, _ in each_picture(folder)]
    assert len(set(ids)) == sum(SIZES.values())
    for name, suffix in {"images": ".png", "Sentences": ".txt", "Annotations": ".xml"}.items():
        assert sorted(path.name for path in (folder / name).iterdir()) == sorted(i + suffix for i in ids)


def test_sentences_say_the_words_of_the_captions(folder: Path) -> None:
    for scene, said in each_picture(folder):
        lines = (folder / "Sentences" / f"{scene['id']}.txt").read_text().splitlines()
        assert [MARK.sub(r"\3", line) for line in lines] == said
        assert all(MARK.search(line) for line in lines)


def annotations(folder: Path, image_id: str) -> tuple[dict[str, list[list[int]]], set[str], tuple[int, int]]:
    """Boxes of every chain (1-based), the chains marked as scene, and (height, width)."""
    root = ET.parse(folder / "Annotations" / f"{image_id}.xml").getroot()
    boxes: dict[str, list[list[int]]] = {}
    scene = set()
    for entry in root.iter("object"):
        name, box = entry.findtext("name") or "", entry.find("bndbox")
        if box is not None:
            boxes.setdefault(name, []).append([int(box.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax")])
        elif entry.findtext("scene") == "1":
            scene.add(name)
    return boxes, scene, (int(root.findtext("size/height") or ""), int(root.findtext("size/width") or ""))


def test_every_marked_phrase_leads_to_the_boxes_of_what_it_means(folder: Path) -> None:
    several = 0
    for scene, _ in each_picture(folder):
        boxes, backgrounds, size = annotations(folder, scene["id"])
        with Image.open(folder / "images" / f"{scene['id']}.png") as picture:
            assert (picture.height, picture.width) == size
        for line in (folder / "Sentences" / f"{scene['id']}.txt").read_text().splitlines():
            for chain, kind, words in MARK.findall(line):
                if kind == "other":
                    things = [scene["things"][i] for i in meant(words, scene)]
                    assert sorted(boxes[chain]) == sorted([side + 1 for side in t["box"]] for t in things)
                    several += len(things) > 1
                elif kind == "scene":
                    assert chain in backgrounds
                    assert chain not in boxes
                else:
                    assert (kind, chain) == ("notvisual", "0")
        for x1, y1, x2, y2 in (box for chain in boxes.values() for box in chain):
            assert 1 <= x1 < x2 <= size[1]
            assert 1 <= y1 < y2 <= size[0]
    assert several > 5, "no counted phrase was put to the test"


# The captions


def test_captions_are_true_of_their_scene(folder: Path) -> None:
    size = tuple(np.load(folder / "train_ims_size.npy")[0])
    for scene, said in each_picture(folder):
        assert len(set(said)) == 5
        assert 3 <= len(scene["things"]) <= 7
        for caption in said:
            assert is_true(caption, scene, size), (caption, scene["id"])


def test_the_checker_finds_a_mirrored_scene_false(folder: Path) -> None:
    height, width = (int(side) for side in np.load(folder / "train_ims_size.npy")[0])
    sided = 0
    for scene, said in each_picture(folder):
        mirrored = json.loads(json.dumps(scene))
        for thing in mirrored["things"]:
            x1, y1, x2, y2 = thing["box"]
            thing["box"] = [width - 1 - x2, y1, width - 1 - x1, y2]
        for caption in said:
            if "left" in caption or "right" in caption:
                sided += 1
                assert not is_true(caption, mirrored, (height, width))
    assert sided > 50


def test_captions_are_partial(folder: Path) -> None:
    """Most captions leave things out; the five of a picture do not all say the same."""
    mentioned = [
        {i for phrase in phrases(caption) for i in meant(phrase, scene)}
        for scene, said in each_picture(folder)
        for caption in said
    ]
    totals = [len(scene["things"]) for scene, _ in each_picture(folder) for _ in range(5)]
    partial = np.mean([len(some) < total for some, total in zip(mentioned, totals, strict=True)])
    assert partial > 0.6


def test_neighbours_are_near_duplicates(folder: Path) -> None:
    """A run of near-duplicates differs in one thing's attribute, in two places, or in one thing more or less."""
    kinds = [
        [tuple(t[name] for name in ("shape", "colour", "texture", "size")) for t in scene["things"]]
        for scene in scenes(folder, "train")
    ]
    alike = 0
    for one, two in pairwise(kinds):
        shared = sum(min(one.count(kind), two.count(kind)) for kind in set(one))
        alike += shared >= max(len(one), len(two)) - 1
    assert alike >= len(kinds) // 6


# The regions


def test_features_are_those_of_the_stored_pixels(folder: Path) -> None:
    for split in SIZES:
        features, boxes = np.load(folder / f"{split}_ims.npy"), np.load(folder / f"{split}_ims_bbx.npy")
        assert np.isfinite(features).all()
        for row, scene in enumerate(scenes(folder, split)):
            with Image.open(folder / "images" / f"{scene['id']}.png") as picture:
                pixels = np.asarray(picture.convert("RGB"))
            np.testing.assert_array_equal(region_features(pixels, boxes[row]), features[row])


def test_features_follow_pixels_and_place() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    boxes = np.array([[5, 5, 30, 30], [45, 20, 70, 45]], np.float32)
    before = region_features(pixels, boxes)
    painted = pixels.copy()
    painted[8:28, 8:28] = (200, 30, 30)
    after = region_features(painted, boxes)
    assert np.abs(after[0] - before[0]).max() > 0.1
    np.testing.assert_array_equal(after[1], before[1])  # far from the paint
    swapped = region_features(pixels, boxes[::-1].copy())
    np.testing.assert_array_equal(swapped, before[::-1])  # rows do not know of each other


def test_features_of_odd_regions_are_finite() -> None:
    for pixels in (np.zeros((40, 50, 3), np.uint8), np.full((40, 50, 3), 255, np.uint8)):
        boxes = np.array([[0, 0, 49, 39], [10, 10, 10, 10], [49, 39, 49, 39]], np.float32)
        assert np.isfinite(region_features(pixels, boxes)).all()


def test_proposals_lie_inside_and_hit_every_thing(folder: Path) -> None:
    for split in SIZES:
        boxes, sizes = np.load(folder / f"{split}_ims_bbx.npy"), np.load(folder / f"{split}_ims_size.npy")
        assert boxes.shape == (SIZES[split], 36, 4)
        assert (boxes[..., :2] >= 0).all()
        assert (boxes[..., 2] <= sizes[:, 1:] - 1).all()
        assert (boxes[..., 3] <= sizes[:, :1] - 1).all()
        assert (boxes[..., 2:] - boxes[..., :2] >= 5.99).all()
        for row, scene in enumerate(scenes(folder, split)):
            true = np.array([thing["box"] for thing in scene["things"]], np.float32)
            overlap = intersection_over_union(true, boxes[row])
            assert (overlap.max(1) > 0.5).all()
            assert (overlap.max(0) < 0.3).sum() >= 5, "no background among the proposals"


def test_intersection_over_union_by_hand() -> None:
    one = np.array([[0, 0, 10, 10]], np.float32)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    np.testing.assert_allclose(intersection_over_union(one, others), [[1, 1 / 3, 0]])


# Made once, made again


def test_the_same_bits_from_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    again = make_scenes(tmp_path / "again", **SIZES, seed=3, processes=2)
    assert contents(again) == contents(folder)


def test_another_seed_draws_other_pictures_and_sizes_do_not_matter(folder: Path, tmp_path: Path) -> None:
    small = {"train": 3, "dev": 1, "test": 2}
    same, other = contents(make_scenes(tmp_path / "same", **small, seed=3)), make_scenes(tmp_path / "other", **small)
    whole = contents(folder)
    for name in ("images/1000002.png", "Sentences/3000001.txt", "Annotations/2000000.xml"):
        assert same[name] == whole[name]
        assert same[name] != contents(other)[name]


def test_a_finished_set_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_scenes(tmp_path / "s", train=2, dev=1, test=1)
    monkeypatch.setattr(build, "make_picture", lambda *_: pytest.fail("drawn again"))
    assert make_scenes(tmp_path / "s", train=2, dev=1, test=1) == made


def _older(folder: Path) -> None:
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**marker, "format": marker["format"] - 1}))


def _truncated(folder: Path) -> None:
    path = folder / "dev_ims.npy"
    path.write_bytes(path.read_bytes()[:-4])


def _without_a_picture(folder: Path) -> None:
    (folder / "images" / "1000001.png").unlink()


@pytest.mark.parametrize("damage", [_older, _truncated, _without_a_picture])
def test_a_stale_or_damaged_set_is_made_anew(tmp_path: Path, damage: Any) -> None:
    made = make_scenes(tmp_path / "s", train=2, dev=1, test=1)
    before = contents(made)
    damage(made)
    assert contents(made) != before
    assert contents(make_scenes(made, train=2, dev=1, test=1)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_scenes_of_other_numbers_are_refused_and_kept(tmp_path: Path) -> None:
    made = make_scenes(tmp_path / "s", train=2, dev=1, test=1)
    before = contents(made)
    with pytest.raises(UserError, match=r"holds scenes of seed 0 with 2/1/1 .*asked for were seed 5"):
        make_scenes(made, train=2, dev=1, test=1, seed=5)
    with pytest.raises(UserError, match=r"asked for were seed 0 with 3/1/1"):
        make_scenes(made, train=3, dev=1, test=1)
    assert contents(made) == before


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a set of scenes"):
        make_scenes(tmp_path, train=1, dev=1, test=1)
    with pytest.raises(UserError, match="is a file"):
        make_scenes(tmp_path / "thesis.tex", train=1, dev=1, test=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train must be 1"),
        ({"test": -1}, "test must be 1"),
        ({"seed": -1}, "must not be negative"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
)
def test_numbers_that_make_no_set_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_scenes(tmp_path / "s", **options)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert (make_scenes(tmp_path / "s", train=1, dev=1, test=1) / MARKER).is_file()


def test_an_interrupted_set_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = build.make_picture

    def interrupted(seed: int, split: str, index: int) -> Any:
        if split == "dev":
            raise KeyboardInterrupt
        return draw(seed, split, index)

    monkeypatch.setattr(build, "make_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "s", train=2, dev=1, test=1)
    assert not list(tmp_path.iterdir())


def test_no_bar_where_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_scenes(tmp_path / "s", train=1, dev=1, test=1, progress=True)
    assert capfd.readouterr() == ("", "")
