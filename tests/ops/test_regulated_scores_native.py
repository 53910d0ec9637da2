"""``regulated_scores`` on the CPU's native floor: its C++ steps, instruction sets, chunks and memory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import Place, relative_error, score_error
from itm_kernels import regulated_scores
from itm_kernels.native import cuda_load_error, host
from itm_kernels.native.cpu import pair_chunks
from itm_kernels.native.packing import Packed
from itm_kernels.native.regulated_scores import why_not
from memory import peak_bytes
from model_checks import check_ladder
from models import Case, ModelBatch, model_batch, model_truth, run_model

OP = "regulated_scores"
STEPS = torch.ops.itm_kernels_native
CASES = [
    Case(OP, {"direction": direction, "regulator": regulator, "steps": steps})
    for direction in ("t2i", "i2t")
    for regulator, steps in [("rar", 2), ("rcr", 3), ("rcar", 3)]
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = Place("native").why_not(OP, torch.float32)
    if reason is not None:
        pytest.skip(reason)


def test_where_it_does_not_run() -> None:
    for device in ("cpu", "cuda"):
        assert "float64" in str(why_not(torch.device(device), torch.float64))
    assert why_not(torch.device("cpu"), torch.bfloat16) is None
    if cuda_load_error() is not None:
        assert why_not(torch.device("cuda"), torch.float32) == cuda_load_error()


def test_tanh_and_its_gradient() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-20, 3e-5, math.inf, -math.inf])])
    shift = torch.full_like(x, 0.25)
    rows = x[None] - shift
    STEPS.tanh_rows(rows, shift)
    true = torch.tanh((x - shift + shift).double())
    assert ((rows[0] - true).abs() <= 2e-7 * true.abs()).all()
    assert torch.equal(rows[0].sign(), true.sign().float())
    grad, sums = torch.full_like(rows, 2.0), torch.full((3, x.numel()), math.nan)
    STEPS.tanh_rows_backward(rows, None, None, grad, sums)
    assert (grad - 2 * (1 - rows * rows)).abs().max() <= 5e-7
    assert torch.equal(sums.sum(0), grad[0])


def test_a_nan_stays_one() -> None:
    made = model_batch(CASES[-1], 1, shortest=3)
    made.batch.words[2, 0, 0] = math.nan
    scores = run_model(made, "native").scores
    assert scores[:, 2].isnan().all()
    assert scores[:, [0, 1, 3, 4, 5]].isfinite().all()


@cases
def test_chunks_of_many_groups(case: Case) -> None:
    """Few queries: groups of keys of several sizes stand together, padded."""
    few = {"images": 3, "captions": 40} if case.options["direction"] == "i2t" else {"images": 40, "captions": 3}
    check_ladder(Place("native"), case, 2, region_counts=True, shortest=3, **few)


@cases
def test_many_chunks_give_what_one_gives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_batch(case, 3, region_counts=True, shortest=3)
    one = run_model(made, "native")
    monkeypatch.setattr(pair_chunks, "ROWS", 10)
    many = run_model(made, "native")
    assert score_error(many.scores, one.scores) <= 3e-6
    for name, grad in one.gradients.items():
        if name not in case.zero_gradients():
            assert relative_error(many.gradients[name], grad) <= 1e-3, name


def test_blocks_of_queries_are_whole_segments_within_the_bound() -> None:
    counts = torch.tensor([5, 1, 9, 4, 4, 7, 1, 1, 30, 2])
    queries = Packed(torch.randn(64, 8), counts, torch.float32)
    keys = Packed(torch.randn(3, 6, 8), None, torch.float32)
    for workspace_bytes in (1, 4000, 20_000, 1 << 30):
        chunks = pair_chunks.Chunks(
            queries, keys, row_bytes=64, matrices=2, workspace_bytes=workspace_bytes, backward=False
        )
        blocks = list(chunks.query_blocks())
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
        assert blocks[-1][1] == len(counts)
        for start, stop in blocks:
            groups = [group for chunk in chunks.of_block(start, stop) for group in chunk.group_numbers.tolist()]
            assert sorted(groups) == [0, 1, 2]
            rows = int(counts[start:stop].sum())
            assert stop - start == 1 or rows * (64 + 2 * 6 * 4 + 8 * 8) <= workspace_bytes
        assert len(blocks) == {1: 10, 1 << 30: 1}.get(workspace_bytes, len(blocks))


@cases
def test_gradients_at_zero_vectors(case: Case) -> None:
    """A region and words of zeros: the guarded norms have the gradients of the definition."""
    made = model_batch(case, 4, shortest=4)
    made.batch.regions[1, 0] = 0
    made.batch.words[1, :2] = 0
    true, got = model_truth(made), run_model(made, "native")
    assert score_error(got.scores, true.scores) <= 1e-5
    for side in ("regions", "words"):
        assert relative_error(got.gradients[side], true.gradients[side]) <= 1e-3


# The ragged end of a vector is another one in each instruction set.
PROGRAM = """
import sys
from helpers import Place
from itm_kernels.native import cuda_load_error, host
from model_checks import check_ladder
from models import Case

assert host().cpu_capability() == sys.argv[1], host().cpu_capability()
for direction in ("t2i", "i2t"):
    for regulator in ("rcr", "rcar"):
        dropout = 0.4 if regulator == "rcar" else 0.0
        options = {"direction": direction, "regulator": regulator, "steps": 2, "dropout": dropout, "seed": 3}
        sizes = {"images": 3, "captions": 4, "width": 37, "similarity": 13}
        check_ladder(Place("native"), Case("regulated_scores", options), 5, regions=7, words=13, shortest=3, **sizes)
print("agreed")
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    known = ["default", "avx2", "avx512"]
    if known.index(capability) > known.index(host().cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"ITM_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability], capture_output=True, text=True, env=os.environ | variables
    )
    assert ran.stdout.strip() == "agreed", ran.stderr


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@cases
def test_threads_do_not_change_the_bits_of_a_run(case: Case) -> None:
    made = model_batch(case, 6, images=9, captions=9, shortest=3)
    for mine, its in zip(run_model(made, "native"), run_model(made, "native"), strict=True):
        assert torch.equal(mine, its)


def measured(made: ModelBatch, workspace_bytes: int) -> tuple[int, int]:
    """Peak bytes beside scores (forward), and beside gradients and their float32 accumulators (backward)."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.tensors().items()}
    parameters = made.parameters.of([tensors[name] for name in list(tensors)[2:]])
    options: dict[str, Any] = {**made.case.options, "workspace_bytes": workspace_bytes, "backend": "native"}

    def call() -> torch.Tensor:
        return regulated_scores(tensors["regions"], tensors["words"], made.batch.word_counts, parameters, **options)

    with torch.no_grad():
        forward = peak_bytes(call)
    scores = call()
    upstream = torch.ones_like(scores)
    backward = peak_bytes(lambda: torch.autograd.grad(scores, list(tensors.values()), upstream))
    grads = sum(tensor.nbytes if tensor.dtype == torch.float32 else 3 * tensor.nbytes for tensor in tensors.values())
    return forward - scores.nbytes, backward - grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_memory_stays_within_the_bound_and_does_not_grow(direction: str, dtype: torch.dtype) -> None:
    case = Case(OP, {"direction": direction, "regulator": "rcar", "steps": 3})
    sizes: dict[str, Any] = {"regions": 36, "words": 14, "width": 64, "similarity": 16, "shortest": 8}
    for count in (12, 36):
        full = model_batch(case, 7, images=count, captions=count, **sizes)
        steps = ("alignment", "correspondence", "aggregation", "score")
        assert all(getattr(full.parameters, step) is not None for step in steps)
        forward, backward = measured(full.to(dtype), 2 * MIB)
        assert forward <= 2 * MIB
        assert backward <= 2 * MIB


def test_steps_refuse_what_would_reach_outside_memory() -> None:
    rows, bias = torch.zeros(4, 8), torch.zeros(8)
    offsets = torch.tensor([0, 2, 4])
    with pytest.raises(RuntimeError, match="bias must be contiguous float32 with 8 elements"):
        STEPS.tanh_rows(rows, bias[:7])
    with pytest.raises(RuntimeError, match="contiguous"):
        STEPS.tanh_rows(rows.t(), bias)
    with pytest.raises(RuntimeError, match="grad_dots and weight come together"):
        STEPS.tanh_rows_backward(rows, torch.zeros(4), None, rows.clone(), torch.zeros(1, 8))
    with pytest.raises(RuntimeError, match="offsets must run from 0 to 4"):
        STEPS.mean_of_segments(rows, torch.tensor([0, 2, 5]), torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="offsets must increase"):
        STEPS.mean_of_segments(rows, torch.tensor([0, 4, 4]), torch.zeros(2, 8))
    products = torch.zeros(1, 3, 4)
    with pytest.raises(RuntimeError, match=r"key_counts must be within 1\.\.K"):
        STEPS.alignment_attention(products, torch.tensor([4]), offsets, None, 1.0, products.clone())
    with pytest.raises(RuntimeError, match="weights must be contiguous float32 with 12 elements"):
        STEPS.alignment_attention(products, torch.tensor([3]), offsets, None, 1.0, torch.zeros(1, 2, 4))
    with pytest.raises(RuntimeError, match="rows must be so many for every group"):
        STEPS.squared_differences(rows[:3], rows, rows.clone(), torch.zeros(4))
