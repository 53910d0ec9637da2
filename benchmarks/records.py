"""The record of one measurement, and files of them."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Record:
    """One method in one phase of one case.

    Attributes
    ----------
    direction, dtype, method, backend
        ``dtype`` as in torch; ``backend`` says what ran the method: a floor, a compiler's mode, ``torch.mm``.
    phase
        ``"forward"`` or ``"forward+backward"``.
    I, C, R, N, D
        Images, captions, regions of an image, words of all captions, width.
    median_ms, p20_ms, p80_ms
        Time of a call over the rounds.
    flops, tflops
        What the op needs (padding not counted), and that over the median time, in 10^12 a second.
    eta
        On a GPU: time of the bare bfloat16 products / this time. None elsewhere.
    rho
        On a CPU: this time / time of the bare float32 products, whatever the dtype. None elsewhere.
    speedup_vs_loop
        Time of the reference loop in the same dtype / this time. None where the loop was not run. All three are
        medians of the ratios within rounds.
    saved_mib
        What autograd keeps for the backward, inputs with it. None for a forward without one, and for the bare product.
    peak_mib
        Most memory in use during a call beyond inputs, gradients and scores. None where not measured.
    device, torch, commit
        Where, with which torch, and the project's commit (``-dirty``: with changes).
    """

    op: str
    case: str
    direction: str
    dtype: str
    method: str
    backend: str
    phase: str
    I: int  # noqa: E741 - the project's letter for images
    C: int
    R: int
    N: int
    D: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    flops: int
    tflops: float
    eta: float | None
    rho: float | None
    speedup_vs_loop: float | None
    saved_mib: float | None
    peak_mib: float | None
    device: str
    torch: str
    commit: str


def write(records: Sequence[Record], path: Path) -> None:
    """A JSON list of records; the file is there whole or not at all."""
    check_writable(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        lines = ",\n".join(json.dumps(asdict(record)) for record in records)
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise ``OSError`` where :func:`write` could not; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def read(path: Path) -> list[Record]:
    """What :func:`write` wrote.

    Raises
    ------
    ValueError
        A file that is no list of records; the message names file, place and field.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must hold a list of records, got {type(entries).__name__}")
    names = {field.name for field in fields(Record)}
    records = []
    for number, entry in enumerate(entries):
        wrong = names.symmetric_difference(entry) if isinstance(entry, dict) else names
        if wrong:
            raise ValueError(f"{path}: record {number} lacks, or should not have: {', '.join(sorted(wrong))}")
        records.append(Record(**entry))
    return records
