"""``attention_filtration`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import attention_filtration as cpu
from itm_kernels.native.cuda import attention_filtration as cuda
from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C] means and biased variances; None where the batch's own count
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C] float32
    """Filtered alignments, block by block, and the statistics that normalised them."""
    given = (alignments, global_alignments, word_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, statistics, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.forward(kernels, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    assert statistics is not None, "the op has kept those of the forward"
    given = (alignments, global_alignments, word_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.backward(grad, cpu.Inputs(*given), parameters, statistics, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, grad, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)
