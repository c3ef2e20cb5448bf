"""Dropout of attention weights: one bit for each (seed, head, query, key), the same in every backend, forward and
backward, so that no mask is stored. Queries and keys are counted over the whole packed batch.
"""
from __future__ import annotations

from kernels.support import jit, tl


def _mix(x):
    """A bijective 32-bit hash (Wellons' "lowbias32") of an int32 tensor; products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def fold(seed):
    """A Python int of any size to 32 bits, so that neighbouring seeds land far apart."""
    folded = (seed * 0x9E3779B97F4A7C15 >> 32) & 0xFFFFFFFF
    return folded - 2**32 if folded >= 2**31 else folded


def keep_mask(seed, dropout, head, query, key):
    """True where attention dropout keeps a weight. `head`, `query`, `key` are integer tensors that broadcast."""
    row = _mix(_mix(query.int() ^ fold(seed)) + head.int() * 0x3C6EF372)
    return (_mix(row ^ key.int()) & 0x7FFFFFFF) >= int(dropout * 2**31)


@jit
def _mix_triton(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def dropped(x, query, key, head, drop):
    """x with the weights that keep_mask drops set to 0 and the others scaled up; query and key are a row and a
    column of token positions, either way round. drop = (folded seed, dropout * 2^31, 1 / (1 - dropout))."""
    seed, threshold, gain = drop
    row = _mix_triton(_mix_triton(query.to(tl.uint32) ^ seed.to(tl.uint32)) + head.to(tl.uint32) * 0x3C6EF372)
    keep = (_mix_triton(row ^ key.to(tl.uint32)) & 0x7FFFFFFF).to(tl.int32) >= threshold
    return tl.where(keep, x * gain, 0.0)
