"""Bad input to ``cross_attention_scores``: type and wording, and nothing has run when it is found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from itm_kernels import caption_layout, cross_attention_scores, use_backend

OP = "cross_attention_scores"


def inputs() -> dict[str, Any]:
    """A call that works: 2 images of 3 regions, 4 captions of at most 5 words, width 8."""
    return {"regions": torch.randn(2, 3, 8), "words": torch.randn(4, 5, 8), "word_counts": [5, 1, 2, 3]}


def packed() -> dict[str, Any]:
    return {"regions": torch.randn(2, 3, 8), "words": torch.randn(11, 8), "word_counts": [5, 1, 2, 3]}


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No floor may be reached."""

    def reached(*args: Any, **options: Any) -> None:
        raise AssertionError("a floor ran on bad input")

    for floor in ("reference", "eager", "native"):
        for phase in ("forward", "backward"):
            monkeypatch.setattr(f"itm_kernels.{floor}.{OP}.{phase}", reached)


def assert_refused(error: type[Exception], message: str, **arguments: Any) -> None:
    with pytest.raises(error) as refused:
        cross_attention_scores(**arguments)
    assert type(refused.value) is error
    assert str(refused.value) == f"{OP}: {message}"


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "regions no tensor": (
        {"regions": np.zeros((2, 3, 8))}, TypeError, "regions must be a tensor, got ndarray",
    ),
    "words no tensor": ({"words": [[1.0]]}, TypeError, "words must be a tensor, got list"),
    "integer regions": (
        {"regions": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError,
        "regions must be float64, float32, bfloat16 or float16, got torch.int64",
    ),
    "complex words": (
        {"words": torch.zeros(4, 5, 8, dtype=torch.complex64)}, TypeError,
        "words must be float64, float32, bfloat16 or float16, got torch.complex64",
    ),
    "regions of two dimensions": (
        {"regions": torch.zeros(3, 8)}, ValueError, "regions must be [I, R, D], got [3, 8]",
    ),
    "words of another width": (
        {"words": torch.zeros(4, 5, 9)}, ValueError,
        "words must be [C, W, D] or packed [N, D] with D = 8 as in regions, got [4, 5, 9]",
    ),
    "words of four dimensions": (
        {"words": torch.zeros(1, 4, 5, 8)}, ValueError,
        "words must be [C, W, D] or packed [N, D] with D = 8 as in regions, got [1, 4, 5, 8]",
    ),
    "words of one dimension": (
        {"words": torch.zeros(8)}, ValueError,
        "words must be [C, W, D] or packed [N, D] with D = 8 as in regions, got [8]",
    ),
    "no regions in an image": (
        {"regions": torch.zeros(2, 0, 8)}, ValueError,
        "R, W and D must be at least 1, got regions [2, 0, 8] and words [4, 5, 8]",
    ),
    "no words in a caption": (
        {"words": torch.zeros(4, 0, 8)}, ValueError,
        "R, W and D must be at least 1, got regions [2, 3, 8] and words [4, 0, 8]",
    ),
    "no width": (
        {"regions": torch.zeros(2, 3, 0), "words": torch.zeros(4, 5, 0)}, ValueError,
        "R, W and D must be at least 1, got regions [2, 3, 0] and words [4, 5, 0]",
    ),
    "two dtypes": (
        {"words": torch.zeros(4, 5, 8, dtype=torch.float64)}, TypeError,
        "regions and words must have one dtype, got torch.float32 and torch.float64",
    ),
    "two devices": (
        {"words": meta(4, 5, 8)}, ValueError, "regions and words must be on one device, got cpu and meta",
    ),
    "too few counts": (
        {"word_counts": [5, 1]}, ValueError, "word_counts must be [C] with C = 4 as in words, got [2]",
    ),
    "counts of two dimensions": (
        {"word_counts": torch.ones(4, 1, dtype=torch.int64)}, ValueError,
        "word_counts must be one-dimensional, got shape [4, 1]",
    ),
    "floating counts": (
        {"word_counts": torch.ones(4)}, TypeError, "word_counts must be integers, got torch.float32",
    ),
    "boolean counts": (
        {"word_counts": torch.ones(4, dtype=torch.bool)}, TypeError, "word_counts must be integers, got torch.bool",
    ),
    "a fraction among counts": ({"word_counts": [5, 1.5, 2, 3]}, TypeError, "word_counts must be integers, got 1.5"),
    "a boolean among counts": ({"word_counts": [5, True, 2, 3]}, TypeError, "word_counts must be integers, got True"),
    "a NumPy fraction among counts": (
        {"word_counts": np.array([5.0, 1.0, 2.0, 3.0])}, TypeError,
        "word_counts must be integers, got np.float64(5.0)",
    ),
    "one number for counts": (
        {"word_counts": 5}, TypeError, "word_counts must be a list, a tensor or a CaptionLayout, got int",
    ),
    "counts elsewhere": (
        {"word_counts": torch.empty(4, dtype=torch.int64, device="meta")}, ValueError,
        "word_counts must be on the host or on cpu, got meta",
    ),
    "no word": ({"word_counts": [5, 1, 0, 3]}, ValueError, "word_counts must be in 1..5, got 0 at position 2"),
    "less than no word": (
        {"word_counts": [5, -1, 0, 3]}, ValueError, "word_counts must be in 1..5, got -1 at position 1",
    ),
    "more words than there are": (
        {"word_counts": torch.tensor([5, 1, 2, 6])}, ValueError, "word_counts must be in 1..5, got 6 at position 3",
    ),
    "a layout of longer captions": (
        {"word_counts": caption_layout([5, 1, 2, 6], "cpu")}, ValueError,
        "word_counts must be in 1..5, got 6 at position 3",
    ),
    "a layout of other captions": (
        {"word_counts": caption_layout([5, 1], "cpu")}, ValueError,
        "word_counts must be [C] with C = 4 as in words, got [2]",
    ),
    "too many region counts": (
        {"region_counts": [3, 3, 3]}, ValueError, "region_counts must be [I] with I = 2 as in regions, got [3]",
    ),
    "no region": ({"region_counts": [3, 0]}, ValueError, "region_counts must be in 1..3, got 0 at position 1"),
    "more regions than there are": (
        {"region_counts": torch.tensor([4, 3])}, ValueError, "region_counts must be in 1..3, got 4 at position 0",
    ),
    "floating region counts": (
        {"region_counts": torch.ones(2)}, TypeError, "region_counts must be integers, got torch.float32",
    ),
    "region counts elsewhere": (
        {"region_counts": torch.empty(2, dtype=torch.int64, device="meta")}, ValueError,
        "region_counts must be on the host or on cpu, got meta",
    ),
    "an unknown direction": (
        {"direction": "up"}, ValueError, "direction must be one of t2i, i2t, both, got 'up'",
    ),
    "an unknown norm": (
        {"raw_feature_norm": "l3norm"}, ValueError,
        "raw_feature_norm must be one of softmax, l2norm, clipped_l2norm, l1norm, clipped_l1norm, clipped, no_norm, "
        "got 'l3norm'",
    ),
    "no norm's name": (
        {"raw_feature_norm": None}, ValueError,
        "raw_feature_norm must be one of softmax, l2norm, clipped_l2norm, l1norm, clipped_l1norm, clipped, no_norm, "
        "got None",
    ),
    "an unknown aggregation": (
        {"agg_func": "mean"}, ValueError, "agg_func must be one of LogSumExp, Max, Sum, Mean, got 'mean'",
    ),
    "an unknown focal": ({"focal": "both"}, ValueError, "focal must be None, 'equal' or 'prob', got 'both'"),
    "our own name for no focal": ({"focal": "none"}, ValueError, "focal must be None, 'equal' or 'prob', got 'none'"),
    "a lambda that is NaN": (
        {"lambda_softmax": float("nan")}, ValueError, "lambda_softmax must be a finite number, got nan",
    ),
    "an infinite lambda": (
        {"lambda_lse": float("inf")}, ValueError, "lambda_lse must be a finite number, got inf",
    ),
    "a peak that is NaN": (
        {"peak_weight": float("nan")}, ValueError, "peak_weight must be a finite number, got nan",
    ),
    "lambda_lse of zero": ({"lambda_lse": 0.0}, ValueError, "lambda_lse must be positive, got 0.0"),
    "a negative lambda_lse": ({"lambda_lse": -2}, ValueError, "lambda_lse must be positive, got -2.0"),
    "a peak in i2t": (
        {"peak_weight": 0.5, "direction": "i2t"}, ValueError,
        "peak_weight is PFAN's, defined for direction 't2i' alone; got 0.5 with 'i2t'",
    ),
    "a peak in both": (
        {"peak_weight": -0.5, "direction": "both"}, ValueError,
        "peak_weight is PFAN's, defined for direction 't2i' alone; got -0.5 with 'both'",
    ),
    "no workspace": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
    "an unknown backend": (
        {"backend": "cuda"}, ValueError,
        "backend must be one of reference, eager, native, triton, got 'cuda'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_one_voice(case: str) -> None:
    change, error, message = REFUSALS[case]
    assert_refused(error, message, **(inputs() | change))


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_counts_are_refused_whatever_runs(backend: str) -> None:
    message = "word_counts must be in 1..5, got 6 at position 0"
    assert_refused(ValueError, message, **(inputs() | {"word_counts": [6, 1, 1, 1]}), backend=backend)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 1, 2, 2], "packed words must be [N, D] with N = 10, the sum of word_counts, got [11, 8]"),
        ([5, 1, 2, 4], "packed words must be [N, D] with N = 12, the sum of word_counts, got [11, 8]"),
        ([], "packed words must be [N, D] with N = 0, the sum of word_counts, got [11, 8]"),
        ([11, 0], "word_counts must be at least 1, got 0 at position 1"),
        (
            torch.empty(4, dtype=torch.int64, device="meta"),
            "packed words need word_counts on the host, got a tensor on meta",
        ),
    ],
)  # fmt: skip
def test_packed_words(counts: Any, message: str) -> None:
    assert_refused(ValueError, message, **(packed() | {"word_counts": counts}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lambda_softmax", "9"), ("lambda_softmax", None), ("lambda_lse", [6.0]), ("peak_weight", "0.5"),
     ("workspace_bytes", 1.5), ("workspace_bytes", "1"), ("workspace_bytes", None)],
)  # fmt: skip
def test_numbers_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{OP}: {name} must be "):
        cross_attention_scores(**inputs(), **{name: value})


def test_options_have_names() -> None:
    given = inputs()
    with pytest.raises(TypeError, match="positional"):
        cross_attention_scores(*given.values(), None, "t2i")  # type: ignore[misc]
    with pytest.raises(TypeError, match="lambda_focal"):
        cross_attention_scores(**given, lambda_focal=1.0)  # type: ignore[call-arg]


def test_bad_counts_are_found_in_compiled_code_too() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cross_attention_scores, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape(f"{OP}: word_counts must be in 1..5, got 6 at position 0")):
        compiled(**(inputs() | {"word_counts": torch.tensor([6, 1, 1, 1])}))
    torch._dynamo.reset()


@pytest.mark.parametrize("forced", ["argument", "context"])
def test_a_forced_floor_that_cannot_run_says_why(forced: str) -> None:
    given = inputs() | {"regions": torch.zeros(2, 3, 8).double(), "words": torch.zeros(4, 5, 8).double()}
    expected = re.escape(
        f"{OP}: backend 'native' cannot run on cpu with torch.float64: "
        "the native kernels accumulate in float32; float64 runs on eager and reference"
    )
    if forced == "argument":
        with pytest.raises(RuntimeError, match=f"^{expected}$"):
            cross_attention_scores(**given, backend="native")
    else:
        with use_backend("native"), pytest.raises(RuntimeError, match=f"^{expected}$"):
            cross_attention_scores(**given)


def test_a_floor_that_is_not_there_says_so() -> None:
    with pytest.raises(RuntimeError, match=rf"^{OP}: backend 'triton' cannot run on cpu with torch.float32: .+"):
        cross_attention_scores(**inputs(), backend="triton")


def test_an_empty_batch_is_checked_as_well() -> None:
    assert_refused(
        ValueError, "direction must be one of t2i, i2t, both, got 'up'",
        regions=torch.zeros(0, 3, 8), words=torch.zeros(4, 5, 8), word_counts=[5, 1, 2, 3], direction="up",
    )  # fmt: skip
    assert_refused(
        ValueError, "word_counts must be in 1..5, got 6 at position 0",
        regions=torch.zeros(0, 3, 8), words=torch.zeros(4, 5, 8), word_counts=[6, 1, 2, 3],
    )  # fmt: skip


def test_the_library_guards_its_memory() -> None:
    """The raw kernels take nothing on trust, though only our own code calls them."""
    import itm_kernels.native as native

    if native.load_error():
        pytest.skip(str(native.load_error()))
    raw = torch.ops.itm_kernels_native
    rows, offsets = torch.randn(6, 4), torch.tensor([0, 2, 6])
    products, norms, scores = torch.randn(6, 5), torch.ones(5), torch.empty(2, 1)
    codes = (2, 0, 0, 9.0, 6.0, 0.0)
    with pytest.raises(RuntimeError, match="rows must be contiguous"):
        raw.gram(rows.double(), offsets, torch.empty(2, 4, 4))
    with pytest.raises(RuntimeError, match="groups within K"):
        raw.gram(rows, offsets, torch.empty(2, 3, 3))
    with pytest.raises(RuntimeError, match="within the rows"):
        raw.gram(rows, torch.tensor([0, 2, 7]), torch.empty(2, 8, 8))
    with pytest.raises(RuntimeError, match="key offsets must run from 0 to 6"):
        raw.cross_attention_scores_epilogue(
            products, torch.empty(2, 4, 4), torch.tensor([0, 2, 5]), torch.tensor([0, 5]), norms, *codes, False, scores
        )
    with pytest.raises(RuntimeError, match="larger than its Gram matrix"):
        raw.cross_attention_scores_epilogue(
            products, torch.empty(2, 3, 3), offsets, torch.tensor([0, 5]), norms, *codes, False, scores
        )
    with pytest.raises(RuntimeError, match=r"scores must be float32 \[groups, segments\]"):
        raw.cross_attention_scores_epilogue(
            products, torch.empty(2, 4, 4), offsets, torch.tensor([0, 3, 5]), norms, *codes, False, scores
        )
