"""Every option of a run, as frozen dataclasses, and the presets.

The text under a field is its help on the command line. Nothing here needs tyro or torch: a configuration can be made in
code, checked by `itm_pipeline.checks.check`, and written to and read from JSON.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from itm_pipeline.errors import UserError

Scorer = Literal["cross_attention", "regulated", "attention_filtration", "similarity_graph"]
RegionEncoder = Literal["linear", "mlp"]
Direction = Literal["t2i", "i2t", "both"]
RawFeatureNorm = Literal["clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "softmax", "no_norm"]
AggFunc = Literal["LogSumExp", "Mean", "Max", "Sum"]
Focal = Literal["equal", "prob"]
Regulator = Literal["rar", "rcr", "rcar"]
Precision = Literal["fp32", "bf16"]
Swap = Literal["query", "content"]
Reduction = Literal["sum", "mean"]
Backend = Literal["auto", "native", "triton", "eager", "reference"]
PresetName = Literal[
    "scan-t2i", "scan-t2i-avg", "scan-i2t", "scan-i2t-avg", "bfan-equal", "bfan-prob",
    "sgraf-saf", "sgraf-sgr", "rcar-t2i", "rcar-i2t",
]  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """The matching model: two encoders and the scorer of their pairs."""

    embed_dim: int = 1024
    """Joint width D of regions and words."""
    word_dim: int = 300
    """Width of the word embedding."""
    word_dropout: float = 0.0
    """Dropout of the word embeddings."""
    region_encoder: RegionEncoder = "linear"
    """Regions by one linear map, or by it plus a small network with BatchNorm (mlp), as RCAR has it."""
    scorer: Scorer = "cross_attention"
    """cross_attention: SCAN, BFAN. regulated: RCAR. attention_filtration, similarity_graph: SGRAF's SAF and SGR."""
    direction: Direction = "t2i"
    """What attends: words to regions (t2i), regions to words (i2t), or the sum of both (cross_attention alone)."""
    raw_feature_norm: RawFeatureNorm = "clipped_l2norm"
    """Of cross_attention: normalisation of the region-word products before the softmax."""
    lambda_softmax: float = 9.0
    """Of cross_attention: inverse temperature of the attention."""
    agg_func: AggFunc = "LogSumExp"
    """Of cross_attention: how the cosines of a pair become its score."""
    lambda_lse: float = 6.0
    """Of cross_attention: inverse temperature of LogSumExp."""
    focal: Focal | None = None
    """Of cross_attention: BFAN's second step, which drops weakly attended fragments."""
    sim_dim: int = 256
    """Of all scorers but cross_attention: width S of the alignment vectors."""
    scorer_dropout: float = 0.4
    """Of all scorers but cross_attention: dropout within the scorer (the regulator rcr has none)."""
    regulator: Regulator = "rcar"
    """Of regulated: aggregation alone (rar), correspondence alone (rcr), or both."""
    regulator_steps: int = 2
    """Of regulated: how often the regulator acts."""
    temperature: float | None = None
    """Of regulated: inverse temperature of the first attention. Default, as published: 10 for t2i, 3 for i2t."""
    graph_steps: int = 3
    """Of similarity_graph: steps of reasoning."""


SCORER_OPTIONS: dict[Scorer, frozenset[str]] = {
    "cross_attention": frozenset(
        {"direction", "raw_feature_norm", "lambda_softmax", "agg_func", "lambda_lse", "focal"}
    ),
    "regulated": frozenset({"direction", "sim_dim", "scorer_dropout", "regulator", "regulator_steps", "temperature"}),
    "attention_filtration": frozenset({"sim_dim", "scorer_dropout"}),
    "similarity_graph": frozenset({"sim_dim", "scorer_dropout", "graph_steps"}),
}
"""Fields of `ModelConfig` that a scorer takes. The encoders' options apply to all."""


def sgraf(model: ModelConfig) -> bool:
    """Whether the scorer is one of SGRAF's, which learn something for each place among an image's regions."""
    return model.scorer in ("attention_filtration", "similarity_graph")


@dataclass(frozen=True)
class ConstraintConfig:
    """Losses on the attention of matched pairs, beside the hinge loss: CCR and CCS."""

    ccr: float = 0.0
    """Weight of content re-sourcing: a query is closer to what it attends to than to what it ignores. 0: none."""
    ccs: float = 0.0
    """Weight of content swapping: what a query attends to is closer to it than to one of another image. 0: none."""
    ccr_margin: float = 0.2
    """Of --ccr: margin of its hinge."""
    ccs_margin: float = 0.2
    """Of --ccs: margin of its hinge."""
    ccs_swap: Swap = "query"
    """Of --ccs: swap the query, or what it attends to (content)."""
    detach_swapped: bool = False
    """Of --ccs: no gradient into what is swapped in."""
    constraint_reduction: Reduction = "sum"
    """Of --ccr and --ccs: sum or mean over the pairs of a batch, of each pair's mean over its queries."""
    constraint_warmup_epochs: int = 0
    """Of --ccr and --ccs: epochs before they begin to count."""

    @property
    def active(self) -> bool:
        """Whether there is such a loss at all."""
        return bool(self.ccr or self.ccs)


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
    constraints: ConstraintConfig = field(default_factory=ConstraintConfig)
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
    drop_last: bool = False
    """Leave out the last batch of an epoch where it is not full."""
    augment_captions: float = 0.0
    """Share of a training caption's words that change: half are masked, a tenth replaced, the others left out."""
    lr: float = 2e-4
    """Learning rate of Adam."""
    weight_decay: float = 0.0
    """Weight decay apart from the gradient, which makes Adam AdamW."""
    lr_update: int = 15
    """The learning rate is multiplied by 0.1 every so many epochs."""
    warmup_epochs: int = 1
    """Epochs that sum the hinges over all negatives before the hardest negatives alone count. 0: none, as published."""
    margin: float = 0.2
    """Margin of the hinge loss."""
    grad_clip: float = 2.0
    """Largest norm of the whole gradient."""
    precision: Precision = "fp32"
    """bf16: products under bfloat16 autocast; weights, loss, constraints and optimiser stay float32."""
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
    warmup_epochs: int = 1
    weight_decay: float = 0.0
    drop_last: bool = False
    augment_captions: float = 0.0


def _bfan(focal: Focal) -> ModelConfig:
    return ModelConfig(direction="both", lambda_softmax=20.0, agg_func="Mean", focal=focal)


def _rcar(summary: str, direction: Direction) -> Preset:
    return Preset(
        summary,
        ModelConfig(word_dropout=0.4, region_encoder="mlp", scorer="regulated", direction=direction),
        epochs=40,
        lr=5e-4,
        lr_update=30,
        warmup_epochs=3,
        weight_decay=0.01,
        drop_last=True,
        augment_captions=0.2,
    )


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
    "sgraf-saf": Preset(
        "SGRAF, similarity attention filtration",
        ModelConfig(word_dropout=0.4, scorer="attention_filtration"),
        lr_update=20,
    ),
    "sgraf-sgr": Preset(
        "SGRAF, similarity graph reasoning",
        ModelConfig(word_dropout=0.4, scorer="similarity_graph"),
        epochs=40,
        lr_update=30,
    ),
    "rcar-t2i": _rcar("RCAR, words attend to regions, two steps of both regulators", "t2i"),
    "rcar-i2t": _rcar("RCAR, regions attend to words, two steps of both regulators", "i2t"),
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
    settings = {item.name: getattr(PRESETS[name], item.name) for item in dataclasses.fields(Preset)}
    del settings["summary"]
    return TrainConfig(**{"dataset": DataConfig(data=data), "preset": name, **settings, **changes})


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
