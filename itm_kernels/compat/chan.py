"""Drop-in for the similarity of the published CHAN: hard assignment of words to regions, and its poolings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from itm_kernels.ops.max_similarity_scores import max_similarity_scores
from itm_kernels.ops.options import number

__all__ = ["hard_assignment_scores"]

AGG_FUNCS = {
    "LSEPooling": "LogSumExp",
    "MeanPooling": "Mean",
    "MaxPooling": "Max",
    "SumPooling": "Sum",
    "SoftmaxPooling": "Softmax",
}


def hard_assignment_scores(
    images: Tensor,  # [I, R, D]
    captions: Tensor,  # [C, W, D]
    cap_lens: Sequence[int] | Tensor,  # [C]
    pooling: str = "LSEPooling",
    belta: float = 0.1,
) -> Tensor:
    """Each word's largest product with a region, pooled over the words: ``VHACoding`` and a pooling -> ``[I, C]``.

    ``belta`` (CHAN's own spelling) is the temperature of ``LSEPooling``, ``logsumexp(z / belta)`` as published, not
    multiplied back, and of ``SoftmaxPooling``; the other poolings have none. Padding is left out by ``cap_lens``: the
    published ``SoftmaxPooling`` gives NaN for every caption that has some.
    """
    if pooling not in AGG_FUNCS:
        raise ValueError(f"hard_assignment_scores: pooling must be one of {', '.join(AGG_FUNCS)}, got {pooling!r}")
    belta = number("hard_assignment_scores", "belta", belta)
    if not belta > 0:
        raise ValueError(f"hard_assignment_scores: belta must be positive, got {belta}")
    scores = max_similarity_scores(images, captions, cap_lens, agg_func=AGG_FUNCS[pooling], lambda_lse=1 / belta)
    return scores / belta if pooling == "LSEPooling" else scores
