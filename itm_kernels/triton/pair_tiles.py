"""Tiles of RCAR's kernels: fixed, for these stream memory and hold little. Chosen by compiling, not tuned yet."""

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
