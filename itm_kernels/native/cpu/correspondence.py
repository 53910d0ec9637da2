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


class Gate(NamedTuple):
    """A step's gate, and what its backward reads; what only that needs is None where none follows."""

    gates: Tensor | None  # [rows, D] float32; None where no later step starts from them
    before: Tensor | None  # [rows, D] float32: the gates this step started from; None: ones
    tangents: Tensor | None  # [rows, D]
    gated: Tensor  # [rows, D], the queries
    hidden: Tensor  # [rows, H]


class Temperatures(NamedTuple):
    """Of the next attention, and what the backward reads."""

    values: Tensor  # [rows] float32
    hidden: Tensor  # [rows, U] float32


class Regulated(NamedTuple):
    """The next attention, and what made it."""

    products: Tensor  # [G, K, L] float32
    gate: Gate
    temperatures: Temperatures


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
    gates_before = None if before is None else before.gate.gates
    gate = make_gate(chunk, hide(chunk, vectors, parameters, step), gates_before, parameters, step, last=last)
    products = chunk.products_with(gate.gated, chunk.name("gated products", step))
    temperature_before = temperature if before is None else before.temperatures.values
    return Regulated(products, gate, warm(chunk, vectors, temperature_before, parameters, step))


def hide(chunk: Chunk, vectors: Tensor, parameters: CorrespondenceParameters, step: int) -> Tensor:  # [rows, H]
    """The hidden layer of the network that makes the gate."""
    hidden = chunk.workspace.take(chunk.name("hidden", step), chunk.rows, parameters.hidden_bias.shape[0])
    torch.mm(vectors, parameters.hidden_weight.t(), out=hidden)
    torch.ops.itm_kernels_native.tanh_rows(hidden, parameters.hidden_bias)
    return hidden


def make_gate(
    chunk: Chunk,
    hidden: Tensor,  # [rows, H]
    before: Tensor | None,  # [rows, D] float32; None: ones
    parameters: CorrespondenceParameters,
    step: int,
    *,
    last: bool,
    asks: bool = True,  # whether the gated queries outlive the next stage
) -> Gate:
    """The gate of a step, and the queries times it."""
    gated = chunk.wide(f"gated {step}" if chunk.keeps and asks else None)
    tangents = chunk.wide(f"tangents {step}") if chunk.keeps else None
    # Without a backward the gate may take the place of the one before, element by element.
    gates = None if last else chunk.workspace.floats(chunk.name("gates", step), *gated.shape)
    torch.mm(hidden, parameters.gate_weight.t(), out=gated)
    torch.ops.itm_kernels_native.gate_queries(chunk.queries, parameters.gate_bias, before, gated, tangents, gates)
    return Gate(gates, before, tangents, gated, hidden)


def warm(
    chunk: Chunk,
    vectors: Tensor,  # [rows, S]
    before: float | Tensor,  # or [rows]
    parameters: CorrespondenceParameters,
    step: int,
) -> Temperatures:
    """The temperatures after those before."""
    floats = chunk.workspace.floats
    hidden = floats(chunk.name("temperature hidden", step), chunk.rows, parameters.temperature_hidden_bias.shape[0])
    product(vectors, parameters.temperature_hidden_weight.t(), hidden)
    torch.ops.itm_kernels_native.tanh_rows(hidden, parameters.temperature_hidden_bias)
    values = floats(chunk.name("temperatures", step), chunk.rows)
    shift = parameters.temperature_bias + before
    torch.addmv(shift.expand(chunk.rows), hidden, parameters.temperature_weight, out=values)
    return Temperatures(values.relu_(), hidden)


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
    grad_gated = gated_backward(chunk, regulated.gate, grad_products)
    grad_hidden = gate_backward(chunk, regulated.gate, grad_gated, grad_gates, parameters, grads)
    hide_backward(chunk, regulated.gate.hidden, vectors, grad_hidden, parameters, grads, grad_vectors)
    return warm_backward(chunk, regulated.temperatures, vectors, grad_temperatures, parameters, grads, grad_vectors)


def gated_backward(chunk: Chunk, gate: Gate, grad_products: Tensor) -> Tensor:  # [G, K, L] -> [rows, D]
    """Gradient of the gated queries; that of the keys is added where it belongs."""
    grad_products = grad_products.to(chunk.keys.dtype)
    chunk.add_to_keys(grad_products, gate.gated)
    return chunk.combine_keys(grad_products, chunk.wide())


def gate_backward(
    chunk: Chunk,
    gate: Gate,
    grad_gated: Tensor,  # [rows, D], overwritten
    grad_gates: Tensor | None,  # [rows, D] float32: of this step's gates, overwritten by that of those before
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
) -> Tensor:  # [rows, H]
    """Gradient of the hidden layer."""
    assert gate.tangents is not None
    sums = chunk.sums(*chunk.queries.shape)
    torch.ops.itm_kernels_native.gate_queries_backward(
        chunk.queries, gate.before, gate.tangents, grad_gated, grad_gates, chunk.grad_queries, sums
    )
    grads.gate_bias.add_(sums.sum(0))
    add_product(grads.gate_weight, grad_gated.t(), gate.hidden)
    grad_hidden = chunk.workspace.take("grad hidden", *gate.hidden.shape)
    return torch.mm(grad_gated, parameters.gate_weight, out=grad_hidden)


def hide_backward(
    chunk: Chunk,
    hidden: Tensor,  # [rows, H]
    vectors: Tensor,  # [rows, S]
    grad_hidden: Tensor,  # [rows, H], overwritten
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
) -> None:
    """From the hidden layer to the alignment vectors."""
    sums = chunk.sums(*grad_hidden.shape)
    torch.ops.itm_kernels_native.tanh_rows_backward(hidden, None, None, grad_hidden, sums)
    grads.hidden_bias.add_(sums.sum(0))
    add_product(grads.hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.hidden_weight)


def warm_backward(
    chunk: Chunk,
    temperatures: Temperatures,
    vectors: Tensor,  # [rows, S]
    grad_temperatures: Tensor,  # [rows]
    parameters: CorrespondenceParameters,
    grads: CorrespondenceParameters,  # added to
    grad_vectors: Tensor,  # [rows, S] float32, added to
) -> Tensor:  # [rows]: gradient of the temperatures before
    """From the temperatures to the alignment vectors."""
    # relu: where it is zero nothing passes.
    grad_temperatures = torch.where(temperatures.values > 0, grad_temperatures, 0.0)
    hidden = temperatures.hidden
    grads.temperature_weight.addmv_(hidden.t(), grad_temperatures)
    grads.temperature_bias.add_(grad_temperatures.sum())
    grad_hidden = chunk.workspace.floats("grad temperature hidden", *hidden.shape)
    sums = chunk.sums(*grad_hidden.shape)
    torch.ops.itm_kernels_native.tanh_rows_backward(
        hidden, grad_temperatures, parameters.temperature_weight, grad_hidden, sums
    )
    grads.temperature_hidden_bias.add_(sums.sum(0))
    grad_hidden = grad_hidden.to(vectors.dtype)
    add_product(grads.temperature_hidden_weight, grad_hidden.t(), vectors)
    add_product(grad_vectors, grad_hidden, parameters.temperature_hidden_weight)
    return grad_temperatures
