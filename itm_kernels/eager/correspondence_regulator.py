"""RCR on a block of pairs, in plain PyTorch: the gate and the temperature of the next attention."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from itm_kernels.eager.alignment_vectors import Block
from itm_kernels.eager.blocks import Batch, Side
from itm_kernels.eager.norms import linear, product
from itm_kernels.eager.stage_blocks import Place, accumulators, differentiate, places, zeros_of
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.ops.parameters import CorrespondenceParameters
from itm_kernels.ops.stage_options import CorrespondenceOptions


def regulate(
    alignments: Tensor,  # [H, G, Q, S]
    gate: Tensor | None,  # [H, G, Q, D]; None: ones
    temperature: float | Tensor,  # or [H, G, Q]
    parameters: CorrespondenceParameters,
    step: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # gate [H, G, Q, D], temperature [H, G, Q]
    """``clamp(tanh(MLP(x)) + gate, -1, 1)`` and ``relu(MLP(x) + temperature)``."""
    hidden = hidden_layer(alignments, parameters, step, dtype)
    warmer = next_temperature(alignments, temperature, parameters, step, dtype)
    return next_gate(hidden, gate, parameters, step, dtype), warmer


def hidden_layer(
    alignments: Tensor, parameters: CorrespondenceParameters, step: int, dtype: torch.dtype
) -> Tensor:  # [H, G, Q, S] -> [H, G, Q, hidden]
    """Of the network that makes the gate."""
    return torch.tanh(linear(alignments, parameters.hidden_weight[step], parameters.hidden_bias[step], dtype))


def next_gate(
    hidden: Tensor,  # [H, G, Q, hidden]
    gate: Tensor | None,  # [H, G, Q, D]; None: ones
    parameters: CorrespondenceParameters,
    step: int,
    dtype: torch.dtype,
) -> Tensor:  # [H, G, Q, D]
    """From the gate before and the hidden layer of this step."""
    change = torch.tanh(linear(hidden, parameters.gate_weight[step], parameters.gate_bias[step], dtype))
    return (change + (1.0 if gate is None else gate)).clamp(-1, 1)


def next_temperature(
    alignments: Tensor,  # [H, G, Q, S]
    temperature: float | Tensor,  # or [H, G, Q]
    parameters: CorrespondenceParameters,
    step: int,
    dtype: torch.dtype,
) -> Tensor:  # [H, G, Q]
    """Of every query."""
    of_step = CorrespondenceParameters(*(tensor[step] for tensor in parameters))
    narrow = torch.tanh(linear(alignments, of_step.temperature_hidden_weight, of_step.temperature_hidden_bias, dtype))
    return torch.relu(narrow @ of_step.temperature_weight + of_step.temperature_bias + temperature)


def gated_products(block: Block, gate: Tensor) -> Tensor:  # [H, G, Q, D] -> [H, K, G, Q]
    """Inner products of every key and every gated query."""
    gated = (block.queries.vectors * gate).flatten(1, 2)  # [H, G Q, D]
    flat = product(block.keys.vectors, gated.transpose(1, 2), block.dtype)
    products: Tensor = flat.unflatten(2, block.queries.valid.shape)
    return products


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


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
    workspace_bytes: int,
    word_offsets: Tensor | None = None,  # [C + 1]
) -> tuple[Tensor, Tensor, Tensor]:  # [I, R, C, W] or [I, R, N]; as temperatures; [..., H]
    """Attention scores, temperatures and hidden layer, block by block."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    parameters = CorrespondenceParameters(*(tensor.to(wide) for tensor in parameters))
    queries = alignments.shape[:-1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=wide, device=regions.device)

    scores = zeros(*regions.shape[:2], *words.shape[:-1])
    warmer, layer = zeros(*queries), zeros(*queries, parameters.hidden_bias.shape[1])
    for place in places(batch, options.t2i, _query_bytes(batch, parameters, options), workspace_bytes):
        made = _state_of_block(place, options, dtype, *_inputs(place, alignments, hidden, temperatures), *parameters)
        place.put_products(scores, made[0])
        place.put_queries(warmer, made[1])
        place.put_queries(layer, made[2])
    return scores, warmer, layer


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
    workspace_bytes: int,
    word_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, CorrespondenceParameters, Tensor | None, Tensor | None]:
    """Gradients, block by block; wide accumulators."""
    batch = Batch(regions, words, word_counts, word_offsets, region_counts)
    wide, dtype = score_dtype(regions.dtype), regions.dtype
    widened = CorrespondenceParameters(*(tensor.to(wide) for tensor in parameters))
    of_regions, of_words, *of_parameters = accumulators([regions, words, *widened])
    of_alignments = zeros_of(alignments)
    of_hidden = None if hidden is None else zeros_of(hidden)
    of_temperatures = None if temperatures is None else zeros_of(temperatures)
    for place in places(batch, options.t2i, _query_bytes(batch, widened, options), workspace_bytes):
        inputs = [*_inputs(place, alignments, hidden, temperatures), *widened]
        upstream = [place.products(grad_scores), place.queries(grad_temperatures), place.queries(grad_hidden)]
        found = differentiate(partial(_state_of_block, place, options, dtype), inputs, upstream)
        place.put_queries(of_alignments, found[0])
        place.add_sides(of_regions, of_words, found[1], found[2])
        if of_temperatures is not None:
            place.put_queries(of_temperatures, found[3])
        if of_hidden is not None:
            for total, layer in zip(of_hidden, found[4], strict=True):
                place.put_queries(total, layer)
        for total, grad in zip(of_parameters, found[5:], strict=True):
            total += grad
    narrowed = (total.to(tensor.dtype) for total, tensor in zip(of_parameters, parameters, strict=True))
    of_inputs = of_alignments, of_regions.to(dtype), of_words.to(dtype)
    return *of_inputs, CorrespondenceParameters(*narrowed), of_hidden, of_temperatures


def _inputs(
    place: Place, alignments: Tensor, hidden: Tensor | None, temperatures: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What a block depends on beside parameters."""
    layers = None if hidden is None else torch.stack([place.queries(layer) for layer in hidden])
    sides = place.images.vectors, place.captions.vectors
    return place.queries(alignments), *sides, place.queries(temperatures), layers


def _state_of_block(
    place: Place,
    options: CorrespondenceOptions,
    dtype: torch.dtype,
    alignments: Tensor,  # [H, G, Q, S]
    regions: Tensor,  # [i, R, D]
    words: Tensor,  # [c, w, D]
    temperatures: Tensor | None,  # [H, G, Q]
    hidden: Tensor | None,  # [steps before, H, G, Q, hidden]
    *tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # [H, K, G, Q], [H, G, Q], [H, G, Q, hidden]
    parameters, step = CorrespondenceParameters(*tensors), options.step
    sides = Side(words, place.captions.valid), Side(regions, place.images.valid)
    block = Block(*sides, dtype) if options.t2i else Block(sides[1], sides[0], dtype)
    layer = hidden_layer(alignments, parameters, step, dtype)
    gate: Tensor | None = None  # ones
    for earlier in range(step):
        assert hidden is not None
        gate = next_gate(hidden[earlier], gate, parameters, earlier, dtype)
    gate = next_gate(layer, gate, parameters, step, dtype)
    first = options.temperature if temperatures is None else temperatures
    warmer = next_temperature(alignments, first, parameters, step, dtype)
    valid = block.queries.valid
    layer, warmer = torch.where(valid[..., None], layer, 0.0), torch.where(valid, warmer, 0.0)
    return gated_products(block, gate), warmer, layer


def _query_bytes(batch: Batch, parameters: CorrespondenceParameters, options: CorrespondenceOptions) -> int:
    """What autograd keeps for one query of one pair, and its gradients on their way."""
    keys, width = max(batch.regions.shape[1], *batch.lengths), batch.regions.shape[2]
    hidden, narrow = parameters.hidden_weight.shape[1:]
    elements: int = (options.step + 1) * (6 * width + 3 * hidden) + 4 * width + 4 * keys + 4 * narrow
    return elements * parameters.hidden_weight.element_size()
