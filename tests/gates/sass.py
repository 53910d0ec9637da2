"""What nvcc makes of the CUDA sources, without a GPU: registers, spills, stack, shared memory and instructions."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from includes import contents

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "gates"
SOURCES = json.loads((CSRC / "sources.json").read_text())
FLAGS = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC / 'cuda'}"]

# Shared memory that one block may have, by compute capability (CUDA programming guide, "Technical Specifications").
SHARED_LIMIT = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Kernel:
    """One kernel in one cubin."""

    name: str  # demangled where there is c++filt
    registers: int
    stack: int  # bytes a thread
    spilled: int  # bytes a thread, stores and loads
    shared: int  # static bytes
    opcodes: frozenset[str]  # names of its instructions with modifiers: HMMA.16816.F32


def nvcc() -> str | None:
    """The compiler, as setup.py finds it."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")


def disassembler() -> str | None:
    """nvdisasm: of the toolkit, or the one that comes with Triton (a toolkit may lack it)."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends" / "nvidia" / "bin"] if triton and triton.origin else []
    return shutil.which("nvdisasm", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def why_not() -> str | None:
    """The reason nothing can be said here, or None. In CI a compiler without a disassembler is no reason, but a gap."""
    if nvcc() is None:
        return "there is no nvcc"
    if disassembler() is None and not os.environ.get("CI"):
        return "there is no nvdisasm: Triton's wheel has one (pip install triton)"
    return None


def number(architecture: str) -> str:
    """``10.0+PTX`` -> ``100``, ``9.0a`` -> ``90a``"""
    return architecture.removesuffix("+PTX").replace(".", "")


def settings(source: str) -> dict:
    """What sources.json says about one file."""
    return SOURCES["cuda"]["files"].get(source, {})


def architectures(source: str) -> list[str]:
    """Those that a file names, or the default ones."""
    return [number(name) for name in settings(source).get("architectures", SOURCES["cuda"]["architectures"])]


def kernels_of(path: Path, architecture: str) -> list[Kernel]:
    """Compile (or take from the cache) and read every kernel of a file."""
    log, sass = _compiled(path, architecture)
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-{20}|\Z)", sass, re.MULTILINE | re.DOTALL))
    found = [_kernel(match, bodies) for match in re.finditer(_REPORT, log)]
    return sorted(found, key=lambda kernel: kernel.name)


def warnings_of(path: Path, architecture: str) -> list[str]:
    """What the compilers warn of in a file: among it products that ptxas runs one after another (C7508, C7510)."""
    log, _ = _compiled(path, architecture)
    return [line for line in log.splitlines() if re.search(r"warning|\(C\d{4}\)", line)]


_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for .*\n.*\n\s*(?P<stack>\d+) bytes stack frame, "
    r"(?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def _kernel(report: re.Match[str], bodies: dict[str, str]) -> Kernel:
    shared = re.search(r"(\d+) bytes smem", report["rest"])
    return Kernel(
        name=_demangled(report["name"]),
        registers=int(report["registers"]),
        stack=int(report["stack"]),
        spilled=int(report["stored"]) + int(report["loaded"]),
        shared=int(shared[1]) if shared else 0,
        opcodes=frozenset(_INSTRUCTION.findall(bodies[report["name"]])),
    )


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt")
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip() if tool else name


def _compiled(path: Path, architecture: str) -> tuple[str, str]:
    """ptxas' report and the disassembly."""
    compiler, tool = nvcc(), disassembler()
    assert compiler is not None
    assert tool is not None, "there is nvcc but no nvdisasm: install triton, whose wheel has one"
    command = [compiler, *SOURCES["cuda"]["flags"], *FLAGS, *(f"-isystem={folder}" for folder in include_paths())]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_of = "\0".join([*command, version, torch.__version__]).encode()
    digest = hashlib.sha256(contents(path, (CSRC / "cuda",)) + made_of).hexdigest()
    CACHE.mkdir(parents=True, exist_ok=True)
    stem = CACHE / f"{path.stem}-{architecture}-{digest[:16]}"
    report, listing = stem.with_suffix(".log"), stem.with_suffix(".sass")
    if not listing.exists():
        # Names of their own until complete: another worker may be at the same file.
        cubin = stem.with_suffix(f".{os.getpid()}.cubin")
        done = subprocess.run([*command, str(path), "-o", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, f"nvcc failed for {path.name}, sm_{architecture}:\n{done.stderr[-6000:]}"
        said = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        cubin.unlink()
        for target, text in ((report, done.stderr), (listing, said)):
            partial = target.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(text)
            partial.rename(target)
    return report.read_text(), listing.read_text()
