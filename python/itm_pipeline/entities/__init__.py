"""Flickr30K Entities: which words of a caption mean which boxes of its picture (Plummer et al., ICCV 2015).

`read_words` is the way in. `sentences` reads the marked captions, `annotations` the boxes, `alignment` finds the
model's own words in them, `boxes` says how much two boxes overlap. Files of strangers: every fault of theirs is one
`UserError`.
"""

from __future__ import annotations

from itm_pipeline.entities.boxes import overlaps
from itm_pipeline.entities.words import BoxedWord, CaptionWords, read_words

__all__ = ["BoxedWord", "CaptionWords", "overlaps", "read_words"]
