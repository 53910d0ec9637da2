"""Performance gates of the CPU for RCAR and SGRAF: ratios to a peer in the same process, bytes, never milliseconds.

    python -m pytest --benchmark-only tests/benchmarks          # `make bench-gate`; plain pytest skips them

At I = C = 32, as the published loops were timed. What is compared takes turns, as in ``test_ratios.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gates_of_ratios import THREADS, report, sentence, take_turns

from benchmarks import machine, measure, memory, ops
from benchmarks.cases import CASES
from benchmarks.contender import BOTH, FORWARD, PHASES, PRODUCT, Contender
from benchmarks.parity import assert_parity

if TYPE_CHECKING:  # plain pytest skips these gates and may lack the plugin
    from pytest_benchmark.fixture import BenchmarkFixture

CPU = torch.device("cpu")
MODELS = [
    ("regulated_scores", "rcar-t2i"),
    ("similarity_reasoning_scores", "saf"),
    ("similarity_reasoning_scores", "sgr"),
]
MOST_RHO = {FORWARD: 1.7, BOTH: 2.0}
LEAST_SPEEDUP_OF_BFLOAT16 = 1.3
MOST_PEAK = 256 * memory.MIB
ROUNDS = {FORWARD: 15, BOTH: 9}
FEWEST_QUIET_ROUNDS = 3

Make = Callable[..., Contender]
models = pytest.mark.parametrize(("op", "direction"), MODELS, ids=lambda value: str(value))


@pytest.fixture(scope="module")
def make() -> Make:
    """Contenders at I = C = 32, R = 36, D = 1024, S = 256; each is made, and held to parity, once."""
    contenders: dict[Any, Contender] = {}

    def get(op: str, direction: str, method: str, dtype: torch.dtype = torch.float32) -> Contender:
        key = (op, direction, method, dtype)
        if key not in contenders:
            workload = ops.load(op).workload(CASES["b32"], direction, dtype, CPU)
            found = workload.contender(method)
            if isinstance(found, str):
                pytest.skip(f"{method}: {found}")
            if method == "native":
                assert_parity(method, found.calls[BOTH](), workload.truth(), workload.tolerance)
            contenders[key] = found
        return contenders[key]

    return get


@pytest.mark.parametrize("phase", PHASES)
@models
def test_costs_little_more_than_its_products(
    benchmark: BenchmarkFixture, make: Make, op: str, direction: str, phase: str
) -> None:
    product = measure.CoreShare(make(op, direction, PRODUCT).calls[phase])
    calls = {name: make(op, direction, name).calls[phase] for name in ("native", "reference")}
    times = take_turns({**calls, PRODUCT: product}, ROUNDS[phase])
    # Between its products an op has hundreds of short steps on all threads; where other programs hold the cores each
    # of them waits, and a product waits once.
    quiet = [r for r, share in enumerate(product.shares[-ROUNDS[phase] :]) if share >= measure.QUIET]
    if len(quiet) < FEWEST_QUIET_ROUNDS:
        pytest.skip(
            f"needs a machine of its own: the bare products got {measure.summarize(product.shares).median:.0%} of "
            f"their {THREADS} threads"
        )
    loop, own, bare = ([times[name][r] for r in quiet] for name in ("reference", "native", PRODUCT))
    rho, speedup = measure.ratio(own, bare), measure.ratio(loop, own)
    report(benchmark, calls["native"], times["native"], rho=rho.median, speedup_vs_loop=speedup.median)
    assert rho.median <= MOST_RHO[phase], sentence(f"rho, {direction}, {phase},", rho, f"<= {MOST_RHO[phase]}")
    assert speedup.median > 1, sentence(f"speed-up over the loop, {direction}, {phase},", speedup, "> 1")


@models
def test_bfloat16_is_faster_than_float32(benchmark: BenchmarkFixture, make: Make, op: str, direction: str) -> None:
    if not machine.has_fast_bfloat16():
        pytest.skip("this processor has neither avx512_bf16 nor AMX: its bfloat16 products are not faster")
    calls = {str(d): make(op, direction, "native", d).calls[BOTH] for d in (torch.float32, torch.bfloat16)}
    times = take_turns(calls, ROUNDS[BOTH])
    speedup = measure.ratio(times["torch.float32"], times["torch.bfloat16"])
    report(benchmark, calls["torch.bfloat16"], times["torch.bfloat16"], speedup_vs_float32=speedup.median)
    assert speedup.median >= LEAST_SPEEDUP_OF_BFLOAT16, sentence(
        f"speed-up of bfloat16, {direction},", speedup, f">= {LEAST_SPEEDUP_OF_BFLOAT16}"
    )


@models
def test_keeps_inputs_and_parameters_and_little_else(
    benchmark: BenchmarkFixture, make: Make, op: str, direction: str
) -> None:
    contender = make(op, direction, "native")
    assert contender.graph is not None
    workload = ops.load(op).workload(CASES["b32"], direction, torch.float32, CPU)
    inputs = sum(leaf.nbytes for leaf in workload.leaves)  # type: ignore[attr-defined]
    saved = benchmark.pedantic(memory.saved_bytes, (contender.graph,), rounds=1)
    benchmark.extra_info["saved_mib"] = saved / memory.MIB
    assert saved <= inputs + 4 * 4 * 32 * 32, f"autograd keeps {saved} bytes, inputs and parameters are {inputs}"


@models
def test_peak_memory_is_bounded(benchmark: BenchmarkFixture, op: str, direction: str) -> None:
    subject = memory.Subject(op, CASES["b128"], direction, "float32", "native", BOTH)
    native = ops.load(op).workload(CASES["b128"], direction, torch.float32, CPU).contender("native")
    if isinstance(native, str):
        pytest.skip(f"native: {native}")
    torch.set_num_threads(THREADS)
    peak = benchmark.pedantic(memory.peak_bytes, (subject, native), rounds=1)
    if peak is None:
        pytest.skip("peak memory is read from Linux' /proc")
    benchmark.extra_info["peak_mib"] = peak / memory.MIB
    assert peak <= MOST_PEAK, f"at I = C = 128 forward and backward take {peak / memory.MIB:.0f} MiB, the gate is 256"
