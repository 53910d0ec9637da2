"""``aggregation_regulator`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import aggregation_regulator as cpu
from itm_kernels.native.cuda import aggregation_regulator as cuda
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


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
    given = (alignments, pooled, word_counts, region_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.forward(kernels, inputs, parameters, options, workspace_bytes=workspace_bytes)


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
    given = (alignments, pooled, word_counts, region_counts)
    kernels = devices.kernels_for(alignments.device)
    if kernels is None:
        return cpu.backward(grad, cpu.Inputs(*given), parameters, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
