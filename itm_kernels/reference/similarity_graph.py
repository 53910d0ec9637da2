"""Definition of ``similarity_graph``: SGR, the nodes of a pair reason with each other.

With the nodes N_i of a pair (the global alignment first, then one for each word), each step with weights of its own:

    e_ik = softmax_k((Wq N_i + bq) . (Wk N_k + bk))
    N_i' = relu(Ws (sum_k e_ik N_k) + bs)

No scale, no residual, no norm. After the last step node 0 is the pair.

Source: Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, with its published code.

Edges: bk moves no weight and has a zero gradient; relu passes nothing at 0. A caption of one word has two nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.ops.stage_options import product_dtype
from itm_kernels.reference.common import at_step, nodes_of_captions, stage_gradients, wide, widened


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def reason(nodes: Tensor, parameters: GraphParameters) -> Tensor:  # [B, nodes, S] -> [B, nodes, S]
    """One step, all nodes of B pairs."""
    p = parameters
    queries = F.linear(nodes, p.query_weight, p.query_bias)
    keys = F.linear(nodes, p.key_weight, p.key_bias)
    edges = torch.softmax(queries @ keys.transpose(1, 2), dim=2)  # [B, nodes, nodes]
    return torch.relu(F.linear(edges @ nodes, p.node_weight, p.node_bias))


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: GraphParameters,  # of all steps
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> Tensor:  # [I, C, S]
    """The global nodes of all pairs after the last step by the literal formula."""
    products = product_dtype(alignments.dtype, parameters.query_weight.dtype)
    rounded = GraphParameters(*(wide(tensor, products) for tensor in parameters))
    return _reasoned(widened([alignments, global_alignments], products), word_counts, rounded)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: GraphParameters,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients of ``sum(nodes * grad)`` by autograd of the literal formula."""

    def function(features: list[Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return (_reasoned(features, word_counts, GraphParameters(*tensors)),)

    (of_alignments, of_global), of_parameters = stage_gradients(
        function,
        [alignments, global_alignments],
        list(parameters),
        (grad,),
        product_dtype(alignments.dtype, parameters.query_weight.dtype),
    )
    assert of_alignments is not None
    assert of_global is not None
    return of_alignments, of_global, GraphParameters(*of_parameters)


def _reasoned(features: list[Tensor | None], word_counts: Tensor, parameters: GraphParameters) -> Tensor:
    columns = []
    for nodes in nodes_of_captions(features, word_counts):
        for step in range(parameters.query_bias.shape[0]):
            nodes = reason(nodes, at_step(parameters, step))
        columns.append(nodes[:, 0])
    return torch.stack(columns, dim=1)
