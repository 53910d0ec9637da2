# mypy: ignore-errors
# The bodies are Triton's language: what looks like Python to a type checker is not.
"""A step of the similarity graph: attention among the nodes x_k of a pair, between two library products.

    asking u_i = y_i + shift       e_ik = softmax_k(u_i . x_k)       gathered h_i = sum_k e_ik x_k
    de_ik = dh_i . x_k      dp_ik = e_ik (de_ik - sum_k e_ik de_ik)      du_i = sum_k dp_ik x_k
    dx_k = sum_i dp_ik u_i + e_ik dh_i                             and relu(y + b) of the rows that follow

Node 0 of a pair is the whole of it, the others are its words; where the whole alone asks, its rows are one a pair.
Owner: edges have one program some asking nodes of a pair, sums have one a pair and some channels, which walk what they
face: one order, no atomics. Read: rows once or twice. In memory: u . x and dh . x, a number for each node of the pair
beside a row of channels. Never there: e, dp. Float32 inside, on the tensor cores in the precision of float32 tiles. The
trick: with the top and the sum of its row an edge is made where it is used, so that every channel is on its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from itm_kernels.triton.ahead_of_time import ARGUMENT_TYPES, Build, arguments
from itm_kernels.triton.kernels.filtration import node_row, nodes_of
from itm_kernels.triton.kernels.gates import owned_tile
from itm_kernels.triton.kernels.squared_difference import load_rows, load_tile, store_rows, store_tile
from itm_kernels.triton.pair_tiles import (
    GRAPH_CHANNELS,
    GRAPH_NODES,
    ROWS,
    SUM_ROWS,
    SUM_WIDTH,
    WIDTH,
    edge_channels,
)


@triton.jit
def _asking_row(node, first, words, pair, WHOLE: tl.constexpr):
    return tl.zeros_like(node).to(tl.int64) + pair if WHOLE else node_row(node, first, words, pair)


@triton.jit
def _load_asking(asking, shift, o_row, m_row, o_channel, width):
    """u of some rows, 0 outside."""
    m_channel = o_channel < width
    u = load_rows(asking, o_row, o_channel, width, m_row[:, None] & m_channel[None, :])
    return u + tl.where(m_row[:, None], tl.load(shift + o_channel, mask=m_channel, other=0.0)[None, :], 0.0)


@triton.jit
def graph_edges(
    nodes, asking, shift, grad_gathered, offsets, counts, products, tops, rows, words, num_queries, num_segments,
    tiles, most, width, BACKWARD: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Products [planes, rows, most]: u . x, and BACKWARD dh . x. Tops [planes + 1, rows]: of u . x, 1 / sum of
    # exponentials, and sum of e de.
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first, count, _ = nodes_of(offsets, counts, num_queries, num_segments, pair)
    node = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = _asking_row(node, first, words, pair, WHOLE)
    m_row = node < (1 if WHOLE else count)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        m_key = key < count
        o_key = node_row(key, first, words, pair)
        edges = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
        of_edges = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
        for channel in range(0, width, BLOCK_S):
            o_channel = channel + tl.arange(0, BLOCK_S)
            m_channel = o_channel < width
            x = tl.trans(load_rows(nodes, o_key, o_channel, width, m_key[:, None] & m_channel[None, :]))
            u = _load_asking(asking, shift, o_row, m_row, o_channel, width)
            edges = tl.dot(u, x, edges, input_precision=PRECISION)
            if BACKWARD:
                dh = load_rows(grad_gathered, o_row, o_channel, width, m_row[:, None] & m_channel[None, :])
                of_edges = tl.dot(dh, x, of_edges, input_precision=PRECISION)
        mask = m_row[:, None] & m_key[None, :]
        store_rows(products, o_row, key, most, mask, edges)
        if BACKWARD:
            store_rows(products + tl.cast(rows, tl.int64) * most, o_row, key, most, mask, of_edges)
        edges = tl.where(m_key[None, :], edges, -float("inf"))
        above = tl.maximum(top, tl.max(edges, 1))
        scale, power = tl.exp(top - above), tl.exp(edges - above[:, None])
        total = total * scale + tl.sum(power, 1)
        if BACKWARD:
            mean = mean * scale + tl.sum(power * of_edges, 1)
        top = above
    tl.store(tops + o_row, top, mask=m_row)
    tl.store(tops + tl.cast(rows, tl.int64) + o_row, 1.0 / total, mask=m_row)
    if BACKWARD:
        tl.store(tops + 2 * tl.cast(rows, tl.int64) + o_row, mean / total, mask=m_row)


@triton.jit
def _load_edges(products, tops, rows, most, o_row, m_row, key, m_key):
    """e of asking nodes by nodes, 0 outside."""
    mask = m_row[:, None] & m_key[None, :]
    top = tl.load(tops + o_row, mask=m_row, other=0.0)
    scale = tl.load(tops + tl.cast(rows, tl.int64) + o_row, mask=m_row, other=0.0)
    return tl.where(mask, tl.exp(load_rows(products, o_row, key, most, mask) - top[:, None]) * scale[:, None], 0.0)


@triton.jit
def _load_edges_backward(e, products, tops, rows, most, o_row, m_row, key, m_key):
    """dp, likewise."""
    mean = tl.load(tops + 2 * tl.cast(rows, tl.int64) + o_row, mask=m_row, other=0.0)
    products += tl.cast(rows, tl.int64) * most
    return e * (load_rows(products, o_row, key, most, m_row[:, None] & m_key[None, :]) - mean[:, None])


@triton.jit
def graph_gather(
    nodes, offsets, counts, products, tops, gathered, rows, words, num_queries, num_segments, most, width,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BLOCK_S)
    pair = tl.program_id(0) // across
    o_channel = (tl.program_id(0) % across) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_channel = o_channel < width
    first, count, extent = nodes_of(offsets, counts, num_queries, num_segments, pair)
    ask, ask_extent = (1, 1) if WHOLE else (count, extent)
    for begin in range(0, ask_extent, BLOCK_N):
        node = begin + tl.arange(0, BLOCK_N)
        m_row = node < ask
        o_row = _asking_row(node, first, words, pair, WHOLE)
        made = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for start in range(0, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            m_key = key < count
            e = _load_edges(products, tops, rows, most, o_row, m_row, key, m_key)
            o_key = node_row(key, first, words, pair)
            x = load_rows(nodes, o_key, o_channel, width, m_key[:, None] & m_channel[None, :])
            made = tl.dot(e, x, made, input_precision=PRECISION)
        store_rows(gathered, o_row, o_channel, width, (node < ask_extent)[:, None] & m_channel[None, :], made)


@triton.jit
def graph_nodes_backward(
    nodes, asking, shift, grad_gathered, offsets, counts, products, tops, grad_nodes, sums, rows, words, num_queries,
    num_segments, most, width, WHOLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Asking is overwritten by its gradient, which no other program reads: these channels of this pair are one's own.
    across = tl.cdiv(width, BLOCK_S)
    pair = tl.program_id(0) // across
    o_channel = (tl.program_id(0) % across) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_channel = o_channel < width
    first, count, extent = nodes_of(offsets, counts, num_queries, num_segments, pair)
    ask, ask_extent = (1, 1) if WHOLE else (count, extent)
    for start in range(0, extent, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        m_key = key < count
        total = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for begin in range(0, ask, BLOCK_N):
            node = begin + tl.arange(0, BLOCK_N)
            m_row = node < ask
            o_row = _asking_row(node, first, words, pair, WHOLE)
            e = _load_edges(products, tops, rows, most, o_row, m_row, key, m_key)
            dp = _load_edges_backward(e, products, tops, rows, most, o_row, m_row, key, m_key)
            u = _load_asking(asking, shift, o_row, m_row, o_channel, width)
            total = tl.dot(tl.trans(dp), u, total, input_precision=PRECISION)
            dh = load_rows(grad_gathered, o_row, o_channel, width, m_row[:, None] & m_channel[None, :])
            total = tl.dot(tl.trans(e), dh, total, input_precision=PRECISION)
        inside = (key < extent)[:, None] & m_channel[None, :]
        store_rows(grad_nodes, node_row(key, first, words, pair), o_channel, width, inside, total)
    tl.debug_barrier()  # no thread writes what another has yet to read
    of_shift = tl.zeros([BLOCK_S], tl.float32)
    for begin in range(0, ask_extent, BLOCK_N):
        node = begin + tl.arange(0, BLOCK_N)
        m_row = node < ask
        o_row = _asking_row(node, first, words, pair, WHOLE)
        du = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
        for start in range(0, count, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            m_key = key < count
            e = _load_edges(products, tops, rows, most, o_row, m_row, key, m_key)
            dp = _load_edges_backward(e, products, tops, rows, most, o_row, m_row, key, m_key)
            o_key = node_row(key, first, words, pair)
            x = load_rows(nodes, o_key, o_channel, width, m_key[:, None] & m_channel[None, :])
            du = tl.dot(dp, x, du, input_precision=PRECISION)
        of_shift += tl.sum(du, 0)
        store_rows(asking, o_row, o_channel, width, (node < ask_extent)[:, None] & m_channel[None, :], du)
    tl.store(sums + pair.to(tl.int64) * width + o_channel, of_shift, mask=m_channel)


@triton.jit
def relu_rows(
    rows, bias, wide, count, width, WIDENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    _, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < count - first)[:, None] & m_column[None, :]
    x = load_tile(rows, first, row, o_column, width, mask) + tl.load(bias + o_column, mask=m_column, other=0.0)[None, :]
    x = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    store_tile(rows, first, row, o_column, width, mask, x)
    if WIDENS:
        store_tile(wide, first, row, o_column, width, mask, x)


@triton.jit
def relu_rows_backward(
    grad, rows, sums, count, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    part, first, row, o_column = owned_tile(width, BLOCK_N, BLOCK_D)
    m_column = o_column < width
    mask = (row < count - first)[:, None] & m_column[None, :]
    after = load_tile(rows, first, row, o_column, width, mask)
    before = tl.where(after > 0.0, load_tile(grad, first, row, o_column, width, mask), 0.0)
    store_tile(rows, first, row, o_column, width, mask, before)
    tl.store(sums + part.to(tl.int64) * width + o_column, tl.sum(before, 0), mask=m_column)


def _builds() -> list[Build]:
    tables = {"offsets": "*i64", "counts": "*i64"}
    wide = {name: "*fp32" for name in ("shift", "products", "tops", "grad_nodes", "sums", "bias", "wide", "grad")}
    builds = []

    def add(kernel, types, constants, *labels):
        # Without the check for tensor cores: 16 rows take the older matrix instruction on every architecture.
        signature = arguments(kernel, types, **constants)
        builds.append(Build(kernel, signature, constants, tensor_cores=False, labels=labels))

    for element, (precision, element_bytes) in ARGUMENT_TYPES.items():
        types = tables | wide | {name: f"*{element}" for name in ("nodes", "asking", "gathered", "grad_gathered")}
        types["rows"] = "i32"
        for whole in (False, True):
            of_product = {"WHOLE": whole, "PRECISION": precision, "BLOCK_N": GRAPH_NODES}
            of_sums, labels = of_product | {"BLOCK_S": GRAPH_CHANNELS}, (element, "whole" if whole else "all")
            for phase in ("forward", "backward"):
                of_edges = of_product | {"BACKWARD": phase == "backward", "BLOCK_S": edge_channels(element_bytes)}
                add(graph_edges, types, of_edges, *labels, phase)
            add(graph_gather, types, of_sums, *labels)
            add(graph_nodes_backward, types, of_sums, *labels)
        types |= {"rows": f"*{element}"}
        for widens in (False, True):
            constants = {"WIDENS": widens, "BLOCK_N": ROWS, "BLOCK_D": WIDTH}
            add(relu_rows, types, constants, element, "wide" if widens else "plain")
        add(relu_rows_backward, types, {"BLOCK_N": SUM_ROWS, "BLOCK_D": SUM_WIDTH}, element)
    return builds


AHEAD_OF_TIME = _builds()
