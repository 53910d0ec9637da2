"""CCR and CCS beside the hinge loss (Chen et al., "More Than Just Attention", WACV 2023; our reading of the paper).

Both look at matched pairs alone, in each direction that the model attends in:

    loss = hinge + ccr * sum over pairs of the mean over queries of CCR's terms + ccs * the same of CCS's

The hinge is a sum over the batch; a mean over pairs beside it would do next to nothing (`--constraint-reduction mean`).
What is swapped in is a pure function of the seed and the step, so a run that is resumed anywhere draws the same. RCAR
is constrained in its last attention, whose gate and temperatures are made again for the matched pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from itm_kernels import attention_constraints, swapped_regions, swapped_words, why_not
from itm_kernels.nn import CrossAttentionScorer, RegulatedScorer
from itm_pipeline.config import TrainConfig
from itm_pipeline.data import Batch, Vocabulary
from itm_pipeline.data.vocabulary import END, START
from itm_pipeline.errors import UserError

OP = "attention_constraints"


class Constraints:
    """The constraint losses of a run.

    Parameters
    ----------
    config
        Options of the run.
    vocabulary
        Says which ids are start and end.
    device
        Where the model lives.

    Raises
    ------
    UserError
        A forced backend that has no kernels for them.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, device: torch.device) -> None:
        self.options, self.seed = config.constraints, config.seed
        self.ends = [vocabulary.id_of(START), vocabulary.id_of(END)]
        if config.backend != "auto" and (reason := why_not(config.backend, OP, device, torch.float32)):
            raise UserError(f"--backend {config.backend} cannot run --ccr and --ccs: {reason}")

    def act(self, epoch: int) -> bool:
        """Whether they count in this epoch, counted from 0."""
        return epoch >= self.options.constraint_warmup_epochs

    def loss(
        self,
        scorer: nn.Module,
        regions: Tensor,  # [B, R, D]
        words: Tensor,  # [B, W, D]
        batch: Batch,
        step: int,
    ) -> Tensor:
        """Both losses of a batch, weighted and added up."""
        total = torch.zeros((), device=regions.device)
        for number, direction in enumerate(directions(scorer)):
            terms = attention_constraints(
                regions,
                words,
                batch.word_counts,
                direction=direction,
                **_attention(scorer, regions, words, batch),
                swapped=self._swapped(direction, regions.shape[1], batch, step, number),
                swap=self.options.ccs_swap,
                detach_swapped=self.options.detach_swapped,
                ccr_margin=self.options.ccr_margin,
                ccs_margin=self.options.ccs_margin,
                workspace_bytes=scorer.workspace_bytes,  # type: ignore[arg-type]
                backend=scorer.backend,  # type: ignore[arg-type]
            )
            total = total + self.options.ccr * self._reduced(terms.ccr, terms.ccr_valid)
            total = total + self.options.ccs * self._reduced(terms.ccs, terms.ccs_valid)
        return total

    def _swapped(self, direction: str, regions: int, batch: Batch, step: int, number: int) -> Tensor | None:
        if not self.options.ccs:
            return None
        # A spawn key keeps apart from what else is drawn from the seed.
        seed = np.random.SeedSequence([self.seed, step], spawn_key=(number,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0] >> np.uint64(1)))
        if direction == "t2i":
            return swapped_words(
                batch.tokens, batch.word_counts, batch.image_index, special=self.ends, generator=generator
            )
        return swapped_regions(batch.image_index, regions, generator=generator)

    def _reduced(self, terms: Tensor, valid: Tensor) -> Tensor:  # [B, Q], [B, Q] -> []
        """Mean over the valid queries of a pair, then over pairs as the option says."""
        queries = valid.sum(1)
        total = (terms.sum(1) / queries.clamp(min=1)).sum()
        return total if self.options.constraint_reduction == "sum" else total / (queries > 0).sum().clamp(min=1)


def directions(scorer: nn.Module) -> tuple[str, ...]:
    """In which directions a scorer attends: SGRAF's in one."""
    direction = getattr(scorer, "direction", "t2i")
    return ("t2i", "i2t") if direction == "both" else (direction,)


def _attention(scorer: nn.Module, regions: Tensor, words: Tensor, batch: Batch) -> dict[str, Any]:
    """The options of a scorer's attention, of its last where it has several."""
    if isinstance(scorer, CrossAttentionScorer):
        return {name: getattr(scorer, name) for name in ("raw_feature_norm", "lambda_softmax", "focal")}
    if not isinstance(scorer, RegulatedScorer):
        return {}  # SGRAF's are the defaults
    matched = torch.arange(len(batch))[:, None].repeat(1, 2)
    last = scorer.attention_states(regions, words, batch.word_counts, matched)[-1]
    return {"gate": last.gate, "temperature": last.temperature}
