"""Performance gates of the CPU: ratios to a peer in the same process, bytes, never milliseconds.

    python -m pytest --benchmark-only tests/benchmarks          # `make bench-gate`; plain pytest skips them

What is compared takes turns round by round with cold caches, on two threads, and a gate looks at the median of the
rounds' ratios: half of the rounds may be disturbed by other programs. Against the product that holds even on a machine
that is busy throughout, since both lose alike; the loop does not, and its gate counts quiet rounds alone. What was seen
is in the message and, for comparing runs over time, in the ``extra_info`` of pytest-benchmark's JSON beside the time of
the op itself.
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

OP = "cross_attention_scores"
CPU = torch.device("cpu")
MOST_RHO = {FORWARD: 2.0, BOTH: 2.0}
LEAST_SPEEDUP_VS_LOOP = 5.0
LEAST_SPEEDUP_OF_BFLOAT16 = 1.3
MOST_PEAK = 256 * memory.MIB
# Enough for a median that a burst of other work does not move; a round of the loop takes seconds.
ROUNDS = {FORWARD: 15, BOTH: 9}
ROUNDS_OF_LOOP = {FORWARD: 9, BOTH: 5}
FEWEST_QUIET_ROUNDS = 3

Make = Callable[..., Contender]


@pytest.fixture(scope="module")
def make() -> Make:
    """Contenders at I = C = 128, R = 36, D = 1024 with real caption lengths; each is made, and held to parity, once."""
    workloads: dict[Any, ops.Workload] = {}
    contenders: dict[Any, Contender] = {}

    def get(method: str, direction: str = "t2i", dtype: torch.dtype = torch.float32) -> Contender:
        if (direction, dtype) not in workloads:
            workloads[direction, dtype] = ops.load(OP).workload(CASES["b128"], direction, dtype, CPU)
        workload, key = workloads[direction, dtype], (method, direction, dtype)
        if key not in contenders:
            found = workload.contender(method)
            if isinstance(found, str):
                pytest.skip(f"{method}: {found}")
            if method == "native":
                assert_parity(method, found.calls[BOTH](), workload.truth(), workload.tolerance)
            contenders[key] = found
        return contenders[key]

    return get


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_costs_little_more_than_its_products(
    benchmark: BenchmarkFixture, make: Make, direction: str, phase: str
) -> None:
    calls = {name: make(name, direction).calls[phase] for name in ("native", PRODUCT)}
    times = take_turns(calls, ROUNDS[phase])
    rho = measure.ratio(times["native"], times[PRODUCT])
    report(benchmark, calls["native"], times["native"], rho=rho.median)
    assert rho.median <= MOST_RHO[phase], sentence(f"rho, {direction}, {phase},", rho, f"<= {MOST_RHO[phase]}")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_is_several_times_faster_than_the_loop(
    benchmark: BenchmarkFixture, make: Make, direction: str, phase: str
) -> None:
    product = measure.CoreShare(make(PRODUCT, direction).calls[phase])
    calls = {name: make(name, direction).calls[phase] for name in ("native", "reference")}
    times = take_turns({**calls, PRODUCT: product}, ROUNDS_OF_LOOP[phase])
    # The loop has parts on a single thread, and so loses less than the op where other programs hold the cores.
    quiet = [r for r, share in enumerate(product.shares[-ROUNDS_OF_LOOP[phase] :]) if share >= measure.QUIET]
    if len(quiet) < FEWEST_QUIET_ROUNDS:
        pytest.skip(
            f"needs a machine of its own: the bare product got {measure.summarize(product.shares).median:.0%} of its "
            f"{THREADS} threads; the ratio to the product is gated all the same"
        )
    loop, own = ([times[name][r] for r in quiet] for name in ("reference", "native"))
    speedup = measure.ratio(loop, own)
    report(benchmark, calls["native"], times["native"], speedup_vs_loop=speedup.median)
    assert speedup.median >= LEAST_SPEEDUP_VS_LOOP, sentence(
        f"speed-up over the loop, {direction}, {phase},", speedup, f">= {LEAST_SPEEDUP_VS_LOOP}"
    )


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_bfloat16_is_faster_than_float32(benchmark: BenchmarkFixture, make: Make, direction: str) -> None:
    if not machine.has_fast_bfloat16():
        pytest.skip("this processor has neither avx512_bf16 nor AMX: its bfloat16 products are not faster")
    calls = {str(d): make("native", direction, d).calls[FORWARD] for d in (torch.float32, torch.bfloat16)}
    times = take_turns(calls, ROUNDS[FORWARD])
    speedup = measure.ratio(times["torch.float32"], times["torch.bfloat16"])
    report(benchmark, calls["torch.bfloat16"], times["torch.bfloat16"], speedup_vs_float32=speedup.median)
    assert speedup.median >= LEAST_SPEEDUP_OF_BFLOAT16, sentence(
        f"speed-up of bfloat16, {direction}, forward,", speedup, f">= {LEAST_SPEEDUP_OF_BFLOAT16}"
    )


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_keeps_its_inputs_and_little_else(benchmark: BenchmarkFixture, make: Make, direction: str) -> None:
    contender = make("native", direction)
    assert contender.graph is not None
    case = CASES["b128"]
    inputs = 4 * case.width * (case.images * case.regions + case.captions * max(case.word_counts))
    saved = benchmark.pedantic(memory.saved_bytes, (contender.graph,), rounds=1)
    benchmark.extra_info["saved_mib"] = saved / memory.MIB
    assert saved <= inputs + 2 * 4 * case.images * case.captions, (
        f"autograd keeps {saved} bytes, {saved - inputs} beside the inputs; the gate is twice the scores"
    )


def test_peak_memory_is_bounded(benchmark: BenchmarkFixture) -> None:
    subject = memory.Subject(OP, CASES["b512"], "t2i", "float32", "native", BOTH)
    workload = ops.load(OP).workload(CASES["tiny"], "t2i", torch.float32, CPU)
    native = workload.contender("native")
    if isinstance(native, str):
        pytest.skip(f"native: {native}")
    torch.set_num_threads(THREADS)
    peak = benchmark.pedantic(memory.peak_bytes, (subject, native), rounds=1)
    if peak is None:
        pytest.skip("peak memory is read from Linux' /proc")
    benchmark.extra_info["peak_mib"] = peak / memory.MIB
    assert peak <= MOST_PEAK, f"at I = C = 512 forward and backward take {peak / memory.MIB:.0f} MiB, the gate is 256"
