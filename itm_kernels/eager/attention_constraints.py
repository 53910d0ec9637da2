"""``attention_constraints`` by the Gram form, many pairs at a time, padded, in plain PyTorch.

No attended vector is formed (``constraint_terms``). The pairs of a block are gathered, and differentiated by autograd;
the backward makes a block again. Every pair of a batch (``pairs`` None) is another matter on a CPU
(``all_constraints``): one product of everything with everything holds what is swapped in as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from itm_kernels.eager.all_constraints import AllPairs, bytes_of_group
from itm_kernels.eager.chosen_pairs import PairBlock, pair_blocks, put, valid_regions, valid_words
from itm_kernels.eager.constraint_terms import CPU_BLOCK_BYTES, Products, arrays_of, lengths_of, terms_of_products
from itm_kernels.eager.norms import product
from itm_kernels.ops.constraint_options import ConstraintOptions, every_pair
from itm_kernels.ops.pairs import score_dtype


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


class _Leaves(NamedTuple):
    """What the terms of a block depend on, wide, each pair its own copy, zero where not valid."""

    regions: Tensor  # [b, R, D]
    words: Tensor  # [b, W, D]
    swapped: Tensor | None  # [b, Q, D]; zero where there is none
    gate: Tensor | None  # [b, Q, D]
    temperature: Tensor | None  # [b, Q]


class _Inputs:
    """The inputs of a call, and how they come apart into blocks."""

    def __init__(
        self,
        regions: Tensor,
        words: Tensor,
        word_counts: Tensor,
        region_counts: Tensor | None,
        pairs: Tensor | None,
        swapped: Tensor | None,
        gate: Tensor | None,
        temperature: Tensor | None,
        options: ConstraintOptions,
    ) -> None:
        self.regions, self.words = regions, words
        self.pairs = every_pair(regions, words) if pairs is None else pairs
        self.word_counts, self.all_regions = word_counts, region_counts is None
        self.gate, self.temperature, self.options = gate, temperature, options
        self.swapped = None if swapped is None else swapped.to(regions.device, non_blocking=True)
        self.region_valid, self.word_valid = valid_regions(regions, region_counts), valid_words(words, word_counts)
        self.wide = score_dtype(regions.dtype)

    def lengths(self) -> Tensor | None:  # [P]
        """The words of each pair, where the host knows them; a pair that names nothing is as long as the padding."""
        if self.pairs.device.type != "cpu" or self.word_counts.device.type != "cpu":
            return None
        image, caption = self.pairs.unbind(1)
        images, captions = self.regions.shape[0], self.words.shape[0]
        named = (image >= 0) & (image < images) & (caption >= 0) & (caption < captions)
        return torch.where(named, self.word_counts[caption.clamp(0, captions - 1)], self.words.shape[1])

    def queries(self) -> tuple[Tensor, Tensor]:  # [G, Q, D], [G, Q] bool
        """Where queries, and what is swapped for them, come from."""
        return (self.words, self.word_valid) if self.options.t2i else (self.regions, self.region_valid)

    def blocks(self, workspace_bytes: int) -> Iterator[PairBlock]:
        """So many pairs at a time that what autograd keeps of them fits the workspace."""
        most, longest, width = self.regions.shape[1], self.words.shape[1], self.regions.shape[2]
        queries, keys = (longest, most) if self.options.t2i else (most, longest)
        # Both sides as they are and narrowed, and their gradients; the Gram matrix; softmax and the three cosines:
        # counted, then seen.
        elements = 7 * (most + longest) * width + 5 * keys * keys
        elements += queries * width * (7 * (self.swapped is not None) + 6 * (self.gate is not None))
        elements += arrays_of(self.options, queries, swaps=self.swapped is not None) * queries * keys
        if self.regions.device.type == "cpu":
            workspace_bytes = min(workspace_bytes, CPU_BLOCK_BYTES)
        pair_bytes = elements * self.wide.itemsize
        return pair_blocks(self.pairs, self.region_valid, self.word_valid, pair_bytes, workspace_bytes, self.lengths())

    def swapped_of(self, block: PairBlock) -> tuple[Tensor, Tensor, Tensor] | None:  # [b, Q] each
        """Rows within range; which of them are asked for; which of those name a fragment."""
        if self.swapped is None:
            return None
        valid = self.queries()[1].flatten()
        rows = self.swapped[block.rows]
        if self.options.t2i:
            rows = rows[:, : block.word_valid.shape[1]]
        within = rows.clamp(0, valid.shape[0] - 1)
        return within, rows != -1, (rows == within) & valid[within]

    def of_queries(self, tensor: Tensor | None, block: PairBlock) -> Tensor | None:  # [P, Q, ...] -> [b, Q, ...]
        """Gate or temperatures of a block, its own copy."""
        if tensor is None:
            return None
        longest = block.word_valid.shape[1] if self.options.t2i else tensor.shape[1]
        return tensor[block.rows][:, :longest].to(self.wide, copy=True)

    def leaves(self, block: PairBlock) -> _Leaves:
        longest = block.word_valid.shape[1]
        regions = self.regions.index_select(0, block.images).to(self.wide)
        words = self.words[:, :longest].index_select(0, block.captions).to(self.wide)
        if not self.all_regions:
            regions.masked_fill_(~block.region_valid[..., None], 0.0)
        words.masked_fill_(~block.word_valid[..., None], 0.0)
        swapped = None
        if (found := self.swapped_of(block)) is not None:
            rows, _, named = found
            side = self.queries()[0]
            if side.is_contiguous():
                swapped = side.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)
            else:  # flattened it would be copied whole
                swapped = side[rows // side.shape[1], rows % side.shape[1]]
            swapped = swapped.to(self.wide).masked_fill_(~named[..., None], 0.0)
        of_pairs = [self.of_queries(t, block) for t in (self.gate, self.temperature)]
        return _Leaves(regions, words, swapped, *of_pairs)

    def terms(self, block: PairBlock, leaves: _Leaves) -> tuple[Tensor, Tensor | None]:  # [b, Q] each
        """Of every query; what is not valid is left in."""
        dtype = self.regions.dtype
        sides = (leaves.words, block.word_valid), (leaves.regions, block.region_valid)
        (queries, query_valid), (keys, key_valid) = sides if self.options.t2i else sides[::-1]
        plain = gated = _products(keys, queries, dtype)
        if leaves.gate is not None:
            of_gate = queries * torch.where(query_valid[..., None], leaves.gate, 1.0)
            gated = _products(keys, of_gate, dtype)
        swapped = norms = None
        if leaves.swapped is not None:
            swapped, norms = _products(keys, leaves.swapped, dtype), lengths_of(leaves.swapped)
        products = Products(plain, gated, swapped, keys @ keys.transpose(1, 2), lengths_of(queries), norms)
        temperature = None if leaves.temperature is None else leaves.temperature[:, None]
        return terms_of_products(products, query_valid[:, None], key_valid[..., None], temperature, self.options)

    def masked(
        self, block: PairBlock, terms: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [b, Q] each
        """Zero where a term is not valid, NaN where an index named nothing; and where they are valid."""
        ccr, ccs = terms
        query_valid, key_valid = block.word_valid, block.region_valid
        if not self.options.t2i:
            query_valid, key_valid = key_valid, query_valid
        nowhere = ~block.named[:, None]
        ccr_valid = query_valid & (key_valid.sum(1, keepdim=True) > 1)
        ccr = torch.where(nowhere, torch.nan, torch.where(ccr_valid, ccr, 0.0))
        found = self.swapped_of(block)
        if ccs is None or found is None:
            ccs, ccs_valid = torch.zeros_like(ccr), torch.zeros_like(query_valid)
        else:
            _, asked, named = found
            ccs_valid = query_valid & asked
            ccs = torch.where(ccs_valid, torch.where(named, ccs, torch.nan), 0.0)
        ccs = torch.where(nowhere, torch.nan, ccs)
        return ccr, ccs, ccr_valid | nowhere, ccs_valid | nowhere


def _products(keys: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:  # [b, K, D], [b, Q, D] -> [b, K, Q]
    # Many small products of a CPU's library run half as fast again where the fewer vectors stand on the left.
    if queries.shape[1] < keys.shape[1]:
        return product(queries, keys.transpose(1, 2), dtype).transpose(1, 2)
    return product(keys, queries.transpose(1, 2), dtype)


def _together(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    gate: Tensor | None,
    temperature: Tensor | None,
    options: ConstraintOptions,
    workspace_bytes: int,
) -> bool:
    """Whether every pair goes through one product: not where that of one group of keys is more than may be held."""
    queries, keys = (words, regions) if options.t2i else (regions, words)
    of_group = bytes_of_group(keys.shape[1], keys.shape[2], queries.shape[:2].numel(), options, regions.dtype)
    # A gate makes other products of every pair; a GPU adds up what is swapped in twice in whatever order.
    alone = gate is None and temperature is None and regions.device.type == "cpu"
    return alone and of_group <= workspace_bytes // 2


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    pairs: Tensor | None,  # [P, 2]
    swapped: Tensor | None,  # [P, Q]
    gate: Tensor | None,  # [P, Q, D]
    temperature: Tensor | None,  # [P, Q]
    options: ConstraintOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [P, Q] each
    """Both terms and where they are valid, block by block."""
    if pairs is None and _together(regions, words, gate, temperature, options, workspace_bytes):
        return AllPairs(regions, words, word_counts, region_counts, swapped, options, workspace_bytes).forward()
    inputs = _Inputs(regions, words, word_counts, region_counts, pairs, swapped, gate, temperature, options)
    shape = inputs.pairs.shape[0], inputs.queries()[0].shape[1]
    made = [regions.new_zeros(shape, dtype=dtype) for dtype in (inputs.wide, inputs.wide, torch.bool, torch.bool)]
    for block in inputs.blocks(workspace_bytes):
        of_block = inputs.masked(block, inputs.terms(block, inputs.leaves(block)))
        for output, rows in zip(made, of_block, strict=True):
            output[block.rows, : rows.shape[1]] = rows
    return made[0], made[1], made[2], made[3]


def backward(
    grad_ccr: Tensor,  # [P, Q]
    grad_ccs: Tensor,  # [P, Q]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor | None,
    swapped: Tensor | None,
    gate: Tensor | None,
    temperature: Tensor | None,
    options: ConstraintOptions,
    *,
    workspace_bytes: int,
) -> tuple[Tensor | None, ...]:  # of regions, words, gate, temperature
    """Gradients, block by block; float32 accumulators for half-precision inputs."""
    if pairs is None and _together(regions, words, gate, temperature, options, workspace_bytes):
        batch = AllPairs(regions, words, word_counts, region_counts, swapped, options, workspace_bytes)
        return (*batch.backward(grad_ccr, grad_ccs), None, None)
    inputs = _Inputs(regions, words, word_counts, region_counts, pairs, swapped, gate, temperature, options)
    given = [regions, words, gate, temperature]
    totals = [None if t is None else torch.zeros(t.shape, dtype=inputs.wide, device=t.device) for t in given]
    of_side = totals[1 if options.t2i else 0]
    assert of_side is not None
    for block in inputs.blocks(workspace_bytes):
        with torch.enable_grad():
            leaves = inputs.leaves(block)
            asked = {name: t for name, t in leaves._asdict().items() if t is not None}
            if options.detach_swapped:
                asked.pop("swapped", None)
            for leaf in asked.values():
                leaf.requires_grad_()
            ccr, ccs, *_ = inputs.masked(block, inputs.terms(block, leaves))
        named, queries = block.named[:, None], ccr.shape[1]
        upstream = [
            torch.where(named, grad[block.rows][:, :queries].to(inputs.wide), 0.0) for grad in (grad_ccr, grad_ccs)
        ]
        outputs = [(ccr, upstream[0])] + ([] if swapped is None else [(ccs, upstream[1])])
        found = torch.autograd.grad(
            [o[0] for o in outputs], list(asked.values()), [o[1] for o in outputs], materialize_grads=True
        )
        grads = dict(zip(asked, found, strict=True))
        places = [block.images, block.captions, block.rows, block.rows]
        for name, total, place in zip(("regions", "words", "gate", "temperature"), totals, places, strict=True):
            if total is not None:
                put(total[:, : grads[name].shape[1]], place, grads[name])
        if "swapped" in grads and (rows := inputs.swapped_of(block)) is not None:
            put(of_side.flatten(0, 1), rows[0].flatten(), grads["swapped"].flatten(0, 1))
    return tuple(
        None if t is None or total is None else total.to(t.dtype) for t, total in zip(given, totals, strict=True)
    )
