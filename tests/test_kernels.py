"""Every kernel against the float64 formula, forward and backward (kernel_attention.py, kernel_losses.py), and in this file
what is asked of them beyond: torch.compile, autocast, memory, arguments, code for a GPU.

    TRITON_INTERPRET=1 python -m pytest -q tests/test_kernels.py        # with a GPU: without TRITON_INTERPRET

Without a GPU the Triton kernels run in Triton's interpreter (float32 and float16 only: its bf16 dot is wrong).
That shows that the mathematics and the masks are right, not that the machine code is: with a GPU the same tests
run on the card, in bf16 as well, with long sequences and with offsets past 2^31 elements.
"""
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.register_assert_rewrite("kernel_common", "kernel_attention", "kernel_losses")  # a failed assert says what it saw

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import launch  # noqa: E402
from kernel_common import *  # noqa: E402, F403  (first: it sets TRITON_INTERPRET)
from kernel_attention import *  # noqa: E402, F403  (their tests, and what makes inputs)
from kernel_losses import *  # noqa: E402, F403
from kernels import attention, linear_cross_entropy, linear_distillation, linear_losses, support  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------- torch.compile, autocast, memory

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


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_another_number_of_rows_compiles_once(backend):
    """Then it is a symbol. torch gives up with an error after eight graphs."""
    w, teacher = torch.randn(600, 16), (torch.randn(600, 8), None)
    losses = {"cross-entropy": lambda x, y: linear_cross_entropy(x, w, None, y, backend=backend).sum(),
              "distillation": lambda x, y: sum(linear_distillation(x, w, None, y, x[:, :8], *teacher, backend=backend)).sum()}
    for name, loss in losses.items():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for n in (16, 24, 32):
            x, y = torch.randn(n, 16, requires_grad=True), torch.randint(600, (n,))
            torch.testing.assert_close(compiled(x, y), loss(x, y))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, name


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
            tensors = problem(20, 700, 24, FP32, device, seed=seed, ignored=seed / 4, teacher_width=12)
            for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors[:3]),
                            torch.autograd.grad(step(*tensors), tensors[:3])):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, v, d", [(64, 3000, 128), (200, 5000, 256)])
def test_autocast_against_torchs_own(n, v, d, monkeypatch):
    """bfloat16 matmuls over a float32 master weight: float32 gradients, within twice eager autocast's own error."""
    monkeypatch.setattr(linear_losses, "CHUNK_BYTES", 1 << 20)
    x, weight, bias, target = problem(n, v, d, FP32, scale=0.3)
    truth = cross_entropy("reference", *exact_losses((x, weight, bias, target)), torch.ones(n))
    with torch.autocast("cpu", BF16):
        ours = cross_entropy("torch", x, weight, bias, target, torch.ones(n))
        eager = F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="none")
    eager = [eager, *torch.autograd.grad(eager.sum(), (x, weight, bias))]
    for a, b, t in zip(ours, eager, truth):
        assert a.dtype == FP32
        assert error(a, t) <= 2 * error(b, t), (error(a, t), error(b, t))


@pytest.mark.parametrize("half", [BF16, FP16])
def test_autocast_reaches_the_matmuls_alone(half):
    """As with inputs that are 16 bits already; with label smoothing, whose mean logit is a product of its own."""
    x, weight, bias, target = problem(20, 1300, 64, BF16)
    with torch.autocast("cpu", half):
        loss = linear_cross_entropy(x.float(), weight.float(), bias.float(), target, label_smoothing=0.2)
    plain = linear_cross_entropy(x.to(half), weight.to(half), bias.to(half), target, label_smoothing=0.2)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[interpreted, needs_triton])])
def test_opcheck(backend):
    qkv, cu_seqlens = packed(SHORT, head_dim=16)
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
    torch.library.opcheck(torch.ops.unibert.attention.default, (q, k, v, cu_seqlens, 32, backend, 0.0, 0),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_operators_obey_torch_library():
    # No ignored rows: opcheck compares whole outputs, and the workspace is not written past the rows that count.
    x, weight, bias, target, *teacher = problem(6, 600, 8, FP32, ignored=0, teacher_width=4)
    options = (-100, 0.1, 0.1, FP32, "torch", True)
    operator = torch.ops.unibert.linear_cross_entropy.default
    torch.library.opcheck(operator, (x, weight, bias, target, torch.rand(6), *options))
    torch.library.opcheck(operator, (x, weight, None, target, None, *options[:-1], False))
    torch.library.opcheck(torch.ops.unibert.linear_distillation.default,
                          (x, weight, bias, target, *teacher, 2.0, -100, FP32, "torch", True))
    # dX has strides of its own, whatever x's are: torch.compile asserts that the fake kernel says so.
    column_major, grad = x.detach().t().contiguous().t(), torch.ones(6)
    _, stats, saved = operator(x.detach(), weight, bias, target, None, *options)
    torch.library.opcheck(torch.ops.unibert.linear_cross_entropy_backward.default, (
        grad, column_major, weight, bias, target, None, stats, saved, *options), test_utils="test_faketensor")
    _, _, stats, saved = torch.ops.unibert.linear_distillation(x.detach(), weight, bias, target, *teacher, 2.0, -100,
                                                               FP32, "torch", True)
    torch.library.opcheck(torch.ops.unibert.linear_distillation_backward.default, (
        grad, grad, column_major, weight, bias, target, *teacher, stats, saved, 2.0, -100, FP32, "torch", True),
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
    # A fixed threshold: glibc gives every tensor back as it is freed, and the peak is what is alive, not what lies between.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, check=True, text=True, capture_output=True)
    recomputed, saved, plain = map(float, done.stdout.split())
    logits, dw = 512 * 60_000 * 4 / 2**20, 60_000 * 32 * 4 / 2**20         # MiB in float32: 117 and 7
    assert recomputed < 40 + dw < logits / 2, done.stdout
    assert saved < logits + 40 + dw, done.stdout
    assert plain > 1.8 * logits, done.stdout


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


# ----------------------------------------------------------------------------------------------------- arguments

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


def test_bad_arguments_raise_one_line():
    x, weight, bias, target, *teacher = problem(4, 10, 3, FP32, teacher_width=2)
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


@pytest.mark.skipif(CUDA, reason="needs a machine where Triton cannot run: no GPU")
@needs_triton
def test_triton_on_the_cpu_says_what_to_do(monkeypatch):
    monkeypatch.setattr(support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU.* use backend='torch', or set TRITON_INTERPRET=1"):
        attention(**arguments(), backend="triton")
    with pytest.raises(ValueError, match="needs a GPU"):
        linear_cross_entropy(*problem(4, 10, 3, FP32), backend="triton")


@needs_triton
@pytest.mark.parametrize("major, hip, suits", [(8, None, True), (9, None, True), (7, None, False), (9, "6.4", False)],
                         ids=["A100", "H100", "T4", "ROCm"])
def test_auto_takes_triton_where_its_kernels_are_for_the_card(monkeypatch, major, hip, suits):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.version, "hip", hip)
    card = torch.device("cuda")
    assert support.choose_backend("attention", "auto", card, BF16) == ("triton" if suits else "torch")
    assert support.choose_backend("attention", "auto", card, FP64) == "torch"
    assert launch.default_dtype(card) == (BF16 if major >= 8 else FP32)


@needs_gpu
def test_targets_are_checked_on_the_gpu_when_asked(monkeypatch):
    x, weight, bias, target = problem(4, 100, 16, FP32, "cuda", ignored=0)
    monkeypatch.setattr(linear_losses, "CHECK_VALUES", True)
    target[2] = 100
    with pytest.raises(ValueError, match=r"target\[2\] = 100"):
        linear_cross_entropy(x, weight, bias, target)


# ------------------------------------------------------------------------------------- code for a GPU, without one

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
