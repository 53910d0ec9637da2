"""Retrieval in both directions: R@1, R@5, R@10, median and mean rank, rsum.

Caption ``c`` belongs to image ``c // captions_per_image``. Ranks are counted, not sorted:

- image to text: an image's rank is the best rank among its own captions, that is the number of *other* images'
  captions that score at least as high as its best own caption;
- text to image: a caption's rank is the number of *other* images that score at least as high as its own image.

Ties are therefore read against the model: of equal scores the right one comes last (a model that gives every pair
the same score reaches R@1 = 0, not 100). Without ties the numbers equal those of the published evaluation, which
sorts each row and takes the positions. Best rank is 0 here and 1 in ``medr`` and ``meanr``, as published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import UserError

if TYPE_CHECKING:
    import torch

_RECALLS_AT = (1, 5, 10)
# Scores compared in one step. The outcome takes a byte each, so this bounds the extra memory at 8 MiB (or one row).
BLOCK_SCORES = 8 * 2**20

Ranks = npt.NDArray[np.int64]


def retrieval(scores: npt.NDArray[Any] | torch.Tensor, captions_per_image: int = 5) -> dict[str, float]:
    """Recalls and ranks of a full score matrix, both ways.

    Parameters
    ----------
    scores
        ``[I, C]`` with ``C = I * captions_per_image``; any real dtype, a memory-mapped array included.
        Caption ``c`` belongs to image ``c // captions_per_image``.
    captions_per_image
        Consecutive captions of one image.

    Returns
    -------
    dict
        ``i2t_r1 i2t_r5 i2t_r10`` and ``t2i_...`` in percent, ``i2t_medr`` (``floor(median) + 1``) and ``i2t_meanr``
        counted from 1, the same for ``t2i``, and ``rsum``, the sum of the six recalls.

    Raises
    ------
    ValueError
        When the shape does not fit ``captions_per_image``, or there is no image.
    UserError
        When a score is NaN (image and caption are named).
    """
    images, captions = retrieval_ranks(scores, captions_per_image)
    result = {f"i2t_{key}": value for key, value in _summary(images).items()}
    result.update({f"t2i_{key}": value for key, value in _summary(captions).items()})
    result["rsum"] = sum(result[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in _RECALLS_AT)
    return result


def five_fold(scores: npt.NDArray[Any] | torch.Tensor, captions_per_image: int = 5, folds: int = 5) -> dict[str, float]:
    """Mean of :func:`retrieval` over folds of consecutive images, COCO's "1K" protocol for 5 x 1,000 images.

    Parameters
    ----------
    scores
        ``[I, C]`` as for :func:`retrieval`; ``I`` must be a multiple of ``folds``. Fold ``f`` is the images
        ``f * I / folds`` up to ``(f + 1) * I / folds`` against their own captions.
    captions_per_image, folds
        Consecutive captions of one image; number of folds.

    Returns
    -------
    dict
        The keys of :func:`retrieval`, every value averaged over the folds (medians too, as published).

    Raises
    ------
    ValueError, UserError
        As :func:`retrieval`, and when the images do not divide into ``folds``.
    """
    matrix = _checked(scores, captions_per_image)
    images = matrix.shape[0]
    if folds < 1 or images % folds:
        raise ValueError(f"five_fold: {images} images do not divide into {folds} folds of equal size")
    size = images // folds
    parts = []
    for first in range(0, images, size):
        columns = slice(first * captions_per_image, (first + size) * captions_per_image)
        parts.append(retrieval(matrix[first : first + size, columns], captions_per_image))
    return {key: float(np.mean([part[key] for part in parts])) for key in parts[0]}


def retrieval_ranks(
    scores: npt.NDArray[Any] | torch.Tensor, captions_per_image: int = 5, *, block_scores: int = BLOCK_SCORES
) -> tuple[Ranks, Ranks]:
    """Rank, from 0, of every image's best own caption ``[I]`` and of every caption's own image ``[C]``.

    Ties, shapes and errors as in :func:`retrieval`. Rows are compared ``block_scores`` scores at a time (at least one
    row): nothing of the matrix' size is made.
    """
    matrix = _checked(scores, captions_per_image)
    images, captions = matrix.shape
    own_images = np.arange(captions) // captions_per_image
    own_scores = matrix[own_images, np.arange(captions)]  # [C], the score of every caption with its own image
    best_scores = own_scores.reshape(images, captions_per_image).max(axis=1)  # [I]

    image_ranks = np.empty(images, dtype=np.int64)
    caption_ranks = np.zeros(captions, dtype=np.int64)
    rows = max(1, block_scores // captions)
    for first in range(0, images, rows):
        block = matrix[first : first + rows]
        _refuse_nan(block, first)
        best = best_scores[first : first + rows]
        image_ranks[first : first + rows] = np.count_nonzero(block >= best[:, None], axis=1)
        caption_ranks += np.count_nonzero(block >= own_scores, axis=0)

    # What was counted so far includes the image itself, and its own captions that equal its best one.
    image_ranks -= np.count_nonzero(own_scores.reshape(images, -1) >= best_scores[:, None], axis=1)
    caption_ranks -= 1
    return image_ranks, caption_ranks


def _summary(ranks: Ranks) -> dict[str, float]:
    summary = {f"r{k}": 100.0 * float(np.mean(ranks < k)) for k in _RECALLS_AT}
    summary["medr"] = float(np.floor(np.median(ranks)) + 1)
    summary["meanr"] = float(np.mean(ranks) + 1)
    return summary


def _checked(scores: npt.NDArray[Any] | torch.Tensor, captions_per_image: int) -> npt.NDArray[Any]:
    """The matrix as a plain array, without a copy, once its shape fits."""
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu().numpy()
    matrix = np.asarray(scores)
    if matrix.dtype.kind not in "fiu":
        raise ValueError(f"retrieval: scores must be real numbers, got {matrix.dtype}")
    if captions_per_image < 1:
        raise ValueError(f"retrieval: captions_per_image must be at least 1, got {captions_per_image}")
    if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] != matrix.shape[0] * captions_per_image:
        raise ValueError(
            f"retrieval: scores must be [I, I * {captions_per_image}] with I at least 1 "
            f"({captions_per_image} captions an image), got {list(matrix.shape)}"
        )
    return matrix


def _refuse_nan(block: npt.NDArray[Any], first_row: int) -> None:
    # The maximum of a block is NaN when one of its entries is, and needs no mask of the block's size.
    if block.dtype.kind == "f" and np.isnan(block.max()):
        row, column = np.argwhere(np.isnan(block))[0]
        raise UserError(
            f"the score of image {first_row + row} and caption {column} is NaN, so there is nothing to rank: "
            "the weights have diverged or the features are damaged; train with a smaller learning rate or check them"
        )
