"""``max_similarity_scores`` in Triton's interpreter, against the definition; run by ``test_interpreter.py``.

Odd sizes: bundles of groups, tiles of queries and slices of the width all end in the middle, and 9 or 6 keys leave a
step of four unfinished.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from golden import FOLDER, golden_batch, golden_result, published_options
from helpers import Batch, Result, assert_ladder, label, random_batch
from itm_kernels.compat.chan import AGG_FUNCS
from itm_kernels.pair_blocks import rows
from similarity import arguments, every_option, gradients, run, truth

SIZES: dict[str, Any] = {"images": 3, "captions": 4, "regions": 9, "words": 6, "width": 40}
CASES = every_option()


def check(batch: Batch, options: dict[str, Any], *, noise: bool = True, **more: Any) -> None:
    peer, true = run(batch, "eager", **options), truth(batch, **options)
    assert_ladder(run(batch, "triton", **more, **options), peer, true, options, noise=noise)


@pytest.mark.parametrize("options", CASES, ids=label)
def test_every_option(options: dict[str, Any]) -> None:
    form = CASES.index(options)
    batch = random_batch(271, region_counts=form % 2 == 1, **SIZES)
    check(batch.packed() if form % 3 else batch, options)


@pytest.mark.parametrize("case", sorted(path.stem for path in FOLDER.glob("chan_*.npz")))
def test_golden_vectors(case: str) -> None:
    published = published_options(case)
    options = {"agg_func": AGG_FUNCS[published["pooling"]], "lambda_lse": 1 / published["belta"]}
    # The published log-sum-exp is not divided by its lambda.
    factor = 1 / published["belta"] if published["pooling"] == "LSEPooling" else 1.0
    golden = Result(*(tensor.double() / factor for tensor in golden_result(case)))
    batch = golden_batch(torch.float32)
    assert_ladder(run(batch, "triton", **options), run(batch, "eager", **options), golden, options)


def test_slots_that_walk_several_captions() -> None:
    """More bundles than one, uneven, of captions of one word to many; slots that get nothing."""
    for seed, captions in ((283, 90), (284, 3)):
        counts = [1 + (n * n) % 13 for n in range(captions)]
        batch = random_batch(seed, images=2, captions=captions, regions=3, words=13, width=16, word_counts=counts)
        check(batch.packed(), {"direction": "i2t", "agg_func": "LogSumExp"})


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_blocks_of_one_image_and_one_caption(direction: str) -> None:
    batch = random_batch(272, region_counts=True, **SIZES)
    check(batch, {"direction": direction, "agg_func": "Softmax"}, workspace_bytes=1)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_more_than_a_bundle_a_tile_and_a_slice(direction: str) -> None:
    batch = random_batch(273, images=35, captions=34, regions=3, words=4, width=70)
    check(batch, {"direction": direction, "agg_func": "LogSumExp"})


@pytest.mark.parametrize("options", CASES[::2], ids=label)
def test_a_kept_arg_max_changes_nothing(options: dict[str, Any]) -> None:
    batch = random_batch(274, region_counts=True, **SIZES)
    kept, again = (gradients(batch, "triton", options, kept=way) for way in (True, False))
    for mine, its in zip(kept, again, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_of_equal_maxima_the_first_is_taken(options: dict[str, Any]) -> None:
    batch = random_batch(275, **SIZES | {"regions": 8}, word_counts=[6, 4, 2, 6])
    regions, words = batch.regions.clone(), batch.words.clone()
    regions[:, 1::2], words[:, 1::2] = regions[:, ::2], words[:, ::2]
    check(dataclasses.replace(batch, regions=regions, words=words), options)


@pytest.mark.parametrize("options", CASES, ids=label)
def test_a_nan_travels_to_its_scores_alone(options: dict[str, Any]) -> None:
    batch = random_batch(276, **SIZES)
    regions, words = batch.regions.clone(), batch.words.clone()
    regions[1, 0, 3] = words[2, 0, 5] = torch.nan
    found = run(dataclasses.replace(batch, regions=regions, words=words), "triton", **options).scores
    assert found[1].isnan().all()
    assert found[:, 2].isnan().all()
    assert found.isnan().sum() == 4 + 3 - 1


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("workspace_bytes", [1 << 24, 1], ids=["kept", "again"])
@pytest.mark.parametrize("options", CASES[::3], ids=label)
def test_counts_that_are_never_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], workspace_bytes: int
) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    batch = random_batch(281, region_counts=True, **SIZES)
    true, peer = truth(batch, **options), run(batch, "eager", **options)
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    assert_ladder(run(batch, "triton", workspace_bytes=workspace_bytes, **options), peer, true, options)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_opcheck(direction: str) -> None:
    batch = random_batch(282, images=2, captions=3, regions=5, words=4, width=16)
    batch = dataclasses.replace(batch, words=batch.words.nan_to_num())
    inputs = arguments(batch, "triton", {"direction": direction, "agg_func": "Softmax"})
    torch.library.opcheck(torch.ops.itm_kernels.max_similarity_scores.default, (*inputs, True))
    _, arg_max = torch.ops.itm_kernels.max_similarity_scores(*inputs, True)
    torch.library.opcheck(
        torch.ops.itm_kernels.max_similarity_scores_backward.default, (batch.grad_scores.float(), arg_max, *inputs)
    )


def test_more_keys_than_a_byte_counts() -> None:
    batch = random_batch(277, images=1, captions=2, regions=258, words=3, width=16)
    check(batch, {"direction": "t2i", "agg_func": "LogSumExp"})


def test_one_key() -> None:
    check(random_batch(278, images=2, captions=2, regions=1, words=1, width=16), {"direction": "t2i"})


def test_half_precision() -> None:
    batch = random_batch(279, images=40, captions=30, regions=5, words=3, width=16, dtype=torch.float16)
    check(batch, {"direction": "t2i", "agg_func": "LogSumExp"}, noise=False)


def test_views_that_are_not_contiguous() -> None:
    batch = random_batch(280, region_counts=True, **SIZES)
    turned = dataclasses.replace(
        batch,
        regions=batch.regions.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        words=batch.words.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for mine, its in zip(run(batch, "triton"), run(turned, "triton"), strict=True):
        assert torch.equal(mine, its)
