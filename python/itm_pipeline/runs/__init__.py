"""A run on the disk: its folder, its checkpoints, and files that are never half-written."""

from __future__ import annotations

from itm_pipeline.runs.folder import RunFolder, Which, open_run

__all__ = ["RunFolder", "Which", "open_run"]
