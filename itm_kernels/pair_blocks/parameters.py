"""Parameters of the scorers that learn, as the steps of a GPU want them, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record", bound=tuple[Any, ...])
"""Of a stage, its tensors stacked along an axis of steps, or of a scorer: records of stages."""


def rounded(parameters: Record, dtype: torch.dtype) -> Record:
    """Matrices, ``[steps, rows, columns]``, in the dtype of the inputs; vectors wide."""
    return _each(lambda p: p.to(dtype if p.dim() == 3 else torch.float32).contiguous(), parameters)


def zeros_of(parameters: Record) -> Record:
    """Where gradients add up, float32."""
    return _each(lambda p: torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format), parameters)


def like(gradients: Record, parameters: Record) -> Record:
    """Gradients in the dtypes of their parameters."""
    return _each(lambda grad, given: grad.to(given.dtype), gradients, parameters)


def at_step(stage: Record, step: int) -> Record:
    """The tensors of one step of a stage."""
    return _each(lambda tensor: tensor[step], stage)


def _each(function: Callable[..., Tensor], *records: Record) -> Record:
    """Of every tensor of records alike; what is not there stays away."""

    def of(*found: Any) -> Any:
        if found[0] is None:
            return None
        return function(*found) if isinstance(found[0], Tensor) else _each(function, *found)

    return type(records[0])(*map(of, *records))
