"""Every refusal of ``max_similarity_scores``, with its sentence; floors that cannot run; instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import Place, random_batch
from itm_kernels import max_similarity_scores, native
from itm_kernels.nn import MaxSimilarityScorer
from similarity import OP, arguments

V, T, COUNTS = torch.ones(2, 5, 8), torch.ones(3, 4, 8), [4, 2, 1]


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"direction": "both"}, ValueError, "direction must be one of t2i, i2t, got 'both'"),
        (
            {"agg_func": "Median"},
            ValueError,
            "agg_func must be one of LogSumExp, Max, Sum, Mean, Softmax, got 'Median'",
        ),
        ({"lambda_lse": 0.0}, ValueError, "lambda_lse must be positive, got 0.0"),
        ({"lambda_lse": float("nan")}, ValueError, "lambda_lse must be a finite number, got nan"),
        ({"lambda_lse": "6"}, TypeError, "lambda_lse must be a number, got '6'"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes must be a whole number, got 1.5"),
        ({"workspace_bytes": True}, TypeError, "workspace_bytes must be a whole number, got True"),
        ({"backend": "cuda"}, ValueError, "backend must be one of reference, eager, native, triton, got 'cuda'"),
        ({"region_counts": [5, 6]}, ValueError, r"region_counts must be in 1\.\.5, got 6 at position 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"max_similarity_scores: {sentence}"):
        max_similarity_scores(V, T, COUNTS, **options)


def test_inputs_are_checked_in_the_voice_of_all_score_ops() -> None:
    with pytest.raises(ValueError, match=r"max_similarity_scores: words must be \[C, W, D\] or packed"):
        max_similarity_scores(V, T[..., :4], COUNTS)
    with pytest.raises(ValueError, match=r"max_similarity_scores: word_counts must be in 1\.\.4, got 5 at position 0"):
        max_similarity_scores(V, T, [5, 1, 1])
    with pytest.raises(TypeError, match="max_similarity_scores: regions and words must have one dtype"):
        max_similarity_scores(V, T.double(), COUNTS)


@pytest.mark.parametrize("name", ["backward", "forward"])
def test_the_opaque_ops_check_counts_too(name: str) -> None:
    batch = random_batch(261)
    inputs = list(arguments(batch, "eager", {}))
    inputs[2] = inputs[2] + 1
    if name == "forward":
        op, given = torch.ops.itm_kernels.max_similarity_scores, (*inputs, False)
    else:
        op = torch.ops.itm_kernels.max_similarity_scores_backward
        given = (batch.grad_scores, torch.empty(0, dtype=torch.uint8), *inputs)
    with pytest.raises(ValueError, match="word_counts must be in"):
        op(*given)


def test_native_says_where_it_does_not_run() -> None:
    assert Place("native").why_not(OP, torch.float64) == (
        "the native kernels accumulate in float32; float64 runs on eager and reference"
    )
    with pytest.raises(RuntimeError, match=r"max_similarity_scores: backend 'native' cannot run on cpu with .*float64"):
        max_similarity_scores(V.double(), T.double(), COUNTS, backend="native")


def test_the_module_holds_the_options() -> None:
    torch.manual_seed(0)
    regions, words = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    options: dict[str, Any] = {
        "direction": "i2t", "agg_func": "Softmax", "lambda_lse": 3.0, "workspace_bytes": 2**16, "backend": "eager",
    }  # fmt: skip
    scorer = MaxSimilarityScorer(**options)
    expected = max_similarity_scores(regions, words, COUNTS, region_counts=[5, 2], **options)
    assert torch.equal(scorer(regions, words, COUNTS, region_counts=[5, 2]), expected)
    assert not scorer.state_dict()
    assert repr(scorer) == "MaxSimilarityScorer(direction='i2t', agg_func='Softmax', lambda_lse=3.0)"
    with pytest.raises(ValueError, match="direction must be one of t2i, i2t"):
        MaxSimilarityScorer(direction="both")


@pytest.fixture
def raw() -> Any:
    reason = native.load_error()
    if reason is not None:
        pytest.skip(reason)
    return torch.ops.itm_kernels_native


def test_the_raw_kernels_protect_memory(raw: Any) -> None:
    offsets = torch.tensor([0, 3])
    products, scores, arg_max = torch.ones(3, 4), torch.ones(1, 1), torch.zeros(1, 4, dtype=torch.uint8)
    lanes = torch.tensor([0, 4])
    raw.max_similarity_scores_epilogue(products, offsets, lanes, 2, 1.0, scores, arg_max)
    with pytest.raises(RuntimeError, match="key offsets must run from 0 to 3"):
        raw.max_similarity_scores_epilogue(products, lanes, lanes, 2, 1.0, scores, arg_max)
    with pytest.raises(RuntimeError, match="arg_max must be uint8 or int32"):
        raw.max_similarity_scores_epilogue(products, offsets, lanes, 2, 1.0, scores, arg_max[:, :3])
    with pytest.raises(RuntimeError, match=r"scores must be float32 \[groups, segments\]"):
        raw.max_similarity_scores_epilogue(products, offsets, lanes, 2, 1.0, scores[:, :0], arg_max)
    keys, queries, grads = torch.ones(3, 8), torch.ones(4, 8), torch.ones(1, 4)
    with pytest.raises(RuntimeError, match=r"grad_keys must be contiguous float32 \[3, 8\]"):
        raw.max_similarity_scores_keys_backward(
            keys, queries, offsets, lanes, arg_max, 2, 1.0, scores, False, grads, torch.ones(2, 8)
        )
    with pytest.raises(RuntimeError, match="one width and dtype"):
        raw.max_similarity_scores_keys_backward(
            keys, queries[:, :4].contiguous(), offsets, lanes, arg_max, 2, 1.0, scores, False, grads, torch.ones(3, 8)
        )
    with pytest.raises(RuntimeError, match=r"grad_queries must be contiguous float32 \[4, 8\]"):
        raw.max_similarity_scores_queries_backward(keys, offsets, arg_max, grads, False, torch.ones(4, 4))


def test_an_arg_max_from_elsewhere_reads_no_foreign_memory(raw: Any) -> None:
    keys, wild = torch.arange(24.0).view(3, 8), torch.full((1, 4), 200, dtype=torch.uint8)
    out = torch.empty(4, 8)
    raw.max_similarity_scores_queries_backward(keys, torch.tensor([0, 3]), wild, torch.ones(1, 4), False, out)
    assert torch.equal(out, keys[2:].expand(4, 8))


PROGRAM = """
import sys
from similarity import every_option, run, truth
from helpers import assert_ladder, random_batch
from itm_kernels.native import host
import torch

assert host().cpu_capability() == sys.argv[1], host().cpu_capability()
for dtype in (torch.float32, torch.bfloat16):
    for options in every_option():
        batch = random_batch(262, images=3, captions=40, regions=7, words=13, width=37, dtype=dtype)
        true, peer = truth(batch, **options), run(batch, "eager", **options)
        assert_ladder(run(batch, "native", **options), peer, true, options, noise=dtype == torch.float32)
print("agreed")
"""
CAPABILITIES = ["default", "avx2", "avx512"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_stays_on_the_ladder(capability: str, raw: Any) -> None:
    if not os.environ.get("ITM_CPU_CAPABILITY") and CAPABILITIES.index(capability) > CAPABILITIES.index(
        native.host().cpu_capability()
    ):
        pytest.skip(f"this processor only has {native.host().cpu_capability()}")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {"ITM_CPU_CAPABILITY": capability, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, capability], capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed"
