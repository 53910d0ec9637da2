"""The correspondence regulator of a chunk (RCR): alignment vectors to the next step's products and temperatures.

    h = tanh(W1 x + b1)      e = clamp(tanh(W2 h + b2) + e_before, -1, 1)      products = keys (q e)^T
    t = relu(u . tanh(U x + c1) + c2 + t_before)

The gate is made, used and thrown away within a chunk; a backward keeps its tanh and the gated queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu.pair_chunks import Chunk, add_product, product
from itm_kernels.ops.parameters import CorrespondenceParameters


class Regulated(NamedTuple):
    """The next attention, and what the backward reads; what only that needs is None where none follows."""

    products: Tensor  # [G, K, L] float32
    temperatures: Tensor  # [rows] float32
    gates: Tensor | None  # [rows, D] float32; None where no later step starts from them
    before: Tensor | None  # [rows, D] float32: the gates this step started from; None: ones
    tangents: Tensor | None  # [rows, D]
    gated: Tensor  # [rows, D]
    hidden: Tensor  # [rows, H]
    temperature_hidden: Tensor  # [rows, U] float32


def regulate(
    chunk: Chunk,
    vectors: Tensor,  # [rows, S]
    before: Regulated | None,
    temperature: float,  # where there is nothing before
    parameters: CorrespondenceParameters,  # of one step
    step: int,
    *,
    last: bool,
) -> Regulated:
    """Step ``step``; no gate is kept for another one after the last."""
    ops, take = torch.ops.itm_kernels_native, chunk.workspace.take
    hidden = take(chunk.name("hidden", step), chunk.rows, parameters.hidden_bias.shape[0])
    torch.mm(vectors, parameters.hidden_weight.t(), out=hidden)
    ops.tanh_rows(hidden, parameters.hidden_bias)
    gates_before = None if before is None else before.gates
    gated = chunk.wide(f"gated {step}" if chunk.keeps else None)
    tangents = chunk.wide(f"tangents {step}") if chunk.keeps else None
    # Without a backward the gate may take the place of the one before, element by element.
    gates = None if last else chunk.workspace.floats(chunk.name("gates", step), *gated.shape)
    torch.mm(hidden, parameters.gate_weight.t(), out=gated)
    ops.gate_queries(chunk.queries, parameters.gate_bias, gates_before, gated, tangents, gates)
    products = chunk.products_with(gated, chunk.name("gated products", step))

    of_temperature = chunk.workspace.floats(
        chunk.name("temperature hidden", step), chunk.rows, parameters.temperature_hidden_bias.shape[0]
    )
    product(vectors, parameters.temperature_hidden_weight.t(), of_temperature)
    ops.tanh_rows(of_temperature, parameters.temperature_hidden_bias)
    temperatures = chunk.workspace.floats(chunk.name("temperatures", step), chunk.rows)
    shift = parameters.temperature_bias + (temperature if before is None else before.temperatures)
    torch.addmv(shift.expand(chunk.rows), of_temperature, parameters.temperature_weight, out=temperatures)
    temperatures.relu_()
    return Regulated(products, temperatures, gates, gates_before, tangents, gated, hidden, of_temperature)


def regulate_backward(
    chunk: Chunk,
    regulated: Regulated,
    vectors: Tensor,  # [rows, S]
    grad_products: Tensor,  # [G, K, L] float32
    grad_temperatures: Tensor,  # [rows]
    grad_gates: Tensor | None,  # [rows, D] float32: of this step's gates, overwritten by that of those before
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
) -> Tensor:  # [rows]: gradient of the temperatures before
    """Gradients of parameters, queries and keys are added where they belong."""
    ops = torch.ops.itm_kernels_native
    assert regulated.tangents is not None
    grad_products = grad_products.to(chunk.keys.dtype)
    chunk.add_to_keys(grad_products, regulated.gated)
    grad_gated = chunk.combine_keys(grad_products, chunk.wide())
    sums = chunk.sums(*chunk.queries.shape)
    ops.gate_queries_backward(
        chunk.queries, regulated.before, regulated.tangents, grad_gated, grad_gates, chunk.grad_queries, sums
    )
    grads.gate_bias.add_(sums.sum(0))
    add_product(grads.gate_weight, grad_gated.t(), regulated.hidden)
    grad_hidden = chunk.workspace.take("grad hidden", *regulated.hidden.shape)
    torch.mm(grad_gated, parameters.gate_weight, out=grad_hidden)
    sums = chunk.sums(*grad_hidden.shape)
    ops.tanh_rows_backward(regulated.hidden, None, None, grad_hidden, sums)
    grads.hidden_bias.add_(sums.sum(0))
    add_product(grads.hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.hidden_weight)

    # relu: where it is zero nothing passes.
    grad_temperatures = torch.where(regulated.temperatures > 0, grad_temperatures, 0.0)
    hidden = regulated.temperature_hidden
    grads.temperature_weight.addmv_(hidden.t(), grad_temperatures)
    grads.temperature_bias.add_(grad_temperatures.sum())
    grad_hidden = chunk.workspace.floats("grad temperature hidden", *hidden.shape)
    sums = chunk.sums(*grad_hidden.shape)
    ops.tanh_rows_backward(hidden, grad_temperatures, parameters.temperature_weight, grad_hidden, sums)
    grads.temperature_hidden_bias.add_(sums.sum(0))
    grad_hidden = grad_hidden.to(vectors.dtype)
    add_product(grads.temperature_hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.temperature_hidden_weight)
    return grad_temperatures
