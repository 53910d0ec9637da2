"""What a cubin holds: instructions and shared memory, by the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubin: bytes, folder: Path) -> str:
    """SASS of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([TOOLS / "nvdisasm", "-c", path], check=True, capture_output=True, text=True).stdout


def opcodes(sass: str) -> set[str]:
    """Names of the instructions, without their modifiers."""
    return set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, re.MULTILINE))
