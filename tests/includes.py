"""Which of our files a C++ or CUDA source is made of: what a cached build depends on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def files_of(source: Path, folders: Iterable[Path] = ()) -> list[Path]:
    """The source, and every header it reaches by ``#include "..."``: beside the includer, or in one of the folders."""
    found: dict[Path, None] = {source.resolve(): None}
    waiting = [*found]
    while waiting:
        path = waiting.pop()
        for name in INCLUDE.findall(path.read_text()):
            places = [folder / name for folder in (path.parent, *folders) if (folder / name).is_file()]
            header = places[0].resolve() if places else None
            if header is not None and header not in found:
                found[header] = None
                waiting.append(header)
    return sorted(found)


def contents(source: Path, folders: Iterable[Path] = ()) -> bytes:
    """Names and contents of all of them."""
    return b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files_of(source, folders))
