"""The demo: from nothing to a trained model, its table, its curves and a picture of its attention."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from itm_pipeline.config import DataConfig, ModelConfig, TrainConfig
from itm_pipeline.data import PrecompSplit, Vocabulary
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.environment import pick_device
from itm_pipeline.evaluate import evaluate, metrics_path, table
from itm_pipeline.models import MatchingModel
from itm_pipeline.models.attention import word_attention
from itm_pipeline.plots import attention_picture, curves
from itm_pipeline.runs import open_run
from itm_pipeline.runs.files import replace_file
from itm_pipeline.runs.folder import refuse_taken
from itm_pipeline.scenes import make_scenes
from itm_pipeline.train import train


@dataclass(frozen=True)
class Size:
    """How much the demo draws and trains."""

    train: int
    dev: int
    test: int
    epochs: int
    embed_dim: int
    batch_size: int
    warmup_epochs: int


FULL = Size(train=2000, dev=200, test=500, epochs=5, embed_dim=256, batch_size=64, warmup_epochs=1)
SMALL = Size(train=60, dev=10, test=20, epochs=2, embed_dim=64, batch_size=16, warmup_epochs=1)

LONGEST_CAPTION = 14
"""Words that the picture has room for."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    run: Path
    metrics: dict[str, float]
    curves: Path
    attention: Path


def demo(config: DemoConfig) -> DemoResult:
    """Draw scenes, train SCAN t2i, evaluate on the pictures held out, and draw curves and attention.

    Raises
    ------
    UserError
        The run folder is taken, or the device is not there.
    itm_pipeline.train.Interrupted
        Training was stopped; its state is saved.
    """
    size = SMALL if config.small else FULL
    run = config.run if config.run is not None else _free_demo_name()
    refuse_taken(run)
    pick_device(config.device)

    _say(f"1/4  scenes: {size.train} + {size.dev} + {size.test} pictures, five captions each")
    scenes = make_scenes(
        _scenes_folder(config, size), train=size.train, dev=size.dev, test=size.test, seed=config.seed, progress=True
    )
    _say(f"     {scenes}")
    _say(f"2/4  training SCAN t2i, width {size.embed_dim}, {size.epochs} epochs")
    result = train(train_config(config, size, scenes, run))
    _say("3/4  evaluation on the test pictures")
    matrix_path = result.run / "scores-test.npy"
    metrics = evaluate(result.run, split="test", scores=matrix_path, device=config.device)
    _say("4/4  pictures")
    made = DemoResult(result.run, metrics, curves(result.run), _attention(result.run, scenes, matrix_path))
    _report(made, size)
    return made


def train_config(config: DemoConfig, size: Size, scenes: Path, run: Path) -> TrainConfig:
    """What the demo trains: SCAN t2i with LogSumExp on the scenes."""
    return TrainConfig(
        dataset=DataConfig(data=scenes),
        model=ModelConfig(embed_dim=size.embed_dim),
        run=run,
        epochs=size.epochs,
        batch_size=size.batch_size,
        lr=5e-4,
        lr_update=max(1, size.epochs * 2 // 3),
        warmup_epochs=size.warmup_epochs,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
    )


def _report(made: DemoResult, size: Size) -> None:
    text = table(made.metrics)
    heading = f"# SCAN t2i on {size.test} test scenes, {5 * size.test} captions"
    content = f"{heading}\n\n{text}\n\n![curves]({made.curves.name})\n\n![attention]({made.attention.name})\n"
    results = made.run / "results.md"
    replace_file(results, lambda temporary: _write(temporary, content))
    print(f"\n{text}\n")
    print(f"run        {made.run}")
    print(f"metrics    {metrics_path(made.run, 'test', 'best', fold5=False)}")
    print(f"results    {results}")
    print(f"curves     {made.curves}")
    print(f"attention  {made.attention}")


def _attention(run: Path, scenes: Path, matrix_path: Path) -> Path:
    """The picture of one test caption that the model finds its image for."""
    folder = open_run(run)
    vocabulary = folder.vocabulary()
    model, _ = folder.load_model("best")
    split = PrecompSplit(scenes, "test")
    assert split.boxes is not None  # the scenes have both
    assert split.image_ids is not None
    caption = pick_caption(np.load(matrix_path, mmap_mode="r"), split, vocabulary)
    image = int(split.image_of(caption))
    words, weights = attention_of(model, split, vocabulary, caption)
    return attention_picture(
        run / "attention.png",
        scenes / "images" / f"{split.image_ids[image]}.png",
        split.captions[caption],
        words,
        np.asarray(split.boxes[split.image_rows[image]], dtype=np.float64),
        weights,
    )


def pick_caption(scores: npt.NDArray[np.floating], split: PrecompSplit, vocabulary: Vocabulary) -> int:
    """The caption to show: the longest that fits the picture among those whose own image scores highest.

    Of equally long ones the first; where no caption finds its image, the first caption.
    """
    best_image = np.asarray(scores).argmax(axis=0)
    found = [c for c in range(split.num_captions) if best_image[c] == split.image_of(c)]
    lengths = {c: len(vocabulary.tokens(split.captions[c])) - 2 for c in found}
    fitting = [c for c in found if lengths[c] <= LONGEST_CAPTION]
    return max(fitting, key=lengths.__getitem__) if fitting else 0


@torch.inference_mode()
def attention_of(
    model: MatchingModel, split: PrecompSplit, vocabulary: Vocabulary, caption: int
) -> tuple[list[str], npt.NDArray[np.floating]]:
    """Words of a caption, and their attention [W, R] to the regions of its image, start and end left out.

    Both marks are words to the model and take part in the normalisation over words; only the picture omits them.
    """
    model.eval()
    ids = torch.tensor([vocabulary.encode(split.captions[caption])])
    features = torch.from_numpy(np.array(split.features[split.row_of(caption)], dtype=np.float32))
    words = model.encode_captions(ids, [ids.shape[1]])[0]
    weights = word_attention(model.encode_images(features[None])[0], words, model.config)
    return vocabulary.tokens(split.captions[caption])[1:-1], weights[1:-1].double().numpy()


def _free_demo_name() -> Path:
    number, path = 1, Path("runs", "demo")
    while path.exists():
        number += 1
        path = Path("runs", f"demo-{number}")
    return path


def _scenes_folder(config: DemoConfig, size: Size) -> Path:
    base = config.scenes if config.scenes is not None else cache_folder()
    return base / f"scenes-{size.train}-{size.dev}-{size.test}-seed{config.seed}"


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again."""
    if "XDG_CACHE_HOME" in os.environ:
        return Path(os.environ["XDG_CACHE_HOME"]) / "itm_pipeline"
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "itm_pipeline"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "itm_pipeline"
    return Path.home() / ".cache" / "itm_pipeline"


def _write(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


def _say(line: str) -> None:
    print(line, flush=True)
