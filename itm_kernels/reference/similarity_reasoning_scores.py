"""Definition of ``similarity_reasoning_scores``: SGRAF, the published loop over captions with all nodes formed.

For one image v with its global vector g_v and one caption of n words e_j with g_t, the stages being those of
``alignment_vectors`` (words attend to regions, temperature 9, no gate), ``attention_filtration`` and
``similarity_graph``:

    N_0   = l2norm(Wg (g_v - g_t)^2 + bg)                      the global alignment
    N_j   = l2norm(Wl (c_j - e_j)^2 + bl), j = 1..n            a local alignment for each word
    f     = SAF(N), or node 0 of SGR(SGR(..(N)))               as many steps of SGR as it has
    score = sigmoid(w . f + b)

Source: Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, with its published code.
Statistics of SAF's normalisation are one pair of numbers a caption: in training over all images of this call, in
evaluation those given. Padding never counts. Without a step of SGR the global alignment alone is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import ReasoningParameters
from itm_kernels.reference.alignment_vectors import align, difference
from itm_kernels.reference.attention_filtration import filter_nodes, node_logits, statistics_of
from itm_kernels.reference.common import all_wide, at_step, captions_of, gradients, over_images
from itm_kernels.reference.similarity_graph import reason


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [C, D]
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C] means and biased variances; None where the batch's own count, and for SGR
    options: ReasoningOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> tuple[Tensor, Tensor]:  # [I, C], [2, C] for SAF and [2, 0] for SGR
    """Scores by the literal formula, differentiable by autograd, and the statistics that normalised, not so."""
    dtype = score_dtype(regions.dtype)
    parameters = parameters.of(all_wide(parameters.flat(), regions.dtype))
    regions, words, image_global, caption_global = (
        tensor.to(dtype) for tensor in (regions, words, image_global, caption_global)
    )
    columns, used = [], []
    for c, caption in enumerate(captions_of(words, word_counts)):
        nodes = nodes_of_caption(regions, caption, region_counts, image_global, caption_global[c], parameters, options)
        if options.reasoning == "SAF":
            assert parameters.filtration is not None, "the op has checked that it is there"
            logits = node_logits(nodes, parameters.filtration)
            if options.batch_statistics:
                normalising = statistics_of(logits)
            else:
                assert statistics is not None, "evaluation normalises with the running statistics"
                normalising = statistics[:, c].to(dtype)
            used.append(normalising.detach())
            pooled = filter_nodes(nodes, logits, normalising, parameters.filtration, options.eps)
        else:
            for step in range(options.steps):
                nodes = reason(nodes, at_step(parameters.graph, step))
            pooled = nodes[:, 0]
        columns.append(torch.sigmoid(pooled @ parameters.score.weight + parameters.score.bias))
    scores = torch.stack(columns, dim=1)
    return scores, torch.stack(used, dim=1) if used else scores.new_empty(2, 0)


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    parameters: ReasoningParameters,
    statistics: Tensor | None,
    options: ReasoningOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients of ``sum(scores * grad_scores)`` by autograd of the literal formula.

    Statistics of the batch are computed again: autograd differentiates through them. Those of evaluation are constants.
    """

    def scores_of(features: list[Tensor], tensors: list[Tensor | None]) -> Tensor:
        regions, words, image_global, caption_global = features
        of_tensors = parameters.of(tensors)
        counts = word_counts, region_counts
        return forward(regions, words, *counts, image_global, caption_global, of_tensors, statistics, options)[0]

    features = [regions, words, image_global, caption_global]
    (grad_regions, grad_words, grad_image, grad_caption), grads = gradients(
        scores_of, features, parameters.flat(), grad_scores
    )
    return grad_regions, grad_words, grad_image, grad_caption, parameters.of(grads)


def nodes_of_caption(
    regions: Tensor,  # [I, R, D]
    caption: Tensor,  # [n, D]
    region_counts: Tensor | None,  # [I]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [D]
    parameters: ReasoningParameters,
    options: ReasoningOptions,
) -> Tensor:  # [I, n + 1, S]
    """The nodes of all images with one caption, the global alignment first."""
    of_words, of_whole = at_step(parameters.local_alignment, 0), at_step(parameters.global_alignment, 0)

    def local(images: Tensor, valid: Tensor) -> Tensor:  # [B], [B, r, D] -> [B, n, S]
        return align(caption.expand(valid.shape[0], -1, -1), valid, None, options.temperature, of_words)

    whole = difference(image_global, caption_global, of_whole)  # [I, S]
    return torch.cat([whole.unsqueeze(1), over_images(regions, region_counts, local)], dim=1)
