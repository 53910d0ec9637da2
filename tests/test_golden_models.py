"""The helper for golden vectors of RCAR and SGRAF loses nothing on the way, and its tolerances can fail."""

from __future__ import annotations

import pytest
import torch

from golden import published_options
from golden_models import (
    REASONING_CASES,
    REGULATED_CASES,
    REGULATORS,
    assert_golden_gradients,
    caption_vectors,
    golden_model,
    image_vectors,
    zero_by_symmetry,
)

CASES = REGULATED_CASES + REASONING_CASES


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_the_published_ones_and_go_back(case: str) -> None:
    model = golden_model(case)
    there = model.published(model.parameters)
    for name, tensor in there.items():
        assert torch.equal(tensor, model.state[name]), name
    # What no record holds: the global vectors, normalisation buffers, and a score layer that RCR does not use.
    for name in model.state.keys() - there.keys():
        assert "_global_w." in name or ".bn." in name or (name.startswith("sim_eval_w") and "only_rcr" in case), name
    assert model.gradients.keys() - {"regions", "words"} <= model.state.keys()


@pytest.mark.parametrize("case", CASES)
def test_no_option_of_the_published_run_is_lost(case: str) -> None:
    published, options = published_options(case), golden_model(case).options
    if published["model"] == "rcar":
        name = published["self_regulator"]
        assert options.regulator == REGULATORS[name]
        assert str(options.steps) == case.rsplit("_", 1)[1]
        assert options.temperature == (10.0 if options.t2i else 3.0)
        assert case.split("_")[1] == options.direction
    else:
        assert case == f"sgraf_{options.reasoning.lower()}_{'train' if options.training else 'eval'}"
        assert options.steps == 3
        assert options.temperature == 9.0


@pytest.mark.parametrize("case", CASES)
def test_what_is_called_zero_is_noise_and_nothing_else_is(case: str) -> None:
    model = golden_model(case)
    training = getattr(model.options, "training", False)
    for name, gradient in model.gradients.items():
        if zero_by_symmetry(name, training):
            assert gradient.abs().max() < 1e-14, name
        elif gradient.any():
            assert gradient.abs().max() > 1e-7, name


def test_gradients_that_are_off_fail() -> None:
    model = golden_model("sgraf_saf_train")
    assert_golden_gradients(model.gradients, model)
    for name, error in (("words", 1e-5), ("SAF_module.attn_sim_w.weight", 1e-5)):
        wrong = {**model.gradients, name: model.gradients[name] * (1 + error)}
        with pytest.raises(AssertionError, match=name):
            assert_golden_gradients(wrong, model)
        assert_golden_gradients(wrong, model, relative=1e-4)
    zero = "SAF_module.attn_sim_w.bias"
    with pytest.raises(AssertionError, match=zero):
        assert_golden_gradients({**model.gradients, zero: torch.full((1,), 1e-8)}, model)
    with pytest.raises(AssertionError):
        assert_golden_gradients({k: v for k, v in model.gradients.items() if k != "words"}, model)


def test_global_vectors_have_length_one_and_training_moves_the_buffers() -> None:
    model = golden_model("sgraf_saf_train")
    batch, before = model.batch, {name: tensor.clone() for name, tensor in model.state.items()}
    evaluated = image_vectors(batch.regions, model.state, training=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state.items())
    trained = image_vectors(batch.regions, model.state, training=True)
    captions = caption_vectors(batch.words, batch.word_counts, model.state)
    for vectors in (evaluated, trained, captions):
        torch.testing.assert_close(
            vectors.norm(dim=1), torch.ones(vectors.shape[0], dtype=torch.float64), atol=1e-7, rtol=0
        )
    assert (evaluated - trained).abs().max() > 1e-3
    moved = {name for name, tensor in model.state.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("v_global_w") and "running_" in name}
