"""``attention_filtration`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions
from itm_kernels.pair_blocks import attention_filtration
from itm_kernels.pair_blocks.attention_filtration import Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Inputs", "backward", "forward"]


def forward(
    kernels: Kernels,
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C] float32
    """Filtered alignments, block by block, and the statistics that normalised them."""
    steps = DeviceSteps(kernels.ops)
    return attention_filtration.forward(steps, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)


def backward(
    kernels: Kernels,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: FiltrationParameters,
    statistics: Tensor,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return attention_filtration.backward(
        steps, grad, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes
    )
