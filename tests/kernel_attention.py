"""Attention against the float64 formula, forward and backward. Run by test_kernels.py."""
import importlib
import os
import random

import pytest
import torch
import torch.nn.functional as F

from kernel_common import BF16, FP16, FP32, FP64, default_dtype, every_backend, needs_gpu  # noqa: F401
from kernels import attention
from kernels.dropout import keep_mask

RAGGED = [7, 7, 1, 0, 33, 33, 0, 130, 1, 16]        # several blocks, part blocks, one token, none, neighbours of one length
SHORT = [5, 0, 1, 31, 32, 17, 0]                    # all fit one block: the fused backward kernel
LONG = [7, 0, 140, 1]                               # one does not: dQ, then dK and dV
assert max(LONG) > max(block for *_, (block, _) in importlib.import_module("kernels.attention").CONFIGS.values())


def packed(lengths, heads=1, head_dim=32, dtype=FP32, device="cpu", tail=3, seed=0, scale=1.0):
    """qkv [T, 3, heads, head_dim] with `tail` tokens of no sequence at the end, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths) + tail, 3, heads, head_dim, generator=generator, dtype=FP64) * scale
    cu_seqlens = torch.tensor([0] + lengths).cumsum(0).to(torch.int32)
    return qkv.to(device, dtype), cu_seqlens.to(device)


def gradient(like, seed=1):
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)
    return noise.to(like.device, like.dtype)


def run(qkv, cu_seqlens, backend, **options):
    """(out, gradient of qkv) for a fixed random gradient of out; q, k and v are views of one fused tensor."""
    qkv = qkv.detach().requires_grad_()
    max_seqlen = int(cu_seqlens.diff().max())
    out = attention(*qkv.unbind(1), cu_seqlens, max_seqlen, backend=backend, **options)
    out.backward(gradient(out))
    return out.detach(), qkv.grad


def exact(qkv, cu_seqlens, **options):
    return run(qkv.double(), cu_seqlens, "reference", **options)


def sdpa(qkv, cu_seqlens):
    """PyTorch's own kernel, a sequence at a time: what our errors are compared with."""
    qkv = qkv.detach().requires_grad_()
    bounds = cu_seqlens.tolist()
    pieces = []
    for a, b in zip(bounds, bounds[1:]):
        if b > a:
            q, k, v = qkv[a:b].permute(1, 2, 0, 3)[:, None]
            pieces.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    out = torch.cat(pieces + [torch.zeros_like(qkv[bounds[-1]:, 0])])
    out.backward(gradient(out))
    return out.detach(), qkv.grad


def errors(result, truth):
    """Root-mean-square and largest error, of out and of the gradient."""
    pairs = [(a.double() - b).flatten() for a, b in zip(result, truth)]
    return [(e.square().mean().sqrt().item(), e.abs().max().item()) for e in pairs]


def assert_as_exact_as(ours, theirs, mean=1.5, largest=3.0, units=((0, 0), (0, 0))):
    """The largest error is one unlucky rounding, so it may differ more than the mean. units: added to the bounds."""
    for what, (a, b), (c, d), (e, f) in zip(("out", "gradient"), ours, theirs, units):
        assert a <= mean * c + e and b <= largest * d + f, f"{what}: (rms, max) {a, b}, PyTorch's own {c, d}"


def rounding_units(truth, dtype):
    """Half a rounding unit of the values' root mean square, one of the largest: over few values PyTorch may be exact
    by luck."""
    eps = torch.finfo(dtype).eps
    return [(eps / 2 * t.square().mean().sqrt().item(), eps * t.abs().max().item()) for t in truth]


# ------------------------------------------------------------------------------------------- correctness

@every_backend
@pytest.mark.parametrize("lengths", [RAGGED, SHORT], ids=["ragged", "short"])
@pytest.mark.parametrize("scale", [1.0, 3.0])           # logits of standard deviation 1 and 9
def test_as_exact_as_pytorch(backend, device, dtype, lengths, scale):
    qkv, cu_seqlens = packed(lengths, heads=2, dtype=dtype, device=device, scale=scale)
    truth = exact(qkv, cu_seqlens)
    assert_as_exact_as(errors(run(qkv, cu_seqlens, backend), truth), errors(sdpa(qkv, cu_seqlens), truth))


@every_backend
def test_autocast_changes_nothing(backend, device, dtype):
    """Autocast is on inside operators: scores in fp32 would silently be bf16."""
    qkv, cu_seqlens = packed(RAGGED, dtype=dtype, device=device, scale=3.0)
    plain = run(qkv, cu_seqlens, backend)
    with torch.autocast(device, FP16 if dtype == FP16 else BF16):
        cast = run(qkv, cu_seqlens, backend)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


@every_backend
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
def test_head_dims(backend, device, dtype, head_dim):
    qkv, cu_seqlens = packed([20, 3, 70], heads=1, head_dim=head_dim, dtype=dtype, device=device)
    truth = exact(qkv, cu_seqlens)
    assert_as_exact_as(errors(run(qkv, cu_seqlens, backend), truth), errors(sdpa(qkv, cu_seqlens), truth))


@every_backend
def test_attention_random_shapes(backend, device, dtype):
    seed = int(os.environ.get("UNIBERT_TEST_SEED", random.randrange(2**31)))
    print(f"UNIBERT_TEST_SEED={seed}")                  # pytest shows it where the test fails
    draw = random.Random(seed)
    for _ in range(3):
        lengths = [draw.choice([0, 1, draw.randint(1, 40), draw.randint(1, 200)]) for _ in range(draw.randint(1, 6))]
        shape = dict(heads=draw.randint(1, 3), head_dim=draw.choice([16, 24, 32, 48]), tail=draw.choice([0, 1, 70]))
        print(lengths, shape)
        qkv, cu_seqlens = packed(lengths + [19], dtype=dtype, device=device, seed=seed, **shape)
        truth = exact(qkv, cu_seqlens)
        assert_as_exact_as(errors(run(qkv, cu_seqlens, backend), truth), errors(sdpa(qkv, cu_seqlens), truth),
                           units=rounding_units(truth, dtype))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention_gradcheck(backend, dropout):
    qkv, cu_seqlens = packed([3, 0, 5, 1], head_dim=16, dtype=FP64, tail=1)
    torch.autograd.gradcheck(
        lambda x: attention(*x.unbind(1), cu_seqlens, 5, backend=backend, dropout=dropout), qkv.requires_grad_())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_long_sequences_on_the_cpu(dtype):
    qkv, cu_seqlens = packed([2100, 30], heads=1, head_dim=16, dtype=dtype)     # 2100^2 scores do not fit one tile
    truth = exact(qkv, cu_seqlens)
    assert_as_exact_as(errors(run(qkv, cu_seqlens, "torch"), truth), errors(sdpa(qkv, cu_seqlens), truth))


@every_backend
@pytest.mark.parametrize("lengths", [RAGGED, SHORT], ids=["ragged", "short"])
def test_attention_extreme_logits(backend, device, dtype, lengths):
    """Logits up to +-1e4: every weight is 0 or one part of a tie, and the gradients stay finite."""
    qkv, cu_seqlens = packed(lengths, head_dim=16, dtype=dtype, device=device)
    qkv[:, :2] = 50 * qkv[:, :2].sign()                 # q . k / sqrt(16) = 625 x an even number
    qkv[:, 0, :, :] = 50.0
    qkv[::3, 1] = 50.0
    qkv[1::3, 1] = -50.0
    out, grad = run(qkv, cu_seqlens, backend)
    truth, _ = exact(qkv, cu_seqlens)
    assert out.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps * truth.abs().max().item())


@every_backend
@pytest.mark.parametrize("lengths", [RAGGED, SHORT], ids=["ragged", "short"])
def test_tokens_of_no_sequence(backend, device, dtype, lengths):
    """Whatever the slots after the last sequence hold, even NaN: output 0, gradient 0, nothing leaks."""
    tail = 150                                          # more than one block of any kernel
    qkv, cu_seqlens = packed(lengths, dtype=dtype, device=device, tail=tail)
    clean = run(qkv, cu_seqlens, backend)
    qkv[-tail:] = float("nan")
    dirty = run(qkv, cu_seqlens, backend)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and not b[-tail:].any() and b[:-tail].any()


@every_backend
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_slots_for_more_sequences_than_there_are(backend, device, dtype, dropout):
    """As in a training batch: a slot for every 8 tokens of a row of 256, those that are not needed empty."""
    rows = [40, 1, 128, 64, 5], [128, 127], [], [16] * 8
    lengths = [n for row in rows for n in row + [0] * (32 - len(row))]
    qkv, cu_seqlens = packed(lengths, dtype=dtype, device=device, tail=1024 - sum(lengths))
    dense = torch.cat((cu_seqlens[:1], cu_seqlens[1:][cu_seqlens.diff() > 0]))
    options = dict(dropout=dropout, seed=5)
    slotted, without = (run(qkv, cu, backend, **options) for cu in (cu_seqlens, dense))
    assert all(torch.equal(a, b) for a, b in zip(slotted, without))
    plain = errors(sdpa(qkv, cu_seqlens), exact(qkv, cu_seqlens))
    assert_as_exact_as(errors(slotted, exact(qkv, cu_seqlens, **options)), plain)


@every_backend
def test_nothing_but_empty_sequences(backend, device, dtype):
    for T in (0, 5):
        qkv, cu_seqlens = packed([0, 0], dtype=dtype, device=device, tail=T)
        out, grad = run(qkv, cu_seqlens, backend)
        assert out.shape == (T, 1, 32) and grad.shape == qkv.shape and not out.any() and not grad.any()


@every_backend
def test_a_sequence_sees_only_itself(backend, device, dtype):
    qkv, cu_seqlens = packed(RAGGED, dtype=dtype, device=device)
    before = run(qkv, cu_seqlens, backend)
    a, b = cu_seqlens[4].item(), cu_seqlens[5].item()          # one of two neighbours of one length
    qkv[a:b] += 1
    after = run(qkv, cu_seqlens, backend)
    for x, y in zip(before, after):
        assert torch.equal(x[:a], y[:a]) and torch.equal(x[b:], y[b:]) and not torch.equal(x[a:b], y[a:b])


@every_backend
def test_same_bits_every_time_and_for_every_layout(backend, device, dtype):
    qkv, cu_seqlens = packed(RAGGED, heads=2, dtype=dtype, device=device)
    first = run(qkv, cu_seqlens, backend)
    head_major = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    strided = torch.stack((cu_seqlens, cu_seqlens.flip(0)), 1)[:, 0]
    for again in (run(qkv, cu_seqlens, backend), run(head_major, cu_seqlens, backend), run(qkv, strided, backend)):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@every_backend
def test_attention_under_another_default_dtype(backend, device, dtype, default_dtype):
    qkv, cu_seqlens = packed(RAGGED, dtype=dtype, device=device)
    plain = run(qkv, cu_seqlens, backend)
    torch.set_default_dtype(default_dtype)
    other = run(qkv, cu_seqlens, backend)
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


# ----------------------------------------------------------------------------------------------- dropout

@every_backend
@pytest.mark.parametrize("lengths", [LONG, SHORT], ids=["long", "short"])
def test_dropout_has_the_mask_of_the_reference(backend, device, dtype, lengths):
    """One mask for every backend, forward and backward, so the error is that of the dtype and not of a draw."""
    qkv, cu_seqlens = packed(lengths, heads=2, dtype=dtype, device=device)
    truth = exact(qkv, cu_seqlens, dropout=0.3, seed=11)
    ours = errors(run(qkv, cu_seqlens, backend, dropout=0.3, seed=11), truth)
    plain = errors(run(qkv, cu_seqlens, backend), exact(qkv, cu_seqlens))
    assert_as_exact_as(ours, plain, mean=3, largest=5)      # fewer and larger weights
    other = run(qkv, cu_seqlens, backend, dropout=0.3, seed=12)
    assert errors(other, truth)[0][0] > 20 * ours[0][0]


@every_backend
def test_dropout_is_unbiased_and_zero_is_none(backend, device, dtype):
    qkv, cu_seqlens = packed([24, 8], heads=1, head_dim=16, dtype=dtype, device=device, tail=0)
    plain = run(qkv, cu_seqlens, backend)
    none = run(qkv, cu_seqlens, backend, dropout=0.0, seed=9)
    assert torch.equal(plain[0], none[0]) and torch.equal(plain[1], none[1])
    draws = torch.stack([attention(*qkv.unbind(1), cu_seqlens, 24, backend=backend, dropout=0.25, seed=s).double()
                         for s in range(64)])
    z = (draws.mean(0) - plain[0].double()) / (draws.std(0) / 8)
    assert z.abs().max() < 5.5 and z.square().mean() < 1.5


def test_dropout_mask_looks_random():
    n = 512
    query, key, head = torch.arange(n)[:, None], torch.arange(n), torch.arange(2)[:, None, None]
    for dropout in (0.1, 0.5):
        masks = [keep_mask(seed, dropout, head, query, key).double() - (1 - dropout) for seed in (0, 1, 2**40)]
        sigma = (dropout * (1 - dropout)) ** 0.5
        for i, x in enumerate(masks):
            assert abs(x.mean()) < 5 * sigma / x.numel() ** 0.5                             # keep rate
            assert x.mean(-1).std() < 1.2 * sigma / n ** 0.5 and x.mean(-2).std() < 1.2 * sigma / n ** 0.5
            others = [x[0] * x[1], x[:, 1:] * x[:, :-1], x[..., 1:] * x[..., :-1]]        # heads, queries, keys
            others += [x * y for y in masks[:i]]                                           # seeds
            assert all(abs(y.mean()) < 5 * sigma**2 / y.numel() ** 0.5 for y in others)


# -------------------------------------------------------------------------------------------- on a card only

@needs_gpu
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_long_sequences_on_a_gpu(head_dim):
    qkv, cu_seqlens = packed([8192, 1, 3000, 513], heads=2, head_dim=head_dim, dtype=BF16, device="cuda")
    truth = exact(qkv, cu_seqlens)
    assert_as_exact_as(errors(run(qkv, cu_seqlens, "triton"), truth), errors(sdpa(qkv, cu_seqlens), truth))


@needs_gpu
def test_offsets_past_31_bits_on_a_gpu():
    """The last sequence of a tensor of 2.5e9 elements must come out as it does alone."""
    heads, head_dim, length = 16, 128, 4096
    S = 2_500_000_000 // (3 * heads * head_dim * length)
    block = torch.randn(length, 3, heads, head_dim, device="cuda", dtype=BF16)
    qkv = block.repeat(S, 1, 1, 1)
    cu_seqlens = torch.arange(S + 1, device="cuda", dtype=torch.int32) * length
    g, results = torch.randn(length, heads, head_dim, device="cuda", dtype=BF16), []
    for packed_, cu, gradient in ((block, cu_seqlens[:2], g), (qkv, cu_seqlens, g.repeat(S, 1, 1))):
        out = attention(*packed_.requires_grad_().unbind(1), cu, length)
        results.append((out.detach()[-length:], torch.autograd.grad(out, packed_, gradient)[0][-length:]))
    assert qkv.numel() > 2**31 and all(torch.equal(a, b) for a, b in zip(*results))


@needs_gpu
def test_no_synchronisation_on_a_gpu():
    qkv, cu_seqlens = packed(RAGGED, dtype=BF16, device="cuda")
    qkv.requires_grad_()
    do = torch.ones(qkv.shape[0], 1, 32, dtype=BF16, device="cuda")
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            attention(*qkv.unbind(1), cu_seqlens, 130).backward(do)
        finally:
            torch.cuda.set_sync_debug_mode("default")
