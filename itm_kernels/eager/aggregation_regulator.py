"""RAR on a block of pairs, in plain PyTorch: attention over the alignment vectors, asked by the pooled vector."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.norms import l2norm, linear
from itm_kernels.eager.stage_blocks import Place, accumulators, batch_without_vectors, differentiate, places, zeros_of
from itm_kernels.ops.dropout import KEYS, POOLED, dropout_scale
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions, product_dtype


class Numbers(NamedTuple):
    """Global numbers of what a block holds, for dropout masks."""

    images: Tensor  # int64, broadcasts to [H, G]
    captions: Tensor  # int64, broadcasts to [H, G]


class Dropout(NamedTuple):
    """Dropout of the two branches of a step; None in its place: none."""

    probability: float
    seed: int
    numbers: Numbers


def mean_alignment(alignments: Tensor, valid: Tensor) -> Tensor:  # [H, G, Q, S], [G, Q] -> [H, G, S]
    """Mean over the valid queries: what the first step asks with."""
    return torch.where(valid[..., None], alignments, 0.0).sum(2) / valid.sum(-1)[:, None]


def pool(
    alignments: Tensor,  # [H, G, Q, S]
    pooled: Tensor,  # [H, G, S]
    valid: Tensor,  # [G, Q]
    parameters: AggregationParameters,
    step: int,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> Tensor:  # [H, G, S]
    """One step: ``l2norm(sum_i p_i x_i)``, ``p = softmax(w . (tanh(Wk x) * tanh(Wq pooled)))``."""
    of_step = AggregationParameters(*(tensor[step] for tensor in parameters))
    keys = torch.tanh(linear(alignments, of_step.key_weight, of_step.key_bias, dtype))
    asked = torch.tanh(linear(pooled, of_step.pooled_weight, of_step.pooled_bias, dtype))
    if dropout is not None:
        keys = keys * _scale(dropout, step, KEYS, valid.shape[1], keys)
        asked = asked * _scale(dropout, step, POOLED, 1, asked[:, :, None])[:, :, 0]
    logits = (keys @ (asked * of_step.value_weight)[..., None])[..., 0] + of_step.value_bias
    weights = torch.softmax(logits.masked_fill(~valid, -torch.inf), dim=-1)
    return l2norm((weights[:, :, None] @ alignments)[:, :, 0])


def _scale(dropout: Dropout, step: int, branch: int, queries: int, like: Tensor) -> Tensor:  # [H, G, queries, S]
    return dropout_scale(
        dropout.numbers.images[..., None],
        dropout.numbers.captions[..., None],
        torch.arange(queries, device=like.device),
        like.shape[-1],
        step=step,
        branch=branch,
        dropout=dropout.probability,
        seed=dropout.seed,
        dtype=like.dtype,
    )


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    pooled: Tensor | None,  # [I, C, S]; None: the mean of the alignments
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AggregationParameters,  # of all steps
    options: AggregationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C, S]
    """Pooled vectors, block by block."""
    batch = batch_without_vectors(alignments, word_counts, word_offsets, region_counts, options.t2i)
    wide, dtype = score_dtype(alignments.dtype), product_dtype(alignments.dtype, parameters.key_weight.dtype)
    parameters = AggregationParameters(*(tensor.to(wide) for tensor in parameters))
    made = alignments.new_empty(batch.images, batch.captions, alignments.shape[-1], dtype=wide)
    for place in places(batch, options.t2i, _query_bytes(alignments, options), workspace_bytes):
        inputs = place.queries(alignments), place.pairs(pooled)
        place.put_pairs(made, _pooled_of_block(place, options, dtype, *inputs, *parameters)[0])
    return made


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    pooled: Tensor | None,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients, block by block; wide accumulators."""
    batch = batch_without_vectors(alignments, word_counts, word_offsets, region_counts, options.t2i)
    wide, dtype = score_dtype(alignments.dtype), product_dtype(alignments.dtype, parameters.key_weight.dtype)
    widened = [tensor.to(wide) for tensor in parameters]
    of_alignments, of_parameters = zeros_of(alignments), accumulators(widened)
    of_pooled = None if pooled is None else zeros_of(pooled)
    for place in places(batch, options.t2i, _query_bytes(alignments, options), workspace_bytes):
        inputs = [place.queries(alignments), place.pairs(pooled), *widened]
        found = differentiate(partial(_pooled_of_block, place, options, dtype), inputs, [place.pairs(grad)])
        place.put_queries(of_alignments, found[0])
        if of_pooled is not None:
            place.put_pairs(of_pooled, found[1])
        for total, grad_here in zip(of_parameters, found[2:], strict=True):
            total += grad_here
    narrowed = (total.to(tensor.dtype) for total, tensor in zip(of_parameters, parameters, strict=True))
    return of_alignments, of_pooled, AggregationParameters(*narrowed)


def _pooled_of_block(
    place: Place,
    options: AggregationOptions,
    dtype: torch.dtype,
    alignments: Tensor,  # [H, G, Q, S]
    pooled: Tensor | None,  # [H, G, S]
    *tensors: Tensor,
) -> tuple[Tensor]:  # [H, G, S]
    valid = place.queries_valid
    if pooled is None:
        pooled = mean_alignment(alignments, valid)
    images = torch.arange(place.start, place.stop, device=valid.device)[:, None] + options.image_offset
    captions = place.rows[None] + options.caption_offset
    numbers = Numbers(images, captions) if options.t2i else Numbers(images.t(), captions.t())
    dropout = Dropout(options.dropout, options.seed, numbers) if options.dropout else None
    return (pool(alignments, pooled, valid, AggregationParameters(*tensors), options.step, dropout, dtype),)


def _query_bytes(alignments: Tensor, options: AggregationOptions) -> int:
    """What autograd keeps for one query of one pair, masks included, and its gradients on their way."""
    elements = alignments.shape[-1] * (18 if options.dropout else 10)
    return elements * score_dtype(alignments.dtype).itemsize
