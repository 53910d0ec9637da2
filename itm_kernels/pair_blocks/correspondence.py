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
    hidden = _tanh(block, product(vectors, parameters.hidden_weight.t()), parameters.hidden_bias, block.dtype)
    gates_before = None if before is None else before.gates
    gated = torch.mm(hidden, parameters.gate_weight.t())
    if not block.keeps:
        del hidden
    tangents = torch.empty_like(gated) if block.keeps else None
    handed_on: Tensor | None = None
    if not last:  # without a backward the gate may take the place of the one before, element by element
        reused = gates_before is not None and not block.keeps
        handed_on = gates_before if reused else torch.empty_like(gated)
    block.steps.gate_queries(block, parameters.gate_bias, gates_before, gated, tangents, handed_on)
    products = block.products_with(gated)

    of_temperature = product(vectors, parameters.temperature_hidden_weight.t())
    of_temperature = _tanh(block, of_temperature, parameters.temperature_hidden_bias, torch.float32)
    shift = parameters.temperature_bias + (temperature if before is None else before.temperatures)
    warmer = torch.addmv(shift.expand(block.rows), of_temperature, parameters.temperature_weight).relu_()
    if not block.keeps:
        return Regulated(products, warmer, handed_on, None, None, None, None, None)
    return Regulated(products, warmer, handed_on, gates_before, tangents, gated, hidden, of_temperature)


def regulate_backward(
    block: PairBlock,
    regulated: Regulated,
    vectors: Tensor,  # [rows, S], rounded for products
    grad_products: Tensor,  # [G, K, L]
    grad_temperatures: Tensor,  # [rows]
    grad_gates: Tensor | None,  # [rows, D] float32: of this step's gates, overwritten by that of those before
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
) -> Tensor:  # [rows]: gradient of the temperatures before
    """Gradients of parameters, queries and keys are added where they belong."""
    assert regulated.gated is not None
    assert regulated.hidden is not None
    assert regulated.temperature_hidden is not None
    block.add_to_keys(grad_products, regulated.gated)
    grad_gated = block.combine_keys(grad_products)
    assert regulated.tangents is not None
    sums = block.steps.gate_queries_backward(block, regulated.before, regulated.tangents, grad_gated, grad_gates)
    grads.gate_bias.add_(sums.sum(0))
    add_product(grads.gate_weight, grad_gated.t(), regulated.hidden)
    after = product(grad_gated, parameters.gate_weight)
    del grad_gated
    grad_hidden = _tanh_backward(block, regulated.hidden, after, None, grads.hidden_bias)
    del after
    add_product(grads.hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.hidden_weight)

    # relu: where it is zero nothing passes.
    grad_temperatures = torch.where(regulated.temperatures > 0, grad_temperatures, 0.0)
    grads.temperature_weight.addmv_(regulated.temperature_hidden.t(), grad_temperatures)
    grads.temperature_bias.add_(grad_temperatures.sum())
    grad_hidden = _tanh_backward(
        block, regulated.temperature_hidden, grad_temperatures, parameters.temperature_weight,
        grads.temperature_hidden_bias,
    )  # fmt: skip
    add_product(grads.temperature_hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.temperature_hidden_weight)
    return grad_temperatures


def _tanh(block: PairBlock, rows: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:  # [rows, H] float32
    out = rows if dtype == rows.dtype else torch.empty_like(rows, dtype=dtype)
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
    grad_bias.add_(block.steps.tanh_rows_backward(tangents, grad, factors, out).sum(0))
    return out
