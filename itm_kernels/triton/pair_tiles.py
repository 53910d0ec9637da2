"""Tiles of the kernels of RCAR and SGRAF: fixed, for these stream memory and hold little. Chosen by compiling alone."""

from __future__ import annotations

# Attention: along queries, which are contiguous, two warps' worth; 36 regions cost 48 keys. 32 keys at once spill.
QUERIES, KEYS = 64, 16
# A pair: as many queries as most captions have words.
SEGMENT_QUERIES, SEGMENT_KEYS = 16, 64
# Rows of full width, in slices of 256 bytes or more.
ROWS, WIDTH = 16, 128
# Where the gradients of a query's rows meet, and those of a bias over rows: few parts are left to add up.
SUM_ROWS, SUM_WIDTH = 16, 64
GATED_ROWS = 8  # likewise, of a kernel that holds more of each: 16 spill
# Pooling: rows at once, queries of a pair, channels of a vector.
POOLED_ROWS, POOLED_QUERIES, CHANNELS = 16, 16, 64
# Whole pairs: rows of the other side at once, of the owner's one row.
WHOLE_ROWS = 16
# The graph: nodes of a pair at once, the least a matrix instruction takes and as many as most captions make, and
# channels of a sum over nodes.
GRAPH_NODES, GRAPH_CHANNELS = 16, 64
# Nodes whose weights are made at once, one a thread.
WEIGHTS = 128


def over(count: int, at_once: int) -> int:
    """How many tiles."""
    return -(-count // at_once)


def filtration_tile(width: int) -> tuple[int, int]:
    """Nodes at once and channels, all of them, which is what lets a pair's sum stay in registers: 16 of each thread."""
    channels = 1 << max(width - 1, 15).bit_length()
    return max(min(16, 2048 // channels), 1), channels


def edge_channels(element_bytes: int) -> int:
    """Channels at once of an inner product of nodes: 128 bytes of a row, more spill."""
    return 128 // element_bytes
