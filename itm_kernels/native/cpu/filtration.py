"""Attention filtration of a chunk (SAF): nodes to one vector a pair, or to its score, in steps of C++.

The statistics of a block of captions are made from logits that are kept of all its chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.native.cpu.pair_chunks import Chunk, Workspace
from itm_kernels.ops.parameters import FiltrationParameters, ScoreParameters


class Filter(NamedTuple):
    """The parameters as the native steps take them."""

    weight: Tensor  # [S]
    bias: float
    norm_weight: float
    norm_bias: float
    eps: float
    score: tuple[Tensor, float] | None
    """Weight ``[S]`` and bias; None: the stage ends in vectors."""

    @staticmethod
    def of(filtration: FiltrationParameters, score: ScoreParameters | None, eps: float) -> Filter:
        weight, bias, norm_weight, norm_bias = filtration
        assert norm_weight is not None, "the op fills in the affine part"
        assert norm_bias is not None
        to_score = None if score is None else (score.weight, float(score.bias))
        return Filter(weight, float(bias), float(norm_weight), float(norm_bias), eps, to_score)

    def norm(self) -> tuple[float, float, float]:
        return self[2:5]


class Gradients(NamedTuple):
    """Where gradients of parameters are added, float32."""

    filtration: FiltrationParameters
    score: ScoreParameters | None


def logits(vectors: Tensor, by: Filter, out: Tensor) -> Tensor:  # [n, S] -> [n]
    """What the batch normalisation sees of each node."""
    torch.ops.itm_kernels_native.node_logits(vectors, by.weight, by.bias, out)
    return out


def filtrate(chunk: Chunk, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter) -> Tensor:
    """Scores ``[G, segments]``, or vectors ``[pairs, S]``; ``statistics [2, segments]``: mean and biased variance."""
    given = vectors, chunk.offsets, logits, statistics, *by.norm()
    if by.score is None:
        made = chunk.workspace.floats("filtered", chunk.pairs, vectors.shape[1])
        torch.ops.itm_kernels_native.filter_nodes(*given, made)
    else:
        made = torch.empty(chunk.groups, chunk.segment_numbers.shape[0], dtype=torch.float32, device="cpu")
        torch.ops.itm_kernels_native.filtrate_nodes(*given, *by.score, made)
    return made


def slopes(
    chunk: Chunk, vectors: Tensor, logits: Tensor, statistics: Tensor, by: Filter, upstream: Tensor
) -> Tensor:  # [segments, 2] float64
    """Sums over a chunk's nodes of each caption: of the gradient at the normalised logits, and of it times these."""
    return _backward(chunk, vectors, logits, statistics, by, upstream, torch.zeros_like(statistics), None, None)


def backward(
    chunk: Chunk,
    vectors: Tensor,  # [rows + pairs, S] float32
    logits: Tensor,  # [rows + pairs]
    statistics: Tensor,  # [2, segments]
    by: Filter,
    upstream: Tensor,  # [G, segments], or [pairs, S]
    means: Tensor | None,  # [2, segments]
    grads: Gradients,  # added to
) -> Tensor:  # [rows + pairs, S] float32
    """Gradient of the nodes.

    ``means`` are those of the slopes over the batch, where it made the statistics; the gradient of the logits' bias is
    zero there, as their mean is taken off. None: statistics of elsewhere.
    """
    width = vectors.shape[1]
    grad_nodes = chunk.workspace.floats("grad nodes", *vectors.shape)
    sums = chunk.sums(chunk.rows, (width + 1) * (1 if by.score is None else 2))
    passed = torch.zeros_like(statistics) if means is None else means
    of_norm = _backward(chunk, vectors, logits, statistics, by, upstream, passed, grad_nodes, sums).sum(0)
    total = sums.sum(0)
    assert grads.filtration.norm_weight is not None
    assert grads.filtration.norm_bias is not None
    grads.filtration.weight.add_(total[:width])
    if means is None:
        grads.filtration.bias.add_(total[width])
    grads.filtration.norm_weight.add_(of_norm[1])
    grads.filtration.norm_bias.add_(of_norm[0])
    if grads.score is not None:
        grads.score.weight.add_(total[width + 1 : 2 * width + 1])
        grads.score.bias.add_(total[2 * width + 1])
    return grad_nodes


def _backward(
    chunk: Chunk,
    vectors: Tensor,
    logits: Tensor,
    statistics: Tensor,
    by: Filter,
    upstream: Tensor,
    means: Tensor,
    grad_nodes: Tensor | None,
    sums: Tensor | None,
) -> Tensor:
    of_pairs = chunk.workspace.floats("slopes", chunk.groups, chunk.segment_numbers.shape[0], 2)
    given = vectors, chunk.offsets, logits, statistics, *by.norm()
    rest = upstream.contiguous(), by.weight, means, of_pairs, grad_nodes, sums
    if by.score is None:
        torch.ops.itm_kernels_native.filter_nodes_backward(*given, *rest)
    else:
        torch.ops.itm_kernels_native.filtrate_nodes_backward(*given, *by.score, *rest)
    return of_pairs.sum(0, dtype=torch.float64)


def parts_that_fit(start: int, stop: int, fit: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """A run of captions in parts that fit, each of one caption at least."""
    first = start
    for end in range(start + 1, stop + 1):
        if end == stop or not fit(first, end + 1):
            yield first, end
            first = end


class Place(NamedTuple):
    """Where the nodes of a chunk stay from one pass over the images to the next."""

    logits: Tensor  # [rows + pairs]
    vectors: Tensor | None  # [rows + pairs, S]; None: they are made again
    norms: Tensor | None  # [rows + pairs]


class Kept:
    """Logits, and nodes where they are kept, of a block of captions against all images."""

    def __init__(self, workspace: Workspace, offsets: Tensor, images: int, width: int, *, keeps: bool) -> None:
        self.words, self.captions = int(offsets[-1]), offsets.numel() - 1
        self.counts = offsets.diff()
        self.images = images
        count = images * (self.words + self.captions)
        self._logits = workspace.floats("kept logits", count)
        self._vectors = workspace.floats("kept vectors", count, width) if keeps else None
        self._norms = workspace.floats("kept norms", count) if keeps else None
        self._end = 0
        self.places: list[Place] = []
        """Of the chunks in their order."""

    def add(self, chunk: Chunk) -> Place:
        """The place of the next chunk."""
        begin, self._end = self._end, self._end + chunk.rows + chunk.pairs
        everything = (self._logits, self._vectors, self._norms)
        place = Place(*(None if tensor is None else tensor[begin : self._end] for tensor in everything))  # type: ignore[arg-type]
        self.places.append(place)
        return place

    def numbers(self) -> Tensor:  # [captions] float64
        """How many logits each caption has."""
        return self.images * (1 + self.counts).double()

    def statistics(self) -> Tensor:  # [2, captions] float32
        """Mean and biased variance of the logits of each caption."""
        number = torch.arange(self.captions, device="cpu")
        caption_of = torch.cat([torch.repeat_interleave(number, self.counts), number])
        of_images = []  # [images of a chunk, words + captions]
        for place in self.places:
            images = place.logits.shape[0] // (self.words + self.captions)
            of_words, of_wholes = place.logits.split([images * self.words, images * self.captions])
            of_images.append(torch.cat([of_words.view(images, -1), of_wholes.view(images, -1)], dim=1))
        logits, count = torch.cat(of_images).double(), self.numbers()
        mean = torch.zeros_like(count).index_add_(0, caption_of, logits.sum(0)) / count
        squares = (logits - mean[caption_of]).square().sum(0)
        variance = torch.zeros_like(count).index_add_(0, caption_of, squares) / count
        return torch.stack([mean, variance]).float()
