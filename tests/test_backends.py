"""Which floor runs: the automatic order, forcing, and reasons."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import pytest
import torch

from itm_kernels import backends, cross_attention_scores, native, use_backend, why_not
from itm_kernels.backends import AUTO, FLOORS, ORDER, check_backend, pick, requested

OP = "cross_attention_scores"
CPU = torch.device("cpu")


def name_of(floor: ModuleType) -> str:
    return floor.__name__.split(".")[-2]


def test_the_order_on_the_cpu() -> None:
    first = "eager" if native.load_error() else "native"
    assert name_of(pick(OP, CPU, torch.float32, AUTO)) == first
    # float64 falls through to eager, never to the definition.
    assert name_of(pick(OP, CPU, torch.float64, AUTO)) == "eager"


def test_the_orders_name_floors() -> None:
    assert ORDER["cpu"] == ("native", "eager")
    assert ORDER["cuda"] == ("native", "triton", "eager")
    assert {floor for order in ORDER.values() for floor in order} < set(FLOORS)


def test_an_unlisted_device_runs_on_eager() -> None:
    assert name_of(pick(OP, torch.device("meta"), torch.float32, AUTO)) == "eager"


@pytest.mark.parametrize("floor", ["reference", "eager", "native"])
def test_a_floor_that_is_asked_for_is_the_one(floor: str) -> None:
    if why_not(floor, OP, "cpu", torch.float32):
        pytest.skip(str(why_not(floor, OP, "cpu", torch.float32)))
    assert name_of(pick(OP, CPU, torch.float32, floor)) == floor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("floor", FLOORS)
def test_why_not_is_none_or_one_sentence(floor: str, device: str, dtype: torch.dtype) -> None:
    reason = why_not(floor, OP, device, dtype)
    if floor in ("reference", "eager"):
        assert reason is None
    if floor == "native" and (device != "cpu" or dtype == torch.float64):
        assert reason is not None
    assert reason is None or (len(reason) > 20 and "\n" not in reason and not reason.endswith("."))


def test_why_not_an_op_that_no_floor_has() -> None:
    assert why_not("eager", "teleport", "cpu", torch.float32) == "teleport has no eager kernels in this version"


def test_a_pure_python_install_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    native.load_error.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", missing)
    try:
        reason = native.load_error()
        assert reason is not None
        assert "not built" in reason
        assert "pip install" in reason
        with pytest.raises(RuntimeError, match="not built"):
            native.host()
        monkeypatch.undo()  # the cached reason stays: pick must fall through by it
        assert name_of(pick(OP, CPU, torch.float32, AUTO)) == "eager"
        with pytest.raises(RuntimeError, match="not built"):
            cross_attention_scores(torch.ones(1, 1, 1), torch.ones(1, 1, 1), [1], backend="native")
    finally:
        native.load_error.cache_clear()


def test_a_library_that_does_not_load_says_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: aoti_torch_whatever")

    native.load_error.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", broken)
    try:
        assert "undefined symbol: aoti_torch_whatever" in str(native.load_error())
    finally:
        native.load_error.cache_clear()


def test_falling_through_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_told", set())
    with caplog.at_level(logging.INFO, logger="itm_kernels"):
        for _ in range(3):
            pick(OP, CPU, torch.float64, AUTO)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"{OP}: not on native for cpu torch.float64: ")


def test_nothing_is_logged_where_the_first_choice_runs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.load_error():
        pytest.skip(str(native.load_error()))
    monkeypatch.setattr(backends, "_told", set())
    with caplog.at_level(logging.INFO, logger="itm_kernels"):
        pick(OP, CPU, torch.float32, AUTO)
    assert not caplog.records


def test_no_floor_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not", lambda *args: "it is Sunday")
    with pytest.raises(RuntimeError, match=rf"^{OP}: no backend runs on cpu with torch.float32$"):
        pick(OP, CPU, torch.float32, AUTO)


def test_use_backend_sets_and_restores() -> None:
    assert requested(None) == AUTO
    with use_backend("eager"):
        assert requested(None) == "eager"
        with use_backend("reference"):
            assert requested(None) == "reference"
            assert requested("native") == "native"  # a call's own argument goes first
        assert requested(None) == "eager"
    assert requested(None) == AUTO


def test_use_backend_restores_after_an_error() -> None:
    def fail() -> None:
        with use_backend("eager"):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert requested(None) == AUTO


def enter(name: Any) -> None:
    with use_backend(name):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", ["cuda", "", "Native", "auto"])
def test_use_backend_refuses_what_is_no_floor(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^use_backend: backend must be one of reference, eager, native, triton, got {name!r}$"
    ):
        enter(name)
    assert requested(None) == AUTO


def test_check_backend_takes_none_for_automatic() -> None:
    check_backend("op", None)
    with pytest.raises(ValueError, match=r"^op: backend must be one of .+, got 'gpu'$"):
        check_backend("op", "gpu")


def test_a_floor_without_modules_raises_inside_the_block() -> None:
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' cannot run on cpu"):
        cross_attention_scores(torch.ones(1, 1, 1), torch.ones(1, 1, 1), [1])


@pytest.mark.parametrize("floor", ["reference", "eager", "native"])
def test_the_floor_asked_for_is_the_floor_that_runs(floor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not(floor, OP, "cpu", torch.float32):
        pytest.skip(str(why_not(floor, OP, "cpu", torch.float32)))
    ran: list[str] = []
    for other in ("reference", "eager", "native"):
        module = pick(OP, CPU, torch.float32, other)

        def watched(*args: Any, _name: str = other, _run: Any = module.forward, **options: Any) -> Any:
            ran.append(_name)
            return _run(*args, **options)

        monkeypatch.setattr(module, "forward", watched)
    inputs = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), [3, 1])
    cross_attention_scores(*inputs, backend=floor)
    with use_backend(floor):
        cross_attention_scores(*inputs)
    assert ran == [floor, floor]
