"""Definition of ``cross_attention``: the attention of one pair after another, by the literal formula.

For a pair with m queries q and n keys k (t2i: words attend to regions; i2t: the reverse), a gate and a temperature:

    s_kq = k . (m_q * q)                               m_q: ones where there is no gate
    z    = raw_feature_norm of s, for each key over the queries                       axis of the queries
    a_kq = softmax over keys of t_q z_kq               t_q: lambda where there are no temperatures
    a    = focal(a)                                                                   BFAN only
    c_q  = sum_k a_kq k

Sources: SCAN (ECCV 2018), BFAN (ACM MM 2019), SGRAF (AAAI 2021) and RCAR (TIP 2023), which alone has gate and
temperatures; norm and focal step with their edge cases are those of ``cross_attention_scores``. Rows of what is no
query and columns of what is no key are zeros. A pair out of range, which only an unread index of a device can be, is
NaN and has no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from itm_kernels.ops.attention_options import AttentionOptions
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.reference.common import counts_on_host
from itm_kernels.reference.cross_attention_scores import feature_norm, focal


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    pairs: Tensor,  # [P, 2]
    gate: Tensor | None,  # [P, Q, D]
    temperature: Tensor | None,  # [P, Q]
    options: AttentionOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
) -> tuple[Tensor, Tensor]:  # [P, Q, K], [P, Q, D]
    """Weights and attended vectors by the literal formula. Differentiable by autograd."""
    wide = score_dtype(regions.dtype)
    regions, words = regions.to(wide), words.to(wide)
    images, most, width = regions.shape
    captions, longest = words.shape[:2]
    of_words = counts_on_host(word_counts, longest)
    of_regions = [most] * images if region_counts is None else counts_on_host(region_counts, most)
    queries, keys = (longest, most) if options.t2i else (most, longest)
    weights, attended = [], []
    for p, (i, c) in enumerate(pairs.tolist()):
        if not (0 <= i < images and 0 <= c < captions):
            weights.append(regions.new_full((queries, keys), torch.nan))
            attended.append(regions.new_full((queries, width), torch.nan))
            continue
        sides = words[c, : of_words[c]], regions[i, : of_regions[i]]
        q, k = sides if options.t2i else sides[::-1]
        own_gate = torch.ones_like(q) if gate is None else gate[p, : len(q)].to(wide)
        own_temperature = options.lambda_softmax if temperature is None else temperature[p, : len(q)].to(wide)
        products = k @ (own_gate * q).t()  # [n, m]
        logits = own_temperature * feature_norm(products[None], options.raw_feature_norm)
        of_keys = torch.softmax(logits, dim=1)  # [1, n, m]
        if options.focal != "none":
            of_keys = focal(of_keys, options.focal)
        of_pair = of_keys[0].t()  # [m, n]
        beyond = queries - len(q)
        weights.append(F.pad(of_pair, (0, keys - len(k), 0, beyond)))
        attended.append(F.pad(of_pair @ k, (0, 0, 0, beyond)))
    return torch.stack(weights), torch.stack(attended)


def backward(
    grad_weights: Tensor,  # [P, Q, K]
    grad_attended: Tensor,  # [P, Q, D]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor,
    gate: Tensor | None,
    temperature: Tensor | None,
    options: AttentionOptions,
    *,
    workspace_bytes: int | None = None,
) -> tuple[Tensor | None, ...]:  # of regions, words, gate, temperature
    """Gradients of ``sum(weights * grad_weights) + sum(attended * grad_attended)`` by autograd of the formula."""
    given = [regions, words, gate, temperature]
    wide = score_dtype(regions.dtype)

    def leaf(tensor: Tensor) -> Tensor:  # in the dtype of the outputs: a gradient is rounded once, at its end
        return tensor.detach().to(wide, copy=True).requires_grad_()

    with torch.enable_grad():
        sides = leaf(regions), leaf(words)
        of_gate, of_temperature = (None if t is None else leaf(t) for t in (gate, temperature))
        outputs = forward(*sides, word_counts, region_counts, pairs, of_gate, of_temperature, options)
    asked = [t for t in (*sides, of_gate, of_temperature) if t is not None]
    if not outputs[0].requires_grad:  # every pair is out of range
        return tuple(None if t is None else torch.zeros_like(t).contiguous() for t in given)
    upstream = [grad_weights.to(wide), grad_attended.to(wide)]
    found = iter(torch.autograd.grad(outputs, asked, upstream, materialize_grads=True))
    return tuple(None if t is None else next(found).to(t.dtype).contiguous() for t in given)
