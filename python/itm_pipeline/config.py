"""Every option of a run, as frozen dataclasses, and the presets.

The text under a field is its help on the command line. Nothing here needs tyro or torch: a configuration can be made in
code, checked by `check`, and written to and read from JSON.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from itm_pipeline.errors import UserError

Direction = Literal["t2i", "i2t", "both"]
RawFeatureNorm = Literal["clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "softmax", "no_norm"]
AggFunc = Literal["LogSumExp", "Mean", "Max", "Sum"]
Focal = Literal["equal", "prob"]
Precision = Literal["fp32", "bf16"]
Backend = Literal["auto", "native", "triton", "eager", "reference"]
PresetName = Literal["scan-t2i", "scan-t2i-avg", "scan-i2t", "scan-i2t-avg", "bfan-equal", "bfan-prob"]


@dataclass(frozen=True)
class ModelConfig:
    """The matching model: two encoders and the cross attention between them."""

    embed_dim: int = 1024
    """Joint width D of regions and words."""
    word_dim: int = 300
    """Width of the word embedding."""
    direction: Direction = "t2i"
    """What attends: words to regions (t2i), regions to words (i2t), or the sum of both."""
    raw_feature_norm: RawFeatureNorm = "clipped_l2norm"
    """Normalisation of the region-word products before the softmax."""
    lambda_softmax: float = 9.0
    """Inverse temperature of the attention."""
    agg_func: AggFunc = "LogSumExp"
    """How the cosines of a pair become its score."""
    lambda_lse: float = 6.0
    """Inverse temperature of LogSumExp."""
    focal: Focal | None = None
    """BFAN's second step, which drops weakly attended fragments."""


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    data: Path
    """Folder in SCAN's precomputed layout: train_ims.npy, train_caps.txt, dev_ims.npy and so on."""
    vocab: Path | None = None
    """Vocabulary JSON in the published format. By default one is built from the captions of train and dev."""
    min_count: int = 4
    """A built vocabulary keeps the words that occur at least so often."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a matching model; log, checkpoints and settings go to a run folder of their own."""

    dataset: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    preset: PresetName = "scan-t2i"
    """Published settings to start from; every other option overrides them."""
    run: Path | None = None
    """Run folder to make. Default: runs/PRESET, or runs/PRESET-2 and so on where that is taken."""
    resume: Path | None = None
    """Go on with this run, exactly where its last checkpoint stands. Options that shape its result cannot change."""
    epochs: int = 30
    """Passes over the captions."""
    batch_size: int = 128
    """Captions in a batch, each with its image."""
    lr: float = 2e-4
    """Learning rate of Adam."""
    lr_update: int = 15
    """The learning rate is multiplied by 0.1 every so many epochs."""
    warmup_epochs: int = 1
    """Epochs that sum the hinges over all negatives before the hardest negatives alone count. 0: none, as published."""
    margin: float = 0.2
    """Margin of the hinge loss."""
    grad_clip: float = 2.0
    """Largest norm of the whole gradient."""
    precision: Precision = "fp32"
    """bf16: products under bfloat16 autocast; weights, loss and optimiser stay float32."""
    backend: Backend = "auto"
    """Which implementation of the scores to run; one that cannot run here is an error, auto takes the fastest."""
    workspace_mib: int = 256
    """Bound on the memory that the scores work in, MiB."""
    eval_block_mib: int = 256
    """Bound on the encoded images and captions held at once during an evaluation, MiB."""
    seed: int = 0
    """Seed of the initial weights and of the order of the captions."""
    deterministic: bool = False
    """Deterministic algorithms only: two runs, or a run and its resumed self, give the same bits on one machine."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes the GPU where torch sees one."""
    threads: int = 0
    """CPU threads; 0 leaves the number to torch."""
    checkpoint_every: int = 500
    """Steps between checkpoints within an epoch; 0 writes them at the end of epochs only."""
    log_every: int = 10
    """Steps that one line of log.jsonl sums up."""
    tensorboard: bool = True
    """Also write TensorBoard event files, where tensorboard is installed."""


RESUMABLE = frozenset(
    {"dataset.data", "epochs", "device", "threads", "checkpoint_every", "log_every", "eval_block_mib", "tensorboard"}
)
"""Options that may change when a run is resumed; the others would make it another run."""


@dataclass(frozen=True)
class Preset:
    """Settings of a published run (Flickr30K): the model, and what its training has of its own."""

    summary: str
    model: ModelConfig
    epochs: int = 30
    lr: float = 2e-4
    lr_update: int = 15


def _bfan(focal: Focal) -> ModelConfig:
    return ModelConfig(direction="both", lambda_softmax=20.0, agg_func="Mean", focal=focal)


PRESETS: dict[PresetName, Preset] = {
    "scan-t2i": Preset("SCAN, words attend to regions, LogSumExp", ModelConfig()),
    "scan-t2i-avg": Preset("SCAN, words attend to regions, mean", ModelConfig(agg_func="Mean")),
    "scan-i2t": Preset(
        "SCAN, regions attend to words, LogSumExp", ModelConfig(direction="i2t", lambda_softmax=4.0, lambda_lse=5.0)
    ),
    "scan-i2t-avg": Preset(
        "SCAN, regions attend to words, mean", ModelConfig(direction="i2t", lambda_softmax=4.0, agg_func="Mean")
    ),
    "bfan-equal": Preset("BFAN, both ways, fragments above the mean", _bfan("equal"), epochs=15),
    "bfan-prob": Preset("BFAN, both ways, fragments by probability", _bfan("prob"), epochs=15),
}


def from_preset(name: PresetName, data: Path, **changes: Any) -> TrainConfig:
    """Make the configuration of a preset.

    Parameters
    ----------
    name
        One of `PRESETS`.
    data
        Folder in SCAN's precomputed layout.
    changes
        Fields of `TrainConfig` that differ from the preset.

    Returns
    -------
    TrainConfig

    Raises
    ------
    UserError
        The preset does not exist.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    base = TrainConfig(
        dataset=DataConfig(data=data),
        model=preset.model,
        preset=name,
        epochs=preset.epochs,
        lr=preset.lr,
        lr_update=preset.lr_update,
    )
    return dataclasses.replace(base, **changes)


def check(config: TrainConfig) -> None:
    """Refuse values that cannot work, before anything is read or written.

    Raises
    ------
    UserError
        One sentence that names the option, what it must be and what was given.
    """
    whole = {
        "--embed-dim": (config.model.embed_dim, 1),
        "--word-dim": (config.model.word_dim, 1),
        "--min-count": (config.dataset.min_count, 1),
        "--epochs": (config.epochs, 1),
        "--lr-update": (config.lr_update, 1),
        "--warmup-epochs": (config.warmup_epochs, 0),
        "--workspace-mib": (config.workspace_mib, 1),
        "--eval-block-mib": (config.eval_block_mib, 1),
        "--threads": (config.threads, 0),
        "--checkpoint-every": (config.checkpoint_every, 0),
        "--log-every": (config.log_every, 1),
        "--seed": (config.seed, 0),
    }
    for option, (value, least) in whole.items():
        if value < least:
            raise UserError(f"{option} must be at least {least}, got {value}")
    if config.batch_size < 2:
        raise UserError(
            f"--batch-size must be at least 2, got {config.batch_size}: a hinge loss compares with another caption"
        )
    positive = {
        "--lr": config.lr,
        "--margin": config.margin,
        "--grad-clip": config.grad_clip,
        "--lambda-softmax": config.model.lambda_softmax,
        "--lambda-lse": config.model.lambda_lse,
    }
    for option, number in positive.items():
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{option} must be a positive number, got {number}")
    _check_choices(config)


def _check_choices(config: TrainConfig) -> None:
    """Configurations made in code bypass the parser, so the closed sets are checked here as well."""
    for owner in (config, config.model):
        for name, hint in typing.get_type_hints(type(owner)).items():
            allowed = _choices(hint)
            value = getattr(owner, name)
            if allowed and value not in allowed:
                option = "--" + name.replace("_", "-")
                raise UserError(f"{option} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of a Literal | None; nothing for other types."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        values = [value for part in parts for value in _choices(part)]
        return (*values, None) if values and type(None) in parts else ()
    return ()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Options by dotted name (`dataset.data`, `model.embed_dim`, `epochs`), in their order."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values.update(flat(value, f"{prefix}{item.name}."))
        else:
            values[prefix + item.name] = value
    return values


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass of options as plain JSON values."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values[item.name] = to_json(value)
        else:
            values[item.name] = str(value) if isinstance(value, Path) else value
    return values


Options = TypeVar("Options")


def from_json(kind: type[Options], values: dict[str, Any]) -> Options:
    """The inverse of `to_json`.

    Raises
    ------
    UserError
        The values hold an option that `kind` does not have, or lack one that has no default.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"the configuration holds options that this version does not know: {', '.join(unknown)}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            made[name] = from_json(typing.cast("type[Any]", hint), value)
        elif value is not None and (hint is Path or Path in typing.get_args(hint)):
            made[name] = Path(value)
        else:
            made[name] = value
    try:
        return kind(**made)
    except TypeError as error:
        raise UserError(f"the configuration is not complete: {error}") from error
