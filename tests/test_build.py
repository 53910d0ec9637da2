"""setup.py: what is asked for is built or refused with the reason, and the choice is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

pytest.importorskip("pybind11", reason="the build needs pybind11")


def setup(**variables: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as its decisions; nothing is compiled."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ITM_", "CUDA_", "TORCH_"))}
    command = [sys.executable, str(ROOT / "setup.py"), "--quiet", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)


def test_it_says_what_it_builds() -> None:
    printed = setup(ITM_CUDA="0")
    assert printed.returncode == 0
    assert "building the CPU kernels and the host module" in printed.stdout
    assert "no CUDA kernels: ITM_CUDA=0" in printed.stdout


def test_pure_python_builds_nothing() -> None:
    printed = setup(ITM_NATIVE="0")
    assert printed.returncode == 0
    assert "pure Python" in printed.stdout
    assert "building" not in printed.stdout


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"ITM_CUDA": "yes"}, "ITM_CUDA must be 0 or 1, got 'yes'"),
        ({"ITM_CUDA": "1", "ITM_NATIVE": "0"}, "ITM_CUDA=1 demands CUDA kernels, but ITM_NATIVE=0"),
        ({"ITM_CUDA": "1", "CUDA_HOME": str(ROOT / "tests")}, "ITM_CUDA=1 demands CUDA kernels, but "),
    ],
)
def test_what_cannot_be_met_is_an_error(variables: dict[str, str], reason: str) -> None:
    refused = setup(**variables)
    assert refused.returncode != 0
    assert reason in refused.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_a_torch_without_cuda_is_named_as_the_reason() -> None:
    reason = f"this torch ({torch.__version__}) is a build without CUDA"
    assert f"no CUDA kernels: {reason}" in setup().stdout
    assert reason in setup(ITM_CUDA="1").stderr
