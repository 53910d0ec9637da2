"""The gate and the temperature that RCAR has at every attention of chosen pairs: for pictures, metrics, research.

A few pairs and not all of them, so this is plain PyTorch on padded pairs, differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.layout import CaptionLayout, padded_words
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.pairs import check_count_values, check_pairs, score_dtype
from itm_kernels.ops.parameters import CorrespondenceParameters, RegulatedParameters, check_regulated

OP = "attention_states"
EPS = 1e-8


class AttentionState(NamedTuple):
    """One attention of P pairs. Queries are words (t2i) or regions (i2t), padded; what is padding holds no meaning."""

    gate: Tensor  # [P, Q, D], multiplies the queries
    temperature: Tensor  # [P, Q], multiplies the logits
    weights: Tensor  # [P, Q, K], over the keys; rows of valid queries sum to 1


def attention_states(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or packed [N, D]
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    pairs: Tensor,  # [P, 2] int64: image, caption
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
) -> list[AttentionState]:
    """Every attention that the scores of these pairs rest on, first to last; RCR changes it from one to the next.

    Without RCR there is one, with a gate of ones. ``"rcr"`` has one more than steps, ``"rcar"`` as many as steps.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit. Pairs out of range raise where they are on the host.
    """
    counts, _, of_regions = check_pairs(OP, regions, words, word_counts, region_counts)
    check_count_values(OP, regions, words, counts, of_regions)
    check_regulated(OP, parameters, options, regions)
    _check_pairs_of_indices(pairs, regions.shape[0], counts.shape[0])
    wide = score_dtype(regions.dtype)
    images, captions = pairs.to(regions.device).unbind(1)
    padded, word_valid = padded_words(words, word_counts)
    region_valid = regions.new_ones(regions.shape[:2], dtype=torch.bool)
    if of_regions is not None:
        region_valid = torch.arange(regions.shape[1], device=regions.device) < of_regions.to(regions.device)[:, None]
    sides = [
        (torch.where(valid[of][..., None], vectors[of].to(wide), 0.0), valid[of])
        for vectors, valid, of in ((regions, region_valid, images), (padded, word_valid, captions))
    ]
    (keys, key_valid), (queries, query_valid) = sides if options.t2i else reversed(sides)
    parameters = RegulatedParameters.of([None if p is None else p.to(wide) for p in parameters.flat()])
    gate = torch.ones_like(queries)
    temperature = queries.new_full(queries.shape[:2], options.temperature)
    states = [_state(queries, keys, query_valid, key_valid, gate, temperature)]
    for step in range(options.corrections):
        assert parameters.alignment is not None
        assert parameters.correspondence is not None
        attended = _l2norm(states[-1].weights @ keys)
        difference = (queries - attended).square()
        alignments = _l2norm(F.linear(difference, parameters.alignment.weight[step], parameters.alignment.bias[step]))
        of_step = CorrespondenceParameters(*(tensor[step] for tensor in parameters.correspondence))
        hidden = torch.tanh(F.linear(alignments, of_step.hidden_weight, of_step.hidden_bias))
        change = torch.tanh(F.linear(hidden, of_step.gate_weight, of_step.gate_bias))
        narrow = torch.tanh(F.linear(alignments, of_step.temperature_hidden_weight, of_step.temperature_hidden_bias))
        gate = (change + gate).clamp(-1, 1)
        temperature = torch.relu(narrow @ of_step.temperature_weight + of_step.temperature_bias + temperature)
        states.append(_state(queries, keys, query_valid, key_valid, gate, temperature))
    return states


def _state(
    queries: Tensor,  # [P, Q, D]
    keys: Tensor,  # [P, K, D]
    query_valid: Tensor,  # [P, Q]
    key_valid: Tensor,  # [P, K]
    gate: Tensor,  # [P, Q, D]
    temperature: Tensor,  # [P, Q]
) -> AttentionState:
    clipped = F.leaky_relu((queries * gate) @ keys.transpose(1, 2), 0.1)  # [P, Q, K]
    counted = torch.where(query_valid[..., None], clipped, 0.0)
    normalised = _over_norm(clipped, counted.square().sum(1, keepdim=True))
    logits = (temperature[..., None] * normalised).masked_fill(~key_valid[:, None], -torch.inf)
    return AttentionState(gate, temperature, torch.softmax(logits, dim=2))


def _l2norm(x: Tensor) -> Tensor:
    return _over_norm(x, x.square().sum(-1, keepdim=True))


def _over_norm(x: Tensor, square: Tensor) -> Tensor:
    positive = square > 0
    norm = torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)
    return torch.where(positive, x / (norm + EPS), 0.0)


def _check_pairs_of_indices(pairs: object, images: int, captions: int) -> None:
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
        got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"{OP}: pairs must be an int64 tensor, got {got}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{OP}: pairs must be [P, 2] (image, caption), got {list(pairs.shape)}")
    if pairs.device.type != "cpu" or not pairs.shape[0]:
        return
    for axis, (name, most) in enumerate((("image", images), ("caption", captions))):
        least, largest = int(pairs[:, axis].min()), int(pairs[:, axis].max())
        if least < 0 or largest >= most:
            wrong = least if least < 0 else largest
            raise ValueError(f"{OP}: pairs must name an {name} within 0..{most - 1}, got {wrong}")
