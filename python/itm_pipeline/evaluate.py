"""Evaluate a run: retrieval both ways and, where words have boxes, attention; as tables and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from itm_pipeline.attention import attention_metrics, check_judged
from itm_pipeline.data import PrecompSplit
from itm_pipeline.entities import read_words
from itm_pipeline.environment import pick_device
from itm_pipeline.errors import UserError
from itm_pipeline.metrics import five_fold, retrieval
from itm_pipeline.metrics.attention import AVERAGES
from itm_pipeline.runs.files import replace_file, write_json
from itm_pipeline.runs.folder import Which, open_run
from itm_pipeline.scoring import score_matrix

__all__ = ["evaluate", "metrics_path", "score_matrix", "table"]


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    checkpoint: Which = "best",
    fold5: bool = False,
    scores: Path | None = None,
    device: str = "auto",
    block_mib: int | None = None,
    attention: Path | None = None,
    attention_threshold: float | None = None,
    attention_average: str = "macro",
) -> dict[str, float]:
    """Retrieval of a run's model on one split; also written into the run as JSON.

    Parameters
    ----------
    run
        Run folder.
    split
        First part of the file names: test, testall, dev ...
    data
        Folder of the split; by default the one that the run was trained on.
    checkpoint
        "best" (by dev rsum) or "last".
    fold5
        Mean over five folds of consecutive images, COCO's 1K protocol, instead of the full matrix.
    scores
        Also save the matrix [I, C] float32 in this .npy file.
    device
        auto, cpu, cuda or cuda:N.
    block_mib
        Bound on encoded images and captions held at once, MiB; by default the run's own.
    attention
        Folder with `Sentences/` and `Annotations/` of Flickr30K Entities: judges the attention as well. What was found
        stands in the JSON, under `attention`.
    attention_threshold, attention_average
        As in `itm_pipeline.metrics.attention`.

    Returns
    -------
    dict
        As `itm_pipeline.metrics.retrieval`.

    Raises
    ------
    UserError
        Run, checkpoint or data are missing, damaged or do not fit each other.
    """
    place = pick_device(device)
    if block_mib is not None and block_mib < 1:
        raise UserError(f"--block-mib must be at least 1, got {block_mib}")
    _check_attention_options(attention, attention_threshold, attention_average)
    if scores is not None and not scores.absolute().parent.is_dir():
        raise UserError(f"--scores {scores}: the folder {scores.parent} does not exist; make it first")
    folder = open_run(run)
    vocabulary = folder.vocabulary()
    model, saved = folder.load_model(checkpoint)
    pictures = PrecompSplit(data if data is not None else folder.config.dataset.data, split)
    if fold5 and pictures.num_images % 5:
        raise UserError(
            f"--fold5 needs a number of images that five divides, {split} in {pictures.folder} has "
            f"{pictures.num_images}; leave it out"
        )
    block_bytes = (block_mib if block_mib is not None else folder.config.eval_block_mib) * 2**20
    judged: dict[str, Any] = {}
    if attention is not None:  # first: files of strangers fail early
        check_judged(model, pictures)
        found = attention_metrics(
            model,
            pictures,
            vocabulary,
            read_words(attention, pictures),
            threshold=attention_threshold,
            average=attention_average,
            block_bytes=block_bytes,
            device=place,
            progress=True,
        )
        judged = {"attention": {"folder": str(attention), **found}}
    matrix = score_matrix(model, pictures, vocabulary, block_bytes=block_bytes, device=place, progress=True)
    protocol = five_fold if fold5 else retrieval
    metrics = protocol(matrix, pictures.captions_per_image)
    if scores is not None:
        replace_file(scores, lambda temporary: _save_array(temporary, matrix))
    path, epoch = metrics_path(run, split, checkpoint, fold5=fold5), checkpoint_epoch(saved.values)
    if attention is None:
        judged = _judged_before(path, epoch, str(pictures.folder))
    write_json(
        path,
        {
            "split": split,
            "data": str(pictures.folder),
            "images": pictures.num_images,
            "captions": pictures.num_captions,
            "protocol": "five folds" if fold5 else "full",
            "checkpoint": checkpoint,
            "epoch": epoch,
            "metrics": metrics,
            **judged,
        },
    )
    return metrics


def _judged_before(path: Path, epoch: object, data: str) -> dict[str, Any]:
    """Attention of the same model on the same data, which an evaluation without it must not take away."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or none that can be read
        return {}
    same = isinstance(found, dict) and found.get("epoch") == epoch and found.get("data") == data
    return {"attention": found["attention"]} if same and "attention" in found else {}


def _check_attention_options(folder: Path | None, threshold: float | None, average: str) -> None:
    if average not in AVERAGES:
        raise UserError(f"--attention-average must be one of {', '.join(AVERAGES)}, got {average!r}")
    if threshold is not None and not (math.isfinite(threshold) and 0 <= threshold < 1):
        raise UserError(f"--attention-threshold must be at least 0 and less than 1, got {threshold}")
    if folder is None and (threshold is not None or average != "macro"):
        given = "--attention-average" if threshold is None else "--attention-threshold"
        raise UserError(f"{given} would do nothing without --attention DIR: leave it out, or give the folder")


def metrics_path(run: Path, split: str, checkpoint: Which, *, fold5: bool) -> Path:
    """Where an evaluation is written."""
    return run / f"metrics-{split}{'-fold5' if fold5 else ''}{'' if checkpoint == 'best' else '-last'}.json"


def checkpoint_epoch(values: dict[str, object]) -> object:
    """Epochs that the weights of a checkpoint have finished."""
    progress = values.get("progress")
    return progress["epoch"] if isinstance(progress, dict) else values["epoch"]


def _save_array(path: Path, matrix: npt.NDArray[np.float32]) -> None:
    with path.open("wb") as target:  # a name without .npy, which np.save would append
        np.save(target, matrix)


def table(metrics: dict[str, float]) -> str:
    """A Markdown table of `itm_pipeline.metrics.retrieval`, aligned to be read in a terminal as well."""
    rows: list[tuple[str, ...]] = [("", "R@1", "R@5", "R@10", "median rank", "mean rank")]
    for way, name in (("i2t", "image to text"), ("t2i", "text to image")):
        recalls = [f"{metrics[f'{way}_r{k}']:.1f}" for k in (1, 5, 10)]
        rows.append((name, *recalls, f"{metrics[f'{way}_medr']:g}", f"{metrics[f'{way}_meanr']:.1f}"))
    rows.append(("rsum", f"{metrics['rsum']:.1f}", "", "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = cells
        return (
            f"| {first:<{widths[0]}} | "
            + " | ".join(f"{c:>{w}}" for c, w in zip(others, widths[1:], strict=True))
            + " |"
        )

    rule = f"| {'-' * widths[0]} | " + " | ".join("-" * (w - 1) + ":" for w in widths[1:]) + " |"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
