"""Golden vectors of the published RCAR and SGRAF, as batches, parameters and options of our ops.

Gradients go by the names of the published state dicts. SGRAF's global vectors come from self-attention modules that
belong to no op; they are written out here as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from golden import FOLDER, golden_batch, published_options
from helpers import Batch, relative_error
from itm_kernels.ops.options import ReasoningOptions, RegulatedOptions
from itm_kernels.ops.parameters import (
    REASONING_PARTS,
    REGULATED_PARTS,
    SHAPES,
    ReasoningParameters,
    RegulatedParameters,
)

REGULATED_CASES = sorted(path.stem for path in FOLDER.glob("rcar_*.npz"))
REASONING_CASES = sorted(path.stem for path in FOLDER.glob("sgraf_*.npz"))

MOMENTUM = 0.1
"""Of the published batch normalisations."""
EPS_OF_NORM = 1e-5
"""Likewise."""
REGULATORS = {"only_rar": "rar", "only_rcr": "rcr", "coop_rcar": "rcar"}
"""Ours by the published names; the number of steps is the option named after them, ``rar_step`` and so on."""

# Published layers in the order of our records: each gives a weight and a bias, {} is the step.
REGULATED_LAYERS = {
    "alignment": ("alv_modules.{}.sim_transform_w",),
    "correspondence": (
        "rcr_modules.{}.rcr_matrix_w.0",
        "rcr_modules.{}.rcr_matrix_w.2",
        "rcr_modules.{}.rcr_smooth_w.0",
        "rcr_modules.{}.rcr_smooth_w.2",
    ),
    "aggregation": ("rar_modules.{}.rar_k_w.0", "rar_modules.{}.rar_q_w.0", "rar_modules.{}.rar_v_w.0"),
    "score": ("sim_eval_w",),
}
REASONING_LAYERS = {
    "local_alignment": ("sim_tranloc_w",),
    "global_alignment": ("sim_tranglo_w",),
    "filtration": ("SAF_module.attn_sim_w", "SAF_module.bn"),
    "graph": ("SGR_module.{}.graph_query_w", "SGR_module.{}.graph_key_w", "SGR_module.{}.sim_graph_w"),
    "score": ("sim_eval_w",),
}

# Biases of what a softmax sees, or a batch normalisation that takes the mean off: their gradient is rounding noise.
BEFORE_SOFTMAX = ("rar_v_w.0.bias", "embedding_common.0.bias", "graph_key_w.bias")
BEFORE_NORM = ("SAF_module.attn_sim_w.bias", "v_global_w.embedding_global.0.bias")


@dataclass(frozen=True)
class Slot:
    """Where one tensor of our records is in a published state dict."""

    names: list[str]
    """Published keys, one a step."""
    letters: list[str]
    """Axes of our tensor, as in ``SHAPES``."""

    @property
    def stacked(self) -> bool:
        return self.letters[0] == "steps"

    def ours(self, state: Mapping[str, Tensor]) -> Tensor:
        """Published tensors as ours: a layer with one output has a matrix of one row where we have a vector."""
        axes = len(self.letters) - self.stacked
        tensors = [state[name] if state[name].dim() == axes else state[name].squeeze(0) for name in self.names]
        return torch.stack(tensors) if self.stacked else tensors[0]

    def published(self, tensor: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse, for a parameter or its gradient."""
        steps = tensor.unbind() if self.stacked else [tensor]
        return {name: one.reshape(state[name].shape) for name, one in zip(self.names, steps, strict=True)}


@dataclass(frozen=True)
class GoldenModel:
    """A published run: what went in, what came out."""

    batch: Batch
    options: Any
    """``RegulatedOptions`` or ``ReasoningOptions``."""
    parameters: Any
    """``RegulatedParameters`` or ``ReasoningParameters``."""
    slots: list[Slot | None]
    """Of each tensor of ``parameters.flat()``."""
    state: dict[str, Tensor]
    """The published state dict before the step."""
    after: dict[str, Tensor]
    """Buffers after it, where they change."""
    scores: Tensor
    gradients: dict[str, Tensor]
    """Of ``regions``, ``words`` and every published parameter."""

    def published(self, parameters: Any) -> dict[str, Tensor]:
        """A record like ``parameters``, or of their gradients, by the published names."""
        found: dict[str, Tensor] = {}
        for slot, tensor in zip(self.slots, parameters.flat(), strict=True):
            assert (slot is None) == (tensor is None)
            if slot is not None:
                found |= slot.published(tensor, self.state)
        return found


def golden_model(case: str, dtype: torch.dtype = torch.float64) -> GoldenModel:
    """Any case of RCAR or SGRAF. Scores are float64, gradients and buffers as stored (float32)."""
    published = published_options(case)
    regulated = published["model"] == "rcar"
    options = regulated_options(published) if regulated else reasoning_options(published)
    with np.load(FOLDER / f"{case}.npz") as data:
        state, after, gradients = (
            {name.removeprefix(part): torch.from_numpy(data[name]) for name in data.files if name.startswith(part)}
            for part in ("param/", "after/", "grad/")
        )
        gradients["regions"], gradients["words"] = (torch.from_numpy(data[f"grad_{x}"]) for x in ("images", "captions"))
        scores = torch.from_numpy(data["scores"])
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if regulated:
        slots = _slots(REGULATED_LAYERS, REGULATED_PARTS, regulated_steps(options))
    else:
        slots = _slots(REASONING_LAYERS, REASONING_PARTS, reasoning_steps(options))
    record = RegulatedParameters if regulated else ReasoningParameters
    parameters = record.of([None if slot is None else slot.ours(state) for slot in slots])
    return GoldenModel(golden_batch(dtype), options, parameters, slots, state, after, scores, gradients)


def regulated_options(published: Mapping[str, Any]) -> RegulatedOptions:
    """Options of ``regulated_scores`` by those of the published run, dropout off."""
    name, direction = published["self_regulator"], published["attn_type"]
    return RegulatedOptions(
        direction=direction,
        regulator=REGULATORS[name],
        steps=published[f"{name.split('_')[1]}_step"],
        temperature=published[f"{direction}_smooth"],
        dropout=0.0,
        seed=0,
        image_offset=0,
        caption_offset=0,
    )


def regulated_steps(options: RegulatedOptions) -> dict[str, int]:
    """How many steps each stage has; a score is one."""
    return {
        "alignment": options.alignments,
        "correspondence": options.corrections,
        "aggregation": options.aggregations,
        "score": int(options.regulator != "rcr"),
    }


def reasoning_options(published: Mapping[str, Any]) -> ReasoningOptions:
    """Options of ``similarity_reasoning_scores`` by those of the published run."""
    return ReasoningOptions(
        reasoning=published["module_name"], steps=published["sgr_step"], training=published["train"], eps=EPS_OF_NORM
    )


def reasoning_steps(options: ReasoningOptions) -> dict[str, int]:
    """Likewise."""
    saf = options.reasoning == "SAF"
    return {
        "local_alignment": 1,
        "global_alignment": 1,
        "filtration": int(saf),
        "graph": 0 if saf else options.steps,
        "score": 1,
    }


def _slots(
    layers: Mapping[str, tuple[str, ...]], parts: tuple[type, ...], steps: Mapping[str, int]
) -> list[Slot | None]:
    slots: list[Slot | None] = []
    for (stage, names), part in zip(layers.items(), parts, strict=True):
        keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
        for key, letters in zip(keys, SHAPES[part], strict=True):
            found = [key.format(step) for step in range(steps[stage])]
            slots.append(Slot(found, letters.split()) if found else None)
    return slots


def zero_by_symmetry(name: str, training: bool) -> bool:
    """Whether a published gradient is rounding noise around zero."""
    return name.endswith(BEFORE_SOFTMAX) or (training and name.endswith(BEFORE_NORM))


def assert_golden_gradients(
    got: Mapping[str, Tensor], model: GoldenModel, *, relative: float = 1e-6, absolute: float = 1e-12
) -> None:
    """Every gradient of a published run is there and met: in the Euclidean norm, or absolutely where it is zero."""
    assert got.keys() == model.gradients.keys()
    training = getattr(model.options, "training", False)
    for name, true in model.gradients.items():
        mine = got[name].cpu().double()
        assert mine.shape == true.shape, name
        if zero_by_symmetry(name, training) or not true.any():
            error, bound = float(mine.abs().max()), absolute
        else:
            error, bound = relative_error(mine, true), relative
        assert error <= bound, f"gradient of {name}: error {error:.2e} above {bound:.0e}"


def image_vectors(regions: Tensor, state: Mapping[str, Tensor], *, training: bool) -> Tensor:  # [I, R, D] -> [I, D]
    """Published ``VisualSA`` without dropout; in training it moves the running buffers of ``state``."""
    local = _normalised(_linear(regions, state, "v_global_w.embedding_local.0"), state, "local", training)  # over slots
    mean = _normalised(_linear(regions.mean(1), state, "v_global_w.embedding_global.0"), state, "global", training)
    common = _linear(local.tanh() * mean.tanh().unsqueeze(1), state, "v_global_w.embedding_common.0")  # [I, R, 1]
    return _unit((torch.softmax(common, dim=1) * regions).sum(1))


def caption_vectors(
    words: Tensor, word_counts: list[int], state: Mapping[str, Tensor]
) -> Tensor:  # [C, W, D] -> [C, D]
    """Published ``TextSA`` without dropout: each caption by itself."""
    vectors = []
    for padded, n in zip(words, word_counts, strict=True):
        caption = padded[:n]
        local = _linear(caption, state, "t_global_w.embedding_local.0").tanh()
        mean = _linear(caption.mean(0), state, "t_global_w.embedding_global.0").tanh()
        common = _linear(local * mean, state, "t_global_w.embedding_common.0")  # [n, 1]
        vectors.append(_unit((torch.softmax(common, dim=0) * caption).sum(0)))
    return torch.stack(vectors)


def _linear(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _normalised(x: Tensor, state: Mapping[str, Tensor], which: str, training: bool) -> Tensor:
    mean, variance, weight, bias = (
        state[f"v_global_w.embedding_{which}.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, variance, weight, bias, training, MOMENTUM, EPS_OF_NORM)


def _unit(x: Tensor) -> Tensor:  # [B, D] -> [B, D]
    return x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-8)
