"""The losses over a large vocabulary against the float64 formula, forward and backward. Run by test_kernels.py."""
import os
import random

import pytest
import torch
import torch.nn.functional as F

from kernel_common import BACKENDS, BF16, FP32, FP64, default_dtype, needs_gpu, path  # noqa: F401
from kernels import linear_cross_entropy, linear_distillation, linear_losses

PATHS = [path("torch", "cpu", FP64), *BACKENDS]
on_all_paths = pytest.mark.parametrize("backend, device, dtype", PATHS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even at test sizes: 512 columns on the torch path, 1,024 on the Triton path."""
    monkeypatch.setattr(linear_losses, "CHUNK_BYTES", 1)
    monkeypatch.setattr(linear_losses, "GPU_CHUNK_BYTES", 1)


def problem(n, v, d, dtype=FP64, device="cpu", seed=0, ignored=0.2, teacher_width=None, scale=1.0):
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
    """Each output's error is at most 2 times that of the plain formula in the same dtype, plus that dtype's rounding
    unit (2e-6 for float32's sums): over one or two rows the plain formula may be exact by luck."""
    truth = function("reference", *exact_losses(tensors), **options)
    plain = function("reference", *tensors, **options)
    ours = function(backend, *tensors, **options)
    for i, (a, b, t) in enumerate(zip(ours, plain, truth)):
        assert a.isfinite().all(), f"output {i} is not finite"
        floor = 1e-13 if tensors[0].dtype == FP64 else max(2e-6, torch.finfo(tensors[0].dtype).eps / 2)
        assert error(a, t) <= 2 * error(b, t) + floor, f"output {i}: error {error(a, t):.1e}, plain {error(b, t):.1e}"


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
        rtol = 1e-5 if backend == "torch" or dtype == FP32 else 2 * torch.finfo(dtype).eps
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
@pytest.mark.parametrize("who", ["both", "teacher"])
def test_distillation_where_the_bias_rules_classes_out(backend, device, dtype, who):
    """As for rows that only pad the vocabulary: the teacher's weight there is 0, and so is their part of the KL. (Where the
    student alone rules a class out, the KL is infinite, as it should be.)"""
    x, weight, bias, target, *teacher = problem(33, 1301, 16, dtype, device, ignored=0, teacher_width=8)
    ruled_out = [*range(256, 1024), 1100, 1300]
    with torch.no_grad():
        teacher[2][ruled_out] = -float("inf")
        if who == "both":
            bias[ruled_out] = -float("inf")
        target[:] = target % 256
    assert_close_to_formula(distillation, backend, (x, weight, bias, target, *teacher))


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
        assert error(a, t) <= 2 * error(b, t) + (1e-12 if dtype == FP64 else 5e-6)


@pytest.mark.parametrize("backend, device, dtype", [p for p in PATHS if p.id != "triton-cpu-fp16"])
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
            if dtype in (FP32, FP64):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            else:           # a BLAS may read a transposed matrix by another path and round its sums once more: without fast bfloat16 it does
                assert error(a, b.double().cpu()) <= torch.finfo(dtype).eps / 2


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
    assert kl.abs().max() < (1e-12 if dtype == FP64 else 1e-5)
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


@needs_gpu
def test_more_than_two_to_the_31_logits(monkeypatch):
    """16,384 x 250,037 logits = 4.1e9, in chunks of the real size: the last rows and classes agree with a few rows done alone."""
    monkeypatch.setattr(linear_losses, "GPU_CHUNK_BYTES", 256 << 20)
    n, v, d = 16_384, 250_037, 64
    x, weight, bias, target = problem(n, v, d, BF16, "cuda", ignored=0, scale=0.3)
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
def test_losses_do_not_synchronise_on_a_gpu():
    x, weight, bias, target, *teacher = problem(300, 5000, 64, BF16, "cuda", teacher_width=96)
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            loss = linear_cross_entropy(x, weight, bias, target, backend="triton")
            ce, kl = linear_distillation(x, weight, bias, target, *teacher, backend="triton")
            (loss.sum() + ce.sum() + kl.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
