"""Chunks of pairs for the scorers that learn: some groups of keys against a run of whole query segments.

t2i: the words of captions are queries, the regions of an image are a group of keys; i2t the reverse. All pairs of a
chunk go through a whole scorer before the next chunk begins, in buffers of ``[groups x queries, ...]`` rows that stay
in the cache, and nothing but scores and gradients leaves it. Products are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itm_kernels.native.packing import Packed

# Rows of a chunk, about: a stage touches two or three buffers of [1280, 1024], 5 MB each in float32, which a
# third-level cache holds. A third of these rows cost 6 % more time, in bfloat16 14 %: each product packs its weights
# anew, and each chunk adds to the gradients of all parameters.
ROWS = 1280
ROWS_OF_SUM = 32  # enough work for a piece, and a sum of sums is also more precise


class Workspace:
    """Buffers by name. A name is used again from chunk to chunk, so that its memory stays in the cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Of the operands of products: float32 or bfloat16."""
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Rows for products, contiguous, not initialised."""
        return self._take(name, shape, self.dtype)

    def floats(self, name: str, *shape: int) -> Tensor:
        """The same in float32."""
        return self._take(name, shape, torch.float32)

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = 1
        for size in shape:
            numel *= size
        key = name, dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = None
            self._buffers.pop(key, None)  # a larger one takes its place: not both at once
            buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device="cpu")
        return buffer[:numel].view(shape)


@dataclass
class Chunk:
    """G groups of K keys against L queries; row ``g * L + l`` of any buffer is query l facing group g."""

    workspace: Workspace
    queries: Tensor  # [L, D]
    wide_queries: Tensor  # [L, D] float32
    offsets: Tensor  # [segments + 1]
    segment_numbers: Tensor  # [segments], which segments of the batch these are
    keys: Tensor  # [G, K, D], zeros behind a group's last key
    key_counts: Tensor  # [G]
    group_numbers: Tensor  # [G]
    keeps: bool = False
    """Whether a backward follows: then steps keep what they made, each in buffers of its own."""
    grad_queries: Tensor | None = None  # [L, D] float32, added to
    grad_keys: Tensor | None = None  # [G, K, D] float32, added to

    @property
    def groups(self) -> int:
        return self.keys.shape[0]

    @property
    def rows(self) -> int:
        return self.groups * self.queries.shape[0]

    @property
    def segments(self) -> slice:
        """Which segments of the batch, one run."""
        first = int(self.segment_numbers[0])
        return slice(first, first + self.segment_numbers.shape[0])

    @property
    def pairs(self) -> int:
        return self.groups * self.segment_numbers.shape[0]

    def name(self, what: str, step: int) -> str:
        return f"{what} {step}" if self.keeps else what

    def wide(self, name: str | None = None) -> Tensor:  # [rows, D]
        """A buffer of full width; without a name the one that every stage overwrites."""
        return self.workspace.take(name or "wide", self.rows, self.queries.shape[1])

    def sums(self, count: int, width: int) -> Tensor:  # [P, width]
        """Room for the sums over rows that a native step makes in runs of ``count / P`` rows."""
        return self.workspace.floats("sums", -(-count // ROWS_OF_SUM), width)

    def plain_products(self) -> Tensor:  # [G, K, L] float32
        """Keys with queries as they are."""
        g, k, d = self.keys.shape
        out = self.workspace.floats("products 0", g, k, self.queries.shape[0])
        torch.mm(self.keys.float().view(g * k, d), self.wide_queries.t(), out=out.view(g * k, -1))
        return out

    def plain_products_backward(self, grad_products: Tensor) -> None:
        g, k, d = self.keys.shape
        assert self.grad_queries is not None
        assert self.grad_keys is not None
        grad = grad_products.to(self.keys.dtype).view(g * k, -1)
        add_product(self.grad_queries, grad.t(), self.keys.view(g * k, d))
        add_product(self.grad_keys.view(g * k, d), grad, self.queries)

    def products_with(self, rows: Tensor, name: str) -> Tensor:  # [rows, D] -> [G, K, L] float32
        """Keys with rows of their own group."""
        g, k, d = self.keys.shape
        out = self.workspace.floats(name, g, k, self.queries.shape[0])
        return multiply(self.keys.float(), rows.float().view(g, -1, d).transpose(1, 2), out)

    def combine_keys(self, weights: Tensor, out: Tensor) -> Tensor:  # [G, K, L] -> [rows, D]
        """Sums of keys, weighted for each row."""
        g, _, d = self.keys.shape
        multiply(weights.transpose(1, 2), self.keys, out.view(g, -1, d))
        return out

    def add_to_keys(self, weights: Tensor, rows: Tensor) -> None:  # [G, K, L], [rows, D]
        """Gradient of the keys: sums of rows, weighted for each key."""
        assert self.grad_keys is not None
        g, _, d = self.keys.shape
        rows = rows.view(g, -1, d)
        if g == 1:
            add_product(self.grad_keys[0], weights[0], rows[0])
        elif rows.dtype == torch.float32:
            self.grad_keys.baddbmm_(weights, rows)
        else:
            self.grad_keys.add_(torch.bmm(weights, rows))


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right``, one product a group."""
    if left.shape[0] == 1:  # the batched product of one matrix takes a slower way
        torch.mm(left[0], right[0], out=out[0])
    else:
        torch.bmm(left, right, out=out)
    return out


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right`` into float32, whatever the operands are."""
    return torch.mm(left, right, out=out) if left.dtype == out.dtype else out.copy_(left @ right)


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` in float32, whatever the operands are."""
    if left.dtype == torch.float32:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


class Chunks:
    """All chunks of a batch, query blocks outside, so that their gradient is made in one go."""

    def __init__(
        self,
        queries: Packed,
        keys: Packed,
        *,
        row_bytes: int,  # that a chunk's buffers take for one row, but for
        matrices: int,  # so many of [G, K, L]
        workspace_bytes: int,
        backward: bool,
    ) -> None:
        self.queries, self.keys = queries, keys
        self.workspace = Workspace(queries.dtype)
        itemsize = queries.dtype.itemsize
        of_vector = queries.shape[-1] * (itemsize + 4 + (4 if backward else 0))  # copies, and its gradient
        self._row_bytes = row_bytes + matrices * keys.most * 4 + of_vector
        self._group_bytes = keys.most * of_vector
        # Half of the bound: library products have buffers of their own.
        self._room = workspace_bytes // 2
        self._rows = max(1, min(ROWS, (self._room - self._group_bytes) // self._row_bytes))
        # Groups of like size stand together, so that little is padded.
        counts = [keys.bounds[g + 1] - keys.bounds[g] for g in range(len(keys.bounds) - 1)]
        self._order = sorted(range(len(counts)), key=counts.__getitem__)
        self._key_counts = counts
        self._longest = max(queries.bounds[stop] - queries.bounds[start] for start, stop in self.query_blocks())

    def query_blocks(self) -> Iterator[tuple[int, int]]:
        """First and last segment of each block: about equally many rows."""
        bounds = self.queries.bounds
        # With room for them all, one block of a few more rows than usual is better than two of half as many.
        usual = self._rows if self._rows < ROWS else ROWS * 3 // 2
        blocks = -(-bounds[-1] // usual)
        target = -(-bounds[-1] // blocks)
        start = 0
        for stop in range(1, len(bounds)):
            if stop == len(bounds) - 1 or bounds[stop + 1] - bounds[start] > target:
                yield start, stop
                start = stop

    def every(self, **more: Any) -> Iterator[Chunk]:
        """All chunks; ``more`` is for each of them."""
        for start, stop in self.query_blocks():
            yield from self.of_block(start, stop, **more)

    def every_backward(self, grad_queries: Tensor, grad_keys: Tensor) -> Iterator[Chunk]:
        """The same, with places for the gradients of its vectors: in those of the batch when the next one comes."""
        for start, stop in self.query_blocks():
            of_block = self.queries.view_of(grad_queries, start, stop)
            direct = of_block is not None
            if of_block is None:
                rows = self.queries.bounds[stop] - self.queries.bounds[start]
                of_block = self.workspace.floats("grad queries", rows, self.queries.shape[-1]).zero_()
            for chunk in self.of_block(start, stop, keeps=True, grad_queries=of_block):
                self.start_backward(chunk, grad_keys)
                yield chunk
                self.finish_backward(chunk, grad_keys)
            if not direct:
                self.queries.put(grad_queries, start, stop, of_block, add=False)

    def groups_at_once(self, rows: int) -> int:
        """Groups of a chunk, but for the last of a block; alike for all blocks but parts of one."""
        rows = rows if 2 * rows <= self._longest else self._longest
        fit = self._room // (self._row_bytes * rows + self._group_bytes)
        return max(1, min(round(ROWS / rows), fit, len(self._order)))

    @property
    def chunk_bytes(self) -> int:
        """What the buffers of the largest chunk take."""
        return self.groups_at_once(self._longest) * (self._longest * self._row_bytes + self._group_bytes)

    def of_block(self, start: int, stop: int, **more: Any) -> Iterator[Chunk]:
        """The chunks of a query block; ``more`` is for each of them."""
        rows = self.queries.rows(start, stop)
        wide_rows = rows.float()
        offsets = self.queries.offsets_of(start, stop)
        numbers = torch.arange(start, stop, device="cpu")
        at_once = self.groups_at_once(rows.shape[0])
        for first in range(0, len(self._order), at_once):
            groups = self._order[first : first + at_once]
            counts = [self._key_counts[g] for g in groups]
            yield Chunk(
                self.workspace,
                rows,
                wide_rows,
                offsets,
                numbers,
                self._padded(groups, counts),
                torch.tensor(counts, dtype=torch.int64, device="cpu"),
                torch.tensor(groups, dtype=torch.int64, device="cpu"),
                **more,
            )

    def _padded(self, groups: list[int], counts: list[int]) -> Tensor:  # [G, K, D]
        if len(groups) == 1:
            return self.keys.rows(groups[0], groups[0] + 1)[None]
        padded = self.workspace.take("keys", len(groups), max(counts), self.keys.shape[-1])
        for place, group, count in zip(padded, groups, counts, strict=True):
            place[:count] = self.keys.rows(group, group + 1)
            place[count:] = 0
        return padded

    def start_backward(self, chunk: Chunk, grad_keys: Tensor) -> None:
        """Give the chunk a place for the gradient of its keys: where it belongs, if that is one group."""
        if chunk.groups == 1:
            chunk.grad_keys = self._rows_of(grad_keys, int(chunk.group_numbers[0]))[None]
        else:
            chunk.grad_keys = self.workspace.floats("grad keys", *chunk.keys.shape).zero_()

    def finish_backward(self, chunk: Chunk, grad_keys: Tensor) -> None:
        if chunk.groups > 1:
            assert chunk.grad_keys is not None
            for place, group in enumerate(chunk.group_numbers.tolist()):
                own = self._rows_of(grad_keys, group)
                own.add_(chunk.grad_keys[place, : own.shape[0]])

    def _rows_of(self, gradient: Tensor, group: int) -> Tensor:
        begin, end = self.keys.bounds[group], self.keys.bounds[group + 1]
        return gradient[begin:end] if gradient.dim() == 2 else gradient[group, : end - begin]
