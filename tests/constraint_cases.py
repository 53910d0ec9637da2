"""A batch, pairs of it and fragments to swap: what tests of ``attention_constraints`` call it with, and the truth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

from attention_cases import weights_by_numbers
from helpers import FOCALS, Batch, Place, random_batch
from itm_kernels import AttentionConstraints, attention_constraints
from itm_kernels.ops.constraint_options import SWAPS
from itm_kernels.ops.options import QUERY_DIRECTIONS, RAW_FEATURE_NORMS

PAIRS = torch.tensor([[0, 0], [3, 1], [3, 5], [4, 2], [1, 1]])  # one image twice, one caption twice, one of one region
WIDE = {"ccr_margin": 0.9, "ccs_margin": 0.7}  # most hinges are open, some are not
EVERY = [
    {"direction": direction, "raw_feature_norm": norm, "focal": focal, "swap": swap, **WIDE}
    for direction, norm, focal, swap in itertools.product(QUERY_DIRECTIONS, RAW_FEATURE_NORMS, FOCALS, SWAPS)
]
FEW = [
    {"direction": "t2i"},
    {"direction": "i2t", "raw_feature_norm": "softmax", "lambda_softmax": 4.0, "swap": "content", **WIDE},
    {
        "direction": "t2i",
        "raw_feature_norm": "l1norm",
        "focal": "equal",
        "swap": "content",
        "detach_swapped": True,
        **WIDE,
    },
    {"direction": "i2t", "focal": "prob", "lambda_softmax": 20.0, **WIDE},
]
GATED = [{"direction": "t2i"}, {"direction": "i2t", "raw_feature_norm": "l2norm", **WIDE}]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A batch and what belongs to pairs of it."""

    batch: Batch
    options: dict[str, Any]
    pairs: Tensor
    swapped: Tensor | None
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

    def call(self, tensors: dict[str, Tensor], backend: str | None, **changes: Any) -> AttentionConstraints:
        given = {"pairs": self.pairs, "swapped": self.swapped, **tensors, **self.options, **changes}
        sides = given.pop("regions"), given.pop("words")
        counts, of_regions = self.batch.word_counts, self.batch.region_counts
        return attention_constraints(*sides, counts, region_counts=of_regions, backend=backend, **given)

    def counts(self) -> tuple[list[int], list[int]]:
        """Of regions and of words."""
        most = [self.batch.regions.shape[1]] * self.batch.regions.shape[0]
        return self.batch.region_counts or most, self.batch.word_counts


def inputs_of(
    options: dict[str, Any], seed: int = 1, *, pairs: Tensor = PAIRS, gated: bool = False, **sizes: Any
) -> Inputs:
    """A float64 batch with ragged captions and images; ``gated``: gate and temperatures, NaN in the padding."""
    batch = random_batch(seed, dtype=torch.float64, **{"region_counts": True, **sizes})
    generator = torch.Generator().manual_seed(seed)
    t2i = options["direction"] == "t2i"
    side, padding = (batch.words, batch.padding()[1]) if t2i else (batch.regions, batch.padding()[0])
    shape = len(pairs), side.shape[1]
    rows = torch.cat([(~padding).flatten().nonzero()[:, 0], torch.tensor([-1])])
    swapped = rows[torch.randint(len(rows), shape, generator=generator)]
    if not gated:
        return Inputs(batch, options, pairs, swapped)
    gate = 2 * torch.rand(*shape, side.shape[2], generator=generator, dtype=torch.float64) - 1
    temperature = 5 + 10 * torch.rand(shape, generator=generator, dtype=torch.float64)
    of_pairs = padding[pairs[:, 1 if t2i else 0]]
    gate[of_pairs] = torch.nan
    temperature[of_pairs] = torch.nan
    return Inputs(batch, options, pairs, swapped, gate, temperature)


def run(inputs: Inputs, where: Place | str, **changes: Any) -> tuple[AttentionConstraints, dict[str, Tensor]]:
    """Outputs, and gradients of a fixed sum over them, of a floor (on the host) or a place; both on the host."""
    floor, device = (where.floor, where.device) if isinstance(where, Place) else (where, "cpu")
    leaves = {name: tensor.detach().clone().to(device).requires_grad_() for name, tensor in inputs.tensors().items()}
    made = inputs.call(leaves, floor, **changes)
    grads = torch.autograd.grad(made[:2], list(leaves.values()), upstream_of(made))
    on_host = AttentionConstraints(*(t.detach().cpu() for t in made))
    return on_host, {name: grad.cpu() for name, grad in zip(leaves, grads, strict=True)}


def upstream_of(made: AttentionConstraints) -> list[Tensor]:
    """The weights of the fixed sum."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in made[:2]]


def by_numbers(inputs: Inputs) -> AttentionConstraints:
    """The formulas one number at a time, from the paper and not from any floor."""
    options: dict[str, Any] = {
        "raw_feature_norm": "clipped_l2norm", "lambda_softmax": 9.0, "focal": None, "swap": "query",
        "ccr_margin": 0.2, "ccs_margin": 0.2, **inputs.options,
    }  # fmt: skip
    t2i = options["direction"] == "t2i"
    of_regions, of_words = inputs.counts()
    regions, words = (
        [vectors[:n].tolist() for vectors, n in zip(side, counts, strict=True)]
        for side, counts in ((inputs.batch.regions, of_regions), (inputs.batch.words, of_words))
    )
    pool, longest = (words, inputs.batch.words.shape[1]) if t2i else (regions, inputs.batch.regions.shape[1])
    terms = torch.zeros(2, len(inputs.pairs), longest, dtype=torch.float64)
    valid = torch.zeros(2, len(inputs.pairs), longest, dtype=torch.bool)
    for p, (image, caption) in enumerate(inputs.pairs.tolist()):
        queries, keys = (words[caption], regions[image]) if t2i else (regions[image], words[caption])
        gates = [[1.0] * len(q) for q in queries] if inputs.gate is None else inputs.gate[p].tolist()
        sharpness = [options["lambda_softmax"]] * len(queries)
        if inputs.temperature is not None:
            sharpness = inputs.temperature[p].tolist()
        attention = gates, sharpness, options["raw_feature_norm"], options["focal"]
        weights = weights_by_numbers(queries, keys, *attention)
        for i, (query, own) in enumerate(zip(queries, weights, strict=True)):
            near = cosine(query, mixture(own, keys))
            if len(keys) > 1:
                valid[0, p, i] = True
                others = [(1 - w) / sum(1 - v for v in own) for w in own]
                far = cosine(query, mixture(others, keys))
                terms[0, p, i] = max(0.0, options["ccr_margin"] - near + far)
            row = -1 if inputs.swapped is None else int(inputs.swapped[p, i])
            if row < 0:
                continue
            valid[1, p, i] = True
            swapped = pool[row // longest][row % longest]
            if options["swap"] == "query":
                rival = cosine(swapped, mixture(own, keys))
            else:
                instead = [*queries[:i], swapped, *queries[i + 1 :]]
                rival = cosine(query, mixture(weights_by_numbers(instead, keys, *attention)[i], keys))
            terms[1, p, i] = max(0.0, options["ccs_margin"] - near + rival)
    return AttentionConstraints(*terms, *valid)


def mixture(weights: list[float], vectors: list[list[float]]) -> list[float]:
    return [sum(w * v[d] for w, v in zip(weights, vectors, strict=True)) for d in range(len(vectors[0]))]


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / max(math.hypot(*x) * math.hypot(*y), 1e-8)
