"""A batch, and gate and temperatures of some of its pairs: what tests of ``cross_attention`` call it with.

And attention one number at a time, from the papers and not from any floor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from helpers import FOCALS, Batch, Place, random_batch
from itm_kernels import CrossAttention, cross_attention
from itm_kernels.ops.options import QUERY_DIRECTIONS, RAW_FEATURE_NORMS

PAIRS = torch.tensor([[0, 0], [3, 1], [3, 5], [4, 2], [3, 1]])  # one image thrice, one pair twice
EVERY = [
    {"direction": direction, "raw_feature_norm": norm, "focal": focal}
    for direction, norm, focal in itertools.product(QUERY_DIRECTIONS, RAW_FEATURE_NORMS, FOCALS)
]
FEW = [
    {"direction": "t2i"},
    {"direction": "i2t", "raw_feature_norm": "softmax", "lambda_softmax": 4.0},
    {"direction": "t2i", "raw_feature_norm": "l1norm", "focal": "equal"},
    {"direction": "i2t", "focal": "prob", "lambda_softmax": 20.0},
]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch and what belongs to pairs of it."""

    batch: Batch
    options: dict[str, Any]
    gate: Tensor | None = None
    temperature: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient."""
        found = {
            "regions": self.batch.regions,
            "words": self.batch.words,
            "gate": self.gate,
            "temperature": self.temperature,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Inputs:
        moved = {
            name: None if t is None else t.to(dtype)
            for name, t in (("gate", self.gate), ("temperature", self.temperature))
        }
        return dataclasses.replace(self, batch=self.batch.to(dtype), **moved)

    def call(self, tensors: dict[str, Tensor], backend: str | None, pairs: Tensor = PAIRS) -> CrossAttention:
        given = dict(tensors)
        sides = given.pop("regions"), given.pop("words")
        counts, of_regions = self.batch.word_counts, self.batch.region_counts
        return cross_attention(
            *sides, counts, pairs, region_counts=of_regions, backend=backend, **given, **self.options
        )


def inputs_of(options: dict[str, Any], seed: int = 1, *, of_pairs: bool = False, **sizes: Any) -> Inputs:
    """A float64 batch with ragged captions and images; ``of_pairs``: gate and temperatures, NaN in the padding."""
    batch = random_batch(seed, dtype=torch.float64, **{"region_counts": True, "shortest": 2, **sizes})
    if not of_pairs:
        return Inputs(batch, options)
    generator = torch.Generator().manual_seed(seed)
    side = batch.words if options["direction"] == "t2i" else batch.regions
    shape = len(PAIRS), side.shape[1]
    gate = 2 * torch.rand(*shape, side.shape[2], generator=generator, dtype=torch.float64) - 1
    temperature = 5 + 10 * torch.rand(shape, generator=generator, dtype=torch.float64)
    if batch.region_counts is not None:
        padding = batch.padding()[1][PAIRS[:, 1]] if options["direction"] == "t2i" else batch.padding()[0][PAIRS[:, 0]]
        gate[padding] = torch.nan
        temperature[padding] = torch.nan
    return Inputs(batch, options, gate, temperature)


def run(inputs: Inputs, where: Place | str, pairs: Tensor = PAIRS) -> tuple[CrossAttention, dict[str, Tensor]]:
    """Outputs, and gradients of a fixed sum over them, of a floor (on the host) or a place; both on the host."""
    floor, device = (where.floor, where.device) if isinstance(where, Place) else (where, "cpu")
    leaves = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in inputs.tensors().items()}
    made = inputs.call(leaves, floor, pairs)
    grads = torch.autograd.grad(made, list(leaves.values()), upstream_of(made))
    on_host = CrossAttention(*(t.detach().cpu() for t in made))
    return on_host, {name: grad.cpu() for name, grad in zip(leaves, grads, strict=True)}


def upstream_of(made: CrossAttention) -> list[Tensor]:
    """The weights of the fixed sum."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in made]


def weights_by_numbers(
    queries: list[list[float]],
    keys: list[list[float]],
    gates: list[list[float]],
    sharpness: list[float],
    norm: str,
    focal: str | None,
) -> list[list[float]]:
    """Attention of each query over the keys of one pair."""
    z: list[list[float]] = []  # one row a key
    for key in keys:
        row = [sum(k * g * q for k, g, q in zip(key, gates[i], queries[i], strict=True)) for i in range(len(queries))]
        if norm.startswith("clipped"):
            row = [x if x > 0 else 0.1 * x for x in row]
        if norm.endswith("l2norm"):
            row = [x / (math.sqrt(sum(y * y for y in row)) + 1e-8) for x in row]
        elif norm.endswith("l1norm"):
            row = [x / (sum(abs(y) for y in row) + 1e-8) for x in row]
        elif norm == "softmax":
            row = [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
        z.append(row)
    weights = []
    for i in range(len(queries)):
        powers = [math.exp(sharpness[i] * row[i]) for row in z]
        shares = [power / sum(powers) for power in powers]
        if focal is not None:
            # BFAN sums the differences to every other weight, "prob" each with the root of that weight.
            roots = [math.sqrt(x) if focal == "prob" else 1.0 for x in shares]
            kept = [x if sum(r * (x - y) for r, y in zip(roots, shares, strict=True)) > 0 else 0.0 for x in shares]
            shares = [x / sum(kept) for x in kept] if any(kept) else shares
        weights.append(shares)
    return weights
