"""``similarity_reasoning_scores`` on the native floor: C++ on the CPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import similarity_reasoning_scores as cpu
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.parameters import ReasoningParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    if device.type == "cuda" and dtype != torch.float64:
        return "the native kernels of RCAR and SGRAF run on CPUs; on a GPU these ops run on triton and eager"
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
    word_offsets: Tensor | None = None,  # [C + 1]; counts are on the host here
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR; float32
    """Scores, chunk by chunk, and the statistics that normalised them."""
    inputs = cpu.Inputs(regions, words, word_counts, region_counts, image_global, caption_global)
    return cpu.forward(inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)


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
    inputs = cpu.Inputs(regions, words, word_counts, region_counts, image_global, caption_global)
    return cpu.backward(grad_scores, inputs, parameters, statistics, options, workspace_bytes=workspace_bytes)
