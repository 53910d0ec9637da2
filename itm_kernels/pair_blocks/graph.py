"""The similarity graph of a block (SGR): library products around the kernels, forward and backward.

``(Wq x_i + bq) . (Wk x_k + bk)`` under a softmax over k is ``(x_i Wq^T Wk + bq Wk) . x_k``: what does not depend on k
cancels, and one product a node is left of two. The last step is asked for the whole of a pair alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.pair_blocks.blocks import PairBlock, add_product


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
    query, query_bias, key, _, node, node_bias = parameters
    merged = query.float().transpose(1, 2) @ key.float()
    shift = (query_bias[:, None] @ key.float()).squeeze(1)
    return [Step(*of_step) for of_step in zip(merged.to(query.dtype), shift, node, node_bias, strict=True)]


def zeros_of(parameters: GraphParameters | None) -> Step | None:
    """Where the gradients of the steps add up, one behind another."""
    if parameters is None:
        return None
    of_matrix, of_vector = (torch.zeros_like(p, dtype=torch.float32) for p in parameters[:2])
    return Step(of_matrix, of_vector, torch.zeros_like(of_matrix), torch.zeros_like(of_vector))


def unmerged(parameters: GraphParameters, grads: Step) -> GraphParameters:
    """Gradients of the parameters, all steps at once. That of the key's bias, which moves no weight, is zero."""
    query, query_bias, key = (tensor.float() for tensor in parameters[:3])
    return GraphParameters(
        key @ grads.merged.transpose(1, 2),
        (key @ grads.shift[:, :, None]).squeeze(2),
        query @ grads.merged + query_bias[:, :, None] * grads.shift[:, None],
        torch.zeros_like(query_bias),
        grads.node_weight,
        grads.node_bias,
    )


def reason(block: PairBlock, nodes: Tensor, by: Step, *, last: bool) -> Reasoned:
    """One step on ``nodes [rows + pairs, S]``."""
    asking = torch.mm(nodes[block.rows :] if last else nodes, by.merged)
    gathered = torch.empty_like(asking)
    block.steps.graph_attend(block, nodes, asking, by.shift, gathered)
    # Without a backward what asked has had its use.
    after = torch.mm(gathered, by.node_weight.t(), out=None if block.keeps else asking)
    wide = block.floats(*after.shape) if last else None
    block.steps.relu_rows(after, by.node_bias, wide)
    return Reasoned(nodes, asking, gathered, after, wide)


def reason_backward(block: PairBlock, made: Reasoned, by: Step, grads: Step, grad_after: Tensor) -> Tensor:
    """Gradient of the nodes before, ``[rows + pairs, S]`` float32; those of parameters are added."""
    nodes, asking, gathered, after, _ = made
    block.add_sum(grads.node_bias, block.steps.relu_rows_backward(grad_after, after))
    add_product(grads.node_weight, after.t(), gathered)
    torch.mm(after, by.node_weight, out=gathered)
    grad_nodes = block.floats(*nodes.shape)
    sums = block.steps.graph_attend_backward(block, nodes, by.shift, gathered, asking, grad_nodes)
    block.add_sum(grads.shift, sums)
    first = nodes.shape[0] - asking.shape[0]
    add_product(grads.merged, nodes[first:].t(), asking)
    add_product(grad_nodes[first:], asking, by.merged.t())
    return grad_nodes
