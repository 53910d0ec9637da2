"""The run folder: `config.json`, `vocab.json`, `log.jsonl`, `last.safetensors`, `best.safetensors` and results.

A run folder appears whole: it is filled under a temporary name and renamed, its first checkpoint included.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from itm_pipeline.config import TrainConfig, from_json, to_json
from itm_pipeline.data import Vocabulary
from itm_pipeline.errors import UserError
from itm_pipeline.models import MatchingModel
from itm_pipeline.runs.checkpoint import Checkpoint, load_model_tensors, read_checkpoint
from itm_pipeline.runs.files import sync, write_json

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Facts:
    """What a run's data fixed, beside its options."""

    feature_dim: int
    vocab_size: int
    vocabulary: str
    """Fingerprint of the vocabulary."""
    train: str
    """Fingerprint of the training split."""
    dev: str
    """Fingerprint of the validation split."""
    num_regions: int = 36
    """Regions of an image. The first runs did not note it; no model of theirs asks."""


@dataclass(frozen=True)
class RunFolder:
    """A run on the disk."""

    path: Path
    config: TrainConfig
    facts: Facts

    def checkpoint_path(self, which: Which) -> Path:
        """Where a checkpoint is."""
        return self.path / f"{which}.safetensors"

    def vocabulary(self) -> Vocabulary:
        """The vocabulary that the run was trained with.

        Raises
        ------
        UserError
            `vocab.json` is missing, or it is not the one any more.
        """
        path = self.path / "vocab.json"
        vocabulary = Vocabulary.load(path)
        if vocabulary.fingerprint() != self.facts.vocabulary:
            raise UserError(f"{path} is not the vocabulary of this run: put back the file that training wrote")
        return vocabulary

    def build_model(self) -> MatchingModel:
        """The run's model with fresh weights."""
        return build_model(self.config, self.facts)

    def load_model(self, which: Which) -> tuple[MatchingModel, Checkpoint]:
        """The run's model with the weights of a checkpoint, on the host, and that checkpoint."""
        path = self.checkpoint_path(which)
        checkpoint = read_checkpoint(path)
        model = self.build_model()
        load_model_tensors(model, checkpoint, path)
        return model, checkpoint

    def write_config(self) -> None:
        """Write `config.json`."""
        write_json(self.path / "config.json", {"options": to_json(self.config), "facts": to_json(self.facts)})


def build_model(config: TrainConfig, facts: Facts) -> MatchingModel:
    """The model of a configuration, for data of these widths."""
    return MatchingModel(
        config.model,
        facts.feature_dim,
        facts.vocab_size,
        num_regions=facts.num_regions,
        workspace_bytes=config.workspace_mib * 2**20,
        backend=config.backend,
    )


def free_name(config: TrainConfig) -> Path:
    """The folder that a new run gets.

    Raises
    ------
    UserError
        `--run` names a folder that holds something.
    """
    if config.run is not None:
        refuse_taken(config.run)
        return config.run
    number, path = 1, Path("runs", config.preset)
    while path.exists():
        number += 1
        path = Path("runs", f"{config.preset}-{number}")
    return path


def refuse_taken(path: Path) -> None:
    """Refuse a folder that holds something, or a file, as the place of a new run."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        hint = f"go on with it by --resume {path}, or " if (path / "config.json").exists() else ""
        raise UserError(f"{path} exists already and is not overwritten: {hint}name another folder with --run")


def create_run(folder: RunFolder, vocabulary: Vocabulary, fill: Callable[[Path], None]) -> None:
    """Make a run folder in one step.

    Parameters
    ----------
    folder
        Its path and contents.
    vocabulary
        Saved as `vocab.json`.
    fill
        Writes the first log and checkpoint into the folder it is given, which is renamed afterwards.
    """
    final = folder.path
    temporary = final.with_name(f".{final.name}.tmp")
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed in this moment
    temporary.mkdir()
    try:
        RunFolder(temporary, folder.config, folder.facts).write_config()
        vocabulary.save(temporary / "vocab.json")
        fill(temporary)
        refuse_taken(final)
        temporary.replace(final)
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_run(path: Path) -> RunFolder:
    """Read a run's configuration.

    Raises
    ------
    UserError
        The folder is missing, is not a run, or was written by a version with other options.
    """
    file = path / "config.json"
    if not file.is_file():
        reason = "is not a run folder: it has no config.json" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {reason}; give the folder that `itm train` printed")
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config, facts = from_json(TrainConfig, values["options"]), from_json(Facts, values["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); copy it again from where the run was made") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return RunFolder(path, config, facts)
