"""python -m itm_kernels.info: every hole has a reason."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import itm_kernels
from itm_kernels import info


def test_every_op_floor_device_has_a_row_and_every_hole_a_reason() -> None:
    rows = info.table()
    assert {row[0] for row in rows} == set(info.ops()) >= {"cross_attention_scores"}
    assert {row[1] for row in rows} == {"reference", "eager", "native", "triton"}
    for op, floor, device, dtype, reason in rows:
        if reason is None:
            assert device == "cpu" or torch.cuda.is_available()
        else:
            assert len(reason) > 10, (op, floor, device, dtype)


def test_what_it_says_runs_does_run() -> None:
    regions, words = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    for op, floor, device, dtype, reason in info.table():
        if op != "cross_attention_scores" or device != "cpu":
            continue
        inputs = [t.to(getattr(torch, dtype)) for t in (regions, words)]
        if reason is None:
            assert itm_kernels.cross_attention_scores(*inputs, [4, 2], backend=floor).isfinite().all()
        else:
            with pytest.raises(RuntimeError) as refused:
                itm_kernels.cross_attention_scores(*inputs, [4, 2], backend=floor)
            assert reason in str(refused.value)


def test_command_prints_versions_and_table() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "itm_kernels.info"], capture_output=True, text=True, check=True
    ).stdout
    assert itm_kernels.__version__ in printed
    assert torch.__version__ in printed
    assert "cross_attention_scores" in printed
