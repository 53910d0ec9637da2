"""Recognise the data that a run was trained on."""

from __future__ import annotations

import hashlib

import numpy as np

from itm_pipeline.data import PrecompSplit

SAMPLED_ROWS = 64


def fingerprint(split: PrecompSplit) -> str:
    """SHA-256 over the captions, the ids, the shape of the features and evenly spaced rows of them.

    All captions enter; of the features, which may take many gigabytes, `SAMPLED_ROWS` rows (all of a small set).
    """
    digest = hashlib.sha256()
    digest.update("\n".join(split.captions).encode("utf-8"))
    digest.update("\n".join(split.image_ids or ()).encode("utf-8"))
    digest.update(repr(tuple(split.features.shape)).encode("ascii"))
    rows = np.unique(np.linspace(0, len(split.features) - 1, SAMPLED_ROWS).astype(np.int64))
    for row in rows:
        digest.update(np.ascontiguousarray(split.features[row]).tobytes())
    return digest.hexdigest()
