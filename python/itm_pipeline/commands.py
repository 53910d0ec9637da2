"""Options of the commands that no configuration of a run holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Evaluate:
    """Retrieval of a trained model, and its attention: prints tables and writes them into the run as JSON."""

    run: Path
    """Run folder that `itm train` made."""
    split: str = "test"
    """Which split: the first part of its file names."""
    data: Path | None = None
    """Folder of the split. Default: the one the run was trained on."""
    checkpoint: Literal["best", "last"] = "best"
    """The weights of the best rsum on dev, or the last ones."""
    fold5: bool = False
    """Mean over five folds of consecutive images (COCO's 1K protocol) instead of the full matrix."""
    scores: Path | None = None
    """Also save the score matrix, images by captions, float32, in this .npy file."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    block_mib: int | None = None
    """Bound on encoded images and captions held at once, MiB. Default: the run's --eval-block-mib."""
    attention: Path | None = None
    """Also judge where words attend, by the boxes in this folder's Sentences/ and Annotations/ (Flickr30K Entities)."""
    attention_threshold: float | None = None
    """A region is attended to when its weight is larger than this. Default: 1/n, n the regions of an image."""
    attention_average: Literal["macro", "micro"] = "macro"
    """Precision and recall as means over words (macro), or of the regions of all words together (micro)."""


@dataclass(frozen=True)
class Bench:
    """Measure the ops. All options go to `python -m benchmarks.run`; `itm bench --help` shows them."""


@dataclass(frozen=True)
class Info:
    """Versions, the build, and which implementation of each op can run here, with a reason where one cannot."""
