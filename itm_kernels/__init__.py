"""Fine-grained image-text matching: every image of a batch against every caption, region by word."""

from __future__ import annotations

from itm_kernels.backends import use_backend, why_not
from itm_kernels.layout import CaptionLayout, caption_layout
from itm_kernels.ops.aggregation_regulator import aggregation_regulator
from itm_kernels.ops.alignment_vectors import alignment_vectors
from itm_kernels.ops.attention_constraints import AttentionConstraints, attention_constraints
from itm_kernels.ops.attention_filtration import attention_filtration
from itm_kernels.ops.contrastive_loss import contrastive_loss
from itm_kernels.ops.correspondence_regulator import CorrespondenceState, correspondence_regulator
from itm_kernels.ops.cross_attention import CrossAttention, cross_attention
from itm_kernels.ops.cross_attention_scores import cross_attention_scores
from itm_kernels.ops.max_similarity_scores import max_similarity_scores
from itm_kernels.ops.parameters import (
    AggregationParameters,
    AlignmentParameters,
    CorrespondenceParameters,
    FiltrationParameters,
    GraphParameters,
    ReasoningParameters,
    RegulatedParameters,
    ScoreParameters,
)
from itm_kernels.ops.regulated_scores import regulated_scores
from itm_kernels.ops.scores_and_constraints import scores_and_constraints
from itm_kernels.ops.similarity_graph import similarity_graph
from itm_kernels.ops.similarity_reasoning_scores import similarity_reasoning_scores
from itm_kernels.ops.swapped_fragments import swapped_regions, swapped_words
from itm_kernels.ops.triplet_loss import triplet_loss
from itm_kernels.planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "AggregationParameters",
    "AlignmentParameters",
    "AttentionConstraints",
    "CaptionLayout",
    "CorrespondenceParameters",
    "CorrespondenceState",
    "CrossAttention",
    "FiltrationParameters",
    "GraphParameters",
    "Plan",
    "ReasoningParameters",
    "RegulatedParameters",
    "ScoreParameters",
    "aggregation_regulator",
    "alignment_vectors",
    "attention_constraints",
    "attention_filtration",
    "caption_layout",
    "contrastive_loss",
    "correspondence_regulator",
    "cross_attention",
    "cross_attention_scores",
    "max_similarity_scores",
    "plan",
    "regulated_scores",
    "scores_and_constraints",
    "similarity_graph",
    "similarity_reasoning_scores",
    "swapped_regions",
    "swapped_words",
    "triplet_loss",
    "use_backend",
    "why_not",
]
