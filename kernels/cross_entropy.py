"""MLM cross-entropy straight from hidden states.

    logits = x W^T + b      lse = log sum_v exp(logits_v)
    loss   = row_weight * ((1 - s) (lse - logits_target) + s (lse - mean_v logits) + z lse^2)
    dlogits = g * ((1 + 2 z lse) softmax - (1 - s) onehot - s / V)      dX = dlogits W      dW = dlogits^T X

with label smoothing s, z-loss z and g = row_weight * the gradient of the row's loss. 6NDV FLOPs of work and 8NDV done:
the logits of a chunk of classes are computed in forward for lse and again in backward for dlogits, and not kept.
How that was chosen, memory traffic and predictions: kernels/linear_losses.py.

    TRITON_INTERPRET=1 python -m pytest -q tests/test_kernels.py    # is it right? (without TRITON_INTERPRET on a GPU)
    python -m kernels.bench --only losses                          # is it fast?
"""
from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_losses import (NEVER, KeptRows, add_bias, bias_of, check_arguments, check_targets,
                                   empty_weight_gradients, gradients_by_chunk, grid, keep_workspace, launch_options,
                                   live_rows, logits_keeping_target, saved_chunk, softmax_in_place, store_dlogits,
                                   target_column, tile, tile_logits, tile_logsumexp, vocabulary_chunks, weight_of,
                                   wide_dtype)
from kernels.support import jit, running_on, tl

SMALLEST_SCALE = 1e-20           # floor of exp(chunk logsumexp - logsumexp): see torch_forward


# ----------------------------------------------------------------------------------------------------------- reference

def reference(x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype):
    logits = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(wide_dtype(dtype))
    loss = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index,
                           label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * torch.where(target == ignore_index, 0.0, logits.logsumexp(1).square())
    return loss if row_weight is None else loss * row_weight


# ------------------------------------------------------------------------------------------------------- plain PyTorch

def torch_forward(x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype, save):
    """-> loss [N], stats [2 + chunks, N] (logsumexp, target logit, logsumexp of each chunk), saved [1, N * V].

    Each chunk keeps its own softmax P, whose rows sum to 1, instead of exp(logit - logsumexp), which is not known
    yet. Backward needs no pass over the logits then: the true probabilities are P * s with s = exp(chunk
    logsumexp - logsumexp), one factor a row and chunk, which goes onto the rows of x (for dW) and of dX.
    The target's entry is stored as (p - onehot) / s, computed in float32, so that confident rows keep a small but
    accurate gradient in bfloat16. s is at least 1e-20: below, P * s is nothing beside float32's 1e-7, and
    1 / s would overflow.
    """
    (rows, vocabulary), wide = (len(x), len(weight)), wide_dtype(dtype)
    chunks = vocabulary_chunks(rows, vocabulary, "torch", dtype)
    kept = KeptRows(target, vocabulary, ignore_index, chunks)
    xs = kept.pick(x).to(dtype)
    stats = torch.zeros(2 + len(chunks), rows, dtype=wide, device=x.device)
    saved = torch.empty(1, rows * vocabulary if save else 0, dtype=dtype, device=x.device)
    lse, target_logit, chunk_lse = stats[0, :kept.n], stats[1, :kept.n], stats[2:, :kept.n]
    for i, start, end in chunks:
        logits = add_bias((xs @ weight[start:end].to(dtype).t()).to(wide), bias, start, end)
        in_chunk, columns = kept.targets_in(i, start)
        target_logit[in_chunk] = logits[in_chunk, columns]
        chunk_lse[i] = softmax_in_place(logits)
        if save:
            saved_chunk(saved, rows, kept.n, start, end).copy_(logits)
    torch.logsumexp(chunk_lse, 0, out=lse)
    if save:
        for i, start, end in chunks:
            _put_target(saved_chunk(saved, rows, kept.n, start, end), kept, i, start, stats, z_loss, label_smoothing)
    loss = lse - (1 - label_smoothing) * target_logit
    if label_smoothing:
        loss -= label_smoothing * _mean_logit(xs, weight, bias, wide)
    if z_loss:
        loss += z_loss * lse.square()
    if row_weight is not None:
        loss *= kept.pick(row_weight)
    return kept.put_back(loss, rows), stats, saved


def _mean_logit(x, weight, bias, wide):
    """Mean over the vocabulary of x @ W.T + b = x @ mean(W) + mean(b): no second sweep."""
    mean = x.to(wide) @ weight.mean(0, dtype=wide)
    return mean if bias is None else mean + bias.mean(dtype=wide)


def _softmax_factor(lse, z_loss):
    """d loss / d logits = factor * softmax - (1 - smoothing) * onehot - smoothing / V. Never 0: it divides."""
    factor = 1 + 2 * z_loss * lse
    return torch.where(factor.abs() < 1e-6, 1e-6, factor)


def _put_target(probabilities, kept, chunk, start, stats, z_loss, label_smoothing):
    rows, columns = kept.targets_in(chunk, start)
    lse, target_logit, chunk_lse = stats[0, rows], stats[1, rows], stats[2 + chunk, rows]
    scale = (chunk_lse - lse).exp_().clamp_min_(SMALLEST_SCALE)
    entry = (target_logit - lse).exp_() - (1 - label_smoothing) / _softmax_factor(lse, z_loss)
    probabilities[rows, columns] = (entry / scale).to(probabilities.dtype)


def torch_backward(grad, x, weight, bias, target, row_weight, stats, saved, ignore_index, z_loss, label_smoothing,
                   dtype, need_weight):
    (rows, vocabulary), wide = (len(x), len(weight)), wide_dtype(dtype)
    chunks = vocabulary_chunks(rows, vocabulary, "torch", dtype)
    kept = KeptRows(target, vocabulary, ignore_index, chunks)
    xs = kept.pick(x).to(dtype)
    grad = kept.pick(grad if row_weight is None else grad * row_weight).to(wide)
    lse = stats[0, :kept.n]
    factor = grad * _softmax_factor(lse, z_loss)
    uniform = grad * (label_smoothing / vocabulary)                # of every class: never worth a pass over N * V
    dx = torch.zeros(kept.n, x.shape[1], dtype=wide, device=x.device)
    dw, db = empty_weight_gradients(weight, bias, need_weight)
    for i, start, end in chunks:
        w = weight[start:end].to(dtype)
        if saved.numel():
            probabilities = saved_chunk(saved, rows, kept.n, start, end)
        else:
            probabilities = add_bias((xs @ w.t()).to(wide), bias, start, end)
            softmax_in_place(probabilities)
            probabilities = probabilities.to(dtype)
            _put_target(probabilities, kept, i, start, stats, z_loss, label_smoothing)
        scale = (factor * (stats[2 + i, :kept.n] - lse).exp_().clamp_min_(SMALLEST_SCALE))[:, None]
        dx.addcmul_((probabilities @ w).to(wide), scale)
        if need_weight:
            part = probabilities.t() @ (xs * scale).to(dtype)
            dw[start:end] = part - uniform @ xs.to(wide) if label_smoothing else part
            if bias is not None:
                part = (scale.t().to(dtype) @ probabilities)[0]
                db[start:end] = part - uniform.sum() if label_smoothing else part
    if label_smoothing:
        dx.addr_(uniform, weight.sum(0, dtype=wide), alpha=-1)
    return kept.put_back(dx.to(x.dtype), rows), dw, db


# -------------------------------------------------------------------------------------------------------------- Triton

@jit
def _ce_forward_kernel(x_ptr, w_ptr, b_ptr, target_ptr, lse_ptr, target_logit_ptr, N, C, first_class, ignore_index,
                       D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """lse [column blocks, N] of each tile; target_logit [N] by the one tile that holds the target."""
    row_block, col_block, row_in, col_in = tile(N, C, BM, BN)
    row = row_block * BM + tl.arange(0, BM)
    target = tl.load(target_ptr + row, row_in, ignore_index)
    if tl.max((target != ignore_index).to(tl.int32), 0) == 0:
        return
    logits = logits_keeping_target(x_ptr, w_ptr, b_ptr, target, target_logit_ptr, row, row_block, col_block, col_in,
                                   N, C, first_class, ignore_index, D, HAS_BIAS, PRECISION, BM, BN, BK)
    tl.store(lse_ptr + col_block.to(tl.int64) * N + row, tile_logsumexp(logits), row_in)


@jit
def _ce_backward_kernel(x_ptr, w_ptr, b_ptr, target_ptr, lse_ptr, grad_ptr, out_ptr, db_ptr, N, C, out_stride,
                        first_class, ignore_index, z_loss, on_target, on_all,
                        D: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [N, C] = dlogits = grad * ((1 + 2 z lse) softmax - on_target * onehot - on_all); db [row blocks, C]."""
    row_block, col_block, row_in, col_in = tile(N, C, BM, BN)
    row = row_block * BM + tl.arange(0, BM)
    target = tl.load(target_ptr + row, row_in, ignore_index)
    live = target != ignore_index
    d = tl.zeros((BM, BN), tl.float32)
    if tl.max(live.to(tl.int32), 0) == 1:
        logits = tile_logits(x_ptr, w_ptr, b_ptr, row_block, col_block, N, C, D, HAS_BIAS, PRECISION, BM, BN, BK)
        lse, grad = tl.load(lse_ptr + row, live, NEVER), tl.load(grad_ptr + row, live, 0.0)
        local, _ = target_column(target, first_class, col_block, C, ignore_index, BN)
        d = tl.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - on_all
        d = tl.where(tl.arange(0, BN)[None, :] == local[:, None], d - on_target, d) * grad[:, None]
    store_dlogits(d, out_ptr, db_ptr, row_block, col_block, row_in, col_in, out_stride, HAS_BIAS, BM, BN)


def triton_forward(x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype):
    """-> loss [N], stats [2, N] (logsumexp, target logit)."""
    (rows, width), vocabulary = x.shape, len(weight)
    check_targets(target, vocabulary, ignore_index)
    xs, target = live_rows(x, target, ignore_index, dtype), target.contiguous()
    block, launch = launch_options(x.device, "ce_forward", dtype, width)
    chunks = vocabulary_chunks(rows, vocabulary, "triton", dtype)
    chunk_lse = xs.new_empty(len(chunks), rows, dtype=torch.float32)
    target_logit = xs.new_zeros(rows, dtype=torch.float32)
    for i, start, end in chunks:
        tile_lse = xs.new_empty(-(-(end - start) // block[1]), rows, dtype=torch.float32)
        _ce_forward_kernel[grid(block, rows, end - start)](
            xs, weight_of(weight, start, end, dtype), bias_of(bias, start, end, torch.float32), target, tile_lse,
            target_logit, rows, end - start, start, ignore_index, D=width, HAS_BIAS=bias is not None, **launch)
        torch.logsumexp(tile_lse, 0, out=chunk_lse[i])
    live = target != ignore_index
    lse = torch.where(live, torch.logsumexp(chunk_lse, 0), 0.0)
    loss = lse - (1 - label_smoothing) * target_logit
    if label_smoothing:
        loss -= label_smoothing * _mean_logit(xs, weight, bias, torch.float32)
    if z_loss:
        loss += z_loss * lse.square()
    if row_weight is not None:
        loss *= row_weight
    return torch.where(live, loss, 0.0), torch.stack((lse, target_logit))


def triton_backward(grad, x, weight, bias, target, row_weight, stats, ignore_index, z_loss, label_smoothing, dtype,
                    need_weight):
    block, launch = launch_options(x.device, "ce_backward", dtype, x.shape[1])

    def fill(start, end, xs, w, b, out, db):
        _ce_backward_kernel[grid(block, len(xs), end - start)](
            xs, w, b, target, stats, grad, out, db, len(xs), end - start, out.stride(0), start, ignore_index, z_loss,
            1 - label_smoothing, label_smoothing / len(weight), D=x.shape[1], HAS_BIAS=b is not None, **launch)

    target = target.contiguous()
    grad = (grad if row_weight is None else grad * row_weight).float().contiguous()
    return gradients_by_chunk(x, weight, bias, target, ignore_index, dtype, need_weight, block, fill)


# ---------------------------------------------------------------------------------------------- operators for autograd

@torch.library.custom_op("unibert::linear_cross_entropy", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], target: Tensor, row_weight: Optional[Tensor],
             ignore_index: int, z_loss: float, label_smoothing: float, dtype: torch.dtype, backend: str,
             save: bool) -> tuple[Tensor, Tensor, Tensor]:
    arguments = x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype
    with running_on(x):
        if backend == "torch":
            return torch_forward(*arguments, save)
        return *triton_forward(*arguments), x.new_empty(1, 0, dtype=dtype)


@_forward.register_fake
def _(x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype, backend, save):
    rows, vocabulary, wide = x.shape[0], weight.shape[0], wide_dtype(dtype)    # len() would make a number of a symbolic size
    chunks = len(vocabulary_chunks(rows, vocabulary, backend, dtype)) if backend == "torch" else 0
    return (x.new_empty(rows, dtype=wide), x.new_empty(2 + chunks, rows, dtype=wide),
            x.new_empty(1, rows * vocabulary if save else 0, dtype=dtype))


@torch.library.custom_op("unibert::linear_cross_entropy_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], target: Tensor,
              row_weight: Optional[Tensor], stats: Tensor, saved: Tensor, ignore_index: int, z_loss: float,
              label_smoothing: float, dtype: torch.dtype, backend: str,
              need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    options = ignore_index, z_loss, label_smoothing, dtype, need_weight
    with running_on(x):
        if backend == "torch":
            return torch_backward(grad, x, weight, bias, target, row_weight, stats, saved, *options)
        return triton_backward(grad, x, weight, bias, target, row_weight, stats, *options)


@_backward.register_fake
def _(grad, x, weight, bias, target, row_weight, stats, saved, ignore_index, z_loss, label_smoothing, dtype, backend,
      need_weight):
    return (x.new_empty(x.shape), *empty_weight_gradients(weight, bias, need_weight))


def _save(ctx, inputs, output):
    x, weight, bias, target, row_weight, *ctx.options, _ = inputs
    _, stats, saved = output
    ctx.mark_non_differentiable(stats, saved)
    ctx.set_materialize_grads(False)                     # else backward would fill a zero gradient for `saved`
    ctx.save_for_backward(x, weight, bias, target, row_weight, stats, saved)


def _differentiate(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    x, weight, bias, target, row_weight, stats, saved = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = _backward(grad, x, weight, bias, target, row_weight, stats, saved, *ctx.options, need_weight)
    return (dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None) + (None,) * 8


_forward.register_autograd(_differentiate, setup_context=_save)


# ----------------------------------------------------------------------------------------------------- public function

def linear_cross_entropy(x, weight, bias, target, ignore_index=-100, z_loss=0.0, label_smoothing=0.0,
                         row_weight=None, backend="auto"):
    """Cross-entropy of softmax(x @ weight.T + bias) against target, one loss a row.

    x [N, D], weight [V, D], bias [V] or None (-inf rules a class out), target [N] int64: a class, or ignore_index,
    which gives exactly 0 and no gradient. row_weight [N] float32 multiplies the rows (a constant: no gradient to it).
    loss = row_weight * ((1 - label_smoothing) * nll + label_smoothing * mean over V of nll + z_loss * lse^2).
    Returns the loss [N] in float32 (float64 for float64 x without autocast).
    Matmuls run in the autocast dtype under torch.autocast, else in x.dtype; sums, softmax and the accumulation of
    gradients are float32. Gradients come back in the dtype of their tensor, so a float32 master weight gets float32;
    it is cast chunk by chunk, never whole. (Plain PyTorch rounds each finished sum of a CPU matmul to that dtype.)
    On a GPU dlogits are stored in 16 bits: float16 needs a scaled loss, as anywhere, bfloat16 does not.
    Raises ValueError for arguments that do not fit together, and for targets out of range: on the CPU always, on a
    GPU only under UNIBERT_CHECK=1, since looking would wait for the device.
    """
    backend, dtype = check_arguments("linear_cross_entropy", x, weight, bias, target, backend)
    if row_weight is not None and (row_weight.shape != target.shape or row_weight.device != x.device):
        raise ValueError(f"linear_cross_entropy: row_weight must be [{len(x)}] on {x.device}, "
                         f"not {list(row_weight.shape)} on {row_weight.device}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must be in [0, 1), not {label_smoothing}")
    if backend == "reference":
        return reference(x, weight, bias, target, row_weight, ignore_index, z_loss, label_smoothing, dtype)
    save = backend == "torch" and keep_workspace(1, x, weight, bias, dtype)
    return _forward(x, weight, bias, target, None if row_weight is None else row_weight.detach(), ignore_index,
                    float(z_loss), float(label_smoothing), dtype, backend, save)[0]
