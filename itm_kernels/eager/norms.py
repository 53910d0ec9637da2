"""Roots and norms with gradient zero at zero, and products in the dtype of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def root(square: Tensor) -> Tensor:
    """Square root of what may be zero, or below it by rounding: 0 there, gradient 0."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def l2norm(x: Tensor) -> Tensor:  # [..., S]
    """``x / (|x| + 1e-8)`` over the last axis."""
    return over_norm(x, root((x * x).sum(-1, keepdim=True)))


def over_norm(x: Tensor, norm: Tensor) -> Tensor:
    """``x / (norm + 1e-8)``; where the norm is 0: 0 without gradient."""
    return torch.where(norm > 0, x / (norm + EPS), 0.0)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:  # [..., M, K] @ [..., K, N]
    """Of wide operands, rounded to ``dtype`` first, widened afterwards.

    Rounded anew for every product: the gradients of the products then meet in the wide operand.
    """
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:  # [..., A] -> [..., B]
    """``x W^T + b`` with a wide bias."""
    return product(x, weight.t(), dtype) + bias
