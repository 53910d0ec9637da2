"""Blocks of pairs for the scorers that learn: some groups of keys, padded, against a run of whole query segments.

t2i: the words of captions are queries, the regions of an image are a group of keys; i2t the reverse. A block goes
through a whole scorer before the next begins, in buffers of ``[groups x queries, ...]`` rows; nothing but scores and
gradients leaves it. Products are the library's. Query blocks are the outer loop. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch import Tensor

from itm_kernels.pair_blocks.rows import Block, Side, blocks
from itm_kernels.pair_blocks.steps import Steps

# Groups of keys in a block, where the bound leaves the choice: products of a few thousand rows, each of whose weights
# and keys is used often enough.
GROUPS = 8
# Of the workspace, for an allocator that rounds up.
SLACK = 0.9


class Ones:
    """As many as a call needs at most, made when they are first asked for."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count, self._device = count, device
        self._ones: Tensor | None = None

    def of(self, count: int) -> Tensor:  # [count]
        if self._ones is None:
            self._ones = torch.ones(self._count, dtype=torch.float32, device=self._device)
        return self._ones[:count]


@dataclass
class PairBlock:
    """G groups of K keys against L queries; row ``g * L + l`` of any buffer is query l facing group g."""

    steps: Steps
    queries: Block
    keys: Block
    padded: Tensor  # [G, K, D], zeros behind a group's last key
    first_segment: int  # of the batch
    first_group: int
    ones: Ones
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

    def add_sum(self, out: Tensor, rows: Tensor) -> None:  # [n], [m, n] float32
        """``out += rows.sum(0)`` in one launch."""
        out.addmv_(rows.t(), self.ones.of(rows.shape[0]))

    def add_sums(self, out: Tensor, rows: Tensor) -> None:  # [k, n], [k, m, n] float32
        """The same of k runs of rows at once."""
        ones = self.ones.of(rows.shape[1]).expand(rows.shape[0], 1, -1)
        out.unsqueeze(1).baddbmm_(ones, rows)

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
        elif rows.device.type != "cpu":
            out = self.grad_keys  # accumulates in the library
            torch.ops.aten.baddbmm.dtype_out(out, weights, rows, torch.float32, beta=1, out=out)
        else:
            self.grad_keys.add_(product(weights, rows))


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32, whatever the operands are; one product, or one a group."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type != "cpu":  # a plan, on the meta device, counts what a GPU does
        multiply = torch.mm if left.dim() == 2 else torch.bmm
        return multiply(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.device.type != "cpu":
        torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
    else:
        torch.mm(left.float(), right.float(), out=out)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    elif left.device.type != "cpu":  # accumulates in the library: no product of its own to write and read again
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, beta=1, out=out)
    else:
        out.add_(left.float() @ right.float())


@dataclass
class FirstBlocks:
    """So many blocks alone, of a batch that is cut as if all were wanted: for plans."""

    queries: int
    keys: int
    all_blocks: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    """What the batch was cut into: of queries, and of keys."""


_rehearsed: ContextVar[FirstBlocks | None] = ContextVar("rehearsed", default=None)


@contextmanager
def first_blocks(queries: int, keys: int) -> Iterator[FirstBlocks]:
    """Calls inside go through their first blocks alone."""
    first = FirstBlocks(queries, keys)
    token = _rehearsed.set(first)
    try:
        yield first
    finally:
        _rehearsed.reset(token)


class PairBlocks:
    """All blocks of a batch."""

    def __init__(
        self,
        steps: Steps | None,  # None: only how it is cut will be asked for
        queries: Side,
        keys: Side,
        *,
        row_bytes: int,  # that a block takes for one row, but for what grows with its keys
        matrices: int,  # so many bytes of it for one row and key
        pair_bytes: int = 0,  # that it takes for one pair
        workspace_bytes: int,
        backward: bool,
        most_queries: int | None = None,  # rows of a block of queries, where something else bounds them
    ) -> None:
        self._steps, self.queries, self.keys = steps, queries, keys
        self._backward = backward
        element = queries.vectors.element_size()
        # Copies of either side, and gradients that are added where they belong in the end.
        of_vector = queries.width * (2 * element + (8 if backward else 0))
        row_bytes += matrices * keys.most
        group_bytes = keys.most * of_vector
        room = int(workspace_bytes * SLACK)
        groups = len(keys.bounds) - 1
        # What the segments up to one take, facing one group.
        self._weights = [n * row_bytes + s * pair_bytes for s, n in enumerate(queries.bounds)]
        heaviest = max(b - a for a, b in pairwise(self._weights))

        def fits(weight: int, at_once: int) -> bool:
            return at_once * weight + weight // row_bytes * of_vector + at_once * group_bytes <= room

        at_once = min(GROUPS, groups)
        while at_once > 1 and not fits(heaviest, at_once):
            at_once //= 2
        least, most = heaviest, max(self._weights[-1], heaviest) + 1  # the most that fits
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle, at_once) else (least, middle)
        if most_queries is not None:
            least = max(heaviest, min(least, most_queries * row_bytes))
        # With room left for all queries more groups; not of many lengths, which are padded to the longest of them.
        while keys.whole and at_once < groups and fits(least, at_once + 1):
            at_once += 1
        self._weight, self._at_once = least, at_once
        most_rows = max(queries.bounds[stop] - queries.bounds[start] for start, stop in self._query_blocks())
        self._ones = Ones(2 * most_rows * at_once, queries.vectors.device)  # nodes: of rows, and of fewer pairs
        self._rehearsed = _rehearsed.get()
        if self._rehearsed is not None:
            self._rehearsed.all_blocks = list(self._query_blocks()), list(self._key_blocks())

    @property
    def steps(self) -> Steps:
        """The floor's kernels."""
        assert self._steps is not None, "a block is asked for"
        return self._steps

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        """First and last segment of each block: about equally many rows."""
        rehearsed = self._rehearsed
        return islice(self._query_blocks(), None if rehearsed is None else rehearsed.queries)

    def key_blocks(self) -> Iterator[tuple[int, int]]:
        """Likewise of groups of keys."""
        rehearsed = self._rehearsed
        return islice(self._key_blocks(), None if rehearsed is None else rehearsed.keys)

    def _query_blocks(self) -> Iterator[tuple[int, int]]:
        weights, last = self._weights, len(self._weights) - 1
        left = -(-weights[-1] // self._weight)
        start = 0
        while start < last:
            # As near to an equal share of what is left as whole segments come, and no more than fits.
            share = (weights[-1] - weights[start]) / max(left, 1)
            stop = start + 1
            while stop < last and weights[stop + 1] - weights[start] <= self._weight:
                if weights[stop] + weights[stop + 1] - 2 * weights[start] > 2 * share:
                    break
                stop += 1
            yield start, stop
            start, left = stop, left - 1

    def _key_blocks(self) -> Iterator[tuple[int, int]]:
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
        return PairBlock(self.steps, queries, keys, padded, first_segment, first_group, self._ones, self._backward)
