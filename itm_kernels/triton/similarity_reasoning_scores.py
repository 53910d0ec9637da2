"""``similarity_reasoning_scores`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters
from itm_kernels.pair_blocks import similarity_reasoning_scores
from itm_kernels.pair_blocks.similarity_reasoning_scores import Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [C, D]
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR; float32
    """Scores, block by block, and the statistics that normalised them."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(regions, words, word_counts, region_counts, image_global, caption_global, word_offsets)
    return similarity_reasoning_scores.forward(
        STEPS, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(regions, words, word_counts, region_counts, image_global, caption_global, word_offsets)
    return similarity_reasoning_scores.backward(
        STEPS, grad_scores, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )
