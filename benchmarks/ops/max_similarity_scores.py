"""``max_similarity_scores``: late interaction and CHAN, against the loop, the compiler, the bare product and peers.

========================  ==============================================================================================
product                   the library products of the same FLOPs, packed, into memory that is there already: forward one
                          ``[I R, D] x [D, N]``, forward and backward four (S, S again, dV, dT)
reference                 a loop over captions, differentiated by autograd
eager, native, triton     the op on that floor
compile                   ``torch.compile`` of products, maximum and aggregation of the padded batch as one
                          differentiable function; ``compile-max-autotune`` in the mode ``max-autotune-no-cudagraphs``
flash-maxsim              the PyPI package of that name, its batched training function (Sum)
late-interaction-kernels  likewise, its ``maxsim`` (Sum)
========================  ==============================================================================================

The peers take padded batches and sum over the queries: words are queries in t2i, regions in i2t.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contender import BOTH, FORWARD, PRODUCT, Contender, differentiable
from benchmarks.ops.cross_attention_scores import (
    COMPILE_MODES,
    MOST_CAPTIONS_OF_LOOP,
    PREPARATION_S,
    CrossAttentionWorkload,
)
from benchmarks.parity import TOLERANCE, Tolerance
from itm_kernels import max_similarity_scores, why_not
from itm_kernels.eager import max_similarity_scores as eager
from itm_kernels.ops.options import SimilarityOptions
from itm_kernels.reference import max_similarity_scores as reference

OP = "max_similarity_scores"
PEERS = {"flash-maxsim": "flash_maxsim", "late-interaction-kernels": "late_interaction_kernels"}
"""Method, which is the package's name -> module."""
METHODS = (PRODUCT, "reference", "eager", "compile", "compile-max-autotune", "native", "triton", *PEERS)

OPTIONS = {
    "t2i": SimilarityOptions("t2i", "Sum", 10.0),  # ColBERT, ColPali
    "i2t": SimilarityOptions("i2t", "Sum", 10.0),
}
DIRECTIONS = tuple(OPTIONS)

SWAPS = {
    torch.float32: Tolerance(0, 2e-3),
    torch.float16: Tolerance(1e-4, 0.15),
    torch.bfloat16: Tolerance(1e-3, 0.35),
}
"""Added for the arg-max: of two keys closer than rounding one method takes the first and another the second, and a
gradient goes elsewhere. Library products come back rounded to half precision: of these vectors, one query in 22 then
has another key with bfloat16, one in 160 with float16."""


def workload(case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> MaxSimilarityWorkload:
    return MaxSimilarityWorkload(case, direction, dtype, device)


class MaxSimilarityWorkload(CrossAttentionWorkload):
    """Inputs and truth as for cross attention, with the options, the definition and the methods of this op."""

    definition = staticmethod(reference.forward)  # type: ignore[assignment]

    def __init__(self, case: Case, direction: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(case, direction, dtype, device)
        self.options: SimilarityOptions = OPTIONS[direction]  # type: ignore[assignment]
        self.tolerance = TOLERANCE[dtype] + SWAPS[dtype]

    def contender(self, method: str) -> Contender | str:
        if method == PRODUCT:
            return self._product()
        if method in COMPILE_MODES:
            return self._compiled(method)
        if method in PEERS:
            return self._peer(method)
        if method == "reference":
            if self.device.type == "cuda" and self.case.captions > MOST_CAPTIONS_OF_LOOP:
                return f"the loop is not run on a GPU beyond {MOST_CAPTIONS_OF_LOOP} captions: minutes a round"
            counts = torch.tensor(self.word_counts)
            products = 4 * self.case.images * self.case.regions * self.num_words
            return differentiable(
                method,
                "reference",
                lambda regions, words: reference.forward(regions, words, counts, None, self.options),
                self.leaves,
                self.grad_scores,
                {BOTH: 2 * products},
            )
        reason = why_not(method, OP, self.device, self.dtype)
        return reason or differentiable(method, method, self._op(method), self.leaves, self.grad_scores, {})

    def _op(self, backend: str) -> Callable[..., Tensor]:
        chosen = self.options
        return lambda regions, words: max_similarity_scores(
            regions,
            words,
            self.word_counts,
            direction=chosen.direction,
            agg_func=chosen.agg_func,
            lambda_lse=chosen.lambda_lse,
            backend=backend,
        )

    def _compiled(self, method: str) -> Contender | str:
        mode = COMPILE_MODES[method]
        if mode != "default" and self.device.type == "cpu":
            return "on a CPU its autotuning ends at the library products that the mode default takes at once"
        region_valid = torch.ones(self.leaves[0].shape[:2], dtype=torch.bool, device=self.device)
        word_valid, options = self.word_valid, self.options

        def scores_of(regions: Tensor, words: Tensor) -> Tensor:
            products = (regions.flatten(0, 1) @ words.flatten(0, 1).t()).float()
            products = products.view(*region_valid.shape, *word_valid.shape)
            if options.t2i:
                return eager.aggregate(products.amax(1), word_valid, options)
            masked = products.masked_fill(~word_valid, -torch.inf).amax(3)  # [I, R, C]
            return eager.aggregate(masked.transpose(1, 2), region_valid[:, None], options)

        # fullgraph: a graph break or too many recompilations is an error, not a slower baseline.
        compiled = torch.compile(scores_of, mode=mode, fullgraph=True, dynamic=False)
        padded = 4 * region_valid.numel() * word_valid.numel()
        return differentiable(
            method,
            f"inductor, {mode}",
            compiled,
            self.leaves,
            self.grad_scores,
            {FORWARD: 2 * padded, BOTH: 4 * padded},
            0.0 if self.device.type == "cpu" else PREPARATION_S[method],
        )

    def _peer(self, method: str) -> Contender | str:
        if self.device.type != "cuda":
            return f"{method} is measured on CUDA, where its kernels run"
        if method == "flash-maxsim" and self.dtype == torch.float32:
            return "flash-maxsim computes in float16; float32 would not be compared at its precision"
        if importlib.util.find_spec(PEERS[method]) is None:
            return f"{method} is not installed"
        try:
            peer = importlib.import_module(PEERS[method])
        except ImportError as error:
            return f"{method} does not import: {error}"
        score = (self._flash_maxsim if method == "flash-maxsim" else self._late_interaction)(peer)
        return differentiable(method, f"{method} {peer.__version__}", score, self.leaves, self.grad_scores, {})

    def _flash_maxsim(self, peer: Any) -> Callable[..., Tensor]:
        lengths = torch.tensor(self.word_counts, device=self.device, dtype=torch.int32)
        if self.options.t2i:
            return lambda regions, words: peer.flash_maxsim_batched_train(words, regions, query_lengths=lengths).t()
        return lambda regions, words: peer.flash_maxsim_batched_train(regions, words, doc_lengths=lengths)

    def _late_interaction(self, peer: Any) -> Callable[..., Tensor]:
        valid = self.word_valid
        # Its own choice may give float32 gradients the precision of float16.
        way = "unified" if self.dtype == torch.float32 else None
        if self.options.t2i:
            return lambda regions, words: peer.maxsim(words, regions, q_mask=valid, backward=way).t()
        return lambda regions, words: peer.maxsim(regions, words, d_mask=valid, backward=way)
