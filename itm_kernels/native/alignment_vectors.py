"""``alignment_vectors`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import alignment_vectors as cpu
from itm_kernels.native.cuda import alignment_vectors as cuda
from itm_kernels.ops.parameters import AlignmentParameters
from itm_kernels.ops.stage_options import AlignmentOptions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AlignmentParameters,  # of one step
    attention_scores: Tensor | None,  # [I, R, C, W] or [I, R, N]; None: plain products
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S] float32
    """Alignment vectors, block by block."""
    given = (regions, words, word_counts, region_counts, attention_scores, temperatures)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.forward(kernels, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AlignmentParameters,
    attention_scores: Tensor | None,
    temperatures: Tensor | None,
    options: AlignmentOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, AlignmentParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    given = (regions, words, word_counts, region_counts, attention_scores, temperatures)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.backward(grad, cpu.Inputs(*given), parameters, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, grad, inputs, parameters, options, workspace_bytes=workspace_bytes)
