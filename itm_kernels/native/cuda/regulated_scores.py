"""``regulated_scores`` on a GPU: the CUDA kernels in the blocks that both GPU floors share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from itm_kernels.native.cuda.steps import DeviceSteps
from itm_kernels.ops.options import RegulatedOptions
from itm_kernels.ops.parameters import RegulatedParameters
from itm_kernels.pair_blocks import regulated_scores

if TYPE_CHECKING:
    from itm_kernels.native.devices import Kernels


def forward(
    kernels: Kernels,
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None,  # [C + 1]
) -> Tensor:  # [I, C] float32
    """Scores, block by block."""
    return regulated_scores.forward(
        DeviceSteps(kernels.ops), regions, words, word_counts, region_counts, parameters, options,
        workspace_bytes=workspace_bytes, word_offsets=word_offsets,
    )  # fmt: skip


def backward(
    kernels: Kernels,
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: RegulatedParameters,
    options: RegulatedOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None,
) -> tuple[Tensor, Tensor, RegulatedParameters]:
    """Gradients in the dtypes of the inputs; accumulation in float32."""
    return regulated_scores.backward(
        DeviceSteps(kernels.ops), grad_scores, regions, words, word_counts, region_counts, parameters, options,
        workspace_bytes=workspace_bytes, word_offsets=word_offsets,
    )  # fmt: skip
