"""What training shows: a bar while the terminal can show one, and a line per epoch."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Display:
    """A bar over the batches of an epoch, silent where stderr is no terminal, and lines on stdout.

    Parameters
    ----------
    epochs
        Epochs of the run.
    batches
        Batches of an epoch.
    """

    def __init__(self, epochs: int, batches: int) -> None:
        self.epochs = epochs
        self.batches = batches
        self.rsum: float | None = None
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_epoch()

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Open the bar of an epoch, counted from 0, at a batch."""
        self._bar = tqdm(
            total=self.batches,
            initial=batch,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def step(self) -> None:
        """One batch is done."""
        if self._bar is not None:
            self._bar.update()

    def numbers(self, loss: float, images_per_s: float) -> None:
        """Show the latest loss and speed."""
        if self._bar is not None:
            rsum = "-" if self.rsum is None else f"{self.rsum:.1f}"
            self._bar.set_postfix_str(f"loss {loss:.3f}, rsum {rsum}, {images_per_s:.0f} images/s", refresh=False)

    def end_epoch(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        """A line on stdout that does not tear the bar."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def warn(self, line: str) -> None:
        """A line on stderr that does not tear the bar."""
        tqdm.write(f"itm: {line}", file=sys.stderr)
        sys.stderr.flush()
