"""Draws the fragments that CCS swaps in: words or regions of another image, uniformly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from itm_kernels.layout import CaptionLayout, check_counts, host_counts, offsets_of
from itm_kernels.ops.options import whole

_ROUNDS = 4
"""Draws that may be refused before the candidates of what is left are listed; two suffice for nearly all."""


def swapped_words(
    tokens: Tensor,  # [C, W] int64
    word_counts: Sequence[int] | Tensor | CaptionLayout,  # [C]
    image_groups: Sequence[int] | Tensor,  # [C]
    *,
    special: Sequence[int] = (),
    packed: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a word of another image's caption for every word of a batch.

    Parameters
    ----------
    tokens
        ``[C, W]`` int64 token ids on the host; what stands in the padding is never used.
    word_counts
        ``[C]`` words of each caption, 1..W, on the host.
    image_groups
        ``[C]`` which image each caption belongs to, as any numbers: captions with the same number share an image.
    special
        Token ids that are never drawn: start and end.
    packed
        Name words by their rows in packed words ``[N, D]``; otherwise by ``c W + w``, their rows in padded ones.
    generator
        Of the draw, on the host; None: torch's own.

    Returns
    -------
    Tensor
        ``[C, W]`` int64 on the host, what :func:`attention_constraints` takes as ``swapped`` of a square batch with
        direction t2i (of other pairs: its rows by their captions). Drawn uniformly from the words of the captions of
        other images that have another token id and no special one; -1 where there is none, and in the padding.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit, or are not on the host.
    """
    op = "swapped_words"
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        raise TypeError(f"{op}: tokens must be an int64 tensor, got {_kind(tokens)}")
    if tokens.dim() != 2:
        raise ValueError(f"{op}: tokens must be [C, W], got {list(tokens.shape)}")
    captions, longest = tokens.shape
    counts = _host_counts(op, "word_counts", word_counts, captions, longest)
    groups = _groups(op, image_groups, captions)
    if not isinstance(special, Iterable) or not all(isinstance(token, int) for token in special):
        raise TypeError(f"{op}: special must be token ids, got {special!r}")
    if tokens.device.type != "cpu":
        raise ValueError(f"{op}: tokens must be on the host, got a tensor on {tokens.device}")
    valid = torch.arange(longest, device="cpu") < counts[:, None]
    caption, word = valid.nonzero().unbind(1)  # [N]
    token, group = tokens[caption, word], groups[caption]
    row = offsets_of(counts)[caption] + word if packed else caption * longest + word
    drawable = (~torch.isin(token, torch.tensor(list(special), dtype=torch.int64, device="cpu"))).nonzero()[:, 0]

    def fits(query: Tensor, candidate: Tensor) -> Tensor:
        return (group[query] != group[candidate]) & (token[query] != token[candidate])

    made = torch.full((captions, longest), -1, dtype=torch.int64, device="cpu")
    made[valid] = _draw(row, drawable, fits, generator)
    return made


def swapped_regions(
    image_groups: Sequence[int] | Tensor,  # [I]
    regions: int,
    *,
    region_counts: Sequence[int] | Tensor | None = None,  # [I]
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a region of another image for every region of a batch.

    Parameters
    ----------
    image_groups
        ``[I]`` which image each row is, as any numbers: rows with the same number are one image.
    regions
        R, regions of an image in the batch.
    region_counts
        ``[I]`` valid regions of each image, 1..R, on the host; None: all.
    generator
        Of the draw, on the host; None: torch's own.

    Returns
    -------
    Tensor
        ``[I, R]`` int64 on the host: rows ``i R + r`` of the regions, what :func:`attention_constraints` takes as
        ``swapped`` of a square batch with direction i2t. Drawn uniformly from the valid regions of other images; -1
        where there is none, and in the padding.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit, or are not on the host.
    """
    op = "swapped_regions"
    if whole(op, "regions", regions) < 1:
        raise ValueError(f"{op}: regions must be at least 1, got {regions}")
    groups = _groups(op, image_groups, None)
    images = groups.shape[0]
    counts = torch.full((images,), regions, device="cpu")
    if region_counts is not None:
        counts = _host_counts(op, "region_counts", region_counts, images, regions)
    valid = torch.arange(regions, device="cpu") < counts[:, None]
    image, region = valid.nonzero().unbind(1)
    group = groups[image]

    def fits(query: Tensor, candidate: Tensor) -> Tensor:
        return group[query] != group[candidate]

    made = torch.full((images, regions), -1, dtype=torch.int64, device="cpu")
    made[valid] = _draw(image * regions + region, torch.arange(len(image), device="cpu"), fits, generator)
    return made


def _draw(
    rows: Tensor,  # [N]
    drawable: Tensor,  # [M] positions among the N
    fits: Callable[[Tensor, Tensor], Tensor],  # positions of queries and of candidates -> bool
    generator: torch.Generator | None,
) -> Tensor:  # [N]
    """For each of N fragments the row of one that fits, uniformly; -1 where none does."""
    made = torch.full_like(rows, -1)
    if not len(drawable):
        return made
    left = torch.arange(len(rows), device="cpu")
    for _ in range(_ROUNDS):  # what is refused is drawn again: uniform over what fits
        found = drawable[torch.randint(len(drawable), (len(left),), generator=generator, device="cpu")]
        good = fits(left, found)
        made[left[good]] = rows[found[good]]
        left = left[~good]
    # Few are left, or nothing fits them.
    for part in left.split(max(1, 2**22 // len(drawable))):
        allowed = fits(part[:, None], drawable[None])  # [n, M]
        number = allowed.sum(1)
        # The u-th of those that fit, u drawn below their number: float64 is fine for any number of words.
        u = torch.rand(len(part), generator=generator, dtype=torch.float64, device="cpu")
        u = (u * number).long().clamp(max=number - 1)
        place = (allowed.cumsum(1) <= u[:, None]).sum(1).clamp(max=len(drawable) - 1)
        made[part] = torch.where(number > 0, rows[drawable[place]], -1)
    return made


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _host_counts(
    op: str, name: str, given: Sequence[int] | Tensor | CaptionLayout, groups: int, most: int
) -> Tensor:  # [groups]
    counts = host_counts(op, name, given)
    if counts.device.type != "cpu":
        raise ValueError(f"{op}: {name} must be on the host, got a tensor on {counts.device}")
    if counts.shape[0] != groups:
        raise ValueError(f"{op}: {name} must be [{groups}], got [{counts.shape[0]}]")
    check_counts(op, name, counts, most)
    return counts


def _groups(op: str, image_groups: Sequence[int] | Tensor, number: int | None) -> Tensor:
    groups = host_counts(op, "image_groups", image_groups)
    if groups.device.type != "cpu":
        raise ValueError(f"{op}: image_groups must be on the host, got a tensor on {groups.device}")
    if number is not None and groups.shape[0] != number:
        raise ValueError(f"{op}: image_groups must be [{number}], got [{groups.shape[0]}]")
    return groups
