"""Fine-grained image-text matching: every image of a batch against every caption, region by word."""

from __future__ import annotations

from itm_kernels.backends import use_backend, why_not
from itm_kernels.layout import CaptionLayout, caption_layout
from itm_kernels.ops.contrastive_loss import contrastive_loss
from itm_kernels.ops.cross_attention_scores import cross_attention_scores
from itm_kernels.ops.max_similarity_scores import max_similarity_scores
from itm_kernels.ops.triplet_loss import triplet_loss
from itm_kernels.planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "CaptionLayout",
    "Plan",
    "caption_layout",
    "contrastive_loss",
    "cross_attention_scores",
    "max_similarity_scores",
    "plan",
    "triplet_loss",
    "use_backend",
    "why_not",
]
