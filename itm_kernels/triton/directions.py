"""What kernels are told, by name: one tuple a direction or a side, so that a launch serves one or both.

Triton takes tuples apart when it compiles; a field that is None is not there for the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Direction(NamedTuple):
    """One direction of a block: keys in groups, queries in segments, and what is made of them."""

    products: Any  # [queries, keys] by strides, as `grad_features` and `grad_direct`
    factors: Any  # [segments, num_keys] float32: logit = factor * x
    tops: Any  # [segments, num_keys] float32, of softmax alone
    gram: Any  # [groups, most, most] float32
    query_norms: Any  # [num_queries] float32
    key_offsets: Any  # [groups + 1] int64
    key_counts: Any  # [groups] int64
    key_groups: Any  # [num_keys] int32, -1: padding
    offsets: Any  # [num_segments + 1] int64: rows that belong to a segment, its padding included
    counts: Any  # [num_segments] int64: the valid ones
    segments: Any  # [num_queries] int32, -1: padding
    state: Any  # [planes, groups, num_queries] float32
    num_queries: Any
    num_keys: Any
    groups: Any
    num_segments: Any
    most: Any  # keys of the largest group
    stride_query: Any
    stride_key: Any
    # Of the backward:
    grad_scores: Any = None  # [groups, segments] by strides
    grad_features: Any = None  # gradient at the normalised features (times lambda: at the logits)
    grad_direct: Any = None  # what reaches a product through q . c; in the end dS
    grad_gram: Any = None  # [parts, groups, most, most] float32
    own: Any = None  # [num_queries] float32: what a query takes of itself, dL/d|q| / |q|
    stride_group: Any = None
    stride_segment: Any = None
    parts: Any = None
    tiles: Any = None  # of queries in a part


class Rows(NamedTuple):
    """One side of a block, and what is made of its rows: Gram matrices of groups, norms, or both."""

    rows: Any  # [n, width]
    offsets: Any  # [groups + 1] int64
    counts: Any  # [groups] int64
    grams: Any  # [groups, most, most] float32
    norms: Any  # [n] float32
    groups: Any
    n: Any
    most: Any


class RowGradients(NamedTuple):
    """One side of a block, what its rows get, and where that is added."""

    rows: Any  # [n, width]
    offsets: Any
    counts: Any
    grad_gram: Any  # [groups, most, most] float32
    own: Any  # [n] float32
    product: Any  # [n, width] float32: through the products
    gradient: Any  # [.., width] float32, added to
    groups: Any
    most: Any
    extent: Any  # rows from group to group of the gradient; None: as the block's


class Masks(NamedTuple):
    """Where the dropout masks of a block come from, as kernels take it: numbers in the whole batch, and what a word of
    the generator must reach."""

    first_group: Any
    first_segment: Any
    step: Any
    seed_low: Any  # 32 bits each, as signed numbers
    seed_high: Any
    threshold: Any  # of the upper 24 bits
    scale: Any  # of what is kept
