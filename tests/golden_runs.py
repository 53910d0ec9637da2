"""The published RCAR's vectors through a floor of ``regulated_scores``, held against them by the errors of a peer."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from golden_models import GoldenModel, golden_model, zero_by_symmetry
from helpers import GRADIENT_FLOOR, SCORE_FLOOR, Place, relative_error, score_error
from itm_kernels import regulated_scores
from models import CLAMP_GRADIENT_FLOOR


def golden_run(model: GoldenModel, backend: str, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and gradients by published names, on the host."""
    leaves = [None if p is None else p.detach().to(device).requires_grad_() for p in model.parameters.flat()]
    batch = model.batch.to(device)
    regions, words = (side.detach().requires_grad_() for side in (batch.regions, batch.words))
    options = dataclasses.asdict(model.options)
    parameters = model.parameters.of(leaves)
    scores = regulated_scores(regions, words, batch.word_counts, parameters, backend=backend, **options)
    present = [leaf for leaf in leaves if leaf is not None]
    found = [grad.cpu() for grad in torch.autograd.grad(scores, [regions, words, *present], batch.grad_scores.float())]
    of_parameters = iter(found[2:])
    record = model.parameters.of([None if leaf is None else next(of_parameters) for leaf in leaves])
    return scores.detach().cpu(), {"regions": found[0], "words": found[1], **model.published(record)}


def check_golden(place: Place, case: str) -> None:
    """Float32 scores and gradients no further from the vectors than twice the peer's, or the float32 noise floor."""
    model = golden_model(case, torch.float32)
    scores, gradients = golden_run(model, place.floor, place.device)
    peer, its_gradients = golden_run(model, "reference" if place.floor == "eager" else "eager")
    assert score_error(scores, model.scores) <= max(2 * score_error(peer, model.scores), SCORE_FLOOR)
    floor = CLAMP_GRADIENT_FLOOR if model.parameters.correspondence is not None else GRADIENT_FLOOR
    largest = max(float(real.norm()) for real in model.gradients.values())
    for name, mine in gradients.items():
        real, its = model.gradients[name], its_gradients[name]
        if zero_by_symmetry(name, False) or real.numel() == 1:
            bound = max(2 * float((its - real).norm()), floor * largest)
            assert float((mine - real).norm()) <= bound, name
        else:
            assert relative_error(mine, real) <= max(2 * relative_error(its, real), floor), name
