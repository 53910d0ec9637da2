"""`itm evaluate RUN --attention DIR`: a run's own attention on matched pairs, as printed and as written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from itm_pipeline import cli
from itm_pipeline.attention import OVERLAPS, attention_metrics, attention_table, word_attention_steps
from itm_pipeline.config import ModelConfig, PresetName, from_preset
from itm_pipeline.data import PrecompSplit, Vocabulary, tokenize
from itm_pipeline.entities import read_words
from itm_pipeline.errors import UserError
from itm_pipeline.evaluate import evaluate, metrics_path
from itm_pipeline.metrics import attention, attention_curve, retrieval
from itm_pipeline.models import MatchingModel
from itm_pipeline.models.attention import word_attention
from itm_pipeline.runs import open_run
from itm_pipeline.scenes import make_scenes
from itm_pipeline.train import train
from tiny_set import REGIONS, WIDTH, WORDS, tiny_config

PRESETS: tuple[PresetName, ...] = ("scan-t2i", "bfan-prob", "rcar-t2i", "sgraf-saf", "sgraf-sgr")
SIDE = 10


def region_box(region: int) -> tuple[int, int, int, int]:
    """Regions stand in a row, 0-based; each overlaps the one behind it by a third (intersection over union)."""
    return region * SIDE // 2, 0, region * SIDE // 2 + SIDE, SIDE


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_set`: each of four regions shows a word of its captions. Here the words have its box as well."""
    folder = tmp_path_factory.mktemp("boxed")
    for name in ("Sentences", "Annotations"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    looks = rng.standard_normal((len(WORDS), WIDTH))
    for split, images in (("train", 33), ("dev", 8), ("test", 10)):
        features = 0.1 * rng.standard_normal((images, REGIONS, WIDTH))
        captions = []
        for image in range(images):
            said = rng.choice(len(WORDS), 4, replace=False)
            places = rng.permutation(REGIONS)[:4]
            features[image, places] += looks[said]
            lines = []
            for _ in range(5):
                chosen = rng.permutation(4)[: rng.integers(2, 5)]
                captions.append(", ".join(WORDS[said[k]] for k in chosen))
                lines.append(" , ".join(f"[/EN#{k + 1}/other {WORDS[said[k]]}]" for k in chosen))
            (folder / "Sentences" / f"{split}{image}.txt").write_text("\n".join(lines) + "\n")
            objects = ""
            for k in range(3):  # the fourth word is a scene
                sides = "".join(
                    f"<{name}>{side + 1}</{name}>"
                    for name, side in zip(("xmin", "ymin", "xmax", "ymax"), region_box(places[k]), strict=True)
                )
                objects += f"<object><name>{k + 1}</name><bndbox>{sides}</bndbox></object>"
            objects += "<object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>"
            (folder / "Annotations" / f"{split}{image}.xml").write_text(f"<annotation>{objects}</annotation>")
        np.save(folder / f"{split}_ims.npy", features.astype(np.float32))
        boxes = np.array([region_box(region) for region in range(REGIONS)], dtype=np.float32)
        np.save(folder / f"{split}_ims_bbx.npy", np.tile(boxes, (images, 1, 1)))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n")
        (folder / f"{split}_ids.txt").write_text("".join(f"{split}{image}\n" * 5 for image in range(images)))
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SCAN trained until its attention shows; the others are there."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for name in (*PRESETS, "scan-i2t"):
        model = from_preset(name, data).model
        narrow = {"embed_dim": 32, "word_dim": 16}
        if model.scorer != "cross_attention":
            narrow["sim_dim"] = 16
        epochs = 40 if name == "scan-t2i" else 2
        config = tiny_config(
            data, folder / name, preset=name, model=dataclasses.replace(model, **narrow), epochs=epochs, lr_update=100
        )
        made[name] = train(config).run
    return made


def by_pairs(run: Path, data: Path) -> tuple[list[Any], list[Any], int]:
    """Weights of every annotated word at each step, and its boxes: one pair after another, with no file reader."""
    folder = open_run(run)
    model, _ = folder.load_model("best")
    model.eval()
    vocabulary, split = folder.vocabulary(), PrecompSplit(data, "test")
    weights: list[Any] = []
    boxes, without = [], 0
    for caption in range(split.num_captions):
        image = caption // 5
        chains = {}
        for line in (data / "Sentences" / f"test{image}.txt").read_text().splitlines():
            for part in line.split(" , "):
                mark, word = part[1:-1].split(" ")
                chains[word] = int(mark.removeprefix("/EN#").removesuffix("/other"))
        text = (data / "Annotations" / f"test{image}.xml").read_text()
        ids = torch.tensor([vocabulary.encode(split.captions[caption])])
        with torch.no_grad():
            regions = model.encode_images(torch.from_numpy(np.array(split.features[image : image + 1])))
            words = model.encode_captions(ids, [ids.shape[1]])
            steps = steps_of(model, regions, words)
        for token, word in enumerate(tokenize(split.captions[caption]), start=1):
            if word == ",":
                continue
            if chains[word] == 4:
                without += 1
                continue
            left = int(text.split(f"<name>{chains[word]}</name><bndbox><xmin>")[1].split("<")[0]) - 1
            boxes.append(left)
            weights.append([step[token] for step in steps])
    return weights, boxes, without


def steps_of(model: MatchingModel, regions: Tensor, words: Tensor) -> list[Any]:
    """Weights [W, R] of one pair, each step."""
    if model.config.scorer == "regulated":
        pair = torch.tensor([[0, 0]])
        states = model.sim_enc.attention_states(regions, words, [words.shape[1]], pair)  # type: ignore[operator]
        return [state.weights[0].numpy() for state in states]
    config = model.config
    if config.scorer != "cross_attention":
        config = ModelConfig(lambda_softmax=9.0)
    return [word_attention(regions[0], words[0], config).numpy()]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_is_what_pairs_give(preset: PresetName, runs: dict[str, Path], data: Path) -> None:
    run = runs[preset]
    metrics = evaluate(run, attention=data, device="cpu")
    written = json.loads((run / "metrics-test.json").read_text())
    assert written["metrics"] == metrics, "retrieval stands beside it as ever"
    found = written["attention"]
    assert found["folder"] == str(data)
    weights, boxes, without = by_pairs(run, data)
    assert found["words"] == {"with_box": len(boxes), "without_box": without}
    steps = 2 if preset == "rcar-t2i" else 1
    assert [(r["step"], r["steps"], r["overlap"]) for r in found["results"]] == [
        (step, steps, overlap) for step in range(steps, 0, -1) for overlap in (0.5, 0.4, 0.6)
    ]
    lefts = np.array([region_box(region)[0] for region in range(REGIONS)])
    for result in found["results"]:
        assert (result["threshold"], result["average"]) == ("1/n", "macro")
        of_step = np.array([steps[result["step"] - 1] for steps in weights])
        # A third of an overlap is none here, at any of the thresholds.
        relevant = np.array(boxes)[:, None] == lefts
        counts = np.full(len(boxes), REGIONS)
        expected = attention(of_step, relevant, counts)
        assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-9)
        assert result["curve"]["best_f1"] == pytest.approx(
            attention_curve(of_step, relevant, counts)["best_f1"], abs=1e-9
        )


def test_attention_that_was_learnt_is_found(runs: dict[str, Path], data: Path) -> None:
    """An error of one token or one region would leave chance: a sixth."""
    evaluate(runs["scan-t2i"], attention=data, device="cpu")
    result = json.loads((runs["scan-t2i"] / "metrics-test.json").read_text())["attention"]["results"][0]
    assert result["pointing"] > 0.4
    assert result["mean_f1"] > 0.4


def test_blocks_do_not_change_it(runs: dict[str, Path], data: Path) -> None:
    folder = open_run(runs["rcar-t2i"])
    model, _ = folder.load_model("best")
    split = PrecompSplit(data, "test")
    words = read_words(data, split)
    words[5:10] = [dataclasses.replace(caption, boxed=()) for caption in words[5:10]]  # an image without any
    made = [
        attention_metrics(model, split, folder.vocabulary(), words, block_bytes=size, average="micro", threshold=0.2)
        for size in (1, 2**30)
    ]
    for one, all_at_once in zip(made[0]["results"], made[1]["results"], strict=True):
        assert one["queries"] == all_at_once["queries"] == sum(len(caption.boxed) for caption in words)
        for name in ("precision", "recall", "f1", "mean_f1", "pointing"):
            assert one[name] == pytest.approx(all_at_once[name], abs=1e-9)


def test_an_overlap_that_nothing_reaches_has_no_numbers(runs: dict[str, Path], data: Path) -> None:
    folder = open_run(runs["scan-t2i"])
    model, _ = folder.load_model("best")
    split = PrecompSplit(data, "test")
    shrunk = np.array([1, 1, 1, 0.55])  # in height: an overlap of 0.55
    words = [
        dataclasses.replace(
            caption, boxed=tuple(dataclasses.replace(word, boxes=word.boxes * shrunk) for word in caption.boxed)
        )
        for caption in read_words(data, split)
    ]
    made = attention_metrics(model, split, folder.vocabulary(), words)
    by_overlap = {result["overlap"]: result for result in made["results"]}
    assert by_overlap[0.5]["queries"] == by_overlap[0.4]["queries"] == by_overlap[0.6]["skipped"] > 100
    assert by_overlap[0.6]["queries"] == 0
    assert by_overlap[0.6]["precision"] is by_overlap[0.6]["curve"]["best_f1"] is None
    json.dumps(made, allow_nan=False)
    last = attention_table(made).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[4:-1]] == [""] * 5 + ["0", str(by_overlap[0.6]["skipped"]), "", ""]


def test_the_command_prints_thresholds_and_averaging_beside_each_number(
    runs: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(runs["rcar-t2i"]), "--attention", str(data), "--device", "cpu"]
    assert cli.main([*arguments, "--attention-threshold", "0.25", "--attention-average", "micro"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((runs["rcar-t2i"] / "metrics-test.json").read_text())["attention"]
    assert f"{found['words']['with_box']} words with boxes" in "\n".join(lines)
    start = next(k for k, line in enumerate(lines) if "overlap" in line)
    head, rows = lines[start], lines[start + 2 : start + 2 + 2 * len(OVERLAPS)]
    assert attention_table(found).splitlines() == [head, lines[start + 1], *rows]
    names = [name.strip() for name in head.split("|")[1:-1]]
    for row, result in zip(rows, found["results"], strict=True):
        cells = dict(zip(names, (cell.strip() for cell in row.split("|")[1:-1]), strict=True))
        assert cells["overlap"] == f">= {result['overlap']}"
        assert (cells["weight"], cells["average"]) == ("> 0.25", "micro")
        assert cells["step"] == f"{result['step']} of 2"
        for shown, name in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"), ("mean F1", "mean_f1")):
            assert cells[shown] == f"{result[name]:.3f}"
        assert cells["pointing"] == f"{result['pointing']:.3f}"
        assert cells["best F1"] == f"{result['curve']['best_f1']:.3f}"
        assert (cells["words"], cells["skipped"]) == (str(result["queries"]), str(result["skipped"]))


def test_five_folds_have_attention_too(runs: dict[str, Path], data: Path) -> None:
    evaluate(runs["scan-t2i"], attention=data, fold5=True, device="cpu")
    folds = json.loads(metrics_path(runs["scan-t2i"], "test", "best", fold5=True).read_text())
    evaluate(runs["scan-t2i"], attention=data, device="cpu")
    assert folds["attention"] == json.loads((runs["scan-t2i"] / "metrics-test.json").read_text())["attention"]


def test_without_the_option_there_is_none(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    path = runs["scan-t2i"] / "metrics-test.json"
    path.unlink(missing_ok=True)
    metrics = evaluate(runs["scan-t2i"], device="cpu", scores=tmp_path / "s.npy")
    assert "attention" not in json.loads(path.read_text())
    assert metrics == retrieval(np.load(tmp_path / "s.npy"))


def test_it_stays_when_recalls_are_made_again(runs: dict[str, Path], data: Path) -> None:
    """Until the weights are others."""
    path = runs["scan-t2i"] / "metrics-test.json"
    evaluate(runs["scan-t2i"], attention=data, device="cpu")
    first = json.loads(path.read_text())
    evaluate(runs["scan-t2i"], device="cpu")
    assert json.loads(path.read_text()) == first
    path.write_text(json.dumps(first | {"epoch": first["epoch"] + 1}))
    evaluate(runs["scan-t2i"], device="cpu")
    assert "attention" not in json.loads(path.read_text())


def test_requests_that_cannot_be_met_write_nothing(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def refused(message: str, run: str = "sgraf-sgr", **options: Any) -> None:
        before = {path.name: path.stat().st_mtime_ns for path in runs[run].iterdir()}
        with pytest.raises(UserError, match=message):
            evaluate(runs[run], device="cpu", scores=tmp_path / "s.npy", **options)
        assert {path.name: path.stat().st_mtime_ns for path in runs[run].iterdir()} == before
        assert not (tmp_path / "s.npy").exists()

    refused("in this run .*--direction i2t.* regions attend to words alone", "scan-i2t", attention=data)
    refused("nowhere: no such folder", attention=tmp_path / "nowhere")
    refused("--attention-threshold would do nothing without --attention", attention_threshold=0.1)
    refused("--attention-average would do nothing without --attention", attention_average="micro")
    refused("--attention-average must be one of macro, micro, got 'mean'", attention=data, attention_average="mean")
    for threshold in (-0.1, 1.0, float("nan")):
        refused(
            "--attention-threshold must be at least 0 and less than 1", attention=data, attention_threshold=threshold
        )

    other = tmp_path / "other"
    other.mkdir()
    for path in data.glob("test_*"):
        (other / path.name).write_bytes(path.read_bytes())
    refused(r"other/Sentences/test0\.txt: no such file", data=other, attention=other)
    np.save(other / "test_ims.npy", np.ones((10, REGIONS, WIDTH + 1), dtype=np.float32))
    refused(r"test_ims\.npy has features of width 17, the model was trained on width 16", data=other, attention=data)
    (other / "test_ims.npy").write_bytes((data / "test_ims.npy").read_bytes())
    (other / "test_ims_bbx.npy").unlink()
    refused(r"test_ims_bbx\.npy is missing, the boxes of the regions", data=other, attention=data)
    np.save(other / "test_ims_bbx.npy", np.zeros((10, REGIONS, 4), dtype=np.float32))
    refused(
        r"no region of test_ims_bbx\.npy overlaps the box of any annotated word by 0\.5", data=other, attention=data
    )
    for name in ("Sentences", "Annotations"):
        (other / name).mkdir()
        for path in (data / name).glob("test*"):
            (other / name / path.name).write_text("<annotation/>" if name == "Annotations" else path.read_text())
    refused("no word of the captions of test has a box", data=other, attention=other)
    (other / "Annotations" / "test7.xml").write_text("<!DOCTYPE a><annotation/>")
    refused(r"Annotations/test7\.xml: declares a DTD or an entity", data=other, attention=other)


def test_scorers_without_such_attention_are_told() -> None:
    with pytest.raises(TypeError, match="Linear has no attention of words over regions"):
        word_attention_steps(torch.nn.Linear(1, 1), *[torch.ones(1, 1, 1)] * 2, [1], torch.zeros(1, 2).long())


def test_scenes_bring_the_same_files(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path / "scenes", train=1, dev=1, test=6, seed=5, processes=1, progress=False)
    split = PrecompSplit(folder, "test")
    words = read_words(folder, split)
    for caption, found in zip(split.captions, words, strict=True):
        tokens = tokenize(caption)
        said = {tokens[word.token] for word in found.boxed}
        assert found.boxed
        assert not said & {"left", "right", "above", "below", "of", "on", "and", "background", "picture"}
    vocabulary = Vocabulary.build(split.captions, 1)
    torch.manual_seed(0)
    model = MatchingModel(ModelConfig(embed_dim=16, word_dim=8), split.features.shape[2], len(vocabulary))
    made = attention_metrics(model, split, vocabulary, words)
    result = made["results"][0]
    assert result["queries"] > 100
    assert result["skipped"] == 0, "three regions lie about each thing"
    assert result["precision"] < 0.3, "nothing was learnt"
