"""The command line: options, presets, errors in one sentence, exit codes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itm_pipeline import cli
from itm_pipeline.commands import Evaluate
from itm_pipeline.config import PRESETS, DataConfig, ModelConfig, TrainConfig, from_preset
from itm_pipeline.data import PrecompSplit, Vocabulary
from itm_pipeline.demo import pick_caption
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.evaluate import table
from itm_pipeline.plots import heat_map
from itm_pipeline.runs import open_run
from tiny_set import write_tiny_set

TINY = [
    "--batch-size", "16", "--embed-dim", "16", "--word-dim", "8", "--min-count", "1", "--device", "cpu",
    "--no-tensorboard", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_preset_is_what_the_parser_starts_from(preset: str) -> None:
    parsed = cli._parse(["train", "--preset", preset, "--data", "D"])
    assert parsed == from_preset(preset, Path("D"))  # type: ignore[arg-type]


def test_options_override_the_preset_in_any_order() -> None:
    parsed = cli._parse(
        ["train", "--lr", "5e-4", "--data", "D", "--embed-dim", "256", "--preset=scan-i2t", "--focal", "equal"]
    )
    expected = from_preset("scan-i2t", Path("D"), lr=5e-4)
    model = dataclasses.replace(expected.model, embed_dim=256, focal="equal")
    assert parsed == dataclasses.replace(expected, model=model)


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate", "demo"):
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind in (TrainConfig, DataConfig, ModelConfig, DemoConfig, Evaluate):
        body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.target) in (
                "dataset",
                "model",
                "constraints",
            ):  # groups
                continue
            name = ast.unparse(field.target)
            assert isinstance(text, ast.Expr), f"{kind.__name__}.{name} has no help"
            help_text = " ".join(ast.literal_eval(text.value).split())
            assert help_text[:60] in shown
            assert "--" + name.replace("_", "-") in shown


@pytest.mark.parametrize(
    "args",
    [
        ["train"],
        ["train", "--preset", "scan"],
        ["train", "--data", "x", "--agg-func", "Median"],
        ["train", "--data", "x", "--epochs", "many"],
        ["train", "--data", "x", "--colour", "red"],
        ["evaluate"],
        ["juggle"],
        [],
    ],
)
def test_the_parser_refuses_with_code_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train", "--data", "nowhere"], "nowhere"),
        (["train", "--data", "DATA", "--lr", "-1"], "--lr"),
        (["train", "--data", "DATA", "--batch-size", "1"], "--batch-size"),
        (["train", "--data", "DATA", "--device", "tpu"], "--device"),
        (["train", "--data", "DATA", "--vocab", "none.json"], "none.json"),
        (["train", "--resume", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["demo", "--device", "tpu"], "--device"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    args: list[str], told: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(data) if arg == "DATA" else arg for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("itm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert list(tmp_path.iterdir()) == []


def test_train_resume_evaluate(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", str(data), "--epochs", "1", *TINY]) == 0
    assert "runs/scan-t2i" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "runs/scan-t2i", "--epochs", "2"]) == 0
    assert open_run(Path("runs/scan-t2i")).config.epochs == 2
    assert cli.main(["train", "--resume", "runs/scan-t2i", "--margin", "0.5"]) == 2
    assert "--margin is 0.2" in capsys.readouterr().err
    assert cli.main(["train", "--data", str(data), "--epochs", "1", *TINY]) == 0  # the next free name
    assert Path("runs/scan-t2i-2/best.safetensors").is_file()
    assert cli.main(["evaluate", "runs/scan-t2i", "--scores", "scores.npy"]) == 0
    out = capsys.readouterr().out
    assert "| image to text |" in out
    assert Path("scores.npy").is_file()
    assert Path("runs/scan-t2i/metrics-test.json").is_file()


def test_bench_forwards_its_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "run.py").write_text("")
    called: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "python" / "itm_pipeline" / "cli.py"))
    assert cli.main(["bench", "--device", "cpu", "--help"]) == 3
    assert called == [[sys.executable, "-m", "benchmarks.run", "--device", "cpu", "--help"]]
    (tmp_path / "benchmarks" / "run.py").unlink()
    assert cli.main(["bench"]) == 2
    assert "clone" in capsys.readouterr().err


def test_info_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(command: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "itm: interrupted\n"


def test_small_demo_ends_with_table_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--small", "--scenes", "cache", "--threads", "1", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    run = Path("runs/demo")
    assert "| text to image |" in out
    for name in ("attention.png", "curves.png", "results.md"):
        assert str(run / name) in out
    with Image.open(run / "attention.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("L").getcolors(256) or []) > 100  # drawn, not blank
    results = (run / "results.md").read_text()
    assert table(json.loads((run / "metrics-test.json").read_text())["metrics"]) in results
    scores = np.load(run / "scores-test.npy")
    assert scores.shape == (20, 100)


def test_heat_adds_the_weights_of_the_boxes_that_cover_a_pixel() -> None:
    boxes = np.array([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [7.2, 3.0, 7.4, 9.0]])
    heat = heat_map(boxes, np.array([0.25, 0.5, 0.25]), (4, 8))
    expected = np.zeros((4, 8))
    expected[:2, :4] += 0.25
    expected[:2, 2:6] += 0.5
    expected[3:, 7] += 0.25  # narrower than a pixel, and lower than the picture
    assert np.allclose(heat, expected / 0.75)


def test_the_caption_shown_is_the_longest_that_fits_and_finds_its_image(data: Path) -> None:
    split = PrecompSplit(data, "test")
    vocabulary = Vocabulary.build(split.captions, 1)
    own = np.arange(split.num_captions) // 5
    scores = np.zeros((split.num_images, split.num_captions))
    right = [3, 17, 22]  # for the others, another image scores higher
    scores[(own + 1) % split.num_images, np.arange(split.num_captions)] = 1
    scores[own[right], right] = 2
    chosen = pick_caption(scores, split, vocabulary)
    lengths = [len(vocabulary.tokens(split.captions[caption])) for caption in right]
    assert chosen == right[int(np.argmax(lengths))]
    assert pick_caption(-scores, split, vocabulary) in range(split.num_captions)
