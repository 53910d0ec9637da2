"""What can be promised of a GPU without one: plans of every op at every batch size, by arithmetic alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.cases import word_counts
from itm_kernels import plan
from itm_kernels.ops.options import ScoreOptions
from itm_kernels.planning import OPS, WITH_SIMILARITY
from itm_kernels.triton import maxima_plan, tiles

BATCHES = (32, 128, 512, 1024, 2048, 8192, 16384, 65536)
BOUND = 256 * 2**20
DIRECTIONS = {
    "cross_attention_scores": ("t2i", "i2t", "both"),
    "max_similarity_scores": ("t2i", "i2t"),
    "regulated_scores": ("t2i", "i2t"),
    "similarity_reasoning_scores": ("t2i",),
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cross_attention_scores": [{}, {"raw_feature_norm": "softmax"}],
    "max_similarity_scores": [{"agg_func": "Sum"}, {"agg_func": "LogSumExp"}],
    "regulated_scores": [{"regulator": "rcar"}, {"regulator": "rcr"}, {"regulator": "rar", "steps": 3}],
    "similarity_reasoning_scores": [{}, {"training": True}, {"reasoning": "SGR"}],
}
# Of the ops that run several stages on a block: products, attention and alignment of each step, regulators, score.
STAGES = {
    "regulator-rcar": 1 + 2 + 2 + 1 + 2 + 1,
    "regulator-rcr": 1 + 2 + 2 + 2 + 1 + 1,  # attends once more, to cosines
    "regulator-rar": 1 + 1 + 1 + 3 + 1,
    "reasoning-SAF": 1 + 1 + 2 + 1 + 1,  # words and wholes are aligned
    "reasoning-SAF-training": 2 * (1 + 1 + 2 + 1) + 1,  # twice, the first time for the statistics
    "reasoning-SGR": 1 + 1 + 2 + 3 + 1,
}
CASES = [
    pytest.param(op, direction, options, id=f"{op}-{direction}-{'-'.join(map(str, options.values())) or 'default'}")
    for op in OPS
    for direction in DIRECTIONS[op]
    for options in OPTIONS[op]
]


def stages(op: str, direction: str, options: dict[str, Any]) -> int:
    """How many stages a block goes through; scores and their like have one."""
    if op == "regulated_scores":
        # Captions as keys are padded first, and their gradients put back.
        return STAGES[f"regulator-{options['regulator']}"] + (direction == "i2t")
    if op == "similarity_reasoning_scores":
        return STAGES[f"reasoning-{options.get('reasoning', 'SAF')}{'-training' * options.get('training', False)}"]
    return 1


def made(op: str, batch: int, phase: str, **more: Any) -> Any:
    more = {"dtype": torch.bfloat16, "device": "cuda", "arch": "sm_90a", **more}
    if op in WITH_SIMILARITY:
        more = {"S": 256, **more}
    return plan(op, batch, batch, 36, word_counts(batch), 1024, phase=phase, **more)


def test_every_op_is_planned() -> None:
    assert set(OPS) == set(DIRECTIONS) == set(OPTIONS)


@pytest.mark.parametrize(("op", "direction", "options"), CASES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120"])
def test_workspace_launches_and_padding(op: str, direction: str, options: dict[str, Any], arch: str) -> None:
    for batch in BATCHES:
        for phase, per_block in (("forward", 6), ("backward", 10)):
            planned = made(op, batch, phase, direction=direction, arch=arch, **options)
            where = f"B = {batch}, {phase}"
            assert planned.workspace_bytes <= BOUND, where
            at_once = per_block * stages(op, direction, options)
            assert planned.launches <= 8 * stages(op, direction, options) + at_once * planned.blocks[phase].count, where
            assert planned.useful_fraction >= (0.9 if batch >= 128 else 0.8), where
            assert "wide" not in planned.route, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes_stay_within_the_bound(op: str, dtype: torch.dtype) -> None:
    for batch in BATCHES:
        for direction in DIRECTIONS[op]:
            planned = made(op, batch, "forward+backward", direction=direction, dtype=dtype)
            assert planned.workspace_bytes <= BOUND, f"B = {batch}, {direction}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bound", [16 * 2**20, 64 * 2**20, 1 << 30])
def test_another_bound_is_kept_too(op: str, bound: int) -> None:
    for batch in (128, 2048):
        planned = made(op, batch, "forward+backward", workspace_bytes=bound)
        assert planned.workspace_bytes <= bound


def test_flops_are_the_floor() -> None:
    product = 2 * 128 * 36 * sum(word_counts(128)) * 1024
    assert made("cross_attention_scores", 128, "forward").flops == product
    assert made("cross_attention_scores", 128, "forward+backward").flops == 4 * product
    # Hard assignment with a linear aggregation needs no products for its gradient but the two that apply it.
    assert made("max_similarity_scores", 128, "backward", agg_func="Sum").flops == 2 * product
    assert made("max_similarity_scores", 128, "backward", agg_func="LogSumExp").flops == 3 * product


def test_a_plan_needs_no_gpu_and_says_what_is_too_large_for_tiles() -> None:
    planned = plan(
        "cross_attention_scores",
        8,
        8,
        576,
        [20] * 8,
        768,
        direction="t2i",
        device="cuda",
        arch="sm_90a",
        phase="forward",
    )
    assert planned.route == "cuda-wide"
    assert "t2i forward" in planned.reason
    assert "sm_90a" in planned.reason


TRITON_BATCHES = (128, 1024, 8192)
TRITON_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize("direction", DIRECTIONS["cross_attention_scores"])
def test_tiles_of_triton_scores_are_useful(direction: str, arch: str, element_bytes: int) -> None:
    """Of the arithmetic: products without padding, and tiles of words, regions and weights with theirs."""
    for batch, backward in itertools.product(TRITON_BATCHES, (False, True)):
        planned = tiles.plan_scores(
            [36 * image for image in range(batch + 1)], [0, *itertools.accumulate(word_counts(batch))], 1024,
            options=ScoreOptions(direction, "clipped_l2norm", 9.0, "LogSumExp", 6.0, "none", 0.0),
            element_bytes=element_bytes, backward=backward, arch=arch, workspace_bytes=BOUND,
        )  # fmt: skip
        where = f"B = {batch}, {'backward' if backward else 'forward'}, {planned.route}"
        assert planned.useful_fraction >= 0.9, where
        assert planned.workspace_bytes <= BOUND, where


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("arch", TRITON_ARCHS)
@pytest.mark.parametrize("direction", DIRECTIONS["max_similarity_scores"])
def test_tiles_of_triton_maxima_are_useful(direction: str, arch: str, element_bytes: int) -> None:
    """Of the product on the chip: columns that are keys."""
    for batch in TRITON_BATCHES:
        counts = [36] * batch if direction == "t2i" else word_counts(batch)
        assert maxima_plan.useful_keys(counts, element_bytes, arch) >= 0.9, f"B = {batch}"
