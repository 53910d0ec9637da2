"""Published checkpoint files of SGRAF and RCAR: every name fits, and the scores are those of the published code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from itm_pipeline.config import ModelConfig
from itm_pipeline.models import MatchingModel

FOLDER = Path(__file__).parents[1] / "data" / "golden" / "checkpoints"
FILES = {"sgraf_saf": "pth.tar", "sgraf_sgr": "pth.tar", "rcar_t2i": "pth", "rcar_i2t": "pth"}


def published(name: str) -> tuple[dict[str, torch.Tensor], argparse.Namespace]:
    """The state dict under the names of `MatchingModel`, and the options of the published run."""
    # The options are a pickled Namespace, which the safe loader refuses; these files are the project's own.
    saved: dict[str, Any] = torch.load(FOLDER / f"{name}.{FILES[name]}", weights_only=False)
    parts = saved["model"]
    if isinstance(parts, list):  # SGRAF: one state dict each
        named = {
            f"{prefix}.{key}": value
            for prefix, part in zip(("img_enc", "txt_enc", "sim_enc"), parts, strict=True)
            for key, value in part.items()
        }
    else:  # RCAR: a DataParallel module
        named = {key.removeprefix("module."): value for key, value in parts.items()}
    return named, saved["opt"]


def configuration(name: str, options: argparse.Namespace) -> ModelConfig:
    widths: dict[str, Any] = {
        "embed_dim": options.embed_size, "word_dim": options.word_dim, "sim_dim": options.sim_dim, "word_dropout": 0.4
    }  # fmt: skip
    if name == "sgraf_saf":
        return ModelConfig(scorer="attention_filtration", **widths)
    if name == "sgraf_sgr":
        return ModelConfig(scorer="similarity_graph", graph_steps=options.sgr_step, **widths)
    return ModelConfig(
        scorer="regulated",
        region_encoder="mlp",
        direction=options.attn_type,
        regulator="rcar",
        regulator_steps=options.rcar_step,
        **widths,
    )


@pytest.mark.parametrize("name", FILES)
def test_a_published_checkpoint_fits_and_gives_the_published_scores(name: str) -> None:
    state, options = published(name)
    model = MatchingModel(configuration(name, options), options.img_dim, options.vocab_size)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }
    model.load_state_dict(state)
    batch, scores = np.load(FOLDER / "batch.npz"), np.load(FOLDER / "scores.npz")
    with torch.no_grad():
        ours = model.eval()(
            torch.from_numpy(batch["features"]), torch.from_numpy(batch["tokens"]), batch["lengths"].tolist()
        )
    assert np.abs(ours.numpy() - scores[name]).max() < 1e-6
    assert np.ptp(scores[name]) > 5e-3  # scores that tell pairs apart
