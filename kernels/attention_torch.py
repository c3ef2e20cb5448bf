"""Attention over packed sequences in plain PyTorch: the "torch" backend of kernels/attention.py.

Sequences are sorted into buckets of nearly equal length, and a bucket is a few batched matrix products on tiles that
stay in cache. In fp32 PyTorch's own kernel is faster, on views of neighbours of one length. Scores and softmax are fp32.
"""
from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from kernels.dropout import keep_mask

ROUND = 16              # sequences of one bucket differ by less than this in length
SCORES = 2**18          # scores alive at a time: 1 MiB in fp32, so that a tile stays in a core's cache


class _Bucket:
    """Sequences of nearly equal length, padded to `length`; slots [begin, begin + count * length) of the batch."""

    def __init__(self, tokens, lengths, length, begin, heads, dtype):
        self.count, self.length, self.heads = len(lengths), length, heads
        self.slots = slice(begin, begin + self.count * length)
        self.tokens = tokens[self.slots]
        self.padding, self.bias = None, torch.zeros(1, 1, 1, dtype=dtype, device=tokens.device)
        if int(lengths.min()) < length:
            self.padding = torch.arange(length, device=tokens.device) >= lengths[:, None]       # [count, length]
            bias = torch.zeros(self.padding.shape, dtype=dtype, device=tokens.device)
            self.bias = bias.masked_fill_(self.padding, -math.inf).repeat_interleave(heads, 0)[:, None]
        self.rows = min(length, max(64, SCORES // length))                                      # queries of a tile

    def gather(self, x, dtype):
        """Rows of the packed x [T, heads, head_dim] as [count * heads, length, head_dim]."""
        x = x.index_select(0, self.tokens).view(self.count, self.length, self.heads, -1).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format).reshape(-1, self.length, x.shape[-1])

    def scatter(self, x, out):
        """The inverse of gather, into the padded out [slots, heads, head_dim]."""
        x = x.view(self.count, self.heads, self.length, -1).transpose(1, 2)
        out[self.slots].view_as(x).copy_(x)

    def tiles(self):
        """(problems, queries) as slices, with at most SCORES scores (or those of 64 queries) in each."""
        step = max(1, SCORES // self.length**2)
        for n in range(0, self.count * self.heads, step):
            for r in range(0, self.length, self.rows):
                yield slice(n, n + step), slice(r, r + self.rows)

    def weights(self, q, k, n, r):
        """softmax(q k^T / sqrt(head_dim)) of one tile, in fp32: bf16 scores would cost ten times the error of
        PyTorch's own kernel as soon as attention is peaked."""
        bias = self.bias if self.padding is None else self.bias[n]
        return torch.softmax(torch.baddbmm(bias, q[n, r], k[n].mT, alpha=1 / math.sqrt(q.shape[-1])), -1)

    def keep(self, n, r, seed, dropout):
        """keep_mask of one tile over the rate of survival, [problems, queries, length]."""
        problem = torch.arange(self.count * self.heads, device=self.tokens.device)[n]
        token = self.tokens.view(self.count, self.length)[problem // self.heads]
        head = (problem % self.heads)[:, None, None]
        return keep_mask(seed, dropout, head, token[:, r, None], token[:, None]) / (1 - dropout)


def _buckets(cu_seqlens, T, heads, dtype):
    """Sort sequences by length into buckets. Returns (buckets, slots in all, slot [T] of each token); tokens of no
    sequence get the slot after the last."""
    bounds = cu_seqlens.cpu().numpy().astype(np.int64)
    start, lengths = bounds[:-1], np.diff(bounds)
    padded = -(-lengths // ROUND) * ROUND
    order = np.argsort(padded, kind="stable")
    order = order[lengths[order] > 0]
    start, lengths, padded = start[order], lengths[order], padded[order]
    begin = np.cumsum(padded) - padded
    n_slots = int(padded.sum())

    within = np.arange(n_slots) - np.repeat(begin, padded)                  # padding repeats the last token
    tokens = np.repeat(start, padded) + np.minimum(within, np.repeat(lengths - 1, padded))
    real = within < np.repeat(lengths, padded)
    slot = np.full(T, n_slots)
    slot[tokens[real]] = np.flatnonzero(real)

    tokens, slot, lengths = (torch.from_numpy(x).to(cu_seqlens.device) for x in (tokens, slot, lengths))
    cuts = np.flatnonzero(np.diff(padded, prepend=-1, append=-1))
    return [_Bucket(tokens, lengths[a:b], int(padded[a]), int(begin[a]), heads, dtype)
            for a, b in zip(cuts, cuts[1:])], n_slots, slot


def bucket_forward(q, k, v, cu_seqlens, dropout=0.0, seed=0):
    """-> out [T, heads, head_dim]."""
    T, heads, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    buckets, n_slots, slot = _buckets(cu_seqlens, T, heads, wide)
    out = q.new_zeros(n_slots + 1, heads, head_dim)
    for bucket in buckets:
        qb, kb, vb = bucket.gather(q, wide), bucket.gather(k, wide), bucket.gather(v, v.dtype)
        ob = torch.empty_like(vb)
        for n, r in bucket.tiles():
            p = bucket.weights(qb, kb, n, r)
            if dropout > 0:
                p *= bucket.keep(n, r, seed, dropout)
            torch.bmm(p.to(v.dtype), vb[n], out=ob[n, r])
        bucket.scatter(ob, out)
    return out.index_select(0, slot)


def bucket_backward(do, q, k, v, cu_seqlens, dropout=0.0, seed=0):
    """-> [T, 3, heads, head_dim]: dq, dk, dv. The weights are computed again: to keep them would take
    heads * max_seqlen numbers a token."""
    T, heads, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    buckets, n_slots, slot = _buckets(cu_seqlens, T, heads, wide)
    grads = q.new_zeros(n_slots + 1, 3, heads, head_dim)
    for bucket in buckets:
        qb, kb, vb, dob = (bucket.gather(x, q.dtype) for x in (q, k, v, do))
        if bucket.padding is not None:      # a padded query must not reach dk and dv
            dob.view(bucket.count, heads, bucket.length, -1).masked_fill_(bucket.padding[:, None, :, None], 0)
        qw, kw = qb.to(wide), kb.to(wide)
        split = bucket.rows < bucket.length                         # then dk and dv are sums over tiles, in fp32
        dq = torch.empty_like(qb)
        dk, dv = (torch.zeros_like(qw) if split else torch.empty_like(qb) for _ in range(2))
        for n, r in bucket.tiles():
            p = bucket.weights(qw, kw, n, r)
            dp = torch.bmm(dob[n, r], vb[n].mT).to(wide)
            dropped = p
            if dropout > 0:
                keep = bucket.keep(n, r, seed, dropout)
                dropped, dp = p * keep, dp * keep
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, wide).mul_(1 / math.sqrt(head_dim)).to(q.dtype)
            torch.bmm(ds, kb[n], out=dq[n, r])
            for grad, left, right in ((dv, dropped.to(q.dtype), dob), (dk, ds, qb)):
                if split:
                    grad[n] += torch.bmm(left.mT, right[n, r])
                else:
                    torch.bmm(left.mT, right[n], out=grad[n])
        for i, grad in enumerate((dq, dk, dv)):
            bucket.scatter(grad, grads[:, i])
    return grads.index_select(0, slot)


def by_library(q, dropout):
    """True where PyTorch's own CPU kernel is the fastest: fp32 (its bf16 backward takes three times ours). It needs out
    and the logsumexp for backward; the buckets need neither."""
    return q.device.type == "cpu" and q.dtype == torch.float32 and dropout == 0


def _runs(cu_seqlens, *tensors):
    """Each run of neighbours of one length, n of them, as a slice of tokens, n, and views [n, heads, length, head_dim] of the packed
    tensors. Sentences that are embedded lie sorted by length (inference.py); calls cost more than they compute there."""
    lengths = np.diff(bounds := cu_seqlens.cpu().numpy().astype(np.int64))
    for first, last in itertools.pairwise(np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()):
        if lengths[first]:
            span = slice(int(bounds[first]), int(bounds[last]))
            yield span, last - first, [x[span].unflatten(0, (last - first, -1)).transpose(1, 2) for x in tensors]


def library_forward(q, k, v, cu_seqlens):
    """-> out [T, heads, head_dim], logsumexp [heads, T]. Views of the packed tensors: no padding, no gathering."""
    out, lse = q.new_zeros(q.shape), q.new_zeros(q.shape[1], q.shape[0])
    for span, _, qkv in _runs(cu_seqlens, q, k, v):
        o, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)
        out[span], lse[:, span] = o.transpose(1, 2).flatten(0, 1), row_lse.transpose(0, 1).flatten(1)
    return out, lse


def library_backward(do, q, k, v, out, lse, cu_seqlens):
    """-> [T, 3, heads, head_dim]: dq, dk, dv."""
    grads = q.new_zeros(q.shape[0], 3, *q.shape[1:])
    for span, n, (*tensors, o) in _runs(cu_seqlens, do, q, k, v, out):
        row_lse = lse[:, span].unflatten(1, (n, -1)).transpose(0, 1)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, o, row_lse, 0.0, False)
        for i, part in enumerate(parts):
            grads[span, i] = part.transpose(1, 2).flatten(0, 1)
    return grads


def forward(q, k, v, cu_seqlens, dropout=0.0, seed=0):
    """-> out [T, heads, head_dim], logsumexp [heads, T] or empty."""
    if by_library(q, dropout):
        return library_forward(q, k, v, cu_seqlens)
    return bucket_forward(q, k, v, cu_seqlens, dropout, seed), q.new_empty(0, dtype=torch.float32)


def backward(do, q, k, v, out, lse, cu_seqlens, dropout=0.0, seed=0):
    """-> [T, 3, heads, head_dim]: dq, dk, dv."""
    if by_library(q, dropout):
        return library_backward(do, q, k, v, out, lse, cu_seqlens)
    return bucket_backward(do, q, k, v, cu_seqlens, dropout, seed)
