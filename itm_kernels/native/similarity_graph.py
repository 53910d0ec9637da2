"""``similarity_graph`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import similarity_graph as cpu
from itm_kernels.native.cuda import similarity_graph as cuda
from itm_kernels.ops.parameters import GraphParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: GraphParameters,  # of all steps
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C, S] float32
    """The global nodes after the last step, block by block."""
    given = (alignments, global_alignments, word_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, workspace_bytes=workspace_bytes)
    return cuda.forward(kernels, cuda.Inputs(*given, word_offsets), parameters, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: GraphParameters,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, GraphParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    given = (alignments, global_alignments, word_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.backward(grad, cpu.Inputs(*given), parameters, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, grad, inputs, parameters, workspace_bytes=workspace_bytes)
