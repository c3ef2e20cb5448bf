"""MLM cross-entropy and distillation in one sweep over the vocabulary, straight from hidden states.

With s, t the logits of student and teacher, T the temperature, p = softmax(s / T) and q = softmax(t / T):

    ce = lse(s) - s_target      kl = T^2 KL(q || p) = T^2 (sum_v q_v (t_v - s_v) / T - lse(t / T) + lse(s / T))
    ds = g_ce (softmax(s) - onehot) + g_kl T (p - q)        dX = ds W       dW = ds^T X         (student only)

sum_v q_v (t_v - s_v) is a mean under q, so tiles and chunks of the vocabulary give their own means and logsumexps, and
these combine to the whole: student and teacher tiles are computed side by side, once for the losses and once for ds,
and nothing V wide is kept for either. 6NDV + 2NEV FLOPs of work for a teacher of width E, 8NDV + 4NEV done.
Memory traffic and how the chunks were chosen: kernels/linear_losses.py.

    TRITON_INTERPRET=1 python -m pytest -q tests/test_kernels.py    # is it right? (without TRITON_INTERPRET on a GPU)
    python -m kernels.bench --only losses                          # is it fast?
"""
from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_losses import (NEVER, OUTSIDE, KeptRows, add_bias, bias_of, check_arguments, check_targets,
                                   empty_weight_gradients, gradients_by_chunk, grid, keep_workspace, launch_options,
                                   live_rows, logits_keeping_target, saved_chunk, softmax_in_place, store_dlogits,
                                   target_column, tile, tile_logits, tile_logsumexp, vocabulary_chunks, weight_of,
                                   wide_dtype)
from kernels.support import jit, running_on, tl


# ----------------------------------------------------------------------------------------------------------- reference

def reference(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature, ignore_index, dtype):
    wide, valid = wide_dtype(dtype), target != ignore_index
    student = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(wide)
    teacher = F.linear(teacher_x.to(dtype), teacher_weight.to(dtype),
                       None if teacher_bias is None else teacher_bias.to(dtype)).to(wide)
    ce = F.cross_entropy(student, target, reduction="none", ignore_index=ignore_index)
    terms = F.kl_div(F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1),
                     reduction="none", log_target=True)
    kl = terms.where(teacher > -float("inf"), 0.0).sum(1)        # 0 log 0 = 0, where a bias of -inf rules a class out
    return ce, torch.where(valid, temperature ** 2 * kl, 0.0)


# ------------------------------------------------------------------------------------------------------- plain PyTorch

def torch_forward(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature, ignore_index, dtype,
                  save):
    """-> ce [N], kl [N], stats [3 + 3 * chunks, N] (logsumexp of student, student / T, teacher / T, then of each
    chunk), saved [2, N * V]: the products x @ W of student and teacher, before the bias.

    KL = sum_v q_v (t_v - s_v) / T - lse(t / T) + lse(s / T): the sum is a mean under each chunk's own q,
    combined by the chunks' weights, so one sweep does.
    """
    (rows, vocabulary), wide = (len(x), len(weight)), wide_dtype(dtype)
    chunks = vocabulary_chunks(rows, vocabulary, "torch", dtype)
    kept = KeptRows(target, vocabulary, ignore_index, chunks)
    xs, txs = kept.pick(x).to(dtype), kept.pick(teacher_x).to(dtype)
    stats = torch.zeros(3 + 3 * len(chunks), rows, dtype=wide, device=x.device)
    saved = torch.empty(2, rows * vocabulary if save else 0, dtype=dtype, device=x.device)
    chunk_lse = stats[3:, :kept.n].unflatten(0, (len(chunks), 3))
    target_logit = xs.new_zeros(kept.n, dtype=wide)
    gap = xs.new_zeros(len(chunks), kept.n, dtype=wide)
    for i, start, end in chunks:
        products = (xs @ weight[start:end].to(dtype).t(), txs @ teacher_weight[start:end].to(dtype).t())
        if save:
            for part, product in enumerate(products):
                saved_chunk(saved, rows, kept.n, start, end, part).copy_(product)
        student, cooled, teacher = _three_logits(products, bias, teacher_bias, start, end, wide)
        in_chunk, columns = kept.targets_in(i, start)
        target_logit[in_chunk] = student[in_chunk, columns]
        difference = teacher - student
        chunk_lse[i, 0] = softmax_in_place(student)
        chunk_lse[i, 1] = softmax_in_place(cooled, 1 / temperature)
        chunk_lse[i, 2] = softmax_in_place(teacher, 1 / temperature)
        gap[i] = difference.mul_(teacher).sum(1)
    stats[:3, :kept.n], kl = _kl_from_chunks(chunk_lse, gap, temperature)
    return kept.put_back(stats[0, :kept.n] - target_logit, rows), kept.put_back(kl, rows), stats, saved


def _kl_from_chunks(chunk_lse, gap, temperature):
    """chunk_lse [chunks, 3, n], gap [chunks, n] (each chunk's mean of teacher - student) -> lse [3, n], T^2 KL [n]."""
    lse = torch.logsumexp(chunk_lse, 0)
    gap = (gap * chunk_lse[:, 2].softmax(0)).sum(0)     # not exp(chunk - lse): weights have to sum to 1 to the last bit
    return lse, temperature ** 2 * (gap / temperature + lse[1] - lse[2])


def _three_logits(products, bias, teacher_bias, start, end, wide):
    student = add_bias(torch.empty_like(products[0], dtype=wide).copy_(products[0]), bias, start, end)
    teacher = add_bias(torch.empty_like(products[1], dtype=wide).copy_(products[1]), teacher_bias, start, end)
    return student, student.clone(), teacher


def torch_backward(grad_ce, grad_kl, x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, stats, saved,
                   temperature, ignore_index, dtype, need_weight):
    (rows, vocabulary), wide = (len(x), len(weight)), wide_dtype(dtype)
    chunks = vocabulary_chunks(rows, vocabulary, "torch", dtype)
    kept = KeptRows(target, vocabulary, ignore_index, chunks)
    xs, txs = kept.pick(x).to(dtype), kept.pick(teacher_x).to(dtype)
    grad_ce, grad_kl = kept.pick(grad_ce).to(wide), kept.pick(grad_kl).to(wide) * temperature
    coefficient = torch.stack((grad_ce, grad_kl, -grad_kl))                # of p, of p at T, of the teacher at T
    lse = stats[:3, :kept.n]
    dx = torch.zeros(kept.n, x.shape[1], dtype=wide, device=x.device)
    dw, db = empty_weight_gradients(weight, bias, need_weight)
    for i, start, end in chunks:
        w = weight[start:end].to(dtype)
        if saved.numel():
            products = [saved_chunk(saved, rows, kept.n, start, end, part) for part in range(2)]
        else:
            products = (xs @ w.t(), txs @ teacher_weight[start:end].to(dtype).t())
        student, cooled, teacher = _three_logits(products, bias, teacher_bias, start, end, wide)
        softmax_in_place(student)
        softmax_in_place(cooled, 1 / temperature)
        softmax_in_place(teacher, 1 / temperature)
        scale = (coefficient * (stats[3 + 3 * i:6 + 3 * i, :kept.n] - lse).exp_())[:, :, None]
        dlogits = student.mul_(scale[0]).addcmul_(cooled, scale[1]).addcmul_(teacher, scale[2])
        in_chunk, columns = kept.targets_in(i, start)
        dlogits[in_chunk, columns] -= grad_ce[in_chunk]
        low = dlogits.to(dtype)
        dx += low @ w
        if need_weight:
            dw[start:end] = low.t() @ xs
            if bias is not None:
                db[start:end] = dlogits.sum(0)
    return kept.put_back(dx.to(x.dtype), rows), dw, db


# -------------------------------------------------------------------------------------------------------------- Triton


@jit
def _distill_forward_kernel(x_ptr, w_ptr, b_ptr, tx_ptr, tw_ptr, tb_ptr, target_ptr, part_ptr, target_logit_ptr,
                            N, C, first_class, ignore_index, inverse_t,
                            D: tl.constexpr, TD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TB: tl.constexpr,
                            PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """part [4, column blocks, N]: logsumexp of student, student / T, teacher / T; the mean of teacher - student
    under the teacher's own softmax of this tile."""
    row_block, col_block, row_in, col_in = tile(N, C, BM, BN)
    row = row_block * BM + tl.arange(0, BM)
    target = tl.load(target_ptr + row, row_in, ignore_index)
    if tl.max((target != ignore_index).to(tl.int32), 0) == 0:
        return
    student = logits_keeping_target(x_ptr, w_ptr, b_ptr, target, target_logit_ptr, row, row_block, col_block, col_in,
                                    N, C, first_class, ignore_index, D, HAS_BIAS, PRECISION, BM, BN, BK)
    part = part_ptr + col_block.to(tl.int64) * N + row
    part_stride = tl.cast(tl.cdiv(C, BN), tl.int64) * N
    tl.store(part, tile_logsumexp(student), row_in)
    tl.store(part + part_stride, tile_logsumexp(student * inverse_t), row_in)
    teacher = tile_logits(tx_ptr, tw_ptr, tb_ptr, row_block, col_block, N, C, TD, HAS_TB, PRECISION, BM, BN, BK)
    teacher = tl.where(col_in[None, :], teacher, OUTSIDE)
    gap = teacher - student
    teacher = teacher * inverse_t           # as the student's: the KL is a difference of the two logsumexps
    top = tl.max(teacher, 1)
    q = tl.exp(teacher - top[:, None])
    total = tl.sum(q, 1)
    tl.store(part + 2 * part_stride, top + tl.log(total), row_in)
    tl.store(part + 3 * part_stride, tl.sum(q * gap, 1) / total, row_in)


@jit
def _distill_backward_kernel(x_ptr, w_ptr, b_ptr, tx_ptr, tw_ptr, tb_ptr, target_ptr, lse_ptr, grad_ce_ptr,
                             grad_kl_ptr, out_ptr, db_ptr, N, C, out_stride, first_class, ignore_index, inverse_t,
                             D: tl.constexpr, TD: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TB: tl.constexpr,
                             PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out [N, C] = dlogits = grad_ce * (p - onehot) + grad_kl * (p at T - teacher at T); db [row blocks, C]."""
    row_block, col_block, row_in, col_in = tile(N, C, BM, BN)
    row = row_block * BM + tl.arange(0, BM)
    target = tl.load(target_ptr + row, row_in, ignore_index)
    live = target != ignore_index
    d = tl.zeros((BM, BN), tl.float32)
    if tl.max(live.to(tl.int32), 0) == 1:
        teacher = tile_logits(tx_ptr, tw_ptr, tb_ptr, row_block, col_block, N, C, TD, HAS_TB, PRECISION, BM, BN, BK)
        teacher_lse = tl.load(lse_ptr + 2 * N + row, live, NEVER)
        d -= tl.exp(teacher * inverse_t - teacher_lse[:, None])
        student = tile_logits(x_ptr, w_ptr, b_ptr, row_block, col_block, N, C, D, HAS_BIAS, PRECISION, BM, BN, BK)
        d += tl.exp(student * inverse_t - tl.load(lse_ptr + N + row, live, NEVER)[:, None])
        d *= tl.load(grad_kl_ptr + row, live, 0.0)[:, None]
        local, _ = target_column(target, first_class, col_block, C, ignore_index, BN)
        p = tl.exp(student - tl.load(lse_ptr + row, live, NEVER)[:, None])
        p = tl.where(tl.arange(0, BN)[None, :] == local[:, None], p - 1, p)
        d += p * tl.load(grad_ce_ptr + row, live, 0.0)[:, None]
    store_dlogits(d, out_ptr, db_ptr, row_block, col_block, row_in, col_in, out_stride, HAS_BIAS, BM, BN)


def triton_forward(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature, ignore_index, dtype):
    """-> ce [N], kl [N], stats [3, N]: logsumexp of student, student / T, teacher / T."""
    (rows, width), vocabulary = x.shape, len(weight)
    check_targets(target, vocabulary, ignore_index)
    live, target = target != ignore_index, target.contiguous()
    xs, txs = (live_rows(t, target, ignore_index, dtype) for t in (x, teacher_x))
    block, launch = launch_options(x.device, "distill_forward", dtype, min(width, teacher_x.shape[1]))
    chunks = vocabulary_chunks(rows, vocabulary, "triton", dtype)
    chunk_lse = xs.new_empty(len(chunks), 3, rows, dtype=torch.float32)
    gap = xs.new_empty(len(chunks), rows, dtype=torch.float32)
    target_logit = xs.new_zeros(rows, dtype=torch.float32)
    for i, start, end in chunks:
        part = xs.new_empty(4, -(-(end - start) // block[1]), rows, dtype=torch.float32)
        _distill_forward_kernel[grid(block, rows, end - start)](
            xs, weight_of(weight, start, end, dtype), bias_of(bias, start, end, torch.float32),
            txs, weight_of(teacher_weight, start, end, dtype), bias_of(teacher_bias, start, end, torch.float32),
            target, part, target_logit, rows, end - start, start, ignore_index, 1 / temperature,
            D=width, TD=teacher_x.shape[1], HAS_BIAS=bias is not None, HAS_TB=teacher_bias is not None, **launch)
        chunk_lse[i] = torch.logsumexp(part[:3], 1)
        gap[i] = (part[3] * part[2].softmax(0)).sum(0)
    stats, kl = _kl_from_chunks(chunk_lse, gap, temperature)
    stats = torch.where(live, stats, 0.0)
    return torch.where(live, stats[0] - target_logit, 0.0), torch.where(live, kl, 0.0), stats


def triton_backward(grad_ce, grad_kl, x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, stats,
                    temperature, ignore_index, dtype, need_weight):
    block, launch = launch_options(x.device, "distill_backward", dtype, min(x.shape[1], teacher_x.shape[1]))

    def fill(start, end, xs, w, b, out, db):
        tw, tb = weight_of(teacher_weight, start, end, dtype), bias_of(teacher_bias, start, end, torch.float32)
        _distill_backward_kernel[grid(block, len(xs), end - start)](
            xs, w, b, txs, tw, tb, target, stats, grad_ce, grad_kl, out, db, len(xs), end - start, out.stride(0), start,
            ignore_index, 1 / temperature, D=x.shape[1], TD=txs.shape[1], HAS_BIAS=b is not None,
            HAS_TB=tb is not None, **launch)

    txs, target = live_rows(teacher_x, target, ignore_index, dtype), target.contiguous()
    grad_ce, grad_kl = grad_ce.float().contiguous(), (grad_kl * temperature).float()
    return gradients_by_chunk(x, weight, bias, target, ignore_index, dtype, need_weight, block, fill)


# ---------------------------------------------------------------------------------------------- operators for autograd

@torch.library.custom_op("unibert::linear_distillation", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], target: Tensor, teacher_x: Tensor,
             teacher_weight: Tensor, teacher_bias: Optional[Tensor], temperature: float, ignore_index: int,
             dtype: torch.dtype, backend: str, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature, ignore_index, dtype)
    with running_on(x):
        if backend == "torch":
            return torch_forward(*arguments, save)
        return *triton_forward(*arguments), x.new_empty(2, 0, dtype=dtype)


@_forward.register_fake
def _(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature, ignore_index, dtype, backend,
      save):
    rows, vocabulary, wide = x.shape[0], weight.shape[0], wide_dtype(dtype)    # len() would make a number of a symbolic size
    chunks = len(vocabulary_chunks(rows, vocabulary, backend, dtype)) if backend == "torch" else 0
    return (x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide),
            x.new_empty(3 + 3 * chunks, rows, dtype=wide),
            x.new_empty(2, rows * vocabulary if save else 0, dtype=dtype))


@torch.library.custom_op("unibert::linear_distillation_backward", mutates_args=())
def _backward(grad_ce: Tensor, grad_kl: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], target: Tensor,
              teacher_x: Tensor, teacher_weight: Tensor, teacher_bias: Optional[Tensor], stats: Tensor, saved: Tensor,
              temperature: float, ignore_index: int, dtype: torch.dtype, backend: str,
              need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    tensors = grad_ce, grad_kl, x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, stats
    options = temperature, ignore_index, dtype, need_weight
    with running_on(x):
        if backend == "torch":
            return torch_backward(*tensors, saved, *options)
        return triton_backward(*tensors, *options)


@_backward.register_fake
def _(grad_ce, grad_kl, x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, stats, saved, temperature,
      ignore_index, dtype, backend, need_weight):
    return (x.new_empty(x.shape), *empty_weight_gradients(weight, bias, need_weight))


def _save(ctx, inputs, output):
    *tensors, temperature, ignore_index, dtype, backend, _ = inputs
    _, _, stats, saved = output
    ctx.options = temperature, ignore_index, dtype, backend
    ctx.mark_non_differentiable(stats, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, stats, saved)


def _differentiate(ctx, grad_ce, grad_kl, *_):
    if grad_ce is None and grad_kl is None:
        return (None,) * 12
    *tensors, stats, saved = ctx.saved_tensors
    grad_ce = stats.new_zeros(stats.shape[1]) if grad_ce is None else grad_ce
    grad_kl = stats.new_zeros(stats.shape[1]) if grad_kl is None else grad_kl
    need_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dw, db = _backward(grad_ce, grad_kl, *tensors, stats, saved, *ctx.options, need_weight)
    return (dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None) + (None,) * 9


_forward.register_autograd(_differentiate, setup_context=_save)


# ----------------------------------------------------------------------------------------------------- public function

def linear_distillation(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias, temperature=2.0,
                        ignore_index=-100, backend="auto"):
    """MLM cross-entropy and distillation loss in one sweep over the vocabulary.

    x [N, D], weight [V, D], bias [V] or None, target [N] int64; teacher_x [N, E], teacher_weight [V, E],
    teacher_bias [V] or None: the teacher's width E is free, its vocabulary is the student's.
    -> ce [N], kl [N], float32: ce as linear_cross_entropy, kl = T^2 * KL(softmax(teacher / T) || softmax(student / T))
    (Hinton et al. 2015, arXiv:1503.02531). Rows with target == ignore_index give 0 in both.
    Gradients reach x, weight and bias only; dtypes and errors as in linear_cross_entropy.
    """
    backend, dtype = check_arguments("linear_distillation", x, weight, bias, target, backend)
    check_arguments("linear_distillation (teacher)", teacher_x, teacher_weight, teacher_bias, target, backend)
    if len(teacher_weight) != len(weight) or teacher_x.device != x.device:
        raise ValueError(f"linear_distillation: teacher and student need one vocabulary and one device, not "
                         f"{len(teacher_weight)} on {teacher_x.device} and {len(weight)} on {x.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"linear_distillation: temperature must be positive and finite, not {temperature}")
    teacher = teacher_x.detach(), teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach()
    if backend == "reference":
        return reference(x, weight, bias, target, *teacher, temperature, ignore_index, dtype)
    save = backend == "torch" and keep_workspace(2, x, weight, bias, dtype)
    return _forward(x, weight, bias, target, *teacher, float(temperature), ignore_index, dtype, backend, save)[:2]
