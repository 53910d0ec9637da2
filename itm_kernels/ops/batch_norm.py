"""The batch normalisation of SAF: one channel, the statistics of one caption at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.ops.options import number


class BatchNorm(NamedTuple):
    """What ``batch_norm`` holds: affine part, buffers (written in place in training), numbers."""

    weight: Tensor  # [1]
    bias: Tensor  # [1]
    running_mean: Tensor  # [1]
    running_var: Tensor  # [1]
    num_batches_tracked: Tensor  # []
    momentum: float | None
    eps: float
    group: Any = None


def checked_batch_norm(op: str, reasoning: str, batch_norm: tuple[Any, ...] | None) -> BatchNorm | None:
    """The record, or None without filtration; raise on what does not fit."""
    if reasoning != "SAF":
        if batch_norm is not None:
            raise ValueError(f"{op}: batch_norm must be None with reasoning {reasoning!r}: only SAF has one")
        return None
    fields = len(BatchNorm._fields)
    if not isinstance(batch_norm, tuple) or len(batch_norm) not in (fields - 1, fields):
        raise TypeError(
            f"{op}: batch_norm must be a tuple ({', '.join(BatchNorm._fields[:-1])}) with reasoning 'SAF', got "
            f"{type(batch_norm).__name__}"
        )
    norm = BatchNorm(*batch_norm)
    if norm.group is not None:
        raise NotImplementedError(
            f"{op}: batch_norm's group must be None: statistics over several ranks are not in this version"
        )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        tensor, wanted = getattr(norm, name), [] if name == "num_batches_tracked" else [1]
        if not isinstance(tensor, Tensor) or list(tensor.shape) != wanted:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{op}: batch_norm {name} must be a tensor of shape {wanted}, got {got}")
    if norm.num_batches_tracked.dtype != torch.int64:
        raise TypeError(f"{op}: batch_norm num_batches_tracked must be int64, got {norm.num_batches_tracked.dtype}")
    momentum = norm.momentum if norm.momentum is None else number(op, "batch_norm momentum", norm.momentum)
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"{op}: batch_norm momentum must be None or within 0..1, got {momentum}")
    return norm._replace(momentum=momentum, eps=number(op, "batch_norm eps", norm.eps))


@torch.no_grad()
def update_buffers(norm: BatchNorm, statistics: Tensor, numbers: Tensor) -> None:  # [2, C], [C]
    """As C updates in the order of the captions: ``r <- (1 - m) r + m s``, with the unbiased variance.

    ``numbers`` is how many values each caption's mean and biased variance are of.
    """
    mean, variance = statistics  # [C]
    captions = mean.shape[0]
    numbers = numbers.to(mean)
    variance = variance * numbers / (numbers - 1)
    if norm.momentum is None:
        # A running average: all batches that were ever seen count alike.
        seen = norm.num_batches_tracked.to(mean.dtype)
        shares = (1 / (seen + captions)).expand(captions)
        kept = seen / (seen + captions)
    else:
        past = torch.arange(captions - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        rest = torch.full((), 1 - norm.momentum, dtype=mean.dtype, device=mean.device)
        shares, kept = norm.momentum * rest**past, rest**captions
    for buffer, values in ((norm.running_mean, mean), (norm.running_var, variance)):
        buffer.copy_(buffer.to(mean.dtype) * kept + (shares * values).sum())
    norm.num_batches_tracked.add_(captions)
