"""Options of the models beyond cross attention: presets, refusals, and configurations from before they existed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from itm_pipeline import cli
from itm_pipeline.checks import check
from itm_pipeline.config import SCORER_OPTIONS, ModelConfig, TrainConfig, from_json, from_preset
from itm_pipeline.errors import UserError
from itm_pipeline.parsers import plain
from itm_pipeline.runs.folder import Facts

# As `itm train --data set --epochs 1` wrote it when cross attention was the only scorer.
OLD_MODEL = {
    "embed_dim": 1024, "word_dim": 300, "direction": "i2t", "raw_feature_norm": "clipped_l2norm", "lambda_softmax": 4.0,
    "agg_func": "LogSumExp", "lambda_lse": 5.0, "focal": None,
}  # fmt: skip
OLD_OPTIONS = {
    "dataset": {"data": "set", "vocab": None, "min_count": 4}, "model": OLD_MODEL, "preset": "scan-i2t",
    "run": "runs/scan-i2t", "resume": None, "epochs": 1, "batch_size": 128, "lr": 0.0002, "lr_update": 15,
    "warmup_epochs": 1, "margin": 0.2, "grad_clip": 2.0, "precision": "fp32", "backend": "auto", "workspace_mib": 256,
    "eval_block_mib": 256, "seed": 0, "deterministic": False, "device": "auto", "threads": 0, "checkpoint_every": 500,
    "log_every": 10, "tensorboard": True,
}  # fmt: skip
OLD_FACTS = {"feature_dim": 2048, "vocab_size": 9, "vocabulary": "a", "train": "b", "dev": "c"}


def test_sgraf_and_rcar_presets_are_the_published_settings() -> None:
    saf, sgr = from_preset("sgraf-saf", Path("D")), from_preset("sgraf-sgr", Path("D"))
    assert (saf.epochs, saf.lr_update, saf.model.scorer) == (30, 20, "attention_filtration")
    assert (sgr.epochs, sgr.lr_update, sgr.model.scorer, sgr.model.graph_steps) == (40, 30, "similarity_graph", 3)
    for config in (saf, sgr):
        assert (config.lr, config.weight_decay, config.augment_captions, config.drop_last) == (2e-4, 0, 0, False)
        assert (config.model.region_encoder, config.warmup_epochs) == ("linear", 1)
    for direction in ("t2i", "i2t"):
        config = from_preset(f"rcar-{direction}", Path("D"))  # type: ignore[arg-type]
        assert (config.epochs, config.lr, config.lr_update, config.warmup_epochs) == (40, 5e-4, 30, 3)
        assert (config.weight_decay, config.augment_captions, config.drop_last) == (0.01, 0.2, True)
        model = config.model
        assert (model.scorer, model.direction, model.region_encoder) == ("regulated", direction, "mlp")
        assert (model.regulator, model.regulator_steps, model.temperature) == ("rcar", 2, None)
    for config in (saf, sgr, from_preset("rcar-t2i", Path("D"))):
        assert (config.batch_size, config.margin, config.grad_clip) == (128, 0.2, 2)
        assert (config.model.word_dropout, config.model.scorer_dropout, config.model.sim_dim) == (0.4, 0.4, 256)


def test_an_old_configuration_is_the_same_run() -> None:
    config = from_json(TrainConfig, OLD_OPTIONS)
    assert config == from_preset("scan-i2t", Path("set"), run=Path("runs/scan-i2t"), epochs=1)
    check(config)
    assert from_json(Facts, OLD_FACTS) == Facts(2048, 9, "a", "b", "c")


def test_every_option_belongs_to_the_encoders_or_to_scorers() -> None:
    encoders = {"embed_dim", "word_dim", "word_dropout", "region_encoder", "scorer"}
    of_scorers = frozenset[str]().union(*SCORER_OPTIONS.values())
    assert {item.name for item in dataclasses.fields(ModelConfig)} == encoders | of_scorers
    assert not encoders & of_scorers


OTHERS = {
    "direction": "i2t", "raw_feature_norm": "l2norm", "lambda_softmax": 3.0, "agg_func": "Mean", "lambda_lse": 3.0,
    "focal": "prob", "sim_dim": 64, "scorer_dropout": 0.1, "regulator": "rar", "regulator_steps": 1, "temperature": 5.0,
    "graph_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("scorer", SCORER_OPTIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_an_option_is_taken_or_refused(scorer: Any, name: str) -> None:
    config = TrainConfig(from_preset("scan-t2i", Path("D")).dataset, ModelConfig(scorer=scorer, **{name: OTHERS[name]}))
    if name in SCORER_OPTIONS[scorer]:
        check(config)
        return
    option = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{option} {OTHERS[name]} would do nothing with --scorer {scorer}: leave"):
        check(config)


REGULATED = ModelConfig(scorer="regulated")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": dataclasses.replace(REGULATED, direction="both")}, "--direction must be t2i or i2t"),
        ({"model": dataclasses.replace(REGULATED, regulator="both")}, "--regulator must be one of rar, rcr, rcar"),
        ({"model": dataclasses.replace(REGULATED, regulator_steps=0)}, "--regulator-steps must be at least 1"),
        (
            {"model": dataclasses.replace(REGULATED, regulator="rcr", regulator_steps=-1)},
            "--regulator-steps must be at least 0",
        ),
        (
            {"model": dataclasses.replace(REGULATED, regulator="rcr", scorer_dropout=0.1)},
            "--scorer-dropout 0.1 would do nothing with --scorer regulated and --regulator rcr",
        ),
        ({"model": dataclasses.replace(REGULATED, temperature=0.0)}, "--temperature must be a positive number"),
        ({"model": dataclasses.replace(REGULATED, sim_dim=7)}, "--sim-dim must be even"),
        ({"model": dataclasses.replace(REGULATED, sim_dim=0)}, "--sim-dim must be at least 1"),
        ({"model": ModelConfig(scorer="similarity_graph", graph_steps=0)}, "--graph-steps must be at least 1"),
        ({"model": ModelConfig(scorer="sgr")}, "--scorer must be one of"),  # type: ignore[arg-type]
        ({"model": ModelConfig(region_encoder="mlp", embed_dim=1)}, "--embed-dim must be at least 2"),
        ({"model": ModelConfig(word_dropout=1.0)}, "--word-dropout must be at least 0 and less than 1"),
        ({"model": dataclasses.replace(REGULATED, scorer_dropout=float("nan"))}, "--scorer-dropout must be"),
        ({"weight_decay": -0.1}, "--weight-decay must be a number of at least 0"),
        ({"weight_decay": float("inf")}, "--weight-decay must be a number of at least 0"),
        ({"augment_captions": 1.5}, "--augment-captions must be a share from 0 to 1"),
    ],
)
def test_what_cannot_work_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(from_preset("scan-t2i", Path("D"), **changes))


def test_both_parsers_read_the_new_options() -> None:
    line = [
        "train", "--data", "D", "--preset", "rcar-i2t", "--regulator", "rar", "--regulator-steps", "3", "--temperature",
        "4", "--sim-dim", "128", "--scorer-dropout", "0.2", "--word-dropout", "0", "--region-encoder", "linear",
        "--no-drop-last", "--weight-decay", "0", "--augment-captions", "0",
    ]  # fmt: skip
    start = from_preset("rcar-i2t", Path("D"), drop_last=False, weight_decay=0.0, augment_captions=0.0)
    model = dataclasses.replace(
        start.model, regulator="rar", regulator_steps=3, temperature=4.0, sim_dim=128, scorer_dropout=0.2,
        word_dropout=0.0, region_encoder="linear",
    )  # fmt: skip
    expected = dataclasses.replace(start, model=model)
    assert cli._parse(line) == plain.parse(line) == expected
    check(expected)
