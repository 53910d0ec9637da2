"""The terms of every image with every caption, on a CPU: one product, of which the swapped fragments are columns.

Keys in blocks of groups (images for t2i, captions for i2t), against all fragments of the other side at once:
``S = K Q^T`` without padding. The terms are made of columns of S, for some partners at a time; a swapped fragment is
another column of the same S. The backward gathers dS in the same way and ends in two products, ``dQ += dS^T K`` and
``dK += dS Q + (dG + dG^T) K``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.chosen_pairs import valid_regions, valid_words
from itm_kernels.eager.constraint_terms import CPU_BLOCK_BYTES, Products, arrays_of, lengths_of, terms_of_products
from itm_kernels.eager.norms import product
from itm_kernels.ops.constraint_options import ConstraintOptions
from itm_kernels.ops.pairs import score_dtype

_ROWS = 1024
"""Fragments of one product, so that no side has to be copied whole."""


class _Keys(NamedTuple):
    """The keys of some groups, and their products with everything."""

    groups: slice
    vectors: Tensor  # [b, K, D], zero where not valid
    valid: Tensor  # [b, K] bool
    gram: Tensor  # [b, K, K]
    products: Tensor  # [b, K, N]


class _Chunk(NamedTuple):
    """Some partners and what stands for their queries, with some groups of keys."""

    partners: Tensor  # [h]
    longest: int  # q
    rows: Tensor  # [h, q] rows of queries
    valid: Tensor  # [h, q] bool
    swapped: Tensor | None  # [b, h, q] rows of queries, within range
    asked: Tensor | None  # [b, h, q] bool
    named: Tensor | None  # [b, h, q] bool


def bytes_of_group(keys: int, width: int, columns: int, options: ConstraintOptions, dtype: torch.dtype) -> int:
    """What one group of keys takes against ``columns`` queries, beside the terms."""
    numbers = (2 + options.detach_swapped) * keys * columns + 4 * keys * (width + keys)
    return numbers * score_dtype(dtype).itemsize


class AllPairs:
    """A batch, and how it comes apart."""

    def __init__(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D]
        word_counts: Tensor,
        region_counts: Tensor | None,
        swapped: Tensor | None,  # [I C, Q]
        options: ConstraintOptions,
        workspace_bytes: int,
    ) -> None:
        sides = (words, valid_words(words, word_counts)), (regions, valid_regions(regions, region_counts))
        (self.queries, self.query_valid), (self.keys, self.key_valid) = sides if options.t2i else sides[::-1]
        self.options, self.dtype, self.wide = options, regions.dtype, score_dtype(regions.dtype)
        self.workspace_bytes = min(workspace_bytes, CPU_BLOCK_BYTES)
        self.pairs = regions.shape[0], words.shape[0]
        self.swapped = None if swapped is None else self.by_keys(swapped)
        self.rows = self.query_valid.flatten().nonzero()[:, 0]  # [N], the columns of S
        self.columns = (self.query_valid.flatten().cumsum(0) - 1).clamp(min=0)  # [H Q]
        self.norms = regions.new_zeros(self.columns.shape, dtype=self.wide)
        for rows, vectors in self.query_rows():
            self.norms[rows] = lengths_of(vectors.to(self.wide))

    def by_keys(self, terms: Tensor) -> Tensor:  # [I C, Q] -> [G, H, Q], a view of it where it is contiguous
        of_images: Tensor = terms.unflatten(0, self.pairs)
        return of_images if self.options.t2i else of_images.transpose(0, 1)

    def query_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The valid queries, some at a time: their rows, their vectors."""
        for rows in self.rows.split(_ROWS):
            yield rows, self.queries[rows // self.queries.shape[1], rows % self.queries.shape[1]]

    def blocks(self) -> Iterator[_Keys]:
        """Groups of keys; half of the workspace for what they need beside the terms."""
        (groups, keys), columns = self.key_valid.shape, self.rows.shape[0]
        group_bytes = bytes_of_group(keys, self.keys.shape[2], columns, self.options, self.dtype)
        step = max(1, self.workspace_bytes // 2 // group_bytes)
        for start in range(0, groups, step):
            of_block = slice(start, start + step)
            valid = self.key_valid[of_block]
            vectors = torch.where(valid[..., None], self.keys[of_block], 0.0).to(self.wide)
            products = vectors.new_empty(*valid.shape, columns)
            first = 0
            for rows, others in self.query_rows():
                products[..., first : first + len(rows)] = product(vectors, others.t().to(self.wide), self.dtype)
                first += len(rows)
            yield _Keys(of_block, vectors, valid, vectors @ vectors.transpose(1, 2), products)

    def chunks(self, block: _Keys) -> Iterator[_Chunk]:
        """Partners in order of length, so many that the terms take the other half."""
        counts = self.query_valid.sum(1)
        order, most = counts.argsort(stable=True), self.query_valid.shape[1]
        arrays = arrays_of(self.options, most, swaps=self.swapped is not None)
        pair_bytes = arrays * block.valid.numel() * most * self.wide.itemsize
        for partners in order.split(max(1, self.workspace_bytes // 2 // pair_bytes)):
            longest = int(counts[partners[-1]])
            rows = partners[:, None] * most + torch.arange(longest, device=partners.device)
            asked = named = within = None
            if self.swapped is not None:
                swapped = self.swapped[block.groups][:, partners, :longest]
                within = swapped.clamp(0, self.columns.shape[0] - 1)
                asked, named = swapped != -1, (swapped == within) & self.query_valid.flatten()[within]
            yield _Chunk(partners, longest, rows, self.query_valid[partners, :longest], within, asked, named)

    def leaves(self, block: _Keys, chunk: _Chunk) -> Products:
        """Columns of the products, and norms."""
        plain = block.products[..., self.columns[chunk.rows].flatten()].unflatten(2, chunk.rows.shape)
        swapped = norms = None
        if chunk.swapped is not None and chunk.named is not None:
            places = self._places(block, chunk)
            swapped = block.products.gather(2, places).unflatten(2, chunk.rows.shape)
            swapped.masked_fill_(~chunk.named[:, None], 0.0)
            norms = self.norms[chunk.swapped].masked_fill_(~chunk.named, 0.0)
        return Products(plain, plain, swapped, block.gram, self.norms[chunk.rows][None], norms)

    def _places(self, block: _Keys, chunk: _Chunk) -> Tensor:  # [b, K, h q]
        assert chunk.swapped is not None
        columns = self.columns[chunk.swapped].flatten(1)[:, None]
        return columns.expand(-1, block.valid.shape[1], -1)

    def terms(
        self, block: _Keys, chunk: _Chunk, leaves: Products
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [b, h, q] each
        """Zero where a term is not valid, NaN where a row named nothing; and where they are valid."""
        query_valid, key_valid = chunk.valid[None, None], block.valid[:, :, None, None]
        ccr, ccs = terms_of_products(leaves, query_valid, key_valid, None, self.options)
        ccr_valid = chunk.valid & (block.valid.sum(1) > 1)[:, None, None]
        ccr = torch.where(ccr_valid, ccr, 0.0)
        if ccs is None or chunk.asked is None or chunk.named is None:
            return ccr, torch.zeros_like(ccr), ccr_valid, torch.zeros_like(ccr_valid)
        ccs_valid = chunk.valid & chunk.asked
        return ccr, torch.where(ccs_valid, torch.where(chunk.named, ccs, torch.nan), 0.0), ccr_valid, ccs_valid

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [I C, Q] each
        """Both terms and where they are valid."""
        shape = self.pairs[0] * self.pairs[1], self.query_valid.shape[1]
        made = [self.keys.new_zeros(shape, dtype=dtype) for dtype in (self.wide, self.wide, torch.bool, torch.bool)]
        views = [self.by_keys(output) for output in made]
        for block in self.blocks():
            for chunk in self.chunks(block):
                for view, part in zip(views, self.terms(block, chunk, self.leaves(block, chunk)), strict=True):
                    view[block.groups, chunk.partners, : chunk.longest] = part
        return made[0], made[1], made[2], made[3]

    def backward(self, grad_ccr: Tensor, grad_ccs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of regions and words."""
        upstream = [self.by_keys(grad.to(self.wide)) for grad in (grad_ccr, grad_ccs)]
        grad_keys = self.keys.new_zeros(self.keys.shape, dtype=self.wide)
        grad_queries = self.keys.new_zeros(self.queries.shape, dtype=self.wide)
        of_rows, grad_norms = grad_queries.flatten(0, 1), torch.zeros_like(self.norms)
        for block in self.blocks():
            grad_products, grad_gram = torch.zeros_like(block.products), torch.zeros_like(block.gram)
            # Detached fragments get none of it, but the keys do: what is theirs is kept apart.
            apart = torch.zeros_like(block.products) if self.options.detach_swapped else None
            for chunk in self.chunks(block):
                self._differentiate(block, chunk, upstream, (grad_products, apart), grad_gram, grad_norms)
            through = (grad_gram + grad_gram.transpose(1, 2)) @ block.vectors
            flat, first = block.vectors.flatten(0, 1), 0
            for rows, vectors in self.query_rows():
                part = grad_products[..., first : first + len(rows)]
                of_rows[rows] += product(part.flatten(0, 1).t(), flat, self.dtype)
                of_keys = part if apart is None else part + apart[..., first : first + len(rows)]
                through += product(of_keys, vectors.to(self.wide), self.dtype)
                first += len(rows)
            grad_keys[block.groups] = torch.where(block.valid[..., None], through, 0.0)
        for rows, vectors in self.query_rows():
            norms = self.norms[rows]
            scale = torch.where(norms > 0, grad_norms[rows] / norms, 0.0)
            of_rows[rows] += scale[:, None] * vectors.to(self.wide)
        queries, keys = grad_queries.to(self.dtype), grad_keys.to(self.dtype)
        return (keys, queries) if self.options.t2i else (queries, keys)

    def _differentiate(
        self,
        block: _Keys,
        chunk: _Chunk,
        upstream: list[Tensor],
        grad_products: tuple[Tensor, Tensor | None],
        grad_gram: Tensor,
        grad_norms: Tensor,
    ) -> None:
        """Add the gradients of a chunk where they belong."""
        with torch.enable_grad():
            leaves = self.leaves(block, chunk)
            left_out = {"gated", "swapped_norms"} if self.options.detach_swapped else {"gated"}
            given = {name: t for name, t in leaves._asdict().items() if t is not None and name not in left_out}
            for name, leaf in given.items():
                given[name] = leaf.detach().requires_grad_()
            leaves = leaves._replace(gated=given["plain"], **given)
            ccr, ccs, *_ = self.terms(block, chunk, leaves)
        grads = [grad[block.groups, chunk.partners, : chunk.longest] for grad in upstream]
        outputs = [(ccr, grads[0])] + ([(ccs, grads[1])] if leaves.swapped is not None else [])
        found = torch.autograd.grad(
            [o[0] for o in outputs], list(given.values()), [o[1] for o in outputs], materialize_grads=True
        )
        made = dict(zip(given, found, strict=True))
        grad_products[0].index_add_(2, self.columns[chunk.rows].flatten(), made["plain"].flatten(2))
        grad_gram += made["gram"]
        grad_norms.index_add_(0, chunk.rows.flatten(), made["norms"].flatten())
        if "swapped" in made and chunk.swapped is not None:
            own, apart = grad_products
            target = own if apart is None else apart
            target.scatter_add_(2, self._places(block, chunk), made["swapped"].flatten(2))
        if "swapped_norms" in made and chunk.swapped is not None:
            grad_norms.index_add_(0, chunk.swapped.flatten(), made["swapped_norms"].flatten())
