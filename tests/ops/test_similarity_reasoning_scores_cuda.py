"""The CUDA kernels of ``similarity_reasoning_scores``, emulated, step by step against formulas in float64.

What autograd says of a few lines of torch is the measure. The captions are padded, as where the device alone knows how
long they are: what stands in the padding is NaN, and counts for nothing.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import emulated
from helpers import relative_error
from itm_kernels.native.cuda import node_steps
from itm_kernels.native.cuda.node_steps import NodeSteps
from itm_kernels.pair_blocks.blocks import PairBlock
from itm_kernels.pair_blocks.rows import Block
from itm_kernels.pair_blocks.steps import Filter

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of what comes in float32, and of what is rounded to the dtype of the products.
EXACT = 2e-6
ROUNDED = {torch.float32: EXACT, torch.bfloat16: 3e-3, torch.float16: 4e-4}
# Odd; in whole words, past one round of a warp; whole words that do not begin at one (``far``).
WIDTHS = [3, 37, 264]
GROUPS = 2
# A node more than words: tiles of 16 nodes and what is left of them.
COUNTS = [1, 2, 7, 14, 15, 16, 33]
PADDED = [3, 2, 7, 15, 15, 20, 33]


class Steps(NodeSteps):
    """On the emulator."""

    def __init__(self) -> None:
        self.ops = emulated.library()


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


def block_of(counts: list[int], extents: list[int], dtype: torch.dtype = torch.float32) -> PairBlock:
    """What the kernels see of a block: tables of its captions."""
    offsets = torch.tensor([0, *extents]).cumsum(0)
    segments = torch.cat([torch.arange(e) < n for n, e in zip(counts, extents, strict=True)])
    number = torch.arange(len(counts)).repeat_interleave(torch.tensor(extents))
    queries = Block(
        torch.zeros(int(offsets[-1]), 1), offsets, torch.tensor(counts), torch.where(segments, number, -1).int(),
        max(extents),
    )  # fmt: skip
    unused: Any = None
    return PairBlock(
        steps=unused, queries=queries, keys=unused, padded=torch.zeros(GROUPS, 1, 1, dtype=dtype), first_segment=0,
        first_group=0, ones=unused, keeps=True,
    )  # fmt: skip


def places(block: PairBlock) -> list[list[int]]:
    """Rows of the nodes of every pair, the whole first."""
    found = []
    for group in range(block.groups):
        for s in range(block.segments):
            first = group * block.num_queries + int(block.queries.offsets[s])
            count = int(block.queries.counts[s])
            found.append([block.rows + len(found), *range(first, first + count)])
    return found


def padding(block: PairBlock) -> Tensor:  # [rows + pairs] bool
    of_words = (block.queries.segments < 0).repeat(block.groups)
    return torch.cat([of_words, torch.zeros(block.pairs, dtype=torch.bool)])


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(block: PairBlock, rows: Tensor) -> Tensor:
    """NaN in the padding."""
    rows = rows.clone()
    rows[padding(block)] = math.nan
    return rows


def far(tensor: Tensor) -> Tensor:
    """The same, one element behind a whole word."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor)
    return moved.copy_(tensor)


def nan_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full_like(tensor, math.nan, dtype=dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("width", [*WIDTHS, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_squares(steps: Steps, dtype: torch.dtype, width: int) -> None:
    images, captions = random(1, 3, width, dtype=dtype), random(2, 11, width, dtype=dtype)
    upstream = random(3, 33, width, dtype=dtype)
    leaves = wide(images, captions)
    true = (leaves[0][:, None] - leaves[1]).square().flatten(0, 1)
    of_images, of_captions = torch.autograd.grad(true, leaves, upstream.double())
    squares = nan_like(upstream)
    steps.whole_squares(images, captions, squares)
    assert relative_error(squares, true.detach()) <= ROUNDED[dtype]
    for move in (torch.clone, far):
        grad_images, grad_captions = torch.ones(3, width), torch.ones(11, width)
        steps.whole_squares_backward(move(images), captions, upstream, grad_images, grad_captions)
        assert relative_error(grad_images, 1 + of_images) <= EXACT
        assert relative_error(grad_captions, 1 + of_captions) <= EXACT


def filter_of(width: int) -> Filter:
    numbers = (random(10 + i, 1).view(()) for i in range(4))
    bias, norm_weight, norm_bias, score_bias = numbers
    return Filter(random(20, width), bias, norm_weight, norm_bias, 1e-5, 3 * random(21, width), score_bias)


@pytest.mark.parametrize("width", WIDTHS)
def test_node_logits(steps: Steps, width: int) -> None:
    nodes, by = random(4, 21, width), filter_of(width)
    for move in (torch.clone, far):
        logits = nan_like(nodes[:, 0])
        steps.node_logits(move(nodes), by, logits)
        assert relative_error(logits, nodes.double() @ by.weight.double() + by.bias) <= EXACT


def filtered(
    block: PairBlock, nodes: Tensor, statistics: Tensor, by: Filter, slope: Tensor, means: Tensor | None
) -> tuple[Tensor, Tensor]:  # [G, segments], []
    """Scores, and what takes the means of the slopes off the gradient at the logits.

    The gradient at ``slope [pairs, 2]``, which is zero, is that of a shift and a scale of a pair's own.
    """
    scores, taken = [], nodes.new_zeros(())
    for pair, rows in enumerate(places(block)):
        mean, variance = statistics[:, pair % block.segments]
        z = (nodes[rows] @ by.weight + by.bias - mean) / (variance + by.eps).sqrt()
        y = z * by.norm_weight + by.norm_bias + slope[pair, 0] + slope[pair, 1] * z
        a = torch.sigmoid(y)
        pooled = a @ nodes[rows] / (a.sum() + 1e-8)
        scores.append(torch.sigmoid(by.score_weight @ pooled / (pooled.norm() + 1e-8) + by.score_bias))
        if means is not None:
            of_z = means[:, pair % block.segments]
            taken = taken + by.norm_weight * (of_z[0] * z + of_z[1] * z.square() / 2).sum()
    return torch.stack(scores).view(block.groups, -1), taken


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("width", WIDTHS)
def test_filtration(steps: Steps, width: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_steps, "RUNS", 5)  # several pairs each
    counts, extents = [*COUNTS, 40], [*PADDED, 41]  # more nodes than a warp has lanes
    block = block_of(counts, extents)
    nodes = torch.nn.functional.normalize(random(5, block.rows + block.pairs, width), dim=1)
    statistics = torch.stack([random(6, len(counts)), random(7, len(counts)).square() + 0.1])
    means = random(8, 2, len(counts)) * 1e-2 if training else None
    upstream, by = random(9, block.groups, block.segments), filter_of(width)

    leaves = wide(nodes, torch.zeros(block.pairs, 2), *by[:4], *by[5:])
    vectors, slope, weight, bias, norm_weight, norm_bias, score_weight, score_bias = leaves
    of_double = Filter(weight, bias, norm_weight, norm_bias, by.eps, score_weight, score_bias)
    true, taken = filtered(
        block, vectors, statistics.double(), of_double, slope, None if means is None else means.double()
    )
    total = (true * upstream).sum() - taken
    of_nodes, of_weight, of_bias = torch.autograd.grad(total, (vectors, weight, bias), retain_graph=True)
    of_slope, *of_score = torch.autograd.grad((true * upstream).sum(), (slope, score_weight, score_bias))

    for move in (torch.clone, far):
        given = move(poisoned(block, nodes))
        logits = nan_like(given[:, 0])
        steps.node_logits(given, by, logits)
        scores = nan_like(upstream)
        steps.filtrate_nodes(block, given, logits, statistics, by, scores)
        assert relative_error(scores, true.detach()) <= EXACT

        slopes = torch.full((block.pairs, 2), math.nan)
        none = steps.filtrate_nodes_backward(block, given, logits, statistics, by, upstream, means, slopes, None)
        assert none is None
        assert relative_error(slopes, of_slope) <= EXACT
        again, grad_nodes = nan_like(slopes), nan_like(nodes)
        sums = steps.filtrate_nodes_backward(block, given, logits, statistics, by, upstream, means, again, grad_nodes)
        assert torch.equal(again, slopes)
        assert sums is not None
        assert sums.shape == (5, 2 * width + 2)
        assert relative_error(grad_nodes, of_nodes) <= EXACT
        assert not grad_nodes[padding(block)].any()
        for mine, real in zip(
            sums.sum(0).split([width, width, 1, 1]), (of_weight, of_score[0], of_bias, of_score[1]), strict=True
        ):
            assert relative_error(mine, real.view(-1)) <= 2e-5  # small differences


def test_a_sum_of_nothing_has_no_direction(steps: Steps) -> None:
    """Nodes of zeros: the score is that of the bias, and gradients are zero but that of the bias."""
    block, by = block_of([3], [3]), filter_of(8)
    nodes, logits = torch.zeros(block.rows + block.pairs, 8), torch.zeros(block.rows + block.pairs)
    statistics, scores = torch.ones(2, 1), torch.full((GROUPS, 1), math.nan)
    steps.filtrate_nodes(block, nodes, logits, statistics, by, scores)
    torch.testing.assert_close(scores, torch.sigmoid(by.score_bias).expand(GROUPS, 1))
    slopes, grad_nodes = torch.full((block.pairs, 2), math.nan), nan_like(nodes)
    sums = steps.filtrate_nodes_backward(
        block, nodes, logits, statistics, by, torch.ones(GROUPS, 1), None, slopes, grad_nodes
    )
    assert sums is not None
    assert not slopes.any()
    assert not grad_nodes.any()
    assert not sums[:, :-1].any()
    assert sums[:, -1].all()


def attended(block: PairBlock, nodes: Tensor, asking: Tensor, shift: Tensor) -> Tensor:
    """A step of attention, pair by pair."""
    out = torch.zeros_like(asking)
    for pair, rows in enumerate(places(block)):
        asked = [pair] if asking.shape[0] == block.pairs else rows
        weights = torch.softmax((asking[asked] + shift) @ nodes[rows].t(), dim=1)
        out = out.index_put((torch.tensor(asked),), weights @ nodes[rows])
    return out


@pytest.mark.parametrize("whole_only", [False, True], ids=["all", "whole"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_among_nodes(
    steps: Steps, dtype: torch.dtype, width: int, whole_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_steps, "RUNS", 5)
    block = block_of(COUNTS, PADDED, dtype)
    n = block.pairs if whole_only else block.rows + block.pairs
    nodes = random(11, block.rows + block.pairs, width, dtype=dtype) / width**0.25
    asking, upstream = random(12, n, width, dtype=dtype) / width**0.25, random(13, n, width, dtype=dtype)
    shift, scale = random(14, width) / width**0.25, 1e-6 if dtype == torch.bfloat16 else 1.0
    upstream = upstream * scale  # gradients may be of any size
    leaves = wide(nodes, asking, shift)
    true = attended(block, *leaves)
    known = torch.zeros(n, dtype=torch.bool) if whole_only else padding(block)
    of_nodes, of_asking, of_shift = torch.autograd.grad(
        true, leaves, upstream.double().masked_fill(known[:, None], 0.0)
    )

    for move in (torch.clone, far):
        given = move(poisoned(block, nodes))
        asks, grad = (tensor if whole_only else poisoned(block, tensor) for tensor in (asking, upstream))
        gathered = nan_like(asking)
        steps.graph_attend(block, given, asks, shift, gathered)
        assert relative_error(gathered, true.detach()) <= ROUNDED[dtype]
        assert not gathered[known].any()
        of_asks, grad_nodes = asks.clone(), nan_like(nodes, torch.float32)
        sums = steps.graph_attend_backward(block, given, shift, grad, of_asks, grad_nodes)
        assert sums.shape == (5, width)
        assert relative_error(of_asks, of_asking) <= 2 * ROUNDED[dtype]
        assert not of_asks[known].any()
        assert not grad_nodes[padding(block)].any()
        # Weights in two parts of bfloat16 hold 16 bits; three products of tf32 hold 21.
        bound = EXACT if dtype == torch.float32 else 1e-5
        assert relative_error(grad_nodes, of_nodes) <= bound
        assert relative_error(sums.sum(0), of_shift) <= bound


def test_logits_beyond_half_precision(steps: Steps) -> None:
    """float16 ends at 65,504, products of its numbers do not."""
    block = block_of([2], [2], torch.float16)
    nodes = torch.zeros(block.rows + block.pairs, 16, dtype=torch.float16)
    nodes[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * 1000
    asking, gathered = torch.full_like(nodes, 6e4), nan_like(nodes)
    steps.graph_attend(block, nodes, asking, torch.zeros(16), gathered)
    largest = [max(nodes[rows, 0].tolist()) for rows in places(block)]
    for rows, expected in zip(places(block), largest, strict=True):
        assert (gathered[rows, 0] == expected).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_rows(steps: Steps, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_steps, "PARTS", 3)
    before, bias, grad = random(15, 143, width, dtype=dtype), random(16, width), random(17, 143, width)
    true = torch.relu(before.double() + bias)
    for move in (torch.clone, far):
        rows, unrounded = move(before), nan_like(before, torch.float32)
        steps.relu_rows(rows, bias, None)
        again = move(before)
        steps.relu_rows(again, bias, unrounded)
        assert torch.equal(rows, again)
        assert torch.equal(rows, unrounded.to(dtype))
        assert relative_error(unrounded, true) <= EXACT
        expected = grad.masked_fill(rows == 0, 0.0)
        sums = steps.relu_rows_backward(grad, rows)
        assert torch.equal(rows, expected.to(dtype))
        assert sums.shape == (3, width)
        assert relative_error(sums.sum(0), expected.double().sum(0)) <= EXACT


def test_relu_passes_nan_on(steps: Steps) -> None:
    rows = torch.tensor([[math.nan, -1.0, 1.0]])
    steps.relu_rows(rows, torch.zeros(3), None)
    assert rows[0].isnan().tolist() == [True, False, False]


def test_pairs_that_are_too_large_are_refused(steps: Steps) -> None:
    block = block_of([1], [900])
    nodes, shift = torch.zeros(block.rows + block.pairs, 8), torch.zeros(8)
    asking, grad = torch.zeros_like(nodes), torch.zeros_like(nodes)
    with pytest.raises(RuntimeError, match=r"pairs of 901 nodes take \d+ bytes of shared memory"):
        steps.graph_attend_backward(block, nodes, shift, grad, asking, torch.zeros_like(nodes))
