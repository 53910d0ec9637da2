"""``correspondence_regulator`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions
from itm_kernels.pair_blocks import correspondence_regulator
from itm_kernels.pair_blocks.correspondence_regulator import Gradients, Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: CorrespondenceParameters,  # of all steps
    hidden: Tensor | None,  # [steps before, ..., H], ... the axes of queries; None: this is the first
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [..., H] float32
    """Attention scores, temperatures and hidden layer, block by block."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, regions, words, word_counts, region_counts, hidden, temperatures, word_offsets)
    return correspondence_regulator.forward(STEPS, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    grad_scores: Tensor,
    grad_temperatures: Tensor,
    grad_hidden: Tensor,
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: CorrespondenceParameters,
    hidden: Tensor | None,
    temperatures: Tensor | None,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    upstream = Gradients(grad_scores, grad_temperatures, grad_hidden)
    inputs = Inputs(alignments, regions, words, word_counts, region_counts, hidden, temperatures, word_offsets)
    return correspondence_regulator.backward(
        STEPS, upstream, inputs, parameters, options, workspace_bytes=workspace_bytes
    )
