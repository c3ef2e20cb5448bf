"""Launch configurations of the Triton kernels: compile all that are pinned, without a GPU; time others, on one.

    python -m kernels.bench --compile-only --arch sm_90
    python -m kernels.bench --tune

They are pinned as tables in the kernel files, by architecture and shape, and never tuned at run time: ranks that tune
for themselves may choose differently, and then their gradients differ.
"""
from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from kernels import cross_entropy, distillation, linear_cross_entropy, linear_distillation, linear_losses
from kernels.peers import difference, differentiate, draw_lengths, loss_inputs, packed_qkv
from kernels.support import table_of, table_of_device

attention_file = importlib.import_module("kernels.attention")  # `kernels.attention` itself is the function


# ----------------------------------------------------------------------------------------------------- --compile-only

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}          # the most that one block may take

def compile_configurations(kind: str, arch: int):
    """Every pinned configuration of the kernels of a kind ("attention" or "losses") for sm_{arch}, with the types of
    real launches. Yields (name, source, options) for triton.compile(source, target=..., options=options)."""
    return attention_configurations(table_of(arch)) if kind == "attention" else loss_configurations(table_of(arch))


def attention_configurations(table: int):
    kernels = {name: getattr(attention_file, f"_{name}_kernel") for name in ("forward", "dq", "dkv", "short")}
    rows = [(key, row) for key, row in attention_file.CONFIGS.items() if key[0] == (80 if table == 86 else table)]
    for (_, size, width), row in rows:
        for dtype in ("bf16", "fp16") if size == 2 else ("fp32",):
            for (name, config), dropout in itertools.product(attention_file.named(row).items(), (False, True)):
                constants = dict(config, HEADS=12, D=width, WIDTH=width, BITS=12, DROPOUT=dropout)
                options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
                types = dict(lse="*fp32", delta="*fp32", cu="*i32", T="i32", S="i32", seed="i32", threshold="i32",
                             gain="fp32", scale="fp32", softmax_scale="fp32")
                # The rest are tensors: a pointer and two strides. Numbers are never specialised, so not aligned.
                signature = {arg: types.get(arg, ("*" + dtype, "i32", "i32")) for arg in kernels[name].arg_names}
                source = source_of(kernels[name], signature, constants,
                                   lambda arg: arg not in types or types[arg][0] == "*")
                yield f"{name} {dtype} head_dim {width}" + " dropout" * dropout, source, options


def loss_configurations(table: int):
    types = dict.fromkeys(("N", "C", "out_stride", "first_class", "ignore_index"), "i32")
    types |= dict.fromkeys(("z_loss", "on_target", "on_all", "inverse_t"), "fp32") | {"target_ptr": "*i64"}
    matrices = ("x_ptr", "w_ptr", "tx_ptr", "tw_ptr", "out_ptr")
    dtypes = (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    widths = ((256, 768), (384, 768), (768, 1024), (100, 40))
    kernels = dict(ce_forward=cross_entropy._ce_forward_kernel, ce_backward=cross_entropy._ce_backward_kernel,
                   distill_forward=distillation._distill_forward_kernel,
                   distill_backward=distillation._distill_backward_kernel)
    for name, kernel in kernels.items():
        teacher = name.startswith("distill")
        for (short, dtype), (width, teacher_width) in itertools.product(dtypes, widths):
            narrower = min(width, teacher_width) if teacher else width
            _, constants = linear_losses.pinned(table, name, dtype, narrower)
            options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
            constants |= dict(D=width, TD=teacher_width, HAS_BIAS=True, HAS_TB=True)
            signature = {arg: f"*{short}" if arg in matrices else types.get(arg, "*fp32") for arg in kernel.arg_names}
            source = source_of(kernel, signature, constants,
                               lambda arg: arg.endswith("_ptr") or arg in ("N", "C", "out_stride"))
            yield f"{name} {short} D={width}" + f" E={teacher_width}" * teacher, source, options


def source_of(kernel, signature: dict, constants: dict, aligned: Callable):
    """A kernel to compile; where `aligned`, pointers, sizes and strides are multiples of 16, as in most launches."""
    from triton.compiler import ASTSource
    constants = {arg: value for arg, value in constants.items() if arg in signature}
    attributes = {}
    for i, arg in enumerate(signature):
        if arg not in constants and aligned(arg):
            places = [(i, j) for j in range(3)] if isinstance(signature[arg], tuple) else [(i,)]
            attributes |= dict.fromkeys(places, [["tt.divisibility", 16]])
    return ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)


def compile_one(source, options: dict, arch: int) -> tuple:
    """-> the compiled kernel, registers a thread, spilled bytes: a kernel here has no local arrays, so stack and local
    memory are spills."""
    import triton
    from triton.backends.compiler import GPUTarget
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")     # its default is what launches get, too
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        pathlib.Path(cubin.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], text=True, check=True,
                               capture_output=True).stdout
    registers, stack, local = (int(re.search(what + r":(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return kernel, registers, stack + local


def compile_share(kind: str, arch: int, share: int, shares: int) -> list[tuple]:
    """Compile every `shares`-th configuration of a kind. -> (name, registers, spilled bytes, shared memory in bytes,
    columns of tensor memory, tensor core instruction) of each."""
    rows = []
    for name, source, options in list(compile_configurations(kind, arch))[share::shares]:
        kernel, registers, spilled = compile_one(source, options, arch)
        unit = next((u for u in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if u in kernel.asm["ptx"]), "none")
        rows.append((name, registers, spilled, kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", 0), unit.split(".")[0]))
    return rows


def fault_of(arch: int, spilled_bytes: int, shared_bytes: int, tensor_columns: int = 0) -> str:
    """tensor_columns: of Blackwell's tensor memory, which has 512."""
    return "SPILLS" if spilled_bytes else "TOO LARGE" if shared_bytes > SHARED_KIB[arch] * 1024 or tensor_columns > 512 else ""


def compile_all(archs: list[int], report: Callable) -> bool:
    """Compile every pinned configuration and print what each takes. -> True where one spills or does not fit."""
    start, shares, bad, count = time.perf_counter(), 8, 0, 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [(arch, kind, [pool.submit(compile_share, kind, arch, i, shares) for i in range(shares)])
                for arch in archs for kind in ("attention", "losses")]
        for arch, kind, futures in jobs:
            report(f"\n### sm_{arch}, {kind} (at most {SHARED_KIB[arch]} KiB of shared memory a block)\n")
            report(f"| {'kernel':44} | registers | spill bytes | shared KiB | tensor cores | |\n"
                   f"|{'-' * 46}|{'-' * 10}:|{'-' * 12}:|{'-' * 11}:|{'-' * 14}|-|")
            parts = [f.result() for f in futures]
            in_order = (part[i] for i in range(len(parts[0])) for part in parts if i < len(part))
            for name, registers, spill, shared, columns, unit in in_order:
                fault = fault_of(arch, spill, shared, columns)
                bad, count = bad + bool(fault), count + 1
                report(f"| {name:44} | {registers:9} | {spill:11} | {shared / 1024:10.1f} | {unit:12} | {fault} |")
    report(f"\n{count} configurations compiled in {time.perf_counter() - start:.0f} s, {bad} of them with a fault")
    return bad > 0


# ------------------------------------------------------------------------------------------------------------- --tune

def fastest(pinned: tuple, candidates: list, pin: Callable, run: Callable, clock: Callable, repeats: int) -> tuple:
    """The launch configuration with the least median time. The pinned one stays unless another gains 2%; those that
    do not compile, do not fit or change the result beyond rounding are passed over."""
    def median():
        return float(np.median([clock(run) for _ in range(repeats)]))
    pin(pinned)
    truth = tuple(t.detach().double() for t in run())
    best, least = pinned, 0.98 * median()
    for candidate in candidates:
        if candidate == pinned:
            continue
        pin(candidate)
        try:
            if max(difference(run(), truth)) < 1e-2 and (ms := median()) < least:
                best, least = candidate, ms
        except Exception:                              # Triton has a class of error for each stage of compiling
            continue
    pin(best)
    return best


def tune(device: torch.device, clock: Callable, report: Callable, parts: list[str]) -> None:
    """Coordinate search over the tables of both kernel files, one kernel after another, in bfloat16. On a CPU, under
    the interpreter, everything is tiny and only shows that it runs."""
    table = table_of_device(device) if device.type == "cuda" else 80
    if "attention" in parts:
        tune_attention(80 if table == 86 else table, device, clock, report)
    if "losses" in parts:
        tune_losses(table, device, clock, report)


def tune_attention(table: int, device: torch.device, clock: Callable, report: Callable) -> None:
    tokens, dtype, repeats = (65536, torch.bfloat16, 20) if device.type == "cuda" else (40, torch.float16, 1)
    report("For CONFIGS of kernels/attention.py:\n")
    for head_dim in (64, 32):
        key = (table, 2, head_dim)
        qkv, cu, _ = packed_qkv(draw_lengths(max(1, tokens // 264), 16, min(512, tokens)), 12, head_dim, dtype, device)
        long = qkv, cu, 512                            # longer than a block: dQ and dK/dV by a kernel each
        short = packed_qkv(draw_lengths(max(1, tokens // 72), 16, min(128, tokens)), 12, head_dim, dtype, device)

        def run(packed, backward):
            qkv, cu, longest = packed
            q, k, v = qkv.detach().unbind(1)
            out, lse = attention_file.triton_forward(q, k, v, cu)
            return (attention_file.triton_backward(v, q, k, v, out, lse, cu, longest) if backward else out,)

        tiles = [(q, k, w, s) for q in (32, 64, 128) for k in (32, 64, 128) for w in (4, 8) for s in (2, 3)
                 if w * 1024 <= q * k]                 # at least 32 scores a thread
        # Slots of a row: forward, dQ, dK/dV, then the short backward, which stands for dQ and dK/dV up to BLOCK tokens.
        for slot, choices in ((0, tiles), (1, tiles), (2, tiles), (3, [(64, 4), (64, 8), (128, 4), (128, 8)])):
            def pin(choice):
                row = attention_file.CONFIGS[key]
                attention_file.CONFIGS[key] = (*row[:slot], choice, *row[slot + 1:])
            fastest(attention_file.CONFIGS[key][slot], choices, pin,
                    lambda: run(short if slot == 3 else long, slot > 0), clock, repeats)
            report(f"    {key}: {attention_file.CONFIGS[key]},{'  # so far' * (slot < 3)}")


def tune_losses(table: int, device: torch.device, clock: Callable, report: Callable) -> None:
    (n, v, d), dtype, repeats = (((8192, 64_000, 384), torch.bfloat16, 20) if device.type == "cuda" else
                                 ((40, 600, 32), torch.float16, 1))
    report("\nFor CONFIGS of kernels/linear_losses.py:\n")
    inputs, teacher = loss_inputs(n, v, d, dtype, device), loss_inputs(n, v, 2 * d, dtype, device, seed=2)
    target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    each = torch.ones(n, device=device)
    runs = dict(ce=differentiate(lambda *s: linear_cross_entropy(*s, target, backend="triton"), inputs, each),
                distill=differentiate(lambda *s: sum(linear_distillation(*s, target, *teacher, backend="triton")),
                                      inputs, each))
    choices = [(m, n, 64, w, s) for m, n in ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
               for w in (4, 8) for s in (3, 4)]
    for kernel in ("ce_forward", "ce_backward", "distill_forward", "distill_backward"):
        key = (table, kernel)
        fastest(linear_losses.CONFIGS[key], choices, lambda choice: linear_losses.CONFIGS.__setitem__(key, choice),
                runs[kernel.split("_")[0]], clock, repeats)
        report(f'    ({table}, "{kernel}"): {linear_losses.CONFIGS[key]},')
