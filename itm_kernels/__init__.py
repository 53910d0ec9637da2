"""Fine-grained image-text matching: every image of a batch against every caption, region by word."""

from __future__ import annotations

from itm_kernels.backends import use_backend, why_not
from itm_kernels.layout import CaptionLayout, caption_layout
from itm_kernels.ops.cross_attention_scores import cross_attention_scores

__version__ = "0.1.0"

__all__ = [
    "CaptionLayout",
    "caption_layout",
    "cross_attention_scores",
    "use_backend",
    "why_not",
]
