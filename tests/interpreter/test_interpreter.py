"""Runs the Triton kernels in Triton's interpreter, in a process of its own.

``TRITON_INTERPRET`` must be set before kernels are decorated and stays for the life of a process, where kernels could
then not be compiled. So the suite beside this is a child, and whatever it skips or does not find fails here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from itm_kernels import triton as floor

SUITES = sorted(Path(__file__).parent.glob("suite*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_the_interpreter_passes(suite: Path) -> None:
    if floor.load_error() is not None:
        pytest.skip(str(floor.load_error()))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        str(suite),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    last = child.stdout.strip().splitlines()[-1]
    assert re.match(r"\d+ passed", last), last
    assert "skipped" not in last
    assert "xfailed" not in last


def test_there_is_a_suite() -> None:
    assert SUITES
