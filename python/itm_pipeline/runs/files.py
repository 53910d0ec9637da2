"""Files that are either the old ones or the new ones, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, bring it to the disk, and rename it.

    Parameters
    ----------
    path
        Where the file ends up. Until the rename, an older file of this name stays as it was.
    write
        Called with the temporary path, in the same folder.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # some writers make files that nobody but their owner can read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Replace a JSON file."""
    replace_file(path, lambda temporary: _dump(temporary, values))


def _dump(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Where folders cannot be opened there is nothing to do."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
