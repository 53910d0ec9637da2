"""SGR on a block of pairs, in plain PyTorch: attention among the nodes of a pair, some steps.

``(Wq x_i + bq) . (Wk x_k + bk)`` under a softmax over k is ``(x_i Wq^T Wk + bq Wk) . x_k``: what does not depend on k
cancels, and one product a node is left of two. The last step is asked for the global node alone.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.eager.blocks import Batch
from itm_kernels.eager.norms import linear, product
from itm_kernels.eager.stage_blocks import Place, accumulators, batch_without_vectors, differentiate, places, zeros_of
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.ops.stage_options import product_dtype


def reason(
    nodes: Tensor,  # [I, C, 1 + W, S], the global node first
    valid: Tensor,  # [C, 1 + W]
    parameters: GraphParameters | None,
    dtype: torch.dtype,
) -> Tensor:  # [I, C, S]
    """The global node after all steps."""
    steps = 0 if parameters is None else parameters.query_weight.shape[0]
    for step in range(steps):
        assert parameters is not None
        of_step = GraphParameters(*(tensor[step] for tensor in parameters))
        asking = nodes[:, :, :1] if step == steps - 1 else nodes
        merged = product(of_step.query_weight.t(), of_step.key_weight, dtype)  # [S, S]
        shift = of_step.query_bias @ of_step.key_weight
        # Wide: logits may be larger than float16 goes.
        edges = (product(asking, merged, dtype) + shift) @ nodes.transpose(2, 3)
        weights = torch.softmax(edges.masked_fill(~valid[:, None], -torch.inf), dim=-1)
        gathered = product(weights, nodes, dtype)
        nodes = F.relu(linear(gathered, of_step.node_weight, of_step.node_bias, dtype))
    return nodes[:, :, 0]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: GraphParameters,  # of all steps
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C, S]
    """The global nodes after the last step, block by block."""
    batch = batch_without_vectors(alignments, word_counts, word_offsets, None, t2i=True)
    wide, dtype = score_dtype(alignments.dtype), product_dtype(alignments.dtype, parameters.query_weight.dtype)
    parameters = GraphParameters(*(tensor.to(wide) for tensor in parameters))
    made = global_alignments.new_empty(global_alignments.shape, dtype=wide)
    for place in places(batch, True, _node_bytes(batch, parameters), workspace_bytes):
        nodes = place.pairs(global_alignments), place.queries(alignments)
        place.put_pairs(made, _reasoned(place, dtype, *nodes, *parameters)[0])
    return made


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients, block by block; wide accumulators."""
    batch = batch_without_vectors(alignments, word_counts, word_offsets, None, t2i=True)
    wide, dtype = score_dtype(alignments.dtype), product_dtype(alignments.dtype, parameters.query_weight.dtype)
    widened = GraphParameters(*(tensor.to(wide) for tensor in parameters))
    of_alignments, of_global = zeros_of(alignments), zeros_of(global_alignments)
    totals = accumulators(widened)
    for place in places(batch, True, _node_bytes(batch, widened), workspace_bytes):
        inputs = [place.pairs(global_alignments), place.queries(alignments), *widened]
        found = differentiate(partial(_reasoned, place, dtype), inputs, [place.pairs(grad)])
        place.put_pairs(of_global, found[0])
        place.put_queries(of_alignments, found[1])
        for total, of_here in zip(totals, found[2:], strict=True):
            total += of_here
    narrowed = (total.to(tensor.dtype) for total, tensor in zip(totals, parameters, strict=True))
    return of_alignments, of_global, GraphParameters(*narrowed)


def _reasoned(
    place: Place,
    dtype: torch.dtype,
    whole: Tensor,  # [I, C, S]
    words: Tensor,  # [I, C, W, S]
    *tensors: Tensor,
) -> tuple[Tensor]:  # [I, C, S]
    valid = place.captions.valid
    also_whole = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
    nodes = torch.cat([whole[:, :, None], words], dim=2)
    return (reason(nodes, also_whole, GraphParameters(*tensors), dtype),)


def _node_bytes(batch: Batch, parameters: GraphParameters) -> int:
    """What autograd keeps for one node of one pair. Edges are as many as nodes; those of the longest count for all."""
    steps, width = parameters.query_bias.shape
    elements: int = 4 * width + steps * (8 * width + 4 * (1 + max(batch.lengths)))
    return elements * parameters.query_bias.element_size()
