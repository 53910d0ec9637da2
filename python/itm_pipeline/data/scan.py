"""One look at every row of a feature file: is each number finite, and which rows repeat their predecessor?

A file is read in blocks of bounded memory. What was found in a large one is remembered in the user's cache folder (the
data folder may be read-only) together with the file's size and time of change: opening the same 10 GB again costs
nothing. The check comes before a run starts rather than when a batch reads a row, because a bad row must be told before
anything was trained or written, not hours later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from .npy import read_header

_BLOCK_BYTES = 32 * 2**20
# Smaller files are scanned again in a fraction of a second, and leave nothing behind in the cache folder.
_REMEMBERED_FROM_BYTES = 256 * 2**20
# A bar for files whose scan takes noticeable time; smaller ones stay silent.
_BAR_FROM_BYTES = 2 * 2**30
_FORMAT = 1


@dataclass(frozen=True)
class RowScan:
    """What one pass over the rows of a file found."""

    bad_row: int | None
    """First row with a NaN or an infinity; the rows behind it were not looked at."""
    repeat: int
    """Greatest n such that the rows ``k n .. k n + n - 1`` equal each other for every k; 1 when nothing repeats.

    Rows come in groups of m equal ones exactly when m divides this number. 0 when the scan stopped at a bad row.
    """


def scan_rows(path: Path) -> RowScan:
    """Scan the rows (first dimension) of the `.npy` file ``path``, or recall an earlier scan of it.

    The memory is one block of 32 MiB (two rows when that is larger), whatever the file's size.
    """
    status = path.stat()
    if status.st_size < _REMEMBERED_FROM_BYTES:
        return _scan(path)
    key = {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    # Without a usable cache folder every opening scans again: slower, and just as right.
    with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        remembered = json.loads(_memory_of(path).read_bytes())
        if remembered["key"] == key:
            return RowScan(**remembered["scan"])
    scan = _scan(path)
    with contextlib.suppress(OSError, RuntimeError):
        memory = _memory_of(path)
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"path": str(path.resolve()), "key": key, "scan": asdict(scan)}))
        temporary.replace(memory)
    return scan


def _memory_of(path: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache / "itm_pipeline" / "scans" / f"{name}.json"


def _scan(path: Path) -> RowScan:
    header = read_header(path)
    rows, width = header.shape[0], math.prod(header.shape[1:])
    row_bytes = width * header.dtype.itemsize
    rows_per_block = max(1, _BLOCK_BYTES // row_bytes)
    # One row more than a block: row 0 of the buffer carries the last row of the block before.
    buffer = np.empty((min(rows_per_block, rows) + 1, width), dtype=header.dtype)
    repeat = rows
    silent = True if rows * row_bytes < _BAR_FROM_BYTES else None
    with path.open("rb", buffering=0) as file, tqdm(total=rows, desc=f"checking {path.name}", disable=silent) as bar:
        file.seek(header.offset)
        for first in range(0, rows, rows_per_block):
            count = min(rows_per_block, rows - first)
            block = buffer[1 : count + 1]
            _read_into(file, block)
            if not _all_finite(block):
                bad = int(np.argmin(np.isfinite(block).all(axis=1)))
                return RowScan(bad_row=first + bad, repeat=0)
            repeat = _narrow(repeat, buffer[: count + 1], first)
            buffer[0] = buffer[count]
            bar.update(count)
    return RowScan(bad_row=None, repeat=repeat)


def _read_into(file: Any, block: npt.NDArray[Any]) -> None:
    view = block.data.cast("B")
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("the file became shorter while it was read")
        view = view[count:]


def _all_finite(block: npt.NDArray[Any]) -> bool:
    # NaN and the infinities survive into the maximum or the minimum, without a mask of the block's size.
    return bool(np.isfinite(block.max()) and np.isfinite(block.min()))


def _narrow(repeat: int, block: npt.NDArray[Any], first: int) -> int:
    """Greatest divisor of ``repeat`` that divides every row index at which a row differs from the one before.

    ``block`` holds the row before ``first`` (if there is one) and then the rows from ``first`` on.
    """
    for position in range(1 if first else 2, len(block)):
        if repeat == 1:
            break
        row = first + position - 1
        # A difference at a multiple of ``repeat`` tells nothing new.
        if row % repeat and not np.array_equal(block[position], block[position - 1]):
            repeat = math.gcd(repeat, row)
    return repeat
