"""Modules that hold parameters and options; no tensor code."""

from __future__ import annotations

from itm_kernels.nn.cross_attention import CrossAttentionScorer
from itm_kernels.nn.max_similarity import MaxSimilarityScorer
from itm_kernels.nn.regulated import RegulatedScorer
from itm_kernels.nn.similarity_reasoning import AttentionFiltrationScorer, SimilarityGraphScorer

__all__ = [
    "AttentionFiltrationScorer",
    "CrossAttentionScorer",
    "MaxSimilarityScorer",
    "RegulatedScorer",
    "SimilarityGraphScorer",
]
