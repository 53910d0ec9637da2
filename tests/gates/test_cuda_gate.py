"""Every CUDA file on every architecture it is built for: no spills, shared memory that fits, tensor cores in use.

A new .cu needs no line here: csrc/sources.json lists it, and where it uses dynamic shared memory shared_memory.py
beside this asks its plan how much. Kernels of a half-precision type that work without tensor cores by design are named
in sources.json with the reason (``without_tensor_cores``: part of the kernel's name -> why).
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

import sass
import shared_memory
from sass import Kernel

pytestmark = pytest.mark.skipif(sass.why_not() is not None, reason=str(sass.why_not()))

FILES = [name for name in sass.SOURCES["_C_cuda"] if name.endswith(".cu")]
BUILDS = [pytest.param(name, arch, id=f"{name}-sm_{arch}") for name in FILES for arch in sass.architectures(name)]
HALF = re.compile(r"half|bfloat16|bf16", re.IGNORECASE)


def capability(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def tensor_core_opcode(source: str, architecture: str) -> str:
    """HGMMA in files written for sm_90a alone, else what ``mma`` becomes; sm_100 has its own as well."""
    if "architectures" in sass.settings(source) and architecture == "90a":
        return r"HGMMA"
    return r"HMMA|UTC\w*MMA" if capability(architecture) in (100, 103) else r"HMMA"


def lacks_tensor_cores(kernel: Kernel, opcode: str) -> bool:
    """A half-precision kernel without one tensor-core instruction."""
    return bool(HALF.search(kernel.name)) and not any(re.match(opcode, name) for name in kernel.opcodes)


def touches_local_memory(kernel: Kernel) -> bool:
    return bool(kernel.stack or kernel.spilled) or any(re.match(r"(STL|LDL)\b", name) for name in kernel.opcodes)


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(request: pytest.FixtureRequest) -> None:
    """What the selected tests will ask for, a compiler a core; a failure is told by the test that it belongs to."""
    items = (item for item in request.session.items if item.module is request.module)
    mine = [item.callspec.params for item in items if hasattr(item, "callspec")]
    wanted = sorted({(params["source"], params["architecture"]) for params in mine if "source" in params})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for build in wanted:
            pool.submit(sass.kernels_of, sass.CSRC / build[0], build[1])


@pytest.mark.parametrize(("source", "architecture"), BUILDS)
def test_registers_hold_everything_and_shared_memory_fits(source: str, architecture: str) -> None:
    kernels = sass.kernels_of(sass.CSRC / source, architecture)
    assert kernels, "no kernel in it"
    spilling = [f"{k.name}: {k.stack} bytes of stack, {k.spilled} spilled" for k in kernels if touches_local_memory(k)]
    assert not spilling, "\n".join(spilling)
    limit = sass.SHARED_LIMIT[capability(architecture)] * 1024
    planned = shared_memory.asked_by(source, limit)
    for kernel in kernels:
        assert kernel.shared + planned <= limit, f"{kernel.name}: {kernel.shared} static bytes, {planned} planned"


@pytest.mark.parametrize(("source", "architecture"), BUILDS)
def test_the_compilers_warn_of_nothing(source: str, architecture: str) -> None:
    assert not sass.warnings_of(sass.CSRC / source, architecture)


@pytest.mark.parametrize(("source", "architecture"), BUILDS)
def test_half_precision_runs_on_tensor_cores(source: str, architecture: str) -> None:
    kernels = sass.kernels_of(sass.CSRC / source, architecture)
    excused = sass.settings(source).get("without_tensor_cores", {})
    without = [k.name for k in kernels if lacks_tensor_cores(k, tensor_core_opcode(source, architecture))]
    assert not [name for name in without if not any(part in name for part in excused)]
    for part, reason in excused.items():
        assert len(reason) > 10, f"{part}: no reason given"
        assert any(part in name for name in without), f"{part}: excused without need"


@pytest.fixture(scope="module")
def planted() -> dict[str, Kernel]:
    kernels = sass.kernels_of(sass.ROOT / "tests" / "gates" / "planted.cu", "80")
    return {word: k for k in kernels for word in ("on_the_stack", "on_tensor_cores", "plain") if word in k.name}


def test_the_gate_sees_local_memory(planted: dict[str, Kernel]) -> None:
    assert [word for word, kernel in planted.items() if touches_local_memory(kernel)] == ["on_the_stack"]
    assert planted["on_the_stack"].stack == 256
    assert any(name.startswith("LDL") for name in planted["on_the_stack"].opcodes)


def test_the_gate_sees_tensor_cores(planted: dict[str, Kernel]) -> None:
    assert [word for word, kernel in planted.items() if lacks_tensor_cores(kernel, "HMMA")] == ["plain"]
    assert lacks_tensor_cores(planted["on_tensor_cores"], "HGMMA")


def test_the_gate_sees_products_one_after_another() -> None:
    said = sass.warnings_of(sass.ROOT / "tests" / "gates" / "planted_products.cu", "90a")
    assert [line for line in said if "serialized" in line]


def test_the_gate_reads_registers_and_shared_memory(planted: dict[str, Kernel]) -> None:
    assert planted["on_tensor_cores"].shared == 32 * 6 * 4
    assert 8 <= planted["plain"].registers < planted["on_tensor_cores"].registers <= 64
