"""Plans of ``cross_attention_scores``."""

from __future__ import annotations

from typing import Any

import torch

from itm_kernels import native
from itm_kernels.layout import offsets_of
from itm_kernels.native.cuda import fused_scores
from itm_kernels.native.cuda.machine import Machine
from itm_kernels.ops.options import ScoreOptions, check_options
from itm_kernels.planners import Plan, PlannedBatch, blocks_of, chosen_options

OP = "cross_attention_scores"


def options_of(direction: str, options: dict[str, Any]) -> ScoreOptions:
    """The op's options, checked; a float where a number is expected."""
    defaults: dict[str, Any] = {
        "raw_feature_norm": "clipped_l2norm",
        "lambda_softmax": 9.0,
        "agg_func": "LogSumExp",
        "lambda_lse": 6.0,
        "focal": None,
        "peak_weight": 0.0,
    }
    chosen = chosen_options(OP, defaults, options)
    chosen["focal"] = chosen["focal"] or "none"
    made = ScoreOptions(direction=direction, **chosen)
    check_options("plan", made)
    return made


def on_cpu(batch: PlannedBatch, phases: list[str]) -> Plan:
    regions = torch.full((batch.images,), batch.regions, dtype=torch.int64)
    options = batch.options
    plans = {
        name: native.host().plan_scores(
            offsets_of(regions).tolist(),
            offsets_of(batch.word_counts).tolist(),
            batch.width,
            element_bytes=2 if batch.dtype == torch.bfloat16 else 4,
            t2i=options.t2i,
            i2t=options.i2t,
            backward=name == "backward",
            copies_regions=batch.dtype == torch.float16,  # widened to float32 block by block
            threads=torch.get_num_threads(),
            workspace_bytes=batch.workspace_bytes,
        )
        for name in phases
    }
    keys = {"t2i": batch.regions, "i2t": batch.longest}
    return Plan(
        route="cpu-blocked",
        blocks=blocks_of(plans),
        tiles={name: native.host().tile_width(keys[name]) for name in _directions(options)},
        launches=sum(p.launches for p in plans.values()),
        workspace_bytes=max(p.workspace_bytes for p in plans.values()),
        flops=sum(p.flops for p in plans.values()),
        useful_fraction=1.0,  # packed words: the products hold no padding
        reason="library products in blocks that stay in the cache, one C++ epilogue a block and direction",
    )


def on_gpu(batch: PlannedBatch, phases: list[str], machine: Machine) -> Plan:
    if "forward" in phases and fused_scores.asked_for():
        fused = _fused_forward(batch, machine)
        return _joined(fused, _tiles(batch, ["backward"], machine)) if "backward" in phases else fused
    return _tiles(batch, phases, machine)


def _fused_forward(batch: PlannedBatch, machine: Machine) -> Plan:
    reason = fused_scores.why_not(
        machine, batch.dtype, batch.options, regions=batch.regions, ragged=False, longest=batch.longest
    )
    if reason is not None:
        raise fused_scores.refuse(reason)
    made = native.host().plan_fused_scores(
        batch.images,
        offsets_of(batch.word_counts).tolist(),
        batch.width,
        copies_regions=False,
        copies_words=True,
        workspace_bytes=batch.workspace_bytes,
    )
    return Plan(
        route="cuda-fused",
        blocks=blocks_of({"forward": made}),
        tiles={"t2i": int(native.host().FusedSizes.words)},
        launches=made.launches,
        workspace_bytes=made.workspace_bytes,
        flops=made.flops,
        useful_fraction=made.useful_fraction,
        reason=f"{machine.arch}: product and epilogue in one kernel, {fused_scores.UNMEASURED}",
    )


def _joined(forward: Plan, backward: Plan) -> Plan:
    """One plan of two phases that take different routes."""
    return Plan(
        route=forward.route,
        blocks={**forward.blocks, **backward.blocks},
        tiles=backward.tiles,
        launches=forward.launches + backward.launches,
        workspace_bytes=max(forward.workspace_bytes, backward.workspace_bytes),
        flops=forward.flops + backward.flops,
        useful_fraction=min(forward.useful_fraction, backward.useful_fraction),
        reason=f"{forward.reason}; backward by {backward.route}, {backward.reason}",
    )


def _tiles(batch: PlannedBatch, phases: list[str], machine: Machine) -> Plan:
    options = batch.options
    plans = {
        name: native.host().plan_device_scores(
            batch.images,
            batch.regions,
            offsets_of(batch.word_counts).tolist(),
            batch.width,
            element_bytes=batch.dtype.itemsize,
            t2i=options.t2i,
            i2t=options.i2t,
            backward=name == "backward",
            copies_regions=False,
            copies_words=True,  # padded words, as models make them; packed ones are read where they are
            softmax=options.raw_feature_norm == "softmax",
            shared_limit=machine.shared_limit,
            multiprocessors=machine.multiprocessors,
            workspace_bytes=batch.workspace_bytes,
        )
        for name in phases
    }
    launches = {
        (name, direction): getattr(plans[name], direction) for name in phases for direction in _directions(options)
    }
    wide = [f"{direction} {name}" for (name, direction), launch in launches.items() if launch.tiles == 0]
    reason = f"{machine.arch}: library products in blocks, one fused epilogue a block and direction"
    if wide:
        reason += f"; {', '.join(wide)}: keys or segments too large for tiles in shared memory, query after query"
    return Plan(
        route="cuda-wide" if wide else "cuda-tiles",
        blocks=blocks_of(plans),
        tiles={direction: launch.row_capacity for (_, direction), launch in launches.items()},
        launches=sum(p.launches for p in plans.values()),
        workspace_bytes=max(p.workspace_bytes for p in plans.values()),
        flops=sum(p.flops for p in plans.values()),
        useful_fraction=min(p.useful_fraction for p in plans.values()),
        reason=reason,
    )


def _directions(options: ScoreOptions) -> list[str]:
    return [name for name, wanted in (("t2i", options.t2i), ("i2t", options.i2t)) if wanted]
