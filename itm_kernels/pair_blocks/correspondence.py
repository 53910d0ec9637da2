"""The correspondence regulator of a block (RCR): alignment vectors to the next step's products and temperatures.

    h = tanh(W1 x + b1)      e = clamp(tanh(W2 h + b2) + e_before, -1, 1)      products = keys (q e)^T
    t = relu(u . tanh(U x + c1) + c2 + t_before)

The gate is made, used and thrown away within a block; a backward keeps its tanh and the gated queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.pair_blocks.blocks import PairBlock, add_product, product


class Regulated(NamedTuple):
    """The next attention, and what the backward reads; what only that needs is None where none follows."""

    products: Tensor  # [G, K, L] float32
    temperatures: Tensor  # [rows] float32
    gates: Tensor | None  # [rows, D]; None where no later step starts from them
    before: Tensor | None  # [rows, D]: the gates this step started from; None: ones
    tangents: Tensor | None  # [rows, D]
    gated: Tensor | None  # [rows, D]
    hidden: Tensor | None  # [rows, H]
    temperature_hidden: Tensor | None  # [rows, U] float32


class Gate(NamedTuple):
    """A step's gate alone, and what its backward reads, as above."""

    gates: Tensor | None  # [rows, D]
    before: Tensor | None  # [rows, D]
    tangents: Tensor | None  # [rows, D]
    gated: Tensor  # [rows, D]


def regulate(
    block: PairBlock,
    vectors: Tensor,  # [rows, S], rounded for products
    before: Regulated | None,
    temperature: float,  # where there is nothing before
    parameters: CorrespondenceParameters,  # of one step
    *,
    last: bool,
) -> Regulated:
    """One step; no gate is kept for another one after the last."""
    hidden = hide(block, vectors, parameters)
    made = make_gate(block, hidden, None if before is None else before.gates, parameters, last=last)
    if not block.keeps:
        del hidden
    products = block.products_with(made.gated)
    warmer, of_temperature = warm(
        block, vectors, None if before is None else before.temperatures, temperature, parameters
    )
    if not block.keeps:
        return Regulated(products, warmer, made.gates, None, None, None, None, None)
    return Regulated(products, warmer, made.gates, made.before, made.tangents, made.gated, hidden, of_temperature)


def hide(block: PairBlock, vectors: Tensor, parameters: CorrespondenceParameters) -> Tensor:  # -> [rows, H]
    """The hidden layer of the network that makes the gate, for products."""
    return _tanh(block, product(vectors, parameters.hidden_weight.t()), parameters.hidden_bias)


def make_gate(
    block: PairBlock,
    hidden: Tensor,  # [rows, H]
    before: Tensor | None,  # [rows, D]; None: ones
    parameters: CorrespondenceParameters,
    *,
    last: bool,
) -> Gate:
    """The gate of a step, and the queries times it."""
    gated = torch.mm(hidden, parameters.gate_weight.t())
    tangents = torch.empty_like(gated) if block.keeps else None
    handed_on: Tensor | None = None
    if not last:  # without a backward the gate may take the place of the one before, element by element
        reused = before is not None and not block.keeps
        handed_on = before if reused else torch.empty_like(gated)
    block.steps.gate_queries(block, parameters.gate_bias, before, gated, tangents, handed_on)
    return Gate(handed_on, before, tangents, gated)


def warm(
    block: PairBlock,
    vectors: Tensor,  # [rows, S]
    before: Tensor | None,  # [rows]; None: `temperature`
    temperature: float,
    parameters: CorrespondenceParameters,
) -> tuple[Tensor, Tensor]:  # [rows], [rows, U]
    """The temperatures after those before, and their hidden layer."""
    hidden = product(vectors, parameters.temperature_hidden_weight.t())
    warmer = block.floats(block.rows)
    block.steps.warm_rows(
        hidden, parameters.temperature_hidden_bias, parameters.temperature_weight, parameters.temperature_bias, before,
        temperature, warmer,
    )  # fmt: skip
    return warmer, hidden


def regulate_backward(
    block: PairBlock,
    regulated: Regulated,
    vectors: Tensor,  # [rows, S], rounded for products
    grad_products: Tensor,  # [G, K, L]
    grad_temperatures: Tensor,  # [rows]
    grad_gates: Tensor | None,  # [rows, D] float32: of this step's gates, overwritten by that of those before
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
) -> tuple[Tensor, Tensor]:  # [rows]; [rows, S] float32: gradients of the temperatures before and of the vectors
    """Gradients of parameters, queries and keys are added where they belong."""
    assert regulated.gated is not None
    assert regulated.hidden is not None
    assert regulated.temperature_hidden is not None
    made = Gate(None, regulated.before, regulated.tangents, regulated.gated)
    after = gate_backward(
        block, made, regulated.hidden, gated_backward(block, made, grad_products), grad_gates, parameters, grads
    )
    grad_vectors = hide_backward(block, regulated.hidden, vectors, after, parameters, grads)
    del after
    warmed = regulated.temperatures, regulated.temperature_hidden
    grad_temperatures = warm_backward(block, warmed, vectors, grad_temperatures, parameters, grads, grad_vectors)
    return grad_temperatures, grad_vectors


def gated_backward(block: PairBlock, made: Gate, grad_products: Tensor) -> Tensor:  # [G, K, L] -> [rows, D]
    """Gradient of the gated queries; that of the keys is added where it belongs."""
    block.add_to_keys(grad_products, made.gated)
    return block.combine_keys(grad_products)


def gate_backward(
    block: PairBlock,
    made: Gate,
    hidden: Tensor,  # [rows, H]
    grad_gated: Tensor,  # [rows, D], overwritten
    grad_gates: Tensor | None,  # [rows, D] float32: of this step's gates, overwritten by that of those before
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
) -> Tensor:  # [rows, H] float32
    """Gradient of the hidden layer."""
    assert made.tangents is not None
    sums = block.steps.gate_queries_backward(block, made.before, made.tangents, grad_gated, grad_gates)
    block.add_sum(grads.gate_bias, sums)
    add_product(grads.gate_weight, grad_gated.t(), hidden)
    return product(grad_gated, parameters.gate_weight)


def hide_backward(
    block: PairBlock,
    hidden: Tensor,  # [rows, H]
    vectors: Tensor,  # [rows, S]
    grad: Tensor,  # [rows, H] float32
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
) -> Tensor:  # [rows, S] float32
    """From the hidden layer to the alignment vectors."""
    grad_hidden = _tanh_backward(block, hidden, grad, None, grads.hidden_bias)
    add_product(grads.hidden_weight, grad_hidden.t(), vectors)
    return product(grad_hidden, parameters.hidden_weight)


def warm_backward(
    block: PairBlock,
    made: tuple[Tensor, Tensor],  # as `warm` gave them
    vectors: Tensor,  # [rows, S]
    grad_temperatures: Tensor,  # [rows]
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
) -> Tensor:  # [rows]: gradient of the temperatures before
    """From the temperatures to the alignment vectors."""
    temperatures, hidden = made
    # relu: where it is zero nothing passes.
    grad_temperatures = torch.ops.aten.threshold_backward(grad_temperatures, temperatures, 0)
    grads.temperature_weight.addmv_(hidden.t(), grad_temperatures)
    block.add_sum(grads.temperature_bias[None], grad_temperatures[:, None])
    grad_hidden = _tanh_backward(
        block, hidden, grad_temperatures, parameters.temperature_weight, grads.temperature_hidden_bias
    )
    add_product(grads.temperature_hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.temperature_hidden_weight)
    return grad_temperatures


def _tanh(block: PairBlock, rows: Tensor, bias: Tensor) -> Tensor:  # [rows, H] float32 -> [rows, H], for products
    out = rows if block.dtype == torch.float32 else torch.empty_like(rows, dtype=block.dtype)
    block.steps.tanh_rows(rows, bias, out)
    return out


def _tanh_backward(
    block: PairBlock,
    tangents: Tensor,  # [rows, H]
    grad: Tensor,  # [rows, H] float32, or [rows]: times `factors`
    factors: Tensor | None,  # [H]
    grad_bias: Tensor,  # [H], added to
) -> Tensor:  # [rows, H], for products
    out = torch.empty_like(tangents, dtype=block.dtype)
    block.add_sum(grad_bias, block.steps.tanh_rows_backward(tangents, grad, factors, out))
    return out
