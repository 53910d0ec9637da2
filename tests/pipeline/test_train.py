"""Schedule, collapse, log, checkpoint, and a short training."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from itm_pipeline.checks import check
from itm_pipeline.config import PRESETS, ModelConfig, TrainConfig, from_json, from_preset, to_json
from itm_pipeline.errors import UserError
from itm_pipeline.runs import open_run
from itm_pipeline.runs.checkpoint import read_checkpoint, write_checkpoint
from itm_pipeline.runs.files import replace_file
from itm_pipeline.train import train
from itm_pipeline.train.collapse import PATIENCE, CollapseDetector
from itm_pipeline.train.log import RunLog, read_log
from itm_pipeline.train.schedule import hardest_negatives, learning_rate
from tiny_set import tiny_config, write_tiny_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(data, tmp_path_factory.mktemp("runs") / "run", epochs=12)).run


def test_schedule_decays_and_warms_up() -> None:
    config = from_preset("scan-t2i", Path("x"), lr=1.0, lr_update=2, warmup_epochs=1)
    assert [learning_rate(config, epoch) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert [hardest_negatives(config, epoch) for epoch in range(3)] == [False, True, True]


def test_presets_are_the_published_settings() -> None:
    t2i, i2t = PRESETS["scan-t2i"].model, PRESETS["scan-i2t"].model
    assert (t2i.direction, t2i.lambda_softmax, t2i.lambda_lse, t2i.agg_func) == ("t2i", 9, 6, "LogSumExp")
    assert (i2t.direction, i2t.lambda_softmax, i2t.lambda_lse, i2t.agg_func) == ("i2t", 4, 5, "LogSumExp")
    bfan = from_preset("bfan-prob", Path("x"))
    assert (bfan.model.direction, bfan.model.lambda_softmax, bfan.model.focal, bfan.epochs) == ("both", 20, "prob", 15)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_config_survives_json(preset: str) -> None:
    config = from_preset(preset, Path("some/where"), run=Path("r"), lr=0.1)  # type: ignore[arg-type]
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 1}, "--batch-size"),
        ({"lr": -1.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"epochs": 0}, "--epochs"),
        ({"margin": 0.0}, "--margin"),
        ({"precision": "fp8"}, "--precision"),
        ({"model": ModelConfig(agg_func="Median")}, "--agg-func"),  # type: ignore[arg-type]
        ({"model": ModelConfig(focal="none")}, "--focal"),  # type: ignore[arg-type]
        ({"device": "tpu"}, "--device"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_options_are_named_and_nothing_is_written(
    changes: dict[str, object], told: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        train(tiny_config(data, tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_good_options_pass() -> None:
    for preset in PRESETS:
        check(from_preset(preset, Path("x")))


def test_training_learns_and_keeps_what_it_says(trained: Path) -> None:
    log = read_log(trained)
    steps = [line["step"] for line in log if line["kind"] == "train"]
    evaluations = [line for line in log if line["kind"] == "eval"]
    batches = -(-33 * 5 // 16)
    assert steps[-1] == 12 * batches
    assert steps == sorted(set(steps))
    assert set(log[0]) == {"kind", "step", "epoch", "loss", "loss_per_caption", "lr", "seconds", "images_per_s"}
    assert [line["epoch"] for line in evaluations] == list(range(1, 13))
    best = max(line["rsum"] for line in evaluations)
    assert best > evaluations[0]["rsum"] + 20
    first_best = next(line["epoch"] for line in evaluations if line["rsum"] == best)
    saved = read_checkpoint(trained / "best.safetensors")
    assert saved.values["epoch"] == first_best
    assert saved.values["metrics"]["rsum"] == best
    assert {path.name for path in trained.iterdir()} == {
        "config.json", "vocab.json", "log.jsonl", "best.safetensors", "last.safetensors"
    }  # fmt: skip


class EveryUpdate(tqdm):  # type: ignore[type-arg]
    """A bar that does not wait a tenth of a second before it shows news."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options, mininterval=0, miniters=1)


def test_the_bar_is_for_terminals(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_config(data, tmp_path / "piped", epochs=2))
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2  # one plain line per epoch

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("itm_pipeline.train.display.tqdm", EveryUpdate)
    train(tiny_config(data, tmp_path / "seen", epochs=2))
    for part in ("epoch 2/2", "loss ", "rsum ", "images/s", "scores of dev"):
        assert part in terminal.getvalue()


def test_same_seed_same_bits_other_seed_other_bits(data: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tiny_config(data, tmp_path / name, seed=seed, epochs=1))
        weights.append(read_checkpoint(tmp_path / name / "last.safetensors").part("model"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"model": from_preset("bfan-equal", Path()).model}])
def test_other_settings_train(changes: dict[str, object], data: Path, tmp_path: Path) -> None:
    model = changes.get("model", ModelConfig())
    assert isinstance(model, ModelConfig)
    small = dataclasses.replace(model, embed_dim=32, word_dim=16)
    train(tiny_config(data, tmp_path / "run", **{**changes, "model": small}, epochs=2))
    losses = [line["loss"] for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert np.isfinite(losses).all()
    weights = read_checkpoint(tmp_path / "run" / "last.safetensors").part("model")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_a_taken_run_folder_is_left_alone(data: Path, trained: Path, tmp_path: Path) -> None:
    before = (trained / "last.safetensors").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train(tiny_config(data, trained))
    assert (trained / "last.safetensors").read_bytes() == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        train(tiny_config(data, tmp_path / "notes"))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_an_empty_run_folder_is_used(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    train(tiny_config(data, tmp_path / "run", epochs=1))
    assert (tmp_path / "run" / "best.safetensors").is_file()


@pytest.mark.parametrize("damage", ["missing", "width", "nan"])
def test_bad_data_leaves_no_run(damage: str, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    if damage == "missing":
        (folder / "dev_caps.txt").unlink()
    else:
        features = np.load(folder / "dev_ims.npy")
        if damage == "nan":
            features[3, 2, 1] = np.nan
        np.save(folder / "dev_ims.npy", features[..., :8] if damage == "width" else features)
    with pytest.raises(UserError, match="dev_"):
        train(tiny_config(folder, tmp_path / "runs" / "run"))
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(data, folder)
    features = np.load(folder / "train_ims.npy")
    np.save(folder / "train_ims.npy", features / np.abs(features).max() * np.float32(3e38))  # products overflow
    with pytest.raises(UserError, match="the loss became"):
        train(tiny_config(folder, tmp_path / "run", checkpoint_every=1))
    assert all(
        torch.isfinite(v).all() for v in read_checkpoint(tmp_path / "run" / "last.safetensors").part("model").values()
    )


def test_collapse_is_told_once() -> None:
    detector = CollapseDetector(margin=0.2)
    said = [detector.update(0.4 * (1 + 1e-3), 10, hardest=True) for _ in range(PATIENCE // 10 * 3)]
    messages = [line for line in said if line]
    assert said.index(messages[0]) == PATIENCE // 10 - 1
    assert len(messages) == 1
    assert "--warmup-epochs" in messages[0]
    assert "--batch-size" in messages[0]


def test_passing_the_margin_is_no_collapse() -> None:
    detector = CollapseDetector(margin=0.2)
    for loss in np.linspace(1.5, 0.1, 2000):  # about 11 steps within two per cent of the margin
        assert detector.update(float(loss), 1, hardest=True) is None
    for _ in range(2 * PATIENCE):
        assert detector.update(0.4, 1, hardest=False) is None


def test_collapse_reaches_log_and_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features without content: every image looks alike, so the hardest-negative loss cannot leave the margin."""
    monkeypatch.setattr("itm_pipeline.train.collapse.PATIENCE", 60)
    folder = write_tiny_set(tmp_path / "set", train=64, dev=2)
    for split in ("train", "dev"):
        np.save(folder / f"{split}_ims.npy", np.ones_like(np.load(folder / f"{split}_ims.npy")))
    train(tiny_config(folder, tmp_path / "run", warmup_epochs=0, epochs=8, log_every=10))
    told = [line for line in read_log(tmp_path / "run") if line["kind"] == "collapse"]
    assert len(told) == 1
    assert told[0]["step"] >= 60
    assert told[0]["message"] in capsys.readouterr().err


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    with RunLog(tmp_path, size=0, step=0, tensorboard=False) as log:
        log.write("train", step=1, loss=2.0)
        size = log.size()
        log.write("train", step=2, loss=1.0)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    with RunLog(tmp_path, size=size, step=1, tensorboard=False) as log:
        log.write("train", step=2, loss=1.5)
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 2.0), (2, 1.5)]


def test_tensorboard_holds_the_scalars(data: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny_config(data, tmp_path / "run", epochs=1, tensorboard=True))
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = [line["loss"] for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert [scalar.value for scalar in events.Scalars("train/loss")] == pytest.approx(logged)
    assert len(events.Scalars("eval/rsum")) == 1


def test_checkpoint_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    write_checkpoint(path, {"model.w": torch.arange(6.0).reshape(2, 3).T}, {"step": 7, "big": 2**100, "loss": 0.1})
    saved = read_checkpoint(path)
    assert torch.equal(saved.part("model")["w"], torch.arange(6.0).reshape(2, 3).T)
    assert (saved.values["step"], saved.values["big"], saved.values["loss"]) == (7, 2**100, 0.1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"last\.safetensors"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "best.safetensors")


def test_replace_file_keeps_the_old_one_when_writing_fails(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        replace_file(target, fail)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_open_run_refuses_what_is_no_run(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text('{"options": {"colour": 1}}')
    with pytest.raises(UserError, match=r"config\.json"):
        open_run(tmp_path)
    assert open_run(trained).config.epochs == 12
