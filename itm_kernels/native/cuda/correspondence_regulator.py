"""``correspondence_regulator`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions
from itm_kernels.pair_blocks import correspondence_regulator
from itm_kernels.pair_blocks.correspondence_regulator import Gradients, Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Gradients", "Inputs", "backward", "forward"]


def forward(
    kernels: Kernels,
    inputs: Inputs,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [.., H] float32
    """Attention scores, temperatures and hidden layer, block by block."""
    steps = DeviceSteps(kernels.ops)
    return correspondence_regulator.forward(steps, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    kernels: Kernels,
    upstream: Gradients,
    inputs: Inputs,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return correspondence_regulator.backward(
        steps, upstream, inputs, parameters, options, workspace_bytes=workspace_bytes
    )
