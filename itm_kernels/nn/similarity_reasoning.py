"""SGRAF's two scorers, trained separately: SAF (attention filtration) and SGR (similarity graph)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from itm_kernels.backends import check_backend
from itm_kernels.layout import CaptionLayout, padded_words
from itm_kernels.nn.global_alignment import TextSelfAttention, VisualSelfAttention
from itm_kernels.nn.linear import check_widths, linear, stacked
from itm_kernels.ops.options import WORKSPACE_BYTES, check_workspace_bytes, number
from itm_kernels.ops.pairs import check_count_values, check_pairs
from itm_kernels.ops.parameters import (
    AlignmentParameters,
    FiltrationParameters,
    GraphParameters,
    ReasoningParameters,
    ScoreParameters,
)
from itm_kernels.ops.similarity_reasoning_scores import similarity_reasoning_scores

WordCounts = Sequence[int] | Tensor | CaptionLayout


class AttentionFiltration(nn.Module):
    """Parameters of SAF, and the buffers of its batch normalisation."""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.attn_sim_w = linear(sim_dim, 1)
        self.bn = nn.BatchNorm1d(1)


class GraphReasoning(nn.Module):
    """Parameters of one step of SGR."""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.graph_query_w = linear(sim_dim, sim_dim)
        self.graph_key_w = linear(sim_dim, sim_dim)
        self.sim_graph_w = linear(sim_dim, sim_dim)


class SimilarityReasoningScorer(nn.Module):
    """Both scorers of SGRAF: global alignment, similarity vectors, reasoning, the last linear layer.

    ``scorer(regions [I, R, D], words [C, W, D] or [N, D], word_counts [C]) -> [I, C]``

    Parameters
    ----------
    embed_dim, sim_dim
        Joint width D and similarity width S.
    reasoning, steps
        ``"SAF"``, or ``"SGR"`` with so many steps, each with weights of its own.
    num_regions
        Regions R of every image (a batch normalisation has a channel for each).
    dropout
        Probability of the dropouts in the global alignment in training mode.

    Notes
    -----
    State-dict keys are those of the published ``sim_enc``.
    """

    def __init__(
        self,
        embed_dim: int,
        sim_dim: int,
        *,
        reasoning: str,
        steps: int,
        num_regions: int,
        dropout: float,
        workspace_bytes: int,
        backend: str | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_widths(name, embed_dim=embed_dim, sim_dim=sim_dim, num_regions=num_regions)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"{name}: steps must be a whole number, got {steps!r}")
        if steps < 0:
            raise ValueError(f"{name}: steps must be at least 0, got {steps}")
        if not 0 <= number(name, "dropout", dropout) < 1:
            raise ValueError(f"{name}: dropout must be within [0, 1), got {dropout}")
        check_workspace_bytes(name, workspace_bytes)
        check_backend(name, backend)
        self.num_regions = num_regions
        self.reasoning = reasoning
        self.steps = steps
        self.workspace_bytes = workspace_bytes
        self.backend = backend
        self.v_global_w = VisualSelfAttention(embed_dim, num_regions, dropout)
        self.t_global_w = TextSelfAttention(embed_dim, dropout)
        self.sim_tranloc_w = linear(embed_dim, sim_dim)
        self.sim_tranglo_w = linear(embed_dim, sim_dim)
        self.sim_eval_w = linear(sim_dim, 1)
        if reasoning == "SAF":
            self.SAF_module = AttentionFiltration(sim_dim)
        else:
            self.SGR_module = nn.ModuleList(GraphReasoning(sim_dim) for _ in range(steps))

    def parameters_of_stages(self) -> ReasoningParameters:
        """The parameters as the op takes them."""
        filtration = graph = None
        if self.reasoning == "SAF":
            layer = self.SAF_module.attn_sim_w
            filtration = FiltrationParameters(layer.weight[0], layer.bias)
        elif self.steps:
            parts = ("graph_query_w", "graph_key_w", "sim_graph_w")
            graph = GraphParameters(*(tensor for part in parts for tensor in stacked(self.SGR_module, part)))
        return ReasoningParameters(
            AlignmentParameters(*stacked([self], "sim_tranloc_w")),
            AlignmentParameters(*stacked([self], "sim_tranglo_w")),
            filtration,
            graph,
            ScoreParameters(self.sim_eval_w.weight[0], self.sim_eval_w.bias),
        )

    def globals(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: WordCounts,  # [C]
    ) -> tuple[Tensor, Tensor]:  # [I, D], [C, D]
        """The global vector of every image and every caption, in the dtype of the inputs."""
        dtype = regions.dtype
        if not torch.is_autocast_enabled(regions.device.type):
            # Half precision beside float32 parameters: once per image and caption, so at their precision.
            wide = self.sim_tranglo_w.weight.dtype
            regions, words = regions.to(wide), words.to(wide)
        of_images = self.v_global_w(regions)
        return of_images.to(dtype), self.t_global_w(*padded_words(words, word_counts)).to(dtype)

    def forward(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: WordCounts,  # [C]
        *,
        region_counts: None = None,
    ) -> Tensor:  # [I, C]
        # Before the global alignment, whose batch normalisation writes to its buffers.
        self._check(regions, words, word_counts, region_counts)
        saf = self.reasoning == "SAF"
        return similarity_reasoning_scores(
            regions,
            words,
            word_counts,
            *self.globals(regions, words, word_counts),
            self.parameters_of_stages(),
            reasoning=self.reasoning,
            steps=None if saf else self.steps,
            batch_norm=self._batch_norm() if saf else None,
            training=self.SAF_module.bn.training if saf else False,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

    def _batch_norm(self) -> tuple[Any, ...]:
        norm = self.SAF_module.bn
        if isinstance(norm, nn.SyncBatchNorm):
            raise NotImplementedError(
                f"{type(self).__name__}: SAF_module.bn must be a BatchNorm1d: statistics over several ranks are not in "
                "this version"
            )
        buffers = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        return (norm.weight, norm.bias, *buffers, norm.momentum, norm.eps)

    def _check(self, regions: Tensor, words: Tensor, word_counts: WordCounts, region_counts: object) -> None:
        name = type(self).__name__
        if region_counts is not None:
            raise ValueError(
                f"{name}: region_counts must be None: the batch normalisation over regions has a channel for every "
                "region and needs them all"
            )
        counts, _, _ = check_pairs(name, regions, words, word_counts, None)
        width = self.sim_tranglo_w.in_features
        if list(regions.shape[1:]) != [self.num_regions, width]:
            raise ValueError(
                f"{name}: regions must be [I, R, D] with R = {self.num_regions} and D = {width}, got "
                f"{list(regions.shape)}"
            )
        if not torch.compiler.is_compiling():  # there are no values yet; the op looks at them
            check_count_values(name, regions, words, counts, None)

    def extra_repr(self) -> str:
        return f"reasoning={self.reasoning!r}" + ("" if self.reasoning == "SAF" else f", steps={self.steps}")


class AttentionFiltrationScorer(SimilarityReasoningScorer):
    """Scores of every image against every caption by SGRAF's SAF, as in :func:`similarity_reasoning_scores`.

    ``scorer(regions [I, R, D], words [C, W, D] or [N, D], word_counts [C]) -> [I, C]``

    Parameters
    ----------
    embed_dim, sim_dim
        Joint width D and similarity width S.
    num_regions
        Regions R of every image (a batch normalisation has a channel for each).
    dropout
        Probability of the dropouts in the global alignment in training mode.

    Notes
    -----
    State-dict keys are those of the published ``sim_enc``. In training mode the batch normalisation of the attention
    (``SAF_module.bn``) takes the statistics of each caption by itself and updates its buffers once per caption, in
    their order.
    """

    def __init__(
        self,
        embed_dim: int,
        sim_dim: int = 256,
        *,
        num_regions: int = 36,
        dropout: float = 0.4,
        workspace_bytes: int = WORKSPACE_BYTES,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            sim_dim,
            reasoning="SAF",
            steps=0,
            num_regions=num_regions,
            dropout=dropout,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )


class SimilarityGraphScorer(SimilarityReasoningScorer):
    """Scores of every image against every caption by SGRAF's SGR; arguments as :class:`AttentionFiltrationScorer`.

    Parameters
    ----------
    steps
        Reasoning steps, each with weights of its own.
    """

    def __init__(
        self,
        embed_dim: int,
        sim_dim: int = 256,
        *,
        steps: int = 3,
        num_regions: int = 36,
        dropout: float = 0.4,
        workspace_bytes: int = WORKSPACE_BYTES,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            sim_dim,
            reasoning="SGR",
            steps=steps,
            num_regions=num_regions,
            dropout=dropout,
            workspace_bytes=workspace_bytes,
            backend=backend,
        )
