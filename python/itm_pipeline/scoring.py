"""Scores of all images against all captions, in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from itm_pipeline.data import PrecompSplit, Vocabulary
from itm_pipeline.errors import UserError
from itm_pipeline.models import MatchingModel

FLOAT = 4
ENCODE_CAPTIONS = 256
"""Captions that go through the text encoder at once; its gates take about ten times the memory of the words."""


def caption_blocks(word_counts: list[int], embed_dim: int, block_bytes: int) -> list[list[int]]:
    """Captions, shortest first, in blocks whose padded words fit a bound.

    Sorting keeps the padding small: a block is as wide as its longest caption.

    Parameters
    ----------
    word_counts
        Words of every caption.
    embed_dim
        Joint width D.
    block_bytes
        Bound on the float32 words `[C, W, D]` of a block. A caption that exceeds it alone gets a block of its own.

    Returns
    -------
    list of lists
        Caption indices; every caption once.
    """
    blocks: list[list[int]] = []
    for caption in sorted(range(len(word_counts)), key=word_counts.__getitem__):
        size = word_counts[caption] * embed_dim * FLOAT  # of one row, the block's widest so far
        if not blocks or (len(blocks[-1]) + 1) * size > block_bytes:
            blocks.append([])
        blocks[-1].append(caption)
    return blocks


def check_fits(model: MatchingModel, split: PrecompSplit) -> None:
    """Refuse features that a model cannot take.

    Raises
    ------
    UserError
        They have another width than those the model was trained on, or images another number of regions than the one
        that it can score.
    """
    _, regions, width = split.features.shape
    if width != model.feature_dim:
        raise UserError(
            f"{split.folder}: {split.split}_ims.npy has features of width {width}, the model was trained on width "
            f"{model.feature_dim}; give features of the extractor that it was trained with"
        )
    if model.region_slots not in (None, regions):
        raise UserError(
            f"{split.folder}: {split.split}_ims.npy has {regions} regions an image, the model was trained on "
            f"{model.region_slots} and knows each by its place; give features of as many regions"
        )


@torch.inference_mode()
def score_matrix(
    model: MatchingModel,
    split: PrecompSplit,
    vocabulary: Vocabulary,
    *,
    block_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_block: Callable[[], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Scores of every unique image of a split against every caption.

    Captions are encoded block by block, once each. Images are encoded once when all their regions fit a quarter of
    `block_bytes`, else again for every block of captions.

    Parameters
    ----------
    model
        Left in evaluation mode.
    split, vocabulary
        The data.
    block_bytes
        Bound on the features, regions and words held at once. The scores' own workspace comes on top of it.
    device
        Where to compute; by default where the model is.
    progress
        Show a bar, where stderr is a terminal.
    on_block
        Called between blocks; may raise to stop.

    Returns
    -------
    ndarray
        [I, C] float32; column c is caption c.

    Raises
    ------
    UserError
        The features do not fit the model, as in `check_fits`.
    """
    place = torch.device(device) if device is not None else next(model.parameters()).device
    check_fits(model, split)
    _, regions, width = split.features.shape
    model.to(place).eval()
    embed_dim = model.config.embed_dim
    tokens = [vocabulary.encode(caption) for caption in split.captions]
    word_blocks = caption_blocks([len(ids) for ids in tokens], embed_dim, block_bytes // 2)
    # A quarter for regions, a quarter for the features that become regions.
    step = max(1, block_bytes // 4 // (regions * embed_dim * FLOAT))
    image_blocks = [(first, min(first + step, split.num_images)) for first in range(0, split.num_images, step)]
    chunk = max(1, block_bytes // 4 // (regions * width * FLOAT))

    scores = np.empty((split.num_images, split.num_captions), dtype=np.float32)
    kept: Tensor | None = None
    with tqdm(
        total=len(word_blocks) * len(image_blocks),
        desc=f"scores of {split.split}",
        unit="block",
        leave=False,
        dynamic_ncols=True,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for captions in word_blocks:
            counts = [len(tokens[caption]) for caption in captions]
            words = encode_captions(model, [tokens[caption] for caption in captions], place)
            for first, last in image_blocks:
                if on_block is not None:
                    on_block()
                encoded = kept if kept is not None else encode_images(model, split, first, last, chunk, place)
                if len(image_blocks) == 1:
                    kept = encoded
                scores[first:last, captions] = model.score(encoded, words, counts).float().cpu().numpy()
                bar.update()
    return scores


def encode_images(
    model: MatchingModel, split: PrecompSplit, first: int, last: int, chunk: int, device: torch.device
) -> Tensor:  # [last - first, R, D]
    """Regions of some unique images in the joint space; the features of `chunk` images are read at a time."""
    parts = []
    for start in range(first, last, chunk):
        rows = split.image_rows[start : min(start + chunk, last)]
        features = torch.from_numpy(np.array(split.features[rows], dtype=np.float32))
        parts.append(model.encode_images(features.to(device)))
    return torch.cat(parts)


def encode_captions(model: MatchingModel, tokens: list[list[int]], device: torch.device) -> Tensor:  # [C, W, D]
    """Words in the joint space, padded with zeros to the longest of these captions."""
    width = max(map(len, tokens))
    words = torch.zeros(len(tokens), width, model.config.embed_dim, device=device)
    for start in range(0, len(tokens), ENCODE_CAPTIONS):
        part = tokens[start : start + ENCODE_CAPTIONS]
        counts = [len(ids) for ids in part]
        padded = torch.zeros(len(part), max(counts), dtype=torch.int64)
        for row, ids in enumerate(part):
            padded[row, : len(ids)] = torch.tensor(ids)
        words[start : start + len(part), : max(counts)] = model.encode_captions(padded.to(device), counts)
    return words
