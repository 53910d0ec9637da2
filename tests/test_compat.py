"""The drop-ins against the published code's own numbers, with the published call forms."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import itm_kernels
from itm_kernels.compat import bfan, pfan, scan

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = sorted(path.stem for pattern in ("scan_*", "bfan_*", "pfan_*") for path in GOLDEN.glob(pattern))
PUBLISHED = {"scan": scan, "bfan": bfan, "pfan": pfan}

# Floor, dtype, tolerance of scores, of gradients in relative L2. Native's is the float32 noise floor, which is above
# twice the eager floor's own error here.
FLOORS = [
    ("reference", torch.float64, 1e-9, 1e-6),
    ("eager", torch.float64, 1e-9, 1e-6),
    ("native", torch.float32, 1e-6, 5e-6),
]


def load(case: str) -> tuple[argparse.Namespace, dict[str, np.ndarray], dict[str, np.ndarray]]:
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    options = json.loads(str(golden["options"]))
    opt = argparse.Namespace(**{key: value for key, value in options.items() if key != "model"})
    return opt, golden, dict(np.load(GOLDEN / "inputs.npz"))


def published_scores(model: str, opt: argparse.Namespace, *inputs: object) -> torch.Tensor:
    if model == "bfan":
        return bfan.xattn_score(*inputs, opt)
    return getattr(PUBLISHED[model], f"xattn_score_{opt.cross_attn}")(*inputs, opt)


def test_all_published_vectors_are_here() -> None:
    assert len(CASES) == 24


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "dtype", "score_tolerance", "grad_tolerance"), FLOORS)
def test_golden(case: str, backend: str, dtype: torch.dtype, score_tolerance: float, grad_tolerance: float) -> None:
    opt, golden, inputs = load(case)
    images = torch.tensor(inputs["images"]).to(dtype).requires_grad_()
    captions = torch.tensor(inputs["captions"]).to(dtype).requires_grad_()
    if getattr(opt, "agg_func", None) == "Sum" and dtype == torch.float32:
        score_tolerance = 1e-5
    with itm_kernels.use_backend(backend):
        scores = published_scores(case.split("_")[0], opt, images, captions, inputs["lengths"].tolist())
    scores.backward(torch.tensor(inputs["grad_scores"]).to(scores.dtype))
    assert np.abs(scores.detach().double().numpy() - golden["scores"]).max() <= score_tolerance
    for tensor, name in ((images, "grad_images"), (captions, "grad_captions")):
        error = np.linalg.norm(tensor.grad.double().numpy() - golden[name]) / np.linalg.norm(golden[name])
        assert error <= grad_tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", ["scan_t2i_clipped_l2norm_lse", "scan_i2t_clipped_l2norm_mean", "bfan_prob",
                                  "pfan_t2i_mean", "pfan_i2t_mean"])  # fmt: skip
@pytest.mark.parametrize("max_violation", [False, True])
def test_loss_is_the_hinge_of_its_own_scores(case: str, max_violation: bool) -> None:
    opt, _, inputs = load(case)
    model = case.split("_")[0]
    images, captions = torch.tensor(inputs["images"]), torch.tensor(inputs["captions"])[:4]
    lengths = inputs["lengths"].tolist()[:4]
    loss = PUBLISHED[model].ContrastiveLoss(opt, margin=0.2, max_violation=max_violation)(images, captions, lengths)
    scores = published_scores(model, opt, images, captions, lengths)
    expected = itm_kernels.triplet_loss(scores, margin=0.2, hardest=max_violation)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_loss_defaults_are_published() -> None:
    loss = scan.ContrastiveLoss(argparse.Namespace())
    assert (loss.margin, loss.max_violation) == (0, False)


def test_missing_and_unknown_options_are_named() -> None:
    inputs = (torch.ones(1, 2, 4), torch.ones(1, 3, 4), [3])
    with pytest.raises(ValueError, match=r"opt\.agg_func is needed for xattn_score_t2i"):
        scan.xattn_score_t2i(*inputs, argparse.Namespace())
    opt = argparse.Namespace(agg_func="LogSumExp", raw_feature_norm="clipped_l2norm", lambda_softmax=9)
    with pytest.raises(ValueError, match=r"opt\.lambda_lse is needed"):
        scan.xattn_score_t2i(*inputs, opt)
    with pytest.raises(ValueError, match="agg_func must be one of LogSumExp, Max, Sum, Mean, got 'Median'"):
        scan.xattn_score_t2i(*inputs, argparse.Namespace(**{**vars(opt), "agg_func": "Median"}))
    with pytest.raises(ValueError, match=r"opt\.focal_type must be 'equal' or 'prob'"):
        bfan.xattn_score(*inputs, argparse.Namespace(focal_type=None, lambda_softmax=20))
    with pytest.raises(ValueError, match=r"opt\.cross_attn must be 't2i' or 'i2t', got 'both'"):
        scan.ContrastiveLoss(argparse.Namespace(cross_attn="both"))(*inputs)


def test_mean_needs_no_lambda_lse() -> None:
    opt = argparse.Namespace(agg_func="Mean", raw_feature_norm="clipped_l2norm", lambda_softmax=9.0)
    torch.manual_seed(0)
    images, captions = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    scores = scan.xattn_score_t2i(images, captions, torch.tensor([4, 2, 1]), opt)
    expected = itm_kernels.cross_attention_scores(images, captions, [4, 2, 1], agg_func="Mean")
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)
