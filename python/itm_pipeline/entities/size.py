"""How large a file of one image may be."""

from __future__ import annotations

from pathlib import Path

from itm_pipeline.errors import UserError

MOST_BYTES = 2**20
"""Five captions and their boxes take a few kilobytes; nobody shall fill the memory with what only has their name."""


def refuse_large(path: Path) -> None:
    """Refuse what is no file of at most 1 MiB."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file; give the folder that holds Sentences/ and Annotations/ of the images of this split"
        )
    if not path.is_file():
        raise UserError(f"{path}: is not a file")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise UserError(
            f"{path}: has {size:,} bytes, more than the {MOST_BYTES:,} that captions or boxes of one image take"
        )
