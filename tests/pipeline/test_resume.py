"""A run that is killed, stopped or interrupted anywhere ends with the bits of one that was left alone."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_pipeline.config import TrainConfig
from itm_pipeline.data import Vocabulary
from itm_pipeline.errors import UserError
from itm_pipeline.runs import open_run
from itm_pipeline.runs.checkpoint import read_checkpoint
from itm_pipeline.train import resume, train
from itm_pipeline.train.log import read_log
from tiny_set import tiny_config, write_tiny_set

EPOCHS = 3
BATCHES = -(-33 * 5 // 16)

CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from itm_pipeline.runs import checkpoint, files
from itm_pipeline.train import train
from itm_pipeline.train.loop import Trainer
from tiny_set import tiny_config

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{trap}
train(tiny_config(Path({data!r}), Path({run!r}), epochs={epochs}, checkpoint_every=3))
"""

IN_A_STEP = """
step = Trainer._step
def deadly(self, batch, hardest):
    step(self, batch, hardest)
    if self.progress.step == 13:
        die()
Trainer._step = deadly
"""
WHILE_SAVING = """
save = checkpoint.save_file
def deadly(tensors, path, metadata):
    save(tensors, path, metadata=metadata)
    if '"step": 12' in metadata[checkpoint.HEADER]:
        with open(path, "r+b") as half:
            half.truncate(os.path.getsize(path) // 2)
        die()
checkpoint.save_file = deadly
"""
BETWEEN_BEST_AND_LAST = """
save = Trainer._save
def deadly(self):
    if self.progress.epoch == 2:
        die()
    save(self)
Trainer._save = deadly
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    return train(config(data, tmp_path_factory.mktemp("runs") / "alone")).run


def config(data: Path, run: Path) -> TrainConfig:
    return tiny_config(data, run, epochs=EPOCHS, checkpoint_every=3)


def python(*args: str) -> subprocess.Popen[str]:
    """A process of its own that imports what this one imports."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def die_in_child(trap: str, data: Path, run: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), trap=trap, data=str(data), run=str(run), epochs=EPOCHS)
    child = python("-c", code)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors


def assert_same_run(run: Path, alone: Path) -> None:
    """Weights, optimiser and generators to the bit, and a log that holds each step once, with the same losses."""
    for name in ("last", "best"):
        mine, theirs = read_checkpoint(run / f"{name}.safetensors"), read_checkpoint(alone / f"{name}.safetensors")
        assert mine.tensors.keys() == theirs.tensors.keys()
        for key, value in theirs.tensors.items():
            assert torch.equal(mine.tensors[key], value), f"{name}: {key}"
    timeless = {"seconds", "images_per_s"}
    logs = [
        [{k: v for k, v in line.items() if k not in timeless} for line in read_log(folder) if line["kind"] != "resume"]
        for folder in (run, alone)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("trap", "step"),
    [(IN_A_STEP, 12), (WHILE_SAVING, 11), (BETWEEN_BEST_AND_LAST, 21)],
    ids=["in_a_step", "while_saving", "between_best_and_last"],
)
def test_sigkill_then_resume_gives_the_same_bits(trap: str, step: int, data: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    die_in_child(trap, data, run)
    assert read_checkpoint(run / "last.safetensors").values["progress"]["step"] == step
    resume(run)
    assert_same_run(run, alone)
    assert [line["step"] for line in read_log(run) if line["kind"] == "resume"] == [step]
    assert not list(run.glob(".*"))


def test_kill_9_from_outside(data: Path, tmp_path: Path) -> None:
    """The command line, killed by another process somewhere in its second epoch or later.

    How far it came is anybody's guess, so the run is given epochs without end, and ends after the one it died in.
    """
    run = tmp_path / "run"
    options = [
        "train", "--data", str(data), "--epochs", "5000", "--batch-size", "16", "--embed-dim", "32",
        "--word-dim", "16", "--min-count", "1", "--deterministic", "--threads", "1", "--device", "cpu",
        "--no-tensorboard", "--checkpoint-every", "3", "--log-every", "1", "--lr", "2e-3", "--lr-update", "15",
    ]  # fmt: skip
    child = python("-m", "itm_pipeline", *options, "--run", str(run))
    wait_for_step(run, BATCHES + 3, child)
    child.kill()
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    progress = read_checkpoint(run / "last.safetensors").values["progress"]
    assert progress["step"] >= BATCHES
    resume(run, epochs=progress["epoch"] + 1)
    train(dataclasses.replace(open_run(run).config, run=tmp_path / "alone"))
    assert_same_run(run, tmp_path / "alone")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(number: signal.Signals, code: int, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = python(
        "-m", "itm_pipeline", "train", "--data", str(data), "--epochs", "5000", "--batch-size", "16", "--embed-dim",
        "32", "--word-dim", "16", "--min-count", "1", "--device", "cpu", "--no-tensorboard", "--run", str(run),
        "--threads", "1", "--log-every", "1", "--checkpoint-every", "0",
    )  # fmt: skip
    wait_for_step(run, 3, child)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code, errors
    assert f"itm train --resume {run}" in errors
    assert "Traceback" not in errors
    step = read_checkpoint(run / "last.safetensors").values["progress"]["step"]
    assert f"step {step}" in errors
    assert max(line["step"] for line in read_log(run)) == step


def wait_for_step(run: Path, step: int, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if (run / "log.jsonl").exists() and any(line["step"] >= step for line in read_log(run)):
            return
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    raise AssertionError("training did not get there")


def test_interrupted_between_epochs_and_in_the_evaluation(
    data: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop while dev is scored: the epoch's steps are kept, its evaluation is done on resuming."""
    from itm_pipeline.train import Interrupted, loop

    score_matrix = loop.score_matrix

    def stopping(*args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return score_matrix(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "score_matrix", stopping)
    run = tmp_path / "run"
    with pytest.raises(Interrupted) as stop:
        train(config(data, run))
    assert stop.value.number == signal.SIGTERM
    progress = read_checkpoint(run / "last.safetensors").values["progress"]
    assert (progress["epoch"], progress["batch"]) == (0, BATCHES)
    assert not (run / "best.safetensors").exists()
    monkeypatch.undo()
    resume(run)
    assert_same_run(run, alone)


def test_a_finished_run_goes_on_for_more_epochs(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "long"))
    train(dataclasses.replace(config(data, tmp_path / "short"), epochs=2))
    assert resume(tmp_path / "short").epochs == 2  # nothing left to do
    assert resume(tmp_path / "short", epochs=EPOCHS).epochs == EPOCHS
    assert_same_run(tmp_path / "short", tmp_path / "long")
    assert open_run(tmp_path / "short").config.epochs == EPOCHS


def test_a_moved_run_and_moved_data_resume(data: Path, alone: Path, tmp_path: Path) -> None:
    folder = write_tiny_set(tmp_path / "there")
    train(dataclasses.replace(config(folder, tmp_path / "run"), epochs=1))
    (tmp_path / "run").rename(tmp_path / "moved")
    folder.rename(tmp_path / "elsewhere")
    saved = open_run(tmp_path / "moved").config.dataset
    resume(tmp_path / "moved", epochs=EPOCHS, dataset=dataclasses.replace(saved, data=tmp_path / "elsewhere"))
    assert_same_run(tmp_path / "moved", alone)


@pytest.mark.parametrize("change", ["captions", "features", "vocabulary", "option"])
def test_resume_refuses_what_would_be_another_run(change: str, tmp_path: Path) -> None:
    folder = write_tiny_set(tmp_path / "set")
    run = train(dataclasses.replace(config(folder, tmp_path / "run"), epochs=1)).run
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    options: dict[str, object] = {"epochs": 2}
    if change == "captions":
        captions = (folder / "train_caps.txt").read_text().splitlines()
        (folder / "train_caps.txt").write_text("\n".join([*captions[1:], captions[0]]) + "\n")
        told = "other data"
    elif change == "features":
        features = np.load(folder / "dev_ims.npy")
        features[2, 0, 0] += 1
        np.save(folder / "dev_ims.npy", features)
        told = "other data"
    elif change == "vocabulary":
        vocabulary = Vocabulary.load(run / "vocab.json")
        Vocabulary.build([*vocabulary.words[4:], "zebra"], 1).save(run / "vocab.json")
        before["vocab.json"] = (run / "vocab.json").read_bytes()
        told = "vocabulary"
    else:
        options["lr"] = 0.5
        told = r"--lr is 0\.004"
    with pytest.raises(UserError, match=told):
        resume(run, **options)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
