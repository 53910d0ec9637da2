"""The definition of ``regulated_scores`` against the published RCAR, and what holds for it by its formula."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_models import REGULATED_CASES, GoldenModel, assert_golden_gradients, golden_model
from helpers import Batch, random_batch, relative_error, score_error
from itm_kernels.ops.dropout import KEYS, POOLED, dropout_scale
from itm_kernels.ops.options import QUERY_DIRECTIONS, REGULATORS, RegulatedOptions, ScoreOptions
from itm_kernels.ops.parameters import REGULATED_PARTS, SHAPES, RegulatedParameters, check_regulated
from itm_kernels.reference import cross_attention_scores, regulated_scores
from itm_kernels.reference.aggregation_regulator import dropout_masks, pool
from itm_kernels.reference.common import at_step, l2norm

STEPS = {"rar": (0, 1, 3), "rcr": (0, 2), "rcar": (1, 2, 3)}
EVERY = [
    {"direction": direction, "regulator": regulator, "steps": steps}
    for direction, regulator in itertools.product(QUERY_DIRECTIONS, REGULATORS)
    for steps in STEPS[regulator]
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def options_of(**changes: Any) -> RegulatedOptions:
    """t2i RCAR in two steps but for ``changes``."""
    defaults = {"direction": "t2i", "regulator": "rcar", "steps": 2, "temperature": 6.0, "dropout": 0.0}
    return RegulatedOptions(**(defaults | {"seed": 5, "image_offset": 0, "caption_offset": 0} | changes))


def random_parameters(options: RegulatedOptions, seed: int = 0, *, width: int = 24) -> RegulatedParameters:
    """Float64, S = 10, H = 14, U = 6."""
    generator = torch.Generator().manual_seed(seed)
    steps = (options.alignments, options.corrections, options.aggregations, int(options.regulator != "rcr"))
    tensors: list[Tensor | None] = []
    for part, count in zip(REGULATED_PARTS, steps, strict=True):
        sizes = {"steps": count, "S": 10, "H": 14, "U": 6, "D": width, "1": 1}
        for letters in SHAPES[part]:
            shape = [sizes[letter] for letter in letters.split()]
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            tensors.append(drawn * (0.5 if len(shape) == 3 else 1.0) if count else None)
    return RegulatedParameters.of(tensors)


def inputs_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    counts = None if batch.region_counts is None else torch.tensor(batch.region_counts)
    return batch.regions, batch.words, torch.tensor(batch.word_counts), counts


def scores_of(batch: Batch, parameters: RegulatedParameters, options: RegulatedOptions) -> Tensor:
    return regulated_scores.forward(*inputs_of(batch), parameters, options)


def gradients_of(
    batch: Batch, parameters: RegulatedParameters, options: RegulatedOptions
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    return regulated_scores.backward(batch.grad_scores, *inputs_of(batch), parameters, options)


def flat(gradients: tuple[Tensor, Tensor, RegulatedParameters]) -> list[Tensor]:
    regions, words, parameters = gradients
    return [regions, words, *(tensor for tensor in parameters.flat() if tensor is not None)]


def named_gradients(model: GoldenModel, batch: Batch) -> dict[str, Tensor]:
    regions, words, parameters = gradients_of(batch, model.parameters, model.options)
    found = {"regions": regions, "words": words, **model.published(parameters)}
    # Without RAR the published module holds a score layer that it does not use.
    unused = {name: torch.zeros_like(model.state[name]) for name in model.state if name not in found}
    assert set(unused) <= {"sim_eval_w.weight", "sim_eval_w.bias"}
    return found | unused


def test_the_cases_are_there() -> None:
    assert len(REGULATED_CASES) == 10
    seen = {(o.direction, o.regulator) for o in (golden_model(case).options for case in REGULATED_CASES)}
    assert seen == set(itertools.product(QUERY_DIRECTIONS, REGULATORS))


@pytest.mark.parametrize("case", REGULATED_CASES)
def test_golden(case: str) -> None:
    model = golden_model(case)
    check_regulated("test", model.parameters, model.options, model.batch.regions)
    assert score_error(scores_of(model.batch, model.parameters, model.options), model.scores) <= 1e-9
    assert_golden_gradients(named_gradients(model, model.batch), model)


@pytest.mark.parametrize("case", REGULATED_CASES)
def test_golden_packed(case: str) -> None:
    model = golden_model(case)
    batch, rows = model.batch.packed(), ~model.batch.padding()[1]
    assert score_error(scores_of(batch, model.parameters, model.options), model.scores) <= 1e-9
    gradients = dict(model.gradients, words=model.gradients["words"][rows])
    assert_golden_gradients(named_gradients(model, batch), dataclasses.replace(model, gradients=gradients))


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_its_gradient_is_that_of_finite_differences(case: dict[str, Any]) -> None:
    options = options_of(**case)
    options = dataclasses.replace(options, dropout=0.4 if options.aggregations else 0.0)
    batch = random_batch(11, images=2, captions=2, regions=4, words=3, width=5, dtype=torch.float64, shortest=2)
    batch = batch.packed()
    parameters = random_parameters(options, width=5)
    _, _, *counts = inputs_of(batch)
    leaves = [batch.regions, batch.words, *(t for t in parameters.flat() if t is not None)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]

    def function(regions: Tensor, words: Tensor, *tensors: Tensor) -> Tensor:
        given = iter(tensors)
        record = RegulatedParameters.of([None if t is None else next(given) for t in parameters.flat()])
        return regulated_scores.forward(regions, words, *counts, record, options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    by_autograd = torch.autograd.grad(function(*leaves), leaves, batch.grad_scores)
    for mine, its in zip(flat(gradients_of(batch, parameters, options)), by_autograd, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_padding_is_never_used_and_gets_no_gradient(case: dict[str, Any]) -> None:
    options = options_of(**case)
    options = dataclasses.replace(options, dropout=0.4 if options.aggregations else 0.0)
    batch = random_batch(12, region_counts=True, dtype=torch.float64)  # NaN where it is padding
    parameters = random_parameters(options)
    scores, gradients = scores_of(batch, parameters, options), gradients_of(batch, parameters, options)
    assert scores.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in flat(gradients))
    for gradient, padding in zip(gradients[:2], batch.padding(), strict=True):
        assert (gradient[padding] == 0).all()
    # One pair alone, cut to what is valid, scores the same.
    assert batch.region_counts is not None
    for i, c in ((0, 0), (1, 3), (4, 1)):
        alone = Batch(
            batch.regions[i : i + 1, : batch.region_counts[i]],
            batch.words[c : c + 1, : batch.word_counts[c]],
            batch.word_counts[c : c + 1],
            None,
            batch.grad_scores[i : i + 1, c : c + 1],
        )
        there = dataclasses.replace(options, image_offset=i, caption_offset=c)
        assert abs(scores_of(alone, parameters, there)[0, 0] - scores[i, c]) < 1e-14


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_without_steps_it_is_the_mean_cosine_of_scan(direction: str) -> None:
    batch = random_batch(13, region_counts=True, dtype=torch.float64)
    options = options_of(direction=direction, regulator="rcr", steps=0)
    scan = ScoreOptions(direction, "clipped_l2norm", options.temperature, "Mean", 6.0, "none", 0.0)
    nothing = random_parameters(options)
    assert nothing == RegulatedParameters(None, None, None, None)
    expected = cross_attention_scores.forward(*inputs_of(batch), scan)
    torch.testing.assert_close(scores_of(batch, nothing, options), expected, atol=1e-7, rtol=0)  # eps of l2norm


def test_aggregation_of_one_query_leaves_its_vector() -> None:
    batch = random_batch(14, words=1, dtype=torch.float64)
    options = options_of(regulator="rar", steps=0)
    parameters = random_parameters(options)
    more = options_of(regulator="rar", steps=3)
    given = random_parameters(more)._replace(alignment=parameters.alignment, score=parameters.score)
    difference = scores_of(batch, parameters, options) - scores_of(batch, given, more)
    assert difference.abs().max() < 1e-7  # eps of l2norm


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_zero_vectors_are_finite(case: dict[str, Any]) -> None:
    options = options_of(**case)
    batch = random_batch(15, word_counts=[9, 5, 1, 2, 3, 4], dtype=torch.float64)
    batch.regions[0] = 0
    batch.regions[1, 3] = 0
    batch.words[1] = 0
    batch.words[2, 0] = 0
    parameters = random_parameters(options)
    assert scores_of(batch, parameters, options).isfinite().all()
    gradients = flat(gradients_of(batch, parameters, options))
    assert all(tensor.isfinite().all() for tensor in gradients)
    # Zero vectors pass no gradient through their norm: nothing of the size of 1 / eps. The cosine of "rcr" has it, as
    # published: on its floor a product is divided by eps.
    if options.regulator != "rcr":
        assert max(float(tensor.abs().max()) for tensor in gradients) < 1e4


@pytest.mark.parametrize("direction", QUERY_DIRECTIONS)
def test_dropout_asks_for_the_place_in_the_whole_batch(direction: str) -> None:
    batch = random_batch(16, images=6, captions=5, dtype=torch.float64)
    options = options_of(direction=direction, regulator="rar", steps=2, dropout=0.4, image_offset=3, caption_offset=9)
    parameters = random_parameters(options)
    whole = scores_of(batch, parameters, options)
    block = Batch(batch.regions[2:5], batch.words[1:4], batch.word_counts[1:4], None, batch.grad_scores[2:5, 1:4])
    there = dataclasses.replace(options, image_offset=5, caption_offset=10)
    torch.testing.assert_close(scores_of(block, parameters, there), whole[2:5, 1:4], atol=1e-14, rtol=0)
    for change in ({"seed": 6}, {"image_offset": 4}, {"caption_offset": 10}, {"dropout": 0.3}, {"dropout": 0.0}):
        other = scores_of(batch, parameters, dataclasses.replace(options, **change))
        assert (other - whole).abs().max() > 1e-3, change


def test_dropout_is_drawn_for_each_query_and_once_for_the_pooled_vector() -> None:
    images, vectors = torch.tensor([4, 9]), torch.zeros(2, 3, 10, dtype=torch.float64)
    found = dropout_masks(images, 7, vectors, step=1, dropout=0.4, seed=3)
    assert found is not None
    keys, pooled = found
    assert keys.shape == (2, 3, 10)
    assert pooled.shape == (2, 10)
    settings: dict[str, Any] = {"step": 1, "dropout": 0.4, "seed": 3, "dtype": torch.float64}
    for b, image in enumerate(images):
        assert torch.equal(
            pooled[b], dropout_scale(image, torch.tensor(7), torch.tensor(0), 10, branch=POOLED, **settings)
        )
        for query in range(3):
            place = image, torch.tensor(7), torch.tensor(query)
            assert torch.equal(keys[b, query], dropout_scale(*place, 10, branch=KEYS, **settings))
    assert dropout_masks(images, 7, vectors, step=1, dropout=0.0, seed=3) is None


def test_each_branch_takes_its_own_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, pooled = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 10), (2, 10)))
    parameters = at_step(random_parameters(options_of(regulator="rar")).aggregation, 0)
    ones = torch.ones_like(vectors), torch.ones_like(pooled)
    plain = pool(vectors, pooled, parameters, None)
    assert torch.equal(pool(vectors, pooled, parameters, ones), plain)
    for masks in ((0 * ones[0], ones[1]), (ones[0], 0 * ones[1])):
        # Without one of the branches the attention is even.
        torch.testing.assert_close(pool(vectors, pooled, parameters, masks), l2norm(vectors.mean(1)))
    # A channel dropped on either branch is dropped from the product.
    dropped = (ones[0].clone(), ones[1]), (ones[0], ones[1].clone())
    dropped[0][0][..., 4] = 0
    dropped[1][1][..., 4] = 0
    mine, its = (pool(vectors, pooled, parameters, masks) for masks in dropped)
    torch.testing.assert_close(mine, its)
    assert (mine - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_score_wide(dtype: torch.dtype) -> None:
    options = options_of()
    batch = random_batch(17, shortest=3, dtype=torch.float64)
    # What is exact in the narrow dtype is the same in both, but for the arithmetic of float32.
    batch = batch.to(dtype).to(torch.float64)
    exact = random_parameters(options)
    tensors = [None if t is None else t.to(dtype if t.dim() == 3 else torch.float32) for t in exact.flat()]
    narrow = RegulatedParameters.of(tensors)
    exact = RegulatedParameters.of([None if t is None else t.to(torch.float64) for t in narrow.flat()])
    expected, scores = scores_of(batch, exact, options), scores_of(batch.to(dtype), narrow, options)
    assert scores.dtype == torch.float32
    assert score_error(scores, expected) < 2e-6
    mine, its = (gradients_of(b, p, options) for b, p in ((batch.to(dtype), narrow), (batch, exact)))
    for gradient, true in zip(flat(mine)[:2], flat(its)[:2], strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, true) < max(2e-4, torch.finfo(dtype).eps)
    for gradient, true, tensor in zip(mine[2].flat(), its[2].flat(), tensors, strict=True):
        assert tensor is not None
        assert gradient.dtype == tensor.dtype
        assert relative_error(gradient, true) < max(2e-4, torch.finfo(gradient.dtype).eps) or true.abs().max() < 1e-12


def test_matrices_beside_half_precision_are_rounded_to_it() -> None:
    options = options_of()
    batch = random_batch(18, dtype=torch.bfloat16)
    wide = RegulatedParameters.of([None if t is None else t.float() for t in random_parameters(options).flat()])
    rounded = [None if t is None else t.bfloat16().float() if t.dim() == 3 else t for t in wide.flat()]
    expected = scores_of(batch, RegulatedParameters.of(rounded), options)
    assert torch.equal(scores_of(batch, wide, options), expected)
    all_rounded = RegulatedParameters.of([None if t is None else t.bfloat16().float() for t in wide.flat()])
    assert not torch.equal(scores_of(batch, all_rounded, options), expected)
