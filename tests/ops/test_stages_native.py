"""The stages of RCAR and SGRAF on the CPU's native floor: chunks, instruction sets, memory, the step that is theirs."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import relative_error
from itm_kernels.native import host
from itm_kernels.native.cpu import pair_chunks
from itm_kernels.native.cpu.pair_chunks import Chunks
from itm_kernels.native.cpu.stage_places import Place as Where
from itm_kernels.native.packing import Packed
from memory import peak_bytes
from stage_suite import assert_ladder, skip_without
from stages import Case, run_stage, stage_batch, truth_of

STEPS = torch.ops.itm_kernels_native
DROPPED = {"step": 2, "dropout": 0.4, "seed": 9}
CASES = [
    *(
        case
        for direction in ("t2i", "i2t")
        for case in (
            Case("alignment_vectors", {"direction": direction}),
            Case("alignment_vectors", {"direction": direction}, ("attention_scores", "temperature")),
            Case("correspondence_regulator", {"direction": direction, "step": 2}, ("hidden", "temperature")),
            Case("aggregation_regulator", {"direction": direction, **DROPPED}, ("pooled",)),
        )
    ),
    *(Case("attention_filtration", {"training": training}, ("global_alignments",)) for training in (False, True)),
    Case("similarity_graph", {"steps": 3}, ("global_alignments",)),
]
OPS = sorted({case.op for case in CASES})
CAPABILITIES = ["default", "avx2", "avx512"]


def named(case: Case) -> str:
    """Test id."""
    return f"{case.op}-{case}"


cases = pytest.mark.parametrize("case", CASES, ids=named)


@pytest.fixture(autouse=True)
def _native() -> None:
    skip_without("native", "alignment_vectors")


@pytest.mark.parametrize("op", OPS)
def test_where_it_does_not_run(op: str) -> None:
    why_not = importlib.import_module(f"itm_kernels.native.{op}").why_not
    assert "not on mps" in str(why_not(torch.device("mps"), torch.float32))
    for device in ("cpu", "cuda"):
        assert "float64" in str(why_not(torch.device(device), torch.float64))
    assert why_not(torch.device("cpu"), torch.bfloat16) is None


@cases
def test_many_chunks_give_what_one_gives(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"images": 9, "captions": 8, "regions": 7, "words": 9, "width": 24}
    made = stage_batch(case, 7, shortest=3, **sizes).to(torch.float32)
    one = run_stage(made, "native")
    monkeypatch.setattr(pair_chunks, "ROWS", 10)
    assert_ladder(run_stage(made, "native"), one, truth_of(made), case)


@pytest.mark.usefixtures("poisoned_memory")
@cases
def test_memory_that_nobody_wrote_is_never_read(case: Case) -> None:
    result = run_stage(stage_batch(case, 2, images=5).to(torch.float32), "native")
    assert all(tensor.isfinite().all() for tensor in (*result.outputs, *result.gradients.values()))


@cases
def test_a_nan_stays_in_its_caption(case: Case) -> None:
    made = stage_batch(case, 3, region_counts=False, word_counts=[3, 2, 4, 6]).to(torch.float32)
    name = "words" if "words" in made.tensors else "alignments"
    rows = made.tensors[name]
    of_words = name == "words" or case.t2i
    spoiled = rows[3:5] if name == "words" else rows[:, 3:5] if of_words else rows[:, :, 1]
    spoiled.fill_(math.nan)
    reached = []
    for output in run_stage(made, "native").outputs:
        # Words (a product, or a query of t2i), or captions.
        axis = next(axis for axis in range(1, output.dim()) if output.shape[axis] in (15, 4))
        own = torch.arange(3, 5) if output.shape[axis] == 15 else torch.tensor([1])
        others = output.index_fill(axis, own, 0)
        assert others.isfinite().all()
        reached.append(bool(output.index_select(axis, own).isnan().any()))
    assert any(reached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@cases
def test_memory_does_not_grow_with_the_batch(case: Case, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"regions": 16, "words": 14, "width": 64, "shortest": 8, "region_counts": False}
    bound = 2**20 if case.op in ("alignment_vectors", "correspondence_regulator") else 2**17
    for count in (12, 36):
        made = stage_batch(case, 4, images=count, captions=count, **sizes).to(dtype)
        leaves = {name: tensor.requires_grad_() for name, tensor in made.tensors.items()}

        def outputs() -> tuple[Tensor, ...]:
            return made.outputs(leaves, backend="native", workspace_bytes=bound)  # noqa: B023

        everything = outputs()
        # Outside of the op the layers of the steps so far are put behind one another, and their gradients summed.
        outside = everything[2].nbytes if case.op == "correspondence_regulator" else 0
        with torch.no_grad():
            assert peak_bytes(outputs) - sum(output.nbytes for output in everything) <= bound + outside
        upstream = [torch.ones_like(output) for output in everything]
        peak = peak_bytes(lambda: torch.autograd.grad(everything, list(leaves.values()), upstream))  # noqa: B023
        # Gradients, and accumulators of those of vectors and parameters.
        summed = [t for name, t in leaves.items() if name in ("regions", "words") or t.shape[0] < count]
        accumulated = sum(4 * tensor.numel() for tensor in summed if tensor.dtype != torch.float32)
        grads = sum(tensor.nbytes for tensor in leaves.values()) + accumulated
        assert peak - grads <= bound + outside


def test_places_of_rows_products_and_pairs() -> None:
    """What is taken is what is put back, and nothing else is touched."""
    counts, of_regions = torch.tensor([2, 1, 3]), torch.tensor([1, 4, 2, 3])
    regions, packed, padded = torch.randn(4, 4, 5), torch.randn(6, 5), torch.randn(3, 3, 5)
    words_valid = torch.arange(3) < counts[:, None]
    regions_valid = torch.arange(4) < of_regions[:, None]
    for words in (packed, padded):
        for t2i in (True, False):
            images, captions = Packed(regions, of_regions, torch.float32), Packed(words, counts, torch.float32)
            sides = (captions, images) if t2i else (images, captions)
            chunks = Chunks(*sides, row_bytes=1, matrices=1, workspace_bytes=400, backward=False)
            of_words = [6] if words is packed else [3, 3]
            queries = torch.randn(4, *of_words, 2) if t2i else torch.randn(4, 4, 3, 2)
            products, pairs = torch.randn(4, 4, *of_words), torch.randn(4, 3)
            copies = [torch.zeros_like(tensor) for tensor in (queries, products, pairs)]
            for chunk in chunks.every():
                place = Where(chunk, *sides, t2i)
                taken = place.products(products)
                for group, count in enumerate(chunk.key_counts.tolist()):
                    assert not taken[group, count:].any()
                place.put_queries(copies[0], place.queries(queries))
                place.put_products(copies[1], taken)
                place.put_pairs(copies[2], place.pairs(pairs))
            valid = torch.ones(6, dtype=torch.bool) if words is packed else words_valid
            of_queries = valid.expand(4, *of_words) if t2i else regions_valid[..., None].expand(4, 4, 3)
            of_products = regions_valid.view(4, 4, *(1 for _ in of_words)) & valid
            assert torch.equal(copies[0], queries * of_queries[..., None])
            assert torch.equal(copies[1], products * of_products)
            assert torch.equal(copies[2], pairs)


def _filtered(nodes: Tensor, weight: Tensor, counts: list[int], statistics: Tensor, groups: int) -> Tensor:
    """A pair's nodes weighed and summed, in float64: first stand the words of all pairs, then all pairs as wholes."""
    words, out = groups * sum(counts), []
    for pair in range(groups * len(counts)):
        g, s = divmod(pair, len(counts))
        first = g * sum(counts) + sum(counts[:s])
        own = nodes[[words + pair, *range(first, first + counts[s])]]
        chances = torch.sigmoid((own @ weight - statistics[0, s]) / (statistics[1, s] + 1e-5).sqrt() * 1.5 - 0.25)
        out.append(F.normalize((chances / (chances.sum() + 1e-8)) @ own, dim=0, eps=1e-8))
    return torch.stack(out)


@pytest.mark.parametrize("width", [3, 37, 64])
def test_filtered_nodes(width: int) -> None:
    counts, groups = [1, 4, 9], 3
    generator = torch.Generator().manual_seed(width)
    count = groups * (sum(counts) + len(counts))
    nodes, weight = torch.randn(count, width, generator=generator), torch.randn(width, generator=generator) / width**0.5
    statistics = torch.stack([torch.zeros(3), torch.ones(3)])
    offsets, upstream = torch.tensor([0, *counts]).cumsum(0), torch.randn(9, width, generator=generator)
    leaves = nodes.double().requires_grad_(), weight.double().requires_grad_()
    true = _filtered(*leaves, counts, statistics.double(), groups)
    of_nodes, of_weight = torch.autograd.grad(true, leaves, upstream.double())

    logits, filtered = torch.empty(count), torch.full((9, width), math.nan)
    STEPS.node_logits(nodes, weight, 0.0, logits)
    given = nodes, offsets, logits, statistics, 1.5, -0.25, 1e-5
    STEPS.filter_nodes(*given, filtered)
    assert relative_error(filtered, true.detach()) <= 1e-6
    grad_nodes, sums, slopes = (
        torch.full(nodes.shape, math.nan),
        torch.full((4, width + 1), math.nan),
        torch.empty(9, 2),
    )
    nothing = torch.zeros(2, 3)
    STEPS.filter_nodes_backward(*given, upstream, weight, nothing, slopes, grad_nodes, sums)
    assert relative_error(grad_nodes, of_nodes) <= 5e-6
    assert relative_error(sums.sum(0)[:width], of_weight) <= 5e-6
    again = torch.empty(9, 2)
    STEPS.filter_nodes_backward(*given, upstream, weight, nothing, again, None, None)
    assert torch.equal(slopes, again)


def test_the_filter_refuses_what_would_reach_outside_memory() -> None:
    nodes, offsets = torch.zeros(8, 8), torch.tensor([0, 1, 2])  # 2 images, 2 captions of a word: 4 words, 4 wholes
    given = nodes, offsets, torch.zeros(8), torch.ones(2, 2), 1.0, 0.0, 1e-5
    STEPS.filter_nodes(*given, torch.zeros(4, 8))
    with pytest.raises(RuntimeError, match="filtered must be contiguous float32 with 32 elements"):
        STEPS.filter_nodes(*given, torch.zeros(4, 7))
    rest = torch.zeros(8), torch.zeros(2, 2), torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match="sums go with grad_nodes"):
        STEPS.filter_nodes_backward(*given, torch.zeros(4, 8), *rest, torch.zeros(8, 8), None)
    with pytest.raises(RuntimeError, match="sums must be contiguous float32 with 9 elements"):
        STEPS.filter_nodes_backward(*given, torch.zeros(4, 8), *rest, torch.zeros(8, 8), torch.zeros(1, 8))


# The ragged end of a vector is another one in each instruction set.
PROGRAM = """
import sys
from helpers import Place
from itm_kernels.native import host
from ops.test_stages_native import CASES
from stage_suite import check
from stages import stage_batch

assert host().cpu_capability() == sys.argv[1], host().cpu_capability()
for case in CASES:
    check(Place("native"), stage_batch(case, 5, images=4, regions=7, words=13, width=37, shortest=3), least=0.05)
print("agreed")
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(host().cpu_capability()):
        pytest.skip(f"this processor has no {capability}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"ITM_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability], capture_output=True, text=True, env=os.environ | variables
    )
    assert ran.stdout.strip() == "agreed", ran.stderr


def test_workspaces_of_one_byte_have_chunks_of_one_pair() -> None:
    case = Case("aggregation_regulator", {}, ("pooled",))
    made = stage_batch(case, 6).to(torch.float32)
    seen: list[int] = []
    inside = Chunks.of_block

    def of_block(self: Chunks, start: int, stop: int, **more: Any) -> Any:
        for chunk in inside(self, start, stop, **more):
            seen.append(chunk.pairs)
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chunks, "of_block", of_block)
        made.outputs(made.tensors, backend="native", workspace_bytes=1)
    assert seen == [1] * 12
