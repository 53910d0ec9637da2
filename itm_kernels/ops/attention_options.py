"""What ``cross_attention`` shares with its floors: the record of options, the checks of pairs of indices."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from itm_kernels.ops.options import FOCALS, QUERY_DIRECTIONS, RAW_FEATURE_NORMS


@dataclass(frozen=True)
class AttentionOptions:
    """Options of ``cross_attention``, checked; ``focal`` is ``"none"`` where the public argument is None.

    ``lambda_softmax`` counts where no tensor of temperatures is given.
    """

    direction: str
    raw_feature_norm: str
    lambda_softmax: float
    focal: str

    @property
    def t2i(self) -> bool:
        return self.direction == "t2i"

    def as_arguments(self) -> tuple[str, str, float, str]:
        """In the order of the op's schema."""
        return astuple(self)


def check_attention_options(op: str, options: AttentionOptions) -> None:
    """Raise ``ValueError`` on a name that is not known or a number that is not usable."""
    for name, value, allowed in (
        ("direction", options.direction, QUERY_DIRECTIONS),
        ("raw_feature_norm", options.raw_feature_norm, RAW_FEATURE_NORMS),
    ):
        if value not in allowed:
            raise ValueError(f"{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if options.focal not in FOCALS:
        raise ValueError(f"{op}: focal must be None, 'equal' or 'prob', got {options.focal!r}")
    if not math.isfinite(options.lambda_softmax):
        raise ValueError(f"{op}: lambda_softmax must be a finite number, got {options.lambda_softmax}")


def check_indices(op: str, pairs: object, beside: Tensor) -> None:
    """Raise unless ``pairs`` can be ``[P, 2]`` indices beside the regions; their values are looked at inside the op."""
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
        got = pairs.dtype if isinstance(pairs, Tensor) else type(pairs).__name__
        raise TypeError(f"{op}: pairs must be an int64 tensor, got {got}")
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{op}: pairs must be [P, 2] (image, caption), got {list(pairs.shape)}")
    if pairs.device.type != "cpu" and pairs.device != beside.device:
        raise ValueError(f"{op}: pairs must be on the host or on {beside.device}, got {pairs.device}")


def check_index_values(op: str, pairs: Tensor, images: int, captions: int) -> None:
    """Raise ``ValueError`` on indices out of range, where they are on the host; those on a device are never read."""
    if pairs.device.type != "cpu":
        return
    for axis, (name, most) in enumerate((("image", images), ("caption", captions))):
        wrong = ((pairs[:, axis] < 0) | (pairs[:, axis] >= most)).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            got = int(pairs[row, axis])
            raise ValueError(f"{op}: pairs must name {name}s within 0..{most - 1}, got {got} in row {row}")
