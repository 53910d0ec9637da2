"""CCR and CCS in training: the loss by hand, what they change, and options that would do nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from itm_kernels import attention_constraints
from itm_kernels.nn import CrossAttentionScorer, RegulatedScorer
from itm_pipeline.checks import check
from itm_pipeline.config import PRESETS, ConstraintConfig, TrainConfig, from_preset
from itm_pipeline.data import Batch, Vocabulary
from itm_pipeline.errors import UserError
from itm_pipeline.runs.checkpoint import read_checkpoint
from itm_pipeline.train import resume, train
from itm_pipeline.train.constraints import Constraints, directions
from itm_pipeline.train.log import read_log
from tiny_set import tiny_config, tiny_preset, write_tiny_set

BOTH = ConstraintConfig(ccr=0.5, ccs=0.5)
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("set"))


def by_preset(preset: str, data: Path, run: Path, **changes: Any) -> TrainConfig:
    if PRESETS[preset].model.scorer != "cross_attention":  # type: ignore[index]
        return tiny_preset(preset, data, run, **changes)  # type: ignore[arg-type]
    model = dataclasses.replace(PRESETS[preset].model, embed_dim=32, word_dim=16)  # type: ignore[index]
    return tiny_config(data, run, **{"model": model, **changes})


def logged(run: Path, name: str) -> list[float]:
    return [line[name] for line in read_log(run) if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("scan-t2i", {}),
        ("scan-i2t", {"constraints": dataclasses.replace(BOTH, ccs_swap="content")}),
        ("bfan-equal", {"constraints": dataclasses.replace(BOTH, detach_swapped=True)}),
        ("scan-t2i-avg", {"precision": "bf16", "constraints": ConstraintConfig(ccr=1.0)}),
        ("scan-i2t-avg", {"constraints": ConstraintConfig(ccs=1.0)}),
        ("sgraf-saf", {}),
        ("sgraf-sgr", {"precision": "bf16"}),
        ("rcar-t2i", {"precision": "bf16"}),
        ("rcar-i2t", {}),
    ],
)
def test_constraints_fall_in_training(preset: str, changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    config = by_preset(preset, data, tmp_path / "run", **{"constraints": BOTH, "epochs": 4, **changes})
    train(config)
    steps = logged(config.run, "constraints")  # type: ignore[arg-type]
    assert 0 < sum(steps[-3:]) < 0.9 * sum(steps[:3])
    assert all(loss >= 0 for loss in logged(config.run, "loss"))  # type: ignore[arg-type]


def example(direction: str) -> tuple[Batch, torch.Tensor, torch.Tensor, Vocabulary]:
    """Four captions of three images, and their vectors."""
    vocabulary = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", *"abcdefgh"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0], [1, 7, 8, 2], [1, 9, 2, 0]])
    batch = Batch(torch.empty(4, 5, 7), tokens, [4, 3, 4, 3], torch.tensor([0, 1, 2, 2]), torch.arange(4))
    regions, words = (torch.randn(4, n, 8, generator=generator) for n in (5, 4))
    return batch, regions, words, vocabulary


@pytest.mark.parametrize("direction", ["t2i", "i2t", "both"])
def test_the_loss_by_hand(direction: str) -> None:
    batch, regions, words, vocabulary = example(direction)
    scorer = CrossAttentionScorer(direction=direction, lambda_softmax=4.0, focal="equal")
    options = ConstraintConfig(ccr=0.25, ccs=2.0, ccr_margin=0.4, ccs_margin=0.3)
    config = from_preset("scan-t2i", Path("D"), constraints=options, seed=5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, direction=direction))
    constraints = Constraints(config, vocabulary, HOST)
    loss = constraints.loss(scorer, regions, words, batch, 3)
    total = 0.0
    for number, way in enumerate(directions(scorer)):
        swapped = constraints._swapped(way, 5, batch, 3, number)
        assert swapped is not None
        made = attention_constraints(
            regions, words, batch.word_counts, direction=way, lambda_softmax=4.0, focal="equal", swapped=swapped,
            ccr_margin=0.4, ccs_margin=0.3,
        )  # fmt: skip
        for b in range(4):
            asked = batch.word_counts[b] if way == "t2i" else 5
            total += 0.25 * float(made.ccr[b, :asked].mean()) + 2 * float(made.ccs[b, :asked].mean())
            side = 4 if way == "t2i" else 5
            assert (batch.image_index[swapped[b, :asked] // side] != batch.image_index[b]).all()
            if way == "t2i":
                assert (batch.tokens.flatten()[swapped[b, :asked]] > 3).all()
    assert float(loss) == pytest.approx(total, rel=1e-5)
    mean = dataclasses.replace(config, constraints=dataclasses.replace(options, constraint_reduction="mean"))
    assert float(Constraints(mean, vocabulary, HOST).loss(scorer, regions, words, batch, 3)) == pytest.approx(
        total / 4, rel=1e-5
    )
    assert float(constraints.loss(scorer, regions, words, batch, 3)) == float(loss)
    first, second = (constraints._swapped(directions(scorer)[0], 5, batch, step, 0) for step in (3, 4))
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_rcar_is_constrained_in_its_last_attention(direction: str) -> None:
    batch, regions, words, vocabulary = example(direction)
    torch.manual_seed(0)
    scorer = RegulatedScorer(8, 6, direction=direction, steps=3)
    config = from_preset("rcar-t2i", Path("D"), constraints=ConstraintConfig(ccr=1.0, ccr_margin=1.0))
    loss = Constraints(config, vocabulary, HOST).loss(scorer, regions, words, batch, 0)
    pairs = torch.arange(4)[:, None].repeat(1, 2)
    total = 0.0
    for b, weights in enumerate(scorer.attention_states(regions, words, batch.word_counts, pairs)[-1].weights):
        q, k = words[b, : batch.word_counts[b]], regions[b]
        if direction == "i2t":
            q, k = k, q
        w = weights[: len(q), : len(k)]
        near, far = (torch.cosine_similarity(q, mixed @ k) for mixed in (w, (1 - w) / (len(k) - 1)))
        total += float(torch.relu(1 - near + far).mean().detach())
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    torch.autograd.backward(loss)
    learned = {name: p.grad for name, p in scorer.named_parameters() if "rcr" in name}
    assert learned
    assert any(grad is not None and grad.any() for grad in learned.values())


def test_they_begin_after_their_warm_up_and_a_resumed_run_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(BOTH, constraint_warmup_epochs=1)
    changes = {"constraints": options, "model": dataclasses.replace(PRESETS["bfan-prob"].model, embed_dim=32)}
    weights = []
    for name, epochs in (("whole", [3]), ("parts", [1, 2, 3])):
        train(tiny_config(data, tmp_path / name, **changes, epochs=epochs[0]))
        for further in epochs[1:]:
            resume(tmp_path / name, epochs=further)
        weights.append(read_checkpoint(tmp_path / name / "last.safetensors").part("model"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    lines = [line for line in read_log(tmp_path / "whole") if line["kind"] == "train"]
    assert all((line["constraints"] > 0) == (line["epoch"] > 1) for line in lines)
    train(tiny_config(data, tmp_path / "without", model=changes["model"], epochs=1))
    assert logged(tmp_path / "without", "loss") == [line["loss"] for line in lines if line["epoch"] == 1]


def test_without_them_nothing_is_logged(data: Path, tmp_path: Path) -> None:
    train(tiny_config(data, tmp_path / "run", epochs=1))
    assert "constraints" not in read_log(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ccr": -0.5}, "--ccr must be a number of at least 0, got -0.5"),
        ({"ccs": float("nan")}, "--ccs must be a number of at least 0, got nan"),
        ({"ccr": 0.5, "ccr_margin": float("inf")}, "--ccr-margin must be a number of at least 0, got inf"),
        (
            {"ccr": 0.5, "constraint_warmup_epochs": -1},
            "--constraint-warmup-epochs must be a number of at least 0, got -1",
        ),
        (
            {"ccr": 0.5, "constraint_warmup_epochs": 1000},
            "--constraint-warmup-epochs must be within --epochs 30, got 1000",
        ),
        ({"ccs": 0.5, "ccr_margin": 0.3}, "--ccr-margin would do nothing without --ccr: leave it out"),
        ({"ccr": 0.5, "ccs_margin": 0.3}, "--ccs-margin would do nothing without --ccs: leave it out"),
        ({"ccr": 0.5, "ccs_swap": "content"}, "--ccs-swap would do nothing without --ccs: leave it out"),
        ({"ccr": 0.5, "detach_swapped": True}, "--detach-swapped would do nothing without --ccs: leave it out"),
        (
            {"constraint_reduction": "mean"},
            "--constraint-reduction would do nothing without --ccr or --ccs: leave it out",
        ),
        ({"ccs": 0.5, "ccs_swap": "key"}, "--ccs-swap must be one of query, content, got 'key'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        check(from_preset("scan-t2i", Path("D"), constraints=ConstraintConfig(**options)))
    assert str(raised.value) == sentence


def test_what_cannot_be_constrained_says_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ccs-swap must be query with --scorer regulated, got content"):
        check(from_preset("rcar-t2i", Path("D"), constraints=dataclasses.replace(BOTH, ccs_swap="content")))
    with pytest.raises(UserError, match="--backend triton cannot run --ccr and --ccs: "):
        train(tiny_config(data, tmp_path / "run", constraints=BOTH, backend="triton"))
    assert not (tmp_path / "run").exists()


def test_the_command_line_has_them() -> None:
    from itm_pipeline.parsers.plain import parse

    given = "train --preset bfan-prob --data D --ccr 0.5 --ccs 0.25 --ccs-swap content --constraint-warmup-epochs 2"
    config = parse(given.split())
    assert config.constraints == ConstraintConfig(0.5, 0.25, ccs_swap="content", constraint_warmup_epochs=2)
