"""What the launch arithmetic has to know of a GPU, by architecture or by asking the device."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

# Dynamic shared memory a block may ask for, in bytes (CUDA C++ programming guide, compute capabilities), and how many
# multiprocessors the architecture's common model has: plans without a device are made for that one.
_ARCHITECTURES = {
    80: (163, 108),  # A100
    86: (99, 84),
    87: (163, 16),
    89: (99, 142),
    90: (227, 132),  # H100, H200
    100: (227, 148),  # B200
    103: (227, 148),
    120: (99, 188),
}

_LEAST_KILOBYTES = 99  # what every architecture since sm_80 has


@dataclass(frozen=True)
class Machine:
    """A GPU as :func:`itm_kernels.plan` and the launches see it."""

    arch: str
    shared_limit: int
    multiprocessors: int


def machine_of_arch(arch: str) -> Machine:
    """``"sm_90a"`` and its like.

    Raises
    ------
    ValueError
        An architecture that is not listed.
    """
    found = re.fullmatch(r"sm_(\d+)[af]?", arch)
    if found is None or int(found[1]) not in _ARCHITECTURES:
        known = ", ".join(f"sm_{number}" for number in _ARCHITECTURES)
        raise ValueError(f"plan: arch must be one of {known} (with or without a suffix), got {arch!r}")
    kilobytes, multiprocessors = _ARCHITECTURES[int(found[1])]
    return Machine(arch, kilobytes * 1024, multiprocessors)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The GPU itself."""
    properties = torch.cuda.get_device_properties(device)
    number = properties.major * 10 + properties.minor
    kilobytes, _ = _ARCHITECTURES.get(number, (_LEAST_KILOBYTES, 0))
    return Machine(f"sm_{number}", kilobytes * 1024, properties.multi_processor_count)
