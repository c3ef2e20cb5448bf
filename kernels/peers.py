"""Who takes part in the benchmark: our kernels and training step beside every peer that is installed, and the truth.

Three tasks: attention over packed sequences, the two losses over a large vocabulary, one step of training. Each is a
Problem: its inputs, its result in float64, its useful work, and the candidates, all of which get the same values.
"""
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, linear_cross_entropy, linear_distillation
from unibert import UniBERT, UniBERTConfig, positions_of

attention_file = importlib.import_module("kernels.attention")  # `kernels.attention` itself is the function

TEMPERATURE = 2.0


@dataclass
class Candidate:
    """One implementation. `run` does one timed pass and returns (output, *gradients)."""
    name: str
    run: Callable[[], tuple]
    ours: bool = False
    yardstick: bool = False                           # its error is the measure of ours
    warm_up: bool = True                              # needs a run before anything is measured
    comparable: bool = True                           # False: leaves something out, so its error says nothing
    unpack: Callable[[tuple], tuple] = tuple          # brings results into the form of the truth
    check: Callable[[], tuple] | None = None          # where `run` returns nothing to compare
    resident: Callable[[], int] | None = None         # bytes held between runs; then memory is all, not extra


@dataclass
class Problem:
    """One table: what it computes, its useful work, the truth, and who takes part."""
    title: str
    dtype: torch.dtype
    flops: float
    bytes: float
    truth: tuple
    candidates: list[Candidate]
    tokens: int = 0                                   # of a step: tokens/s instead of GB/s
    in_parts: Callable[[], tuple] | None = None       # the yardstick's result where its memory does not suffice for `run`


def size_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def difference(result: tuple, truth: tuple) -> list[float]:
    """Relative Frobenius distance of each tensor. Some peers give only the mean of the losses: compared as such."""
    truth = [b.mean() if a.ndim < b.ndim else b for a, b in zip(result, truth, strict=True)]
    return [float((a.detach().to(b.device).double() - b).norm() / b.norm()) for a, b in zip(result, truth)]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def missing_peers(device: torch.device) -> list[str]:
    """One line for what is not installed, one for what is but runs on a GPU only."""
    varlen = installed("torch.nn.attention.varlen")
    here = {"flash-attn": installed("flash_attn"), "cut-cross-entropy": installed("cut_cross_entropy"),
            "liger-kernel": installed("liger_kernel"), "transformers": installed("transformers"),
            "torch.nn.attention.varlen (newer torch)": varlen,
            "F.linear_cross_entropy (newer torch)": hasattr(F, "linear_cross_entropy")}
    lines = ["not installed: " + (", ".join(name for name, there in here.items() if not there) or "nothing")]
    if device.type != "cuda":
        gpu_only = ("flash-attn", "cut-cross-entropy", "liger-kernel", "torch.nn.attention.varlen (newer torch)")
        left_out = [name.split(" ")[0] for name in gpu_only if here[name]]
        lines.append("left out, they need a GPU: " + (", ".join(left_out) or "none"))
    return lines


def differentiate(function: Callable, inputs: tuple, gradient: Tensor | None = None) -> Callable[[], tuple]:
    """One forward and backward pass as a closure: () -> (output, *gradients of inputs)."""
    def run():
        output = function(*inputs)
        return (output, *torch.autograd.grad(output, inputs, gradient))
    return run


# ------------------------------------------------------------------------------------------------------- attention

def draw_lengths(count: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, count)


def packed_qkv(lengths: np.ndarray, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
    """-> qkv [T, 3, heads, head_dim], cu_seqlens [S+1] int32, the longest length."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(int(lengths.sum()), 3, heads, head_dim, generator=generator).to(device, dtype)
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)
    return qkv.requires_grad_(), cu_seqlens, int(lengths.max())


def attention_problem(lengths: np.ndarray, heads: int, head_dim: int, dtype: torch.dtype,
                      device: torch.device) -> Problem:
    """Peers that know no packing get padded inputs as they want them, so the padding itself costs them nothing."""
    qkv, cu, longest = packed_qkv(lengths, heads, head_dim, dtype, device)
    gradient = torch.randn(qkv[:, 0].shape, device=device).to(dtype)
    segment, position = positions_of(cu, len(qkv))

    def packed(function):
        return differentiate(lambda x: function(*x.unbind(1)), (qkv,), gradient)

    def pad(x):                                       # [T, ...] -> [S, longest, ...]
        return x.new_zeros(len(lengths), longest, *x.shape[1:]).index_put_((segment, position), x)
    padded, padded_gradient = pad(qkv.detach()).requires_grad_(), pad(gradient)
    keys = (torch.arange(longest, device=device) < cu.diff()[:, None])[:, None, None]

    def sdpa(mask):
        def function(x):
            q, k, v = x.permute(2, 0, 3, 1, 4)        # [S, heads, longest, head_dim] each
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return differentiate(function, (padded,), padded_gradient)

    def with_backend(backend, run):
        def inside():
            with torch.nn.attention.sdpa_kernel(backend):
                return run()
        return inside

    def one_by_one(q, k, v):
        parts = [t.split(lengths.tolist()) for t in (q, k, v)]
        return torch.cat([F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in qkv))[0].transpose(0, 1)
                          for qkv in zip(*parts)])

    def unpad(result):
        return tuple(t[segment, position] for t in result)

    slots = torch.cat((cu, cu[-1:].expand(max(0, len(qkv) // 8 - len(lengths)))))    # as in batches.py: most are empty
    candidates = [Candidate("ours", packed(lambda q, k, v: attention(q, k, v, cu, longest)), ours=True),
                  Candidate("ours, a slot for every 8 tokens", packed(
                      lambda q, k, v: attention(q, k, v, slots, longest)), ours=True)]
    if device.type == "cuda":
        kind = torch.nn.attention.SDPBackend
        candidates.append(Candidate("SDPA padded, efficient", with_backend(kind.EFFICIENT_ATTENTION, sdpa(keys)),
                                    yardstick=True, unpack=unpad))
        if dtype != torch.float32:
            candidates += [Candidate("SDPA padded, cuDNN", with_backend(kind.CUDNN_ATTENTION, sdpa(keys)),
                                     unpack=unpad),
                           Candidate("SDPA padded, flash (attends to pads)", comparable=False,
                                     run=with_backend(kind.FLASH_ATTENTION, sdpa(None)))]
            if installed("torch.nn.attention.varlen"):
                from torch.nn.attention.varlen import varlen_attn
                candidates.append(Candidate("varlen_attn", packed(
                    lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest))))
            if installed("flash_attn"):
                from flash_attn import flash_attn_varlen_func
                candidates.append(Candidate("flash-attn", packed(
                    lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest))))
    else:
        candidates += [Candidate("SDPA padded, mask", sdpa(keys), yardstick=True, unpack=unpad),
                       Candidate("SDPA, a call a sequence", packed(one_by_one))]

    parts = []                        # a sequence at a time: all probabilities of 32 x 8,192 tokens in float64 would be 79 GiB
    for exact, g in zip(qkv.detach().split(lengths.tolist()), gradient.split(lengths.tolist())):
        exact = exact.double().requires_grad_()
        output = attention_file.reference(*exact.unbind(1), cu.new_tensor([0, len(exact)]))
        parts.append((output.detach(), *torch.autograd.grad(output, exact, g.double())))
    truth = tuple(map(torch.cat, zip(*parts)))
    work = 14 * float((lengths.astype(float) ** 2).sum()) * heads * head_dim
    title = (f"attention, forward + backward: {len(lengths)} sequences of {lengths.min()}-{longest} tokens "
             f"({len(qkv)} in all), {heads} heads of {head_dim}")
    # Least traffic: q, k and v twice (forward, backward), their gradients, out twice and its gradient.
    return Problem(title, dtype, work, 4 * size_of([qkv]), truth, candidates)


# ---------------------------------------------------------------------------------------------------------- losses

def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def plain_cross_entropy(x, weight, bias, target):
    """What one writes without a library -> loss [N]; softmax in float32, as transformers does it."""
    return F.cross_entropy(_wide(F.linear(x, weight, bias)), target, reduction="none")


def plain_distillation(x, weight, bias, target, teacher_x, teacher_weight, teacher_bias):
    student = _wide(F.linear(x, weight, bias))
    teacher = _wide(F.linear(teacher_x, teacher_weight, teacher_bias))
    kl = F.kl_div(F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1), log_target=True,
                  reduction="none").sum(1)
    return F.cross_entropy(student, target, reduction="none") + TEMPERATURE ** 2 * kl


def by_rows(loss: Callable, student: tuple, target: Tensor, teacher: tuple = (), dtype=torch.float64) -> tuple:
    """Loss and gradients in `dtype`, 1,024 rows at a time: all logits of 16,384 x 250,037 would be 33 GB in float64.
    Gradients of the parts are summed in at least float32, so that parts are no less exact than the whole."""
    student = [t.detach().to(dtype).requires_grad_() for t in student]
    teacher_x, *teacher_rest = (t.to(dtype) for t in teacher) if teacher else (None,)
    losses, sums = [], [torch.zeros_like(t, dtype=torch.promote_types(dtype, torch.float32)) for t in student]
    for start in range(0, len(target), 1024):
        part = slice(start, start + 1024)
        extra = (teacher_x[part], *teacher_rest) if teacher else ()
        value = loss(student[0][part], *student[1:], target[part], *extra)
        for total, grad in zip(sums, torch.autograd.grad(value.sum() / len(target), student)):
            total += grad
        losses.append(value.detach())
    return torch.cat(losses), *sums


def loss_inputs(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple:
    """x [n, d], weight [v, d], bias [v] such that logits have a standard deviation near 2."""
    generator = torch.Generator(device).manual_seed(seed)
    x, weight, bias = (torch.randn(*shape, generator=generator, device=device) for shape in ((n, d), (v, d), (v,)))
    return tuple(t.to(dtype).requires_grad_() for t in (x, 2 * d ** -0.5 * weight, 0.1 * bias))


def cross_entropy_problem(n: int, v: int, d: int, dtype: torch.dtype, device: torch.device, quick: bool) -> Problem:
    inputs = loss_inputs(n, v, d, dtype, device)
    target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(1)).to(device)

    each = torch.full((n,), 1 / n, device=device)      # the gradient of the mean, for those who give a loss a row

    def candidate(name, function, gradient=None, **options):
        return Candidate(name, differentiate(function, inputs, gradient), **options)

    compiled = torch.compile(plain_cross_entropy, dynamic=False)
    candidates = [
        candidate("ours", lambda x, w, b: linear_cross_entropy(x, w, b, target), each, ours=True),
        candidate("cross_entropy(x @ W.T + b), eager", lambda x, w, b: plain_cross_entropy(x, w, b, target), each,
                  yardstick=True),
        candidate("the same, torch.compile", lambda x, w, b: compiled(x, w, b, target), each)]
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for rows in (512, 2048, 4096) if device.type == "cuda" else (512,):       # on a card with as much memory as ours takes, too
            chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
            candidates.append(candidate(f"F.linear_cross_entropy, chunk {rows}", lambda x, w, b, chunked=chunked: F.linear_cross_entropy(
                x, w, target, linear_bias=b, options=chunked)))
        if not (quick and dtype == torch.bfloat16):   # 14 s a run on 2 cores
            default = torch.nn.LinearCrossEntropyOptions()
            candidates.append(candidate("F.linear_cross_entropy, default options", lambda x, w, b:
                                        F.linear_cross_entropy(x, w, target, linear_bias=b, options=default),
                                        warm_up=device.type == "cuda"))
    if device.type == "cuda" and installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss()
        candidates.append(candidate("Liger FLCE", lambda x, w, b: liger(w, x, target, b)))
    if device.type == "cuda" and installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce
        candidates.append(candidate("cut-cross-entropy, exact", lambda x, w, b: cce(
            x, w, target, bias=b, impl="cce_exact")))
    return Problem(f"linear_cross_entropy, forward + backward: N={n:,} V={v:,} D={d}", dtype, 6.0 * n * v * d,
                   2 * size_of(inputs), by_rows(plain_cross_entropy, inputs, target), candidates,
                   in_parts=lambda: by_rows(plain_cross_entropy, inputs, target, dtype=dtype))


def distillation_problem(n: int, v: int, d: int, e: int, dtype: torch.dtype, device: torch.device,
                         quick: bool) -> Problem:
    inputs = loss_inputs(n, v, d, dtype, device)
    teacher = tuple(t.detach() for t in loss_inputs(n, v, e, dtype, device, seed=2))
    target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(1)).to(device)

    each = torch.full((n,), 1 / n, device=device)

    def ours(x, w, b):
        return sum(linear_distillation(x, w, b, target, *teacher, temperature=TEMPERATURE))

    candidates = [Candidate("ours, one sweep", differentiate(ours, inputs, each), ours=True),
                  Candidate("CE + KL from all logits, eager", yardstick=True, run=differentiate(
                      lambda x, w, b: plain_distillation(x, w, b, target, *teacher), inputs, each))]
    if not quick:
        compiled = torch.compile(plain_distillation, dynamic=False)
        candidates.append(Candidate("the same, torch.compile", run=differentiate(
            lambda x, w, b: compiled(x, w, b, target, *teacher), inputs, each)))
    if device.type == "cuda" and installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
        liger, jsd = LigerFusedLinearCrossEntropyLoss(), LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
        candidates.append(Candidate("Liger FLCE + JSD (which has no biases)", comparable=False, run=differentiate(
            lambda x, w, b: liger(w, x, target, b) + jsd(x, w, *teacher[:2], target), inputs)))
    return Problem(f"linear_distillation, forward + backward: N={n:,} V={v:,} student D={d}, teacher D={e}", dtype,
                   2.0 * n * v * (3 * d + e), 2 * size_of(inputs) + size_of(teacher),
                   by_rows(plain_distillation, inputs, target, teacher), candidates,
                   in_parts=lambda: by_rows(plain_distillation, inputs, target, teacher, dtype))


# ------------------------------------------------------------------------------------------------- the training step

BERT_NAMES = {"embedding": "bert.embeddings.word_embeddings",
              "position_embedding": "bert.embeddings.position_embeddings",
              "embedding_norm": "bert.embeddings.LayerNorm", "out": "attention.output.dense",
              "attention_norm": "attention.output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
              "mlp_norm": "output.LayerNorm", "head_dense": "cls.predictions.transform.dense",
              "head_norm": "cls.predictions.transform.LayerNorm"}


def bert_parameters(bert, name: str) -> list[Tensor]:
    """The parameters of a BertForMaskedLM that, one below the other, are our parameter `name`."""
    if name == "decoder_bias":
        return [bert.get_parameter("cls.predictions.bias")]
    *block, module, kind = name.split(".")
    prefix = f"bert.encoder.layer.{block[1]}." if block else ""
    modules = [f"attention.self.{m}" for m in ("query", "key", "value")] if module == "qkv" else [BERT_NAMES[module]]
    return [bert.get_parameter(f"{prefix}{m}.{kind}") for m in modules]


def masked_batch(lengths: np.ndarray, vocabulary: int, device: torch.device, rate: float = 0.15):
    """Packed and padded form of the same random sequences, 15% of the tokens to be predicted."""
    generator = np.random.default_rng(1)
    total, longest = int(lengths.sum()), int(lengths.max())
    tokens = torch.from_numpy(generator.integers(5, vocabulary, total))
    masked = torch.from_numpy(np.sort(generator.permutation(total)[:round(rate * total)]))
    targets = torch.from_numpy(generator.integers(5, vocabulary, len(masked)))
    cu = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    real = torch.arange(longest) < torch.from_numpy(lengths)[:, None]
    labels = torch.full((total,), -100).index_put_((masked,), targets)
    padded = dict(input_ids=torch.full(real.shape, 1).masked_scatter_(real, tokens), attention_mask=real.long(),
                  labels=torch.full(real.shape, -100).masked_scatter_(real, labels))
    packed = dict(tokens=tokens, cu_seqlens=cu, masked=masked, targets=targets)
    return ({k: t.to(device) for k, t in packed.items()} | dict(max_seqlen=longest),
            {k: t.to(device) for k, t in padded.items()})


def packed_loss(model, batch: dict) -> Tensor:
    hidden = model.encode(batch["tokens"], batch["cu_seqlens"], batch["max_seqlen"])
    return model.mlm_loss(hidden[batch["masked"]], batch["targets"]).mean()


def step_candidate(name: str, model, loss: Callable, gradients: Callable, batch: dict, small: dict, bfloat16: bool,
                   compiled: bool = False, **options) -> Candidate:
    """An optimiser step on `batch`; checked by loss and gradients on the `small` batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    device = next(model.parameters()).device
    step_loss = torch.compile(loss, dynamic=False) if compiled else loss

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    def run():
        with autocast():
            value = step_loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ()

    def check():
        with autocast():
            value = step_loss(model, small)           # what is timed; compiled, it is compiled once for each batch
        value.backward()
        result = value.detach(), gradients(model)
        optimizer.step()                              # makes the optimiser's state, before memory is measured
        optimizer.zero_grad()
        return result

    try:
        first = check()                               # now, while every model still has the same weights
    except Exception as error:                        # of a compiler, say: bench.measure names it
        first = error

    def checked():
        if isinstance(first, Exception):
            raise first
        return first

    def resident():
        state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return size_of(list(model.parameters()) + state + [t for t in batch.values() if torch.is_tensor(t)])
    return Candidate(name, run, warm_up=compiled, check=checked, resident=resident, **options)


def step_problems(layers: int, hidden: int, heads: int, vocabulary: int, lengths: np.ndarray, device: torch.device,
                  compiled: bool) -> list[Problem]:
    """A post-norm UniBERT on packed sequences, its head on masked rows only, against transformers' BERT with the same
    weights on the same sequences, padded to the longest, logits for every position. -> one problem a dtype."""
    config = UniBERTConfig(vocab_size=vocabulary, hidden_size=hidden, num_layers=layers, num_heads=heads,
                           intermediate_size=4 * hidden, block="post")
    torch.manual_seed(0)
    model = UniBERT(config).to(device)
    packed, padded = masked_batch(lengths, vocabulary, device)
    packed_small, padded_small = masked_batch(lengths[:8], vocabulary, device)

    def new_ours():
        ours = UniBERT(config).to(device)
        ours.load_state_dict(model.state_dict())
        return ours

    def our_gradients(model):
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def new_bert():
        from transformers import BertConfig, BertForMaskedLM
        bert = BertForMaskedLM(BertConfig(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=4 * hidden, max_position_embeddings=config.max_length, type_vocab_size=1, pad_token_id=1,
            layer_norm_eps=config.norm_eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa")).to(device).train()
        with torch.no_grad():
            bert.bert.embeddings.token_type_embeddings.weight.zero_()
            for name, ours in model.named_parameters():
                parts = bert_parameters(bert, name)
                for theirs, value in zip(parts, ours.chunk(len(parts)), strict=True):
                    theirs.copy_(value)
        return bert

    def bert_gradients(bert):
        return torch.cat([p.grad.flatten() for name, _ in model.named_parameters()
                          for p in bert_parameters(bert, name)])

    def bert_loss(bert, batch):
        return bert(**batch).loss

    exact = new_ours().cpu().double()
    value = packed_loss(exact, {k: t.cpu() if torch.is_tensor(t) else t for k, t in packed_small.items()})
    value.backward()
    truth = value.detach(), our_gradients(exact)

    body = sum(p.numel() for p in model.blocks.parameters())
    work = (6.0 * (body * len(packed["tokens"]) + (hidden + vocabulary) * hidden * len(packed["masked"]))
            + 14.0 * layers * hidden * float((lengths.astype(float) ** 2).sum()))
    share = 100 * lengths.sum() / (len(lengths) * lengths.max())
    title = (f"training step: {layers} layers x {hidden}, V={vocabulary:,}, {len(lengths)} sequences of "
             f"{lengths.min()}-{lengths.max()} tokens ({share:.0f}% of a padded batch are real), AdamW")
    problems = []
    for dtype in (torch.float32, torch.bfloat16):
        low = dtype == torch.bfloat16
        kinds = [False] + [True] * (compiled and low)
        candidates = [step_candidate("ours, torch.compile" if k else "ours", new_ours(), packed_loss, our_gradients,
                                     packed, packed_small, low, k, ours=True) for k in reversed(kinds)]
        if installed("transformers"):
            candidates += [step_candidate("padded BERT, torch.compile" if k else "padded BERT (transformers, SDPA)",
                                          new_bert(), bert_loss, bert_gradients, padded, padded_small, low, k,
                                          yardstick=not k) for k in kinds]
        problems.append(Problem(title, dtype, work, 0.0, truth, candidates, tokens=len(packed["tokens"])))
    return problems
