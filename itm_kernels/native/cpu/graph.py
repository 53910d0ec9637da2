"""The similarity graph of a chunk (SGR): library products around the C++ steps, forward and backward.

``(Wq x_i + bq) . (Wk x_k + bk)`` under a softmax over k is ``(x_i Wq^T Wk + bq Wk) . x_k``: what does not depend on k
cancels, and one product a node is left of two. The last step is asked for the whole of a pair alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu.pair_chunks import Chunk, add_product
from itm_kernels.ops.parameters import GraphParameters


class Step(NamedTuple):
    """Parameters of a step, or their gradients."""

    merged: Tensor  # [S, S], Wq^T Wk
    shift: Tensor  # [S], bq Wk
    node_weight: Tensor  # [S, S]
    node_bias: Tensor  # [S]


class Reasoned(NamedTuple):
    """What a step made."""

    nodes: Tensor  # [rows + pairs, S], before it
    asking: Tensor  # [rows + pairs, S], or [pairs, S]
    gathered: Tensor  # like asking
    after: Tensor  # like asking: nodes
    wide: Tensor | None  # [pairs, S] float32, of the last step


def steps_of(parameters: GraphParameters | None) -> list[Step]:
    """Parameters of every step, rounded already, as the products want them."""
    if parameters is None:
        return []
    made = []
    for step in range(parameters.query_weight.shape[0]):
        query, query_bias, key, _, node, node_bias = (tensor[step] for tensor in parameters)
        merged = query.float().t() @ key.float()
        made.append(Step(merged.to(query.dtype), query_bias @ key.float(), node, node_bias))
    return made


def zeros_of(parameters: GraphParameters | None) -> list[Step]:
    """Where the gradients of every step add up."""
    if parameters is None:
        return []
    _, _, s = parameters.query_weight.shape
    shapes = ((s, s), (s,), (s, s), (s,))
    return [
        Step(*(torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes))
        for _ in parameters.query_weight
    ]


def unmerged(parameters: GraphParameters, grads: list[Step]) -> GraphParameters:
    """Gradients of the parameters. That of the key's bias, which moves no weight, is zero."""
    made = []
    for step, grad in enumerate(grads):
        query, query_bias, key, key_bias, _, _ = (tensor[step].float() for tensor in parameters)
        made.append(
            (
                key @ grad.merged.t(),
                key @ grad.shift,
                query @ grad.merged + torch.outer(query_bias, grad.shift),
                torch.zeros_like(key_bias),
                grad.node_weight,
                grad.node_bias,
            )
        )
    return GraphParameters(*(torch.stack(tensors) for tensors in zip(*made, strict=True)))


def reason(chunk: Chunk, nodes: Tensor, by: Step, step: int, *, last: bool) -> Reasoned:
    """Step ``step`` on ``nodes [rows + pairs, S]``."""
    asked = nodes[chunk.rows :] if last else nodes
    take = chunk.workspace.take
    asking = torch.mm(asked, by.merged, out=take(chunk.name("asking", step), *asked.shape))
    gathered = take(chunk.name("gathered", step), *asked.shape)
    torch.ops.itm_kernels_native.graph_attend(nodes, chunk.offsets, chunk.pairs, asking, by.shift, gathered)
    # Without a backward to come, the nodes before have had their use.
    after = torch.mm(gathered, by.node_weight.t(), out=take(chunk.name("reasoned nodes", step), *asked.shape))
    wide = chunk.workspace.floats(chunk.name("reasoned nodes", step), *after.shape) if last else None
    torch.ops.itm_kernels_native.relu_rows(after, by.node_bias, wide)
    return Reasoned(nodes, asking, gathered, after, wide)


def reason_backward(chunk: Chunk, made: Reasoned, by: Step, grads: Step, grad_after: Tensor) -> Tensor:
    """Gradient of the nodes before, ``[rows + pairs, S]`` float32; those of parameters are added."""
    nodes, asking, gathered, after, _ = made
    sums = chunk.sums(after.shape[0], after.shape[1])
    torch.ops.itm_kernels_native.relu_rows_backward(grad_after, after, sums)
    grads.node_bias.add_(sums.sum(0))
    add_product(grads.node_weight, after.t(), gathered)
    torch.mm(after, by.node_weight, out=gathered)
    grad_nodes = chunk.workspace.floats("grad nodes", *nodes.shape)  # the same that came in: it has been read
    sums = chunk.sums(after.shape[0], after.shape[1])
    torch.ops.itm_kernels_native.graph_attend_backward(
        nodes, chunk.offsets, chunk.pairs, by.shift, gathered, asking, grad_nodes, sums
    )
    grads.shift.add_(sums.sum(0))
    first = nodes.shape[0] - asking.shape[0]
    add_product(grads.merged, nodes[first:].t(), asking)
    add_product(grad_nodes[first:], asking, by.merged.t())
    return grad_nodes
