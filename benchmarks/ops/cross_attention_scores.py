"""``cross_attention_scores``: SCAN in both directions and BFAN, against the loop, the compiler and the bare product.

========================  ==============================================================================================
product                   the library products of the same FLOPs, packed, into memory that is there already: forward one
                          ``[I R, D] x [D, N]``, forward and backward four (S, S again, dV, dT)
reference                 the published loop over captions, differentiated by autograd as published
eager, native, triton     the op on that floor
compile                   ``torch.compile`` of the eager floor's algebra on the padded batch as one differentiable
                          function; ``compile-max-autotune`` in the mode ``max-autotune-no-cudagraphs``
========================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contender import BOTH, FORWARD, PRODUCT, Contender, differentiable
from benchmarks.parity import TOLERANCE, Part, Tolerance
from benchmarks.product import bare_products
from itm_kernels import caption_layout, cross_attention_scores, why_not
from itm_kernels.eager import cross_attention_scores as eager
from itm_kernels.eager.blocks import Side
from itm_kernels.ops.options import ScoreOptions
from itm_kernels.reference import cross_attention_scores as reference

OP = "cross_attention_scores"
METHODS = (PRODUCT, "reference", "eager", "compile", "compile-max-autotune", "native", "triton")

OPTIONS = {
    "t2i": ScoreOptions("t2i", "clipped_l2norm", 9.0, "LogSumExp", 6.0, "none", 0.0),  # SCAN t-i LSE, Flickr30k
    "i2t": ScoreOptions("i2t", "clipped_l2norm", 4.0, "LogSumExp", 5.0, "none", 0.0),  # SCAN i-t LSE, Flickr30k
    "both": ScoreOptions("both", "clipped_l2norm", 20.0, "Mean", 6.0, "equal", 0.0),  # BFAN equal
}
"""As published, by direction."""
DIRECTIONS = tuple(OPTIONS)

COMPILE_MODES = {"compile": "default", "compile-max-autotune": "max-autotune-no-cudagraphs"}
PREPARATION_S = {"compile": 40.0, "compile-max-autotune": 120.0}
"""Guesses of the compiler's time for both phases; they decide whether a run with a deadline still begins."""
MOST_CAPTIONS_OF_LOOP = 1024
"""On a GPU, which the loop leaves idle: it launches some ten kernels a caption, and each works on all images."""
FLIPS = {
    torch.float32: Tolerance(3e-5, 2e-3),
    torch.float16: Tolerance(1e-3, 5e-2),
    torch.bfloat16: Tolerance(4e-3, 0.1),
}
"""Added for BFAN: a key on its threshold may be dropped by one method and kept by another, and both are right."""
# So many images and captions are held against float64, evenly spread, each with all partners.
PARITY_GROUPS = 16
# Partners of those whose graph is kept at a time.
PARITY_CAPTIONS, PARITY_IMAGES = 256, 1024


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> CrossAttentionWorkload:
    return CrossAttentionWorkload(case, direction, dtype, device)


class CrossAttentionWorkload:
    """Inputs and methods of one batch.

    The vectors are of length 1 and random, with a direction that all share and one for each image and its caption, so
    that attention has something to find. Words are padded with zeros as an encoder leaves them, longest caption first.
    """

    definition = staticmethod(reference.forward)
    """What the truth is made with."""

    def __init__(self, case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.direction, self.dtype, self.device = case, direction, dtype, device
        self.options = OPTIONS[direction]
        self.word_counts = case.word_counts
        self.num_words = sum(self.word_counts)
        self.tolerance = TOLERANCE[dtype] + (FLIPS[dtype] if self.options.focal != "none" else Tolerance(0, 0))

        # On the device: the large batches are gigabytes, which a generator of the host takes minutes to fill.
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        shared, topics = normal(1, 1, case.width), normal(max(case.images, case.captions), 1, case.width)
        longest = max(self.word_counts)
        number = torch.arange(longest)
        self.word_valid = (number < torch.tensor(self.word_counts)[:, None]).to(device)  # [C, W]

        def vectors(groups: int, members: int) -> Tensor:  # [groups, members, D]
            own = normal(groups, members, case.width)
            return F.normalize(own.mul_(1.5).add_(shared).add_(topics[:groups]), dim=-1).to(dtype)

        regions = vectors(case.images, case.regions)
        words = vectors(case.captions, longest) * self.word_valid[..., None]
        self.leaves = (regions.requires_grad_(), words.requires_grad_())
        self.grad_scores = normal(case.images, case.captions)

    def flops(self, phase: str) -> int:
        product = 2 * self.case.images * self.case.regions * self.num_words * self.case.width
        return product if phase == FORWARD else 4 * product

    def contender(self, method: str) -> Contender | str:
        if method == PRODUCT:
            return self._product()
        if method in COMPILE_MODES:
            return self._compiled(method)
        if method == "reference":
            if self.device.type == "cuda" and self.case.captions > MOST_CAPTIONS_OF_LOOP:
                return f"the loop is not run on a GPU beyond {MOST_CAPTIONS_OF_LOOP} captions: minutes a round"
            counts = torch.tensor(self.word_counts)
            # The published form keeps the attended vectors, their products with the words and what they came from.
            attended = 4 * self.case.images * self.num_words * self.case.width
            return differentiable(
                method,
                "reference",
                lambda regions, words: reference.forward(regions, words, counts, None, self.options),
                self.leaves,
                self.grad_scores,
                {BOTH: 5 * attended * (2 if self.direction == "both" else 1)},
            )
        reason = why_not(method, OP, self.device, self.dtype)
        return reason or differentiable(method, method, self._op(method), self.leaves, self.grad_scores, {})

    def _op(self, backend: str) -> Callable[..., Tensor]:
        # Made once for a batch, as the part of a program that makes batches does: it sends the counts to the device.
        chosen, layout = self.options, caption_layout(self.word_counts, self.device)
        return lambda regions, words: cross_attention_scores(
            regions,
            words,
            layout,
            direction=chosen.direction,
            raw_feature_norm=chosen.raw_feature_norm,
            lambda_softmax=chosen.lambda_softmax,
            agg_func=chosen.agg_func,
            lambda_lse=chosen.lambda_lse,
            focal=None if chosen.focal == "none" else chosen.focal,
            peak_weight=chosen.peak_weight,
            backend=backend,
        )

    def _product(self) -> Contender:
        with torch.no_grad():
            regions, words = self.leaves
            return bare_products(regions.flatten(0, 1), words[self.word_valid])  # [I R, D], [N, D]

    def _compiled(self, method: str) -> Contender | str:
        mode = COMPILE_MODES[method]
        if mode != "default" and self.device.type == "cpu":
            return "on a CPU its autotuning ends at the library products that the mode default takes at once"
        region_valid = torch.ones(self.leaves[0].shape[:2], dtype=torch.bool, device=self.device)
        word_valid, options = self.word_valid, self.options

        def scores_of(regions: Tensor, words: Tensor) -> Tensor:
            images, captions = Side(regions, region_valid), Side(words, word_valid)
            products = (images.flat() @ captions.flat().t()).float()
            leaves = eager.Leaves(
                products.view(*region_valid.shape, *word_valid.shape),
                images.gram() if options.t2i else None,
                captions.gram() if options.i2t else None,
                images.norms(),
                captions.norms(),
            )
            return eager.scores_of_products(leaves, region_valid, word_valid, options)

        # fullgraph: a graph break or too many recompilations is an error, not a slower baseline.
        compiled = torch.compile(scores_of, mode=mode, fullgraph=True, dynamic=False)
        padded = 4 * region_valid.numel() * word_valid.numel() * (2 if self.direction == "both" else 1)
        needed = {FORWARD: 4 * padded, BOTH: 8 * padded}
        return differentiable(
            method,
            f"inductor, {mode}",
            compiled,
            self.leaves,
            self.grad_scores,
            needed,
            0.0 if self.device.type == "cpu" else PREPARATION_S[method],
        )

    @cached_property
    def _truth(self) -> list[Part]:
        regions, words = (leaf.detach() for leaf in self.leaves)
        rows, columns = (_spread(n).to(self.device) for n in (self.case.images, self.case.captions))
        of_rows, grad_regions = self._truth_of_images(regions[rows].double(), words, self.grad_scores[rows].double())
        of_columns, grad_words = self._truth_of_captions(regions, words, columns)
        return [
            Part("scores of some images", 0, rows, of_rows),
            Part("scores of some captions", 0, (slice(None), columns), of_columns),
            Part("gradients of regions", 1, rows, grad_regions),
            Part("gradients of words", 2, columns, grad_words),
        ]

    def truth(self) -> Sequence[Part]:
        return self._truth

    # Pairs do not see each other, so both go through the batch in groups: what autograd keeps stays small at any size.

    def _truth_of_images(self, regions: Tensor, words: Tensor, grad_scores: Tensor) -> tuple[Tensor, Tensor]:
        regions.requires_grad_()
        scores, grad_regions = [], torch.zeros_like(regions)
        for first in range(0, self.case.captions, PARITY_CAPTIONS):
            some = slice(first, first + PARITY_CAPTIONS)
            counts = torch.tensor(self.word_counts[some])
            scores.append(self.definition(regions, words[some].double(), counts, None, self.options))
            grad_regions += torch.autograd.grad(scores[-1], regions, grad_scores[:, some])[0]
            scores[-1] = scores[-1].detach()
        return torch.cat(scores, dim=1), grad_regions

    def _truth_of_captions(self, regions: Tensor, words: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        scores, grad_words = [], []
        for c in captions.tolist():
            caption, count = words[c : c + 1].double().requires_grad_(), torch.tensor([self.word_counts[c]])
            column, grad = [], torch.zeros_like(caption)
            for first in range(0, self.case.images, PARITY_IMAGES):
                some = slice(first, first + PARITY_IMAGES)
                found = self.definition(regions[some].double(), caption, count, None, self.options)
                grad += torch.autograd.grad(found, caption, self.grad_scores[some, c : c + 1].double())[0]
                column.append(found.detach())
            scores.append(torch.cat(column))
            grad_words.append(grad)
        return torch.cat(scores, dim=1), torch.cat(grad_words)


def _spread(groups: int) -> Tensor:
    """At most ``PARITY_GROUPS`` numbers from 0 to ``groups`` - 1, both ends with them."""
    return torch.linspace(0, groups - 1, min(groups, PARITY_GROUPS)).round().long()
