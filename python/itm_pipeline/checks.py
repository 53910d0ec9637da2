"""Refuse options that cannot work, or that would be ignored, before anything is read or written."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal

from itm_pipeline.config import SCORER_OPTIONS, ConstraintConfig, ModelConfig, TrainConfig
from itm_pipeline.errors import UserError


def check(config: TrainConfig) -> None:
    """Refuse values that cannot work.

    Raises
    ------
    UserError
        One sentence that names the option, what it must be and what was given.
    """
    # Configurations made in code bypass the parser, so the closed sets are checked here as well.
    for owner in (config, config.model, config.constraints):
        _check_choices(owner)
    whole = {
        "--embed-dim": (config.model.embed_dim, 1),
        "--word-dim": (config.model.word_dim, 1),
        "--sim-dim": (config.model.sim_dim, 1),
        "--graph-steps": (config.model.graph_steps, 1),
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
        **({} if config.model.temperature is None else {"--temperature": config.model.temperature}),
    }
    for option, number in positive.items():
        if not (math.isfinite(number) and number > 0):
            raise UserError(f"{option} must be a positive number, got {number}")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0):
        raise UserError(f"--weight-decay must be a number of at least 0, got {config.weight_decay}")
    if not 0 <= config.augment_captions <= 1:
        raise UserError(f"--augment-captions must be a share from 0 to 1, got {config.augment_captions}")
    _check_model(config.model)
    _check_constraints(config.constraints, config.model, config.epochs)


def _check_model(model: ModelConfig) -> None:
    for option, share in (("--word-dropout", model.word_dropout), ("--scorer-dropout", model.scorer_dropout)):
        if not 0 <= share < 1:
            raise UserError(f"{option} must be at least 0 and less than 1, got {share}")
    if model.region_encoder == "mlp" and model.embed_dim < 2:
        raise UserError(f"--embed-dim must be at least 2 with --region-encoder mlp, got {model.embed_dim}")
    _check_applies(model)
    if model.scorer != "regulated":
        return
    if model.direction == "both":
        raise UserError("--direction must be t2i or i2t with --scorer regulated, got both: train one model for each")
    if model.sim_dim % 2:
        raise UserError(f"--sim-dim must be even with --scorer regulated, got {model.sim_dim}")
    least = 0 if model.regulator == "rcr" else 1
    if model.regulator_steps < least:
        raise UserError(
            f"--regulator-steps must be at least {least} with --regulator {model.regulator}, "
            f"got {model.regulator_steps}"
        )


def _check_applies(model: ModelConfig) -> None:
    """An option that the scorer does not take must stand where it stands by default."""
    of_scorers = frozenset[str]().union(*SCORER_OPTIONS.values())
    taken = SCORER_OPTIONS[model.scorer] - ({"scorer_dropout"} if model.regulator == "rcr" else frozenset())
    for item in dataclasses.fields(model):
        value = getattr(model, item.name)
        if item.name in of_scorers - taken and value != item.default:
            option = "--" + item.name.replace("_", "-")
            scorer = f"--scorer {model.scorer}"
            if item.name in SCORER_OPTIONS[model.scorer]:
                scorer += f" and --regulator {model.regulator}"
            raise UserError(f"{option} {value} would do nothing with {scorer}: leave it out")


def _check_constraints(constraints: ConstraintConfig, model: ModelConfig, epochs: int) -> None:
    for name in ("ccr", "ccs", "ccr_margin", "ccs_margin", "constraint_warmup_epochs"):
        value = getattr(constraints, name)
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--{name.replace('_', '-')} must be a number of at least 0, got {value}")
    if constraints.active and constraints.constraint_warmup_epochs > epochs:
        raise UserError(
            f"--constraint-warmup-epochs must be within --epochs {epochs}, got {constraints.constraint_warmup_epochs}"
        )
    if constraints.ccs_swap == "content" and model.scorer == "regulated":
        raise UserError("--ccs-swap must be query with --scorer regulated, got content: a swap has no gate of its own")
    taken = {"ccr", "ccs"}
    taken |= {"ccr_margin"} if constraints.ccr else set()
    taken |= {"ccs_margin", "ccs_swap", "detach_swapped"} if constraints.ccs else set()
    taken |= {"constraint_reduction", "constraint_warmup_epochs"} if constraints.active else set()
    for item in dataclasses.fields(constraints):
        value = getattr(constraints, item.name)
        if item.name not in taken and value != item.default:
            option = "--" + item.name.replace("_", "-")
            needed = "--ccr" if item.name == "ccr_margin" else "--ccr or --ccs"
            needed = "--ccs" if item.name in ("ccs_margin", "ccs_swap", "detach_swapped") else needed
            raise UserError(f"{option} would do nothing without {needed}: leave it out")


def _check_choices(owner: TrainConfig | ModelConfig | ConstraintConfig) -> None:
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
