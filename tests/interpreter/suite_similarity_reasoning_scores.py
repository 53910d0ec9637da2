"""``similarity_reasoning_scores`` in Triton's interpreter, against the definition; run by ``test_interpreter.py``.

Small sizes: the interpreter runs one program after another. Nodes, pairs, rows and slices of the width all end in the
middle of a tile somewhere.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import model_checks as checks
from helpers import Place, score_error
from itm_kernels.pair_blocks import rows
from itm_kernels.pair_blocks.blocks import PairBlocks
from itm_kernels.pair_blocks.filtration import Moments
from itm_kernels.pair_blocks.similarity_reasoning_scores import Batch
from models import REASONED, Case, assert_half_ladder, assert_model_ladder, model_batch, run_model

OP = "similarity_reasoning_scores"
TRITON = Place("triton")
TRAINING, GRAPH = REASONED[1], REASONED[-1]
SMALL: dict[str, Any] = {"images": 2, "captions": 3, "regions": 5, "words": 4, "width": 20, "similarity": 6}
few = pytest.mark.parametrize("case", [TRAINING, GRAPH], ids=str)


@pytest.fixture(autouse=True)
def _runs_here() -> None:
    """Nothing here may be skipped: a floor that cannot run is a failure."""
    assert TRITON.why_not(OP, torch.float32) is None


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", REASONED, ids=str)
def test_every_option(case: Case, packed: bool) -> None:
    checks.check_ladder(TRITON, case, 3, packed=packed, region_counts=packed, shortest=2, **SMALL)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (TRAINING, {"images": 1, "captions": 1}),
        (REASONED[0], {"words": 1}),
        (TRAINING, {"words": 35, "similarity": 70, "width": 70}),
        (REASONED[0], {"images": 1, "captions": 2, "words": 9, "similarity": 600}),
        (GRAPH, {"words": 1, "regions": 1}),
        (GRAPH, {"words": 35, "shortest": 2, "similarity": 70}),
        (GRAPH, {"images": 1, "captions": 2, "words": 16, "shortest": 15, "width": 140, "similarity": 64}),
        (REASONED[3], {"images": 20, "captions": 1, "words": 2, "width": 5}),
    ],
    ids=str,
)
def test_sizes(case: Case, sizes: dict[str, Any]) -> None:
    """More nodes than a tile, just as many, two; channels and columns beyond a slice; images beyond a tile."""
    checks.check_ladder(TRITON, case, 5, **{**SMALL, **sizes})


@few
def test_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair at a time, a few, all at once, with nodes kept between the passes or made again: the same results."""
    made = checks.prepared(case, 7, packed=True, region_counts=True, shortest=2, **SMALL)
    true, peer = checks.references(made, "eager")
    cut: list[tuple[int, bool]] = []
    original = Batch.__init__

    def recorded(self: Batch, *args: Any, **how: Any) -> None:
        original(self, *args, **how)
        cut.append((len(list(self.blocks.query_blocks())), self.keeps))

    monkeypatch.setattr(Batch, "__init__", recorded)
    for workspace_bytes in (1, 2_500, 40_000):
        assert_model_ladder(run_model(made.batch, "triton", workspace_bytes=workspace_bytes), peer, true, case)
    forwards = cut[::2]
    assert [blocks for blocks, _ in forwards][::2] == [3, 1]
    assert [keeps for _, keeps in forwards] == [False, case is TRAINING, case is TRAINING]


def test_nodes_are_kept_in_their_quarter() -> None:
    """Blocks of captions are as large as a quarter of the workspace lets their nodes be, and no larger."""
    made = model_batch(TRAINING, 2, shortest=2, **{**SMALL, "captions": 12, "words": 6})
    arguments = checks.arguments(made, "eager", requires_grad=False)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        cut = PairBlocks.query_blocks

        def recorded(self: PairBlocks) -> Any:
            for first, last in cut(self):
                bounds = self.queries.bounds
                seen.append(bounds[last] - bounds[first] + last - first)
                yield first, last

        patch.setattr(PairBlocks, "query_blocks", recorded)
        torch.ops.itm_kernels.similarity_reasoning_scores(*arguments[:-2], 4_000, "triton")
    of_node = 4 * made.batch.regions.shape[0] * (6 + 2)
    assert len(seen) > 2
    assert max(seen) * of_node <= 1_000
    assert sum(seen) == sum(made.batch.word_counts) + 12


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_two_runs_give_the_same_bits(case: Case) -> None:
    made = model_batch(case, 8, region_counts=True, **SMALL).to(torch.float32)
    for mine, its in zip(run_model(made, "triton"), run_model(made, "triton"), strict=True):
        assert torch.equal(mine, its)
        assert mine.isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    made = checks.prepared(case, 9, region_counts=True, shortest=1, **SMALL)
    true, peer = checks.references(made, "eager")
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_model_ladder(run_model(made.batch, "triton"), peer, true, case)


@few
def test_float16(case: Case) -> None:
    runs = []
    for seed in (6, 7, 8):
        sizes = {**SMALL, "images": 4, "captions": 4, "width": 32, "similarity": 16}
        made = checks.prepared(case, seed, dtype=torch.float16, shortest=3, **sizes)
        true, peer = checks.references(made, "eager")
        runs.append((run_model(made.batch, "triton"), peer, true))
    assert_half_ladder(runs, case)


def test_parameters_beside_half_precision_may_be_float32() -> None:
    half = model_batch(GRAPH, 16, **SMALL).to(torch.float16)
    wide = [None if p is None else p.float() for p in half.parameters.flat()]
    mixed = dataclasses.replace(half, parameters=half.parameters.of(wide))
    got, its = run_model(mixed, "triton"), run_model(half, "triton")
    assert torch.equal(got.scores, its.scores)
    assert got.gradients["graph_node_weight"].dtype == torch.float32
    assert its.gradients["graph_node_weight"].dtype == torch.float16


def test_statistics_of_logits_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean takes nothing from the variance, however the images are cut."""
    logits: list[Any] = []
    add = Moments.add

    def shifted(self: Moments, block: Any, found: torch.Tensor) -> None:
        found.mul_(1e-2).add_(1000)
        of_words, of_wholes = (part.view(block.groups, -1) for part in found.split([block.rows, block.pairs]))
        logits.append(torch.cat([of_words, of_wholes], dim=1))
        add(self, block, found)

    monkeypatch.setattr(Moments, "add", shifted)
    made = model_batch(TRAINING, 4, **{**SMALL, "images": 5, "captions": 1}).to(torch.float32)
    arguments = checks.arguments(made, "eager", requires_grad=False)
    _, found = torch.ops.itm_kernels.similarity_reasoning_scores(*arguments[:-2], 1, "triton")
    assert len(logits) == 5
    every = torch.cat(logits).double()
    assert every.numel() == 5 * (1 + made.batch.word_counts[0])
    assert abs(found[0] - every.mean()) <= 1e-4
    assert abs(found[1] - every.var(correction=0)) <= 1e-6 * every.var(correction=0)


def test_a_nan_stays_in_its_caption() -> None:
    for case in (TRAINING, GRAPH):
        made = model_batch(case, 1, shortest=3, **SMALL).to(torch.float32)
        made.batch.words[2, 0, 0] = math.nan
        scores = run_model(made, "triton").scores
        assert scores[:, 2].isnan().all()
        assert scores[:, :2].isfinite().all()


def test_zero_vectors() -> None:
    """Regions, words and wholes of zeros: finite scores and gradients, those of the definition."""
    for case in (TRAINING, GRAPH):
        made = checks.prepared(case, 17, shortest=3, **SMALL)
        made.batch.batch.regions[0] = 0
        made.batch.batch.words[1, :2] = 0
        made.batch.extras["image_global"][1] = 0
        true, got = checks.model_truth(made.batch), run_model(made.batch, "triton")
        assert score_error(got.scores, true.scores) <= 1e-5
        assert all(tensor.isfinite().all() for tensor in got)


@pytest.mark.parametrize("case", [TRAINING, GRAPH], ids=str)
def test_opcheck(case: Case) -> None:
    made = model_batch(case, 41, **SMALL).to(torch.float32)
    given = checks.arguments(made, "triton", requires_grad=False)
    torch.library.opcheck(torch.ops.itm_kernels.similarity_reasoning_scores.default, given)
    outputs = torch.ops.itm_kernels.similarity_reasoning_scores(*given)
    backward = torch.ops.itm_kernels.similarity_reasoning_scores_backward.default
    torch.library.opcheck(backward, (made.batch.grad_scores.float(), *given[:7], outputs[1], *given[8:]))
