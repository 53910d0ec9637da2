"""``similarity_reasoning_scores`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import similarity_reasoning_scores as cpu
from itm_kernels.native.cuda import similarity_reasoning_scores as cuda
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [C, D]
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR; float32
    """Scores, block by block, and the statistics that normalised them."""
    given = (regions, words, word_counts, region_counts, image_global, caption_global)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, statistics, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.forward(kernels, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    given = (regions, words, word_counts, region_counts, image_global, caption_global)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        of_cpu = cpu.Inputs(*given)
        return cpu.backward(grad_scores, of_cpu, parameters, statistics, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, grad_scores, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)
