"""plan(): what it promises holds, at every size, and it is what runs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import itm_kernels
from itm_kernels import plan

LENGTHS = Path(__file__).parents[1] / "benchmarks" / "caption_lengths.json"


def word_counts(captions: int) -> list[int]:
    """Lengths drawn from the real histogram, in its proportions."""
    histogram = json.loads(LENGTHS.read_text())
    lengths = [int(length) for length, count in histogram.items() for _ in range(count)]
    generator = torch.Generator().manual_seed(captions)
    return [lengths[i] for i in torch.randint(len(lengths), (captions,), generator=generator).tolist()]


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 32, 128, 1024, 8192, 65536])
def test_invariants(batch: int, dtype: torch.dtype, direction: str) -> None:
    bound = 256 * 2**20
    for phase, base, per_block in (("forward", 8, 6), ("backward", 8, 10)):
        made = plan(
            "cross_attention_scores", batch, batch, 36, word_counts(batch), 1024, direction=direction, dtype=dtype,
            phase=phase, workspace_bytes=bound,
        )  # fmt: skip
        blocks = made.blocks[phase]
        assert blocks.images[0] == blocks.captions[0] == 0
        assert blocks.images[-1] == blocks.captions[-1] == batch
        assert made.workspace_bytes <= bound
        assert made.launches <= base + per_block * blocks.count
        assert made.useful_fraction >= (0.9 if batch >= 128 else 0.8)


def test_phases_add_up() -> None:
    both, forward, backward = (
        plan("cross_attention_scores", 64, 64, 36, word_counts(64), 256, phase=phase)
        for phase in ("forward+backward", "forward", "backward")
    )
    assert both.flops == forward.flops + backward.flops == 4 * forward.flops
    assert both.launches == forward.launches + backward.launches
    assert both.workspace_bytes == max(forward.workspace_bytes, backward.workspace_bytes)


def test_the_plan_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many epilogues run as the plan has blocks, each on the blocks it names."""
    from itm_kernels.native.cpu import cross_attention_scores as native_scores

    counts = [9, 8, 7, 5, 3, 2]
    bound = 8_000
    made = plan("cross_attention_scores", 6, 6, 7, counts, 64, phase="forward", workspace_bytes=bound)
    assert made.blocks["forward"].count > 1
    seen = []
    original = native_scores._epilogue

    def spy(products, keys, queries, options, scores, *, accumulate):
        seen.append(tuple(scores.shape))
        original(products, keys, queries, options, scores, accumulate=accumulate)

    monkeypatch.setattr(native_scores, "_epilogue", spy)
    torch.manual_seed(0)
    regions, words = torch.randn(6, 7, 64), torch.randn(6, 9, 64)
    itm_kernels.cross_attention_scores(regions, words, counts, workspace_bytes=bound, backend="native")
    images, captions = made.blocks["forward"].images, made.blocks["forward"].captions
    assert seen == [(i1 - i0, c1 - c0) for c0, c1 in pairwise(captions) for i0, i1 in pairwise(images)]


def test_padded_plan_says_so() -> None:
    made = plan("cross_attention_scores", 8, 8, 36, None, 64, W=20)
    assert "not known" in made.reason
    assert made.flops == 4 * 2 * 8 * 36 * 8 * 20 * 64


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"op": "nothing"}, ValueError, "op must be one of cross_attention_scores, max_similarity_scores"),
        ({"S": 256}, ValueError, "no similarity width S"),
        ({"phase": "sideways"}, ValueError, "phase must be one of"),
        ({"I": -1}, ValueError, "I must be at least 0"),
        ({"word_counts": None}, ValueError, "W must say the padded length"),
        ({"word_counts": [1, 2, 3]}, ValueError, r"with C = 2, got \[3\]"),
        ({"word_counts": [0, 2]}, ValueError, "at least 1, got 0 at position 0"),
        ({"direction": "up"}, ValueError, "direction must be one of"),
        ({"steps": 2}, TypeError, "no option steps"),
        ({"arch": "sm_90a"}, ValueError, "device is cpu"),
        ({"device": "meta"}, RuntimeError, "not on meta"),
        ({"device": "cuda", "arch": "sm_70"}, ValueError, "arch must be one of sm_80"),
        ({"device": "cuda", "dtype": torch.float64}, RuntimeError, "accumulate in float32"),
        ({"dtype": torch.float64}, RuntimeError, "accumulate in float32"),
    ],
)
def test_refusals(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"op": "cross_attention_scores", "I": 2, "C": 2, "R": 4, "word_counts": [3, 2], "D": 8, **change}
    with pytest.raises(error, match=words):
        plan(**arguments)
