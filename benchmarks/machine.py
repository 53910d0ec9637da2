"""Where a number was measured: device, threads, versions."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")
"""Processor flags (Linux) with which a bfloat16 product is faster than a float32 one."""


def model_name(device: torch.device) -> str:
    """As the maker calls it, e.g. ``NVIDIA H200`` or ``AMD EPYC``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """The record's ``device``: model and what decides as much: a CPU's threads, how a GPU multiplies float32."""
    if device.type == "cuda":
        return f"{model_name(device)}, TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}"
    threads = torch.get_num_threads()
    return f"{model_name(device)}, {threads} thread{'s' if threads != 1 else ''}"


def slug(device: torch.device) -> str:
    """The model's name as a folder: ``h200``, ``amd-epyc``."""
    name = model_name(device).lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or device.type


def has_fast_bfloat16() -> bool:
    return any(flag in _cpuinfo("flags").split() for flag in FAST_BFLOAT16)


@functools.cache
def commit() -> str:
    """The checkout's commit, with ``-dirty`` where files differ from it; ``unknown`` outside a checkout.

    ``ITM_COMMIT`` says it for a copy of the tree that has no history with it.
    """
    given = os.environ.get("ITM_COMMIT")
    if given:
        return given
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on the device now; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
