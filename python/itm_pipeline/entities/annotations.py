"""The boxes of `Annotations/ID.xml`, read by defusedxml: no DTD, no entity, nothing from elsewhere is ever followed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
import numpy.typing as npt
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from itm_pipeline.entities.size import refuse_large
from itm_pipeline.errors import UserError

SIDES = ("xmin", "ymin", "xmax", "ymax")
_NUMBER = re.compile(r"-?[0-9]{1,7}(?:\.[0-9]{1,9})?")
_CHAIN = re.compile(r"[0-9]{1,18}")

Boxes = dict[str, npt.NDArray[np.float64]]
"""[n, 4] for each chain that has boxes: x1 y1 x2 y2 in pixels counted from 0."""


MOST_BOXES = 10_000
"""Boxes of a file, once for each chain that they belong to: an object with many names and boxes multiplies them."""


def read_boxes(path: Path) -> Boxes:
    """Boxes of every chain that has some; the file counts pixels from 1.

    An `<object>` with several names puts its box into each of these chains. One without a box (`scene`, `nobndbox`)
    says that there is none.

    Raises
    ------
    UserError
        The file is missing, too large, no well-formed XML, declares a DTD or an entity, or holds something else than
        annotations, or more than :data:`MOST_BOXES` boxes.
    """
    refuse_large(path)
    root = _parse(path)
    if root.tag != "annotation":
        raise UserError(f"{path}: starts with <{root.tag[:40]}>, annotations of Flickr30K Entities with <annotation>")
    found: dict[str, list[list[float]]] = {}
    count = 0
    # Direct children, no walk: what is nested a million deep is not visited.
    for number, entry in enumerate(root.findall("object"), start=1):
        where = f"{path} object {number}"
        names = [(name.text or "").strip() for name in entry.findall("name")]
        if not names or not all(_CHAIN.fullmatch(name) for name in names):
            raise UserError(f"{where}: must have names that are numbers of chains, got {[n[:20] for n in names]}")
        boxes = [_box(entry_box, where) for entry_box in entry.findall("bndbox")]
        named = list(dict.fromkeys(names))
        count += len(named) * len(boxes)
        if count > MOST_BOXES:
            raise UserError(
                f"{where}: puts more than {MOST_BOXES} boxes into chains, which no picture has; take a fresh copy"
            )
        for name in named:
            found.setdefault(name, []).extend(boxes)
    return {name: np.array(boxes, dtype=np.float64) for name, boxes in found.items() if boxes}


def _parse(path: Path) -> Any:
    try:
        return fromstring(path.read_bytes(), forbid_dtd=True, forbid_entities=True, forbid_external=True)
    except DefusedXmlException as error:
        raise UserError(
            f"{path}: declares a DTD or an entity ({type(error).__name__}), which annotations have no use for and "
            "attacks do; it was not read, take a fresh copy from a source that you trust"
        ) from None
    except (ParseError, ValueError, LookupError) as error:  # the latter two: an encoding that is wrong or unknown
        raise UserError(f"{path}: no well-formed XML ({error}); take a fresh copy") from None


def _box(entry: Any, where: str) -> list[float]:
    texts = [(entry.findtext(side) or "").strip() for side in SIDES]
    if not all(_NUMBER.fullmatch(text) for text in texts):
        shown = ", ".join(f"{side} {text[:20]!r}" for side, text in zip(SIDES, texts, strict=True))
        raise UserError(f"{where}: a box must have the numbers {', '.join(SIDES)}, got {shown}")
    x1, y1, x2, y2 = (float(text) - 1 for text in texts)
    if x2 < x1 or y2 < y1:
        raise UserError(f"{where}: a box must not end before it begins, got {', '.join(texts)}")
    return [x1, y1, x2, y2]
