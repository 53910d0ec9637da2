"""Places (floor x device) that tests run in, and fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Before torch loads its OpenMP: tests are many small parallel regions, and threads that spin between them cost ten
# times the work where the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from hypothesis import HealthCheck, settings

import emulated
from helpers import Place
from itm_kernels.native import devices
from itm_kernels.native.devices import Kernels

# Derandomised: a failure in CI is the same failure at home. No deadline: machines are shared.
settings.register_profile("house", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

DEVICES = ("cpu", "cuda")


def places(floors: tuple[str, ...]) -> list[Any]:
    """Fixture parameters: those floors on every device, a GPU marked, and CUDA kernels emulated."""
    found = [Place(floor, device) for device in DEVICES for floor in floors]
    found += [Place("native", emulated=True)] if "native" in floors else []
    return [
        pytest.param(place, id=str(place), marks=[pytest.mark.gpu] if place.device == "cuda" else []) for place in found
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU: there is no CUDA device here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _place(request: pytest.FixtureRequest, dtype: torch.dtype) -> Place:
    place: Place = request.param
    reason = place.why_not(request.module.OP, dtype)
    if reason is not None:
        pytest.skip(f"{place}: {reason}")
    if place.emulated:
        kernels = Kernels(emulated.library(), emulated.GPU)
        request.getfixturevalue("monkeypatch").setattr(devices, "kernels_for", lambda device: kernels)
    return place


@pytest.fixture(params=places(("reference", "eager", "native", "triton")))
def place(request: pytest.FixtureRequest) -> Place:
    """Every floor and device that runs the test module's ``OP`` in float32."""
    return _place(request, torch.float32)


@pytest.fixture(params=places(("eager", "native", "triton")))
def fast_place(request: pytest.FixtureRequest) -> Place:
    """The same without the slow definition: floors that work in blocks."""
    return _place(request, torch.float32)


@pytest.fixture(params=places(("reference", "eager")))
def place64(request: pytest.FixtureRequest) -> Place:
    """Every floor and device that runs the test module's ``OP`` in float64."""
    return _place(request, torch.float64)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh tensor with NaN, those of C++ too: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code from, or for, another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
