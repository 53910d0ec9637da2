"""SGRAF and RCAR train on a tiny set: dropout, BatchNorm and changed captions, killed and resumed to the same bits."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_pipeline.config import TrainConfig
from itm_pipeline.data import Batch, PrecompSplit, Vocabulary
from itm_pipeline.data.vocabulary import MASK
from itm_pipeline.errors import UserError
from itm_pipeline.evaluate import evaluate, score_matrix
from itm_pipeline.models import MatchingModel
from itm_pipeline.runs import open_run
from itm_pipeline.runs.checkpoint import read_checkpoint
from itm_pipeline.scenes import make_scenes
from itm_pipeline.train import Interrupted, resume, train
from itm_pipeline.train.log import read_log
from itm_pipeline.train.loop import Trainer
from test_resume import assert_same_run
from tiny_set import REGIONS, WIDTH, tiny_config, tiny_preset, write_tiny_set

CAPTIONS, BATCH = 33 * 5, 16
PRESETS = ("sgraf-saf", "sgraf-sgr", "rcar-t2i", "rcar-i2t")
WHOLE_BATCHES = {"rcar-t2i", "rcar-i2t"}
CHANGED_CAPTIONS = {"rcar-t2i", "rcar-i2t"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module", params=PRESETS)
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a preset. All of it sums the hinges: on a few pictures the hardest negatives teach nothing."""
    run = tmp_path_factory.mktemp("runs") / request.param
    return train(tiny_preset(request.param, data, run, epochs=7, warmup_epochs=7)).run


def test_the_loss_falls_and_the_best_checkpoint_gives_what_training_saw(trained: Path) -> None:
    steps = [line for line in read_log(trained) if line["kind"] == "train"]
    losses = [np.mean([line["loss_per_caption"] for line in steps if line["epoch"] == epoch]) for epoch in (1, 7)]
    assert losses[1] < 0.7 * losses[0]
    full, rest = divmod(CAPTIONS, BATCH)
    assert steps[-1]["step"] == 7 * (full + (rest > 0 and trained.name not in WHOLE_BATCHES))
    assert (
        evaluate(trained, split="dev", device="cpu") == read_checkpoint(trained / "best.safetensors").values["metrics"]
    )


def test_what_batchnorm_learned_is_in_the_checkpoint(trained: Path) -> None:
    batches = 7 * (CAPTIONS // BATCH + (trained.name not in WHOLE_BATCHES))
    state = read_checkpoint(trained / "last.safetensors").part("model")
    counts = {name: int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    once = {
        "sgraf-saf": {"sim_enc.v_global_w.embedding_local.1", "sim_enc.v_global_w.embedding_global.1"},
        "sgraf-sgr": {"sim_enc.v_global_w.embedding_local.1", "sim_enc.v_global_w.embedding_global.1"},
    }.get(trained.name, {"img_enc.mlp.bns.0"})
    expected = {f"{name}.num_batches_tracked": batches for name in once}
    if trained.name == "sgraf-saf":  # one caption after the other
        expected["sim_enc.SAF_module.bn.num_batches_tracked"] = 7 * CAPTIONS
    if trained.name in WHOLE_BATCHES:  # made, as published, and never applied
        expected["img_enc.mlp.bns.1.num_batches_tracked"] = 0
    assert counts == expected
    for name in once:
        assert state[f"{name}.running_mean"].abs().max() > 0


def test_the_vocabulary_has_a_mask_where_captions_are_changed(trained: Path) -> None:
    words = open_run(trained).vocabulary().words
    assert (words[-1] == MASK) == (trained.name in CHANGED_CAPTIONS)
    assert words.count(MASK) <= 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "set", train=24, dev=4, test=4, seed=0)


@pytest.mark.parametrize("preset", ["sgraf-sgr", "rcar-t2i"])
def test_scenes_train_and_evaluate(preset: str, scenes: Path, tmp_path: Path) -> None:
    run = train(tiny_preset(preset, scenes, tmp_path / "run", epochs=1, batch_size=30)).run  # type: ignore[arg-type]
    assert open_run(run).facts.num_regions == 36
    metrics = evaluate(run, device="cpu", scores=tmp_path / "scores.npy")
    assert np.load(tmp_path / "scores.npy").shape == (4, 20)
    assert metrics["t2i_r5"] == 100  # four images


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_that_was_stopped_within_an_epoch_ends_with_the_same_bits(
    preset: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_preset(preset, data, tmp_path / "run", epochs=2)  # type: ignore[arg-type]
    step = Trainer._step

    def stopped(self: Trainer, batch: Batch, hardest: bool) -> None:
        step(self, batch, hardest)
        if self.progress.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", stopped)
    with pytest.raises(Interrupted, match="saved at step 14"):
        train(config)
    monkeypatch.undo()
    torch.rand(7)  # what else the process drew has no say
    resume(tmp_path / "run")
    train(dataclasses.replace(config, run=tmp_path / "alone"))
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def batches_of(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches of a run."""
    seen: list[Batch] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, batch, hardest: (seen.append(batch), step(self, batch, hardest)))
    train(config)
    monkeypatch.undo()
    return seen


def test_captions_change_in_training_by_the_share_asked_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, tmp_path / "run", epochs=2, augment_captions=0.5)
    split = PrecompSplit(data, "train")
    masked, words, different = 0, 0, 0
    first: dict[int, list[int]] = {}
    seen = batches_of(config, monkeypatch)
    vocabulary = open_run(tmp_path / "run").vocabulary()
    for batch in seen:
        for row, caption in enumerate(batch.caption_index.tolist()):
            ids = batch.tokens[row, : batch.word_counts[row]].tolist()
            masked += ids.count(vocabulary.id_of(MASK))
            words += len(vocabulary.encode(split.captions[caption])) - 2
            different += first.setdefault(caption, ids) != ids
    assert masked / words == pytest.approx(0.25, abs=0.05)
    assert different > CAPTIONS / 2  # each epoch changes anew


@pytest.mark.parametrize("preset", PRESETS)
def test_saf_alone_takes_the_longest_captions_first(
    preset: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_preset(preset, data, tmp_path / "run", epochs=1)  # type: ignore[arg-type]
    counts = [batch.word_counts for batch in batches_of(config, monkeypatch)]
    assert all(batch == sorted(batch, reverse=True) for batch in counts) == (preset == "sgraf-saf")


def test_weight_decay_shrinks_what_has_a_gradient(data: Path, tmp_path: Path) -> None:
    """Apart from the gradient: at a learning rate of nearly nothing the first step multiplies by 1 - lr x decay."""
    rate, decay = 1e-6, 5e4
    weights = []
    for name, share in (("with", decay), ("without", 0.0)):
        run = tmp_path / name
        train(tiny_config(data, run, epochs=1, batch_size=CAPTIONS, lr=rate, weight_decay=share))
        weights.append(read_checkpoint(run / "last.safetensors").part("model")["img_enc.fc.weight"])
    assert torch.allclose(weights[0], weights[1] * (1 - rate * decay), atol=3e-6)


def test_without_weight_decay_it_is_adam() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(50), torch.randn(4, 50)
    ends = []
    for kind, options in ((torch.optim.Adam, {}), (torch.optim.AdamW, {"weight_decay": 0.0})):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=1e-2, **options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("preset", PRESETS)
def test_blocks_of_an_evaluation_do_not_change_the_scores(
    preset: str, data: Path, trained_model: MatchingModel
) -> None:
    split = PrecompSplit(data, "test")
    vocabulary = Vocabulary.build(split.captions, 1).with_mask()
    whole = score_matrix(trained_model, split, vocabulary)
    assert np.ptp(whole) > 1e-3
    trained_model.train()  # left so by a training step
    for block_bytes in (1, 30_000):
        assert np.abs(score_matrix(trained_model, split, vocabulary, block_bytes=block_bytes) - whole).max() < 2e-6


@pytest.fixture
def trained_model(preset: str) -> MatchingModel:
    """With weights that tell pairs apart, and BatchNorm buffers that are not those of the start."""
    torch.manual_seed(0)
    config = tiny_preset(preset, Path(), Path()).model  # type: ignore[arg-type]
    model = MatchingModel(config, WIDTH, 40, num_regions=REGIONS)
    with torch.no_grad():
        for parameter in model.sim_enc.parameters():
            parameter.mul_(1.5)
        for _ in range(20):
            model.train()(torch.randn(6, REGIONS, WIDTH), torch.randint(1, 40, (6, 5)), [5] * 6)
    return model


def test_sgraf_refuses_other_numbers_of_regions(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    np.save(folder / "dev_ims.npy", np.load(folder / "dev_ims.npy")[:, 1:])
    with pytest.raises(UserError, match=r"6 regions an image and dev_ims\.npy 5"):
        train(tiny_preset("sgraf-sgr", folder, tmp_path / "run", epochs=1))
    assert not (tmp_path / "run").exists()
    train(tiny_preset("rcar-t2i", folder, tmp_path / "run", epochs=1))  # which takes any number
    np.save(folder / "dev_ims.npy", np.load(data / "dev_ims.npy"))
    run = train(tiny_preset("sgraf-sgr", folder, tmp_path / "other", epochs=1)).run
    np.save(folder / "test_ims.npy", np.load(folder / "test_ims.npy")[:, 1:])
    with pytest.raises(UserError, match=r"test_ims\.npy has 5 regions an image, the model was trained on 6"):
        evaluate(run, device="cpu")


@pytest.mark.parametrize(
    ("preset", "changes", "told"),
    [
        ("sgraf-saf", {"batch_size": 41}, "leaves one of the 165 captions to the last batch"),
        ("rcar-t2i", {"batch_size": 200}, "--drop-last with --batch-size 200 leaves no batch of 165 captions"),
    ],
)
def test_batches_that_cannot_be_are_refused(
    preset: str, changes: dict[str, object], told: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        train(tiny_preset(preset, data, tmp_path / "run", **changes))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
