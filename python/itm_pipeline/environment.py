"""Device, threads, seeds and determinism of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from itm_pipeline.config import TrainConfig
from itm_pipeline.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device that a `--device` option means.

    Raises
    ------
    UserError
        The name is none of auto, cpu, cuda and cuda:N, or torch does not see that GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdigit()) or name.endswith(":")):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise UserError(f"--device {name} is not there: torch {torch.__version__} sees {count} GPUs")
    return torch.device(name)


@contextmanager
def environment(config: TrainConfig) -> Iterator[torch.device]:
    """Set torch up as the configuration asks, and put it back afterwards.

    Seeds the global generators of torch and NumPy; these are not put back.
    """
    device = pick_device(config.device)
    threads = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            # cuBLAS and cuDNN's recurrent layers repeat their bits with a workspace of fixed size only.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)  # noqa: NPY002  (for code that draws from the global generator)
        yield device
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
