"""The command line where tyro is not installed: the same commands, options and refusals, by argparse."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from itm_pipeline import cli
from itm_pipeline.commands import Evaluate, Info
from itm_pipeline.config import PRESETS, from_preset
from itm_pipeline.demo_config import DemoConfig
from itm_pipeline.parsers import plain
from tiny_set import write_tiny_set


@pytest.fixture
def without_tyro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)  # an import of it raises
    monkeypatch.delitem(sys.modules, "itm_pipeline.parsers.with_tyro", raising=False)


ARGUMENTS = [
    *(f"train --preset {preset} --data D" for preset in PRESETS),
    "train --lr 5e-4 --data D --embed-dim 256 --preset=scan-i2t --focal equal --no-tensorboard --deterministic",
    "train --data D --preset bfan-equal --focal None --vocab v.json --run None",
    "evaluate runs/a",
    "evaluate --fold5 --checkpoint last --scores s.npy --block-mib 7 --data None runs/a",
    "demo --small --run r",
    "info",
]


@pytest.mark.parametrize("line", ARGUMENTS)
def test_it_reads_what_tyro_reads(line: str) -> None:
    with_tyro = pytest.importorskip("itm_pipeline.parsers.with_tyro", reason="tyro is not installed")
    assert plain.parse(line.split()) == with_tyro.parse(line.split())


def test_it_reads_every_command() -> None:
    parsed = plain.parse(["train", "--data", "D", "--epochs", "3", "--preset", "scan-i2t", "--agg-func", "Mean"])
    expected = from_preset("scan-i2t", Path("D"), epochs=3)
    model = dataclasses.replace(expected.model, agg_func="Mean")
    assert parsed == dataclasses.replace(expected, model=model)
    assert plain.parse(["evaluate", "r", "--device", "cpu"]) == Evaluate(Path("r"), device="cpu")
    assert plain.parse(["demo", "--threads", "2"]) == DemoConfig(threads=2)
    assert plain.parse(["info"]) == Info()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train"], "required: --data"),
        (["train", "--preset", "scan"], "invalid choice: 'scan'"),
        (["train", "--data", "x", "--agg-func", "Median"], "argument --agg-func: invalid choice: 'Median'"),
        (["train", "--data", "x", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["train", "--data", "x", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["train", "--data", "x", "--epoch", "2"], "unrecognized arguments: --epoch 2"),
        (["evaluate"], "required: run"),
        (["evaluate", "r", "--block-mib", "few"], "argument --block-mib: invalid int value: 'few'"),
        (["juggle"], "invalid choice: 'juggle'"),
        ([], "required: COMMAND"),
    ],
)
def test_it_refuses_by_name_with_code_2(
    args: list[str], told: str, without_tyro: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert told in capsys.readouterr().err


def options_of(config: Any) -> list[str]:
    """Of every field, and of the fields of those that are records; where the set is has names of its own."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += [] if field.name == "dataset" else options_of(value)
        else:
            found.append("--" + field.name.replace("_", "-"))
    return found


def test_help_names_every_option_and_preset(without_tyro: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for preset in PRESETS.values():
        assert preset.summary in shown
    config = from_preset("scan-t2i", Path("D"))
    assert options_of(config)
    for option in options_of(config):
        assert option in shown
    assert "default: 0.0002" in shown
    assert "pip install 'itm-kernels[pipeline]'" in shown


def test_training_and_evaluation_from_the_command_line(tmp_path: Path) -> None:
    """`python -m itm_pipeline` as on a machine that has no tyro: an interpreter that cannot import it."""
    data = write_tiny_set(tmp_path / "set")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tyro'] = None\n")
    environment = {
        "PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)]),
        "PATH": "",
        "OMP_NUM_THREADS": "1",
    }

    def itm(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "itm_pipeline", *args]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    small = [
        "--batch-size", "16", "--embed-dim", "16", "--word-dim", "8", "--min-count", "1", "--device", "cpu",
        "--no-tensorboard", "--threads", "1",
    ]  # fmt: skip
    done = itm("train", "--data", str(data), "--preset", "scan-i2t", "--run", "made", "--epochs", "1", *small)
    assert done.returncode == 0, done.stderr
    assert "evaluate it with: itm evaluate made" in done.stdout
    done = itm("train", "--resume", "made", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    done = itm("evaluate", "made", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "| text to image |" in done.stdout
    done = itm("train", "--data", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "shown where tyro is installed" in itm("-h").stdout  # it is argparse that answered
