"""The log of a run: `log.jsonl`, one JSON object a line, and TensorBoard where it is installed.

Kinds of lines: `train` (step, epoch, loss, loss_per_caption, lr, seconds, images_per_s; a line sums up `--log-every`
steps, `loss` is their mean; with CCR or CCS also constraints, their mean, which `loss` does not hold), `eval` (step,
epoch, the metrics), `collapse` (step, message) and `resume` (step). Steps and epochs count from 1 and tell how many
were done.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


class ScalarWriter(Protocol):
    """What is used of TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Note a value."""

    def flush(self) -> None:
        """Bring what was noted to the disk."""

    def close(self) -> None:
        """Flush and end."""


class RunLog:
    """Appends to the log of a run.

    Parameters
    ----------
    run
        Run folder.
    size
        Bytes of `log.jsonl` that count. What follows was written after the checkpoint that the run goes on from, by a
        run that was then killed; its steps are run again, so these lines go.
    step
        Step of that checkpoint, from which TensorBoard drops what it holds.
    tensorboard
        Whether to write event files as well.
    """

    def __init__(self, run: Path, *, size: int, step: int, tensorboard: bool) -> None:
        path = run / "log.jsonl"
        self._file = path.open("a+b")
        if self._file.seek(0, os.SEEK_END) > size:
            self._file.truncate(size)
        self._scalars = _tensorboard(run, step) if tensorboard else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, kind: str, **values: Any) -> None:
        """Append one line, and its numbers to TensorBoard as `kind/name`."""
        self._file.write((json.dumps({"kind": kind, **values}) + "\n").encode("utf-8"))
        self._file.flush()
        if self._scalars is None or kind not in ("train", "eval"):
            return
        for name, value in values.items():
            if name not in ("step", "epoch", "seconds"):
                self._scalars.add_scalar(f"{kind}/{name}", value, values["step"])

    def size(self) -> int:
        """Bytes written so far, all of them on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._scalars is not None:
            self._scalars.flush()
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """End the log."""
        self._file.close()
        if self._scalars is not None:
            self._scalars.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log, in their order."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is a line cut short, or nothing


def _tensorboard(run: Path, step: int) -> ScalarWriter | None:
    """A writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer: ScalarWriter = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
    return writer
