"""Tiles and blocks of ``max_similarity_scores`` in Triton; its kernels run in ``tests/interpreter``."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from benchmarks.cases import word_counts
from helpers import Place
from itm_kernels.triton import maxima_plan

OP = "max_similarity_scores"


def test_triton_says_where_it_does_not_run() -> None:
    assert "float64" in str(Place("triton").why_not(OP, torch.float64))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_key_columns_are_useful(arch: str, element_bytes: int) -> None:
    for groups in (32, 128, 1024):
        assert maxima_plan.useful_keys([36] * groups, element_bytes, arch) == 1.0
        assert maxima_plan.useful_keys([49] * groups, element_bytes, arch) == pytest.approx(49 / 52)
    # Captions as keys are ragged: slots walk several, dealt so that they end together.
    for captions in (128, 200, 512, 1000, 1024, 8192):
        assert maxima_plan.useful_keys(word_counts(captions), element_bytes, arch) >= 0.9
    assert maxima_plan.useful_keys([], element_bytes, arch) == 1.0
    assert maxima_plan.useful_keys([1], element_bytes, arch) < 0.1


@pytest.mark.parametrize("groups", [1, 31, 32, 33, 159, 160, 161, 319, 320, 1000])
def test_every_group_is_dealt_once(groups: int) -> None:
    for counts in ([7] * groups, [1 + n % 5 for n in range(groups)]):
        deal = maxima_plan.deal(counts, 32)
        bundles = [deal.bundle(number, groups) for number in range(deal.bundles)]
        assert (bundles[0][0], bundles[-1][1]) == (0, groups)
        assert all(one[1] == other[0] for one, other in pairwise(bundles))
        assert all(0 < last - first <= deal.most for first, last in bundles)


@pytest.mark.parametrize("t2i", [True, False], ids=["t2i", "i2t"])
@pytest.mark.parametrize("phase", ["forward", "backward", "backward, kept"])
def test_blocks_stay_in_the_bound_and_cover_the_batch(phase: str, t2i: bool) -> None:
    for batch in (128, 8192, 65536):
        shape = maxima_plan.MaximaShape(
            width=1024, element_bytes=2, t2i=t2i, backward=phase != "forward", arg_max_kept=phase == "backward, kept",
            copies_regions=False, copies_words=True, direct_regions=True, direct_words=False,
            workspace_bytes=256 << 20,
        )  # fmt: skip
        bounds = [[n * k for n in range(batch + 1)] for k in (36, 14)]
        images, captions, used = maxima_plan.choose_blocks(bounds[0], bounds[1], shape)
        assert 0 < used <= 256 << 20
        for blocks in (images, captions):
            assert (blocks[0][0], blocks[-1][1]) == (0, batch)
            assert all(one[1] == other[0] for one, other in pairwise(blocks))
        blocks_in_all = len(images) * len(captions)
        for linear in (True, False):
            most = 8 + (10 if shape.backward else 6) * blocks_in_all
            assert 0 < maxima_plan.launches(shape, linear, blocks_in_all) <= most
