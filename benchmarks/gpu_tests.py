"""pytest plugin of ``benchmarks/gpu.sh``: a session that ends in time, and one that goes on where it ended.

    pytest -p benchmarks.gpu_tests --deadline=SECONDS --passed=FILE

``FILE`` has the tests that passed; they do not run again. Exit code 75: the time was over before the tests were; 76:
some of those that ran failed as well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

LATE, FAILED_AND_LATE = 75, 76


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu.sh")
    group.addoption("--deadline", type=float, required=True, help="begin no test after so many seconds")
    group.addoption("--passed", type=Path, required=True, help="file of the tests that passed, and do not run again")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Session(config.getoption("deadline"), config.getoption("passed")))


class Session:
    def __init__(self, deadline: float, passed: Path) -> None:
        self._end = time.monotonic() + deadline
        self._passed = passed
        self._late = False

    @pytest.hookimpl(trylast=True)  # after the selection by marker
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = set(self._passed.read_text().splitlines()) if self._passed.exists() else set()
        before = [item for item in items if item.nodeid in known]
        if before:
            config.hook.pytest_deselected(items=before)
            items[:] = [item for item in items if item.nodeid not in known]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        yield
        if nextitem is not None and time.monotonic() >= self._end:
            self._late = True
            item.session.shouldstop = "the time is over; what passed does not run again"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            with self._passed.open("a") as passed:
                passed.write(f"{report.nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self._late:
            session.exitstatus = FAILED_AND_LATE if session.testsfailed else LATE
        elif exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._passed.exists():
            session.exitstatus = pytest.ExitCode.OK  # all of them passed before
