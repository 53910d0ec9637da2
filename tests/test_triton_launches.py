"""Launches of the Triton floor, counted as it makes them: real shapes without their memory, kernels that do not run.

Tensors are on torch's meta device, which has shapes and no values; a launch is a Triton kernel, or an operator of torch
that is neither a view nor an allocation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import word_counts
from itm_kernels import triton as floor
from itm_kernels.ops.options import ReasoningOptions, ScoreOptions, SimilarityOptions
from itm_kernels.ops.parameters import REASONING_PARTS, SHAPES, ReasoningParameters

if floor.load_error() is not None:
    pytest.skip(str(floor.load_error()), allow_module_level=True)

from triton.runtime.jit import JITFunction

from itm_kernels.triton import cross_attention_scores, max_similarity_scores, similarity_reasoning_scores, tiles

MIB = 1 << 20
PER_BLOCK = {"forward": 6, "backward": 10}
# SGRAF, by reasoning and training: what images and captions take that attend; and what a call takes for parameters. In
# training SAF's statistics come from small operators of torch, some forty a block of captions.
PER_REASONED = {
    ("SAF", False): {"forward": 14, "backward": 43},
    ("SAF", True): {"forward": 28, "backward": 59},
    ("SGR", False): {"forward": 28, "backward": 81},
}
OF_A_CALL = 48
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        on_device = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs, out)))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        view = alias is not None and not alias.is_write
        if on_device and not view and func._schema.name.removeprefix("aten::") not in ALLOCATIONS:
            self.names.append(func._schema.name)
        return out


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Counts within the test; kernels are counted and not run."""
    counter = Launches()
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: counter.names.append(self.__name__))
    with counter:
        yield counter


class Inputs:
    """A batch of real caption lengths without its values."""

    def __init__(
        self, images: int, captions: int, form: str, dtype: torch.dtype, *, regions: int = 36, width: int = 1024
    ) -> None:
        counts = word_counts(captions)
        random.Random(7).shuffle(counts)
        self.word_counts = torch.tensor(counts)
        self.region_bounds, self.word_bounds = [regions * i for i in range(images + 1)], [0, *accumulate(counts)]
        rows = (sum(counts),) if form == "packed" else (captions, max(counts))
        self.regions = torch.empty(images, regions, width, dtype=dtype, device="meta")
        self.words = torch.empty(*rows, width, dtype=dtype, device="meta")
        self.offsets = torch.empty(captions + 1, dtype=torch.int64, device="meta")
        self.region_counts = None
        if form == "ragged":
            self.regions = torch.empty(images, 2 * regions, width, dtype=dtype, device="meta")
            self.region_counts = torch.empty(images, dtype=torch.int64, device="meta")
            self.region_bounds = [2 * bound for bound in self.region_bounds]
        self.grad_scores = torch.empty(images, captions, device="meta")

    def run(self, op: Any, phase: str, options: Any, **more: Any) -> None:
        inputs = self.regions, self.words, self.word_counts, self.region_counts, options
        upstream = () if phase == "forward" else (self.grad_scores,)
        more = {"workspace_bytes": 256 * MIB, "word_offsets": self.offsets, **more}
        getattr(op, phase)(*upstream, *inputs, **more)


def score_options(direction: str, norm: str = "clipped_l2norm") -> ScoreOptions:
    return ScoreOptions(direction, norm, 9.0, "LogSumExp", 6.0, "none", 0.0)


@pytest.mark.parametrize("form", ["padded", "packed", "ragged"])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("images", "captions"), [(128, 128), (1024, 1024), (2048, 2048), (32, 4096)])
def test_scores(
    launches: Launches, images: int, captions: int, phase: str, direction: str, form: str, monkeypatch: Any
) -> None:
    batch, plans = Inputs(images, captions, form, torch.float32), []
    planned = tiles.plan_scores
    monkeypatch.setattr(tiles, "plan_scores", lambda *a, **k: plans.append(planned(*a, **k)) or plans[-1])
    batch.run(cross_attention_scores, phase, score_options(direction))
    (plan,) = plans
    blocks = len(plan.image_blocks) * len(plan.caption_blocks)
    assert len(launches.names) <= 8 + PER_BLOCK[phase] * blocks, launches.names[:40]
    assert len(launches.names) == plan.launches
    if images >= 1024:
        assert blocks > 1


@pytest.mark.parametrize("captions", [1024, 4096])
def test_scores_with_products_on_the_chip(launches: Launches, captions: int, monkeypatch: Any) -> None:
    batch, plans = Inputs(1024, captions, "padded", torch.bfloat16), []
    planned = tiles.plan_scores
    monkeypatch.setattr(tiles, "plan_scores", lambda *a, **k: plans.append(planned(*a, **k)) or plans[-1])
    batch.run(cross_attention_scores, "forward", score_options("t2i"))
    (plan,) = plans
    assert plan.route == "triton-fused"
    assert "attend_fused" in launches.names
    blocks = len(plan.image_blocks) * len(plan.caption_blocks)
    assert len(launches.names) == plan.launches <= 8 + PER_BLOCK["forward"] * blocks


def test_a_kernel_more_is_seen(launches: Launches) -> None:
    """The counter counts: what a norm adds, and an operator of torch."""
    found = []
    for norm in ("clipped_l2norm", "no_norm"):
        launches.names.clear()
        Inputs(128, 128, "packed", torch.float32).run(cross_attention_scores, "forward", score_options("t2i", norm))
        found.append(list(launches.names))
    assert found[0] == found[1] == ["pack", "aten::mm", "prepare", "attend", "aggregate"]
    launches.names.clear()
    torch.empty(3, device="meta").t().add_(1.0)
    assert launches.names == ["aten::add_"]


@pytest.mark.parametrize("agg_func", ["Sum", "LogSumExp"])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("captions", [128, 2048])
def test_maxima(launches: Launches, captions: int, phase: str, direction: str, agg_func: str) -> None:
    batch = Inputs(captions, captions, "packed", torch.float32)
    batch.run(max_similarity_scores, phase, SimilarityOptions(direction, agg_func, 10.0))
    blocks = launches.names.count("aggregate_maxima" + "_backward" * (phase == "backward"))
    assert len(launches.names) <= 8 + PER_BLOCK[phase] * blocks, launches.names[:40]


def reasoning_parameters(options: ReasoningOptions, width: int, similarity: int) -> ReasoningParameters:
    """Without their values."""
    saf = options.reasoning == "SAF"
    tensors: list[Tensor | None] = []
    for part, steps in zip(REASONING_PARTS, (1, 1, int(saf), options.steps, 1), strict=True):
        sizes = {"steps": steps, "S": similarity, "D": width, "1": 1}
        for letters in SHAPES[part]:
            shape = [sizes[letter] for letter in letters.split()]
            tensors.append(torch.empty(shape, device="meta") if steps else None)
    return ReasoningParameters.of(tensors)


@pytest.mark.parametrize(("reasoning", "training"), PER_REASONED, ids=str)
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("captions", [128, 256])
def test_reasoning(launches: Launches, captions: int, phase: str, reasoning: str, training: bool) -> None:
    batch = Inputs(captions, captions, "packed", torch.float32)
    options = ReasoningOptions(reasoning, 3 if reasoning == "SGR" else 0, training, 1e-5)
    parameters = reasoning_parameters(options, 1024, 256)
    wholes = [torch.empty(captions, 1024, device="meta") for _ in range(2)]
    given = phase == "backward" or not training
    statistics = torch.empty(2, captions, device="meta") if reasoning == "SAF" and given else None
    upstream = () if phase == "forward" else (batch.grad_scores,)
    launches.names.clear()
    getattr(similarity_reasoning_scores, phase)(
        *upstream, batch.regions, batch.words, batch.word_counts, None, *wholes, parameters, statistics, options,
        workspace_bytes=256 * MIB, word_offsets=batch.offsets,
    )  # fmt: skip
    blocks = launches.names.count("attention_weights")
    if options.batch_statistics and phase == "backward":
        blocks //= 2  # in either pass
    assert blocks > captions // 128
    most = OF_A_CALL + PER_REASONED[reasoning, training][phase] * blocks
    assert len(launches.names) <= most, f"{len(launches.names)} in {blocks} blocks, at most {most}"
    if options.batch_statistics:  # nodes are kept between the passes
        assert launches.names.count("whole_squares") == (1 if phase == "forward" else 2) * blocks
        assert launches.names.count("normalise_rows") == 2 * blocks
