"""Every kernel against the float64 formula, forward and backward: attention first, then the losses.

    TRITON_INTERPRET=1 python -m pytest -q tests/test_kernels.py        # with a GPU: without TRITON_INTERPRET

Without a GPU the Triton kernels run in Triton's interpreter (float32 and float16 only: its bf16 dot is wrong).
That shows that the mathematics and the masks are right, not that the machine code is: with a GPU the same tests
run on the card, in bf16 as well, with long sequences and with offsets past 2^31 elements.
"""
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when triton is imported, so before kernels

import pytest  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from kernels import attention, linear_cross_entropy, linear_distillation, linear_losses, support  # noqa: E402
from kernels.dropout import keep_mask  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux only")
interpreted = pytest.mark.skipif(CUDA, reason="Triton's interpreter is for machines without a GPU")

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
RAGGED = [7, 1, 0, 33, 0, 130, 1, 16]                # several blocks, part blocks, one token, none
SHORT = [5, 0, 1, 31, 32, 17, 0]                    # all fit one block: the fused backward kernel
BACKENDS = [
    *[("torch", "cpu", dtype) for dtype in (FP32, FP16, BF16)],
    *[pytest.param("triton", "cpu", dtype, marks=[interpreted, needs_triton]) for dtype in (FP32, FP16)],
    *[pytest.param(backend, "cuda", dtype, marks=needs_gpu)
      for backend in ("torch", "triton") for dtype in (FP32, FP16, BF16)],
]
every_backend = pytest.mark.parametrize("backend,device,dtype", BACKENDS)


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
            pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
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
    qkv, cu_seqlens = packed(lengths, dtype=dtype, device=device, tail=70)
    clean = run(qkv, cu_seqlens, backend)
    qkv[-70:] = float("nan")
    dirty = run(qkv, cu_seqlens, backend)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and not b[-70:].any() and b[:-70].any()


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
    a, b = cu_seqlens[3].item(), cu_seqlens[4].item()
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


@pytest.fixture(params=[FP64, BF16], ids=["default fp64", "default bf16"])
def default_dtype(request):
    """torch.set_default_dtype(torch.bfloat16) is how some build a model: it must not reach sums and logsumexps."""
    yield request.param
    torch.set_default_dtype(FP32)


@every_backend
def test_attention_under_another_default_dtype(backend, device, dtype, default_dtype):
    qkv, cu_seqlens = packed(RAGGED, dtype=dtype, device=device)
    plain = run(qkv, cu_seqlens, backend)
    torch.set_default_dtype(default_dtype)
    other = run(qkv, cu_seqlens, backend)
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


# ----------------------------------------------------------------------------------------------- dropout

@every_backend
@pytest.mark.parametrize("lengths", [[7, 0, 70, 1], SHORT], ids=["two blocks", "short"])
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


# ----------------------------------------------------------------------------------- torch.compile, errors

@every_backend
def test_compiles_as_one_graph(backend, device, dtype):
    torch._dynamo.reset()                               # the same code, compiled for another backend
    qkv, cu_seqlens = packed(SHORT, dtype=dtype, device=device)

    def step(x):
        out = attention(*(x * 1.5).unbind(1), cu_seqlens, 32, backend=backend)
        return (out * 0.5).sin()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = qkv.detach().requires_grad_()
        out = function(x)
        out.backward(gradient(out))
        results.append((out.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    with torch.no_grad():                               # eager code then goes past the operator, compiled code may not
        assert torch.equal(function(qkv), results[0][0])


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[interpreted, needs_triton])])
def test_opcheck(backend):
    qkv, cu_seqlens = packed(SHORT, head_dim=16)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    torch.library.opcheck(torch.ops.unibert.attention.default, (q, k, v, cu_seqlens, 32, backend, 0.0, 0),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def arguments(**changes):
    qkv, cu_seqlens = packed([4, 6], heads=2, head_dim=16)
    q, k, v = qkv.unbind(1)
    return dict(q=q, k=k, v=v, cu_seqlens=cu_seqlens, max_seqlen=6) | changes


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("changes,message", [
    (dict(q=torch.zeros(13, 32)), "must all be"),
    (dict(k=torch.zeros(12, 2, 16)), "must all be"),
    (dict(v=torch.zeros(13, 2, 16, dtype=FP16)), "share one"),
    (dict(zip("qkv", torch.zeros(3, 13, 2, 16, dtype=torch.int64))), "share one"),
    (dict(zip("qkv", torch.zeros(3, 13, 2, 8))), "head_dim must be 16 to 128"),
    (dict(zip("qkv", torch.zeros(3, 13, 2, 144))), "head_dim must be 16 to 128"),
    (dict(q=torch.zeros(13, 16, 2).transpose(1, 2)), "last dimension"),
    (dict(k=torch.zeros(13, 2, 16, device="meta")), "one device"),
    (dict(cu_seqlens=torch.tensor([0, 4, 10])), "int32"),
    (dict(cu_seqlens=int32(0, 4, 10)[None]), "int32"),
    (dict(cu_seqlens=int32()), "int32"),
    (dict(cu_seqlens=int32(1, 4, 10)), "start at 0"),
    (dict(cu_seqlens=int32(0, 6, 4, 10)), "never descend"),
    (dict(cu_seqlens=int32(0, 6, 14), max_seqlen=8), "T = 13"),
    (dict(max_seqlen=5), "sequence 1 has 6 tokens"),
    (dict(max_seqlen=-1), "max_seqlen"),
    (dict(dropout=1.0), "dropout"),
    (dict(dropout=-0.1), "dropout"),
    (dict(backend="cuda"), "backend"),
    (dict(zip("qkv", torch.zeros(3, 13, 2, 16, dtype=FP64)), backend="triton"), "float64"),
])
def test_bad_arguments(changes, message):
    everywhere = ["reference", "torch"] + ["triton"] * (not CUDA)        # on a GPU the first complaint is the device
    for backend in [changes["backend"]] if "backend" in changes else everywhere:
        with pytest.raises(ValueError, match=f"^attention: .*{message}"):
            attention(**arguments(**changes) | dict(backend=backend))


@pytest.mark.skipif(CUDA, reason="needs a machine where Triton cannot run: no GPU")
@needs_triton
def test_triton_on_the_cpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU.* use backend='torch', or set TRITON_INTERPRET=1"):
        attention(**arguments(), backend="triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        linear_cross_entropy(*problem(4, 10, 3, float32), backend="triton")


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
    alone = attention(*block.unbind(1), cu_seqlens[:2], length)
    out = attention(*qkv.unbind(1), cu_seqlens, length)
    assert qkv.numel() > 2**31 and torch.equal(out[-length:], alone)


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    results = []
    for device in ("cuda:0", "cuda:1"):
        qkv, cu_seqlens = packed(RAGGED, dtype=BF16, device=device)
        tensors = problem(20, 1100, 48, BF16, device, teacher_width=20)
        results.append([*run(qkv, cu_seqlens, "triton"), *cross_entropy("triton", *tensors[:4]),
                        *distillation("triton", *tensors)])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------------- losses

float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PATHS = [pytest.param("torch", "cpu", dtype, id=f"torch-{name}")
         for dtype, name in ((float32, "fp32"), (bfloat16, "bf16"), (float16, "fp16"), (float64, "fp64"))]
for dtype in (float32, float16):
    PATHS.append(pytest.param("triton", "cpu", dtype, id=f"interpreter-{dtype}".replace("torch.", ""), marks=[
        needs_triton, pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a GPU is")]))
for dtype in (float32, float16, bfloat16):
    PATHS += [pytest.param(backend, "cuda", dtype, id=f"gpu-{backend}-{dtype}".replace("torch.", ""), marks=needs_gpu)
              for backend in ("triton", "torch")]
on_all_paths = pytest.mark.parametrize("backend, device, dtype", PATHS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even at test sizes: 512 columns on the torch path, 1,024 on the Triton path."""
    monkeypatch.setattr(linear_losses, "CHUNK_BYTES", 1)
    monkeypatch.setattr(linear_losses, "GPU_CHUNK_BYTES", 1)


def problem(n, v, d, dtype=float64, device="cpu", seed=0, ignored=0.2, teacher_width=None, scale=1.0):
    """x, weight, bias (leaves in `dtype`), target; with teacher_width also the teacher's three."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, d, generator=g) * scale, torch.randn(v, d, generator=g), torch.randn(v, generator=g)]
    target = torch.randint(0, v, (n,), generator=g)
    target[torch.rand(n, generator=g) < ignored] = -100
    if teacher_width:
        tensors += [torch.randn(n, teacher_width, generator=g), torch.randn(v, teacher_width, generator=g),
                    torch.randn(v, generator=g)]
    tensors = [t.to(device, dtype) for t in tensors]
    for t in tensors[:3]:
        t.requires_grad_()
    return (*tensors[:3], target.to(device), *tensors[3:])


def cross_entropy(backend, x, weight, bias, target, grad=None, **options):
    """[loss, dx, dweight, dbias] for a random gradient of each row's loss."""
    loss = linear_cross_entropy(x, weight, bias, target, backend=backend, **options)
    grad = torch.linspace(-1, 2, len(x)) if grad is None else grad
    wanted = [t for t in (x, weight, bias) if t is not None]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, grad.to(loss))]


def distillation(backend, x, weight, bias, target, *teacher, **options):
    """[ce, kl, dx, dweight, dbias]: the rows of ce and kl get unrelated gradients."""
    ce, kl = linear_distillation(x, weight, bias, target, *teacher, backend=backend, **options)
    total = (ce * torch.linspace(-1, 2, len(x)).to(ce)).sum() + (kl * torch.linspace(3, -1, len(x)).to(kl)).sum()
    return [ce.detach(), kl.detach(), *torch.autograd.grad(total, [t for t in (x, weight, bias) if t is not None])]


def exact_losses(tensors):
    """The same numbers on the CPU in float64, for the reference."""
    return [t if t is None else t.detach().cpu() if t.dtype == torch.int64 else
            t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors]


def error(got, truth):
    return ((got.cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_close_to_formula(function, backend, tensors, **options):
    """Each output's error is at most 3 times that of the plain formula in the same dtype, plus that dtype's rounding
    unit (2e-6 for float32's sums): over one or two rows the plain formula may be exact by luck."""
    truth = function("reference", *exact_losses(tensors), **options)
    plain = function("reference", *tensors, **options)
    ours = function(backend, *tensors, **options)
    for i, (a, b, t) in enumerate(zip(ours, plain, truth)):
        assert a.isfinite().all(), f"output {i} is not finite"
        floor = 1e-13 if tensors[0].dtype == float64 else max(2e-6, torch.finfo(tensors[0].dtype).eps / 2)
        assert error(a, t) <= 3 * error(b, t) + floor, f"output {i}: error {error(a, t):.1e}, plain {error(b, t):.1e}"


SHAPES = [(1, 5, 7), (2, 1, 16), (17, 1301, 24), (70, 1537, 100), (16, 256, 32)]


@on_all_paths
@pytest.mark.parametrize("n, v, d", SHAPES)
def test_cross_entropy_on_a_grid_of_shapes(backend, device, dtype, n, v, d):
    assert_close_to_formula(cross_entropy, backend, problem(n, v, d, dtype, device))


@on_all_paths
@pytest.mark.parametrize("options", [dict(z_loss=0.01), dict(label_smoothing=0.1),
                                     dict(z_loss=0.01, label_smoothing=0.1, ignore_index=3)])
def test_z_loss_smoothing_and_row_weights(backend, device, dtype, options):
    x, weight, bias, target = problem(19, 1100, 40, dtype, device)
    target[target == -100] = options.get("ignore_index", -100)
    row_weight = torch.rand(19, generator=torch.Generator().manual_seed(1)).to(device)

    def weighted(backend, *tensors, **options):
        return cross_entropy(backend, *tensors, row_weight=row_weight.to(tensors[0].device), **options)
    assert_close_to_formula(weighted, backend, (x, weight, bias, target), **options)


@on_all_paths
@pytest.mark.parametrize("n, v, d, e", [(1, 5, 7, 3), (17, 1301, 24, 40), (40, 700, 100, 64),
                                        (3, 8193, 16, 16)])          # the last chunk is one class
def test_distillation_on_a_grid_of_shapes(backend, device, dtype, n, v, d, e):
    tensors = problem(n, v, d, dtype, device, teacher_width=e)
    assert_close_to_formula(distillation, backend, tensors)
    assert_close_to_formula(distillation, backend, tensors, temperature=3.5)


@on_all_paths
def test_without_bias(backend, device, dtype):
    x, weight, _, target = problem(9, 600, 33, dtype, device)
    assert_close_to_formula(cross_entropy, backend, (x, weight, None, target))
    *student, target, tx, tw, _ = problem(9, 600, 33, dtype, device, teacher_width=20)
    assert_close_to_formula(distillation, backend, (*student[:2], None, target, tx, tw, None))


@on_all_paths
def test_losses_random_shapes(backend, device, dtype):
    seed = int(os.environ.get("UNIBERT_TEST_SEED", random.randrange(10**6)))
    print(f"UNIBERT_TEST_SEED={seed}")
    draw = random.Random(seed)
    for case in range(3):
        # In 16 bits two errors are compared, each a statistic over rows: a ratio of two or three rows says nothing.
        n, ignored = (draw.randint(1, 50), draw.random()) if dtype.itemsize > 2 else (draw.randint(32, 50), 0.2)
        # With one class every loss is 0, and an error relative to that says nothing.
        v, d, e = draw.randint(2, 1500), draw.randint(1, 90), draw.randint(1, 90)
        print(f"case {case}: n={n} v={v} d={d} e={e} ignored={ignored}")
        tensors = problem(n, v, d, dtype, device, seed=seed + case, ignored=ignored, teacher_width=e)
        options = dict(z_loss=draw.choice([0, 0.02]), label_smoothing=draw.choice([0, 0.2]))
        if (tensors[3] != -100).any():
            assert_close_to_formula(cross_entropy, backend, tensors[:4], **options)
            assert_close_to_formula(distillation, backend, tensors, temperature=draw.uniform(0.7, 5))


@on_all_paths
def test_ignored_rows_are_exactly_absent(backend, device, dtype):
    """Even rows that hold NaN and infinity; and dW is as if they had never been there."""
    x, weight, bias, target, *teacher = problem(23, 700, 48, dtype, device, ignored=0, teacher_width=24)
    with torch.no_grad():
        target[18:] = -100
        x[20], x[21] = float("nan"), float("inf")
    loss, dx, dw, db = cross_entropy(backend, x, weight, bias, target, z_loss=0.1)
    kept = x.detach()[:18].requires_grad_()
    grad = torch.linspace(-1, 2, 23)[:18]
    loss_kept, dx_kept, dw_kept, db_kept = cross_entropy(backend, kept, weight, bias, target[:18], grad, z_loss=0.1)
    assert torch.equal(loss[18:], torch.zeros_like(loss[18:])) and torch.equal(dx[18:], torch.zeros_like(dx[18:]))
    for a, b in ((loss[:18], loss_kept), (dx[:18], dx_kept), (dw, dw_kept), (db, db_kept)):
        # The Triton path multiplies zeros in their place: sums of another length, so another last bit.
        rtol = 1e-5 if backend == "torch" or dtype == float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-6)
    ce, kl, dx, dw, db = distillation(backend, x, weight, bias, target, *teacher)
    assert not ce[18:].any() and not kl[18:].any() and not dx[18:].any()
    assert all(t.isfinite().all() for t in (ce, kl, dx, dw, db))


@on_all_paths
def test_all_rows_ignored(backend, device, dtype):
    x, weight, bias, target, *teacher = problem(5, 600, 16, dtype, device, teacher_width=8)
    target.fill_(-100)
    for outputs in (cross_entropy(backend, x, weight, bias, target, z_loss=0.1, label_smoothing=0.1),
                    distillation(backend, x, weight, bias, target, *teacher)):
        for output in outputs:
            assert torch.equal(output, torch.zeros_like(output))


@on_all_paths
def test_losses_extreme_logits(backend, device, dtype):
    """Logits of +-16,384: the row's largest wins, the loss is the distance to it, nothing is NaN."""
    n, v, d = 6, 1200, 16
    x, weight, bias, target, *teacher = problem(n, v, d, dtype, device, ignored=0, teacher_width=8)
    with torch.no_grad():
        x.zero_(), weight.zero_(), bias.zero_()
        x[:, 0], weight[7, 0], weight[1100, 0] = 128, 128, -128            # logits 16384, -16384 and 0
        target.copy_(torch.tensor([7, 1100, 3, 7, 1100, 3]))
    loss, dx, dw, db = cross_entropy(backend, x, weight, bias, target, torch.ones(n))
    torch.testing.assert_close(loss.cpu().float(), torch.tensor([0.0, 32768, 16384] * 2))
    expected = torch.zeros(v)
    expected[7], expected[1100], expected[3] = 6 - 2, -2, -2               # sum over rows of softmax - onehot
    torch.testing.assert_close(db.cpu().float(), expected, atol=1e-6, rtol=max(1e-6, torch.finfo(dtype).eps))
    torch.testing.assert_close(dx[:, 0].cpu().float(), torch.tensor([0.0, 256, 128] * 2), atol=1e-3, rtol=1e-3)
    assert all(t.isfinite().all() for t in distillation(backend, x, weight, bias, target, *teacher))


@on_all_paths
def test_classes_ruled_out_by_the_bias(backend, device, dtype):
    """A bias of -inf, as for rows that only pad the vocabulary: whole tiles of it, and all of the last chunk."""
    x, weight, bias, target = problem(7, 8193, 16, dtype, device, ignored=0)
    with torch.no_grad():
        bias[256:1024], bias[5000], bias[-1] = -float("inf"), -float("inf"), -float("inf")
        target.fill_(3)[::2] = 1024
    assert_close_to_formula(cross_entropy, backend, (x, weight, bias, target))


@on_all_paths
def test_losses_under_another_default_dtype(backend, device, dtype, default_dtype):
    tensors = problem(9, 1100, 16, dtype, device, teacher_width=8)
    plain = cross_entropy(backend, *tensors[:4], z_loss=0.1) + distillation(backend, *tensors)
    torch.set_default_dtype(default_dtype)
    other = cross_entropy(backend, *tensors[:4], z_loss=0.1) + distillation(backend, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@on_all_paths
def test_confident_rows_keep_an_accurate_gradient(backend, device, dtype):
    """p = 1 - 1e-3: the gradient is p - 1, which must not be the difference of two rounded numbers."""
    x, weight, bias, target = problem(24, 1200, 64, dtype, device, ignored=0)
    with torch.no_grad():
        weight *= 0.1
        x.copy_(weight[target] * (11 / weight[target].square().sum(1, keepdim=True)))
        bias.zero_()
    truth, plain, ours = (cross_entropy(b, *t, torch.ones(24)) for b, t in (
        ("reference", exact_losses((x, weight, bias, target))), ("reference", (x, weight, bias, target)),
        (backend, (x, weight, bias, target))))
    assert truth[0].mean() < 0.2
    for a, b, t in zip(ours, plain, truth):
        assert error(a, t) <= 3 * error(b, t) + (1e-12 if dtype == float64 else 5e-6)


@pytest.mark.parametrize("backend, device, dtype", [p for p in PATHS if p.id != "interpreter-float16"])
def test_vocabulary_of_250037(backend, device, dtype, monkeypatch):
    monkeypatch.setattr(linear_losses, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(linear_losses, "GPU_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(linear_losses, "INTERPRETER_CONFIG", (16, 8192, 16, 1, 1))
    x, weight, bias, target, *teacher = problem(4, 250_037, 12, dtype, device, ignored=0, teacher_width=5)
    target[0], target[1], target[2] = 0, 250_036, -100
    assert_close_to_formula(cross_entropy, backend, (x, weight, bias, target))
    assert_close_to_formula(distillation, backend, (x, weight, bias, target, *teacher))


@on_all_paths
def test_same_bits_every_time(backend, device, dtype):
    tensors = problem(20, 1100, 48, dtype, device, teacher_width=20)       # two blocks of rows, two chunks
    for function, arguments in ((cross_entropy, tensors[:4]), (distillation, tensors)):
        for a, b in zip(function(backend, *arguments), function(backend, *arguments)):
            assert torch.equal(a, b)


@on_all_paths
def test_views_with_any_stride(backend, device, dtype):
    x, weight, bias, target, *teacher = problem(12, 600, 16, dtype, device, teacher_width=8)
    strided = [t.detach().t().contiguous().t().requires_grad_() for t in (x, weight)]
    strided.append(torch.stack((bias.detach(), bias.detach()), 1)[:, 0].requires_grad_())
    strided += [torch.stack((target, target), 1)[:, 0], *(t.t().contiguous().t() for t in teacher[:2]), teacher[2]]
    for function, count in ((cross_entropy, 4), (distillation, 7)):
        for a, b in zip(function(backend, *strided[:count]),
                        function(backend, *(x, weight, bias, target, *teacher)[:count])):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saving", [True, False], ids=["saved", "recomputed"])
def test_losses_gradcheck(saving, monkeypatch):
    """The torch path in float64, with the workspace kept from forward and without."""
    monkeypatch.setattr(linear_losses, "WORKSPACE_BYTES", (512 << 20) if saving else 0)
    x, weight, bias, target, *teacher = problem(6, 515, 3, teacher_width=2)
    for options in (dict(), dict(z_loss=0.1, label_smoothing=0.2, row_weight=torch.rand(6))):
        assert torch.autograd.gradcheck(
            lambda *t: linear_cross_entropy(*t, target, **options), (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *t: linear_distillation(*t, target, *teacher, temperature=1.7), (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("backend, device, dtype", [p for p in PATHS if "torch" in p.id])
def test_saved_and_recomputed_agree(backend, device, dtype, monkeypatch):
    tensors = problem(21, 1400, 32, dtype, device, teacher_width=16)
    kept = cross_entropy(backend, *tensors[:4], z_loss=0.1), distillation(backend, *tensors)
    monkeypatch.setattr(linear_losses, "WORKSPACE_BYTES", 0)
    again = cross_entropy(backend, *tensors[:4], z_loss=0.1), distillation(backend, *tensors)
    for a, b in zip(kept[0] + kept[1], again[0] + again[1]):
        assert torch.equal(a, b)


@on_all_paths
def test_distillation_from_itself_is_zero(backend, device, dtype):
    """KL = 0 when teacher and student are one model, and then only the cross-entropy has a gradient."""
    x, weight, bias, target = problem(20, 1200, 32, dtype, device)
    ce, kl = linear_distillation(x, weight, bias, target, x, weight, bias, backend=backend)
    assert kl.abs().max() < (1e-12 if dtype == float64 else 1e-5)
    dx, dw = torch.autograd.grad(kl.sum(), (x, weight))
    assert dx.abs().max() < 1e-4 and dw.abs().max() < 1e-4


@on_all_paths
def test_temperature_squared(backend, device, dtype):
    """At large T, T^2 * KL tends to half the variance of the logit gap under the uniform distribution."""
    x, weight, bias, target, *teacher = problem(8, 600, 16, dtype, device, ignored=0, teacher_width=8)
    _, kl = linear_distillation(x, weight, bias, target, *teacher, temperature=100.0, backend=backend)
    gap = F.linear(*teacher).double() - F.linear(x, weight, bias).double()
    torch.testing.assert_close(kl.double(), gap.var(1, correction=0) / 2, rtol=0.1, atol=0.05)


@on_all_paths
def test_no_gradient_to_the_teacher_and_none_that_nobody_asked_for(backend, device, dtype):
    x, weight, bias, target, *teacher = problem(8, 600, 16, dtype, device, teacher_width=8)
    for t in teacher:
        t.requires_grad_()
    ce, kl = linear_distillation(x, weight, bias, target, *teacher, backend=backend)
    (ce.sum() + kl.sum()).backward()
    assert all(t.grad is None for t in teacher) and all(t.grad is not None for t in (x, weight, bias))
    frozen = weight.detach()
    loss = linear_cross_entropy(x, frozen, bias.detach(), target, backend=backend)
    assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape
    ce, _ = linear_distillation(x, frozen, None, target, *teacher, backend=backend)         # kl unused
    dx, = torch.autograd.grad(ce.sum(), x)
    alone, = torch.autograd.grad(linear_cross_entropy(x, frozen, None, target, backend=backend).sum(), x)
    assert error(dx, alone.cpu().double()) < max(1e-5, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("n, v, d", [(64, 3000, 128), (200, 5000, 256)])
def test_autocast_against_torchs_own(n, v, d, monkeypatch):
    """bfloat16 matmuls over a float32 master weight: float32 gradients, within twice eager autocast's own error."""
    monkeypatch.setattr(linear_losses, "CHUNK_BYTES", 1 << 20)
    x, weight, bias, target = problem(n, v, d, float32, scale=0.3)
    truth = cross_entropy("reference", *exact_losses((x, weight, bias, target)), torch.ones(n))
    with torch.autocast("cpu", bfloat16):
        ours = cross_entropy("torch", x, weight, bias, target, torch.ones(n))
        eager = F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="none")
    eager = [eager, *torch.autograd.grad(eager.sum(), (x, weight, bias))]
    for a, b, t in zip(ours, eager, truth):
        assert a.dtype == float32
        assert error(a, t) <= 2 * error(b, t), (error(a, t), error(b, t))


@pytest.mark.parametrize("half", [bfloat16, float16])
def test_autocast_reaches_the_matmuls_alone(half):
    """As with inputs that are 16 bits already; with label smoothing, whose mean logit is a product of its own."""
    x, weight, bias, target = problem(20, 1300, 64, bfloat16)
    with torch.autocast("cpu", half):
        loss = linear_cross_entropy(x.float(), weight.float(), bias.float(), target, label_smoothing=0.2)
    plain = linear_cross_entropy(x.to(half), weight.to(half), bias.to(half), target, label_smoothing=0.2)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compile_takes_a_whole_step_once(backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def step(x, weight, bias, target, *teacher):
        loss = linear_cross_entropy(x * 2, weight, bias, target, z_loss=1e-3, backend=backend).sum()
        ce, kl = linear_distillation(x * 2, weight, bias, target, *teacher, backend=backend)
        return loss + ce.sum() + kl.mean()

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    torch._dynamo.reset()                                    # the same code, compiled for another backend
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):                                # other values, other ignored rows, the same shapes
            tensors = problem(20, 700, 24, float32, device, seed=seed, ignored=seed / 4, teacher_width=12)
            for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors[:3]),
                            torch.autograd.grad(step(*tensors), tensors[:3])):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_operators_obey_torch_library():
    # No ignored rows: opcheck compares whole outputs, and the workspace is not written past the rows that count.
    x, weight, bias, target, *teacher = problem(6, 600, 8, float32, ignored=0, teacher_width=4)
    options = (-100, 0.1, 0.1, float32, "torch", True)
    operator = torch.ops.unibert.linear_cross_entropy.default
    torch.library.opcheck(operator, (x, weight, bias, target, torch.rand(6), *options))
    torch.library.opcheck(operator, (x, weight, None, target, None, *options[:-1], False))
    torch.library.opcheck(torch.ops.unibert.linear_distillation.default,
                          (x, weight, bias, target, *teacher, 2.0, -100, float32, "torch", True))
    # dX has strides of its own, whatever x's are: torch.compile asserts that the fake kernel says so.
    column_major, grad = x.detach().t().contiguous().t(), torch.ones(6)
    _, stats, saved = operator(x.detach(), weight, bias, target, None, *options)
    torch.library.opcheck(torch.ops.unibert.linear_cross_entropy_backward.default, (
        grad, column_major, weight, bias, target, None, stats, saved, *options), test_utils="test_faketensor")
    _, _, stats, saved = torch.ops.unibert.linear_distillation(x.detach(), weight, bias, target, *teacher, 2.0, -100,
                                                               float32, "torch", True)
    torch.library.opcheck(torch.ops.unibert.linear_distillation_backward.default, (
        grad, grad, column_major, weight, bias, target, *teacher, stats, saved, 2.0, -100, float32, "torch", True),
        test_utils="test_faketensor")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to read peak memory")
def test_memory_stays_within_the_workspace():
    """Peak memory of a process of its own, from the thriftiest way to the plain loss, each above the last."""
    script = textwrap.dedent("""
        import re, torch, torch.nn.functional as F
        from pathlib import Path
        from kernels import linear_cross_entropy, linear_losses
        n, v, d = 512, 60_000, 32
        x, weight = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
        target = torch.randint(0, v, (n,))
        def ours(x, target):
            return linear_cross_entropy(x, weight, None, target).mean()
        def recomputed(x, target):
            linear_losses.WORKSPACE_BYTES = 0
            return ours(x, target)
        def saved(x, target):
            linear_losses.WORKSPACE_BYTES = 512 << 20
            return ours(x, target)
        def plain(x, target):
            return F.cross_entropy(F.linear(x, weight), target)
        def megabytes(what):
            return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
        for loss in (recomputed, saved, plain):
            loss(x[:4], target[:4]).backward()
        before = megabytes("VmRSS")
        for loss in (recomputed, saved, plain):
            loss(x, target).backward()
            print(megabytes("VmHWM") - before)
    """)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
                          check=True, text=True, capture_output=True)
    recomputed, saved, plain = map(float, done.stdout.split())
    logits, dw = 512 * 60_000 * 4 / 2**20, 60_000 * 32 * 4 / 2**20         # MiB in float32: 117 and 7
    assert recomputed < 40 + dw < logits / 2, done.stdout
    assert saved < logits + 40 + dw, done.stdout
    assert plain > 1.8 * logits, done.stdout


def test_bad_arguments_raise_one_line():
    x, weight, bias, target, *teacher = problem(4, 10, 3, float32, teacher_width=2)
    wrong = [
        ((x, weight[:, :2], bias, target), {}, "do not fit"),
        ((x[0], weight, bias, target), {}, "do not fit"),
        ((x[:0], weight[:0], bias[:0], target[:0]), {}, "V at least 1"),
        ((x.long(), weight, bias, target), {}, "floating point"),
        ((x, weight, bias[:5], target), {}, "bias must be"),
        ((x, weight, bias, target[:3]), {}, "target must be"),
        ((x, weight, bias, target.int()), {}, "int64"),
        ((x, weight, bias, torch.full((4,), 10)), {}, r"target\[0\] = 10"),
        ((x, weight, bias, torch.tensor([1, 2, -1, 3])), {}, r"target\[2\] = -1"),
        ((x, weight.to("meta"), bias, target), {}, "one device"),
        ((x, weight, bias, target), dict(backend="cuda"), "backend must be"),
        ((x, weight, bias, target), dict(row_weight=torch.ones(3)), "row_weight"),
        ((x, weight, bias, target), dict(label_smoothing=1.5), "label_smoothing"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            linear_cross_entropy(*arguments, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="one vocabulary"):
        linear_distillation(x, weight, bias, target, teacher[0], teacher[1][:9], None)
    with pytest.raises(ValueError, match="teacher.*target must be"):
        linear_distillation(x, weight, bias, target, teacher[0][:3], *teacher[1:])
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            linear_distillation(x, weight, bias, target, *teacher, temperature=temperature)
    with pytest.raises(ValueError, match=r"target\[1\] = 99"):
        linear_distillation(x, weight, bias, torch.tensor([1, 99, 2, 3]), *teacher)
    if support.triton is not None and not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bfloat16"):
            linear_cross_entropy(x.bfloat16(), weight, bias, target, backend="triton")


@needs_triton
def test_kernels_compile_for_hopper_without_a_gpu():
    """No spills, shared memory within the card's 227 KiB, tensor cores in use, loads in flight while they work. All
    configurations: kernels.bench."""
    script = textwrap.dedent("""
        from kernels.configurations import compile_configurations, compile_one, fault_of, source_of
        for kind, wanted in (("attention", "bf16 head_dim 64"), ("losses", "bf16 D=384")):
            for name, source, options in compile_configurations(kind, 90):
                if wanted in name and "dropout" not in name:
                    kernel, registers, spilled = compile_one(source, options, 90)
                    ptx = kernel.asm["ptx"]
                    assert fault_of(90, spilled, kernel.metadata.shared) == "" and "wgmma.mma_async" in ptx, name
                    assert options["num_stages"] == 1 or "cp.async" in ptx, name
                    print(name)
                if name == "distill_forward bf16 D=384 E=768":       # Triton makes an argument that is 1 a constant
                    fn = source.fn
                    constants = {fn.arg_names[i]: value for (i,), value in source.constants.items()} | {"C": 1}
                    source = source_of(fn, source.signature, constants, lambda arg: arg.endswith("_ptr"))
                    compile_one(source, options, 90)
                    print("one class")
    """)
    assert len(without_interpreter(script).splitlines()) == 9


@needs_triton
def test_a_new_seed_or_batch_compiles_nothing_again():
    """Triton keys a compiled kernel by each argument's type, and by whether it is 1 or a multiple of 16 unless told not
    to look; in a tuple it always looks, and a seed of 1 would be a constant."""
    script = textwrap.dedent("""
        import importlib, torch
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature
        file = importlib.import_module("kernels.attention")
        q, x = torch.zeros(3, 2, 16), torch.zeros(16)
        cu = torch.zeros(20, dtype=torch.int32)
        for kernel in (file._forward_kernel, file._dq_kernel, file._dkv_kernel, file._short_kernel):
            bind = create_function_from_signature(kernel.signature, kernel.params,
                                                  CUDABackend(GPUTarget("cuda", 90, 32)))
            keys = set()
            for T, S, number in ((7, 15, 7), (1, 1, 1), (32, 16, 32)):
                seed = (number << 32) * pow(0x9E3779B97F4A7C15, -1, 2**64) % 2**64          # folds to `number`
                known = file._arguments(q, q, q, cu[:S + 1], number / 2**31, seed) | dict(T=T, BITS=4)
                tensors = dict.fromkeys(("out", "do", "dq", "dk", "dv"), known["q"]) | dict(lse=x, delta=x)
                blocks = dict(BLOCK_Q=16, BLOCK_K=16, BLOCK=16)
                arguments = {name: (known | tensors | blocks)[name] for name in kernel.arg_names}
                keys.add(str(bind(**arguments)[1]))
            print(len(keys))
    """)
    assert without_interpreter(script).split() == ["1"] * 4


def without_interpreter(script):
    """-> what a script prints in a process that compiles."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_gpu
def test_past_two_to_the_31_elements():
    """16,384 x 250,037 logits = 4.1e9: the last rows and classes agree with a few rows done alone."""
    n, v, d = 16_384, 250_037, 64
    x, weight, bias, target = problem(n, v, d, bfloat16, "cuda", ignored=0, scale=0.3)
    target[-1] = v - 1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, dx, dw, db = cross_entropy("triton", x, weight, bias, target, torch.ones(n))
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
    part = cross_entropy("triton", x[-64:].detach().requires_grad_(), weight, bias, target[-64:], torch.ones(64))
    torch.testing.assert_close(loss[-64:], part[0])
    torch.testing.assert_close(dx[-64:], part[1])
    torch.testing.assert_close(loss[-64:].double().cpu(), F.cross_entropy(
        F.linear(x[-64:].double(), weight.double(), bias.double()), target[-64:], reduction="none").cpu(),
        rtol=1e-3, atol=1e-3)


@needs_gpu
def test_targets_are_checked_on_the_gpu_when_asked(monkeypatch):
    x, weight, bias, target = problem(4, 100, 16, float32, "cuda", ignored=0)
    monkeypatch.setattr(linear_losses, "CHECK_VALUES", True)
    target[2] = 100
    with pytest.raises(ValueError, match=r"target\[2\] = 100"):
        linear_cross_entropy(x, weight, bias, target)
