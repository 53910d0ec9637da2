"""``correspondence_regulator`` on the native floor: C++ on the CPU, CUDA on a GPU, around the library's products."""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.native import devices
from itm_kernels.native.cpu import correspondence_regulator as cpu
from itm_kernels.native.cuda import correspondence_regulator as cuda
from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason this floor cannot run there, or None."""
    return devices.why_not_on(device, dtype)


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: CorrespondenceParameters,  # of all steps
    hidden: Tensor | None,  # [steps before, ..., H], ... the axes of queries; None: this is the first
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [..., H] float32
    """Attention scores, temperatures and hidden layer, block by block."""
    given = (alignments, regions, words, word_counts, region_counts, hidden, temperatures)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        return cpu.forward(cpu.Inputs(*given), parameters, options, workspace_bytes=workspace_bytes)
    inputs = cuda.Inputs(*given, word_offsets)
    return cuda.forward(kernels, inputs, parameters, options, workspace_bytes=workspace_bytes)


def backward(
    grad_scores: Tensor,
    grad_temperatures: Tensor,
    grad_hidden: Tensor,
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: CorrespondenceParameters,
    hidden: Tensor | None,
    temperatures: Tensor | None,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    of_outputs = (grad_scores, grad_temperatures, grad_hidden)
    given = (alignments, regions, words, word_counts, region_counts, hidden, temperatures)
    kernels = devices.kernels_for(regions.device)
    if kernels is None:
        of_cpu = cpu.Gradients(*of_outputs), cpu.Inputs(*given)
        return cpu.backward(*of_cpu, parameters, options, workspace_bytes=workspace_bytes)
    upstream, inputs = cuda.Gradients(*of_outputs), cuda.Inputs(*given, word_offsets)
    return cuda.backward(kernels, upstream, inputs, parameters, options, workspace_bytes=workspace_bytes)
