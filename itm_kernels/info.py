"""``python -m itm_kernels.info``: versions, build, and which op runs on which floor and device."""

from __future__ import annotations

import importlib
import pkgutil
import platform

import numpy
import torch

import itm_kernels
from itm_kernels import native, reference
from itm_kernels.backends import FLOORS, why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DEVICES = ("cpu", "cuda")


def ops() -> list[str]:
    """Every op with floors: each has a definition, so ``reference`` lists them, beside what they share."""
    names = sorted(module.name for module in pkgutil.iter_modules(reference.__path__))
    return [name for name in names if hasattr(importlib.import_module(f"{reference.__name__}.{name}"), "why_not")]


def versions() -> dict[str, str]:
    """Versions and build facts, printable."""
    facts = {
        "itm_kernels": itm_kernels.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    reason = native.load_error()
    if reason is None:
        build = native.host().build_information()
        facts["native"] = f"{build['compiler']}, for torch >= {build['torch_target']}"
        facts["cpu capability"] = native.host().cpu_capability()
    else:
        facts["native"] = f"no: {reason}"
    facts["cuda kernels"] = " ".join(native.cuda_architectures()) or f"no: {native.cuda_load_error()}"
    facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    return facts


def table() -> list[tuple[str, str, str, str, str | None]]:
    """Rows ``(op, floor, device, dtype, reason)``; reason None: it runs."""
    rows = []
    for op in ops():
        for floor in FLOORS:
            for device in DEVICES:
                for dtype in DTYPES:
                    reason = why_not(floor, op, device, dtype)
                    if reason is None and device == "cuda" and not torch.cuda.is_available():
                        reason = "there is no CUDA device here"
                    rows.append((op, floor, device, str(dtype).removeprefix("torch."), reason))
    return rows


def main() -> None:
    """Print it all."""
    for name, value in versions().items():
        print(f"{name:15s} {value}")
    rows = table()
    print()
    print(f"{'op':24s} {'floor':10s} {'device':7s} " + " ".join(f"{str(d).removeprefix('torch.'):9s}" for d in DTYPES))
    reasons: dict[str, int] = {}
    for start in range(0, len(rows), len(DTYPES)):
        op, floor, device = rows[start][:3]
        cells = []
        for row in rows[start : start + len(DTYPES)]:
            reason = row[4]
            cells.append("yes" if reason is None else f"({reasons.setdefault(reason, len(reasons) + 1)})")
        print(f"{op:24s} {floor:10s} {device:7s} " + " ".join(f"{cell:9s}" for cell in cells))
    print("\ntriplet_loss and contrastive_loss are torch ops and run wherever torch does.")
    for reason, number in reasons.items():
        print(f"({number}) {reason}")


if __name__ == "__main__":
    main()
