"""SAF on a block of pairs, in plain PyTorch: one weight a node, through a batch normalisation of one channel.

In training the statistics are those of a caption: over all images and over its nodes, the global one among them. A
block holds some images only, so :class:`Moments` gathers them block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.norms import EPS, l2norm
from itm_kernels.eager.stage_blocks import Place, accumulators, batch_without_vectors, differentiate, places, zeros_of
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions


class Nodes(NamedTuple):
    """Alignment vectors of a block: one of the whole pair and one a word, or one number of each."""

    whole: Tensor  # [I, C, S] or [I, C]
    words: Tensor  # [I, C, W, S] or [I, C, W]


def node_logits(nodes: Nodes, parameters: FiltrationParameters) -> Nodes:  # [I, C], [I, C, W]
    """What the batch normalisation sees."""
    return Nodes(*(vectors @ parameters.weight + parameters.bias for vectors in nodes))


def filtrate(
    nodes: Nodes,
    logits: Nodes,
    valid: Tensor,  # [C, W]
    statistics: Tensor,  # [2, C], mean and biased variance
    eps: float,
    parameters: FiltrationParameters,
) -> Tensor:  # [I, C, S]
    """``l2norm(sum_i a_i x_i)`` with ``a`` the sigmoids of the normalised logits over their sum."""
    assert parameters.norm_weight is not None, "the op has filled it in"
    assert parameters.norm_bias is not None, "likewise"
    scale = parameters.norm_weight / (statistics[1] + eps).sqrt()  # [C]
    shift = parameters.norm_bias - statistics[0] * scale
    whole = torch.sigmoid(logits.whole * scale + shift)
    words = torch.sigmoid(logits.words * scale[:, None] + shift[:, None])
    words = torch.where(valid, words, 0.0)
    total = whole + words.sum(-1) + EPS
    summed = whole[..., None] * nodes.whole + (words[:, :, None] @ nodes.words)[:, :, 0]
    return l2norm(summed / total[..., None])


class Moments:
    """Mean and biased variance of the logits of each caption, gathered block by block (Chan et al., 1979).

    In float64: it is three numbers a caption, and in float32 the last digits would hang on the number of blocks.
    """

    def __init__(self, captions: int, device: torch.device) -> None:
        self.count, self.mean, self.squares = torch.zeros(3, captions, dtype=torch.float64, device=device)

    def add(self, logits: Nodes, valid: Tensor) -> None:  # [I, C], [I, C, W]; [C, W]
        """More images of the same captions."""
        whole, words = logits.whole.double(), torch.where(valid, logits.words, 0.0).double()
        count = whole.shape[0] * (1 + valid.sum(-1))
        mean = (whole.sum(0) + words.sum((0, 2))) / count
        deviations = torch.where(valid, words - mean[:, None], 0.0)
        squares = (whole - mean).square().sum(0) + deviations.square().sum((0, 2))
        both, change = self.count + count, mean - self.mean
        self.squares += squares + change.square() * self.count * count / both
        self.mean += change * count / both
        self.count = both

    def statistics(self) -> Tensor:  # [2, C] float64
        return torch.stack([self.mean, self.squares / self.count])


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C] means and biased variances; None where the batch's own count
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C]
    """Filtered alignments, block by block, and the statistics that normalised; its own in a pass before."""
    cut = _Cut(alignments, global_alignments, word_counts, word_offsets, workspace_bytes)
    widened = _widened(parameters, cut.wide)
    if options.training:
        statistics = cut.statistics(widened)
    assert statistics is not None, "evaluation normalises with the running statistics"
    pooled = global_alignments.new_empty(global_alignments.shape, dtype=cut.wide)
    for place, nodes in cut.blocks():
        logits = node_logits(nodes, widened)
        of_block = statistics[:, place.rows]
        place.put_pairs(pooled, filtrate(nodes, logits, place.captions.valid, of_block, options.eps, widened))
    return pooled, statistics


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C]
    options: FiltrationOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients, block by block; in training that of the statistics in a pass before. Wide accumulators."""
    cut = _Cut(alignments, global_alignments, word_counts, word_offsets, workspace_bytes)
    widened = _widened(parameters, cut.wide)
    assert statistics is not None, "the op has kept those of the forward"
    of_statistics = None
    if options.training:
        of_statistics = torch.zeros_like(statistics, memory_format=torch.contiguous_format)
        for place, nodes in cut.blocks():
            of_statistics[:, place.rows] += _through_statistics(place, nodes, statistics, widened, options, grad)
    of_alignments, of_global = zeros_of(alignments), zeros_of(global_alignments)
    totals = accumulators([tensor for tensor in widened if tensor is not None])
    for place, nodes in cut.blocks():
        valid, of_block = place.captions.valid, statistics[:, place.rows]

        def filtered(
            whole: Tensor, words: Tensor, *tensors: Tensor, valid: Tensor = valid, of_block: Tensor = of_block
        ) -> tuple[Tensor, ...]:
            nodes, of_tensors = Nodes(whole, words), FiltrationParameters(*tensors)
            logits = node_logits(nodes, of_tensors)
            pooled = filtrate(nodes, logits, valid, of_block, options.eps, of_tensors)
            return (pooled, *logits) if options.training else (pooled,)

        upstream = [place.pairs(grad)]
        if of_statistics is not None:
            logits = node_logits(nodes, widened)
            upstream += _into_logits(logits, valid, of_block, of_statistics[:, place.rows], alignments.shape[0])
        found = differentiate(filtered, [*nodes, *widened], upstream)
        place.put_pairs(of_global, found[0])
        place.put_queries(of_alignments, found[1])
        for total, of_here in zip(totals, found[2:], strict=True):
            total += of_here
    narrowed = (total.to(tensor.dtype) for total, tensor in zip(totals, parameters, strict=True) if tensor is not None)
    return of_alignments, of_global, FiltrationParameters(*narrowed)


def _into_logits(
    logits: Nodes,
    valid: Tensor,  # [C, W]
    statistics: Tensor,  # [2, C]
    of_statistics: Tensor,  # [2, C], from all images
    images: int,
) -> Nodes:
    """What reaches the logits of some images through the mean, 1 / n, and the variance, 2 (z - mean) / n."""
    numbers = images * (1 + valid.sum(-1)).to(statistics.dtype)  # [C]
    mean, (of_mean, of_variance) = statistics[0], of_statistics / numbers
    whole = of_mean + 2 * of_variance * (logits.whole - mean)
    words = of_mean[:, None] + 2 * of_variance[:, None] * (logits.words - mean[:, None])
    return Nodes(whole, torch.where(valid, words, 0.0))


def _through_statistics(
    place: Place,
    nodes: Nodes,
    statistics: Tensor,  # [2, all captions]
    parameters: FiltrationParameters,
    options: FiltrationOptions,
    grad: Tensor,  # [I, C, S], all
) -> Tensor:  # [2, C]
    """Gradient that reaches the statistics of the captions from some images."""
    logits, valid = node_logits(nodes, parameters), place.captions.valid

    def filtered(of_captions: Tensor) -> tuple[Tensor, ...]:
        return (filtrate(nodes, logits, valid, of_captions, options.eps, parameters),)

    found: Tensor = differentiate(filtered, [statistics[:, place.rows]], [place.pairs(grad)])[0]
    return found


def _widened(parameters: FiltrationParameters, dtype: torch.dtype) -> FiltrationParameters:
    return FiltrationParameters(*(None if tensor is None else tensor.to(dtype) for tensor in parameters))  # type: ignore[arg-type]


class _Cut:
    """Blocks of images x captions within the workspace, and their nodes."""

    def __init__(
        self,
        alignments: Tensor,
        global_alignments: Tensor,
        word_counts: Tensor,
        word_offsets: Tensor | None,
        workspace_bytes: int,
    ) -> None:
        self.alignments, self.global_alignments = alignments, global_alignments
        self.batch = batch_without_vectors(alignments, word_counts, word_offsets, None, t2i=True)
        self.wide, self.workspace_bytes = score_dtype(alignments.dtype), workspace_bytes

    def blocks(self) -> Iterator[tuple[Place, Nodes]]:
        """All images of some captions, then of the next ones."""
        node_bytes = (6 * self.alignments.shape[-1] + 16) * self.wide.itemsize
        for place in places(self.batch, True, node_bytes, self.workspace_bytes):
            yield place, Nodes(place.pairs(self.global_alignments), place.queries(self.alignments))

    def statistics(self, parameters: FiltrationParameters) -> Tensor:  # [2, C]
        """Of the batch."""
        made = torch.empty(2, self.batch.captions, dtype=self.wide, device=self.alignments.device)
        moments: Moments | None = None
        for place, nodes in self.blocks():
            if place.start == 0:
                moments = Moments(place.rows.shape[0], place.rows.device)
            assert moments is not None
            moments.add(node_logits(nodes, parameters), place.captions.valid)
            if place.stop == self.batch.images:
                made[:, place.rows] = moments.statistics().to(self.wide)
        return made
