"""``regulated_scores`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import regulated_scores as cpu
from itm_kernels.native.cuda import regulated_scores as cuda
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import RegulatedParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        inputs = (regions, words, word_counts, region_counts, parameters, options)
        return cpu.forward(*inputs, workspace_bytes=workspace_bytes)
    return cuda.forward(
        kernels, regions, words, word_counts, region_counts, parameters, options, workspace_bytes=workspace_bytes,
        word_offsets=word_offsets,
    )  # fmt: skip


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        inputs = (regions, words, word_counts, region_counts, parameters, options)
        return cpu.backward(grad_scores, *inputs, workspace_bytes=workspace_bytes)
    return cuda.backward(
        kernels, grad_scores, regions, words, word_counts, region_counts, parameters, options,
        workspace_bytes=workspace_bytes, word_offsets=word_offsets,
    )  # fmt: skip
