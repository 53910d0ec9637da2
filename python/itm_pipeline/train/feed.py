"""Batches made one ahead of the step that uses them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from itm_pipeline.data import Batch, CaptionAugmentation, CaptionSampler, PrecompSplit, Vocabulary, make_batch


def batches(
    split: PrecompSplit,
    vocabulary: Vocabulary,
    sampler: CaptionSampler,
    epoch: int,
    start_batch: int,
    *,
    augmentation: CaptionAugmentation | None = None,
    longest_first: bool = False,
) -> Iterator[Batch]:
    """Batches of an epoch from `start_batch` on, in the sampler's order, their captions changed by `augmentation`.

    A thread gathers the next batch's features while the current step runs. The order is the sampler's alone, so runs
    repeat; the sampler itself is one batch ahead of what has been handed out here.
    """
    edit = None if augmentation is None else partial(augmentation, epoch)
    make = partial(make_batch, split, vocabulary, edit=edit, longest_first=longest_first)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        coming: Future[Batch] | None = None
        for indices in sampler.epoch(epoch, start_batch):
            ready, coming = coming, pool.submit(make, indices)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
