"""``alignment_vectors`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions
from itm_kernels.pair_blocks import alignment_vectors
from itm_kernels.pair_blocks.alignment_vectors import Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Inputs", "backward", "forward"]


def forward(
    kernels: Kernels,
    inputs: Inputs,
    parameters: AlignmentParameters,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S] float32
    """Alignment vectors, block by block."""
    steps = DeviceSteps(kernels.ops)
    return alignment_vectors.forward(steps, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    kernels: Kernels,
    grad: Tensor,
    inputs: Inputs,
    parameters: AlignmentParameters,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return alignment_vectors.backward(steps, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
