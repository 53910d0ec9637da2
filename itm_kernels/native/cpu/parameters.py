"""Parameters of the stages and scorers that learn, as the steps of the CPU want them, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound=tuple[Any, ...])
"""Of a stage, its tensors stacked along an axis of steps, or of a scorer: records of stages."""


def operand_dtype(given: torch.dtype) -> torch.dtype:
    """Of the operands of products: float16 has no fast product on most CPUs and loses nothing in float32."""
    return torch.bfloat16 if given == torch.bfloat16 else torch.float32


def rounded(parameters: Record, given: torch.dtype) -> Record:
    """Matrices, ``[steps, rows, columns]``, in the dtype of the inputs, ready for products; vectors wide."""

    def of(parameter: Tensor) -> Tensor:
        wide = parameter.dim() < 3
        return (parameter.float() if wide else parameter.to(given).to(operand_dtype(given))).contiguous()

    return _each(of, parameters)


def zeros_of(parameters: Record) -> Record:
    """Where gradients add up, float32."""
    return _each(lambda parameter: torch.zeros(parameter.shape, dtype=torch.float32, device="cpu"), parameters)


def like(gradients: Record, parameters: Record) -> Record:
    """Gradients in the dtypes of their parameters."""
    return _each(lambda grad, given: grad.to(given.dtype), gradients, parameters)


def at_step(stage: Record | None, step: int) -> Record:
    """The tensors of one step of a stage that is there."""
    assert stage is not None
    return _each(lambda tensor: tensor[step], stage)


def _each(function: Callable[..., Tensor], *records: Record) -> Record:
    """Of every tensor of records alike; what is not there stays away."""

    def of(*found: Any) -> Any:
        if found[0] is None:
            return None
        return function(*found) if isinstance(found[0], Tensor) else _each(function, *found)

    return type(records[0])(*map(of, *records))
