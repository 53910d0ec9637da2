"""A learnable set in SCAN's layout, which trains within a second: each region shows a word of its captions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from itm_pipeline.config import DataConfig, ModelConfig, PresetName, TrainConfig, from_preset

WORDS = [f"{first}{last}" for first in "bdfglmnprt" for last in ("ato", "eki", "usa")]
REGIONS, WIDTH = 6, 16


def write_tiny_set(
    folder: Path, *, train: int = 33, dev: int = 8, test: int = 10, seed: int = 0, width: int = WIDTH
) -> Path:
    """Write the three splits; images have four words each, captions two to four of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    looks = rng.standard_normal((len(WORDS), width))
    for split, images in (("train", train), ("dev", dev), ("test", test)):
        features = 0.1 * rng.standard_normal((images, REGIONS, width))
        captions = []
        for image in range(images):
            said = rng.choice(len(WORDS), 4, replace=False)
            features[image, :4] += looks[said]
            for _ in range(5):
                chosen = rng.permutation(said)[: rng.integers(2, 5)]
                captions.append(" ".join(WORDS[word] for word in chosen))
        np.save(folder / f"{split}_ims.npy", features.astype(np.float32))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        (folder / f"{split}_ids.txt").write_text("".join(f"{split}{image}\n" * 5 for image in range(images)))
    return folder


def tiny_config(data: Path, run: Path, **changes: object) -> TrainConfig:
    """A configuration that trains on such a set within a second or two."""
    values: dict[str, object] = {
        "dataset": DataConfig(data=data, min_count=1),
        "model": ModelConfig(embed_dim=32, word_dim=16),
        "run": run,
        "epochs": 3,
        "batch_size": 16,
        "lr": 4e-3,
        "device": "cpu",
        "threads": 1,
        "deterministic": True,
        "tensorboard": False,
        "log_every": 2,
        **changes,
    }
    return TrainConfig(**values)  # type: ignore[arg-type]


def tiny_preset(name: PresetName, data: Path, run: Path, **changes: object) -> TrainConfig:
    """`tiny_config` with what a preset of SGRAF or RCAR has of its own, its model small."""
    preset = from_preset(name, data)
    own: dict[str, object] = {
        "preset": name,
        "model": dataclasses.replace(preset.model, embed_dim=32, word_dim=16, sim_dim=16),
        "weight_decay": preset.weight_decay,
        "drop_last": preset.drop_last,
        "augment_captions": preset.augment_captions,
    }
    return tiny_config(data, run, **{**own, **changes})
