"""``aggregation_regulator`` on the Triton floor: its kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from torch import Tensor

from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions
from itm_kernels.pair_blocks import aggregation_regulator
from itm_kernels.pair_blocks.aggregation_regulator import Inputs
from itm_kernels.triton.cross_attention_scores import why_not

__all__ = ["backward", "forward", "why_not"]


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    pooled: Tensor | None,  # [I, C, S]; None: the mean of the alignments
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AggregationParameters,  # of all steps
    options: AggregationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C, S] float32
    """Pooled vectors, block by block."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, pooled, word_counts, region_counts, word_offsets)
    return aggregation_regulator.forward(STEPS, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    pooled: Tensor | None,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    from itm_kernels.triton.steps import STEPS

    inputs = Inputs(alignments, pooled, word_counts, region_counts, word_offsets)
    return aggregation_regulator.backward(STEPS, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
