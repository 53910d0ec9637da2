"""What only a GPU can show of the score ops: CUDA graphs, memory by the device's allocator, the current stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import random_batch
from itm_kernels import caption_layout, cross_attention_scores, max_similarity_scores, plan, regulated_scores, why_not
from models import Case, model_batch

pytestmark = pytest.mark.gpu


def rcar(regions: Tensor, words: Tensor, counts: Any, **options: Any) -> Tensor:
    """``regulated_scores`` with parameters of its own, dropout on."""
    case = Case("regulated_scores", {"direction": "t2i", "regulator": "rcar", "steps": 2, "dropout": 0.4, "seed": 3})
    made = model_batch(case, 402, similarity=64, images=1, captions=1, width=regions.shape[2]).parameters
    parameters = made.of([None if p is None else p.to(regions) for p in made.flat()])
    return regulated_scores(regions, words, counts, parameters, **case.options, **options)


OPS = {
    "cross_attention_scores": cross_attention_scores,
    "max_similarity_scores": max_similarity_scores,
    "regulated_scores": rcar,
}
MIB = 2**20
# The library's own workspace comes from the same allocator, once a stream.
LIBRARY_BYTES = 64 * MIB


@pytest.fixture(params=[(op, floor) for op in OPS for floor in ("native", "triton")], ids="-".join)
def score_of(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """An op forced onto a floor that has kernels."""
    op, floor = request.param
    reason = why_not(floor, op, "cuda", torch.bfloat16)
    if reason is not None:
        pytest.skip(f"{op} on {floor}: {reason}")
    return lambda *args, **options: OPS[op](*args, backend=floor, **options)


def inputs(dtype: torch.dtype, **sizes: Any) -> tuple[Tensor, Tensor, list[int]]:
    batch = random_batch(401, dtype=dtype, **sizes)
    return batch.regions.cuda(), batch.words.nan_to_num().cuda(), batch.word_counts


def step(score: Callable[..., Tensor], regions: Tensor, words: Tensor, counts: Any, **options: Any) -> list[Tensor]:
    regions, words = regions.detach().requires_grad_(), words.detach().requires_grad_()
    scores = score(regions, words, counts, **options)
    return [scores.detach(), *torch.autograd.grad(scores, (regions, words), torch.ones_like(scores))]


def test_a_cuda_graph_replays_on_new_values(score_of: Callable[..., Tensor]) -> None:
    regions, words, counts = inputs(torch.bfloat16, images=9, captions=12, regions=36, words=14, width=64)
    layout = caption_layout(counts, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: handles, compiled kernels
        for _ in range(2):
            step(score_of, regions, words, layout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(score_of, regions, words, layout)
    regions.copy_(torch.nn.functional.normalize(torch.randn_like(regions), dim=-1))
    graph.replay()
    torch.cuda.synchronize()
    for mine, fresh in zip(captured, step(score_of, regions, words, layout), strict=True):
        assert torch.equal(mine, fresh)


def test_host_counts_are_refused_while_a_graph_is_captured() -> None:
    """The copy would read host memory again at every replay."""
    reason = why_not("native", "cross_attention_scores", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    regions, words, counts = inputs(torch.float32, images=3, captions=4, regions=5, words=6, width=32)
    cross_attention_scores(regions, words, counts, backend="native")
    with pytest.raises(RuntimeError, match="CaptionLayout"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cross_attention_scores(regions, words, counts, backend="native")
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_within_the_bound(score_of: Callable[..., Tensor], dtype: torch.dtype) -> None:
    bound = 64 * MIB
    regions, words, counts = inputs(dtype, images=600, captions=600, regions=36, words=20, width=256)
    step(score_of, regions, words, counts, workspace_bytes=bound)  # warm up
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(score_of, regions, words, counts, workspace_bytes=bound)
    torch.cuda.synchronize()
    wide = 4 if dtype != torch.float32 else 0  # float32 accumulators of half-precision gradients count as gradients
    gradients = (regions.numel() + words.numel()) * (dtype.itemsize + wide)
    saved = regions.shape[0] * words.shape[0] * words.shape[1]  # an arg-max, where it fits
    scores = 3 * 4 * regions.shape[0] * words.shape[0]
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= bound + gradients + saved + scores + LIBRARY_BYTES


def test_runs_on_the_current_stream(score_of: Callable[..., Tensor]) -> None:
    """Inputs made late on another stream: an op that ran elsewhere would read them too early."""
    regions, words, counts = inputs(torch.float32, images=8, captions=8, regions=36, words=14, width=64)
    expected = step(score_of, regions, words, counts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(regions)
        torch.cuda._sleep(50_000_000)
        late.copy_(regions)
        got = step(score_of, late, words, counts)
    torch.cuda.current_stream().wait_stream(stream)
    for mine, real in zip(got, expected, strict=True):
        assert torch.equal(mine, real)


def test_the_plan_is_for_this_gpu() -> None:
    made = plan("cross_attention_scores", 8, 8, 36, [9] * 8, 64, device="cuda")
    major, minor = torch.cuda.get_device_capability()
    assert f"sm_{major}{minor}" in made.reason
