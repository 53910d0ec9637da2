"""Which caption belongs to which image and feature row, from the counts, the ids and the repetition of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

PUBLISHED_CAPTIONS_PER_IMAGE = 5


@dataclass(frozen=True)
class Layout:
    """How captions, unique images and feature rows of a split belong together."""

    captions_per_image: int
    """Consecutive captions of each image."""
    rows_per_image: int
    """Feature rows of each image: 1, or ``captions_per_image`` where files have one row per caption."""
    image_ids: list[str] | None
    """Id of each unique image."""


@dataclass(frozen=True)
class Counts:
    """What the files of a split hold, and their names for messages."""

    rows: int
    """Feature rows."""
    captions: int
    ids: list[str] | None
    ims_path: Path
    caps_path: Path
    ids_path: Path


def resolve_layout(counts: Counts, captions_per_image: int | None, repeat: Callable[[], int]) -> Layout:
    """Apply the rules that :class:`itm_pipeline.data.precomp.PrecompSplit` states.

    Parameters
    ----------
    counts
        What the files hold.
    captions_per_image
        The number to take in place of the one that the rules find, or None.
    repeat
        Gives the size of the groups of equal consecutive rows (:attr:`itm_pipeline.data.scan.RowScan.repeat`); called
        only where the rules need it, since it may read the whole feature file.

    Raises
    ------
    UserError
        When the counts do not fit each other or the ids contradict them.
    """
    per_caption = counts.rows == counts.captions
    ids = counts.ids
    if ids is not None and len(ids) not in (counts.captions, counts.rows):
        raise UserError(
            f"{counts.ids_path}: {len(ids)} ids for {counts.captions} captions in {counts.caps_path.name}; "
            "it must hold one id per caption (or one per row of features)"
        )
    # Ids that number the captions tell nothing about images.
    tells = ids is not None and len(ids) == counts.captions and len(set(ids)) < len(ids)
    if captions_per_image is not None:
        size = captions_per_image
    elif not per_caption:
        size = PUBLISHED_CAPTIONS_PER_IMAGE
    elif tells:
        assert ids is not None
        size = _first_run(ids)
    else:
        size = PUBLISHED_CAPTIONS_PER_IMAGE if repeat() % PUBLISHED_CAPTIONS_PER_IMAGE == 0 else 1

    rows_per_image = size if per_caption else 1
    if counts.captions != counts.rows // rows_per_image * size or counts.rows % rows_per_image:
        raise UserError(
            f"{counts.ims_path} has {counts.rows} rows but {counts.caps_path.name} has {counts.captions} captions: "
            f"there must be one row per caption or one per image of {size} captions; make both files from the same list"
        )
    if ids is None:
        return Layout(size, rows_per_image, None)
    if tells:
        _check_groups(ids, size, counts.ids_path)
    step = size if len(ids) == counts.captions else 1
    return Layout(size, rows_per_image, ids[::step])


def _first_run(ids: list[str]) -> int:
    """How many times the first id stands at the start."""
    return next((index for index, image_id in enumerate(ids) if image_id != ids[0]), len(ids))


def _check_groups(ids: list[str], size: int, path: Path) -> None:
    """Each group of ``size`` lines must hold one id, and no other group the same."""
    seen: dict[str, int] = {}
    for line, image_id in enumerate(ids, start=1):
        start = (line - 1) // size * size + 1
        if image_id != ids[start - 1]:
            raise UserError(
                f"{path} line {line}: image id {image_id!r} among the {size} captions of image {ids[start - 1]!r} "
                f"(from line {start}); all images must have the same number of captions, standing together"
            )
        first = seen.setdefault(image_id, start)
        if first != start:
            raise UserError(
                f"{path} line {line}: image id {image_id!r} stood at line {first} already; "
                f"all images must have {size} captions, standing together"
            )
