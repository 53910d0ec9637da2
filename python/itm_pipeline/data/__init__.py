"""Data of the pipeline: tokeniser, vocabulary, SCAN's precomputed layout, and batches."""

from __future__ import annotations

from .augmentation import CaptionAugmentation
from .batches import Batch, CaptionSampler, make_batch
from .precomp import PrecompSplit
from .tokenizer import token_spans, tokenize
from .vocabulary import Vocabulary

__all__ = [
    "Batch",
    "CaptionAugmentation",
    "CaptionSampler",
    "PrecompSplit",
    "Vocabulary",
    "make_batch",
    "token_spans",
    "tokenize",
]
