"""RCAR's scorer: attention and pooling of alignments with recurrent regulators."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from itm_kernels.backends import check_backend
from itm_kernels.layout import CaptionLayout
from itm_kernels.nn.linear import check_widths, dropout_seed, linear, stacked, stacked_heads
from itm_kernels.ops.attention_states import AttentionState, attention_states
from itm_kernels.ops.options import (
    WORKSPACE_BYTES,
    RegulatedOptions,
    check_regulated_options,
    check_workspace_bytes,
    number,
    whole,
)
from itm_kernels.ops.parameters import (
    AggregationParameters,
    AlignmentParameters,
    CorrespondenceParameters,
    RegulatedParameters,
    ScoreParameters,
)
from itm_kernels.ops.regulated_scores import OP, regulated_scores

TEMPERATURES = {"t2i": 10.0, "i2t": 3.0}
"""Published first temperatures."""
DROPOUT = 0.4
"""Published dropout of RAR."""


class Alignment(nn.Module):
    """Parameters of one alignment stage."""

    def __init__(self, embed_dim: int, sim_dim: int) -> None:
        super().__init__()
        self.sim_transform_w = linear(embed_dim, sim_dim)


class CorrespondenceRegulator(nn.Module):
    """Parameters of one RCR stage: two small networks on alignment vectors."""

    def __init__(self, embed_dim: int, sim_dim: int) -> None:
        super().__init__()
        self.rcr_smooth_w = nn.Sequential(linear(sim_dim, sim_dim // 2), nn.Tanh(), linear(sim_dim // 2, 1))
        self.rcr_matrix_w = nn.Sequential(linear(sim_dim, sim_dim * 2), nn.Tanh(), linear(sim_dim * 2, embed_dim))


class AggregationRegulator(nn.Module):
    """Parameters of one RAR stage; its activations and dropouts run inside the op."""

    def __init__(self, sim_dim: int) -> None:
        super().__init__()
        self.rar_q_w = nn.Sequential(linear(sim_dim, sim_dim))
        self.rar_k_w = nn.Sequential(linear(sim_dim, sim_dim))
        self.rar_v_w = nn.Sequential(linear(sim_dim, 1))


class RegulatedScorer(nn.Module):
    """Scores of every image against every caption by RCAR; options as in :func:`itm_kernels.regulated_scores`.

    ``scorer(regions [I, R, D], words [C, W, D] or [N, D], word_counts [C]) -> [I, C]``

    Parameters
    ----------
    embed_dim, sim_dim
        Joint width D and similarity width S (even).
    direction, regulator, steps
        ``"t2i"`` or ``"i2t"``; ``"rcr"``, ``"rar"`` or ``"rcar"``; regulation steps.
    temperature
        First inverse temperature; None: the published 10 for t2i, 3 for i2t.
    dropout
        Probability of RAR's dropouts in training mode; None: the published 0.4, and 0 for ``"rcr"``, which has none.

    Notes
    -----
    State-dict keys are those of the published ``sim_enc``; ``sim_eval_w`` is there with ``"rcr"`` too and unused (for
    ``DistributedDataParallel`` an unused parameter). In training mode every call draws a seed for its masks from
    torch's default generator of the host, unless ``seed`` is given.
    """

    def __init__(
        self,
        embed_dim: int,
        sim_dim: int = 256,
        *,
        direction: str = "t2i",
        regulator: str = "rcar",
        steps: int = 2,
        temperature: float | None = None,
        dropout: float | None = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_widths("RegulatedScorer", embed_dim=embed_dim, sim_dim=sim_dim)
        if sim_dim % 2:
            raise ValueError(f"RegulatedScorer: sim_dim must be even, half of it is a width of RCR; got {sim_dim}")
        check_workspace_bytes(OP, workspace_bytes)
        check_backend(OP, backend)
        first = TEMPERATURES.get(direction, 1.0) if temperature is None else temperature
        if dropout is None:
            dropout = 0.0 if regulator == "rcr" else DROPOUT
        options = RegulatedOptions(
            direction,
            regulator,
            whole(OP, "steps", steps),
            number(OP, "temperature", first),
            number(OP, "dropout", dropout),
            0,
            0,
            0,
        )
        check_regulated_options(OP, options)
        self.direction = direction
        self.regulator = regulator
        self.steps = steps
        self.temperature = options.temperature
        self.dropout = options.dropout
        self.workspace_bytes = workspace_bytes
        self.backend = backend
        self.sim_eval_w = linear(sim_dim, 1)
        self.rar_modules = nn.ModuleList(AggregationRegulator(sim_dim) for _ in range(options.aggregations))
        self.rcr_modules = nn.ModuleList(
            CorrespondenceRegulator(embed_dim, sim_dim) for _ in range(options.corrections)
        )
        self.alv_modules = nn.ModuleList(Alignment(embed_dim, sim_dim) for _ in range(options.alignments))

    def parameters_of_stages(self) -> RegulatedParameters:
        """The parameters as the op takes them."""
        alignment = correspondence = aggregation = score = None
        if len(self.alv_modules):
            alignment = AlignmentParameters(*stacked(self.alv_modules, "sim_transform_w"))
        if len(self.rcr_modules):
            correspondence = CorrespondenceParameters(
                *stacked(self.rcr_modules, "rcr_matrix_w.0"),
                *stacked(self.rcr_modules, "rcr_matrix_w.2"),
                *stacked(self.rcr_modules, "rcr_smooth_w.0"),
                *stacked_heads(self.rcr_modules, "rcr_smooth_w.2"),
            )
        if len(self.rar_modules):
            aggregation = AggregationParameters(
                *stacked(self.rar_modules, "rar_k_w.0"),
                *stacked(self.rar_modules, "rar_q_w.0"),
                *stacked_heads(self.rar_modules, "rar_v_w.0"),
            )
        if self.regulator != "rcr":
            score = ScoreParameters(self.sim_eval_w.weight[0], self.sim_eval_w.bias)
        return RegulatedParameters(alignment, correspondence, aggregation, score)

    def forward(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
        *,
        region_counts: Sequence[int] | Tensor | None = None,  # [I]
        image_offset: int = 0,
        caption_offset: int = 0,
        seed: int | Tensor | None = None,
    ) -> Tensor:  # [I, C]
        dropout = self.dropout if self.training else 0.0
        if seed is None:
            seed = dropout_seed() if dropout else 0
        return regulated_scores(
            regions,
            words,
            word_counts,
            self.parameters_of_stages(),
            region_counts=region_counts,
            direction=self.direction,
            regulator=self.regulator,
            steps=self.steps,
            temperature=self.temperature,
            dropout=dropout,
            seed=seed,
            image_offset=image_offset,
            caption_offset=caption_offset,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

    def attention_states(
        self,
        regions: Tensor,  # [I, R, D]
        words: Tensor,  # [C, W, D] or [N, D]
        word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
        pairs: Tensor,  # [P, 2]: image, caption
        *,
        region_counts: Sequence[int] | Tensor | None = None,  # [I]
    ) -> list[AttentionState]:
        """Gate, temperature and weights of every attention of these pairs, first to last."""
        options = RegulatedOptions(self.direction, self.regulator, self.steps, self.temperature, 0.0, 0, 0, 0)
        return attention_states(
            regions, words, word_counts, pairs, self.parameters_of_stages(), options, region_counts=region_counts
        )

    def extra_repr(self) -> str:
        shown = ["direction", "regulator", "steps", "temperature", "dropout"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
