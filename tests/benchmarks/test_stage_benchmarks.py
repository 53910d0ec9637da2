"""The benchmarks of the stages as ops: what is timed is what the definition says, at sizes whose outputs fit."""

from __future__ import annotations

import pytest
import torch
from bench_helpers import CPU

from benchmarks import ops, run
from benchmarks.cases import CASES
from benchmarks.contender import BOTH, FORWARD, PHASES, PRODUCT
from benchmarks.parity import ParityError, assert_parity

STAGES = [
    (op, direction) for op in ops.OPS if hasattr(ops.load(op), "LARGEST") for direction in ops.load(op).DIRECTIONS
]
stages = pytest.mark.parametrize(("op", "direction"), STAGES, ids=lambda value: str(value))


def test_they_are_all_there() -> None:
    assert {op for op, _ in STAGES} == {
        "alignment_vectors",
        "correspondence_regulator",
        "aggregation_regulator",
        "attention_filtration",
        "similarity_graph",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("floor", ["eager", "native"])
@stages
def test_floors_pass_parity(op: str, direction: str, floor: str, dtype: torch.dtype) -> None:
    workload = ops.load(op).workload(CASES["tiny"], direction, dtype, CPU)
    contender = workload.contender(floor)
    if isinstance(contender, str):
        pytest.skip(contender)
    names = [part.name for part in workload.truth()]
    assert len(names) == len(set(names)) >= 3  # the output, an input, a parameter
    for phase in PHASES:
        assert_parity(floor, contender.calls[phase](), workload.truth(), workload.tolerance)


@stages
def test_the_truth_of_a_part_is_that_of_the_whole(op: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = ops.load(op).workload(CASES["tiny"], direction, torch.float32, CPU)
    whole = workload.contender("eager").calls[FORWARD]()
    monkeypatch.setattr("benchmarks.models.PARITY_IMAGES", 3)
    monkeypatch.setattr("benchmarks.models.PARITY_CAPTIONS", 2)
    (part,) = workload.truth()
    assert part.expected.numel() < whole[0].numel()
    assert_parity("eager", whole, [part], workload.tolerance)
    with pytest.raises(ParityError):
        assert_parity("eager", [whole[0].roll(1, 0)], [part], workload.tolerance)


@stages
def test_the_yardstick_has_the_flops_of_a_forward(op: str, direction: str) -> None:
    workload = ops.load(op).workload(CASES["tiny"], direction, torch.float32, CPU)
    assert workload.flops(BOTH) == 3 * workload.flops(FORWARD) > 0
    assert len(workload.contender(PRODUCT).calls[FORWARD]()) == len(workload.products())


def test_flops_of_alignments_and_of_the_graph() -> None:
    case = CASES["tiny"]
    images, regions, words, captions = case.images, case.regions, sum(case.word_counts), case.captions
    t2i = ops.load("alignment_vectors").workload(case, "t2i", torch.float32, CPU)
    assert t2i.flops(FORWARD) == 2 * images * words * (2 * regions * 64 + 64 * 256)
    i2t = ops.load("alignment_vectors").workload(case, "i2t", torch.float32, CPU)
    assert i2t.flops(FORWARD) == 2 * images * regions * (2 * words * 64 + captions * 64 * 256)
    filtration = ops.load("attention_filtration").workload(case, "saf", torch.float32, CPU)
    assert filtration.flops(FORWARD) == 2 * 2 * 256 * images * (words + captions)


def test_batches_whose_outputs_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.fits("alignment_vectors", CASES["b32"], CPU)
    assert not ops.fits("alignment_vectors", CASES["b128"], CPU)
    assert ops.fits("alignment_vectors", CASES["b128"], torch.device("cuda"))
    assert ops.fits("regulated_scores", CASES["b16384"], CPU)
    assert run.main(["--device", "cpu", "--op", "alignment_vectors", "--direction", "t2i", "--case", "b128"]) == 0
    printed = capsys.readouterr().out
    assert "alignment_vectors b128 t2i: left out" in printed
    assert "0 measurements" in printed
