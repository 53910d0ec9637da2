"""Open what a run needs: data, vocabulary, and the run folder, new or old. All checks of the input happen here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from itm_pipeline.config import RESUMABLE, TrainConfig, flat
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
    facts = Facts(
        feature_dim=int(train.features.shape[2]),
        vocab_size=len(vocabulary),
        vocabulary=vocabulary.fingerprint(),
        train=fingerprint(train),
        dev=fingerprint(dev),
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
    return train, dev
