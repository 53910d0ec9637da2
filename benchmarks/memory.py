"""Memory: what autograd keeps, and the most that is in use while a method runs.

On a GPU the allocator of torch is asked. On a CPU nothing else sees what the libraries below torch allocate, so the
system is: a fresh process loads the inputs, resets its high-water mark of resident memory (``/proc/self/clear_refs``,
Linux), runs the method once, and reads how far the mark rose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ops
from benchmarks.cases import Case
from benchmarks.contender import Contender

MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]
# Freed memory goes back to the system at once from this size on, so that what is resident is what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(256 * 2**10), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**10)}


def saved_bytes(graph: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``graph()``, its inputs with them; every storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held here, so that no other storage can take its address meanwhile.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass(frozen=True)
class Subject:
    """Which method on what; travels to another process as JSON."""

    op: str
    case: Case
    direction: str
    dtype: str  # as in torch
    method: str
    phase: str

    def contender(self, device: torch.device, case: Case | None = None) -> Contender:
        dtype = getattr(torch, self.dtype)
        workload = ops.load(self.op).workload(case or self.case, self.direction, dtype, device)
        found = workload.contender(self.method)
        if isinstance(found, str):
            raise RuntimeError(f"{self.method}: {found}")
        return found


def peak_bytes(subject: Subject, contender: Contender) -> int | None:
    """Most memory in use during one call beyond inputs, gradients and scores; None where the system cannot say.

    ``contender`` is the subject, ready here; on a CPU the other process makes its own.
    """
    if contender.device.type == "cuda":
        return _peak_on_gpu(contender, subject.phase)
    if not _can_reset_high_water_mark():
        return None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(subject)), str(torch.get_num_threads())],
        cwd=ROOT,
        env={**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"peak memory of {subject.method}, {subject.case.name}, {subject.phase}: {last}")
    return int(done.stdout.split()[-1])


def _peak_on_gpu(contender: Contender, phase: str) -> int:
    call = contender.calls[phase]
    call()  # the libraries' own workspaces stay; a compiler's work is over
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return max(torch.cuda.max_memory_allocated() - before - contender.owned_bytes[phase], 0)


def resident_rise(call: Callable[[], Any]) -> int:
    """How far resident memory rose above its present level while ``call`` ran, in bytes; Linux."""
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the high-water mark falls to what is resident now
    before = _status("VmRSS")
    result = call()
    rise = _status("VmHWM") - before
    del result
    return rise


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _can_reset_high_water_mark() -> bool:
    try:
        resident_rise(lambda: None)
    except (OSError, RuntimeError):
        return False
    return True


def _main(subject_json: str, threads: str) -> None:
    fields = json.loads(subject_json)
    subject = Subject(**{**fields, "case": Case(**fields["case"])})
    torch.set_num_threads(int(threads))
    device = torch.device("cpu")
    # Thread pools and libraries start on a small batch. Not on the batch itself: a library that keeps a buffer for
    # later would not be seen to allocate it.
    small = subject.contender(device, replace(subject.case, images=2, captions=2))
    small.calls[subject.phase]()
    contender = subject.contender(device)
    if subject.method.startswith("compile"):
        contender.calls[subject.phase]()  # the compiler's own memory is not the method's
    rise = resident_rise(contender.calls[subject.phase])
    print(max(rise - contender.owned_bytes[subject.phase], 0))


if __name__ == "__main__":
    _main(*sys.argv[1:])
