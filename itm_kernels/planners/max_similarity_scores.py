"""Plans of ``max_similarity_scores``; the backward is planned with the arg-max kept wherever the op keeps it."""

from __future__ import annotations

from typing import Any

import torch

from itm_kernels import native
from itm_kernels.layout import offsets_of
from itm_kernels.native.cuda.machine import Machine
from itm_kernels.ops.max_similarity_scores import arg_max_shape
from itm_kernels.ops.options import SimilarityOptions, check_similarity_options
from itm_kernels.planners import Plan, PlannedBatch, blocks_of, chosen_options

OP = "max_similarity_scores"


def options_of(direction: str, options: dict[str, Any]) -> SimilarityOptions:
    """The op's options, checked."""
    made = SimilarityOptions(direction, **chosen_options(OP, {"agg_func": "Sum", "lambda_lse": 10.0}, options))
    check_similarity_options("plan", made)
    return made


def on_cpu(batch: PlannedBatch, phases: list[str]) -> Plan:
    regions = torch.full((batch.images,), batch.regions, dtype=torch.int64)
    plans = {
        name: native.host().plan_max_similarity(
            offsets_of(regions).tolist(),
            offsets_of(batch.word_counts).tolist(),
            batch.width,
            element_bytes=2 if batch.dtype == torch.bfloat16 else 4,
            t2i=batch.options.t2i,
            backward=name == "backward",
            arg_max_kept=_keeps_arg_max(batch),
            copies_regions=batch.dtype == torch.float16,  # widened to float32 block by block
            threads=torch.get_num_threads(),
            workspace_bytes=batch.workspace_bytes,
        )
        for name in phases
    }
    return _plan(batch, plans, "cpu-blocked", {}, "library products in blocks, one C++ maximum a block forward")


def on_gpu(batch: PlannedBatch, phases: list[str], machine: Machine) -> Plan:
    plans = {
        name: native.host().plan_device_maxima(
            batch.images,
            batch.regions,
            offsets_of(batch.word_counts).tolist(),
            batch.width,
            element_bytes=batch.dtype.itemsize,
            t2i=batch.options.t2i,
            backward=name == "backward",
            arg_max_kept=_keeps_arg_max(batch),
            linear=batch.options.linear,
            copies_regions=False,
            copies_words=True,  # padded words, as models make them; packed ones are read where they are
            multiprocessors=machine.multiprocessors,
            workspace_bytes=batch.workspace_bytes,
        )
        for name in phases
    }
    tiles = {batch.options.direction: next(iter(plans.values())).launch.row_capacity}
    reason = f"{machine.arch}: library products in blocks, one kernel a block for maxima or for their gradient"
    return _plan(batch, plans, "cuda-tiles", tiles, reason)


def _keeps_arg_max(batch: PlannedBatch) -> bool:
    words = int(batch.word_counts.sum())
    shape = arg_max_shape(
        batch.images,
        batch.word_counts.numel(),
        batch.regions,
        words,
        batch.longest,
        batch.options.direction,
        batch.workspace_bytes,
    )
    return shape is not None


def _plan(batch: PlannedBatch, plans: dict[str, Any], route: str, tiles: dict[str, int], reason: str) -> Plan:
    if "backward" in plans and not _keeps_arg_max(batch):
        reason += "; the arg-max does not fit a byte an entry within workspace_bytes and is made again"
    return Plan(
        route=route,
        blocks=blocks_of(plans),
        tiles=tiles,
        launches=sum(p.launches for p in plans.values()),
        workspace_bytes=max(p.workspace_bytes for p in plans.values()),
        flops=sum(p.flops for p in plans.values()),
        useful_fraction=1.0,  # packed words: the products hold no padding
        reason=reason,
    )
