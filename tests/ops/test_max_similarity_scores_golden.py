"""Every floor of ``max_similarity_scores`` meets the golden vectors of the published CHAN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from golden import FOLDER, golden_batch, golden_result, published_options
from helpers import Place, Result, assert_exact, assert_ladder
from itm_kernels.compat import chan
from itm_kernels.compat.chan import AGG_FUNCS, hard_assignment_scores
from similarity import OP, run

CASES = sorted(path.stem for path in FOLDER.glob("chan_*.npz"))


def options_of(case: str) -> tuple[dict[str, Any], float]:
    """Options of the op, and the published scores over ours: LSEPooling is not divided by its lambda."""
    published = published_options(case)
    factor = 1 / published["belta"] if published["pooling"] == "LSEPooling" else 1.0
    return {"agg_func": AGG_FUNCS[published["pooling"]], "lambda_lse": 1 / published["belta"]}, factor


def ours(case: str) -> Result:
    _, factor = options_of(case)
    return Result(*(tensor.double() / factor for tensor in golden_result(case)))


def test_the_cases_are_there() -> None:
    assert CASES == ["chan_lse", "chan_mean"]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_float64(place64: Place, case: str, packed: bool) -> None:
    batch, golden = golden_batch(), ours(case)
    if packed:
        golden = dataclasses.replace(golden, grad_words=golden.grad_words[~batch.padding()[1]])
        batch = batch.packed()
    assert_exact(run(batch.to(place64.device), place64.floor, **options_of(case)[0]), golden)


@pytest.mark.parametrize("case", CASES)
def test_float32(place: Place, case: str) -> None:
    options, _ = options_of(case)
    batch = golden_batch(torch.float32)
    peer = run(batch, "eager", **options)
    assert_ladder(run(batch.to(place.device), place.floor, **options), peer, ours(case), options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_drop_in(case: str, dtype: torch.dtype) -> None:
    batch, golden, published = golden_batch(dtype), golden_result(case), published_options(case)
    leaves = batch.regions.requires_grad_(), batch.words.requires_grad_()
    scores = hard_assignment_scores(*leaves, batch.word_counts, published["pooling"], belta=published["belta"])
    grads = torch.autograd.grad(scores, leaves, batch.grad_scores.to(scores.dtype))
    got = Result(scores.detach(), *grads)
    # An undivided log-sum-exp has the noise of a sum.
    assert_exact(got, golden, scores=1e-9 if dtype == torch.float64 else 1e-5, gradients=5e-6)


def test_every_pooling_of_the_drop_in() -> None:
    torch.manual_seed(0)
    images, captions, lengths = torch.randn(3, 5, 8).double(), torch.randn(4, 6, 8).double(), [6, 4, 2, 1]
    for pooling in AGG_FUNCS:
        scores = chan.hard_assignment_scores(images, captions, lengths, pooling, belta=0.5)
        for i, image in enumerate(images):
            for c, n in enumerate(lengths):
                z = (image @ captions[c, :n].t()).max(0).values
                expected = {
                    "LSEPooling": (z / 0.5).logsumexp(0),
                    "MeanPooling": z.mean(),
                    "MaxPooling": z.max(),
                    "SumPooling": z.sum(),
                    "SoftmaxPooling": ((z / 0.5).softmax(0) * z).sum(),
                }[pooling]
                torch.testing.assert_close(scores[i, c], expected)


def test_the_drop_in_refuses_what_it_does_not_know() -> None:
    inputs = torch.ones(1, 2, 4), torch.ones(1, 3, 4), [3]
    with pytest.raises(ValueError, match="pooling must be one of LSEPooling, MeanPooling, MaxPooling, SumPooling"):
        hard_assignment_scores(*inputs, "MedianPooling")
    for belta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="belta must be positive"):
            hard_assignment_scores(*inputs, belta=belta)
    with pytest.raises(TypeError, match="belta must be a number"):
        hard_assignment_scores(*inputs, belta="0.1")


def test_the_module_of_the_op_is_the_one_that_is_tested() -> None:
    assert run.keywords["op"].__name__ == OP
