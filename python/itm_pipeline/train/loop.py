"""The training loop: hinge loss, AdamW, evaluation after every epoch, and a state that can stop anywhere."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from itm_kernels import triplet_loss
from itm_pipeline.checks import check
from itm_pipeline.config import TrainConfig
from itm_pipeline.data import Batch, CaptionAugmentation, CaptionSampler
from itm_pipeline.environment import environment
from itm_pipeline.errors import UserError
from itm_pipeline.evaluate import score_matrix
from itm_pipeline.metrics import retrieval
from itm_pipeline.runs import checkpoint as files
from itm_pipeline.runs.folder import build_model, create_run, open_run
from itm_pipeline.train.collapse import CollapseDetector
from itm_pipeline.train.constraints import Constraints
from itm_pipeline.train.display import Display
from itm_pipeline.train.feed import batches
from itm_pipeline.train.log import RunLog
from itm_pipeline.train.progress import Progress, Window, as_values
from itm_pipeline.train.schedule import hardest_negatives, learning_rate
from itm_pipeline.train.session import Session, new_session, old_session
from itm_pipeline.train.signals import Stopped, StopRequest


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run: Path
    epochs: int
    steps: int
    best_rsum: float
    """Best rsum on dev."""
    best_epoch: int
    """Its epoch, counted from 1; `best.safetensors` holds its weights."""


class Interrupted(Exception):
    """Training was asked to stop and has saved its state.

    Attributes
    ----------
    run
        Run folder to resume.
    number
        The signal.
    """

    def __init__(self, run: Path, step: int, number: int) -> None:
        super().__init__(f"saved at step {step}; go on with: itm train --resume {run}")
        self.run = run
        self.number = number


def train(config: TrainConfig) -> TrainResult:
    """Train a model, or go on with a run where `config.resume` names one.

    Parameters
    ----------
    config
        All options; `itm_pipeline.config.from_preset` makes one.

    Returns
    -------
    TrainResult

    Raises
    ------
    UserError
        Options or data that cannot work (nothing is written then), or a loss that is no number any more.
    Interrupted
        SIGINT or SIGTERM came; the state is saved.
    """
    check(config)
    with environment(config) as device:
        session = new_session(config) if config.resume is None else old_session(config)
        trainer = Trainer(session, device)
        if config.resume is None:
            trainer.create()
        else:
            trainer.restore()
        return trainer.run()


def resume(run: Path, **changes: Any) -> TrainResult:
    """Go on with a run; `changes` are fields of `TrainConfig` among `itm_pipeline.config.RESUMABLE`."""
    return train(dataclasses.replace(open_run(run).config, resume=run, **changes))


class Trainer:
    """A run in progress.

    Parameters
    ----------
    session
        Run folder and data.
    device
        Where the model lives.
    """

    def __init__(self, session: Session, device: torch.device) -> None:
        self.session = session
        self.folder = session.folder
        self.config = session.folder.config
        self.device = device
        self.model = build_model(self.config, session.folder.facts).to(device)
        # Without weight decay AdamW is Adam, to the bit.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.sampler = CaptionSampler(
            session.train.num_captions, self.config.batch_size, self.config.seed, self.config.drop_last
        )
        self.augmentation = (
            CaptionAugmentation(session.vocabulary, self.config.augment_captions, self.config.seed)
            if self.config.augment_captions
            else None
        )
        self.constraints = (
            Constraints(self.config, session.vocabulary, device) if self.config.constraints.active else None
        )
        self.collapse = CollapseDetector(self.config.margin)
        self.progress = Progress()
        self.recent = Window()
        """Since the last line of the log."""
        self.whole = Window()
        """Since the epoch began, up to the last line of the log."""
        self.log_bytes = 0
        # Read on log lines only: reading a loss waits for the GPU.
        self.unread = torch.zeros(2, dtype=torch.float64, device=device)  # hinge loss, constraints

    def create(self) -> None:
        """Make the run folder, with a checkpoint of the first weights."""

        def fill(path: Path) -> None:
            (path / "log.jsonl").touch()
            self._write("last", path, log_bytes=0)

        create_run(self.folder, self.session.vocabulary, fill)

    def restore(self) -> None:
        """Take up the last checkpoint."""
        path = self.folder.checkpoint_path("last")
        saved = files.read_checkpoint(path)
        files.load_model_tensors(self.model, saved, path)
        files.load_optimizer_tensors(self.model, self.optimizer, saved)
        files.load_generators(saved, self.device)
        values = saved.values
        self.sampler.load_state_dict(values["sampler"])
        self.collapse.load_state_dict(values["collapse"])
        self.progress = Progress(**values["progress"])
        self.recent, self.whole = Window(**values["recent"]), Window(**values["whole"])
        self.log_bytes = values["log_bytes"]
        self.folder.write_config()
        if self.config.deterministic and values["threads"] != torch.get_num_threads():
            warnings.warn(
                f"the run had {values['threads']} CPU threads, now there are {torch.get_num_threads()}: "
                f"for the same bits give --threads {values['threads']}",
                stacklevel=2,
            )

    def run(self) -> TrainResult:
        """Train to the last epoch."""
        with (
            RunLog(
                self.folder.path, size=self.log_bytes, step=self.progress.step, tensorboard=self.config.tensorboard
            ) as self.log,
            Display(self.config.epochs, len(self.sampler)) as self.display,
            StopRequest() as self.stop,
        ):
            self.display.rsum = self.progress.last_rsum
            if self.progress.step:
                self.log.write("resume", step=self.progress.step)
            try:
                while self.progress.epoch < self.config.epochs:
                    self._train_epoch()
                    self._end_epoch()
                    self.stop.check()
            except Stopped as signal:
                self._save()
                raise Interrupted(self.folder.path, self.progress.step, signal.number) from signal
        p = self.progress
        assert p.best_rsum is not None  # every epoch ends with an evaluation, and there is at least one
        assert p.best_epoch is not None
        return TrainResult(self.folder.path, p.epoch, p.step, p.best_rsum, p.best_epoch)

    def _train_epoch(self) -> None:
        p = self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, p.epoch)
        hardest = hardest_negatives(self.config, p.epoch)
        self.model.train()
        self.display.begin_epoch(p.epoch, p.batch)
        began = time.perf_counter()
        feed = batches(
            self.session.train,
            self.session.vocabulary,
            self.sampler,
            p.epoch,
            p.batch,
            augmentation=self.augmentation,
            # SAF's running statistics take in one caption after the other, and the last weigh most; as published, the
            # last are the shortest.
            longest_first=self.config.model.scorer == "attention_filtration",
        )
        for batch in feed:
            self._step(batch, hardest)
            p.batch += 1
            p.step += 1
            now = time.perf_counter()
            p.seconds += now - began
            self.recent.add(Window(captions=len(batch), steps=1, seconds=now - began))
            began = now
            self.display.step()
            if p.step % self.config.log_every == 0 or p.batch == len(self.sampler):
                self._log_recent(hardest)
            if self.config.checkpoint_every and p.step % self.config.checkpoint_every == 0:
                self._save()
            self.stop.check()
        self.display.end_epoch()

    def _step(self, batch: Batch, hardest: bool) -> None:
        features = batch.features.to(self.device)
        tokens = batch.tokens.to(self.device)
        groups = batch.image_index.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            regions = self.model.encode_images(features)
            words = self.model.encode_captions(tokens, batch.word_counts)
            scores = self.model.score(regions, words, batch.word_counts)
        loss = triplet_loss(
            scores, margin=self.config.margin, hardest=hardest, image_groups=groups, caption_groups=groups
        )
        of_constraints = torch.zeros((), device=self.device)
        if self.constraints is not None and self.constraints.act(self.progress.epoch):
            of_constraints = self.constraints.loss(self.model.sim_enc, regions, words, batch, self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + of_constraints)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        # A gradient that is no number ruins the weights one step before the loss shows it.
        self.unread += torch.where(norm.isfinite(), torch.stack([loss.detach(), of_constraints.detach()]), torch.nan)

    def _read_loss(self) -> None:
        """Bring the losses of the last steps to the host, and stop where they are no numbers."""
        loss, of_constraints = self.unread.tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} by step {self.progress.step}: the features may be too large or --lr "
                f"{self.config.lr:g} too high; {self.folder.checkpoint_path('last')} still holds the weights of before"
            )
        self.recent.loss += loss
        self.recent.constraints += of_constraints
        self.unread.zero_()

    def _log_recent(self, hardest: bool) -> None:
        self._read_loss()
        p, recent = self.progress, self.recent
        self.log.write(
            "train",
            step=p.step,
            epoch=p.epoch + 1,
            loss=recent.mean_loss,
            loss_per_caption=recent.loss_per_caption,
            lr=learning_rate(self.config, p.epoch),
            seconds=p.seconds,
            images_per_s=recent.images_per_s,
            **({} if self.constraints is None else {"constraints": recent.mean_constraints}),
        )
        self.display.numbers(recent.mean_loss, recent.images_per_s)
        warning = self.collapse.update(recent.loss_per_caption, recent.steps, hardest=hardest)
        if warning is not None:
            self.log.write("collapse", step=p.step, message=warning)
            self.display.warn(warning)
        self.whole.add(recent)
        self.recent = Window()

    def _end_epoch(self) -> None:
        """Evaluate on dev and save. Until this is done the epoch counts as unfinished."""
        p = self.progress
        began = time.perf_counter()
        scores = score_matrix(
            self.model,
            self.session.dev,
            self.session.vocabulary,
            block_bytes=self.config.eval_block_mib * 2**20,
            device=self.device,
            progress=True,
            on_block=self.stop.check,
        )
        metrics = retrieval(scores, self.session.dev.captions_per_image)
        p.seconds += time.perf_counter() - began
        self.log.write("eval", step=p.step, epoch=p.epoch + 1, **metrics)
        self.display.say(
            f"epoch {p.epoch + 1}/{self.config.epochs}  loss {self.whole.mean_loss:.3f}  "
            f"dev rsum {metrics['rsum']:.1f}  R@1 {metrics['i2t_r1']:.1f} / {metrics['t2i_r1']:.1f}  "
            f"{self.whole.images_per_s:.0f} images/s"
        )
        self.display.rsum = p.last_rsum = metrics["rsum"]
        better = p.best_rsum is None or metrics["rsum"] > p.best_rsum
        p.epoch += 1
        p.batch = 0
        self.recent, self.whole = Window(), Window()
        if better:
            p.best_rsum, p.best_epoch = metrics["rsum"], p.epoch
            values = {"epoch": p.epoch, "step": p.step, "metrics": metrics}
            files.write_checkpoint(self.folder.checkpoint_path("best"), files.model_tensors(self.model), values)
        self._save()

    def _save(self) -> None:
        self._read_loss()
        self._write("last", self.folder.path, log_bytes=self.log.size())

    def _write(self, which: str, folder: Path, *, log_bytes: int) -> None:
        generators, numpy_rest = files.generator_tensors(self.device)
        files.write_checkpoint(
            folder / f"{which}.safetensors",
            {
                **files.model_tensors(self.model),
                **files.optimizer_tensors(self.model, self.optimizer),
                **generators,
            },
            {
                "progress": as_values(self.progress),
                "recent": as_values(self.recent),
                "whole": as_values(self.whole),
                # The feed runs one batch ahead of the steps, so the sampler's own position is not the run's.
                "sampler": {
                    **self.sampler.state_dict(),
                    "epoch": self.progress.epoch,
                    "next_batch": self.progress.batch,
                },
                "collapse": self.collapse.state_dict(),
                "numpy_generator": numpy_rest,
                "threads": torch.get_num_threads(),
                "log_bytes": log_bytes,
            },
        )
