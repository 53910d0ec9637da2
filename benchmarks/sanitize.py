"""Every kernel of ours once on small ragged batches, for `compute-sanitizer` to watch: `benchmarks/gpu.sh sanitize`.

    python -m benchmarks.sanitize [--device cuda]

Forward and backward, every op, direction and dtype. Results are held against the definition as well.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import ops
from benchmarks.cases import Case
from benchmarks.contender import PHASES
from benchmarks.parity import assert_parity

KERNELS = ("native", "triton")
"""The floors with kernels of ours; the others are made of torch's."""
# Odd sizes on every axis; then whole tiles with a remainder of regions.
CASES = (Case("odd", 3, 5, 7, 40), Case("tiles", 9, 8, 36, 128))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(args: Sequence[str] | None = None) -> int:
    """Exit code 1 where a kernel is wrong, or none ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args(args).device)
    ran = 0
    reasons: dict[str, None] = {}
    for op in ops.OPS:
        for direction in ops.load(op).DIRECTIONS:
            for case in CASES:
                for dtype in DTYPES:
                    workload = ops.load(op).workload(case, direction, dtype, device)
                    for floor in KERNELS:
                        contender = workload.contender(floor)
                        if isinstance(contender, str):
                            reasons[f"{op}, {floor}: {contender}"] = None
                            continue
                        for phase in PHASES:
                            who = f"{op} {case.name} {direction} {dtype} {floor} {phase}"
                            assert_parity(who, contender.calls[phase](), workload.truth(), workload.tolerance)
                            ran += 1
    for reason in reasons:
        print(f"left out: {reason}")
    print(f"{ran} calls, all right")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
