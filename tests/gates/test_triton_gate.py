"""Every Triton kernel compiles ahead of time for every architecture, and its machine code is what it should be.

No GPU is needed. Kernels are found, not listed: what a module of ``itm_kernels.triton.kernels`` launches must stand in
its ``AHEAD_OF_TIME``, with the types and constants of a real launch.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from itm_kernels import triton as floor

if floor.load_error() is not None:
    pytest.skip(str(floor.load_error()), allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source
from triton.runtime.jit import JITFunction

import triton_sass
from itm_kernels.triton import kernels
from itm_kernels.triton.ahead_of_time import Build
from itm_kernels.triton.configurations import table

if floor.interprets():
    pytest.skip("kernels are decorated for the interpreter", allow_module_level=True)

COMPILED = ("sm_80", "sm_90", "sm_100")
# Words that kernels are made of, inlined wherever they are called.
WITHOUT_LAUNCHES = {"words"}


def modules() -> list[ModuleType]:
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)} - WITHOUT_LAUNCHES
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in sorted(names)]


BUILDS: list[Build] = [build for module in modules() for build in module.AHEAD_OF_TIME]
CASES = [pytest.param(build, arch, id=f"{build.name}-{arch}") for arch in COMPILED for build in BUILDS]


@dataclass(frozen=True)
class Binary:
    """What the compiler made."""

    shared: int  # bytes
    opcodes: frozenset[str]
    ptx: str


def compiled(build: Build, arch: str, folder: Path) -> Binary:
    """One build for one architecture (Triton keeps what it compiled)."""
    launched = build.on(table(arch))
    made: Any = compile_source(
        ASTSource(launched.kernel, *launched.source()),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options={"num_warps": launched.num_warps, "num_stages": launched.num_stages},
    )
    sass = triton_sass.disassemble(made.asm["cubin"], folder)
    return Binary(made.metadata.shared, frozenset(triton_sass.opcodes(sass)), made.asm["ptx"])


def is_launched(module: ModuleType, function: JITFunction) -> bool:
    """Whether a function of a module is a kernel: no other function of ours calls it, and it is defined there."""
    if function.fn.__module__ != module.__name__:
        return False
    sources = [f.src for m in modules() for f in vars(m).values() if isinstance(f, JITFunction) and f is not function]
    return not any(re.search(rf"\b{function.__name__}\(", source.split("):", 1)[-1]) for source in sources)


def test_every_kernel_is_declared() -> None:
    for module in modules():
        found = {f.__name__ for f in vars(module).values() if isinstance(f, JITFunction) and is_launched(module, f)}
        assert found == {build.kernel.__name__ for build in module.AHEAD_OF_TIME}, module.__name__


def test_names_of_builds_differ() -> None:
    assert len({build.name for build in BUILDS}) == len(BUILDS)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "arch"), CASES)
def test_compiles_ahead_of_time(build: Build, arch: str, tmp_path: Path) -> None:
    """Shared memory within the limit, nothing spilled, products on the tensor cores that the architecture has."""
    binary = compiled(build, arch, tmp_path)
    assert binary.shared <= table(arch).shared_bytes
    spilled = binary.opcodes & {"STL", "LDL"}
    assert not spilled, f"spills: {sorted(spilled)}"
    if not build.tensor_cores:
        return
    widest = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[arch]
    assert widest in binary.opcodes, f"no {widest} in it"
    if arch == "sm_100":
        assert "tcgen05" in binary.ptx


@pytest.mark.slow
@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.split(".")[-1])
def test_sizes_of_one_compile(module: ModuleType, tmp_path: Path) -> None:
    """A launch turns an integer of 1 into a constant, which has other methods than a number of the device."""
    for build in {build.kernel: build for build in module.AHEAD_OF_TIME}.values():
        compiled(build.with_sizes_of_one(), "sm_90", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_86", "sm_120"])
def test_small_shared_memory_is_enough(arch: str, tmp_path: Path) -> None:
    """The largest float32 tiles of the architectures with 99 KB."""
    for build in BUILDS:
        if "fp32" in build.labels and build.tensor_cores:
            assert compiled(build, arch, tmp_path).shared <= table(arch).shared_bytes, build.name
