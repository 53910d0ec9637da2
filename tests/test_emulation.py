"""The emulator of CUDA kernels against known answers, and the mistakes it has to report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emulated
from includes import contents, files_of

if emulated.why_not() is not None:
    pytest.skip(str(emulated.why_not()), allow_module_level=True)

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4


@pytest.fixture(scope="module")
def words() -> Any:
    torch.ops.load_library(emulated.build("known_answers", [emulated.EMULATOR / "known_answers.cu"]))
    return torch.ops.itm_emulation_test


def pairs(bits: np.ndarray) -> np.ndarray:
    """[..., 2] uint16 -> [...] uint32, the first in the low half."""
    return bits[..., 0].astype(np.uint32) | bits[..., 1].astype(np.uint32) << np.uint32(16)


def to_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_of_two_bytes(words: Any, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b = (torch.from_numpy(x).to(dtype).float().numpy() for x in (a, b))
    # PTX manual, figures of m16n8k16: rows and columns that a lane holds, written out.
    registers = np.zeros((32, 10), np.uint32)
    for register, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
        columns = IN_GROUP[:, None] * 2 + [[column, column + 1]]
        registers[:, register] = pairs(to_bits(a[(GROUP + row)[:, None], columns], dtype))
    for register, row in enumerate([0, 8]):
        rows = IN_GROUP[:, None] * 2 + [[row, row + 1]]
        registers[:, 4 + register] = pairs(to_bits(b[rows, GROUP[:, None]], dtype))
    places = [(0, 0), (0, 1), (8, 0), (8, 1)]
    for register, (row, column) in enumerate(places):
        registers[:, 6 + register] = c[GROUP + row, 2 * IN_GROUP + column].view(np.uint32)

    out = torch.full((32, 4), torch.nan)
    words.mma(torch.from_numpy(registers.view(np.int32)), 0 if dtype == torch.float16 else 1, out)
    product = a.astype(np.float64) @ b.astype(np.float64) + c
    for register, (row, column) in enumerate(places):
        expected = product[GROUP + row, 2 * IN_GROUP + column]
        np.testing.assert_allclose(out[:, register].numpy(), expected, rtol=0, atol=1e-5)


def test_mma_of_tf32_ignores_the_low_bits(words: Any) -> None:
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    registers = np.zeros((32, 10), np.uint32)
    for register, (row, column) in enumerate([(0, 0), (8, 0), (0, 4), (8, 4)]):
        registers[:, register] = a[GROUP + row, IN_GROUP + column].view(np.uint32)
    for register, row in enumerate([0, 4]):
        registers[:, 4 + register] = b[IN_GROUP + row, GROUP].view(np.uint32)
    places = [(0, 0), (0, 1), (8, 0), (8, 1)]
    for register, (row, column) in enumerate(places):
        registers[:, 6 + register] = c[GROUP + row, 2 * IN_GROUP + column].view(np.uint32)

    out = torch.full((32, 4), torch.nan)
    words.mma(torch.from_numpy(registers.view(np.int32)), 2, out)
    cut_a, cut_b = ((x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for x in (a, b))
    product = cut_a @ cut_b + c
    assert np.abs(product - (a.astype(np.float64) @ b + c)).max() > 1e-4, "the cut has to show"
    for register, (row, column) in enumerate(places):
        expected = product[GROUP + row, 2 * IN_GROUP + column]
        np.testing.assert_allclose(out[:, register].numpy(), expected, rtol=0, atol=1e-5)


def test_matrix_words(words: Any) -> None:
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8) * np.uint16(255)
    out = torch.zeros(32, 11, dtype=torch.int32)
    words.matrices(torch.from_numpy(matrices.reshape(-1).view(np.int32).copy()), out)
    got = out.numpy().view(np.uint32)
    columns = IN_GROUP[:, None] * 2 + [[0, 1]]
    for number in range(4):
        matrix = matrices[number]
        np.testing.assert_array_equal(got[:, number], pairs(matrix[GROUP[:, None], columns]))
        np.testing.assert_array_equal(got[:, 4 + number], pairs(matrix.T[GROUP[:, None], columns]))
    for number in range(2):
        np.testing.assert_array_equal(got[:, 8 + number], pairs(matrices[number].T[GROUP[:, None], columns]))
    np.testing.assert_array_equal(got[:, 10], pairs(matrices[3].T[GROUP[:, None], columns]))


def test_shuffles(words: Any) -> None:
    values = np.random.default_rng(3).permutation(32).astype(np.int32)
    out = torch.zeros(32, 12, dtype=torch.int32)
    words.shuffles(torch.from_numpy(values), out)
    got = out.numpy().T
    segment = LANES // 8 * 8
    np.testing.assert_array_equal(got[0], values[5])
    np.testing.assert_array_equal(got[1], values[segment + 1])
    np.testing.assert_array_equal(got[2], values[LANES ^ 3])
    # A lane of a later segment is out of reach, one of an earlier segment is not.
    np.testing.assert_array_equal(got[3], values[np.where(LANES ^ 8 < LANES, LANES ^ 8, LANES)])
    np.testing.assert_array_equal(got[4], values[np.where(LANES < 2, LANES, LANES - 2)])
    np.testing.assert_array_equal(got[5], values[np.where(LANES % 16 + 3 < 16, (LANES + 3) % 32, LANES)])
    np.testing.assert_array_equal(
        got[6].view(np.uint32), np.uint32(sum(1 << i for i in range(32) if values[i] % 3 == 0))
    )
    np.testing.assert_array_equal(got[7], 1)
    quads = values.reshape(8, 4)
    np.testing.assert_array_equal(got[8], quads.sum(1).repeat(4))
    np.testing.assert_array_equal(got[9], quads.max(1).repeat(4))
    np.testing.assert_array_equal(got[10], values.sum())
    np.testing.assert_array_equal(got[11], 31)


def hard_values() -> torch.Tensor:
    """Ties, denormals, overflows, infinities and random bits."""
    ties = [1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11 + 2**-20, -(1 + 2**-12)]
    edges = [0.0, -0.0, 65519.0, 65520.0, -7e4, 2**-24, 2**-25, 1.5 * 2**-25, 6e-5, 2**-14, 3e38, torch.inf, -torch.inf]
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(4)).to(torch.int32)
    drawn = bits.view(torch.float32)
    return torch.cat([torch.tensor(ties + edges), drawn[drawn.isfinite()], torch.randn(999)])


def test_conversions_round_as_torch_does(words: Any) -> None:
    values = hard_values()
    out = torch.zeros(len(values), 5, dtype=torch.int32)
    words.conversions(values, out)
    half, bfloat = (values.to(dtype).view(torch.int16).int() & 0xFFFF for dtype in (torch.float16, torch.bfloat16))
    assert torch.equal(out[:, 0], half)
    assert torch.equal(out[:, 1], bfloat)
    assert torch.equal(out[:, 3], half | half.roll(-1) << 16)
    assert torch.equal(out[:, 4], bfloat | bfloat.roll(-1) << 16)
    # The same through integers: half of the last place is added, what is below cut off, so ties leave zero.
    bits = values.numpy().view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    np.testing.assert_array_equal(out[:, 2].numpy().view(np.uint32), rounded)


def test_conversions_keep_nan(words: Any) -> None:
    out = torch.zeros(2, 5, dtype=torch.int32)
    words.conversions(torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32), out)
    assert out[:, 0].to(torch.int16).view(torch.float16).isnan().all()
    assert out[:, 1].to(torch.int16).view(torch.bfloat16).isnan().all()
    assert out[:, 2].contiguous().view(torch.float32).isnan().all()


def test_widening_of_every_number(words: Any) -> None:
    bits = torch.arange(2**16, dtype=torch.int32)
    out = torch.zeros(len(bits), 2)
    words.widening(bits, out)
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        torch.testing.assert_close(
            out[:, column], bits.to(torch.int16).view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )


def test_block_reduction(words: Any) -> None:
    rows = torch.randn(3, 1000, dtype=torch.float64)
    out = torch.full((3,), torch.nan)
    words.row_sums(rows.float(), True, out)
    torch.testing.assert_close(out, rows.sum(1).float(), rtol=0, atol=1e-3)


def test_a_forgotten_barrier_shows_as_nan(words: Any) -> None:
    out = torch.zeros(2)
    words.row_sums(torch.ones(2, 1000), False, out)
    assert out.isnan().any()


def test_no_rows_launch_nothing(words: Any) -> None:
    words.row_sums(torch.ones(0, 1000), True, torch.zeros(0))


def test_copies_arrive_when_they_were_waited_for(words: Any) -> None:
    values = torch.randn(64, 4)
    expected = values.clone()
    expected[33::2] = 0
    out = torch.zeros(64, 4)
    words.copies(values, 0, out)
    assert torch.equal(out, expected)
    words.copies(values, 1, out)
    assert torch.equal(out[:32], expected[:32])
    assert out[32:].isnan().all()


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        (0, "meet at different words: __shfl_xor_sync"),
        (1, "wait at different words: one is here, others at __shfl_xor_sync|different words: __syncthreads"),
        (2, "have returned before __shfl_xor_sync|returns while others of its warp wait at __shfl_xor_sync"),
        (3, "returned before __syncthreads|returns while others of its block wait at __syncthreads"),
        (4, "past the 256 bytes of dynamic shared memory"),
        (5, "below dynamic shared memory"),
        (6, "mask that is not the whole warp"),
        (7, "copy_async_16: address not aligned"),
        (10, r"not aligned to its type at .*known_answers.cu:\d+"),
        (11, r"outside its array at .*known_answers.cu:\d+"),
    ],
)
def test_mistakes_are_reported(words: Any, kind: int, report: str) -> None:
    with pytest.raises(RuntimeError, match=report):
        words.mistake(kind, torch.zeros(64))
    # and the next launch is not disturbed
    out = torch.zeros(64)
    words.mistake(9, out)
    assert (out == 1).all()


def test_shared_memory_starts_as_nan(words: Any) -> None:
    out = torch.zeros(64)
    words.mistake(8, out)
    assert out.isnan().all()


def test_the_library_has_every_schema_beside_the_product() -> None:
    library = emulated.library()
    declared = re.findall(r'm\.def\(\s*"(\w+)\(', (emulated.CSRC / "library.cpp").read_text())
    assert declared
    for name in declared:
        assert hasattr(library, name)


def test_a_build_depends_on_every_header_it_includes(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "a.cu").write_text('#include <vector>\n#include "b.cuh"\n#include "not_there.h"\n')
    (tmp_path / "b.cuh").write_text('  #  include "c.h"\n#include "b.cuh"\n')
    (tmp_path / "words" / "c.h").write_text("// c\n")
    (tmp_path / "unrelated.h").write_text("// unrelated\n")
    found = files_of(tmp_path / "a.cu", [tmp_path / "words"])
    assert [path.name for path in found] == ["a.cu", "b.cuh", "c.h"]
    before = contents(tmp_path / "a.cu", [tmp_path / "words"])
    (tmp_path / "words" / "c.h").write_text("// changed\n")
    assert contents(tmp_path / "a.cu", [tmp_path / "words"]) != before
