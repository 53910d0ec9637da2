"""Plans of ``regulated_scores``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from itm_kernels.native.cpu import regulated_scores as cpu
from itm_kernels.native.cuda import regulated_scores as cuda
from itm_kernels.native.cuda.machine import Machine
from itm_kernels.native.devices import Kernels
from itm_kernels.ops.options import RegulatedOptions, check_regulated_options
from itm_kernels.ops.parameters import REGULATED_PARTS, RegulatedParameters
from itm_kernels.planners import Plan, PlannedBatch, chosen_options, learned
from itm_kernels.planners.learned import ChunkCuts, Shapes

OP = "regulated_scores"


def options_of(direction: str, options: dict[str, Any]) -> RegulatedOptions:
    """The op's options, checked."""
    defaults = {
        "regulator": "rcar",
        "steps": 2,
        "temperature": 10.0,
        "dropout": 0.0,
        "seed": 0,
        "image_offset": 0,
        "caption_offset": 0,
    }
    made = RegulatedOptions(direction, **chosen_options(OP, defaults, options))
    check_regulated_options("plan", made)
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
    options: RegulatedOptions
    similarity_width: int
    machine: Machine | None

    @property
    def t2i(self) -> bool:
        return self.options.t2i

    def call(self, phase: str, shapes: Shapes, workspace_bytes: int) -> Callable[[], Any]:
        regions, words, counts, offsets = shapes.sides()
        upstream = () if phase == "forward" else (shapes.zeros(shapes.images, shapes.captions),)
        arguments = (*upstream, regions, words, counts, None, self._parameters(shapes), self.options)
        if shapes.device == "cpu":
            of_phase = getattr(cpu, phase)
            return partial(of_phase, *arguments, workspace_bytes=workspace_bytes)
        assert self.machine is not None, "plans of a GPU are made for one"
        kernels = Kernels(torch.ops.itm_kernels_native, self.machine)
        of_phase = getattr(cuda, phase)
        return partial(of_phase, kernels, *arguments, workspace_bytes=workspace_bytes, word_offsets=offsets)

    def results(self, shapes: Shapes) -> set[tuple[int, ...]]:
        return {tuple(p.shape) for p in self._parameters(shapes).flat() if p is not None}

    def on_cpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> ChunkCuts:
        regions, words, counts, _ = shapes.sides()
        chunks = cpu.Batch(
            regions, words, counts, None, self._parameters(shapes), self.options, workspace_bytes,
            backward=phase == "backward",
        ).chunks  # fmt: skip
        cuts = list(chunks.query_blocks())
        return ChunkCuts(chunks, cuts, [False] * len(cuts), 0)

    def keeps_on_gpu(self, phase: str, shapes: Shapes, workspace_bytes: int) -> bool:
        return False

    def _parameters(self, shapes: Shapes) -> RegulatedParameters:
        options = self.options
        counts = (options.alignments, options.corrections, options.aggregations, int(options.regulator != "rcr"))
        s = self.similarity_width
        sizes = {"S": s, "H": 2 * s, "U": max(s // 2, 1)}  # as published
        return RegulatedParameters.of(learned.parameters(REGULATED_PARTS, counts, sizes, shapes))
