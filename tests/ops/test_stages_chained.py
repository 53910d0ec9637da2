"""The stages as ops, chained by hand, give what the composite ops give: scores, gradients, buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import SCORE_FLOOR, relative_error, score_error
from itm_kernels import (
    aggregation_regulator,
    alignment_vectors,
    attention_filtration,
    correspondence_regulator,
    similarity_graph,
)
from itm_kernels.ops.options import WORKSPACE_BYTES
from models import (
    GLOBALS,
    NORM,
    SIDES,
    Case,
    ModelBatch,
    assert_model_exact,
    assert_model_ladder,
    model_batch,
    model_truth,
    run_model,
)
from models import ModelResult as Result
from stage_suite import IN_BLOCKS, skip_without

DROPPED = {"dropout": 0.4, "seed": 2**40, "image_offset": 3, "caption_offset": 9}
REGULATED = [
    Case("regulated_scores", {"direction": direction, "regulator": "rcar", "steps": 3, **DROPPED})
    for direction in ("t2i", "i2t")
]
REASONED = [
    Case("similarity_reasoning_scores", {"reasoning": "SAF", "training": True}),
    Case("similarity_reasoning_scores", {"reasoning": "SAF", "training": False}),
    Case("similarity_reasoning_scores", {"reasoning": "SGR", "steps": 3}),
]


def parameters_of(made: ModelBatch, tensors: dict[str, Tensor]) -> Any:
    """The record of parameters with its tensors from ``tensors``."""
    names = [name for name in tensors if name not in (*SIDES, *GLOBALS, *NORM)]
    found = iter(names)
    return made.parameters.of([None if p is None else tensors[next(found)] for p in made.parameters.flat()])


def regulated(made: ModelBatch, tensors: dict[str, Tensor], **common: Any) -> Tensor:
    """RCAR from its stages."""
    direction = made.case.options["direction"]
    common["direction"] = direction
    of_regions = {"region_counts": made.batch.region_counts}
    sides = tensors["regions"], tensors["words"], made.batch.word_counts
    parameters = parameters_of(made, tensors)

    def pool(vectors: Tensor, pooled: Tensor | None, step: int) -> Tensor:
        counts = {} if direction == "t2i" else of_regions
        return aggregation_regulator(
            vectors, pooled, sides[2], parameters.aggregation, step=step, **DROPPED, **counts, **common
        )

    def align(step: int, **more: Any) -> Tensor:
        weight, bias = (tensor[step] for tensor in parameters.alignment)
        return alignment_vectors(*sides, weight, bias, **more, **of_regions, **common)

    vectors, state = align(0, temperature=10.0), None
    pooled = pool(vectors, None, 0)
    for step in (1, 2):
        state = correspondence_regulator(
            vectors, *sides, parameters.correspondence, step=step - 1, state=state, **of_regions, **common
        )
        vectors = align(step, attention_scores=state.attention_scores, temperature=state.temperature)
        pooled = pool(vectors, pooled, step)
    return chance(pooled, parameters)


def reasoned(made: ModelBatch, tensors: dict[str, Tensor], buffers: tuple[Tensor, ...], **common: Any) -> Tensor:
    """SGRAF from its stages."""
    counts, parameters = made.batch.word_counts, parameters_of(made, tensors)
    local, whole = ([tensor[0] for tensor in p] for p in (parameters.local_alignment, parameters.global_alignment))
    vectors = alignment_vectors(
        tensors["regions"], tensors["words"], counts, *local, region_counts=made.batch.region_counts, **common
    )
    image_global, caption_global = (tensors[name].to(vectors.dtype) for name in GLOBALS)
    squares = (image_global[:, None] - caption_global[None]).square()
    # The product in the dtype of the inputs, all else wide, as in the composite.
    products = (squares.to(whole[0].dtype) @ whole[0].t()).to(vectors.dtype)
    of_wholes = F.normalize(products + whole[1], dim=-1)
    if made.case.options["reasoning"] == "SGR":
        pooled = similarity_graph(vectors, of_wholes, counts, parameters.graph, **common)
    else:
        pooled = attention_filtration(
            vectors,
            of_wholes,
            counts,
            parameters.filtration,
            batch_norm=(*(tensors[name] for name in NORM), *buffers, 0.1, 1e-5),
            training=made.case.options["training"],
            **common,
        )
    return chance(pooled, parameters)


def chance(pooled: Tensor, parameters: Any) -> Tensor:
    """The score from what the stages leave."""
    return torch.sigmoid(pooled @ parameters.score.weight.to(pooled) + parameters.score.bias)


def scores_of(made: ModelBatch, tensors: dict[str, Tensor], buffers: tuple[Tensor, ...], **common: Any) -> Tensor:
    """Of either model."""
    if made.case.regulated:
        return regulated(made, tensors, **common)
    return reasoned(made, tensors, buffers, **common)


def chained(made: ModelBatch, **common: Any) -> Result:
    """Scores and gradients of the stages, as ``run_model`` gives those of the composite."""
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.tensors().items()}
    buffers = tuple(buffer.clone() for buffer in made.buffers)
    scores = scores_of(made, tensors, buffers, **common)
    grads = torch.autograd.grad(scores, list(tensors.values()), made.batch.grad_scores.to(scores))
    return Result(scores.detach(), dict(zip(tensors, grads, strict=True)), buffers)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("case", [*REGULATED, *REASONED], ids=str)
def test_stages_give_the_composite(case: Case, form: str, backend: str) -> None:
    made = model_batch(case, 31, region_counts=True, dtype=torch.float64)
    made = made.packed() if form == "packed" else made
    assert_model_exact(chained(made, backend=backend), run_model(made, "reference"), case)


@pytest.mark.parametrize("case", [*REGULATED, *REASONED], ids=str)
def test_in_blocks_as_well(case: Case) -> None:
    made = model_batch(case, 32, region_counts=True, dtype=torch.float64)
    assert_model_exact(chained(made, backend="eager", workspace_bytes=1), run_model(made, "reference"), case)


@pytest.mark.parametrize("workspace_bytes", [1, WORKSPACE_BYTES], ids=["tiny", "usual"])
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("case", [*REGULATED, *REASONED], ids=str)
def test_in_float32_as_near_as_the_composite(case: Case, form: str, workspace_bytes: int) -> None:
    skip_without("native", "alignment_vectors")
    made = model_batch(case, 34, region_counts=True)
    made = made.packed() if form == "packed" else made
    mine, its = chained(made, backend="native", workspace_bytes=workspace_bytes), run_model(made, "native")
    assert_model_ladder(mine, its, model_truth(made), case)
    assert score_error(mine.scores, its.scores) <= SCORE_FLOOR


@pytest.mark.parametrize("backend", IN_BLOCKS)
@pytest.mark.parametrize("case", [*REGULATED, *REASONED], ids=str)
def test_in_bfloat16_as_near_as_the_composite(case: Case, backend: str) -> None:
    # Alignments go from stage to stage in float32; the matrices say that products run in bfloat16.
    skip_without(backend, "alignment_vectors")
    made = model_batch(case, 33, region_counts=True).to(torch.bfloat16)
    true = run_model(made.to(torch.float64), "reference")
    mine, its = chained(made, backend=backend), run_model(made, backend)
    assert score_error(mine.scores, true.scores) <= 2 * score_error(its.scores, true.scores)
    assert score_error(mine.scores, its.scores) <= score_error(its.scores, true.scores)
    for name in SIDES:
        mine_error, its_error = (relative_error(r.gradients[name], true.gradients[name]) for r in (mine, its))
        assert mine_error <= 2 * its_error, name
