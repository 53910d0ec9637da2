"""Definition of ``attention_filtration``: SAF, the nodes of a pair weighed one by one.

With the nodes N_i of a pair (the global alignment, then one for each word), z normalised over the batch:

    z_i = w . N_i + b
    y_i = (z_i - mean) / sqrt(variance + eps_bn) * weight + bias       BatchNorm1d(1)
    t_i = sigmoid(y_i)
    a_i = t_i / (sum_i t_i + eps)
    f   = l2norm(sum_i a_i N_i)

The published loop runs the normalisation once a caption: in training mean and variance (biased) are those of the
I (n + 1) numbers z of this caption with all images, and the gradient flows through them. In evaluation they are the
running buffers.

Source: Diao et al., "Similarity Reasoning and Filtration for Image-Text Matching", AAAI 2021, with its published code.

Edges: b moves no z that the batch normalises, its gradient is zero in training. All z alike: variance 0, y = bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.ops.parameters import FiltrationParameters
from itm_kernels.ops.stage_options import FiltrationOptions
from itm_kernels.reference.common import EPS, l2norm, nodes_of_captions, stage_gradients, wide, widened


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def node_logits(nodes: Tensor, parameters: FiltrationParameters) -> Tensor:  # [B, nodes, S] -> [B, nodes]
    """``z``, before the normalisation."""
    return nodes @ parameters.weight + parameters.bias


def statistics_of(logits: Tensor) -> Tensor:  # [I, nodes] -> [2]
    """Mean and biased variance over a caption's logits with all images."""
    return torch.stack([logits.mean(), logits.var(unbiased=False)])


def filter_nodes(
    nodes: Tensor,  # [B, nodes, S]
    logits: Tensor,  # [B, nodes]
    statistics: Tensor,  # [2]
    parameters: FiltrationParameters,
    eps: float,  # of the normalisation
) -> Tensor:  # [B, S]
    """Filtered nodes of B pairs."""
    mean, variance = statistics
    normalised = (logits - mean) / (variance + eps).sqrt() * parameters.norm_weight + parameters.norm_bias
    chances = torch.sigmoid(normalised)
    weights = chances / (chances.sum(1, keepdim=True) + EPS)
    return l2norm((weights.unsqueeze(2) * nodes).sum(1))


def forward(
    alignments: Tensor,  # [I, C, W, S] or [I, N, S]
    global_alignments: Tensor,  # [I, C, S]
    word_counts: Tensor,  # [C]
    parameters: FiltrationParameters,
    statistics: Tensor | None,  # [2, C] means and biased variances; None where the batch's own count
    options: FiltrationOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> tuple[Tensor, Tensor]:  # [I, C, S], [2, C]
    """Filtered alignments of all pairs by the literal formula, and the statistics that normalised."""
    rounded = [wide(tensor, alignments.dtype) for tensor in _there(parameters)]
    features = widened([alignments, global_alignments], alignments.dtype)
    return _filtered(features, word_counts, FiltrationParameters(*rounded), statistics, options)


def backward(
    grad: Tensor,  # [I, C, S]
    alignments: Tensor,
    global_alignments: Tensor,
    word_counts: Tensor,
    parameters: FiltrationParameters,
    statistics: Tensor | None,
    options: FiltrationOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, FiltrationParameters]:
    """Gradients of ``sum(filtered * grad)`` by autograd of the literal formula.

    Statistics of the batch are computed again: autograd differentiates through them. Those of evaluation are constants.
    """

    def function(features: list[Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return _filtered(features, word_counts, FiltrationParameters(*tensors), statistics, options)[:1]

    (of_alignments, of_global), of_parameters = stage_gradients(
        function, [alignments, global_alignments], _there(parameters), (grad,), alignments.dtype
    )
    assert of_alignments is not None
    assert of_global is not None
    return of_alignments, of_global, FiltrationParameters(*of_parameters)


def _there(parameters: FiltrationParameters) -> list[Tensor]:
    assert parameters.norm_weight is not None, "the op has filled it in"
    assert parameters.norm_bias is not None, "likewise"
    return [parameters.weight, parameters.bias, parameters.norm_weight, parameters.norm_bias]


def _filtered(
    features: list[Tensor | None],
    word_counts: Tensor,
    parameters: FiltrationParameters,
    statistics: Tensor | None,
    options: FiltrationOptions,
) -> tuple[Tensor, Tensor]:
    columns, used = [], []
    for c, nodes in enumerate(nodes_of_captions(features, word_counts)):
        logits = node_logits(nodes, parameters)
        if options.training:
            normalising = statistics_of(logits)
        else:
            assert statistics is not None, "evaluation normalises with the running statistics"
            normalising = statistics[:, c].to(nodes.dtype)
        columns.append(filter_nodes(nodes, logits, normalising, parameters, options.eps))
        used.append(normalising.detach())
    return torch.stack(columns, dim=1), torch.stack(used, dim=1)
