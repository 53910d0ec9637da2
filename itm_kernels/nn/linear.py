"""What the learning scorers share: linear layers as published, and their parameters stacked over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def check_widths(module: str, **widths: object) -> None:
    """Raise unless all are whole numbers of at least 1."""
    for name, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int):
            raise TypeError(f"{module}: {name} must be a whole number, got {width!r}")
        if width < 1:
            raise ValueError(f"{module}: {name} must be at least 1, got {width}")


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with weights uniform within ``sqrt(6 / (inputs + outputs))`` and no bias at first."""
    layer = nn.Linear(inputs, outputs)
    bound = math.sqrt(6.0 / (inputs + outputs))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def stacked(steps: Iterable[nn.Module], name: str) -> tuple[Tensor, Tensor]:  # [steps, B, A], [steps, B]
    """Weights and biases of the linear layer ``name`` of every step."""
    # By attribute: a parametrisation, pruning or a functional call puts a plain tensor in the parameter's place.
    layers: list[Any] = [step.get_submodule(name) for step in steps]
    weights, biases = torch.stack([layer.weight for layer in layers]), torch.stack([layer.bias for layer in layers])
    return weights, biases


def stacked_heads(steps: Iterable[nn.Module], name: str) -> tuple[Tensor, Tensor]:  # [steps, A], [steps]
    """The same of a layer with a single output."""
    weights, biases = stacked(steps, name)
    return weights[:, 0], biases[:, 0]


def dropout_seed() -> Tensor:  # [] int64
    """A new seed from torch's default generator of the host, so that ``torch.manual_seed`` governs it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
