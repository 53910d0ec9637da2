"""Numbers that judge a matching model: retrieval in both directions, and where its attention lies."""

from __future__ import annotations

from .attention import attention, attention_curve
from .retrieval import five_fold, retrieval, retrieval_ranks

__all__ = ["attention", "attention_curve", "five_fold", "retrieval", "retrieval_ranks"]
