"""A checkpoint is one safetensors file: tensors as they are, everything else as JSON in its header.

One file, renamed into place, means that a kill at any moment leaves either the old checkpoint or the new one, never
tensors of one beside numbers of the other.

Names of the tensors: `model.<parameter>`; `optimizer.<exp_avg|exp_avg_sq|step>.<parameter>`; `generator.torch`,
`generator.cuda` and `generator.numpy` (uint8 and uint32 states).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from itm_pipeline.errors import UserError
from itm_pipeline.runs.files import replace_file

FORMAT = 1
HEADER = "itm_pipeline"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix, without it."""
        return {name[len(prefix) + 1 :]: value for name, value in self.tensors.items() if name.startswith(prefix + ".")}


def write_checkpoint(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` in one step.

    Parameters
    ----------
    path
        Ends in .safetensors.
    tensors
        Any device; stored from the host.
    values
        JSON values.
    """
    header = {HEADER: json.dumps({"format": FORMAT, **values})}
    stored = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    replace_file(path, lambda temporary: save_file(stored, temporary, metadata=header))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the host.

    Raises
    ------
    UserError
        There is no such file, it is damaged, or another program wrote it.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: the folder is not a run, or its training has not begun")
    try:
        with safe_open(path, framework="pt", device="cpu") as source:
            header = (source.metadata() or {}).get(HEADER)
            # Cloned, because tensors mapped from the file are aligned as the file happens to be; products of
            # differently aligned operands may differ in their last bit.
            tensors = {name: source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as a checkpoint ({error}); copy it again or use another one") from error
    if header is None:
        raise UserError(f"{path} is not a checkpoint of this program: its header lacks the entry {HEADER!r}")
    values = json.loads(header)
    if values["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {values['format']}, this version reads format {FORMAT}")
    return Checkpoint(tensors, values)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model under their names in a checkpoint."""
    return {f"model.{name}": value for name, value in model.state_dict().items()}


def load_model_tensors(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Copy a checkpoint's weights into a model of the same shape.

    Raises
    ------
    UserError
        Names or shapes differ.
    """
    try:
        model.load_state_dict(checkpoint.part("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} holds the weights of another model: {reason}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments and step counts of Adam by parameter name; empty before the first step."""
    return {
        f"optimizer.{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """The inverse of `optimizer_tensors`; hyper-parameters are the configuration's."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.part("optimizer").items():
        kind, name = key.split(".", 1)
        states.setdefault(name, {})[kind] = value
    order = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    saved = optimizer.state_dict()
    saved["state"] = {order[name]: state for name, state in states.items()}
    optimizer.load_state_dict(saved)


def generator_tensors(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of the global generators of torch and NumPy: tensors, and what of them is no tensor.

    Of GPUs, the generator of `device` alone: asking for the others would set them up.
    """
    tensors = {"generator.torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(device)
    # The legacy global generator is the one that code which was not told of any other draws from.
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    tensors["generator.numpy"] = torch.from_numpy(numpy_state["state"]["key"].copy())
    rest = {
        "position": int(numpy_state["state"]["pos"]),
        "has_gauss": int(numpy_state["has_gauss"]),
        "gauss": float(numpy_state["gauss"]),
    }
    return tensors, rest


def load_generators(checkpoint: Checkpoint, device: torch.device) -> None:
    """The inverse of `generator_tensors`. A run that moved between CPU and GPU keeps the fresh state there."""
    torch.set_rng_state(checkpoint.tensors["generator.torch"])
    if device.type == "cuda" and "generator.cuda" in checkpoint.tensors:
        torch.cuda.set_rng_state(checkpoint.tensors["generator.cuda"], device)
    rest = checkpoint.values["numpy_generator"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": checkpoint.tensors["generator.numpy"].numpy(), "pos": rest["position"]},
            "has_gauss": rest["has_gauss"],
            "gauss": rest["gauss"],
        }
    )
