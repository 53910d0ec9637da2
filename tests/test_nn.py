"""itm_kernels.nn: modules hold options and call the op."""

from __future__ import annotations

import pytest
import torch

from itm_kernels import cross_attention_scores
from itm_kernels.nn import CrossAttentionScorer


def test_scorer_equals_the_op_with_every_option() -> None:
    torch.manual_seed(0)
    regions, words, counts = torch.randn(3, 5, 16), torch.randn(4, 6, 16), [6, 4, 2, 1]
    options = {
        "direction": "t2i", "raw_feature_norm": "l1norm", "lambda_softmax": 7.0, "agg_func": "LogSumExp",
        "lambda_lse": 3.0, "focal": "equal", "peak_weight": 0.5, "workspace_bytes": 2**16, "backend": "eager",
    }  # fmt: skip
    scorer = CrossAttentionScorer(**options)
    expected = cross_attention_scores(regions, words, counts, region_counts=[5, 3, 1], **options)
    torch.testing.assert_close(scorer(regions, words, counts, region_counts=[5, 3, 1]), expected, rtol=0, atol=0)
    assert not list(scorer.parameters())
    assert not scorer.state_dict()
    for name in ("lambda_softmax=7.0", "raw_feature_norm='l1norm'", "focal='equal'"):
        assert name in repr(scorer)


def test_scorer_refuses_options_when_made() -> None:
    with pytest.raises(ValueError, match="direction must be one of"):
        CrossAttentionScorer(direction="up")
