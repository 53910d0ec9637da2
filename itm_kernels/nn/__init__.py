"""Modules that hold parameters and options; no tensor code."""

from __future__ import annotations

from itm_kernels.nn.cross_attention import CrossAttentionScorer
from itm_kernels.nn.max_similarity import MaxSimilarityScorer

__all__ = ["CrossAttentionScorer", "MaxSimilarityScorer"]
