"""Open what a run needs: data, vocabulary, and the run folder, new or old. All checks of the input happen here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from itm_pipeline.config import RESUMABLE, TrainConfig, flat, sgraf
from itm_pipeline.data import PrecompSplit, Vocabulary
from itm_pipeline.errors import UserError
from itm_pipeline.runs.folder import Facts, RunFolder, free_name, open_run
from itm_pipeline.train.fingerprint import fingerprint


@dataclass(frozen=True)
class Session:
    """A run folder (which may not be on the disk yet) and its data."""

    folder: RunFolder
    train: PrecompSplit
    dev: PrecompSplit
    vocabulary: Vocabulary


def new_session(config: TrainConfig) -> Session:
    """Check the data of a new run. Nothing is written.

    Raises
    ------
    UserError
        Data that cannot be trained on, or a run folder that is taken.
    """
    path = free_name(config)
    train, dev = _open_splits(config)
    if config.dataset.vocab is not None:
        vocabulary = Vocabulary.load(config.dataset.vocab)
    else:
        vocabulary = Vocabulary.build([*train.captions, *dev.captions], config.dataset.min_count)
    if config.augment_captions:
        vocabulary = vocabulary.with_mask()
    facts = Facts(
        feature_dim=int(train.features.shape[2]),
        vocab_size=len(vocabulary),
        vocabulary=vocabulary.fingerprint(),
        train=fingerprint(train),
        dev=fingerprint(dev),
        num_regions=int(train.features.shape[1]),
    )
    return Session(RunFolder(path, dataclasses.replace(config, run=path), facts), train, dev, vocabulary)


def old_session(config: TrainConfig) -> Session:
    """Open the run that `config.resume` names, on the same data.

    Raises
    ------
    UserError
        The folder is no run, an option differs that would make it another run, or data or vocabulary have changed.
    """
    assert config.resume is not None
    saved = open_run(config.resume)
    before = flat(saved.config)
    for name, value in flat(config).items():
        if name not in RESUMABLE and name not in ("run", "resume") and value != before[name]:
            option = "--" + name.rpartition(".")[2].replace("_", "-")
            raise UserError(
                f"{option} is {before[name]} in {config.resume} and cannot become {value} on the way: "
                "leave it out, or start a new run"
            )
    vocabulary = saved.vocabulary()
    train, dev = _open_splits(config)
    for split, before_print in ((train, saved.facts.train), (dev, saved.facts.dev)):
        if fingerprint(split) != before_print:
            raise UserError(
                f"{config.resume} was trained on other data: captions, ids or features of {split.split!r} in "
                f"{config.dataset.data} have changed; name the old folder with --data, or start a new run"
            )
    settled = dataclasses.replace(config, run=config.resume, resume=None)
    return Session(RunFolder(config.resume, settled, saved.facts), train, dev, vocabulary)


def _open_splits(config: TrainConfig) -> tuple[PrecompSplit, PrecompSplit]:
    train, dev = PrecompSplit(config.dataset.data, "train"), PrecompSplit(config.dataset.data, "dev")
    if train.features.shape[2] != dev.features.shape[2]:
        raise UserError(
            f"{config.dataset.data}: train_ims.npy has features of width {train.features.shape[2]} and dev_ims.npy of "
            f"{dev.features.shape[2]}; both must come from the same extractor"
        )
    if sgraf(config.model) and train.features.shape[1] != dev.features.shape[1]:
        raise UserError(
            f"{config.dataset.data}: train_ims.npy has {train.features.shape[1]} regions an image and dev_ims.npy "
            f"{dev.features.shape[1]}; --scorer {config.model.scorer} knows each by its place and needs as many in both"
        )
    _check_batches(config, train)
    return train, dev


def _check_batches(config: TrainConfig, train: PrecompSplit) -> None:
    """Refuse an epoch without batches, or with a batch that a BatchNorm has no statistics of."""
    captions, last = train.num_captions, train.num_captions % config.batch_size
    if config.drop_last and captions < config.batch_size:
        raise UserError(
            f"--drop-last with --batch-size {config.batch_size} leaves no batch of {captions} captions: "
            "make the batch smaller, or give --no-drop-last"
        )
    rows = 1 if sgraf(config.model) else train.features.shape[1] if config.model.region_encoder == "mlp" else None
    if last == 1 and rows == 1 and not config.drop_last:
        raise UserError(
            f"--batch-size {config.batch_size} leaves one of the {captions} captions to the last batch, and BatchNorm "
            "needs two: give --drop-last, or another batch size"
        )
