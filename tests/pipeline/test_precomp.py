"""SCAN's precomputed layout: which caption belongs to which row, and one sentence for every damaged file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itm_pipeline.data import PrecompSplit, scan
from itm_pipeline.errors import UserError

# The time an example takes says nothing on a busy machine.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Files:
    """The files of one split; tests change what they need before :meth:`write`."""

    images: int = 3
    per_image: int = 5
    repeated: bool = False
    split: str = "test"
    ids: list[str] | None = None
    features: npt.NDArray[Any] = field(init=False)
    captions: list[str] = field(init=False)

    def __post_init__(self) -> None:
        looks = np.random.default_rng(0).standard_normal((self.images, 4, 6)).astype(np.float32)
        self.features = looks.repeat(self.per_image, axis=0) if self.repeated else looks
        self.captions = [f"caption {k} of image {i}" for i in range(self.images) for k in range(self.per_image)]

    def write(self, folder: Path) -> Path:
        np.save(folder / f"{self.split}_ims.npy", self.features)
        (folder / f"{self.split}_caps.txt").write_text("\n".join(self.captions) + "\n", encoding="utf-8")
        if self.ids is not None:
            (folder / f"{self.split}_ids.txt").write_text("\n".join(self.ids) + "\n", encoding="utf-8")
        return folder


def refused(folder: Path, split: str = "test", **options: int) -> str:
    """The one sentence with which opening the split fails."""
    with pytest.raises(UserError) as caught:
        PrecompSplit(folder, split, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- which caption belongs to which row


@RELAXED
@given(images=st.integers(2, 12), per_image=st.integers(1, 6), repeated=st.booleans(), with_ids=st.booleans())
def test_captions_find_their_image(
    images: int, per_image: int, repeated: bool, with_ids: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = [f"im{i}" for i in range(images) for _ in range(per_image)] if with_ids else None
    files = Files(images, per_image, repeated, ids=ids)
    folder = files.write(tmp_path_factory.mktemp("split"))
    one_row_a_caption = repeated or per_image == 1
    # Only five captions, or ids that tell, are found without being told.
    found = per_image == 5 or (one_row_a_caption and (with_ids or per_image == 1))
    split = PrecompSplit(folder, "test", captions_per_image=None if found else per_image)
    assert (split.num_images, split.num_captions) == (images, images * per_image)
    assert split.captions_per_image == per_image
    assert split.captions == files.captions
    assert split.image_ids == ([f"im{i}" for i in range(images)] if with_ids else None)
    assert len(split.image_rows) == images
    captions = np.arange(split.num_captions)
    assert split.image_of(captions).tolist() == [k // per_image for k in captions]
    for k in captions.tolist():
        assert split.captions[k].endswith(f"of image {split.image_of(k)}")
        own = split.features[split.image_rows[split.image_of(k)]]
        assert np.array_equal(split.features[split.row_of(k)], own)
    assert split.row_of(captions).tolist() == [k if one_row_a_caption else k // per_image for k in captions]
    assert len(np.unique(split.features[split.image_rows], axis=0)) == images


def test_features_stay_on_disk(tmp_path: Path) -> None:
    split = PrecompSplit(Files().write(tmp_path), "test")
    assert isinstance(split.features, np.memmap)
    assert split.features.dtype == np.float32
    assert not split.features.flags.writeable
    assert repr(split).endswith("'test': 3 images of 4 regions of width 6, 15 captions)")


def test_without_repetition_a_row_per_caption_is_an_image_each(tmp_path: Path) -> None:
    files = Files(images=15, per_image=1)
    split = PrecompSplit(files.write(tmp_path), "test")
    assert (split.num_images, split.captions_per_image) == (15, 1)
    # One row that differs from its group is enough.
    files = Files(images=3, repeated=True)
    files.features[7, 0, 0] += 1
    assert PrecompSplit(files.write(tmp_path), "test").captions_per_image == 1


def test_ids_that_number_the_captions_do_not_hide_the_repetition(tmp_path: Path) -> None:
    files = Files(repeated=True, ids=[str(k) for k in range(15)])
    split = PrecompSplit(files.write(tmp_path), "test")
    assert split.captions_per_image == 5
    assert split.image_ids == ["0", "5", "10"]


def test_ids_may_stand_once_per_row(tmp_path: Path) -> None:
    split = PrecompSplit(Files(ids=["x", "y", "z"]).write(tmp_path), "test")
    assert split.image_ids == ["x", "y", "z"]


@pytest.mark.parametrize("repeated", [False, True])
def test_dev_ends_with_caption_5000(repeated: bool, tmp_path: Path) -> None:
    files = Files(images=1010, repeated=repeated, split="dev", ids=[str(k // 5) for k in range(5050)])
    split = PrecompSplit(files.write(tmp_path), "dev")
    assert (split.num_images, split.num_captions) == (1000, 5000)
    assert split.captions == files.captions[:5000]
    assert len(split.image_rows) == len(split.image_ids or ()) == 1000
    files.split = "train"
    assert PrecompSplit(files.write(tmp_path), "train").num_captions == 5050


def test_boxes_and_sizes(tmp_path: Path) -> None:
    folder = Files().write(tmp_path)
    split = PrecompSplit(folder, "test")
    assert split.boxes is None
    assert split.sizes is None
    boxes = np.random.default_rng(0).random((3, 4, 4), dtype=np.float32)
    np.save(folder / "test_ims_bbx.npy", boxes)
    np.save(folder / "test_ims_size.npy", np.array([[480, 640]] * 3))
    split = PrecompSplit(folder, "test")
    assert split.boxes is not None
    assert split.sizes is not None
    assert np.array_equal(split.boxes, boxes)
    assert split.sizes.tolist() == [[480, 640]] * 3


def test_captions_keep_what_they_hold(tmp_path: Path) -> None:
    files = Files(images=1)
    folder = files.write(tmp_path)
    lines = ["café \u2028 with a line separator", "tab\there", "\x85 in the middle \x85.", "d", "e"]
    (folder / "test_caps.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert PrecompSplit(folder, "test").captions == [line.strip() for line in lines]


# --- damaged input


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere")
    folder = Files().write(tmp_path)
    assert re.search(r"dev_caps\.txt: no such file; check", refused(folder, "dev"))
    (folder / "test_ims.npy").unlink()
    assert re.search(r"test_ims\.npy: no such file; check", refused(folder))


@pytest.mark.parametrize("keep", [0, 4, 20, 100, 128, 128 + 4 * 24 * 3 - 1])
def test_truncated_features(keep: int, tmp_path: Path) -> None:
    path = Files().write(tmp_path) / "test_ims.npy"
    path.write_bytes(path.read_bytes()[:keep])
    expected = (
        r"truncated, its header promises 3 x 4 x 6 float32 \(416 bytes\) but" if keep >= 128 else "not a .npy file"
    )
    assert re.search(rf"test_ims\.npy: {expected}", refused(tmp_path))


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    files = Files()
    good = files.features
    for features, message in (
        (good.astype(np.float64), "must be float32, found float64; convert it with"),
        (good.astype(">f4"), "must be float32, found >f4"),
        (good[:, 0], r"must have the shape \[rows, regions, width\] with no empty dimension, found \[3, 6\]"),
        (good[:, :0], r"found \[3, 0, 6\]"),
        (good[:0], r"found \[0, 4, 6\]"),
        (np.asfortranarray(good), "stored in Fortran order"),
        (np.array([{}, None, 1], dtype=object), "holds Python objects"),
    ):
        files.features = features
        assert re.search(message, refused(files.write(tmp_path))), message


def test_counts_that_do_not_fit(tmp_path: Path) -> None:
    files = Files()
    files.captions.append("one more")
    message = refused(files.write(tmp_path))
    assert re.search(r"test_ims\.npy has 3 rows but test_caps\.txt has 16 captions: there must be one row per", message)
    folder = Files(images=3, per_image=2).write(tmp_path)
    assert "3 rows but test_caps.txt has 6 captions" in refused(folder)
    assert PrecompSplit(folder, "test", captions_per_image=2).num_images == 3
    assert "of 3 captions" in refused(folder, captions_per_image=3)
    assert "at least 1" in refused(folder, captions_per_image=0)
    folder = Files(images=4, per_image=1).write(tmp_path)
    assert "one per image of 3 captions" in refused(folder, captions_per_image=3)


def test_ids_that_contradict(tmp_path: Path) -> None:
    def ids(*runs: tuple[str, int]) -> list[str]:
        return [name for name, count in runs for _ in range(count)]

    for repeated in (False, True):
        files = Files(repeated=repeated, ids=ids(("a", 5), ("b", 4), ("c", 6)))
        message = refused(files.write(tmp_path))
        assert "test_ids.txt line 10: image id 'c' among the 5 captions of image 'b' (from line 6)" in message
        files = Files(repeated=repeated, ids=ids(("a", 5), ("b", 5), ("a", 5)))
        assert "test_ids.txt line 11: image id 'a' stood at line 1 already" in refused(files.write(tmp_path))
    files = Files(ids=["a", "b"])
    assert "test_ids.txt: 2 ids for 15 captions in test_caps.txt" in refused(files.write(tmp_path))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7, 10])
@pytest.mark.parametrize("block_rows", [1, 4, 100])
def test_a_row_that_is_not_finite_is_named(
    bad: float, row: int, block_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_BLOCK_BYTES", block_rows * 4 * 6 * 4)
    files = Files(images=11)
    files.features[row, 3, 5] = bad
    assert re.search(rf"test_ims\.npy row {row}: holds NaN or infinity; extract", refused(files.write(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\n\nd\ne\n", r"test_caps\.txt line 3: empty caption"),
        (b"a\nb\n \t\nd\ne\n", r"test_caps\.txt line 3: empty caption"),
        (b"a\nb\nc\nd\ne\n\n", r"test_caps\.txt line 6: empty caption"),
        (b"a\nb\nc\ncaf\xe9\ne\n", r"test_caps\.txt line 4: not UTF-8 \(byte 0xe9 at position 3\); save"),
        (b"", r"test_caps\.txt: the file is empty; it must hold one caption a line"),
        (b"\n\n", r"test_caps\.txt: the file is empty"),
    ],
)
def test_damaged_captions(content: bytes, message: str, tmp_path: Path) -> None:
    folder = Files(images=1).write(tmp_path)
    (folder / "test_caps.txt").write_bytes(content)
    assert re.search(message, refused(folder))


def test_damaged_ids(tmp_path: Path) -> None:
    folder = Files(images=1, ids=["a"] * 5).write(tmp_path)
    (folder / "test_ids.txt").write_bytes(b"a\n\na\na\na\n")
    assert "test_ids.txt line 2: empty image id" in refused(folder)


def test_boxes_and_sizes_that_do_not_fit(tmp_path: Path) -> None:
    folder = Files().write(tmp_path)
    boxes, sizes = np.zeros((3, 4, 4), np.float32), np.full((3, 2), 9)
    damaged: list[tuple[str, npt.NDArray[np.generic], str]] = [
        ("bbx", boxes[:2], r"must be \[3, 4, 4\] to fit test_ims\.npy, found \[2, 4, 4\]"),
        ("bbx", boxes[:, :3], r"found \[3, 3, 4\]"),
        ("bbx", boxes[0], r"must have the shape \[rows, regions, 4\]"),
        ("bbx", np.where(np.arange(3)[:, None, None] == 1, np.nan, boxes), r"row 1: holds NaN"),
        ("size", sizes[:2], r"must be whole numbers \[3, 2\] to fit test_ims\.npy, found int64 \[2, 2\]"),
        ("size", sizes.astype(np.float32), r"found float32 \[3, 2\]"),
        ("size", sizes * np.array([[1], [1], [0]]), r"row 2: height and width must be positive, found \[0, 0\]"),
    ]
    for kind, array, message in damaged:
        path = folder / f"test_ims_{kind}.npy"
        np.save(path, array)
        assert re.search(rf"{path.name}.*{message}", refused(folder)), message
        path.unlink()


# --- the scan of the numbers


@pytest.mark.parametrize(
    ("pattern", "repeat"),
    [("aabbcc", 2), ("aabbbb", 2), ("aaabbb", 3), ("aaaaaa", 6), ("abcdef", 1), ("aaab", 1), ("aaaabb", 2), ("a", 1)],
)
@pytest.mark.parametrize("block_rows", [1, 2, 3, 100])
def test_repetition(
    pattern: str, repeat: int, block_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_BLOCK_BYTES", block_rows * 2 * 4)
    np.save(tmp_path / "x.npy", np.array([[ord(letter), 0] for letter in pattern], np.float32))
    assert scan.scan_rows(tmp_path / "x.npy") == scan.RowScan(bad_row=None, repeat=repeat)


@RELAXED
@given(runs=st.lists(st.integers(1, 6), min_size=1, max_size=8), size=st.integers(1, 6))
def test_groups_are_equal_exactly_when_their_size_divides(
    runs: list[int], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = np.repeat(np.arange(len(runs), dtype=np.float32), runs)[:, None]
    path = tmp_path_factory.mktemp("scan") / "x.npy"
    np.save(path, rows)
    equal = len(rows) % size == 0 and all(len(set(rows[k : k + size, 0])) == 1 for k in range(0, len(rows), size))
    assert (scan.scan_rows(path).repeat % size == 0) == equal


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Scans a file as if it were large; gives how often the rows were really read so far."""
    reads = []
    really = scan._scan

    def read(path: Path) -> scan.RowScan:
        reads.append(path)
        return really(path)

    monkeypatch.setattr(scan, "_scan", read)
    monkeypatch.setattr(scan, "_REMEMBERED_FROM_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def count(path: Path) -> int:
        scan.scan_rows(path)
        return len(reads)

    return count


def test_a_scan_is_remembered_until_the_file_changes(tmp_path: Path, counted: Callable[[Path], int]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((6, 2), np.float32))
    assert counted(path) == 1
    assert counted(path) == 1
    assert scan.scan_rows(path) == scan.RowScan(bad_row=None, repeat=6)
    np.save(path, np.array([[1, 2], [np.nan, 3]], np.float32))
    assert counted(path) == 2
    assert scan.scan_rows(path).bad_row == 1, "a fault is remembered as well"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert counted(path) == 3
    assert counted(path) == 3


def test_a_cache_that_cannot_be_used_costs_a_scan(tmp_path: Path, counted: Callable[[Path], int]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((6, 2), np.float32))
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert counted(path) == 1
    assert counted(path) == 2
    (tmp_path / "cache").unlink()
    assert counted(path) == 3
    (entry,) = (tmp_path / "cache" / "itm_pipeline" / "scans").iterdir()
    for damage in ("", "[]", "{}", json.dumps({"key": None, "scan": {}})):
        entry.write_text(damage)
        before = counted(path)
        assert counted(path) == before, "a damaged entry is replaced"


def test_small_files_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    PrecompSplit(Files().write(tmp_path), "test")
    assert not (tmp_path / "cache").exists()
