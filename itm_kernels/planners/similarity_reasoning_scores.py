"""Plans of ``similarity_reasoning_scores``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from itm_kernels.native.cpu import similarity_reasoning_scores as cpu
from itm_kernels.native.cuda import similarity_reasoning_scores as cuda
from itm_kernels.native.cuda.machine import Machine
from itm_kernels.native.devices import Kernels
from itm_kernels.ops.options import ReasoningOptions, check_reasoning_options
from itm_kernels.ops.parameters import REASONING_PARTS, ReasoningParameters
from itm_kernels.pair_blocks import similarity_reasoning_scores as blocks
from itm_kernels.planners import Plan, PlannedBatch, chosen_options, learned
from itm_kernels.planners.learned import ChunkCuts, Shapes

OP = "similarity_reasoning_scores"
_STEPS = 3


def options_of(direction: str, options: dict[str, Any]) -> ReasoningOptions:
    """The op's options, checked. Words attend to regions: there is no other direction."""
    if direction != "t2i":
        raise ValueError(f"plan: direction of {OP} is t2i, its words attend to regions; got {direction!r}")
    chosen = chosen_options(OP, {"reasoning": "SAF", "steps": None, "training": False, "eps": 1e-5}, options)
    if chosen["reasoning"] not in ("SAF", "SGR"):
        raise ValueError(f"plan: reasoning must be one of SAF, SGR, got {chosen['reasoning']!r}")
    if chosen["reasoning"] == "SAF" and chosen["steps"] is not None:
        raise ValueError(f"plan: steps are SGR's, reasoning 'SAF' has none; got {chosen['steps']}")
    if chosen["steps"] is None:
        chosen["steps"] = _STEPS if chosen["reasoning"] == "SGR" else 0
    made = ReasoningOptions(**chosen)
    check_reasoning_options("plan", made)
    return made


def on_cpu(batch: PlannedBatch, phases: list[str]) -> Plan:
    reason = "all stages of a chunk of pairs in the cache, library products around C++ steps"
    return learned.on_cpu(scorer_of(batch, None), batch, phases, reason)


def on_gpu(batch: PlannedBatch, phases: list[str], machine: Machine) -> Plan:
    return learned.on_gpu(scorer_of(batch, machine), batch, phases, machine)


def scorer_of(batch: PlannedBatch, machine: Machine | None) -> _Scorer:
    """What :mod:`learned` plans with; ``machine``: on a GPU."""
    return _Scorer(batch.options, batch.similarity_width, machine)


@dataclass(frozen=True)
class _Scorer:
    options: ReasoningOptions
    similarity_width: int
    machine: Machine | None

    @property
    def t2i(self) -> bool:
        return True

    def call(self, phase: str, shapes: Shapes, workspace_bytes: int) -> Callable[[], Any]:
        inputs, parameters = self._given(shapes)
        upstream = () if phase == "forward" else (shapes.zeros(shapes.images, shapes.captions),)
        statistics = None
        if self.options.reasoning == "SAF" and not (phase == "forward" and self.options.training):
            statistics = shapes.zeros(2, shapes.captions, dtype=torch.float32)
        if shapes.device == "cpu":
            arguments = (*upstream, cpu.Inputs(*inputs[:6]), parameters, statistics, self.options)
            return partial(getattr(cpu, phase), *arguments, workspace_bytes=workspace_bytes)
        assert self.machine is not None, "plans of a GPU are made for one"
        kernels = Kernels(torch.ops.itm_kernels_native, self.machine)
        arguments = (*upstream, blocks.Inputs(*inputs), parameters, statistics, self.options)
        return partial(getattr(cuda, phase), kernels, *arguments, workspace_bytes=workspace_bytes)

    def results(self, shapes: Shapes) -> set[tuple[int, ...]]:
        return {tuple(p.shape) for p in self._given(shapes)[1].flat() if p is not None}

    def on_cpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> ChunkCuts:
        inputs, parameters = self._given(shapes)
        backward = phase == "backward"
        batch = cpu.Batch(cpu.Inputs(*inputs[:6]), parameters, self.options, workspace_bytes, backward=backward)
        cuts = list(batch.blocks())
        keeps = [self.options.batch_statistics and batch.fit(*cut) for cut in cuts]
        kept = [batch.bytes_of_nodes(*cut) for cut, keeping in zip(cuts, keeps, strict=True) if keeping]
        return ChunkCuts(batch.chunks, cuts, keeps, max(kept, default=0))

    def keeps_on_gpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> bool:
        inputs, parameters = self._given(shapes)
        backward = phase == "backward"
        given = blocks.Inputs(*inputs), parameters, self.options, workspace_bytes
        return blocks.Batch(None, *given, backward=backward).keeps

    def _given(self, shapes: Shapes) -> tuple[tuple[Any, ...], ReasoningParameters]:
        regions, words, counts, offsets = shapes.sides()
        wholes = shapes.zeros(shapes.images, shapes.width), shapes.zeros(shapes.captions, shapes.width)
        saf = self.options.reasoning == "SAF"
        steps = (1, 1, int(saf), 0 if saf else self.options.steps, 1)
        made = learned.parameters(REASONING_PARTS, steps, {"S": self.similarity_width}, shapes)
        return (regions, words, counts, None, *wholes, offsets), ReasoningParameters.of(made)
