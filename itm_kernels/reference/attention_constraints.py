"""Definition of ``attention_constraints``: one pair after another, one swapped query after another.

For a pair with queries q_i and n keys k_j (t2i: words attend to regions; i2t: the reverse), the attention weights w_ij
of ``cross_attention`` (its gate and temperature with them), and R(x, y) = (x . y) / max(|x| |y|, eps):

    a_i    = sum_j w_ij k_j
    a^_i   = sum_j (1 - w_ij) k_j / (n - 1)                           what the query ignores; n > 1
    ccr_i  = max(0, ccr_margin - R(q_i, a_i) + R(q_i, a^_i))
    ccs_i  = max(0, ccs_margin - R(q_i, a_i) + R(q~_i, a_i))          swap = "query"
    ccs_i  = max(0, ccs_margin - R(q_i, a_i) + R(q_i, a~_i))          swap = "content"

q~_i is the swapped fragment; a~_i is what it attends to where it takes the place of q_i among the queries of the pair.
A gate multiplies the queries within the attention alone. eps = 1e-8; on that floor no gradient flows into the norms,
and a hinge at exactly zero has none either.

Source: Chen et al., "More Than Just Attention" (WACV 2023), equations only: there is no code, this is our reading.
One key: no CCR. No swapped fragment (-1): no CCS. Terms that are not valid are zero. Vectors of zeros have cosine 0. A
pair or a swapped row out of range, or a row of the padding, which only an unread index of a device can be, is NaN,
counted as valid, and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from itm_kernels.ops.constraint_options import ConstraintOptions, every_pair
from itm_kernels.ops.pairs import score_dtype
from itm_kernels.reference.common import EPS, counts_on_host, filled, norm
from itm_kernels.reference.cross_attention_scores import feature_norm, focal


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    regions: Tensor,  # [I, R, D]
    words: Tensor,  # [C, W, D]
    word_counts: Tensor,  # [C]
    region_counts: Tensor | None,  # [I]
    pairs: Tensor | None,  # [P, 2]; None: every image with every caption
    swapped: Tensor | None,  # [P, Q]
    gate: Tensor | None,  # [P, Q, D]
    temperature: Tensor | None,  # [P, Q]
    options: ConstraintOptions,
    *,
    workspace_bytes: int | None = None,  # the definition is not cut into blocks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [P, Q] each
    """Both terms and where they are valid, by the literal formula. Differentiable by autograd."""
    wide = score_dtype(regions.dtype)
    pairs = every_pair(regions, words) if pairs is None else pairs
    regions, words = regions.to(wide), words.to(wide)
    of_words = counts_on_host(word_counts, words.shape[1])
    most = regions.shape[1]
    of_regions = [most] * regions.shape[0] if region_counts is None else counts_on_host(region_counts, most)
    side, of_side = (words, of_words) if options.t2i else (regions, of_regions)
    queries = side.shape[1]
    ccr, ccs = [], []
    ccr_valid, ccs_valid = (torch.zeros(len(pairs), queries, dtype=torch.bool) for _ in range(2))
    for p, (i, c) in enumerate(pairs.tolist()):
        if not (0 <= i < regions.shape[0] and 0 <= c < words.shape[0]):
            ccr.append(regions.new_full((queries,), torch.nan))
            ccs.append(regions.new_full((queries,), torch.nan))
            ccr_valid[p] = ccs_valid[p] = True
            continue
        of_pair = words[c, : of_words[c]], regions[i, : of_regions[i]]
        q, k = of_pair if options.t2i else of_pair[::-1]  # [m, D], [n, D]
        own_gate = torch.ones_like(q) if gate is None else gate[p, : len(q)].to(wide)
        own_temperature = options.lambda_softmax if temperature is None else temperature[p, : len(q)].to(wide)
        weights = _weights(own_gate * q, k, own_temperature, options)  # [m, n]
        attended = weights @ k
        own = _cosine(q, attended)  # [m]
        of_ccr = torch.zeros_like(own)
        if len(k) > 1:
            ignored = ((1 - weights) / (len(k) - 1)) @ k
            of_ccr = torch.relu(options.ccr_margin - own + _cosine(q, ignored))
            ccr_valid[p, : len(q)] = True
        ccr.append(filled(of_ccr, 0, queries))
        of_ccs = []
        for m, row in enumerate([-1] * len(q) if swapped is None else swapped[p, : len(q)].tolist()):
            if row == -1:
                of_ccs.append(own.new_zeros(()))
                continue
            ccs_valid[p, m] = True
            if not 0 <= row < side.shape[0] * queries or row % queries >= of_side[row // queries]:
                of_ccs.append(own.new_full((), torch.nan))
                continue
            other = side[row // queries, row % queries]
            other = other.detach() if options.detach_swapped else other
            if options.swap == "query":
                rival = _cosine(other, attended[m])
            else:
                instead = torch.cat([q[:m], other[None], q[m + 1 :]])
                rival = _cosine(q[m], _weights(instead, k, own_temperature, options)[m] @ k)
            of_ccs.append(torch.relu(options.ccs_margin - own[m] + rival))
        ccs.append(filled(torch.stack(of_ccs), 0, queries))
    valid = ccr_valid.to(regions.device), ccs_valid.to(regions.device)
    return torch.stack(ccr), torch.stack(ccs), *valid


def backward(
    grad_ccr: Tensor,  # [P, Q]
    grad_ccs: Tensor,  # [P, Q]
    regions: Tensor,
    words: Tensor,
    word_counts: Tensor,
    region_counts: Tensor | None,
    pairs: Tensor | None,
    swapped: Tensor | None,
    gate: Tensor | None,
    temperature: Tensor | None,
    options: ConstraintOptions,
    *,
    workspace_bytes: int | None = None,
) -> tuple[Tensor | None, ...]:  # of regions, words, gate, temperature
    """Gradients of ``sum(ccr * grad_ccr) + sum(ccs * grad_ccs)`` by autograd of the formula."""
    given = [regions, words, gate, temperature]
    wide = score_dtype(regions.dtype)
    with torch.enable_grad():
        # In the dtype of the outputs: a gradient is rounded once, at its end.
        leaves = [None if t is None else t.detach().to(wide, copy=True).requires_grad_() for t in given]
        sides, of_pairs = leaves[:2], leaves[2:]
        assert sides[0] is not None
        assert sides[1] is not None
        ccr, ccs, *_ = forward(
            sides[0], sides[1], word_counts, region_counts, pairs, swapped, of_pairs[0], of_pairs[1], options
        )
    outputs = [(terms, grad.to(wide)) for terms, grad in ((ccr, grad_ccr), (ccs, grad_ccs)) if terms.requires_grad]
    if not outputs:  # every pair is out of range, or has one key and nothing swapped
        return tuple(None if t is None else torch.zeros_like(t).contiguous() for t in given)
    asked = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([o[0] for o in outputs], asked, [o[1] for o in outputs], materialize_grads=True))
    return tuple(None if t is None else next(found).to(t.dtype).contiguous() for t in given)


def _weights(
    q: Tensor, k: Tensor, temperature: Tensor | float, options: ConstraintOptions
) -> Tensor:  # [m, D], [n, D] -> [m, n]
    products = (k @ q.t())[None]  # [1, n, m]
    weights = torch.softmax(temperature * feature_norm(products, options.raw_feature_norm), dim=1)
    if options.focal != "none":
        weights = focal(weights, options.focal)
    return weights[0].t()


def _cosine(x: Tensor, y: Tensor) -> Tensor:  # [..., D] -> [...]
    return (x * y).sum(-1) / (norm(x) * norm(y)).clamp(min=EPS)
