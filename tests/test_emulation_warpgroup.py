"""The emulator's warpgroup products, mbarriers and bulk copies against known answers, and mistakes it has to report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import emulated

if emulated.why_not() is not None:
    pytest.skip(str(emulated.why_not()), allow_module_level=True)


@pytest.fixture(scope="module")
def words() -> Any:
    torch.ops.load_library(emulated.build("warpgroup_answers", [emulated.EMULATOR / "warpgroup_answers.cu"]))
    return torch.ops.itm_warpgroup_test


def swizzled(matrix: torch.Tensor) -> torch.Tensor:  # [rows, 64] of two bytes
    """In the order of shared memory (PTX manual, K-major, 128-byte swizzle): 8 x 8 pieces of 16 bytes, each turned."""
    pieces = matrix.view(torch.int16).numpy().reshape(-1, 8, 8, 8)  # [patterns, row, piece, element]
    turned = np.empty_like(pieces)
    for row in range(8):
        for piece in range(8):
            turned[:, row, piece ^ row] = pieces[:, row, piece]
    return torch.from_numpy(turned.reshape(matrix.shape))


def product(words: Any, dtype: torch.dtype, *, waits: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(n, 64, generator=generator).to(dtype) for n in (64, 144))
    out, descriptors = torch.zeros(128, 72), torch.zeros(4, dtype=torch.int64)
    words.product(swizzled(left), swizzled(right), dtype == torch.float16, waits, out, descriptors)
    return left, right, out, descriptors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_of_a_warpgroup(words: Any, dtype: torch.dtype) -> None:
    left, right, out, _ = product(words, dtype)
    expected = (left.double() @ right.double().T).numpy()
    # PTX manual, accumulator of m64nN: warp, group and place in it of every thread, written out.
    thread, number = np.arange(128)[:, None], np.arange(72)[None]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (number // 2 % 2)
    column = 8 * (number // 4) + 2 * (thread % 4) + number % 2
    np.testing.assert_allclose(out.numpy(), expected[row, column], rtol=0, atol=2e-5)


def test_descriptors(words: Any) -> None:
    _, _, _, found = product(words, torch.float16)
    for address, descriptor in found.view(2, 2).tolist():
        fields = {(0, 14): address // 16, (32, 14): 1024 // 16, (49, 3): 0, (62, 2): 1}
        assert address % 1024 == 0
        for (first, size), value in fields.items():
            assert descriptor >> first & (1 << size) - 1 == value


def test_sums_are_garbage_until_they_were_waited_for(words: Any) -> None:
    _, _, out, _ = product(words, torch.float16, waits=False)
    assert out.isnan().all()


@pytest.mark.parametrize("slices", [1, 2, 7])
def test_slices_through_a_ring_of_stages(words: Any, slices: int) -> None:
    values = torch.randint(0, 9, (slices, 32), dtype=torch.int32)
    expected = torch.zeros(32, dtype=torch.int32)
    for row in values:
        expected = expected * 3 + row
    out = torch.zeros(2, 32, dtype=torch.int32)
    words.ring(values, out)
    assert torch.equal(out, expected.expand(2, 32))


def test_a_barrier_of_some_warps(words: Any) -> None:
    values = torch.arange(64, dtype=torch.int32)
    out = torch.zeros(2, 64, dtype=torch.int32)
    words.some(values, True, out)
    assert torch.equal(out, values.roll(32).expand(2, 64))
    words.some(values, False, out)
    assert (out == -1).any()


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        (0, "mbarrier that was not initialised"),
        (1, r"wait for ever, .*warpgroup_answers.cu:\d+"),
        (2, "more arrivals at an mbarrier"),
        (3, "copy_bulk: address not aligned"),
        (4, r"wait for ever, .*warpgroup_answers.cu:\d+"),
        (5, "only operands with the 128-byte swizzle"),
    ],
)
def test_mistakes_are_reported(words: Any, kind: int, report: str) -> None:
    with pytest.raises(RuntimeError, match=report):
        words.mistake(kind)
    product(words, torch.float16)  # the next launch is not disturbed
