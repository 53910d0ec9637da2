"""The links from words to boxes, in the layout of Flickr30K Entities.

`Sentences/ID.txt` has one caption a line with its phrases marked `[/EN#chain/type words]`; `Annotations/ID.xml` has the
boxes of every chain, in pixels counted from 1, both ends inside the box. A phrase that means several things is a chain
of its own with several boxes. Chain 0 is not visual, the chain of the background has no box and is marked as scene.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from itm_pipeline.scenes.grammar import Caption, Mention

Chains = dict[tuple[str, tuple[int, ...]], int]
"""Number of every chain of a picture, by the kind and the things of the phrases that it joins."""


def number_chains(captions: Iterable[Caption]) -> Chains:
    """Chain numbers from 1 in order of first mention; what is not visual gets 0."""
    chains: Chains = {}
    for caption in captions:
        for piece in caption:
            if isinstance(piece, Mention) and piece.kind != "notvisual":
                chains.setdefault((piece.kind, piece.things), len(chains) + 1)
    return chains


def marked(caption: Caption, chains: Chains) -> str:
    """A caption as `Sentences/` has it: `[/EN#1/other a red circle] left of [/EN#2/other two stars]`."""
    words = []
    for piece in caption:
        if isinstance(piece, str):
            words.append(piece)
        else:
            words.append(f"[/EN#{chains.get((piece.kind, piece.things), 0)}/{piece.kind} {piece.text}]")
    return " ".join(words)


def annotation(image_id: str, size: tuple[int, int], chains: Chains, boxes: NDArray[np.int64]) -> str:
    """The text of `Annotations/ID.xml`.

    Parameters
    ----------
    image_id
        Stem of the picture's file name.
    size
        Height and width in pixels.
    chains
        From `number_chains`.
    boxes
        int64 [things, 4], x1 y1 x2 y2 in 0-based pixels; written 1-based.
    """
    objects = []
    for (kind, things), number in chains.items():
        if kind == "scene":
            objects.append(f"<object><name>{number}</name><scene>1</scene><nobndbox>0</nobndbox></object>")
        for thing in things:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), boxes[thing] + 1, strict=True)
            box = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
            objects.append(f"<object><name>{number}</name><bndbox>{box}</bndbox></object>")
    height, width = size
    name = f"<filename>{image_id}.png</filename>"
    shape = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return "\n".join(["<annotation>", name, shape, *objects, "</annotation>", ""])
