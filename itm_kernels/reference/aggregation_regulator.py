"""Definition of ``aggregation_regulator``: RAR, the alignment vectors of a pair pooled by attention.

With the alignment vectors x_i of a pair and its pooled vector h (at first their mean, not normalised):

    p_i = softmax_i(wv . (D(tanh(Wk x_i + bk)) * D(tanh(Wq h + bq))) + bv)
    h'  = l2norm(sum_i p_i x_i)

D is dropout: on the key branch a number for each query and channel, on the pooled branch one for each channel, shared
by all queries of the pair. The masks are those of ``ops.dropout``, so every floor drops the same.

Source: Diao et al., "Plug-and-Play Regulators for Image-Text Matching", TIP 2023, with its published code (dropout
0.4).

Edges: one query gets all the weight and h' = l2norm(x); bv moves no weight and has a zero gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.dropout import KEYS, POOLED, dropout_scale
from itm_kernels.ops.parameters import AggregationParameters
from itm_kernels.ops.stage_options import AggregationOptions, product_dtype
from itm_kernels.reference.common import at_step, l2norm, over_images, stage_gradients, wide, widened, words_of_captions


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def pool(
    vectors: Tensor,  # [B, Q, S]
    pooled: Tensor,  # [B, S]
    parameters: AggregationParameters,  # of one step
    masks: tuple[Tensor, Tensor] | None,  # [B, Q, S] and [B, S]: what to multiply with; None: no dropout
) -> Tensor:  # [B, S]
    """The next pooled vector of B pairs."""
    p = parameters
    keys = torch.tanh(F.linear(vectors, p.key_weight, p.key_bias))  # [B, Q, S]
    asked = torch.tanh(F.linear(pooled, p.pooled_weight, p.pooled_bias))  # [B, S]
    if masks is not None:
        keys, asked = keys * masks[0], asked * masks[1]
    weights = torch.softmax((keys * asked.unsqueeze(1)) @ p.value_weight + p.value_bias, dim=1)  # [B, Q]
    return l2norm((weights.unsqueeze(2) * vectors).sum(1))


def dropout_masks(
    images: Tensor,  # [B] int64, numbers in the whole batch
    caption: int,  # likewise
    vectors: Tensor,  # [B, Q, S]
    *,
    step: int,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor] | None:  # [B, Q, S], [B, S]
    """Masks of a step for B images and one caption; query i is the i-th of the pair."""
    if not dropout:
        return None
    _, num_queries, channels = vectors.shape
    captions = torch.tensor(caption, device=images.device)
    queries = torch.arange(num_queries, device=images.device)
    first = torch.zeros((), dtype=torch.int64, device=images.device)
    keys = dropout_scale(
        *(images[:, None], captions, queries, channels),
        step=step,
        branch=KEYS,
        dropout=dropout,
        seed=seed,
        dtype=vectors.dtype,
    )
    pooled = dropout_scale(
        *(images, captions, first, channels),
        step=step,
        branch=POOLED,
        dropout=dropout,
        seed=seed,
        dtype=vectors.dtype,
    )
    return keys, pooled


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    pooled: Tensor | None,  # [I, C, S]; None: the mean of the alignments
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: AggregationParameters,  # of all steps
    options: AggregationOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> Tensor:  # [I, C, S]
    """Pooled vectors of all pairs by the literal formula."""
    products = product_dtype(alignments.dtype, parameters.key_weight.dtype)
    rounded = AggregationParameters(*(wide(tensor, products) for tensor in parameters))
    features = widened([alignments, pooled], products)
    return _pooled(features, word_counts, region_counts, rounded, options)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    pooled: Tensor | None,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AggregationParameters,
    options: AggregationOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, AggregationParameters]:
    """Gradients of ``sum(pooled * grad)`` by autograd of the literal formula."""

    def function(features: list[Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return (_pooled(features, word_counts, region_counts, AggregationParameters(*tensors), options),)

    (of_alignments, of_pooled), of_parameters = stage_gradients(
        function,
        [alignments, pooled],
        list(parameters),
        (grad,),
        product_dtype(alignments.dtype, parameters.key_weight.dtype),
    )
    assert of_alignments is not None
    return of_alignments, of_pooled, AggregationParameters(*of_parameters)


def _pooled(
    features: list[Tensor | None],
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: AggregationParameters,
    options: AggregationOptions,
) -> Tensor:  # [I, C, S]
    alignments, before = features
    assert alignments is not None
    if options.t2i:
        captions = words_of_captions(alignments, 1, word_counts, alignments.dim() == 4)  # [I, n, S]
    else:
        captions = list(alignments.unbind(2))  # [I, R, S]
    columns = []
    for c, of_caption in enumerate(captions):

        def pooled_of(images: Tensor, vectors: Tensor, c: int = c) -> Tensor:  # [B], [B, Q, S] -> [B, S]
            numbers = images + options.image_offset, c + options.caption_offset
            masks = dropout_masks(*numbers, vectors, step=options.step, dropout=options.dropout, seed=options.seed)
            asking = vectors.mean(1) if before is None else before[images, c]
            return pool(vectors, asking, at_step(parameters, options.step), masks)

        columns.append(over_images(of_caption, region_counts, pooled_of))
    return torch.stack(columns, dim=1)
