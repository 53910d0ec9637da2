"""Definition of ``correspondence_regulator``: RCR, how the next attention shall ask.

For each alignment vector x_i of a pair, from the gate M_i and the temperature t_i of this step those of the next:

    M_i' = clamp(tanh(W2 tanh(W1 x_i + b1) + b2) + M_i, -1, 1)           S -> H -> D, published H = 2 S
    t_i' = relu(U2 tanh(U1 x_i + c1) + c2 + t_i)                         S -> U -> 1, published U = S / 2

Source: Diao et al., "Plug-and-Play Regulators for Image-Text Matching", TIP 2023, with its published code.

Edges: the first gate is 1 and so starts on the clamp's own edge: where the tanh is positive M' = 1 and nothing passes
back, where it is exactly zero the gradient passes, as torch.clamp has it. A temperature that falls to 0 stays there
until a later step lifts it; relu passes nothing at 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions
from itm_kernels.reference.common import (
    at_step,
    captions_of,
    counted_regions,
    joined_captions,
    stage_gradients,
    wide,
    widened,
    words_of_captions,
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def regulate(
    vectors: Tensor,  # [B, Q, S]
    gate: Tensor | None,  # [B, Q, D]; None: ones
    temperature: Tensor | float,  # [B, Q], or one for all
    parameters: CorrespondenceParameters,  # of one step
) -> tuple[Tensor, Tensor]:  # [B, Q, D], [B, Q]
    """Gate and temperature of the next step."""
    hidden = hidden_layer(vectors, parameters)
    return next_gate(hidden, gate, parameters), next_temperature(vectors, temperature, parameters)


def hidden_layer(vectors: Tensor, parameters: CorrespondenceParameters) -> Tensor:  # [..., S] -> [..., H]
    """Of the network that makes the gate."""
    return torch.tanh(F.linear(vectors, parameters.hidden_weight, parameters.hidden_bias))


def next_gate(
    hidden: Tensor, gate: Tensor | None, parameters: CorrespondenceParameters
) -> Tensor:  # [..., H], [..., D] -> [..., D]
    """``M'``; a gate of None is ones."""
    change = torch.tanh(F.linear(hidden, parameters.gate_weight, parameters.gate_bias))
    return (change + (1.0 if gate is None else gate)).clamp(-1.0, 1.0)


def next_temperature(
    vectors: Tensor, temperature: Tensor | float, parameters: CorrespondenceParameters
) -> Tensor:  # [..., S], [...] -> [...]
    """``t'``."""
    p = parameters
    hidden = torch.tanh(F.linear(vectors, p.temperature_hidden_weight, p.temperature_hidden_bias))
    return torch.relu(hidden @ p.temperature_weight + p.temperature_bias + temperature)


def forward(
    alignments: Tensor,  # t2i [I, C, W, S] or [I, N, S], i2t [I, R, C, S]
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D] or [N, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    parameters: CorrespondenceParameters,  # of all steps
    hidden: Tensor | None,  # [steps before, ..., H], ... the axes of queries; None: this is the first
    temperatures: Tensor | None,  # t2i [I, C, W] or [I, N], i2t [I, R, C]; None: that of the options
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
    word_offsets: Tensor | None = None,  # [C + 1]; it reads the counts
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [..., H]
    """Attention scores, temperatures and hidden layer by the literal formula; zeros for what does not count."""
    rounded = CorrespondenceParameters(*(wide(tensor, regions.dtype) for tensor in parameters))
    features = widened([alignments, regions, words, hidden, temperatures], regions.dtype)
    return _state(features, word_counts, region_counts, rounded, options)


def backward(
    grad_scores: Tensor,
    grad_temperatures: Tensor,
    grad_hidden: Tensor,
    alignments: Tensor,
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: CorrespondenceParameters,
    hidden: Tensor | None,
    temperatures: Tensor | None,
    options: CorrespondenceOptions,
    *,
    workspace_bytes: int | None = None,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients of the three outputs, each times its upstream gradient, by autograd of the literal formula."""

    def function(features: list[Tensor | None], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return _state(features, word_counts, region_counts, CorrespondenceParameters(*tensors), options)

    (of_alignments, of_regions, of_words, *of_state), of_parameters = stage_gradients(
        function,
        [alignments, regions, words, hidden, temperatures],
        list(parameters),
        (grad_scores, grad_temperatures, grad_hidden),
        regions.dtype,
    )
    assert of_alignments is not None
    assert of_regions is not None
    assert of_words is not None
    parameter_grads = CorrespondenceParameters(*of_parameters)
    return of_alignments, of_regions, of_words, parameter_grads, of_state[0], of_state[1]


def _state(
    features: list[Tensor | None],
    word_counts: Tensor,
    region_counts: Tensor | None,
    parameters: CorrespondenceParameters,
    options: CorrespondenceOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    alignments, regions, words, hidden, temperatures = features
    assert alignments is not None
    assert regions is not None
    assert words is not None
    padded = words.dim() == 3
    counted = counted_regions(regions, region_counts)  # [I, R]
    regions = torch.where(counted[..., None], regions, 0.0)

    def by_caption(tensor: Tensor, axis: int) -> list[Tensor]:  # the axis of words (t2i), or that of captions
        return words_of_captions(tensor, axis, word_counts, padded) if options.t2i else list(tensor.unbind(axis + 1))

    of_queries = by_caption(alignments, 1)  # t2i [I, n, S], i2t [I, R, S]
    before = [] if hidden is None else [by_caption(layer, 1) for layer in hidden]
    all_scores, all_temperatures, all_hidden = [], [], []
    for c, caption in enumerate(captions_of(words, word_counts)):
        vectors = of_queries[c]
        queries = caption if options.t2i else regions  # [n, D] or [I, R, D]
        if not options.t2i:
            vectors = torch.where(counted[..., None], vectors, 0.0)
        layer = hidden_layer(vectors, at_step(parameters, options.step))
        gate: Tensor | None = None  # ones
        for step, earlier in enumerate([*(layers[c] for layers in before), layer]):
            if not options.t2i:
                earlier = torch.where(counted[..., None], earlier, 0.0)
            gate = next_gate(earlier, gate, at_step(parameters, step))
        assert gate is not None
        temperature: Tensor | float = options.temperature
        if temperatures is not None:
            temperature = by_caption(temperatures, 1)[c]
        warmer = next_temperature(vectors, temperature, at_step(parameters, options.step))
        gated = queries * gate  # [I, n, D] or [I, R, D]
        scores = regions @ gated.transpose(1, 2) if options.t2i else gated @ caption.t()  # [I, R, n]
        if not options.t2i:
            warmer = torch.where(counted, warmer, 0.0)
            layer = torch.where(counted[..., None], layer, 0.0)
        all_scores.append(torch.where(counted[..., None], scores, 0.0))
        all_temperatures.append(warmer)
        all_hidden.append(layer)
    longest = words.shape[1] if padded else None
    scores = joined_captions(all_scores, 2, longest)
    if options.t2i:
        return scores, joined_captions(all_temperatures, 1, longest), joined_captions(all_hidden, 1, longest)
    return scores, torch.stack(all_temperatures, dim=2), torch.stack(all_hidden, dim=2)
