"""The definition of ``similarity_reasoning_scores`` against the published SGRAF, and what holds by its formula."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from golden_models import (
    MOMENTUM,
    REASONING_CASES,
    GoldenModel,
    assert_golden_gradients,
    caption_vectors,
    golden_model,
    image_vectors,
)
from helpers import Batch, random_batch, relative_error, score_error, unit
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import REASONING_PARTS, SHAPES, ReasoningParameters, check_reasoning
from itm_kernels.reference import similarity_reasoning_scores

EVERY = [
    {"reasoning": "SAF", "steps": 0, "training": False},
    {"reasoning": "SAF", "steps": 0, "training": True},
    {"reasoning": "SGR", "steps": 0, "training": True},
    {"reasoning": "SGR", "steps": 1, "training": False},
    {"reasoning": "SGR", "steps": 3, "training": True},
]


class Inputs(NamedTuple):
    """All that goes in, in the order of the op."""

    regions: Tensor
    words: Tensor
    word_counts: Tensor
    region_counts: Tensor | None
    image_global: Tensor
    caption_global: Tensor
    parameters: ReasoningParameters
    statistics: Tensor | None
    options: ReasoningOptions

    def leaves(self) -> list[Tensor]:
        """What has a gradient, in the order of the backward."""
        features = [self.regions, self.words, self.image_global, self.caption_global]
        return features + [tensor for tensor in self.parameters.flat() if tensor is not None]

    def replaced(self, tensors: list[Tensor]) -> Inputs:
        """With other tensors in the place of ``leaves()``."""
        regions, words, image_global, caption_global, *rest = tensors
        given = iter(rest)
        parameters = ReasoningParameters.of([None if t is None else next(given) for t in self.parameters.flat()])
        return self._replace(
            regions=regions,
            words=words,
            image_global=image_global,
            caption_global=caption_global,
            parameters=parameters,
        )


def label(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def inputs_of(batch: Batch, case: dict[str, Any], seed: int = 0) -> Inputs:
    """Random global vectors and parameters beside a batch: float64, S = 10."""
    generator = torch.Generator().manual_seed(seed)
    options = ReasoningOptions(**case, eps=1e-5)
    images, captions, width = batch.regions.shape[0], len(batch.word_counts), batch.regions.shape[2]
    saf = options.reasoning == "SAF"
    steps = (1, 1, int(saf), 0 if saf else options.steps, 1)
    tensors: list[Tensor | None] = []
    for part, count in zip(REASONING_PARTS, steps, strict=True):
        sizes = {"steps": count, "S": 10, "D": width, "1": 1}
        for letters in SHAPES[part]:
            shape = [sizes[letter] for letter in letters.split()]
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            # Wider weights would drive the scores to 0 or 1, where the gradients vanish.
            tensors.append(drawn * (0.5 if len(shape) == 3 else 1.0) if count else None)
    running = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, captions)
    return Inputs(
        batch.regions,
        batch.words,
        torch.tensor(batch.word_counts),
        None if batch.region_counts is None else torch.tensor(batch.region_counts),
        unit(images, width, generator=generator),
        unit(captions, width, generator=generator),
        ReasoningParameters.of(tensors),
        running if saf and not options.training else None,
        options,
    )


def scores_of(inputs: Inputs) -> Tensor:
    return similarity_reasoning_scores.forward(*inputs)[0]


def gradients_of(grad_scores: Tensor, inputs: Inputs) -> list[Tensor]:
    """As ``leaves()``, the statistics those of the forward."""
    _, statistics = similarity_reasoning_scores.forward(*inputs)
    kept = statistics if inputs.options.reasoning == "SAF" else None
    *grads, parameters = similarity_reasoning_scores.backward(grad_scores, *inputs._replace(statistics=kept))
    return grads + [tensor for tensor in parameters.flat() if tensor is not None]


def golden_inputs(model: GoldenModel, batch: Batch, image_global: Tensor, caption_global: Tensor) -> Inputs:
    statistics = None
    if model.options.reasoning == "SAF" and not model.options.training:
        buffers = [model.state[f"SAF_module.bn.running_{name}"] for name in ("mean", "var")]
        statistics = torch.stack(buffers).expand(2, len(batch.word_counts))
    counts = torch.tensor(batch.word_counts), None
    vectors = image_global, caption_global
    return Inputs(batch.regions, batch.words, *counts, *vectors, model.parameters, statistics, model.options)


def running_buffers(model: GoldenModel, statistics: Tensor) -> dict[str, Tensor]:
    """SAF's after the step: the published loop updates them once a caption, with the unbiased variance."""
    mean, variance, number = (
        model.state[f"SAF_module.bn.{name}"] for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    for n, of_mean, of_variance in zip(model.batch.word_counts, *statistics, strict=True):
        elements = model.batch.regions.shape[0] * (n + 1)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * of_mean
        variance = (1 - MOMENTUM) * variance + MOMENTUM * of_variance * elements / (elements - 1)
        number = number + 1
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {f"SAF_module.bn.{name}": buffer for name, buffer in zip(names, (mean, variance, number), strict=True)}


def test_the_cases_are_there() -> None:
    assert REASONING_CASES == ["sgraf_saf_eval", "sgraf_saf_train", "sgraf_sgr_eval", "sgraf_sgr_train"]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("case", REASONING_CASES)
def test_golden(case: str, packed: bool) -> None:
    model = golden_model(case)
    check_reasoning("test", model.parameters, model.options, model.batch.regions)
    # The published modules of the global vectors around our op, gradients through all of it.
    state = {
        name: tensor.requires_grad_() if name in model.gradients else tensor for name, tensor in model.state.items()
    }
    regions, words = (tensor.requires_grad_() for tensor in (model.batch.regions, model.batch.words))
    image_global = image_vectors(regions, state, training=model.options.training)
    caption_global = caption_vectors(words, model.batch.word_counts, state)
    batch = model.batch.packed() if packed else model.batch
    inputs = golden_inputs(model, batch, image_global, caption_global)
    scores, statistics = similarity_reasoning_scores.forward(*inputs)
    assert score_error(scores.detach(), model.scores) <= 1e-9

    given = inputs._replace(statistics=statistics if model.options.reasoning == "SAF" else None)
    *grads, of_parameters = similarity_reasoning_scores.backward(batch.grad_scores, *given)
    grad_regions, grad_words, grad_image, grad_caption = grads
    assert grad_words.shape == batch.words.shape
    outer = {name: state[name] for name in model.gradients if "_global_w." in name}
    through = torch.autograd.grad(
        (image_global, caption_global, batch.words),
        (regions, words, *outer.values()),
        (grad_image, grad_caption, grad_words),
        allow_unused=True,
    )
    found = dict(zip(("regions", "words", *outer), through, strict=True)) | model.published(of_parameters)
    found["regions"] = found["regions"] + grad_regions
    assert_golden_gradients(found, model)

    after = dict(model.state)
    if model.options.batch_statistics:
        after |= running_buffers(model, statistics)
    for name, expected in model.after.items():
        if name.startswith("v_global_w") and name.endswith("num_batches_tracked"):
            continue  # a module's, not a function's
        assert relative_error(after[name].detach(), expected) <= 1e-6, name


def test_statistics_of_evaluation_come_back_as_they_are() -> None:
    inputs = inputs_of(random_batch(1, dtype=torch.float64), EVERY[0])
    assert torch.equal(similarity_reasoning_scores.forward(*inputs)[1], inputs.statistics)
    graph = inputs_of(random_batch(1, dtype=torch.float64), EVERY[-1])
    assert similarity_reasoning_scores.forward(*graph)[1].shape == (2, 0)


def test_statistics_of_training_are_those_of_the_caption() -> None:
    # In evaluation with the statistics that training found, the scores are those of training; and one caption alone has
    # the same statistics, for they do not run over captions.
    batch = random_batch(2, region_counts=True, dtype=torch.float64)
    inputs = inputs_of(batch, EVERY[1])
    scores, statistics = similarity_reasoning_scores.forward(*inputs)
    fixed = dataclasses.replace(inputs.options, training=False)
    assert torch.equal(scores_of(inputs._replace(statistics=statistics, options=fixed)), scores)
    alone = inputs._replace(
        words=inputs.words[3:4], word_counts=inputs.word_counts[3:4], caption_global=inputs.caption_global[3:4]
    )
    torch.testing.assert_close(similarity_reasoning_scores.forward(*alone)[1], statistics[:, 3:4])
    assert statistics.std(1).min() > 1e-3


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_its_gradient_is_that_of_finite_differences(case: dict[str, Any]) -> None:
    batch = random_batch(11, images=2, captions=2, regions=4, words=3, width=5, dtype=torch.float64, shortest=2)
    inputs = inputs_of(batch.packed(), case)
    leaves = [leaf.clone().requires_grad_() for leaf in inputs.leaves()]

    def function(*tensors: Tensor) -> Tensor:
        return scores_of(inputs.replaced(list(tensors)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    by_autograd = torch.autograd.grad(function(*leaves), leaves, batch.grad_scores)
    for mine, its in zip(gradients_of(batch.grad_scores, inputs), by_autograd, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_padding_is_never_used_and_gets_no_gradient(case: dict[str, Any]) -> None:
    batch = random_batch(12, region_counts=True, dtype=torch.float64)  # NaN where it is padding
    inputs = inputs_of(batch, case)
    scores, gradients = scores_of(inputs), gradients_of(batch.grad_scores, inputs)
    assert scores.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in gradients)
    for gradient, padding in zip(gradients[:2], batch.padding(), strict=True):
        assert (gradient[padding] == 0).all()
    if inputs.options.batch_statistics:
        return  # a pair there depends on the other images, and only on those
    assert batch.region_counts is not None
    for i, c in ((0, 0), (1, 3), (4, 1)):
        alone = inputs._replace(
            regions=inputs.regions[i : i + 1, : batch.region_counts[i]],
            words=inputs.words[c : c + 1, : batch.word_counts[c]],
            word_counts=inputs.word_counts[c : c + 1],
            region_counts=None,
            image_global=inputs.image_global[i : i + 1],
            caption_global=inputs.caption_global[c : c + 1],
            statistics=None if inputs.statistics is None else inputs.statistics[:, c : c + 1],
        )
        assert abs(scores_of(alone)[0, 0] - scores[i, c]) < 1e-14


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_zero_vectors_pass_no_gradient_through_their_norm(case: dict[str, Any]) -> None:
    batch = random_batch(15, word_counts=[9, 5, 1, 2, 3, 4], dtype=torch.float64)
    batch.regions[0] = 0
    batch.regions[1, 3] = 0
    batch.words[1] = 0
    batch.words[2, 0] = 0
    inputs = inputs_of(batch, case)
    inputs.image_global[0] = 0
    inputs.caption_global[1] = 0
    assert scores_of(inputs).isfinite().all()
    gradients = gradients_of(batch.grad_scores, inputs)
    assert all(tensor.isfinite().all() for tensor in gradients)
    assert max(float(tensor.abs().max()) for tensor in gradients) < 1e4


def test_without_a_step_of_reasoning_the_global_alignment_is_scored() -> None:
    batch = random_batch(16, dtype=torch.float64)
    inputs = inputs_of(batch, {"reasoning": "SGR", "steps": 0, "training": False})
    other = random_batch(17, dtype=torch.float64)
    assert torch.equal(scores_of(inputs), scores_of(inputs._replace(regions=other.regions)))
    for gradient in gradients_of(batch.grad_scores, inputs)[:2]:
        assert not gradient.any()


@pytest.mark.parametrize("case", [EVERY[1], EVERY[4]], ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_score_wide(case: dict[str, Any], dtype: torch.dtype) -> None:
    # What is exact in the narrow dtype is the same in both, but for the arithmetic of float32.
    batch = random_batch(18, shortest=3, dtype=torch.float64).to(dtype)
    given = inputs_of(batch, case)
    matrices = {id(tensor) for tensor in given.parameters.flat() if tensor is not None and tensor.dim() == 3}
    features = {id(tensor) for tensor in given.leaves()[:4]}
    narrow = given.replaced([t.to(dtype if id(t) in matrices | features else torch.float32) for t in given.leaves()])
    exact = given.replaced([tensor.to(torch.float64) for tensor in narrow.leaves()])
    scores, statistics = similarity_reasoning_scores.forward(*narrow)
    assert scores.dtype == statistics.dtype == torch.float32
    assert score_error(scores, scores_of(exact)) < 5e-6
    got, true = gradients_of(batch.grad_scores, narrow), gradients_of(batch.grad_scores, exact)
    for mine, its, leaf in zip(got, true, narrow.leaves(), strict=True):
        assert mine.dtype == leaf.dtype
        bound = max(2e-5, torch.finfo(leaf.dtype).eps)
        assert relative_error(mine, its) < bound or max(mine.abs().max(), its.abs().max()) < 1e-6
