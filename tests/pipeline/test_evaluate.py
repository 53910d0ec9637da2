"""Scores in blocks, and the evaluation of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_pipeline.config import ModelConfig
from itm_pipeline.data import PrecompSplit, Vocabulary, make_batch
from itm_pipeline.errors import UserError
from itm_pipeline.evaluate import evaluate, score_matrix, table
from itm_pipeline.metrics import five_fold, retrieval
from itm_pipeline.models import MatchingModel
from itm_pipeline.runs.checkpoint import read_checkpoint
from itm_pipeline.scoring import caption_blocks
from itm_pipeline.train import train
from tiny_set import REGIONS, WIDTH, tiny_config, write_tiny_set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(data, tmp_path_factory.mktemp("runs") / "run", epochs=12)).run


@pytest.fixture
def model() -> MatchingModel:
    torch.manual_seed(0)
    return MatchingModel(ModelConfig(embed_dim=16, word_dim=8), WIDTH, 40)


def test_caption_blocks_hold_every_caption_once_within_the_bound() -> None:
    counts = np.random.default_rng(0).integers(2, 60, 500).tolist()
    blocks = caption_blocks(counts, 64, 50_000)
    assert sorted(caption for block in blocks for caption in block) == list(range(500))
    padded = [len(block) * max(counts[caption] for caption in block) * 64 * 4 for block in blocks]
    assert max(padded) <= 50_000
    assert sum(padded[:-1]) > 0.6 * 50_000 * (len(padded) - 1)  # and are not needlessly small
    assert caption_blocks([5, 3], 64, 1) == [[1], [0]]


@pytest.mark.parametrize("block_bytes", [1, 8_000, 30_000, 2**28])
def test_blocks_do_not_change_the_scores(block_bytes: int, data: Path, model: MatchingModel) -> None:
    """From one image and one caption at a time to everything at once."""
    split = PrecompSplit(data, "test")
    vocabulary = Vocabulary.build(split.captions, 1)
    batch = make_batch(split, vocabulary, np.arange(split.num_captions))
    features = torch.from_numpy(np.array(split.features[split.image_rows]))
    with torch.no_grad():
        expected = model.eval()(features, batch.tokens, batch.word_counts)
    scores = score_matrix(model, split, vocabulary, block_bytes=block_bytes)
    assert scores.dtype == np.float32
    assert scores.shape == (10, 50)
    assert np.abs(scores - expected.numpy()).max() < 1e-6


def test_what_is_held_at_once_stays_within_the_bound(data: Path, model: MatchingModel) -> None:
    split = PrecompSplit(data, "test")
    vocabulary = Vocabulary.build(split.captions, 1)
    held: list[int] = []
    score = model.score

    def watched(regions: torch.Tensor, words: torch.Tensor, counts: list[int]) -> torch.Tensor:
        held.append(regions.nbytes + words.nbytes)
        return score(regions, words, counts)

    model.score = watched  # type: ignore[method-assign, assignment]
    bound = 8_000
    score_matrix(model, split, vocabulary, block_bytes=bound)
    assert len(held) > 4
    assert max(held) <= 0.75 * bound  # the features have the last quarter
    assert bound // 4 >= REGIONS * WIDTH * 4


def test_score_matrix_can_be_stopped(data: Path, model: MatchingModel) -> None:
    class Enough(Exception):
        pass

    def stop() -> None:
        raise Enough

    split = PrecompSplit(data, "test")
    with pytest.raises(Enough):
        score_matrix(model, split, Vocabulary.build(split.captions, 1), on_block=stop)


def test_other_feature_width_is_refused(model: MatchingModel, tmp_path: Path) -> None:
    split = PrecompSplit(write_tiny_set(tmp_path, width=12), "test")
    with pytest.raises(UserError, match=r"test_ims\.npy has features of width 12.*16"):
        score_matrix(model, split, Vocabulary.build(split.captions, 1))


def test_evaluate_writes_what_it_returns(run: Path, data: Path, tmp_path: Path) -> None:
    metrics = evaluate(run, scores=tmp_path / "scores.npy", device="cpu")
    matrix = np.load(tmp_path / "scores.npy")
    assert matrix.shape == (10, 50)
    assert metrics == retrieval(matrix)
    written = json.loads((run / "metrics-test.json").read_text())
    assert written["metrics"] == metrics
    assert (written["images"], written["captions"], written["protocol"]) == (10, 50, "full")
    assert written["epoch"] == read_checkpoint(run / "best.safetensors").values["epoch"]
    assert metrics["rsum"] > 350  # chance is about 200 on ten images


def test_the_best_checkpoint_gives_the_rsum_that_training_saw(run: Path) -> None:
    best = evaluate(run, split="dev", device="cpu")
    saw = read_checkpoint(run / "best.safetensors").values["metrics"]
    assert best == saw
    last = evaluate(run, split="dev", checkpoint="last", device="cpu")
    assert last["rsum"] <= best["rsum"]
    assert (run / "metrics-dev-last.json").is_file()


def test_five_folds(run: Path, data: Path, tmp_path: Path) -> None:
    metrics = evaluate(run, fold5=True, scores=tmp_path / "s.npy", device="cpu")
    assert metrics == five_fold(np.load(tmp_path / "s.npy"))
    assert (run / "metrics-test-fold5.json").is_file()
    with pytest.raises(UserError, match="fold5"):
        evaluate(run, split="dev", fold5=True, device="cpu")  # eight images


def test_bad_requests_write_nothing(run: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match="val_"):
        evaluate(run, split="val", device="cpu")
    with pytest.raises(UserError, match="no such folder"):
        evaluate(run, data=tmp_path / "nowhere", device="cpu")
    with pytest.raises(UserError, match="--scores"):
        evaluate(run, scores=tmp_path / "no" / "s.npy", device="cpu")
    with pytest.raises(UserError, match="--block-mib"):
        evaluate(run, block_mib=0, device="cpu")
    assert sorted(path.name for path in run.iterdir()) == before


def test_table_reads_in_markdown() -> None:
    metrics = retrieval(np.eye(10).repeat(5, axis=1))
    lines = table(metrics).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "image to text",
        "100.0",
        "100.0",
        "100.0",
        "1",
        "1.0",
    ]
    assert "600.0" in lines[-1]
