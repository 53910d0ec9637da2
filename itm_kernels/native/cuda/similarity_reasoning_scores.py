"""``similarity_reasoning_scores`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters
from itm_kernels.pair_blocks import similarity_reasoning_scores
from itm_kernels.pair_blocks.similarity_reasoning_scores import Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Inputs", "backward", "forward"]


def forward(
    kernels: Kernels,
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR; float32
    """Scores, block by block, and the statistics that normalised them."""
    steps = DeviceSteps(kernels.ops)
    return similarity_reasoning_scores.forward(
        steps, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )


def backward(
    kernels: Kernels,
    grad_scores: Tensor,  # [I, C]
    inputs: Inputs,
    parameters: ReasoningParameters,
    statistics: Tensor | None,
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return similarity_reasoning_scores.backward(
        steps, grad_scores, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )
