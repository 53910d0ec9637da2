"""``attention_filtration`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions
from itm_kernels.pair_blocks import attention_filtration
from itm_kernels.pair_blocks.attention_filtration import Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C] means and biased variances; None where the batch's own count
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C] float32
    """Filtered alignments, block by block, and the statistics that normalised them."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, global_alignments, word_counts, word_offsets)
    return attention_filtration.forward(STEPS, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    assert statistics is not None, "the op has kept those of the forward"
    inputs = Inputs(alignments, global_alignments, word_counts, word_offsets)
    return attention_filtration.backward(
        STEPS, grad, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )
