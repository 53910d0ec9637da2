"""``similarity_reasoning_scores`` in blocks, in plain PyTorch: SGRAF's stages chained, the backward by recomputation.

Evaluation and SGR need nothing but a block's own pairs. SAF's training statistics run over all images of a caption, so
a block of captions is passed twice: once for its statistics (in the backward: for the gradient that reaches them), once
for the rest. Between the passes the alignments before their norm are kept, as much as a quarter of the workspace holds
of them; the second pass then has the attention to make again, not the product with the alignment's weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.alignment_vectors import Block, attend, plain_products, squared_difference
from itm_kernels.eager.attention_filtration import Moments, Nodes, filtrate, node_logits
from itm_kernels.eager.blocks import Batch, Side, room_for_blocks
from itm_kernels.eager.norms import l2norm, linear, product
from itm_kernels.eager.similarity_graph import reason
from itm_kernels.ops.options import ReasoningOptions
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import AlignmentParameters, ReasoningParameters


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


class Inputs(NamedTuple):
    """What the scores of a block depend on beside the parameters, all wide."""

    images: Side  # [I, R, D]
    captions: Side  # [C, W, D]
    image_global: Tensor  # [I, D]
    caption_global: Tensor  # [C, D]

    def as_leaves(self) -> Inputs:
        """The same tensors at the start of a graph."""
        leaves = (tensor.detach().requires_grad_() for tensor in self[2:])
        return Inputs(self.images.as_leaf(), self.captions.as_leaf(), *leaves)

    def tensors(self) -> list[Tensor]:
        return [self.images.vectors, self.captions.vectors, self.image_global, self.caption_global]


class KeptLinear(torch.autograd.Function):
    """``x W^T + b`` whose value is known already: the forward makes no product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dtype = dtype
        return kept.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_weight = product(rows.t(), x.flatten(0, -2), ctx.dtype)
        return product(grad, weight, ctx.dtype), of_weight, rows.sum(0), None, None


def raw_alignments(
    inputs: Inputs, parameters: ReasoningParameters, options: ReasoningOptions, dtype: torch.dtype, kept: Nodes | None
) -> Nodes:
    """Alignment vectors of a block before their norm, the products left out where they are ``kept``."""
    block = Block(inputs.captions, inputs.images, dtype)
    words = squared_difference(block, attend(block, plain_products(block), options.temperature))
    whole = (inputs.image_global[:, None] - inputs.caption_global[None]).square()  # [I, C, D]

    def transform(x: Tensor, of: AlignmentParameters, known: Tensor | None) -> Tensor:
        if known is None:
            return linear(x, of.weight[0], of.bias[0], dtype)
        result: Tensor = KeptLinear.apply(x, of.weight[0], of.bias[0], known, dtype)
        return result

    return Nodes(
        transform(whole, parameters.global_alignment, kept and kept.whole),
        transform(words, parameters.local_alignment, kept and kept.words),
    )


def scores_of_nodes(
    raw: Nodes,
    valid: Tensor,  # [C, W]
    statistics: Tensor | None,  # [2, C]
    parameters: ReasoningParameters,
    options: ReasoningOptions,
    dtype: torch.dtype,
) -> tuple[Tensor, Nodes | None]:  # [I, C], and SAF's logits
    """What comes after the alignments of a block."""
    nodes, logits = Nodes(*map(l2norm, raw)), None
    if options.reasoning == "SAF":
        assert parameters.filtration is not None
        assert statistics is not None
        logits = node_logits(nodes, parameters.filtration)
        pooled = filtrate(nodes, logits, valid, statistics, options.eps, parameters.filtration)
    else:
        joined = torch.cat([nodes.whole[:, :, None], nodes.words], dim=2)
        also_whole = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        pooled = reason(joined, also_whole, parameters.graph, dtype)
    return torch.sigmoid(pooled @ parameters.score.weight + parameters.score.bias), logits


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    image_global: Tensor,  # [I, D]
    caption_global: Tensor,  # [C, D]
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor]:  # [I, C]; [2, C], or [2, 0] for SGR
    """Scores, block by block, and the statistics that normalised them."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    parameters = _widened(parameters, wide)
    scores = regions.new_empty(batch.images, batch.captions, dtype=wide)
    used = regions.new_empty(2, batch.captions if options.reasoning == "SAF" else 0, dtype=wide)
    if statistics is not None:
        used.copy_(statistics)
    cut = _Cut(batch, image_global, caption_global, parameters, options, workspace_bytes)
    for rows, longest in cut.caption_blocks():
        keep: dict[int, Nodes] = {}
        if options.batch_statistics:
            moments = Moments(rows.shape[0], rows.device)
            for start, inputs in cut.blocks(rows, longest):
                raw = raw_alignments(inputs, parameters, options, dtype, None)
                assert parameters.filtration is not None
                moments.add(node_logits(Nodes(*map(l2norm, raw)), parameters.filtration), inputs.captions.valid)
                if cut.keeps(rows, longest):
                    keep[start] = raw
            used[:, rows] = moments.statistics().to(wide)
        for start, inputs in cut.blocks(rows, longest):
            raw = keep.pop(start) if keep else raw_alignments(inputs, parameters, options, dtype, None)
            made, _ = scores_of_nodes(
                raw, inputs.captions.valid, used[:, rows] if used.numel() else None, parameters, options, dtype
            )
            scores[start : start + made.shape[0], rows] = made
    return scores, used


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    image_global: Tensor,
    caption_global: Tensor,
    parameters: ReasoningParameters,
    statistics: Tensor | None,  # [2, C]
    options: ReasoningOptions,
    *,
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, Tensor, Tensor, ReasoningParameters]:
    """Gradients, block by block; wide accumulators."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    inputs_given = (regions, words, image_global, caption_global)
    of_regions, of_words, of_image_global, of_caption_global = (
        torch.zeros(t.shape, dtype=wide, device=t.device) for t in inputs_given
    )
    given = parameters.flat()
    of_parameters = [None if p is None else torch.zeros(p.shape, dtype=wide, device=p.device) for p in given]
    totals = [total for total in of_parameters if total is not None]
    parameters = _widened(parameters, wide)
    cut = _Cut(batch, image_global, caption_global, parameters, options, workspace_bytes)
    for rows, longest in cut.caption_blocks():
        upstream, normalising = grad_scores[:, rows].to(wide), None
        if options.reasoning == "SAF":
            assert statistics is not None
            normalising = statistics[:, rows].to(wide)
        keep: dict[int, Nodes] = {}
        of_statistics = None
        if options.batch_statistics:
            assert normalising is not None
            of_statistics = torch.zeros_like(normalising)
            for start, inputs in cut.blocks(rows, longest):
                raw = raw_alignments(inputs, parameters, options, dtype, None)
                block_grad = upstream[start : start + inputs.image_global.shape[0]]
                of_statistics += _through_statistics(raw, inputs, normalising, parameters, options, dtype, block_grad)
                if cut.keeps(rows, longest):
                    keep[start] = raw
        of_rows = torch.zeros(rows.shape[0], longest, regions.shape[2], dtype=wide, device=regions.device)
        for start, inputs in cut.blocks(rows, longest):
            stop = start + inputs.image_global.shape[0]
            kept = keep.pop(start) if keep else None
            grads = _differentiate(
                inputs, kept, normalising, of_statistics, batch.images, parameters, options, dtype, upstream[start:stop]
            )
            of_regions[start:stop] += torch.where(inputs.images.valid[..., None], grads[0], 0.0)
            of_rows += grads[1]
            of_image_global[start:stop] += grads[2]
            of_caption_global[rows] += grads[3]
            for total, grad in zip(totals, grads[4:], strict=True):
                total += grad
        batch.put_captions(of_words, rows, cut.valid(rows, longest), of_rows)
    narrowed = [
        None if grad is None or parameter is None else grad.to(parameter.dtype)
        for grad, parameter in zip(of_parameters, given, strict=True)
    ]
    accumulated = (of_regions, of_words, of_image_global, of_caption_global)
    return (*(grad.to(dtype) for grad in accumulated), ReasoningParameters.of(narrowed))  # type: ignore[return-value]


def _through_statistics(
    raw: Nodes,
    inputs: Inputs,
    statistics: Tensor,  # [2, C]
    parameters: ReasoningParameters,
    options: ReasoningOptions,
    dtype: torch.dtype,
    grad_scores: Tensor,  # [I, C]
) -> Tensor:  # [2, C]
    """Gradient that reaches the statistics of the captions from some images."""
    with torch.enable_grad():
        leaf = statistics.detach().requires_grad_()
        scores, _ = scores_of_nodes(raw, inputs.captions.valid, leaf, parameters, options, dtype)
    return torch.autograd.grad(scores, leaf, grad_scores)[0]


def _differentiate(
    inputs: Inputs,
    kept: Nodes | None,
    statistics: Tensor | None,  # [2, C]
    of_statistics: Tensor | None,  # [2, C], from all images
    images: int,
    parameters: ReasoningParameters,
    options: ReasoningOptions,
    dtype: torch.dtype,
    grad_scores: Tensor,  # [I, C]
) -> tuple[Tensor, ...]:  # of the inputs and of the parameters that are there
    with torch.enable_grad():
        inputs = inputs.as_leaves()
        flat = [None if p is None else p.detach().requires_grad_() for p in parameters.flat()]
        leaves = ReasoningParameters.of(flat)
        raw = raw_alignments(inputs, leaves, options, dtype, kept)
        valid = inputs.captions.valid
        scores, logits = scores_of_nodes(raw, valid, statistics, leaves, options, dtype)
    outputs, grads = [scores], [grad_scores]
    if of_statistics is not None:
        assert logits is not None
        assert statistics is not None
        # A mean over n numbers passes 1 / n to each, a biased variance 2 (z - mean) / n.
        numbers = images * (1 + valid.sum(-1)).to(grad_scores.dtype)  # [C]
        mean, (of_mean, of_variance) = statistics[0], of_statistics / numbers
        outputs += [logits.whole, logits.words]
        grads.append(of_mean + 2 * of_variance * (logits.whole.detach() - mean))
        of_words = of_mean[:, None] + 2 * of_variance[:, None] * (logits.words.detach() - mean[:, None])
        grads.append(torch.where(valid, of_words, 0.0))
    wanted = [*inputs.tensors(), *(p for p in flat if p is not None)]
    return torch.autograd.grad(outputs, wanted, grads, materialize_grads=True)


def _widened(parameters: ReasoningParameters, dtype: torch.dtype) -> ReasoningParameters:
    return ReasoningParameters.of([None if p is None else p.to(dtype) for p in parameters.flat()])


class _Cut:
    """Blocks of images x captions within the workspace, counted over what autograd keeps for one node of one pair."""

    def __init__(
        self,
        batch: Batch,
        image_global: Tensor,
        caption_global: Tensor,
        parameters: ReasoningParameters,
        options: ReasoningOptions,
        workspace_bytes: int,
    ) -> None:
        self.batch, self.image_global, self.caption_global = batch, image_global, caption_global
        self.options, self.workspace_bytes = options, room_for_blocks(workspace_bytes, parameters)
        self.wide = score_dtype(batch.regions.dtype)
        keys, width = batch.regions.shape[1:]
        narrow = parameters.local_alignment.weight.shape[1]
        elements = 24 * keys + 8 * width + 10 * narrow
        if options.reasoning == "SGR":
            # Edges are as many as nodes of a caption; those of the longest are counted for all.
            elements += options.steps * (8 * narrow + 4 * (1 + max(batch.lengths, default=0)))
        self.node_bytes = elements * self.wide.itemsize
        self.kept_bytes = batch.images * narrow * self.wide.itemsize  # of one node of all images

    def caption_blocks(self) -> list[tuple[Tensor, int]]:
        """Captions of like length: (their numbers, the longest)."""
        word_bytes = 4 * self.node_bytes
        if self.options.batch_statistics:
            word_bytes = max(word_bytes, 4 * self.kept_bytes)
        return self.batch.caption_blocks(self.workspace_bytes, word_bytes)

    def keeps(self, rows: Tensor, longest: int) -> bool:
        """Whether the alignments of these captions against all images are kept from one pass to the next."""
        return rows.shape[0] * (1 + longest) * self.kept_bytes <= self.workspace_bytes // 4

    def blocks(self, rows: Tensor, longest: int) -> Iterator[tuple[int, Inputs]]:
        """Number of the first image, and what belongs to the images from there on."""
        captions = self.batch.captions_of(rows, longest).to(self.wide)
        of_captions = self.caption_global[rows].to(self.wide)
        per_image = rows.shape[0] * (1 + longest) * self.node_bytes
        for start, stop in self.batch.images_at_once(per_image, self.workspace_bytes):
            images = self.batch.images_of(start, stop).to(self.wide)
            yield start, Inputs(images, captions, self.image_global[start:stop].to(self.wide), of_captions)

    def valid(self, rows: Tensor, longest: int) -> Tensor:  # [C, W]
        return self.batch.captions_of(rows, longest).valid
