"""Attention of a model on matched pairs, and how well it finds the boxes that people drew for a caption's words."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from itm_kernels import cross_attention
from itm_kernels.nn import (
    AttentionFiltrationScorer,
    CrossAttentionScorer,
    RegulatedScorer,
    SimilarityGraphScorer,
)
from itm_pipeline.data import PrecompSplit, Vocabulary
from itm_pipeline.entities import CaptionWords, overlaps
from itm_pipeline.errors import UserError
from itm_pipeline.metrics import attention, attention_curve
from itm_pipeline.models import MatchingModel
from itm_pipeline.scoring import FLOAT, check_fits, encode_captions, encode_images

OVERLAPS = (0.5, 0.4, 0.6)
"""Intersection over union from which a region lies on a box: the headline, and what is reported beside it."""

HELD = 12
"""Arrays of the size of a pair's regions and words that are held for it: what is encoded, and gates of some steps."""


def check_judged(model: MatchingModel, split: PrecompSplit) -> None:
    """Raise ``UserError`` unless words of the model attend, its features fit, and regions have boxes."""
    _check_attends(model)
    check_fits(model, split)
    if split.boxes is None:
        raise UserError(
            f"{split.folder}: {split.split}_ims_bbx.npy is missing, the boxes of the regions, which the attention is "
            "judged by; write it when features are extracted"
        )


def _check_attends(model: MatchingModel) -> None:
    """Refuse a model whose words attend to nothing."""
    if getattr(model.sim_enc, "direction", "t2i") == "i2t":
        raise UserError(
            "--attention judges how words attend to regions; in this run (--direction i2t) regions attend to words "
            "alone: evaluate a t2i or a two-way run, or leave it out"
        )


def word_attention_steps(
    scorer: nn.Module,
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    word_counts: Sequence[int],  # [C]
    pairs: Tensor,  # [P, 2]: image, caption
) -> list[Tensor]:  # of [P, W, R]
    """Weights of words over regions of chosen pairs, at every attention of a model: RCAR has several, others one.

    What stands in rows behind a caption's end has no meaning.

    Parameters
    ----------
    scorer
        A scorer of `itm_kernels.nn` in which words attend to regions; of one in both directions this one is given.
    regions, words, word_counts
        Encoded images and captions.
    pairs
        int64, image and caption of each pair.
    """
    if isinstance(scorer, RegulatedScorer):
        states = scorer.attention_states(regions, words, word_counts, pairs)
        return [state.weights for state in states]
    if isinstance(scorer, CrossAttentionScorer):
        options = {name: getattr(scorer, name) for name in ("raw_feature_norm", "lambda_softmax", "focal")}
    elif isinstance(scorer, (AttentionFiltrationScorer, SimilarityGraphScorer)):
        options = {}  # SGRAF's are the defaults
    else:
        raise TypeError(f"word_attention_steps: {type(scorer).__name__} has no attention of words over regions")
    return [cross_attention(regions, words, word_counts, pairs, **options).weights]


@torch.inference_mode()
def attention_metrics(
    model: MatchingModel,
    split: PrecompSplit,
    vocabulary: Vocabulary,
    words: list[CaptionWords],
    *,
    threshold: float | None = None,
    average: str = "macro",
    block_bytes: int = 256 * 2**20,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Precision, recall and F1 of a model's attention, the pointing game, and the curve over all thresholds.

    Parameters
    ----------
    model
        Left in evaluation mode.
    split, vocabulary
        The data; the split must have boxes.
    words
        From `itm_pipeline.entities.read_words`.
    threshold, average
        As in `itm_pipeline.metrics.attention`.
    block_bytes
        Bound on what is held of encoded regions, words and gates at once.
    device
        Where to compute; by default where the model is.
    progress
        Show a bar, where stderr is a terminal.

    Returns
    -------
    dict
        `words`: how many have a box and are judged where a region lies on it, and how many phrases' words have none.
        `results`: one for each attention of the model and each overlap, the last attention first and 0.5 first; each
        says `step`, `steps`, `overlap`, `threshold` and `average`, has the numbers of `itm_pipeline.metrics.attention`,
        and the `curve` of `itm_pipeline.metrics.attention_curve`.

    Raises
    ------
    UserError
        The model's words attend to nothing (i2t), the features do not fit it, the split has no boxes, or no word could
        be judged.
    """
    check_judged(model, split)
    judged = sum(len(caption.boxed) for caption in words)
    if not judged:
        raise UserError(f"{split.folder}: no word of the captions of {split.split} has a box, so nothing can be judged")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    weights, best = _of_all_words(model.to(place).eval(), split, vocabulary, words, block_bytes, place, progress)
    counts = np.full(len(best), best.shape[1])
    results: list[dict[str, Any]] = []
    for step in range(len(weights), 0, -1):
        for least in OVERLAPS:
            relevant = best >= least
            results.append(
                {
                    "step": step,
                    "steps": len(weights),
                    "overlap": least,
                    "threshold": "1/n" if threshold is None else threshold,
                    "average": average,
                    **attention(weights[step - 1], relevant, counts, threshold, average),
                    "curve": attention_curve(weights[step - 1], relevant, counts, average),
                }
            )
    if not results[0]["queries"]:
        raise UserError(
            f"{split.folder}: no region of {split.split}_ims_bbx.npy overlaps the box of any annotated word by "
            f"{OVERLAPS[0]}; are these the boxes of these images, in 0-based pixels of the original size?"
        )
    return {
        "words": {"with_box": judged, "without_box": sum(caption.without_box for caption in words)},
        "results": [_without_nan(result) for result in results],
    }


def _without_nan(result: dict[str, Any]) -> dict[str, Any]:
    """NaN, of an overlap that no region reaches, as None: JSON has no other word for it."""
    cleaned = {name: _without_nan(value) if isinstance(value, dict) else value for name, value in result.items()}
    return {name: None if isinstance(value, float) and value != value else value for name, value in cleaned.items()}


def _of_all_words(
    model: MatchingModel,
    split: PrecompSplit,
    vocabulary: Vocabulary,
    words: list[CaptionWords],
    block_bytes: int,
    device: torch.device,
    progress: bool,
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """Of all annotated words: weights [Q, R] of each step, and the best overlap of each region [Q, R]."""
    weights: list[list[npt.NDArray[np.float32]]] = []
    overlap: list[npt.NDArray[np.float64]] = []
    with tqdm(
        total=split.num_images,
        desc=f"attention of {split.split}",
        unit="image",
        leave=False,
        dynamic_ncols=True,
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for first, last in _image_blocks(model, split, vocabulary, block_bytes):
            of_block, steps = _block(model, split, vocabulary, words, (first, last), device)
            overlap += of_block
            weights += [[] for _ in steps[len(weights) :]]
            for kept, found in zip(weights, steps, strict=False):  # a block without annotated words has no steps
                kept.append(found)
            bar.update(last - first)
    return [np.concatenate(of_step) for of_step in weights], np.concatenate(overlap)


def _image_blocks(
    model: MatchingModel, split: PrecompSplit, vocabulary: Vocabulary, block_bytes: int
) -> Iterator[tuple[int, int]]:
    """Images, first and behind the last, whose pairs with their own captions fit the bound."""
    longest = max(len(vocabulary.encode(caption)) for caption in split.captions)
    rows = split.captions_per_image * (split.features.shape[1] + longest)
    step = max(1, block_bytes // (rows * model.config.embed_dim * FLOAT * HELD))
    for first in range(0, split.num_images, step):
        yield first, min(first + step, split.num_images)


def _block(
    model: MatchingModel,
    split: PrecompSplit,
    vocabulary: Vocabulary,
    words: list[CaptionWords],
    images: tuple[int, int],
    device: torch.device,
) -> tuple[list[npt.NDArray[np.float64]], list[npt.NDArray[np.float32]]]:
    """Of all annotated words of some images: overlaps with the regions [1, R] each, and weights [Q, R] of each step."""
    assert split.boxes is not None
    first, last = images
    start, stop = first * split.captions_per_image, last * split.captions_per_image
    captions = [c for c in range(start, stop) if words[c].boxed]
    if not captions:
        return [], []
    tokens = [vocabulary.encode(split.captions[c]) for c in captions]
    encoded = encode_captions(model, tokens, device)
    regions = encode_images(model, split, first, last, last - first, device)
    pairs = torch.tensor([[int(split.image_of(c)) - first, k] for k, c in enumerate(captions)])
    steps = word_attention_steps(model.sim_enc, regions, encoded, [len(ids) for ids in tokens], pairs)
    # The model's first token is the start of the caption.
    places = [(k, word.token + 1) for k, c in enumerate(captions) for word in words[c].boxed]
    pair, row = torch.tensor(places, device=device).unbind(1)
    found = []
    for c in captions:
        boxes = np.asarray(split.boxes[split.image_rows[split.image_of(c)]])
        found += [overlaps(boxes, word.boxes).max(axis=1)[None] for word in words[c].boxed]
    return found, [step[pair, row].float().cpu().numpy() for step in steps]


def attention_table(found: dict[str, Any]) -> str:
    """A Markdown table of `attention_metrics`: thresholds and averaging stand beside every number."""
    several = found["results"][0]["steps"] > 1
    head = ["overlap", "weight", "average", "precision", "recall", "F1", "mean F1", "pointing", "words", "skipped"]
    rows = [["step"] * several + head + ["best F1", "at weight"]]
    for result in found["results"]:
        threshold, curve = result["threshold"], result["curve"]
        rows.append(
            [f"{result['step']} of {result['steps']}"] * several
            + [f">= {result['overlap']:g}", f"> {threshold if threshold == '1/n' else format(threshold, 'g')}"]
            + [result["average"]]
            + [_number(result[name]) for name in ("precision", "recall", "f1", "mean_f1", "pointing")]
            + [str(result["queries"]), str(result["skipped"])]
            + [_number(curve["best_f1"]), f"> {curve['best_threshold']:.6g}" if curve["best_f1"] else ""]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * (w - 1) + ":" for w in widths) + " |", *lines[1:]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
