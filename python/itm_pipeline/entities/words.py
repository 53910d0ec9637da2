"""Words of captions with the boxes of what they mean: what attention is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from itm_pipeline.data import PrecompSplit
from itm_pipeline.entities.alignment import align
from itm_pipeline.entities.annotations import read_boxes
from itm_pipeline.entities.sentences import NOT_VISUAL, read_sentences
from itm_pipeline.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class BoxedWord:
    """A token of a caption that lies in a phrase with boxes."""

    token: int
    """Its number in `tokenize(caption)`, from 0: start and end are not counted."""
    chain: str
    boxes: npt.NDArray[np.float64]
    """[n, 4] x1 y1 x2 y2 in 0-based pixels, every box of the phrase."""


@dataclass(frozen=True)
class CaptionWords:
    """The annotated words of one caption."""

    boxed: tuple[BoxedWord, ...]
    without_box: int
    """Words of phrases that mean something visible without a box: a scene, or what nobody drew."""


def read_words(folder: Path, split: PrecompSplit) -> list[CaptionWords]:
    """The annotated words of every caption of a split.

    Parameters
    ----------
    folder
        Holds `Sentences/ID.txt` and `Annotations/ID.xml` for every image.
    split
        Its captions and image ids; an id may be the name of a picture, `ID.jpg`.

    Raises
    ------
    UserError
        The split has no ids, a file is missing or damaged, or it has other captions than the split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds Sentences/ and Annotations/")
    if split.image_ids is None:
        raise UserError(
            f"{split.folder}: {split.split}_ids.txt is missing, which names the images that the files of {folder} "
            "belong to; write one image id per caption"
        )
    words: list[CaptionWords] = []
    for image, image_id in enumerate(split.image_ids):
        first = image * split.captions_per_image
        words += _of_image(folder, image_id, split, range(first, first + split.captions_per_image))
    return words


def _of_image(folder: Path, image_id: str, split: PrecompSplit, captions: Sequence[int]) -> list[CaptionWords]:
    name = _file_name(image_id, split)
    path = folder / "Sentences" / f"{name}.txt"
    sentences = read_sentences(path)
    if len(sentences) != len(captions):
        raise UserError(
            f"{path}: has {len(sentences)} captions, {split.split}_caps.txt has {len(captions)} of image {image_id}"
        )
    boxes = read_boxes(folder / "Annotations" / f"{name}.xml")
    found = []
    for line, (sentence, caption) in enumerate(zip(sentences, captions, strict=True), start=1):
        where = f"{split.folder / split.split}_caps.txt line {caption + 1}"
        aligned = align(sentence, split.captions[caption], f"{path} line {line}", where)
        visual = [(token, phrase.chain) for token, phrase in aligned if phrase.chain != NOT_VISUAL]
        boxed = tuple(BoxedWord(token, chain, boxes[chain]) for token, chain in visual if chain in boxes)
        found.append(CaptionWords(boxed, len(visual) - len(boxed)))
    return found


def _file_name(image_id: str, split: PrecompSplit) -> str:
    """The stem of an image's files; an id is a name and leads nowhere else."""
    stem = next((image_id[: -len(suffix)] for suffix in PICTURES if image_id.lower().endswith(suffix)), image_id)
    if not stem or set(stem) & set("/\\:\0") or stem in (".", ".."):
        raise UserError(f"{split.folder}: {split.split}_ids.txt: the image id {image_id!r} is no name of a file")
    return stem
