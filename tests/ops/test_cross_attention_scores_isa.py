"""Every instruction set of the native floor computes the same: each in a process of its own, chosen by a variable."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import Place

OP = "cross_attention_scores"
CAPABILITIES = ["default", "avx2", "avx512"]

# Odd sizes: the ragged end of a vector is another one in each set. 40 keys fill blocks of four, 7 do not.
PROGRAM = """
import itertools
import sys
import torch
from helpers import assert_ladder, option_pairs, random_batch, run, truth
from focal import decided
from itm_kernels.native import host

SIZES = ({"regions": 7, "words": 13, "width": 37}, {"regions": 40, "words": 33, "width": 64})
assert host().cpu_capability() == sys.argv[1], host().cpu_capability()
for options, sizes in zip(option_pairs()[::2], itertools.cycle(SIZES)):
    batch, excused = decided(random_batch(181, images=3, captions=3, shortest=3, **sizes), options)
    true = truth(batch, **options)
    assert_ladder(run(batch, "native", **options), run(batch, "eager", **options), true, options, excused=excused)
half = random_batch(182, regions=7, words=13, width=37, shortest=3, dtype=torch.bfloat16)
true, peer = truth(half), run(half, "eager")
assert_ladder(run(half, "native"), peer, true, {}, noise=False)
print("agreed")
"""


def in_a_process(capability: str, program: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"ITM_CPU_CAPABILITY": capability, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", program, capability], capture_output=True, text=True, env=os.environ | variables
    )


@functools.cache
def best() -> str:
    """What this processor has: the choice without the variable."""
    program = "from itm_kernels.native import host; print(host().cpu_capability())"
    return in_a_process("", program).stdout.strip()


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = Place("native").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_set_stays_on_the_ladder(capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best()):
        pytest.skip(f"this processor only has {best()}")
    done = in_a_process(capability, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed"


SCORES = """
import torch, itm_kernels
itm_kernels.cross_attention_scores(torch.randn(2, 3, 8), torch.randn(2, 4, 8), [4, 2], backend="native")
"""


def test_an_unknown_set_is_an_error() -> None:
    done = in_a_process("sse9", SCORES)
    assert done.returncode == 1  # an exception, not a crash
    assert "RuntimeError" in done.stderr
    assert "ITM_CPU_CAPABILITY must be avx512, avx2 or default, got sse9" in done.stderr


def test_a_set_that_the_processor_lacks_is_an_error() -> None:
    if best() == "avx512":
        pytest.skip("this processor has every set there is")
    done = in_a_process("avx512", SCORES)
    assert done.returncode == 1
    assert f"ITM_CPU_CAPABILITY=avx512: this processor only has {best()}" in done.stderr
