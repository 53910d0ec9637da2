"""Where the native kernels run, and the reason where they do not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from itm_kernels.native import cuda_architectures, cuda_load_error, load_error
from itm_kernels.native.cuda.machine import Machine, machine_of

FLOAT64 = "the native kernels accumulate in float32; float64 runs on eager and reference"


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason the native kernels cannot run there, or None."""
    if dtype == torch.float64:
        return FLOAT64
    if device.type == "cpu":
        return load_error()
    if device.type != "cuda":
        return f"the native kernels run on CPUs and CUDA GPUs, not on {device.type}"
    reason = cuda_load_error()
    if reason is not None or not torch.cuda.is_available():
        return reason
    capability = torch.cuda.get_device_capability(device)
    built = cuda_architectures()
    if any(_runs(name, capability) for name in built):
        return None
    return f"the CUDA kernels were compiled for {', '.join(built)}, this GPU is {capability[0]}.{capability[1]}"


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture``, as torch writes it ("8.0", "9.0a", "10.0+PTX"), runs on a GPU."""
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if found is None:
        return False
    compiled = int(found[1]), int(found[2])
    if found[3]:  # an architecture-specific feature set knows no successor
        return compiled == capability
    return compiled <= capability and (compiled[0] == capability[0] or found[4] is not None)


@dataclass(frozen=True)
class Kernels:
    """The raw CUDA kernels, and the numbers of the GPU that they are launched on."""

    ops: Any
    machine: Machine


def kernels_for(device: torch.device) -> Kernels | None:
    """What the block loops of ``native.cuda`` need for tensors on ``device``; None: it is a CPU."""
    return None if device.type == "cpu" else Kernels(torch.ops.itm_kernels_native, machine_of(device))
