"""``similarity_graph`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.parameters import GraphParameters
from itm_kernels.pair_blocks import similarity_graph
from itm_kernels.pair_blocks.similarity_graph import Inputs

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels

__all__ = ["Inputs", "backward", "forward"]


def forward(
    kernels: Kernels, inputs: Inputs, parameters: GraphParameters, *, workspace_bytes: int
) -> Tensor:  # [I, C, S] float32
    """The global nodes after the last step, block by block."""
    return similarity_graph.forward(DeviceSteps(kernels.ops), inputs, parameters, workspace_bytes=workspace_bytes)


def backward(
    kernels: Kernels,
    grad: Tensor,  # [I, C, S]
    inputs: Inputs,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    steps = DeviceSteps(kernels.ops)
    return similarity_graph.backward(steps, grad, inputs, parameters, workspace_bytes=workspace_bytes)
