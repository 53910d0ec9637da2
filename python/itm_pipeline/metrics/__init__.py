"""Numbers that judge a matching model: retrieval in both directions."""

from __future__ import annotations

from .retrieval import five_fold, retrieval, retrieval_ranks

__all__ = ["five_fold", "retrieval", "retrieval_ranks"]
