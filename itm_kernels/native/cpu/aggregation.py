"""The aggregation regulator of a chunk (RAR): alignment vectors pooled by attention, asked by the pooled vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu.alignment import Vectors
from itm_kernels.native.cpu.pair_chunks import Chunk, add_product, product
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions


class Pooled(NamedTuple):
    """A step's pooled vectors, and what its backward reads."""

    pooled: Tensor  # [pairs, S] float32
    norms: Tensor  # [pairs]
    weights: Tensor  # [rows]
    keys: Tensor  # [rows, S] float32, after tanh
    asked: Tensor  # [pairs, S] float32, after tanh
    before: Tensor  # [pairs, S], rounded for the product


class Dropout(NamedTuple):
    """The arguments of the native steps that say where masks come from."""

    group_numbers: Tensor  # in the whole batch
    segment_numbers: Tensor
    groups_are_images: bool
    probability: float
    seed: int

    @staticmethod
    def of(chunk: Chunk, options: RegulatedOptions | AggregationOptions) -> Dropout:
        of_groups, of_segments = options.image_offset, options.caption_offset
        if not options.t2i:
            of_groups, of_segments = of_segments, of_groups
        return Dropout(
            chunk.group_numbers + of_groups, chunk.segment_numbers + of_segments, options.t2i, options.dropout,
            options.seed,
        )  # fmt: skip


def mean(chunk: Chunk, vectors: Tensor) -> Tensor:  # [rows, S] float32 -> [pairs, S] float32
    """What the first step asks with."""
    means = chunk.workspace.floats("means", chunk.pairs, vectors.shape[1])
    torch.ops.itm_kernels_native.mean_of_segments(vectors, chunk.offsets, means)
    return means


def mean_backward(chunk: Chunk, grad_means: Tensor, grad_vectors: Tensor) -> None:
    """Adds to ``grad_vectors [rows, S]``."""
    torch.ops.itm_kernels_native.mean_of_segments_backward(grad_means, chunk.offsets, grad_vectors)


def pool(
    chunk: Chunk,
    vectors: Vectors,
    before: Tensor,  # [pairs, S] float32
    parameters: AggregationParameters,  # of one step
    dropout: Dropout,
    step: int,
) -> Pooled:
    """Step ``step``."""
    wide, floats = vectors.wide, chunk.workspace.floats
    keys = product(vectors.rounded, parameters.key_weight.t(), floats(chunk.name("pool keys", step), *wide.shape))
    rounded = before.to(vectors.rounded.dtype)
    asked = (rounded @ parameters.pooled_weight.t()).float()
    weights = floats(chunk.name("pool weights", step), chunk.rows)
    norms = floats(chunk.name("pool norms", step), chunk.pairs)
    pooled = floats(f"pooled {step}", *before.shape)  # `before` may be the one of the step before
    torch.ops.itm_kernels_native.pool_rows(
        wide, chunk.offsets, *dropout, step, parameters.key_bias, parameters.pooled_bias, parameters.value_weight,
        keys, asked, weights, pooled, norms,
    )  # fmt: skip
    return Pooled(pooled, norms, weights, keys, asked, rounded)


def pool_backward(
    chunk: Chunk,
    state: Pooled,
    vectors: Vectors,
    grad_pooled: Tensor,  # [pairs, S] float32
    parameters: AggregationParameters,
    grads: AggregationParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
    dropout: Dropout,
    step: int,
) -> Tensor:  # [pairs, S] float32: gradient of the pooled vectors before
    """Gradients of parameters are added where they belong. That of the value's bias, which moves no weight, is zero."""
    grad_value = chunk.workspace.floats("grad value", *grad_pooled.shape)
    grad_key_bias = chunk.workspace.floats("grad key bias", *grad_pooled.shape)
    torch.ops.itm_kernels_native.pool_rows_backward(
        vectors.wide, chunk.offsets, *dropout, step, parameters.value_weight, state.pooled, state.norms, grad_pooled,
        state.weights, state.keys, state.asked, grad_vectors, grad_key_bias,
        grad_value,
    )  # fmt: skip
    grads.value_weight.add_(grad_value.sum(0))
    keys = state.keys.to(vectors.rounded.dtype)
    add_product(grads.key_weight, keys.t(), vectors.rounded)
    grads.key_bias.add_(grad_key_bias.sum(0))
    add_product(grad_vectors, keys, parameters.key_weight)
    asked = state.asked.to(vectors.rounded.dtype)
    add_product(grads.pooled_weight, asked.t(), state.before)
    grads.pooled_bias.add_(state.asked.sum(0))
    return (asked @ parameters.pooled_weight).float()
