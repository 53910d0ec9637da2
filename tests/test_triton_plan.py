"""Plans of the Triton floor: pure arithmetic, so every size can be asked for. And why the floor may not run."""

from __future__ import annotations

import itertools
import json
import random
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from itm_kernels import triton as floor
from itm_kernels.ops.options import ScoreOptions
from itm_kernels.triton import cross_attention_scores as scores
from itm_kernels.triton import fused_plan, tiles
from itm_kernels.triton.configurations import known, table

HISTOGRAM = json.loads((Path(__file__).parents[1] / "benchmarks" / "caption_lengths.json").read_text())
MIB = 1 << 20
ARCH = "sm_90"


def drawn_counts(captions: int) -> list[int]:
    """Word counts from the histogram of real captions."""
    lengths = [int(length) for length in HISTOGRAM]
    return random.Random(7).choices(lengths, list(HISTOGRAM.values()), k=captions)


def planned(images: int, counts: list[int], *, regions: int = 36, **options: Any) -> tiles.ScorePlan:
    chosen = {"direction": "t2i", "backward": False, "workspace_bytes": 256 * MIB, "element_bytes": 2} | options
    direction, norm = chosen.pop("direction"), chosen.pop("norm", "clipped_l2norm")
    return tiles.plan_scores(
        [regions * i for i in range(images + 1)],
        list(accumulate(counts, initial=0)),
        1024,
        options=ScoreOptions(direction, norm, 9.0, "LogSumExp", 6.0, "none", 0.0),
        **{"arch": ARCH, **chosen},
    )


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("batch", [1, 32, 128, 1024, 8192, 65536])
def test_any_batch_stays_within_the_bound(batch: int, backward: bool, direction: str) -> None:
    counts = drawn_counts(batch)
    plan = planned(batch, counts, backward=backward, direction=direction)
    assert plan.workspace_bytes <= 256 * MIB
    assert plan.image_bounds[0] == plan.caption_bounds[0] == 0
    assert plan.image_bounds[-1] == plan.caption_bounds[-1] == batch
    assert list(plan.image_bounds) == sorted(set(plan.image_bounds))
    assert list(plan.caption_bounds) == sorted(set(plan.caption_bounds))
    assert plan.flops == (3 if backward else 1) * 2 * batch * 36 * sum(counts) * 1024
    assert plan.useful_fraction >= (0.9 if batch >= 128 else 0.8 if batch >= 32 else 0.0)


@pytest.mark.parametrize("copies", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("batch", [32, 128, 1024, 8192, 65536])
def test_launches_grow_with_blocks_alone(batch: int, backward: bool, direction: str, copies: bool) -> None:
    """As `test_triton_launches` counts them."""
    for arch, element_bytes in itertools.product(("sm_80", "sm_90"), (2, 4)):
        plan = planned(
            batch, drawn_counts(batch), backward=backward, direction=direction, copies_regions=copies, arch=arch,
            element_bytes=element_bytes,
        )  # fmt: skip
        assert plan.launches <= 8 + (10 if backward else 6) * len(plan.image_blocks) * len(plan.caption_blocks)


def test_a_block_is_not_small_where_memory_is_not() -> None:
    plan = planned(8192, drawn_counts(8192), backward=True)
    rows, words = 8192 * 36, sum(drawn_counts(8192))
    assert rows * words / (len(plan.image_blocks) * len(plan.caption_blocks)) >= 2**24


def test_the_smallest_bound_is_one_pair_a_block() -> None:
    plan = planned(3, [4, 5], workspace_bytes=1)
    assert plan.image_blocks == [(0, 1), (1, 2), (2, 3)]
    assert plan.caption_blocks == [(0, 1), (1, 2)]


@pytest.mark.parametrize("keys", range(1, 577))
def test_key_columns_hold_the_keys(keys: int) -> None:
    main, rest = tiles.key_columns(keys)
    assert main + rest >= keys
    for columns in (main, rest or main):
        assert columns & (columns - 1) == 0
        assert columns >= tiles.LEAST_COLUMNS
    assert rest < main


def test_36_regions_are_not_64() -> None:
    assert tiles.key_columns(36) == (32, 16)
    assert planned(8, [5] * 8).useful_keys == 36 / 48


@pytest.mark.parametrize("arch", known())
@pytest.mark.parametrize("regions", range(1, fused_plan.MOST_REGIONS + 1))
def test_a_fused_tile_holds_its_regions(arch: str, regions: int) -> None:
    tile = fused_plan.tile(regions, arch)
    assert regions <= tile.main + tile.rest
    assert {side & (side - 1) for side in (tile.rows, tile.images, tile.main, tile.rest)} == {0}
    assert tile.rest != 4 or tile.images >= 2  # place_of takes two images at a time


def test_fused_tiles_hold_whole_captions_and_are_full() -> None:
    for captions, least in ((128, 0.85), (1024, 0.9), (8192, 0.9)):
        counts = drawn_counts(captions)
        bounds = list(accumulate(counts, initial=0))
        cuts = fused_plan.tile_bounds(bounds, 128)
        assert cuts[0] == 0
        assert cuts[-1] == captions
        for a, b in itertools.pairwise(cuts):
            assert 1 <= b - a <= fused_plan.SEGMENTS
            assert bounds[b] - bounds[a] <= 128
        assert bounds[-1] / (128 * (len(cuts) - 1)) >= least


def test_large_half_precision_forwards_are_fused() -> None:
    plan = planned(1024, drawn_counts(1024), arch="sm_80")
    assert plan.route == "triton-fused"
    assert plan.useful_fraction >= 0.9
    assert plan.workspace_bytes <= 256 * MIB
    assert plan.fused is not None
    assert plan.useful_keys == 1.0
    assert "stay on the chip" in plan.reason


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"backward": True}, "backward"),
        ({"direction": "both"}, "words as keys"),
        ({"element_bytes": 4}, "float32"),
        ({"regions": 65}, "65 regions"),
        ({"counts": [129] + [9] * 1000}, "129 words"),
        ({"counts": [8] * 48}, "do not fill"),
        ({"counts": [65] * 1000}, "of the rows"),
        ({"arch": "sm_90"}, "FLOP a byte"),
        ({"norm": "softmax"}, "softmax"),
    ],
)
def test_why_a_forward_is_not_fused(changed: dict[str, Any], why: str) -> None:
    counts = changed.pop("counts", [9] * 1000)
    plan = planned(64, counts, **{"arch": "sm_80", **changed})
    assert plan.route == "triton-blocked"
    assert plan.fused is None
    assert why in plan.reason.split("not fused: ")[1].split(";")[0]


@pytest.mark.parametrize("arch", known())
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_size_has_one_tile_on_every_architecture(arch: str, element_bytes: int) -> None:
    for kernel, keys in itertools.product(tiles.kernels(True), range(1, 600)):
        present = tiles.present_classes([3, keys], True)
        chosen = tiles.choose_tiles(kernel, [present], element_bytes, table(arch))
        mine = [main + rest for floor, main, rest in chosen.classes[0] if floor < keys <= main + rest]
        walked = 0 <= chosen.streamed[0] < keys
        assert len(mine) + walked == 1, (kernel, keys, chosen)
        assert chosen.columns(0, keys) >= keys


def test_directions_share_a_launch() -> None:
    both = tiles.choose_tiles("attend", [[48], [16, 48, tiles.BEYOND]], 2, table(ARCH))
    assert both.classes == (((32, 32, 16),), ((0, 16, 0), (32, 32, 16)))
    assert both.streamed == (-1, 80)
    one = tiles.choose_tiles("attend", [[48]], 2, table(ARCH))
    assert both.num_warps > one.num_warps


def test_unknown_counts_launch_every_class_up_to_the_padding() -> None:
    assert tiles.present_classes([36], False) == [16, 32, 48]
    assert tiles.present_classes([36], True) == [48]


def test_splits_fill_the_machine_within_their_budget() -> None:
    assert tiles.splits(100, 27, 2112) == 79
    assert tiles.splits(10, 27, 2112) == 10
    assert tiles.splits(100, 27, 2112, bytes_per_part=1 << 20, budget=64 << 20) == 2
    assert tiles.splits(100, 27, 2112, bytes_per_part=1 << 20, budget=0) == 1


@pytest.mark.parametrize(
    ("arch", "found"),
    [
        ("sm_75", "sm_80"),
        ("sm_80", "sm_80"),
        ("sm_89", "sm_86"),
        ("sm_90a", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
    ],
)
def test_an_architecture_takes_the_nearest_older_table(arch: str, found: str) -> None:
    assert table(arch).arch == found


@pytest.mark.parametrize("arch", known())
def test_tables_say_whether_they_were_tuned(arch: str) -> None:
    assert "not tuned on hardware yet" in table(arch).description


def test_the_reason_names_what_happens() -> None:
    reason = planned(8, [5] * 8, known={"t2i": True, "i2t": False}).reason
    assert "32 + 16" in reason
    assert "padding" in reason


def test_float64_is_refused_with_its_reason() -> None:
    assert "float64 runs on eager" in str(scores.why_not(torch.device("cpu"), torch.float64))


@pytest.mark.skipif(floor.load_error() is not None, reason=str(floor.load_error()))
def test_the_cpu_is_refused_outside_the_interpreter() -> None:
    assert "TRITON_INTERPRET=1" in str(scores.why_not(torch.device("cpu"), torch.float32))


def test_missing_triton_is_a_reason_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    floor.load_error.cache_clear()
    try:
        assert "pip install" in str(scores.why_not(torch.device("cuda"), torch.float32))
    finally:
        monkeypatch.undo()
        floor.load_error.cache_clear()
