"""Encoders and the matching model."""

from __future__ import annotations

from itm_pipeline.models.encoders import ImageEncoder, TextEncoder, l2norm
from itm_pipeline.models.matching import MatchingModel

__all__ = ["ImageEncoder", "MatchingModel", "TextEncoder", "l2norm"]
