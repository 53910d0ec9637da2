"""``similarity_graph`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.pair_blocks import similarity_graph
from itm_kernels.pair_blocks.similarity_graph import Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: GraphParameters,  # of all steps
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C, S] float32
    """The global nodes after the last step, block by block."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, global_alignments, word_counts, word_offsets)
    return similarity_graph.forward(STEPS, inputs, parameters, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, global_alignments, word_counts, word_offsets)
    return similarity_graph.backward(STEPS, grad, inputs, parameters, workspace_bytes=workspace_bytes)
