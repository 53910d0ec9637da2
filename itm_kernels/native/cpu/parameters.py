"""Parameters of the scorers that learn, as the steps of the CPU want them, and their gradients."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from itm_kernels.ops.parameters import ReasoningParameters, RegulatedParameters

Parameters = TypeVar("Parameters", RegulatedParameters, ReasoningParameters)


def rounded(parameters: Parameters, given: torch.dtype, products: torch.dtype) -> Parameters:
    """Matrices, ``[steps, rows, columns]``, in the dtype of the inputs; vectors wide."""

    def of(parameter: Tensor) -> Tensor:
        wide = parameter.dim() < 3
        return (parameter.float() if wide else parameter.to(given).to(products)).contiguous()

    return parameters.of([None if p is None else of(p) for p in parameters.flat()])


def zeros_of(parameters: Parameters) -> Parameters:
    """Where gradients add up, float32."""
    made = (None if p is None else torch.zeros(p.shape, dtype=torch.float32, device="cpu") for p in parameters.flat())
    return parameters.of(list(made))


def like(gradients: Parameters, parameters: Parameters) -> Parameters:
    """Gradients in the dtypes of their parameters."""
    pairs = zip(gradients.flat(), parameters.flat(), strict=True)
    return parameters.of([None if grad is None or given is None else grad.to(given.dtype) for grad, given in pairs])
