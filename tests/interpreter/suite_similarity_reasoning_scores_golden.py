"""The published SGRAF's vectors through ``similarity_reasoning_scores`` in Triton's interpreter.

Run by ``test_interpreter.py``. The modules of the global vectors, which belong to no op, run in float64 around it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_models import (
    EPS_OF_NORM,
    MOMENTUM,
    REASONING_CASES,
    GoldenModel,
    caption_vectors,
    golden_model,
    image_vectors,
    zero_by_symmetry,
)
from helpers import GRADIENT_FLOOR, SCORE_FLOOR, relative_error, score_error
from itm_kernels import similarity_reasoning_scores

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def golden_run(case: str, backend: str) -> tuple[GoldenModel, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Scores, gradients by published names, and SAF's buffers; of the op in float32."""
    model = golden_model(case)
    options, batch = model.options, model.batch
    state = {n: t.clone().requires_grad_() if n in model.gradients else t.clone() for n, t in model.state.items()}
    regions, words = (side.detach().requires_grad_() for side in (batch.regions, batch.words))
    wholes = image_vectors(regions, state, training=options.training), caption_vectors(words, batch.word_counts, state)
    leaves = [None if p is None else p.float().requires_grad_() for p in model.parameters.flat()]
    parameters = model.parameters.of(leaves)
    buffers: dict[str, Tensor] = {}
    more: dict[str, object] = {"steps": options.steps}
    if parameters.filtration is not None:
        *_, weight, bias = parameters.filtration
        parameters = parameters._replace(filtration=parameters.filtration._replace(norm_weight=None, norm_bias=None))
        own = {f"SAF_module.bn.{name}": state[f"SAF_module.bn.{name}"].clone() for name in BUFFERS}
        buffers = {name: buffer.float() if buffer.is_floating_point() else buffer for name, buffer in own.items()}
        more = {"batch_norm": (weight, bias, *buffers.values(), MOMENTUM, EPS_OF_NORM)}
    features = [tensor.detach().float().requires_grad_() for tensor in (regions, words, *wholes)]
    scores = similarity_reasoning_scores(
        *features[:2], batch.word_counts, *features[2:], parameters, reasoning=options.reasoning,
        training=options.training, backend=backend, **more,
    )  # fmt: skip
    present = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(scores, [*features, *present], batch.grad_scores.float())
    of_regions, of_words, *of_wholes = (grad.double() for grad in found[:4])
    outer = {name: state[name] for name in model.gradients if "_global_w." in name}
    through = torch.autograd.grad(wholes, (regions, words, *outer.values()), of_wholes)
    of_parameters = iter(found[4:])
    record = model.parameters.of([None if leaf is None else next(of_parameters) for leaf in leaves])
    gradients = {"regions": of_regions + through[0], "words": of_words + through[1]}
    gradients |= dict(zip(outer, through[2:], strict=True)) | model.published(record)
    return model, scores.detach(), gradients, buffers


@pytest.mark.parametrize("case", REASONING_CASES)
def test_golden_vectors(case: str) -> None:
    model, scores, gradients, buffers = golden_run(case, "triton")
    _, peer, its_gradients, _ = golden_run(case, "eager")
    assert score_error(scores, model.scores) <= max(2 * score_error(peer, model.scores), SCORE_FLOOR)
    assert gradients.keys() == model.gradients.keys()
    largest = max(float(real.norm()) for real in model.gradients.values())
    for name, mine in gradients.items():
        real, its = model.gradients[name], its_gradients[name]
        if zero_by_symmetry(name, model.options.training) or real.numel() == 1:
            bound = max(2 * float((its - real).norm()), GRADIENT_FLOOR * largest)
            assert float((mine - real).norm()) <= bound, name
        else:
            assert relative_error(mine, real) <= max(2 * relative_error(its, real), GRADIENT_FLOOR), name
    assert bool(buffers) == (model.options.reasoning == "SAF")
    for name, buffer in buffers.items():
        assert relative_error(buffer, model.after.get(name, model.state[name])) <= SCORE_FLOOR, name
