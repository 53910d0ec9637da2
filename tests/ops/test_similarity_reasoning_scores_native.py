"""``similarity_reasoning_scores`` on the CPU's native floor: its C++ steps, instruction sets, chunks and kept nodes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import Place, relative_error, score_error
from itm_kernels.native import cuda_load_error, host
from itm_kernels.native.cpu import pair_chunks, similarity_reasoning_scores
from itm_kernels.native.cpu.filtration import Kept
from itm_kernels.native.cpu.filtration import Place as Room
from itm_kernels.native.cpu.pair_chunks import Workspace
from itm_kernels.native.similarity_reasoning_scores import why_not
from model_checks import check_ladder
from models import Case, ModelBatch, ModelResult, model_batch, run_model

OP = "similarity_reasoning_scores"
STEPS = torch.ops.itm_kernels_native
CASES = [
    Case(OP, {"reasoning": "SAF", "training": False}),
    Case(OP, {"reasoning": "SAF", "training": True}),
    Case(OP, {"reasoning": "SGR", "steps": 3}),
]
TRAINING = CASES[1]
CAPABILITIES = ["default", "avx2", "avx512"]
cases = pytest.mark.parametrize("case", CASES, ids=str)


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


def _attended(nodes: Tensor, asking: Tensor, shift: Tensor, counts: list[int], groups: int) -> Tensor:
    """A step of attention in float64, pair by pair: the words of every pair first, then every pair as a whole."""
    segments, words = len(counts), groups * sum(counts)
    starts = [sum(counts[:s]) for s in range(segments)]
    out = torch.zeros_like(asking)
    for pair in range(groups * segments):
        g, s = divmod(pair, segments)
        first = g * sum(counts) + starts[s]
        rows = [words + pair, *range(first, first + counts[s])]
        asked = [pair] if asking.shape[0] == groups * segments else rows
        weights = torch.softmax((asking[asked] + shift) @ nodes[rows].t(), dim=1)
        out = out.index_put((torch.tensor(asked),), weights @ nodes[rows])
    return out


@pytest.mark.parametrize("whole_only", [False, True], ids=["all", "whole"])
@pytest.mark.parametrize("width", [3, 37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_among_nodes(dtype: torch.dtype, width: int, whole_only: bool) -> None:
    """Every number of nodes from 2 to 12: blocks of four rows and what is left of them."""
    counts, groups = list(range(1, 12)), 2
    generator = torch.Generator().manual_seed(width)
    pairs, words = groups * len(counts), groups * sum(counts)
    nodes, asking, upstream = (torch.randn(n, width, generator=generator).to(dtype) for n in 3 * [words + pairs])
    if whole_only:
        asking, upstream = asking[:pairs].clone(), upstream[:pairs].clone()
    shift = torch.randn(width, generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    leaves = [tensor.double().requires_grad_() for tensor in (nodes, asking, shift)]
    true = _attended(*leaves, counts, groups)
    of_nodes, of_asking, of_shift = torch.autograd.grad(true, leaves, upstream.double())

    gathered = torch.full_like(asking, math.nan)
    STEPS.graph_attend(nodes, offsets, pairs, asking, shift, gathered)
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(gathered, true.detach()) <= bound
    grad_nodes, grad_shift = torch.full(nodes.shape, math.nan), torch.full((5, width), math.nan)
    STEPS.graph_attend_backward(nodes, offsets, pairs, shift, upstream, asking, grad_nodes, grad_shift)
    assert relative_error(asking, of_asking) <= bound
    assert relative_error(grad_nodes, of_nodes) <= 2e-6  # float32 whatever the storage
    assert relative_error(grad_shift.sum(0), of_shift) <= 5e-6


def test_statistics_of_logits_far_from_zero() -> None:
    """Two passes in float64: the mean takes nothing from the variance."""
    counts, images = torch.tensor([3, 1, 5]), 4
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    kept = Kept(Workspace(torch.float32), offsets, images, 2, keeps=False)
    of_words, of_wholes = (torch.randn(images, n) * 1e-2 + 1000 for n in (9, 3))
    first, second = slice(0, 3), slice(3, 4)  # chunks of images
    for chunk in (first, second):
        logits = torch.cat([of_words[chunk].flatten(), of_wholes[chunk].flatten()])
        kept.places.append(Room(logits, None, None))
    for caption, found in enumerate(kept.statistics().t()):
        own = of_words[:, offsets[caption] : offsets[caption + 1]]
        every = torch.cat([own, of_wholes[:, caption : caption + 1]], dim=1).double()
        assert abs(found[0] - every.mean()) <= 1e-4
        assert abs(found[1] - every.var(correction=0)) <= 1e-6 * every.var(correction=0)


def _assert_same(found: ModelResult, expected: ModelResult, case: Case) -> None:
    assert score_error(found.scores, expected.scores) <= 1e-6
    for name, grad in expected.gradients.items():
        if name not in case.zero_gradients():
            assert relative_error(found.gradients[name], grad) <= 1e-5, name


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_published_widths(case: Case) -> None:
    """Many channels make nodes much alike: gradients of biases are small differences."""
    sizes = {"images": 8, "captions": 8, "regions": 36, "words": 16, "width": 1024, "similarity": 256}
    check_ladder(Place("native"), case, 3, shortest=6, **sizes)


@cases
def test_chunks_of_many_images(case: Case) -> None:
    """Few words: images of several sizes stand together, padded."""
    check_ladder(Place("native"), case, 2, region_counts=True, shortest=3, images=40, captions=3)


@cases
def test_many_chunks_give_what_one_gives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_batch(case, 3, region_counts=True, shortest=3).to(torch.float32)
    one = run_model(made, "native")
    monkeypatch.setattr(pair_chunks, "ROWS", 10)
    _assert_same(run_model(made, "native"), one, case)


def test_nodes_that_are_not_kept_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model_batch(TRAINING, 4, region_counts=True, shortest=3).to(torch.float32)
    kept = run_model(made, "native")
    asked: list[bool] = []

    def fit(batch: object, start: int, stop: int) -> bool:
        asked.append(stop - start == 1)
        return False

    monkeypatch.setattr(similarity_reasoning_scores.Batch, "fit", fit)
    _assert_same(run_model(made, "native"), kept, TRAINING)
    assert any(asked), "a caption whose nodes do not fit is a block of its own"


@cases
def test_a_nan_stays_in_its_caption(case: Case) -> None:
    made: ModelBatch = model_batch(case, 1, shortest=3).to(torch.float32)
    made.batch.words[2, 0, 0] = math.nan
    scores = run_model(made, "native").scores
    assert scores[:, 2].isnan().all()
    assert scores[:, [0, 1, 3, 4, 5]].isfinite().all()


# Odd sizes: the ragged end of a vector is another one in each set.
PROGRAM = """
import sys
import torch
from helpers import Place
from itm_kernels.native import cuda_load_error, host
from model_checks import check_ladder
from models import REASONED

assert host().cpu_capability() == sys.argv[1], host().cpu_capability()
for case in REASONED:
    check_ladder(Place("native"), case, 5, regions=7, words=13, width=37, similarity=11, shortest=3)
    check_ladder(Place("native"), case, 6, regions=40, words=33, width=64, similarity=32, shortest=3)
print("agreed")
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_stays_on_the_ladder(capability: str) -> None:
    best = host().cpu_capability()
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this processor only has {best}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"ITM_CPU_CAPABILITY": capability, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed"
