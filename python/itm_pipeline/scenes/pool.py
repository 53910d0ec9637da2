"""The processes that draw: how many, how they start, and that none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from itm_pipeline.errors import UserError

WORTH_A_PROCESS = 50
"""Starting a process costs as much time as drawing about so many pictures."""


def processes_for(pictures: int, asked: int | None) -> int:
    """How many processes to draw so many pictures with: what was asked for, or one per core but for small sets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, pictures // WORTH_A_PROCESS)) if asked is None else asked


def _live_and_die_with_parent() -> None:
    """Leave Ctrl-C to the parent, which ends its processes in order, and end with a parent that was killed.

    A process of a pool waits for work on a pipe whose other end it holds open itself: it would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def drawing_pool(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes to draw with; None for one, which is this one.

    They are spawned, not forked: a fork of a program that runs the threads of torch may hang.
    """
    if processes == 1:
        yield None
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_live_and_die_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "scenes: a process that draws pictures died; a script that makes scenes needs "
            "`if __name__ == '__main__':` around its own work (or processes=1), and memory for every process"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
