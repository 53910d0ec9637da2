"""The measure of memory sees what is held at once, freed tensors and temporaries included."""

from __future__ import annotations

import torch
from torch import Tensor

from memory import peak_bytes

KB = 1024


def test_the_result_counts() -> None:
    assert peak_bytes(lambda: torch.empty(256 * KB)) == 1024 * KB


def test_a_temporary_counts_while_it_lives() -> None:
    def call() -> Tensor:
        first = torch.empty(256 * KB)
        del first
        second = torch.empty(64 * KB)
        return torch.empty(32 * KB) if second.numel() else second

    assert peak_bytes(call) == 1024 * KB


def test_what_is_held_together_adds_up() -> None:
    def call() -> int:
        held = [torch.empty(128 * KB) for _ in range(3)]
        return len(held)

    assert peak_bytes(call) == 3 * 512 * KB
