"""The drop-ins of RCAR and SGRAF: published constructor, state dict, call, losses, against the published vectors."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden import golden_batch, hinge_loss, published_options
from golden_models import REASONING_CASES, REGULATED_CASES, golden_model, zero_by_symmetry
from helpers import GRADIENT_FLOOR, SCORE_FLOOR, relative_error, score_error
from itm_kernels.backends import why_not
from itm_kernels.compat import rcar, sgraf
from models import CLAMP_GRADIENT_FLOOR

CASES = [*REGULATED_CASES, *REASONING_CASES]


def published_module(case: str, dtype: torch.dtype, backend: str) -> nn.Module:
    """The drop-in with the published parameters, dropout off as in the vectors."""
    options = published_options(case)
    made: nn.Module
    if options["model"] == "rcar":
        made = rcar.EncoderSimilarity(argparse.Namespace(**options), options["embed_size"], options["sim_dim"])
        made.dropout = 0.0
    else:
        made = sgraf.EncoderSimilarity(
            options["embed_size"], options["sim_dim"], options["module_name"], options["sgr_step"]
        )
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    made.load_state_dict(golden_model(case).state)
    made.backend = backend
    return made.to(dtype).train(options.get("train", False))


def step(case: str, dtype: torch.dtype, backend: str) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Scores, gradients by published names, and the state dict after the step."""
    model, batch = published_module(case, dtype, backend), golden_batch(dtype)
    regions, words = batch.regions.requires_grad_(), batch.words.requires_grad_()
    scores = model(regions, words, batch.word_counts)
    scores.backward(batch.grad_scores.to(scores.dtype))
    assert regions.grad is not None
    assert words.grad is not None
    gradients = {"regions": regions.grad, "words": words.grad}
    gradients |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return scores.detach(), gradients, model.state_dict()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_published_vectors_in_float64(backend: str, case: str) -> None:
    golden = golden_model(case)
    scores, gradients, after = step(case, torch.float64, backend)
    assert score_error(scores, golden.scores) <= 1e-9
    for name, real in golden.gradients.items():
        if name not in gradients:  # an unused parameter of the published module
            assert not real.any(), name
        elif zero_by_symmetry(name, golden.options.__dict__.get("training", False)):
            assert float((gradients[name] - real).abs().max()) <= 1e-9, name
        else:
            assert relative_error(gradients[name], real) <= 1e-6, name
    for name, real in golden.after.items():
        assert relative_error(after[name], real) <= 1e-6, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_published_vectors_in_float32(backend: str, case: str) -> None:
    op = "regulated_scores" if case in REGULATED_CASES else "similarity_reasoning_scores"
    if reason := why_not(backend, op, "cpu", torch.float32):
        pytest.skip(reason)
    golden = golden_model(case)
    scores, gradients, after = step(case, torch.float32, backend)
    peers, its_gradients, _ = step(case, torch.float32, "eager")
    assert score_error(scores, golden.scores) <= max(2 * score_error(peers, golden.scores), SCORE_FLOOR)
    floor = CLAMP_GRADIENT_FLOOR if "rcr_modules.0.rcr_matrix_w.0.weight" in golden.state else GRADIENT_FLOOR
    largest = max(float(real.norm()) for real in golden.gradients.values())
    for name, real in golden.gradients.items():
        if name not in gradients:
            continue
        mine, its = gradients[name].double() - real, its_gradients[name].double() - real
        if zero_by_symmetry(name, golden.options.__dict__.get("training", False)) or real.numel() == 1:
            assert float(mine.norm()) <= max(2 * float(its.norm()), floor * largest), name
        else:
            assert float(mine.norm()) <= max(2 * float(its.norm()), floor * float(real.norm())), name
    for name, real in golden.after.items():
        assert relative_error(after[name], real) <= 1e-5, name


@pytest.mark.parametrize("hardest", [True, False], ids=["max", "sum"])
def test_hinge_losses(hardest: bool) -> None:
    golden = hinge_loss()
    for loss in (sgraf.ContrastiveLoss(float(golden["margin"]), hardest), rcar.ContrastiveLoss(None, 0.2, not hardest)):
        if isinstance(loss, rcar.ContrastiveLoss):
            (loss.max_violation_on if hardest else loss.max_violation_off)()
        scores = torch.from_numpy(golden["scores"]).double().requires_grad_()
        value = loss(scores)
        value.backward()
        kind = "max" if hardest else "sum"
        assert abs(float(value.detach()) - float(golden[f"loss_{kind}"])) <= 1e-6
        assert relative_error(scores.grad, torch.from_numpy(golden[f"grad_{kind}"])) <= 1e-6


RCAR_OPTIONS: dict[str, Any] = {
    "self_regulator": "coop_rcar",
    "attn_type": "i2t",
    "rcar_step": 2,
    "i2t_smooth": 3.0,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_regulator": "rcar"}, "opt.self_regulator must be one of only_rar, only_rcr, coop_rcar"),
        ({"attn_type": "both"}, "opt.attn_type must be 't2i' or 'i2t'"),
        ({"rcar_step": None}, "opt.rcar_step is needed"),
        ({"i2t_smooth": None}, "opt.i2t_smooth is needed"),
    ],
    ids=str,
)
def test_rcar_options_that_are_refused(change: dict[str, Any], message: str) -> None:
    options = {name: value for name, value in {**RCAR_OPTIONS, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        rcar.EncoderSimilarity(argparse.Namespace(**options), 16, 8)


def test_sgraf_module_names_that_are_refused() -> None:
    with pytest.raises(ValueError, match="module_name must be one of SAF, SGR"):
        sgraf.EncoderSimilarity(16, 8, "SAFR")


def test_published_initialisation() -> None:
    """Uniform within sqrt(6 / (in + out)), biases zero, 4,727,886 and 5,319,755 numbers as the published counts say."""
    for module, numbers in (
        (sgraf.EncoderSimilarity(1024, 256, "SAF"), 4_727_886),
        (sgraf.EncoderSimilarity(1024, 256, "SGR"), 5_319_755),
    ):
        assert sum(p.numel() for p in module.parameters()) == numbers
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
                assert not layer.bias.any()
                assert 0.9 * bound < float(layer.weight.abs().max()) <= bound or layer.weight.numel() < 64
