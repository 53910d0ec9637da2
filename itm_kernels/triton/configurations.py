"""Launch configurations per architecture, from JSON: block sizes, warps and stages by shape bucket.

Files are read once and chosen by the architecture of the device, or the nearest older one; nothing is tuned on the
user's machine.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

import torch

INTERPRETED = "sm_80"
"""What tensors on the CPU, in Triton's interpreter, take."""


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched."""

    block_q: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Table:
    """The configurations of one architecture."""

    arch: str
    description: str
    shared_bytes: int  # of a block, the most
    programs: int  # that fill the machine a few times over
    buckets: dict[
        str, list[dict[str, int]]
    ]  # kernel -> {keys, element_bytes (at most); block_q, num_warps, num_stages}

    def find(self, kernel: str, keys: int, element_bytes: int) -> Configuration | None:
        """The first bucket of ``kernel`` that holds so many key columns of that element size, if one does."""
        for bucket in self.buckets[kernel]:
            if keys <= bucket["keys"] and element_bytes <= bucket["element_bytes"]:
                return Configuration(bucket["block_q"], bucket["num_warps"], bucket["num_stages"])
        return None

    def largest(self, kernel: str, element_bytes: int) -> int:
        """The most key columns that ``kernel`` holds."""
        held = [bucket["keys"] for bucket in self.buckets[kernel] if element_bytes <= bucket["element_bytes"]]
        if not held:
            raise ValueError(f"{self.arch}.json: {kernel} has no bucket for elements of {element_bytes} bytes")
        return max(held)


@functools.cache
def known() -> tuple[str, ...]:
    """Architectures with a file, oldest first."""
    folder = resources.files(__package__) / "configurations"
    names = [entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")]
    return tuple(sorted(names, key=_number))


@functools.cache
def table(arch: str) -> Table:
    """The table of ``arch`` (``"sm_90"``; a suffix as in ``sm_90a`` does not matter), or of the nearest older one."""
    older = [name for name in known() if _number(name) <= _number(arch)]
    name = older[-1] if older else known()[0]
    text = (resources.files(__package__) / "configurations" / f"{name}.json").read_text()
    values = json.loads(text)
    return Table(name, values["description"], values["shared_bytes"], values["programs"], values["kernels"])


def arch_of(device: torch.device) -> str:
    """Architecture of a device; the interpreter's for the CPU."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _number(arch: str) -> int:
    return int("".join(c for c in arch if c.isdigit()))
