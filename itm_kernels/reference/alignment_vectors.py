"""Definition of ``alignment_vectors``: how a query and what it attends to differ, in S numbers.

For one pair, queries q_i and keys k_l (t2i: words attend to regions; i2t: the reverse), a gate M_i and a temperature
t_i of each query (SGRAF: M = 1, t = 9; RCAR: M = 1, t = 10 or 3 at first, then what RCR makes of them):

    s_li = k_l . (q_i * M_i)
    z_li = phi(s_li) / (sqrt(sum_i phi(s_li)^2) + eps)         phi = LeakyReLU 0.1; for each key over the queries
    a_il = softmax_l t_i z_li
    c_i  = l2norm(sum_l a_il k_l)
    x_i  = l2norm(W (q_i - c_i)^2 + b)                         the square of each component

The attention alone sees the gate. eps = 1e-8 is added to norms, outside the root.

Sources: Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, and "Plug-and-Play
Regulators for Image-Text Matching", TIP 2023, with their published code.

Edges: a key whose products are all zero has a zero row z and no gradient through it; a zero vector under l2norm stays
zero without gradient (published: NaN). One query: z is 1 or -1 but for eps. One key: a = 1. A temperature of 0 attends
to all keys alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions
from itm_kernels.reference.common import (
    at_step,
    captions_of,
    filled,
    joined_captions,
    l2norm,
    over_images,
    stage_gradients,
    wide,
    widened,
    words_of_captions,
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AlignmentParameters,  # of one step
    attention_scores: Tensor | None,  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: AlignmentOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    """Alignment vectors of all pairs by the literal formula; zeros for what does not count."""
    rounded = AlignmentParameters(*(wide(tensor, regions.dtype) for tensor in parameters))
    features = widened([regions, words, attention_scores, temperatures], regions.dtype)
    return _vectors(features, word_counts, region_counts, rounded, options)


def backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AlignmentParameters,
    attention_scores: Tensor | None,
    temperatures: Tensor | None,
    options: AlignmentOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients of ``sum(vectors * grad)`` by autograd of the literal formula."""

    def function(features: list[Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return (_vectors(features, word_counts, region_counts, AlignmentParameters(*tensors), options),)

    features = [regions, words, attention_scores, temperatures]
    (of_regions, of_words, *of_given), of_parameters = stage_gradients(
        function, features, list(parameters), (grad,), regions.dtype
    )
    assert of_regions is not None
    assert of_words is not None
    return of_regions, of_words, AlignmentParameters(*of_parameters), of_given[0], of_given[1]


def _vectors(
    features: list[Tensor | None],
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AlignmentParameters,
    options: AlignmentOptions,
) -> Tensor:
    regions, words, scores, temperatures = features
    assert regions is not None
    assert words is not None
    padded, of_step = words.dim() == 3, at_step(parameters, 0)
    scores_by_caption = scores if scores is None else words_of_captions(scores, 2, word_counts, padded)
    by_caption: list[Tensor] | None = None
    if temperatures is not None and options.t2i:
        by_caption = words_of_captions(temperatures, 1, word_counts, padded)
    elif temperatures is not None:
        by_caption = list(temperatures.unbind(2))
    made = []
    for c, caption in enumerate(captions_of(words, word_counts)):

        def vectors_of(images: Tensor, valid: Tensor, c: int = c, caption: Tensor = caption) -> Tensor:
            captions, count = caption.expand(valid.shape[0], -1, -1), valid.shape[1]  # [B, n, D]
            queries, keys = (captions, valid) if options.t2i else (valid, captions)
            if scores_by_caption is None:
                products = keys @ queries.transpose(1, 2)
            else:
                products = scores_by_caption[c][images, :count]  # [B, r, n]
                products = products if options.t2i else products.transpose(1, 2)
            temperature: Tensor | float = options.temperature
            if by_caption is not None:
                temperature = by_caption[c][images] if options.t2i else by_caption[c][images, :count]
            attended = l2norm(attention_of(products, temperature) @ keys)
            vectors = difference(queries, attended, of_step)
            return vectors if options.t2i else filled(vectors, 1, regions.shape[1])

        made.append(over_images(regions, region_counts, vectors_of))
    if options.t2i:
        return joined_captions(made, 1, words.shape[1] if padded else None)
    return torch.stack(made, dim=2)


def align(
    queries: Tensor,  # [B, Q, D]
    keys: Tensor,  # [B, K, D]
    gate: Tensor | None,  # [B, Q, D]; None: ones
    temperature: Tensor | float,  # [B, Q], or one for all
    parameters: AlignmentParameters,  # of one step: weight [S, D], bias [S]
) -> Tensor:  # [B, Q, S]
    """Alignment vectors of B pairs."""
    return difference(queries, attend(queries, keys, gate, temperature), parameters)


def attend(
    queries: Tensor, keys: Tensor, gate: Tensor | None, temperature: Tensor | float
) -> Tensor:  # [B, Q, D], [B, K, D] -> [B, Q, D]
    """What each query attends to, of length 1."""
    return l2norm(attention(queries, keys, gate, temperature) @ keys)


def attention(
    queries: Tensor, keys: Tensor, gate: Tensor | None, temperature: Tensor | float
) -> Tensor:  # [B, Q, D], [B, K, D] -> [B, Q, K]
    """One distribution over the keys for each query."""
    asked = queries if gate is None else queries * gate
    return attention_of(keys @ asked.transpose(1, 2), temperature)


def attention_of(products: Tensor, temperature: Tensor | float) -> Tensor:  # [B, K, Q] -> [B, Q, K]
    """The same from the products of keys and gated queries."""
    normalised = l2norm(F.leaky_relu(products, 0.1)).transpose(1, 2)  # [B, Q, K]
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(2)
    return torch.softmax(temperature * normalised, dim=2)


def difference(a: Tensor, b: Tensor, parameters: AlignmentParameters) -> Tensor:  # [..., D], [..., D] -> [..., S]
    """``l2norm(W (a - b)^2 + bias)``."""
    return l2norm(F.linear((a - b).square(), parameters.weight, parameters.bias))
