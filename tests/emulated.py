"""CUDA kernels on the CPU: builds the ``.cu`` files with g++ against the emulator and loads them as ops."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from includes import contents
from itm_kernels.native.cuda.machine import Machine

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests" / "emulation"
CACHE = ROOT / "build" / "emulated"
GPU = Machine("sm_90", 227 * 1024, multiprocessors=2)
"""Few multiprocessors, so that small batches are split among them as large ones are on a real GPU."""
TORCH_TARGET = "0x020b000000000000"


def why_not() -> str | None:
    """The reason CUDA kernels cannot be emulated here, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator switches stacks in x86-64 assembly, this is {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++"
    return None


@functools.cache
def library() -> Any:
    """``torch.ops.itm_kernels_emulated``: the schemas of ``csrc/library.cpp`` with the CUDA kernels, on CPU tensors."""
    listed = json.loads((CSRC / "sources.json").read_text())
    settings = listed["cuda"]["files"]
    kernels = [name for name in listed["_C_cuda"] if name.endswith(".cu")]
    emulated = [name for name in kernels if settings.get(name, {}).get("emulated", True)]
    torch.ops.load_library(build("kernels", [CSRC / "library.cpp", *(CSRC / name for name in emulated)]))
    return torch.ops.itm_kernels_emulated


def build(name: str, sources: list[Path]) -> Path:
    """A library of those sources and the emulator; compiles what has changed since it was last built."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes: workers of pytest take turns
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count()) as pool:
            objects = list(pool.map(_compile, [*sources, *sorted(EMULATOR.glob("*.cpp"))]))
        digest = hashlib.sha256("".join(str(path) for path in objects).encode()).hexdigest()[:16]
        target = CACHE / f"{name}-{digest}.so"
        if not target.exists():
            where = [f"-L{path}" for path in library_paths()]
            _run(target, ["-shared", *map(str, objects), *where, "-lc10", "-ltorch", "-ltorch_cpu"])
    return target


def _flags() -> list[str]:
    # GPUs fuse multiplication and addition; so do we where the processor can, and half precision converts faster.
    modern = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    flags += ["-Wno-unknown-pragmas", "-fno-math-errno", "-fsanitize=alignment,bounds"]
    flags += ["-march=x86-64-v3"] if modern else []
    flags += ["-DITM_EMULATED", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{EMULATOR}", f"-I{CSRC}"]
    return [*flags, *(f"-isystem{path}" for path in include_paths())]


def _compile(source: Path) -> Path:
    flags = _flags()
    key = hashlib.sha256(contents(source, (EMULATOR, CSRC)) + " ".join([*flags, torch.__version__]).encode())
    target = CACHE / f"{source.stem}-{key.hexdigest()[:16]}.o"
    if not target.exists():
        _run(target, [*flags, "-c", "-x", "c++", str(source)])
    return target


def _run(target: Path, arguments: list[str]) -> None:
    """g++ into a file that appears only when it is complete."""
    partial = target.with_suffix(".partial")
    done = subprocess.run(["g++", *arguments, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"g++ failed for {target.name}:\n{done.stderr[-8000:]}")
    partial.rename(target)
