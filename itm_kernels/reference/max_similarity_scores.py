"""Definition of ``max_similarity_scores``: a loop over captions, every product formed.

For one image and one caption, with queries q and keys k (t2i: words take regions; i2t: the reverse):

    s_kq  = k . q
    z_q   = max_k s_kq
    score = agg_q z_q

agg is Sum, Mean, Max, LogSumExp: log(sum exp(lambda z)) / lambda, or Softmax: sum softmax(lambda z) z.

Sources: CHAN (CVPR 2023; t2i, its pooling "LSEPooling" is not divided by lambda), ColBERT (SIGIR 2020, Sum), FILIP
(ICLR 2022, Mean, both directions), ColPali (ICLR 2025, Sum). Of several equal maxima the first is taken, by the score
and by its gradient. A NaN is the largest of all and travels. Padding is left out (the published CHAN marks it by -1,
and its "SoftmaxPooling" gives NaN where there is any). One key is its own maximum; zero vectors are ordinary.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from itm_kernels.ops.options import SimilarityOptions
from itm_kernels.ops.pairs import score_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    options: SimilarityOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
    arg_max: Tensor | None = None,  # nor does it keep anything: autograd differentiates it
) -> Tensor:  # [I, C]
    """Scores by the literal formula. Differentiable by autograd."""
    dtype = score_dtype(regions.dtype)
    regions, words = regions.to(dtype), words.to(dtype)
    counts = _on_host(word_counts, words.shape[1] if words.dim() == 3 else None)
    starts = list(accumulate(counts, initial=0))
    columns = []
    for c, n in enumerate(counts):
        caption = words[c, :n] if words.dim() == 3 else words[starts[c] : starts[c] + n]  # [n, D]
        columns.append(_scores_of_caption(regions, caption, region_counts, options))
    return torch.stack(columns, dim=1)


def backward(
    grad_scores: Tensor,  # [I, C]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    options: SimilarityOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
    arg_max: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum(scores * grad_scores)`` by autograd of the literal formula."""
    with torch.enable_grad():
        regions, words = (t.detach().contiguous().requires_grad_() for t in (regions, words))
        scores = forward(regions, words, word_counts, region_counts, options)
        grad_regions, grad_words = torch.autograd.grad(scores, (regions, words), grad_scores.to(scores.dtype))
    return grad_regions, grad_words


def _on_host(counts: Tensor, most: int | None) -> list[int]:
    # The one place that may wait for a device: the definition is not a kernel.
    values: list[int] = counts.tolist()
    return values if counts.device.type == "cpu" or most is None else [min(max(n, 1), most) for n in values]


def _scores_of_caption(
    regions: Tensor,  # [I, R, D]
    caption: Tensor,  # [n, D]
    region_counts: Tensor | None,
    options: SimilarityOptions,
) -> Tensor:  # [I]
    if region_counts is None:
        return _scores_of_images(regions, caption, options)
    # Images with as many regions are scored together, each group cut to what is valid.
    counts = _on_host(region_counts, regions.shape[1])
    order, parts = [], []
    for count in sorted(set(counts)):
        rows = [i for i, value in enumerate(counts) if value == count]
        order += rows
        parts.append(_scores_of_images(regions[rows, :count], caption, options))
    return torch.cat(parts)[torch.tensor(order, device=regions.device).argsort()]


def _scores_of_images(
    regions: Tensor, caption: Tensor, options: SimilarityOptions
) -> Tensor:  # [I, R, D], [n, D] -> [I]
    products = regions @ caption.t()  # [I, R, n]
    return aggregate(products.max(dim=1 if options.t2i else 2).values, options)


def aggregate(z: Tensor, options: SimilarityOptions) -> Tensor:  # [B, Q] -> [B]
    """``agg_func`` over the queries."""
    if options.agg_func == "LogSumExp":
        return torch.logsumexp(options.lambda_lse * z, dim=1) / options.lambda_lse
    if options.agg_func == "Softmax":
        return (torch.softmax(options.lambda_lse * z, dim=1) * z).sum(1)
    if options.agg_func == "Max":
        return z.max(dim=1).values
    return z.sum(1) if options.agg_func == "Sum" else z.mean(1)
