"""``max_similarity_scores`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import max_similarity_scores as cpu
from itm_kernels.native.cuda.max_similarity_scores import DeviceMaxima
from itm_kernels.ops.options import SimilarityOptions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
    arg_max: Tensor | None = None,  # [groups, queries] uint8: written, packed queries first
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.forward(
            regions, words, word_counts, region_counts, options, workspace_bytes=workspace_bytes, arg_max=arg_max
        )
    return DeviceMaxima(
        kernels,
        regions,
        words,
        word_counts,
        word_offsets,
        region_counts,
        options,
        workspace_bytes,
        arg_max,
        backward=False,
    ).forward()


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    options: SimilarityOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
    arg_max: Tensor | None = None,  # [groups, queries] uint8: read
) -> tuple[Tensor, Tensor]:
    """Gradients in the dtype of the inputs; accumulation in float32."""
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.backward(
            grad_scores,
            regions,
            words,
            word_counts,
            region_counts,
            options,
            workspace_bytes=workspace_bytes,
            arg_max=arg_max,
        )
    return DeviceMaxima(
        kernels,
        regions,
        words,
        word_counts,
        word_offsets,
        region_counts,
        options,
        workspace_bytes,
        arg_max,
        backward=True,
    ).backward(grad_scores)
