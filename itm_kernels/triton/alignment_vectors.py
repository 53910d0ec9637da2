"""``alignment_vectors`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions
from itm_kernels.pair_blocks import alignment_vectors
from itm_kernels.pair_blocks.alignment_vectors import Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AlignmentParameters,  # of one step
    attention_scores: Tensor | None,  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S] float32
    """Alignment vectors, block by block."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(regions, words, word_counts, region_counts, attention_scores, temperatures, word_offsets)
    return alignment_vectors.forward(STEPS, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AlignmentParameters,
    attention_scores: Tensor | None,
    temperatures: Tensor | None,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(regions, words, word_counts, region_counts, attention_scores, temperatures, word_offsets)
    return alignment_vectors.backward(STEPS, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
