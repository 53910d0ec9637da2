"""Blocks of pairs for the scorers that learn: some groups of keys, padded, against a run of whole query segments.

t2i: the words of captions are queries, the regions of an image are a group of keys; i2t the reverse. A block goes
through a whole scorer before the next begins, in buffers of ``[groups x queries, ...]`` rows; nothing but scores and
gradients leaves it. Products are the library's. Query blocks are the outer loop. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from itm_kernels.pair_blocks.rows import Block, Side, blocks
from itm_kernels.pair_blocks.steps import Steps

# Groups of keys in a block, where the bound leaves the choice: products of a few thousand rows, each of whose weights
# and keys is used often enough.
GROUPS = 8
# Of the workspace, for an allocator that rounds up.
SLACK = 0.9


@dataclass
class PairBlock:
    """G groups of K keys against L queries; row ``g * L + l`` of any buffer is query l facing group g."""

    steps: Steps
    queries: Block
    keys: Block
    padded: Tensor  # [G, K, D], zeros behind a group's last key
    first_segment: int  # of the batch
    first_group: int
    keeps: bool
    """Whether a backward follows."""
    grad_queries: Tensor | None = None  # [L, D] float32, added to
    grad_keys: Tensor | None = None  # [G, K, D] float32, added to

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands of products."""
        return self.padded.dtype

    @property
    def groups(self) -> int:
        return self.padded.shape[0]

    @property
    def most(self) -> int:
        return self.padded.shape[1]

    @property
    def width(self) -> int:
        return self.padded.shape[2]

    @property
    def num_queries(self) -> int:
        return self.queries.num_rows

    @property
    def segments(self) -> int:
        return self.queries.groups

    @property
    def rows(self) -> int:
        return self.groups * self.num_queries

    @property
    def pairs(self) -> int:
        return self.groups * self.segments

    def floats(self, *shape: int) -> Tensor:
        """Not initialised, float32."""
        return self.padded.new_empty(shape, dtype=torch.float32)

    def take(self, *shape: int) -> Tensor:
        """Not initialised, for products."""
        return self.padded.new_empty(shape)

    def plain_products(self) -> Tensor:  # [G, K, L] float32
        """Keys with queries as they are."""
        return product(self.padded.flatten(0, 1), self.queries.rows.t()).view(self.groups, self.most, -1)

    def plain_products_backward(self, grad_products: Tensor) -> None:  # [G, K, L]
        assert self.grad_queries is not None
        assert self.grad_keys is not None
        grad = grad_products.flatten(0, 1)
        add_product(self.grad_queries, grad.t(), self.padded.flatten(0, 1))
        add_product(self.grad_keys.view(-1, self.width), grad, self.queries.rows)

    def products_with(self, rows: Tensor) -> Tensor:  # [rows, D] -> [G, K, L] float32
        """Keys with rows of their own group."""
        return product(self.padded, rows.view(self.groups, -1, self.width).transpose(1, 2))

    def combine_keys(self, weights: Tensor) -> Tensor:  # [G, K, L] -> [rows, D]
        """Sums of keys, weighted for each row."""
        return torch.bmm(weights.transpose(1, 2), self.padded).view(self.rows, self.width)

    def add_to_keys(self, weights: Tensor, rows: Tensor) -> None:  # [G, K, L], [rows, D]
        """Gradient of the keys: sums of rows, weighted for each key."""
        assert self.grad_keys is not None
        rows = rows.view(self.groups, -1, self.width)
        if rows.dtype == torch.float32:
            self.grad_keys.baddbmm_(weights, rows)
        else:
            self.grad_keys.add_(product(weights, rows))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, whatever the operands are; one product, or one a group."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        out.copy_(product(left, right))


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    else:
        out.add_(product(left, right))


class PairBlocks:
    """All blocks of a batch."""

    def __init__(
        self,
        steps: Steps,
        queries: Side,
        keys: Side,
        *,
        row_bytes: int,  # that a block takes for one row, but for what grows with its keys
        matrices: int,  # so many bytes of it for one row and key
        workspace_bytes: int,
        backward: bool,
        most_queries: int | None = None,  # rows of a block of queries, where something else bounds them
    ) -> None:
        self.steps, self.queries, self.keys = steps, queries, keys
        self._backward = backward
        element = queries.vectors.element_size()
        # Copies of either side, and gradients that are added where they belong in the end.
        of_vector = queries.width * (2 * element + (8 if backward else 0))
        row_bytes += matrices * keys.most
        group_bytes = keys.most * of_vector
        room = int(workspace_bytes * SLACK)
        groups = len(keys.bounds) - 1
        longest = max(b - a for a, b in pairwise(queries.bounds))

        def fits(rows: int, at_once: int) -> bool:
            return rows * (at_once * row_bytes + of_vector) + at_once * group_bytes <= room

        at_once = min(GROUPS, groups)
        while at_once > 1 and not fits(longest, at_once):
            at_once //= 2
        least, most = longest, max(queries.bounds[-1], longest) + 1  # the most rows that fit
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle, at_once) else (least, middle)
        if most_queries is not None:
            least = max(longest, min(least, most_queries))
        while at_once < groups and fits(least, at_once + 1):  # with room left for all queries, more groups
            at_once += 1
        self._rows, self._at_once = least, at_once

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        """First and last segment of each block: about equally many rows."""
        bounds = self.queries.bounds
        target = -(-bounds[-1] // -(-bounds[-1] // self._rows))
        start = 0
        for stop in range(1, len(bounds)):
            if stop == len(bounds) - 1 or bounds[stop + 1] - bounds[start] > target:
                yield start, stop
                start = stop

    def key_blocks(self) -> Iterator[tuple[int, int]]:
        """Likewise of groups of keys."""
        groups = len(self.keys.bounds) - 1
        step = -(-groups // -(-groups // self._at_once))
        for start in range(0, groups, step):
            yield start, min(start + step, groups)

    def forward_blocks(
        self, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[tuple[PairBlock, slice, slice]]:
        """Each block with its groups and segments; ``spans``: of these query blocks alone."""
        for first, last in self.query_blocks() if spans is None else spans:
            (queries,) = blocks(self.steps.pack, (self.queries, first, last))
            for start, stop in self.key_blocks():
                (keys,) = blocks(self.steps.pack, (self.keys, start, stop))
                yield self._block(queries, keys, first, start), slice(start, stop), slice(first, last)
                del keys

    def backward_blocks(
        self,
        grad_queries: Tensor,  # float32, of both sides, added to
        grad_keys: Tensor,
        spans: Iterable[tuple[int, int]] | None = None,
    ) -> Iterator[tuple[PairBlock, slice, slice]]:
        """The same with places for gradients, added where they belong when the next block is asked for."""
        for first, last in self.query_blocks() if spans is None else spans:
            (queries,) = blocks(self.steps.pack, (self.queries, first, last))
            of_queries = self.queries.view_of(grad_queries, first, last)
            direct = of_queries is not None
            if of_queries is None:
                of_queries = torch.zeros_like(queries.rows, dtype=torch.float32)
            for start, stop in self.key_blocks():
                (keys,) = blocks(self.steps.pack, (self.keys, start, stop))
                block = self._block(queries, keys, first, start)
                block.grad_queries = of_queries
                in_place = self.keys.whole
                if in_place:
                    block.grad_keys = grad_keys[start:stop]
                else:
                    block.grad_keys = torch.zeros_like(block.padded, dtype=torch.float32)
                yield block, slice(start, stop), slice(first, last)
                if not in_place:
                    self.steps.add_padded(keys, block.grad_keys, self.keys.rows_of(grad_keys, start))
                del block, keys
            if not direct:
                self.queries.add(grad_queries, first, queries, of_queries)

    def _block(self, queries: Block, keys: Block, first_segment: int, first_group: int) -> PairBlock:
        if self.keys.whole:
            padded = keys.rows.view(keys.groups, -1, self.keys.width)
        else:
            padded = keys.rows.new_empty(keys.groups, keys.most, self.keys.width)
            self.steps.pad_groups(keys, padded)
        return PairBlock(self.steps, queries, keys, padded, first_segment, first_group, self._backward)
