"""Options of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DemoConfig:
    """Draw scenes, train SCAN on them, evaluate it, and look at its attention. Needs neither download nor GPU."""

    run: Path | None = None
    """Run folder to make. Default: runs/demo, or runs/demo-2 and so on where that is taken."""
    scenes: Path | None = None
    """Where the scenes are kept, so that they are drawn once. Default: the user's cache folder."""
    small: bool = False
    """Ninety pictures and two short epochs: shows in seconds that everything works, learns little."""
    seed: int = 0
    """Seed of the scenes, the initial weights and the order of the captions."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 leaves the number to torch."""
