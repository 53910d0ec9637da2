"""The scorer that a configuration names, with the options that it takes."""

from __future__ import annotations

from torch import nn

from itm_kernels.nn import (
    AttentionFiltrationScorer,
    CrossAttentionScorer,
    RegulatedScorer,
    SimilarityGraphScorer,
)
from itm_pipeline.config import Backend, ModelConfig


def make_scorer(config: ModelConfig, num_regions: int, workspace_bytes: int, backend: Backend) -> nn.Module:
    """A module that is called `scorer(regions [I, R, D], words [C, W, D], word_counts [C]) -> [I, C]`.

    Parameters
    ----------
    config
        `scorer` and the options that `itm_pipeline.config.SCORER_OPTIONS` names for it; `embed_dim`.
    num_regions
        Regions R of an image. SGRAF's scorers have parameters for each place among the regions.
    workspace_bytes, backend
        As in :class:`itm_pipeline.models.MatchingModel`.
    """
    floor = None if backend == "auto" else backend
    if config.scorer == "cross_attention":
        return CrossAttentionScorer(
            direction=config.direction,
            raw_feature_norm=config.raw_feature_norm,
            lambda_softmax=config.lambda_softmax,
            agg_func=config.agg_func,
            lambda_lse=config.lambda_lse,
            focal=config.focal,
            workspace_bytes=workspace_bytes,
            backend=floor,
        )
    if config.scorer == "regulated":
        return RegulatedScorer(
            config.embed_dim,
            config.sim_dim,
            direction=config.direction,
            regulator=config.regulator,
            steps=config.regulator_steps,
            temperature=config.temperature,
            # RCR alone has no dropout; another value than the option's default is refused with it.
            dropout=0.0 if config.regulator == "rcr" else config.scorer_dropout,
            workspace_bytes=workspace_bytes,
            backend=floor,
        )
    if config.scorer == "attention_filtration":
        return AttentionFiltrationScorer(
            config.embed_dim,
            config.sim_dim,
            num_regions=num_regions,
            dropout=config.scorer_dropout,
            workspace_bytes=workspace_bytes,
            backend=floor,
        )
    return SimilarityGraphScorer(
        config.embed_dim,
        config.sim_dim,
        steps=config.graph_steps,
        num_regions=num_regions,
        dropout=config.scorer_dropout,
        workspace_bytes=workspace_bytes,
        backend=floor,
    )
