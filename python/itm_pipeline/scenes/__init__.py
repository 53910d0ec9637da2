"""Drawn scenes: pictures, captions, region features and word-to-box links, all made by the program.

`make_scenes` is the way in. The files speak for themselves: `world` says what a scene is, `draw` turns it into pixels,
`grammar` into captions, `proposals` and `features` into regions, `entities` and `build` into files.
"""

from __future__ import annotations

from itm_pipeline.scenes.build import make_scenes

__all__ = ["make_scenes"]
