"""``aggregation_regulator`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions
from itm_kernels.pair_blocks import aggregation_regulator
from itm_kernels.pair_blocks.aggregation_regulator import Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Inputs", "backward", "forward"]


def forward(
    kernels: Kernels,
    inputs: Inputs,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
) -> Tensor:  # [I, C, S] float32
    """Pooled vectors, block by block."""
    steps = DeviceSteps(kernels.ops)
    return aggregation_regulator.forward(steps, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    kernels: Kernels,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return aggregation_regulator.backward(steps, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
