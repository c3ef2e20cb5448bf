"""Bidirectional attention over packed sequences, forward and backward.

    O = softmax(Q K^T / sqrt(head_dim)) V        within each sequence [cu_seqlens[i], cu_seqlens[i + 1]), per head

Backward, with P = softmax(...), keep = dropout mask / (1 - rate) and delta = rowsum(O * dO):

    dV = (keep P)^T dO      dP = keep (dO V^T)      dS = P (dP - delta) / sqrt(head_dim)      dQ = dS K      dK = dS^T Q

P is never stored: forward keeps one logsumexp a row and head, and backward computes P again from it (FlashAttention,
Dao et al. 2022, arXiv 2205.14135; FlashAttention-2, arXiv 2307.08691).

How it maps to a GPU. A program takes one block of the *flat* token axis and one head, finds by binary search in
cu_seqlens which sequences its rows are of, and sweeps the span of tokens that those sequences cover; scores between
two sequences are masked. So the grid follows from T alone: nothing waits for the lengths, and unused slots of
cu_seqlens start no programs. Several short sequences share a block: at lengths of 16 to 128 tokens, a block of 64 rows
computes about 64 x 180 scores, where one padded block a sequence would compute 128 x 128 for 72 tokens. One program
owns a row (dQ by query block, dK and dV by key block), so there are no atomics and every run gives the same bits. Where
every sequence fits one block, one kernel does the whole backward and reads everything once; the program in whose rows a
sequence begins owns it.

Bytes a token and head in 16 bits, in rows of 2 head_dim bytes: forward reads q, k, v and writes out: 4 rows. Backward:
dQ reads q, k, v, do, out and writes dq, dK/dV reads q, k, v, do and writes dk, dv: 12; the short kernel 8.
Predicted on an H200 (4.3 TB/s, 790 TFLOP/s in bf16), T = 65,536, 6 heads of 64, sequences of 16 to 128 tokens:
forward 201 MB = 47 us; backward 403 MB = 94 us (two kernels: 604 MB = 140 us). Matrix products at 180 scores a row:
18 GFLOP forward, 63 backward (39 in the short kernel) = 23, 80, 49 us at peak; tiles this small reach perhaps a third:
bandwidth and tensor cores are close, latency decides. One sequence of 8,192 tokens, 12 heads of 64: 206 GFLOP forward
= 261 us at peak, 0.05 GB = 12 us: compute-bound. None of this has been measured yet on a card; kernels/RESULTS.md is
the place for outcomes.

Scores and softmax are fp32 in every backend. On a CPU: kernels/attention_torch.py. Dropout: kernels/dropout.py.

    TRITON_INTERPRET=1 python -m pytest -q tests/test_kernels.py    # is it right? (without TRITON_INTERPRET on a GPU)
    python -m kernels.bench --only attention                       # is it fast?
"""
from __future__ import annotations

import functools
import math
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from kernels import attention_torch
from kernels.dropout import dropped, fold, keep_mask
from kernels.support import CHECK_VALUES, choose_backend, jit, running_on, table_of_device, tl, triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------------------------ reference

def reference(q, k, v, cu_seqlens, dropout=0.0, seed=0):
    """One sequence after another, in the dtype of the inputs. The measure of all the other paths."""
    bounds = cu_seqlens.tolist()
    heads = torch.arange(q.shape[1], device=q.device)[:, None, None]
    pieces = []
    for begin, end in zip(bounds, bounds[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], k[begin:end]) / math.sqrt(q.shape[2])
        weights = scores.softmax(-1)
        if dropout > 0:
            token = torch.arange(begin, end, device=q.device)
            weights = weights * keep_mask(seed, dropout, heads, token[:, None], token) / (1 - dropout)
        pieces.append(torch.einsum("hqk,khd->qhd", weights, v[begin:end]))
    return torch.cat(pieces + [torch.zeros_like(q[bounds[-1]:])])


# ------------------------------------------------------------------------------------------------ Triton: shared pieces
# A tensor argument of a kernel is a tuple (pointer, stride of T, stride of heads).

# A new T, S or seed compiles nothing again. (Inside a tuple Triton specialises a 1 or a multiple of 16 all the same.)
_jit = functools.partial(jit, do_not_specialize=("T", "S", "seed", "threshold"))


@_jit
def _dot(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")        # fp32 in fp32; 16-bit inputs do not look at it


@_jit
def _segments(rows, cu, S, BITS: tl.constexpr):
    """[begin, end) of the sequence that holds each row: a branchless binary search for the last boundary at or
    before the row. cu is some KiB that every program reads, so it sits in L1. Rows of no sequence get the empty
    range at the end. Unrolled: a run-time loop here keeps Triton 3.9 from pipelining the main loop."""
    segment = tl.zeros_like(rows)
    for bit in tl.static_range(BITS):
        candidate = segment + (1 << (BITS - 1 - bit))
        inside = candidate <= S
        boundary = tl.load(cu + candidate, mask=inside, other=0)
        segment = tl.where(inside & (boundary <= rows), candidate, segment)
    return tl.load(cu + segment), tl.load(cu + tl.minimum(segment + 1, S))


@_jit
def _span(begin, end, BLOCK: tl.constexpr):
    """What a block of rows has to meet: `low` to `high`, of which `low` to `steady` needs no mask. Only a block
    inside one sequence has such a part."""
    low = tl.min(begin, 0)
    high = tl.max(end, 0)
    single = (tl.max(begin, 0) == low) & (tl.min(end, 0) == high)
    return low, tl.where(single, low + (high - low) // BLOCK * BLOCK, low), high


@_jit
def _tile(x, first, head, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [BLOCK, WIDTH] to rows first, first + 1, ... of one head; 64 bits only where it takes them."""
    start = x[0] + tl.cast(first, tl.int64) * x[1] + tl.cast(head, tl.int64) * x[2]
    return start + tl.arange(0, BLOCK)[:, None] * x[1] + tl.arange(0, WIDTH)[None, :]


@_jit
def _read(x, first, limit, head, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows [first, first + BLOCK) of one head; zeros past head_dim and, if MASKED, from row `limit` on."""
    columns = tl.arange(0, WIDTH)[None, :] < D
    if MASKED:
        inside = ((first + tl.arange(0, BLOCK))[:, None] < limit) & columns
        return tl.load(_tile(x, first, head, BLOCK, WIDTH), mask=inside, other=0.0)
    elif WIDTH > D:
        return tl.load(_tile(x, first, head, BLOCK, WIDTH), mask=columns, other=0.0)
    else:
        return tl.load(_tile(x, first, head, BLOCK, WIDTH))


@_jit
def _write(x, value, first, limit, head, D: tl.constexpr):
    """Rows [first, limit) of one head, converted to the dtype of x."""
    inside = ((first + tl.arange(0, value.shape[0]))[:, None] < limit) & (tl.arange(0, value.shape[1])[None, :] < D)
    tl.store(_tile(x, first, head, value.shape[0], value.shape[1]), value.to(x[0].dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------ Triton: kernels
# One program has BLOCK rows of the flat token axis, whatever sequences they are of, and one head. Heads run fastest,
# so that the heads of a token, neighbours in memory, are read at about the same time.

@_jit
def _forward_kernel(q, k, v, out, lse, cu, T, S, scale, seed, threshold, gain,
                    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
                    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """Online softmax: acc = sum_j 2^(s_j - peak) v_j and total = sum_j 2^(s_j - peak), with peak = max_j s_j."""
    drop = seed, threshold, gain
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    begin, end = _segments(rows, cu, S, BITS)
    low, steady, high = _span(begin, end, BLOCK_K)
    tokens = tl.load(cu + S)
    q_tile = _read(q, first, tokens, head, D, BLOCK_Q, WIDTH, True)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.zeros([BLOCK_Q], tl.float32) - float("inf")
    for masked in tl.static_range(2):           # the loop is compiled twice: for what needs no mask, then for the rest
        for key in range(steady if masked else low, high if masked else steady, BLOCK_K):
            keys = key + tl.arange(0, BLOCK_K)
            k_tile = _read(k, key, high, head, D, BLOCK_K, WIDTH, masked)
            s = _dot(q_tile, tl.trans(k_tile), None)
            if masked:
                s = tl.where((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]), s, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
            safe = new_peak
            if masked:      # a row that has met no key of its own yet: avoid inf - inf
                safe = tl.where(new_peak == -float("inf"), 0.0, new_peak)
            p = tl.exp2(s * scale - safe[:, None])
            fade = tl.exp2(peak - safe)
            total = total * fade + tl.sum(p, 1)
            if DROPOUT:
                p = dropped(p, rows[:, None], keys[None, :], head, drop)
            v_tile = _read(v, key, high, head, D, BLOCK_K, WIDTH, masked)
            acc = _dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None])
            peak = new_peak
    owned = rows < tokens
    total = tl.where(owned, total, 1.0)         # rows of no sequence: acc is 0, and so shall out be
    _write(out, acc / total[:, None], first, T, head, D)
    tl.store(lse + tl.cast(head, tl.int64) * T + rows, tl.where(owned, peak + tl.log2(total), 0.0), mask=rows < T)


@_jit
def _dq_kernel(q, k, v, out, do, dq, lse, delta, cu, T, S, scale, softmax_scale, seed, threshold, gain,
               HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
               BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """dQ, and on the way delta = rowsum(out * do), which _dkv_kernel reads."""
    drop = seed, threshold, gain
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    begin, end = _segments(rows, cu, S, BITS)
    low, steady, high = _span(begin, end, BLOCK_K)
    tokens = tl.load(cu + S)
    at = tl.cast(head, tl.int64) * T + rows
    row_lse = tl.load(lse + at, mask=rows < T, other=0.0)
    do_tile = _read(do, first, tokens, head, D, BLOCK_Q, WIDTH, True)
    out_tile = _read(out, first, tokens, head, D, BLOCK_Q, WIDTH, True)
    row_delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + at, row_delta, mask=rows < T)
    q_tile = _read(q, first, tokens, head, D, BLOCK_Q, WIDTH, True)
    acc = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    for masked in tl.static_range(2):
        for key in range(steady if masked else low, high if masked else steady, BLOCK_K):
            keys = key + tl.arange(0, BLOCK_K)
            k_tile = _read(k, key, high, head, D, BLOCK_K, WIDTH, masked)
            v_tile = _read(v, key, high, head, D, BLOCK_K, WIDTH, masked)
            p = tl.exp2(_dot(q_tile, tl.trans(k_tile), None) * scale - row_lse[:, None])
            if masked:
                p = tl.where((keys[None, :] >= begin[:, None]) & (keys[None, :] < end[:, None]), p, 0.0)
            dp = _dot(do_tile, tl.trans(v_tile), None)
            if DROPOUT:
                dp = dropped(dp, rows[:, None], keys[None, :], head, drop)
            acc = _dot((p * (dp - row_delta[:, None])).to(k_tile.dtype), k_tile, acc)
    _write(dq, acc * softmax_scale, first, T, head, D)


@_jit
def _dkv_kernel(q, k, v, do, dk, dv, lse, delta, cu, T, S, scale, softmax_scale, seed, threshold, gain,
                HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr):
    """dK and dV. Scores are [keys, queries] here, so that P^T and dS^T are ready to multiply."""
    drop = seed, threshold, gain
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * BLOCK_K
    keys = first + tl.arange(0, BLOCK_K)
    begin, end = _segments(keys, cu, S, BITS)
    low, steady, high = _span(begin, end, BLOCK_Q)
    tokens = tl.load(cu + S)
    k_tile = _read(k, first, tokens, head, D, BLOCK_K, WIDTH, True)
    v_tile = _read(v, first, tokens, head, D, BLOCK_K, WIDTH, True)
    acc_k = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    acc_v = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    for masked in tl.static_range(2):
        for query in range(steady if masked else low, high if masked else steady, BLOCK_Q):
            rows = query + tl.arange(0, BLOCK_Q)
            at = tl.cast(head, tl.int64) * T + rows
            q_tile = _read(q, query, high, head, D, BLOCK_Q, WIDTH, masked)
            row_lse = tl.load(lse + at, mask=rows < high, other=0.0)
            p = tl.exp2(_dot(k_tile, tl.trans(q_tile), None) * scale - row_lse[None, :])
            if masked:
                p = tl.where((rows[None, :] >= begin[:, None]) & (rows[None, :] < end[:, None]), p, 0.0)
            do_tile = _read(do, query, high, head, D, BLOCK_Q, WIDTH, masked)
            dp = _dot(v_tile, tl.trans(do_tile), None)
            if DROPOUT:
                dp = dropped(dp, rows[None, :], keys[:, None], head, drop)
                acc_v = _dot(dropped(p, rows[None, :], keys[:, None], head, drop).to(do_tile.dtype), do_tile, acc_v)
            else:
                acc_v = _dot(p.to(do_tile.dtype), do_tile, acc_v)
            row_delta = tl.load(delta + at, mask=rows < high, other=0.0)
            acc_k = _dot((p * (dp - row_delta[None, :])).to(q_tile.dtype), q_tile, acc_k)
    _write(dk, acc_k * softmax_scale, first, T, head, D)
    _write(dv, acc_v, first, T, head, D)


@_jit
def _sequence_backward(q, k, v, out, do, dq, dk, dv, lse, first, length, head, T, scale, softmax_scale, drop,
                       D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DROPOUT: tl.constexpr):
    """dQ, dK and dV of one sequence of at most BLOCK tokens. dV first: in this order registers suffice."""
    row = tl.arange(0, BLOCK)
    last = first + length
    q_tile = _read(q, first, last, head, D, BLOCK, WIDTH, True)
    k_tile = _read(k, first, last, head, D, BLOCK, WIDTH, True)
    row_lse = tl.load(lse + tl.cast(head, tl.int64) * T + first + row, mask=row < length, other=0.0)
    p = tl.exp2(_dot(q_tile, tl.trans(k_tile), None) * scale - row_lse[:, None])
    p = tl.where((row[:, None] < length) & (row[None, :] < length), p, 0.0)
    do_tile = _read(do, first, last, head, D, BLOCK, WIDTH, True)
    weights = p
    if DROPOUT:
        weights = dropped(p, (first + row)[:, None], (first + row)[None, :], head, drop)
    _write(dv, _dot(tl.trans(weights.to(do_tile.dtype)), do_tile, None), first, last, head, D)
    out_tile = _read(out, first, last, head, D, BLOCK, WIDTH, True)
    delta = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    dp = _dot(do_tile, tl.trans(_read(v, first, last, head, D, BLOCK, WIDTH, True)), None)
    if DROPOUT:
        dp = dropped(dp, (first + row)[:, None], (first + row)[None, :], head, drop)
    ds = (p * (dp - delta[:, None])).to(q_tile.dtype)
    _write(dq, _dot(ds, k_tile, None) * softmax_scale, first, last, head, D)
    _write(dk, _dot(tl.trans(ds), q_tile, None) * softmax_scale, first, last, head, D)


@_jit
def _short_kernel(q, k, v, out, do, dq, dk, dv, lse, cu, T, S, scale, softmax_scale, seed, threshold, gain,
                  HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
                  DROPOUT: tl.constexpr):
    """The whole backward where no sequence is longer than BLOCK: a program takes the sequences that begin among its
    rows, one always does, and clears what is of none. So q, k, v, out and do are read once and P is computed once."""
    drop = seed, threshold, gain
    head = tl.program_id(0) % HEADS
    block = tl.program_id(0) // HEADS * BLOCK
    rows = block + tl.arange(0, BLOCK)
    begin, end = _segments(rows, cu, S, BITS)
    tokens = tl.load(cu + S)
    if block + BLOCK > tokens:
        zeros = tl.zeros([BLOCK, WIDTH], tl.float32)
        _write(dq, zeros, tl.maximum(block, tokens), tl.minimum(block + BLOCK, T), head, D)
        _write(dk, zeros, tl.maximum(block, tokens), tl.minimum(block + BLOCK, T), head, D)
        _write(dv, zeros, tl.maximum(block, tokens), tl.minimum(block + BLOCK, T), head, D)
    first = tl.min(tl.where(begin >= block, begin, tokens), 0)
    count = tl.sum(((rows == begin) & (rows < tokens)).to(tl.int32), 0)
    for _ in tl.range(0, count, disable_licm=True):     # what is hoisted out of the loop would spill
        last = tl.max(tl.where(rows == first, end, 0), 0)
        length = last - first
        HALF: tl.constexpr = BLOCK // 2 if BLOCK > 16 else 16       # tl.dot takes no less
        if length > HALF:
            _sequence_backward(q, k, v, out, do, dq, dk, dv, lse, first, length, head, T, scale, softmax_scale, drop,
                               D, WIDTH, BLOCK, DROPOUT)
        else:                   # most sequences are short: half the tile, a quarter of the work
            _sequence_backward(q, k, v, out, do, dq, dk, dv, lse, first, length, head, T, scale, softmax_scale, drop,
                               D, WIDTH, HALF, DROPOUT)
        first = last


# ----------------------------------------------------------------------------------------------------- Triton: launches

# (architecture, bytes an element, head_dim rounded up to a power of two) -> (BLOCK_Q, BLOCK_K, warps, stages) of
# the forward, dQ and dK/dV kernels, then (BLOCK, warps) of the short backward kernel. Pinned, so that every rank and
# every run computes the same bits. `python -m kernels.bench --compile-only` checks that nothing spills.
# sm_80 stays under 99 KiB of shared memory, because those of support.table_of's 86 use it too.
CONFIGS = {
    (80, 2, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (80, 2, 32): ((64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (128, 8)),
    (80, 2, 64): ((64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2), (64, 8)),
    (80, 2, 128): ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2), (64, 8)),
    (80, 4, 16): ((32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 1), (32, 4)),
    (80, 4, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 4)),
    (80, 4, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 8)),
    (80, 4, 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 8)),
    (90, 2, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (90, 2, 32): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (90, 2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (90, 2, 128): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 8)),
    (90, 4, 16): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 4)),
    (90, 4, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 4)),
    (90, 4, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 8)),
    (90, 4, 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 8)),
    (100, 2, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (100, 2, 32): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (100, 2, 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 8)),
    (100, 2, 128): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 8)),
    (100, 4, 16): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 4)),
    (100, 4, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 4)),
    (100, 4, 64): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 8)),
    (100, 4, 128): ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2), (16, 8)),
}


def named(row):
    """A row of CONFIGS as keyword arguments of a launch."""
    *tiles, (block, warps) = row
    names = ("BLOCK_Q", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(("forward", "dq", "dkv"), (dict(zip(names, tile)) for tile in tiles)),
                short=dict(BLOCK=block, num_warps=warps, num_stages=1))


def _config(x):
    """kernel -> launch options for a tensor [T, heads, head_dim]. The interpreter takes the larger tiles."""
    table, size = (table_of_device(x.device), x.element_size()) if x.is_cuda else (80, 2)
    return named(CONFIGS[80 if table == 86 else table, size, triton.next_power_of_2(x.shape[2])])


def _strided(x):
    return x, x.stride(0), x.stride(1)


def _launch(kernel, programs, config, **arguments):
    """Start `programs` programs; a kernel takes of `arguments` what it names."""
    if programs:
        kernel[(programs,)](**{name: x for name, x in arguments.items() if name in kernel.arg_names}, **config)


def _arguments(q, k, v, cu_seqlens, dropout, seed):
    """What all kernels take, by name."""
    S = cu_seqlens.shape[0] - 1
    return dict(
        q=_strided(q), k=_strided(k), v=_strided(v), cu=cu_seqlens.contiguous(), T=q.shape[0], S=S,
        BITS=-(-S.bit_length() // 4) * 4,       # in fours: a few variants of a kernel, not one for each S
        scale=math.log2(math.e) / math.sqrt(q.shape[2]), softmax_scale=1 / math.sqrt(q.shape[2]),
        seed=fold(seed), threshold=int(dropout * 2**31), gain=1 / (1 - dropout), DROPOUT=dropout > 0,
        HEADS=q.shape[1], D=q.shape[2], WIDTH=triton.next_power_of_2(q.shape[2]))


def triton_forward(q, k, v, cu_seqlens, dropout=0.0, seed=0):
    """-> out [T, heads, head_dim], logsumexp [heads, T] in base 2, fp32."""
    T, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, T, dtype=torch.float32, device=q.device)
    config = _config(q)["forward"]
    _launch(_forward_kernel, triton.cdiv(T, config["BLOCK_Q"]) * heads, config, out=_strided(out), lse=lse,
            **_arguments(q, k, v, cu_seqlens, dropout, seed))
    return out, lse


def triton_backward(do, q, k, v, out, lse, cu_seqlens, max_seqlen, dropout=0.0, seed=0):
    """-> [T, 3, heads, head_dim]: dq, dk, dv."""
    T, heads, head_dim = q.shape
    grads = torch.empty(T, 3, heads, head_dim, dtype=q.dtype, device=q.device)
    config = _config(q)
    dq, dk, dv = map(_strided, grads.unbind(1))
    arguments = dict(out=_strided(out), do=_strided(do.contiguous()), lse=lse, dq=dq, dk=dk, dv=dv,
                     **_arguments(q, k, v, cu_seqlens, dropout, seed))
    if max_seqlen <= config["short"]["BLOCK"]:
        _launch(_short_kernel, triton.cdiv(T, config["short"]["BLOCK"]) * heads, config["short"], **arguments)
    else:
        arguments["delta"] = torch.empty_like(lse)
        _launch(_dq_kernel, triton.cdiv(T, config["dq"]["BLOCK_Q"]) * heads, config["dq"], **arguments)
        _launch(_dkv_kernel, triton.cdiv(T, config["dkv"]["BLOCK_K"]) * heads, config["dkv"], **arguments)
    return grads


# ----------------------------------------------------------------------------------------------- operators for autograd

def _compute(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str,
             dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    _check_values(q, cu_seqlens, max_seqlen)
    with running_on(q):
        if backend == "triton":
            return triton_forward(q, k, v, cu_seqlens, dropout, seed)
        return attention_torch.forward(q, k, v, cu_seqlens, dropout, seed)


_forward = torch.library.custom_op("unibert::attention", _compute, mutates_args=())


@_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, backend, dropout, seed):
    saved = (q.shape[1], q.shape[0]) if backend == "triton" or attention_torch.by_library(q, dropout) else (0,)
    return q.new_empty(q.shape), q.new_empty(saved, dtype=torch.float32)


@torch.library.custom_op("unibert::attention_backward", mutates_args=())
def _backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Optional[Tensor], lse: Tensor, cu_seqlens: Tensor,
              max_seqlen: int, backend: str, dropout: float, seed: int) -> Tensor:
    with running_on(q):
        if backend == "triton":
            return triton_backward(do, q, k, v, out, lse, cu_seqlens, max_seqlen, dropout, seed)
        return attention_torch.backward(do, q, k, v, out, lse, cu_seqlens, dropout, seed)


@_backward.register_fake
def _(do, q, k, v, out, lse, cu_seqlens, max_seqlen, backend, dropout, seed):
    return q.new_empty(q.shape[0], 3, q.shape[1], q.shape[2])


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.backend, ctx.dropout, ctx.seed = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    needs_out = ctx.backend == "triton" or attention_torch.by_library(q, ctx.dropout)
    ctx.save_for_backward(q, k, v, out if needs_out else None, lse, cu_seqlens)


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 8
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grads = _backward(do, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.backend, ctx.dropout, ctx.seed)
    return *grads.unbind(1), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# ------------------------------------------------------------------------------------------------------ public function

def _check_arguments(q, k, v, cu_seqlens, max_seqlen, dropout):
    """What can be told from shapes and types, also while torch.compile traces."""
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(f"attention: q, k and v must all be [T, heads, head_dim], got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"attention: q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if k.device != q.device or v.device != q.device or cu_seqlens.device != q.device:
        raise ValueError(f"attention: q, k, v and cu_seqlens must be on one device, got {q.device}, {k.device}, "
                         f"{v.device}, {cu_seqlens.device}")
    if not 16 <= q.shape[2] <= 128:
        raise ValueError(f"attention: head_dim must be 16 to 128, got {q.shape[2]}")
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("attention: the last dimension of q, k and v must be contiguous; call .contiguous() first")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"attention: cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} "
                         f"{tuple(cu_seqlens.shape)}")
    if max_seqlen < 0:
        raise ValueError(f"attention: max_seqlen must not be negative, got {max_seqlen}")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be in [0, 1), got {dropout}")


def _check_values(q, cu_seqlens, max_seqlen):
    """What needs the lengths themselves: always on the CPU; on a GPU only if UNIBERT_CHECK=1, as it waits."""
    if cu_seqlens.is_cuda and not CHECK_VALUES:
        return
    bounds = cu_seqlens.cpu().numpy().astype(np.int64)
    lengths = np.diff(bounds)
    if bounds[0] != 0 or (lengths < 0).any() or bounds[-1] > q.shape[0]:
        raise ValueError(f"attention: cu_seqlens must start at 0, never descend and end at or before T = "
                         f"{q.shape[0]}, got {bounds.tolist() if len(bounds) < 20 else bounds}")
    if lengths.max(initial=0) > max_seqlen:
        raise ValueError(f"attention: max_seqlen is {max_seqlen}, but sequence {lengths.argmax()} has "
                         f"{lengths.max()} tokens")


def attention(q, k, v, cu_seqlens, max_seqlen, backend="auto", dropout=0.0, seed=0):
    """Bidirectional attention within each packed sequence, scale 1 / sqrt(head_dim).

    q, k, v       [T, heads, head_dim], fp16, bf16 or fp32 (float64 too, but not in the triton backend), head_dim 16 to
                  128. Any strides with a contiguous last dimension: views of one fused [T, 3, heads, head_dim]
                  projection, qkv.unbind(1), are read in place.
    cu_seqlens    [S + 1] int32 on the same device: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]); it starts
                  at 0 and never descends. Sequences may be empty. Tokens from cu_seqlens[S] on are of no sequence and
                  may hold anything: output 0, gradient 0.
    max_seqlen    int, at least the longest length. On a GPU it decides whether the short backward kernel is used.
    backend       "auto" (triton on an NVIDIA GPU from sm_80 on, torch elsewhere), "triton", "torch" or "reference".
    dropout       rate in [0, 1) on the attention weights. The mask is a function of (seed, head, query, key) alone,
                  with positions counted over the batch: the same in every backend, and in backward.
    seed          any int of 64 bits, signed.

    Returns [T, heads, head_dim], contiguous. Bits are the same in every run. Not differentiable twice. A sequence that
    holds NaN or infinity may spread it to its neighbours on a GPU, where they share a block: 0 * NaN is NaN.
    Raises ValueError for bad arguments before any launch. The values in cu_seqlens are looked at on the CPU always, on
    a GPU only with UNIBERT_CHECK=1 in the environment, since that waits for the GPU.
    """
    _check_arguments(q, k, v, cu_seqlens, max_seqlen, dropout)
    backend = choose_backend("attention", backend, q.device, q.dtype)
    if backend == "reference":
        _check_values(q, cu_seqlens, max_seqlen)
        return reference(q, k, v, cu_seqlens, dropout, seed)
    arguments = q, k, v, cu_seqlens, max_seqlen, backend, dropout, seed
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiated or torch.compiler.is_compiling() or type(q) is not Tensor or q.is_meta:
        return _forward(*arguments)[0]
    # Nothing has to be recorded, and an operator's first call imports torch's compiler: a second of every fill-mask.
    return _compute(*arguments)[0]
