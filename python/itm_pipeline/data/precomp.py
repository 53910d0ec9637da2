"""SCAN's precomputed layout: region features, captions, ids and boxes of one split.

A folder holds, for each split:

========================  =========================================================================================
``{split}_ims.npy``       float32 ``[M, R, F]``: one row per image, or one per caption (SCAN's own files repeat each
                          image five times)
``{split}_caps.txt``      one caption a line, UTF-8; the captions of an image stand together
``{split}_ids.txt``       optional: one image id per caption (or per row)
``{split}_ims_bbx.npy``   optional: ``[M, R, 4]``, ``x1 y1 x2 y2`` in 0-based pixels
``{split}_ims_size.npy``  optional: ``[M, 2]`` whole numbers, height and width in pixels
========================  =========================================================================================
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .layout import Counts, resolve_layout
from .lines import read_lines
from .npy import open_npy
from .scan import RowScan, scan_rows

DEV_CAPTIONS = 5000
"""The published code validates on the first 5,000 captions of ``dev``."""

IndexT = TypeVar("IndexT", int, npt.NDArray[np.int64])


class PrecompSplit:
    """One split, its features memory-mapped and everything checked on opening.

    Nothing is loaded whole: features, boxes and sizes are read-only maps. The first opening reads the numbers once, in
    blocks, to look for NaN; later ones recall the outcome until a file's size or time of change differs.

    With M rows and K captions in the files,

    - M != K means one row per image, with 5 consecutive captions each (K must be 5 M);
    - M == K means one row per caption. The ids tell which captions share an image. Without ids, or when every caption
      has an id of its own, rows in groups of five equal ones are five captions of one image; otherwise every caption
      is an image of its own.

    ``dev`` uses at most the images of its first 5,000 captions, as published.

    Parameters
    ----------
    folder, split
        Where the files are, and the first part of their names (``train``, ``dev``, ``test``, ``testall``, ...).
    captions_per_image
        Takes the place of the number that these rules find.

    Attributes
    ----------
    features
        ``[M, R, F]`` float32 map; see :meth:`row_of` and ``image_rows``.
    captions
        ``num_captions`` captions.
    image_ids
        Id of each unique image (``num_images`` of them), or None without an ids file.
    boxes, sizes
        ``[M, R, 4]`` and ``[M, 2]`` maps, rows as in ``features``; None where the file is missing.
    num_images, num_captions, captions_per_image
        Unique images, captions (``num_images * captions_per_image``), and captions of each image.
    image_rows
        ``[num_images]`` int64, the (first) feature row of each unique image.

    Raises
    ------
    UserError
        One sentence that names the file, and the line or row, for every fault of the files.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, *, captions_per_image: int | None = None) -> None:
        if captions_per_image is not None and captions_per_image < 1:
            raise UserError(f"captions_per_image must be at least 1, got {captions_per_image}")
        self.folder = Path(folder)
        self.split = split
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; give the one that holds {split}_ims.npy")
        # Headers and counts first: they fail within milliseconds, a scan of the numbers may take minutes.
        captions = read_lines(self._path("caps.txt"), "caption")
        self.features = open_npy(self._path("ims.npy"), dims="rows, regions, width", dtype="float32")
        ids = read_lines(self._path("ids.txt"), "image id") if self._path("ids.txt").exists() else None
        self.boxes = self._open_boxes()
        self.sizes = self._open_sizes()
        counts = Counts(
            rows=len(self.features),
            captions=len(captions),
            ids=ids,
            ims_path=self._path("ims.npy"),
            caps_path=self._path("caps.txt"),
            ids_path=self._path("ids.txt"),
        )
        layout = resolve_layout(counts, captions_per_image, lambda: _scan(self._path("ims.npy")).repeat)
        for name in ("ims.npy", "ims_bbx.npy"):
            if self._path(name).exists():
                _scan(self._path(name))
        self.captions_per_image = layout.captions_per_image
        self._rows_per_image = layout.rows_per_image
        self.num_images = len(captions) // self.captions_per_image
        if split == "dev":
            self.num_images = min(self.num_images, max(1, DEV_CAPTIONS // self.captions_per_image))
        self.num_captions = self.num_images * self.captions_per_image
        self.captions = captions[: self.num_captions]
        self.image_ids = None if layout.image_ids is None else layout.image_ids[: self.num_images]
        self.image_rows: npt.NDArray[np.int64] = np.arange(self.num_images, dtype=np.int64) * self._rows_per_image

    def image_of(self, caption_index: IndexT) -> IndexT:
        """Unique image of a caption, ``0 .. num_images - 1``; takes an index or an array of them."""
        return caption_index // self.captions_per_image

    def row_of(self, caption_index: IndexT) -> IndexT:
        """Row of ``features`` of a caption; takes an index or an array of them."""
        return caption_index // (self.captions_per_image // self._rows_per_image)

    def __repr__(self) -> str:
        _, regions, width = self.features.shape
        return (
            f"PrecompSplit({str(self.folder)!r}, {self.split!r}: {self.num_images} images of {regions} regions of "
            f"width {width}, {self.num_captions} captions)"
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.split}_{name}"

    def _open_boxes(self) -> npt.NDArray[Any] | None:
        path = self._path("ims_bbx.npy")
        if not path.exists():
            return None
        boxes = open_npy(path, dims="rows, regions, 4")
        expected = (*self.features.shape[:2], 4)
        if boxes.shape != expected:
            raise UserError(f"{path}: must be {list(expected)} to fit {self.split}_ims.npy, found {list(boxes.shape)}")
        return boxes

    def _open_sizes(self) -> npt.NDArray[Any] | None:
        path = self._path("ims_size.npy")
        if not path.exists():
            return None
        sizes = open_npy(path, dims="rows, 2")
        expected = (len(self.features), 2)
        if sizes.shape != expected or sizes.dtype.kind not in "iu":
            raise UserError(
                f"{path}: must be whole numbers {list(expected)} to fit {self.split}_ims.npy, "
                f"found {sizes.dtype} {list(sizes.shape)}"
            )
        bad = np.flatnonzero((sizes < 1).any(axis=1))
        if bad.size:
            raise UserError(f"{path} row {bad[0]}: height and width must be positive, found {sizes[bad[0]].tolist()}")
        return sizes


def _scan(path: Path) -> RowScan:
    """Scan ``path``, or recall its scan, and refuse a row that is not finite."""
    scan = scan_rows(path)
    if scan.bad_row is not None:
        raise UserError(
            f"{path} row {scan.bad_row}: holds NaN or infinity; extract this image's features again or leave it out"
        )
    return scan
