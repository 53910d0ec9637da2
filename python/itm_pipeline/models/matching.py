"""The matching model: encoders and scorer under one roof."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from itm_pipeline.config import Backend, ModelConfig, sgraf
from itm_pipeline.models.encoders import ImageEncoder, TextEncoder
from itm_pipeline.models.scorers import make_scorer

WordCounts = Sequence[int] | Tensor


class MatchingModel(nn.Module):
    """Scores of every image against every caption.

    Parameters
    ----------
    config
        Widths, and the options of encoders and scorer.
    feature_dim
        Width F of the stored region features.
    vocab_size
        Number of words of the vocabulary.
    num_regions
        Regions R of an image. SGRAF's scorers score images of so many alone, the others images of any number.
    workspace_bytes
        Bound on the memory that the scores work in.
    backend
        Which floor of the op runs; "auto" takes the fastest that can.

    Attributes
    ----------
    img_enc, txt_enc, sim_enc
        Encoders and scorer; their state dicts have the published names. SCAN's and BFAN's scorer has no parameters.
    region_slots
        The one number of regions that the model can score, or None where any will do.
    """

    def __init__(
        self,
        config: ModelConfig,
        feature_dim: int,
        vocab_size: int,
        *,
        num_regions: int = 36,
        workspace_bytes: int = 256 * 2**20,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.feature_dim = feature_dim
        self.vocab_size = vocab_size
        self.region_slots = num_regions if sgraf(config) else None
        self.img_enc = ImageEncoder(feature_dim, config.embed_dim, mlp=config.region_encoder == "mlp")
        self.txt_enc = TextEncoder(
            vocab_size,
            config.word_dim,
            config.embed_dim,
            dropout=config.word_dropout,
            gru_name="cap_rnn" if sgraf(config) else "rnn",
        )
        self.sim_enc = make_scorer(config, num_regions, workspace_bytes, backend)

    def encode_images(
        self,
        features: Tensor,  # [I, R, F]
    ) -> Tensor:  # [I, R, D]
        """Regions in the joint space."""
        regions: Tensor = self.img_enc(features)
        return regions

    def encode_captions(
        self,
        tokens: Tensor,  # [C, W] int64, zero padded
        word_counts: WordCounts,  # [C] on the host
    ) -> Tensor:  # [C, W, D]
        """Words in the joint space; zeros where a caption has ended."""
        words: Tensor = self.txt_enc(tokens, word_counts)
        return words

    def score(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D]
        word_counts: WordCounts,  # [C]
    ) -> Tensor:  # [I, C]
        """Similarity of every image and every caption."""
        scores: Tensor = self.sim_enc(regions, words, word_counts)
        return scores

    def forward(
        self,
        features: Tensor,  # [I, R, F]
        tokens: Tensor,  # [C, W]
        word_counts: WordCounts,  # [C]
    ) -> Tensor:  # [I, C]
        """Encode both sides and score every pair."""
        return self.score(self.encode_images(features), self.encode_captions(tokens, word_counts), word_counts)
