"""``scores_and_constraints`` is the two ops with one set of options; what its constraints of matched pairs cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from constraint_cases import Inputs, inputs_of
from helpers import Place, label, relative_error
from itm_kernels import attention_constraints, cross_attention_scores, scores_and_constraints

OP = "attention_constraints"
SQUARE = torch.arange(4)[:, None].repeat(1, 2)
CASES: list[dict[str, Any]] = [
    {"direction": "t2i", "raw_feature_norm": "softmax"},
    {"direction": "i2t", "focal": "equal"},
    {"direction": "both", "raw_feature_norm": "l2norm", "focal": "prob"},
]


def swaps_of(direction: str) -> tuple[Inputs, Any]:
    """A square batch, and what is swapped in it."""
    t2i, i2t = (inputs_of({"direction": way}, 3, pairs=SQUARE, images=4, captions=4) for way in ("t2i", "i2t"))
    return t2i, {"t2i": t2i.swapped, "i2t": i2t.swapped, "both": (t2i.swapped, i2t.swapped)}[direction]


@pytest.mark.parametrize("options", CASES, ids=label)
def test_it_is_both_ops(place64: Place, options: dict[str, Any]) -> None:
    inputs, swapped = swaps_of(options["direction"])
    batch = inputs.batch
    leaves = [t.to(place64.device).requires_grad_() for t in (batch.regions, batch.words)]
    where = {"region_counts": batch.region_counts, "lambda_softmax": 20.0, "backend": place64.floor}
    of_terms: dict[str, Any] = {"ccr_margin": 0.9, "ccs_margin": 0.7, "swap": "content", "detach_swapped": True}
    scores, made = scores_and_constraints(
        *leaves, batch.word_counts, swapped=swapped, agg_func="Sum", **of_terms, **options, **where
    )
    true = cross_attention_scores(*leaves, batch.word_counts, agg_func="Sum", **options, **where)
    assert torch.equal(scores, true)
    both = options["direction"] == "both"
    ways = ("t2i", "i2t") if both else (options["direction"],)
    mine = made if both else (made,)
    total, expected = scores.sum(), true.sum()
    for way, terms, swap in zip(ways, mine, swapped if both else (swapped,), strict=True):
        its = attention_constraints(
            *leaves, batch.word_counts, swapped=swap, **of_terms, **{**options, "direction": way}, **where
        )
        assert terms.ccr.any()
        assert terms.ccs.any()
        assert all(torch.equal(a, b) for a, b in zip(terms, its, strict=True))
        total, expected = total + terms.ccr.sum() + terms.ccs.sum(), expected + its.ccr.sum() + its.ccs.sum()
    for mine, its in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(mine, its) <= 1e-12


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_fullgraph() -> None:
    inputs, swapped = swaps_of("both")
    leaves = [t.nan_to_num().requires_grad_() for t in (inputs.batch.regions, inputs.batch.words)]

    def loss(regions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        scores, terms = scores_and_constraints(
            regions, words, inputs.batch.word_counts, direction="both", swapped=swapped
        )
        return scores.sum() + sum(way.ccr.sum() + way.ccs.sum() for way in terms)  # type: ignore[union-attr]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, loss))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    given = torch.randn(2, 3, 4), torch.randn(2, 5, 4), [5, 2]
    swapped = torch.full((2, 5), -1)
    for options, message in (
        ({"lambda_lse": 0.0}, "scores_and_constraints: lambda_lse must be positive, got 0.0"),
        ({"direction": "up"}, "scores_and_constraints: direction must be one of t2i, i2t, both, got 'up'"),
        (
            {"direction": "both", "swapped": swapped},
            "scores_and_constraints: swapped must be two tensors, t2i and i2t, with direction 'both', got Tensor",
        ),
        (
            {"direction": "both", "swapped": [swapped]},
            "scores_and_constraints: swapped must be two tensors, t2i and i2t, with direction 'both', got 1",
        ),
    ):
        with pytest.raises(ValueError, match="scores_and_constraints") as raised:
            scores_and_constraints(*given, **options)
        assert str(raised.value) == message
