"""The CUDA kernels of ``regulated_scores``, emulated: what the suite of the op does not ask of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emulated
import model_checks as checks
from helpers import Place
from itm_kernels.native import devices
from itm_kernels.native.devices import Kernels
from itm_kernels.ops.dropout import KEYS, POOLED, dropout_scale
from itm_kernels.pair_blocks import rows
from models import Case, assert_model_ladder, model_batch, run_model

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

OP = "regulated_scores"
EMULATED = Place("native", emulated=True)
FEW = [
    Case(OP, {"direction": "t2i", "regulator": "rcar", "steps": 2, "dropout": 0.4, "seed": 11}),
    Case(OP, {"direction": "i2t", "regulator": "rcr", "steps": 2}),
]
SMALL: dict[str, Any] = {"images": 2, "captions": 3, "regions": 5, "words": 4, "width": 20, "similarity": 6}
few = pytest.mark.parametrize("case", FEW, ids=str)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those that the op is given."""
    made = Kernels(emulated.library(), emulated.GPU)
    monkeypatch.setattr(devices, "kernels_for", lambda device: made)
    return made.ops


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 1032, "similarity": 520},  # rows longer than the threads hold, in chunks
        {"width": 1027, "similarity": 515},  # and without
        {"width": 1, "similarity": 1},
        {"regions": 90, "words": 72},  # a pair that the backward leaves in memory
        {"regions": 130, "words": 100, "captions": 1, "images": 1},  # and the forward
    ],
    ids=str,
)
@few
def test_sizes(case: Case, sizes: dict[str, Any]) -> None:
    checks.check_ladder(EMULATED, case, 5, region_counts=True, shortest=2, **{**SMALL, **sizes})


@given(st.data())
@settings(max_examples=30)
def test_any_sizes(data: st.DataObject) -> None:
    draw = data.draw
    case = Case(OP, {
        "direction": draw(st.sampled_from(["t2i", "i2t"])), "regulator": draw(st.sampled_from(["rar", "rcr", "rcar"])),
        "steps": draw(st.integers(1, 3)),
    })  # fmt: skip
    sizes = {
        "images": draw(st.integers(3, 6)), "captions": draw(st.integers(4, 9)),
        "regions": draw(st.sampled_from([5, 7, 36])), "words": draw(st.sampled_from([5, 9, 20])),
        "width": draw(st.sampled_from([15, 16, 24, 33])), "similarity": draw(st.sampled_from([7, 8, 12])),
        "region_counts": draw(st.booleans()), "packed": draw(st.booleans()), "shortest": 3,
    }  # fmt: skip
    made = checks.prepared(case, draw(st.integers(0, 1 << 16)), **sizes)
    true, peer = checks.references(made, "eager")
    workspace_bytes = draw(st.sampled_from([1, 50_000, 1 << 30]))
    assert_model_ladder(run_model(made.batch, "native", workspace_bytes=workspace_bytes), peer, true, case)


@pytest.mark.usefixtures("poisoned_memory")
@few
def test_counts_that_are_never_read(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Counts as if on a device: the padded size runs, and padding (NaN here) is neither used nor given a gradient."""
    made = checks.prepared(case, 9, region_counts=True, shortest=2, **SMALL)
    true, peer = checks.references(made, "eager")
    monkeypatch.setattr(rows, "on_host", lambda counts: False)
    for workspace_bytes in (1, 1 << 30):
        assert_model_ladder(run_model(made.batch, "native", workspace_bytes=workspace_bytes), peer, true, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_of_odd_widths(dtype: torch.dtype) -> None:
    """Rows that no chunk of 16 bytes divides."""
    sizes = {"images": 10, "captions": 10, "width": 27, "similarity": 13, "shortest": 4}
    checks.check_half(EMULATED, FEW[0], dtype, range(6, 16), **sizes)


@few
def test_a_nan_stays_with_its_caption(case: Case) -> None:
    made = model_batch(case, 1, shortest=3)
    made.batch.words[2, 0, 0] = torch.nan
    scores = run_model(made, "native").scores
    assert scores[:, 2].isnan().all()
    assert scores[:, [0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("layout", ["turned", "one image for all", "misaligned"])
@few
def test_layouts(case: Case, layout: str) -> None:
    """Strides of any kind, and rows that do not begin at multiples of 16 bytes."""
    made = checks.prepared(case, 10, shortest=2, **SMALL).batch
    regions, words = sides = made.batch.regions, made.batch.words
    if layout == "turned":
        regions, words = (side.transpose(0, 2).contiguous().transpose(0, 2) for side in sides)
    elif layout == "one image for all":
        regions = regions[:1].expand_as(regions)
    else:
        regions, words = (
            torch.cat([side.flatten()[:1], side.flatten()])[1:].view_as(side) for side in (regions, words)
        )
    same = dataclasses.replace(made, batch=dataclasses.replace(made.batch, regions=regions, words=words))
    true, peer = checks.references(checks.Made(same, str(case), layout), "eager")
    assert_model_ladder(run_model(same, "native"), peer, true, case)


def test_the_norm_over_a_single_query_keeps_its_gradient(kernels: Any) -> None:
    """What is left of it is a product with eps: the general line would leave rounding alone."""
    products = torch.tensor([0.4, -0.3, 0.7, 0.0]).view(1, 4, 1)
    one, upstream = torch.ones(1, dtype=torch.int64), torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 4, 1)
    norms, weights, of_products = (torch.full((1, *shape), torch.nan) for shape in ((1, 4), (4, 1), (4, 1)))
    where, of_temperatures = (4 * one, torch.tensor([0, 1]), one, 1, None, 2.0), torch.empty(1)
    kernels.block_attention_weights(products, *where, norms, weights)
    kernels.block_attention_weights_backward(products, norms, *where, upstream.clone(), of_temperatures, of_products)
    wide = products.double().requires_grad_()
    x = torch.nn.functional.leaky_relu(wide, 0.1)
    norm = x.abs()
    expected = torch.softmax(2.0 * x / (norm + 1e-8), dim=1)
    (true,) = torch.autograd.grad(expected, wide, upstream.double())
    true[0, 3] = 0  # no norm, no gradient
    torch.testing.assert_close(weights.double(), expected.detach())
    torch.testing.assert_close(of_products.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups_are_images", [True, False])
def test_masks_are_those_of_the_definition(kernels: Any, groups_are_images: bool) -> None:
    """Bit for bit, far into the batch and with a seed of 63 bits: by the gradient of the value, a sum of masks."""
    groups, segments, queries, width, step, seed = 3, 2, 3, 70, 3, 2**62 + 2**31 + 5
    first_group, first_segment, dropout = 2**31 - 3, 12345, 0.4
    pairs, count = groups * segments, queries * segments
    ones = torch.ones(pairs, width)
    upstream = torch.tensor([1.0, 2.0, 4.0]).repeat(pairs)  # what a query's weight has to tell it from the others
    vectors = upstream[:, None] * torch.eye(1, width)
    grad_pooled = torch.eye(1, width).repeat(pairs, 1)
    made = [torch.zeros_like(ones) for _ in range(3)]
    kernels.block_pool_rows_backward(
        vectors, torch.arange(0, count + 1, queries), torch.full((segments,), queries), groups_are_images, first_group,
        first_segment, step, seed, -(-int(dropout * 10 * 2**24) // 10), 1 / (1 - dropout), torch.ones(width),
        torch.ones(groups * count, width), ones, torch.full((groups * count,), 1 / queries), 0 * ones,
        torch.ones(pairs), grad_pooled, torch.empty(groups * count), torch.zeros(groups * count, width),
        torch.empty(groups * count, width), *made,
    )  # fmt: skip
    of_value = made[2]
    group, segment = torch.arange(pairs) // segments + first_group, torch.arange(pairs) % segments + first_segment
    images, captions = (group, segment) if groups_are_images else (segment, group)

    def masks(branch: int, query: int) -> torch.Tensor:  # [pairs, width]
        return dropout_scale(
            images, captions, torch.full((pairs,), query), width, step=step, branch=branch, dropout=dropout, seed=seed,
            dtype=torch.float64,
        )  # fmt: skip

    of_logits = (torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64) - 7 / 3) / 3
    true = masks(POOLED, 0) * sum(of_logits[query] * masks(KEYS, query) for query in range(queries))
    assert 0 < (true == 0).sum() < true.numel()
    torch.testing.assert_close(of_value.double(), true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("block_squared_differences", {0: torch.zeros(3, 8)}, "rows must be"),
        ("block_squared_differences", {2: torch.zeros(4, 8, dtype=torch.float16)}, "squares must be contiguous"),
        ("block_squared_differences", {3: torch.zeros(3)}, "norms must be contiguous float32 with 4 elements"),
        ("block_squared_differences", {i: torch.zeros(4, 8).double() for i in range(3)}, "must be float32, float16"),
        ("block_gate_queries_backward", {6: torch.zeros(2, 8)}, "sums must be in parts of 4 rows"),
    ],
)
def test_what_the_kernels_refuse(kernels: Any, name: str, change: dict[int, Any], message: str) -> None:
    """Memory that would be overrun: this comes from our own Python, so a sentence is enough."""
    q, c = torch.zeros(2, 8), torch.zeros(4, 8)
    given: dict[str, list[Any]] = {
        "block_squared_differences": [q, c, c.clone(), torch.zeros(4)],
        "block_gate_queries_backward": [q, None, c, c.clone(), None, q.clone(), torch.zeros(1, 8)],
    }
    arguments = [change.get(place, argument) for place, argument in enumerate(given[name])]
    getattr(kernels, name)(*given[name])
    with pytest.raises(RuntimeError, match=message):
        getattr(kernels, name)(*arguments)
