"""Definition of ``regulated_scores``: RCAR, the published loop over captions with vectors, gates and weights formed.

For one image and one caption, queries q and keys k (t2i: words attend to regions; i2t: the reverse), gate M = 1 and
temperature t at first; align, RCR and RAR are those of ``alignment_vectors``, ``correspondence_regulator`` and
``aggregation_regulator``, steps m = 0..s-1 with weights of their own:

    "rar":   x = align(q, k, M, t);  h = mean_i x_i;  each step h = RAR_m(x, h);  score = sigmoid(w . h + b)
    "rcr":   each step x = align_m(q, k, M, t);  M, t = RCR_m(x, M, t)
             then score = mean_i q_i . c_i / max(|q_i| |c_i|, eps), c attended with the last M and t
    "rcar":  each step x = align_m(q, k, M, t);  at first h = mean_i x_i;  but at last M, t = RCR_m(x, M, t);
             h = RAR_m(x, h);  score = sigmoid(w . h + b)

Without steps "rcr" is the mean cosine of SCAN, "rar" the sigmoid of the mean vector.

Source: Diao et al., "Plug-and-Play Regulators for Image-Text Matching", TIP 2023, with its published code
(``only_rar``, ``only_rcr``, ``coop_rcar``). Padding never counts: not in a norm, a softmax, a mean. On the floor of the
cosine no gradient flows into the norms. Edges of the stages: in their modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import RegulatedParameters, ScoreParameters
from itm_kernels.reference.aggregation_regulator import dropout_masks, pool
from itm_kernels.reference.alignment_vectors import align, attend
from itm_kernels.reference.common import EPS, all_wide, at_step, captions_of, gradients, norm, over_images
from itm_kernels.reference.correspondence_regulator import regulate


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> Tensor:  # [I, C]
    """Scores by the literal formula. Differentiable by autograd."""
    dtype = score_dtype(regions.dtype)
    parameters = parameters.of(all_wide(parameters.flat(), regions.dtype))
    regions, words = regions.to(dtype), words.to(dtype)
    columns = []
    for c, caption in enumerate(captions_of(words, word_counts)):

        def scores_of(images: Tensor, valid: Tensor, c: int = c, caption: Tensor = caption) -> Tensor:
            captions = caption.expand(valid.shape[0], -1, -1)  # [B, n, D]
            queries, keys = (captions, valid) if options.t2i else (valid, captions)
            pairs = images + options.image_offset, c + options.caption_offset
            return scores_of_pairs(queries, keys, pairs, parameters, options)

        columns.append(over_images(regions, region_counts, scores_of))
    return torch.stack(columns, dim=1)


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients of ``sum(scores * grad_scores)`` by autograd of the literal formula."""

    def scores_of(features: list[Tensor], tensors: list[Tensor | None]) -> Tensor:
        regions, words = features
        return forward(regions, words, word_counts, region_counts, parameters.of(tensors), options)

    (grad_regions, grad_words), grads = gradients(scores_of, [regions, words], parameters.flat(), grad_scores)
    return grad_regions, grad_words, parameters.of(grads)


Pairs = tuple[Tensor, int]
"""Numbers of the images ``[B]`` and of the caption in the whole batch: dropout asks for them."""


def scores_of_pairs(
    queries: Tensor,  # [B, Q, D]
    keys: Tensor,  # [B, K, D]
    pairs: Pairs,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
) -> Tensor:  # [B]
    """Scores of B images with one caption."""
    if options.regulator == "rar":
        return aggregated(queries, keys, pairs, parameters, options)
    if options.regulator == "rcr":
        return corrected(queries, keys, parameters, options)
    return cooperating(queries, keys, pairs, parameters, options)


def aggregated(
    queries: Tensor, keys: Tensor, pairs: Pairs, parameters: RegulatedParameters, options: RegulatedOptions
) -> Tensor:  # [B, Q, D], [B, K, D] -> [B]
    """``"rar"``."""
    vectors = align(queries, keys, None, options.temperature, at_step(parameters.alignment, 0))
    pooled = vectors.mean(1)
    for step in range(options.steps):
        pooled = aggregation(vectors, pooled, pairs, step, parameters, options)
    return chance(pooled, parameters.score)


def corrected(
    queries: Tensor, keys: Tensor, parameters: RegulatedParameters, options: RegulatedOptions
) -> Tensor:  # [B, Q, D], [B, K, D] -> [B]
    """``"rcr"``."""
    gate: Tensor | None = None  # ones
    temperature: Tensor | float = options.temperature
    for step in range(options.steps):
        vectors = align(queries, keys, gate, temperature, at_step(parameters.alignment, step))
        gate, temperature = regulate(vectors, gate, temperature, at_step(parameters.correspondence, step))
    return mean_cosine(queries, attend(queries, keys, gate, temperature))


def cooperating(
    queries: Tensor, keys: Tensor, pairs: Pairs, parameters: RegulatedParameters, options: RegulatedOptions
) -> Tensor:  # [B, Q, D], [B, K, D] -> [B]
    """``"rcar"``."""
    gate: Tensor | None = None  # ones
    temperature: Tensor | float = options.temperature
    vectors = align(queries, keys, gate, temperature, at_step(parameters.alignment, 0))
    pooled = aggregation(vectors, vectors.mean(1), pairs, 0, parameters, options)
    for step in range(1, options.steps):
        gate, temperature = regulate(vectors, gate, temperature, at_step(parameters.correspondence, step - 1))
        vectors = align(queries, keys, gate, temperature, at_step(parameters.alignment, step))
        pooled = aggregation(vectors, pooled, pairs, step, parameters, options)
    return chance(pooled, parameters.score)


def aggregation(
    vectors: Tensor,  # [B, Q, S]
    pooled: Tensor,  # [B, S]
    pairs: Pairs,
    step: int,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
) -> Tensor:  # [B, S]
    """A step of RAR with its dropout."""
    masks = dropout_masks(*pairs, vectors, step=step, dropout=options.dropout, seed=options.seed)
    return pool(vectors, pooled, at_step(parameters.aggregation, step), masks)


def chance(pooled: Tensor, score: ScoreParameters | None) -> Tensor:  # [B, S] -> [B]
    """The score of a pair between 0 and 1."""
    assert score is not None, "the op has checked that it is there"
    return torch.sigmoid(pooled @ score.weight + score.bias)


def mean_cosine(queries: Tensor, attended: Tensor) -> Tensor:  # [B, Q, D], [B, Q, D] -> [B]
    """Mean over the queries of their cosine with what they attend to."""
    dot = (queries * attended).sum(-1)
    return (dot / (norm(queries) * norm(attended)).clamp(min=EPS)).mean(1)
