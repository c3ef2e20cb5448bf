"""What a run will cost, on paper: `python train.py --plan --preset small --gpus 8 --tokens 50e9`.

Every figure follows from the model's shape by the formulas below, which tests compare with a real model: the
parameter count exactly, the FLOPs with what torch counts in a training step. Rates of GPUs are the vendors' data
sheets; the share of the peak that a run reaches (MFU) is an assumption that the table states.
"""
from __future__ import annotations

from unibert import UniBERTConfig

# Dense bf16 peak in FLOP/s by part of the device's name, from the vendors' data sheets. Others get no MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
LINK = {"H200": 450e9, "H100": 450e9, "B200": 900e9, "A100": 300e9, "L40S": 32e9, "4090": 32e9}  # bytes/s, one way


def parameters(c: UniBERTConfig) -> tuple[int, int]:
    """(embedding and decoder bias, all the rest), as UniBERT has them."""
    h, i, a = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim
    if c.block == "modern":  # matrices, two norms a layer but the first's; embedding, final and head norm; head matrix
        rest = c.num_layers * (4 * h * a + 3 * h * i + 2 * h) - h + 3 * h + h * h
    else:  # biases and norms of two vectors; positions
        rest = c.num_layers * (4 * h * a + 2 * h * i + 3 * a + h + h + i + 4 * h) + 4 * h + h * h + h + c.max_length * h
    return c.vocab_size * (h + 1), rest


def flops_per_token(model: UniBERTConfig, mask_rate: float, mean_length: float, teacher: UniBERTConfig | None = None,
                    discriminator: bool = False, head: bool = True, teacher_head: bool = True) -> dict[str, float]:
    """Useful matrix FLOPs a token of one training step, by part: 2 a weight forward, 4 backward, a teacher only forward.

    A token attends to `mean_length` others on average. Recomputation inside kernels is not useful work and not
    counted. The discriminator is run twice forward (unibert.py) and once backward. head, teacher_head: whether the model's
    and the teacher's predictions are wanted.
    """
    def encoder(c: UniBERTConfig) -> float:
        mlp = (3 if c.block == "modern" else 2) * c.hidden_size * c.intermediate_size
        inner = c.num_heads * c.head_dim
        return c.num_layers * (2 * (4 * c.hidden_size * inner + mlp) + 4 * mean_length * inner)

    def predictions(c: UniBERTConfig) -> float:
        return mask_rate * 2 * c.hidden_size * (c.vocab_size + c.hidden_size)
    parts = dict(encoder=3 * encoder(model), head=3 * predictions(model) * head)
    if teacher:
        parts["teacher"] = encoder(teacher) + predictions(teacher) * teacher_head
    if discriminator:
        parts["discriminator"] = 8 * 2 * model.hidden_size * (model.hidden_size + model.n_languages)
    return parts


def memory(model: UniBERTConfig, micro_batch_tokens: int, teacher: UniBERTConfig | None = None) -> dict[str, float]:
    """Bytes on one GPU by part, without activation checkpointing. AdamW in fp32, activations in bf16.

    Saved for the backward pass, in units of hidden size a token and layer: two fp32 residual sums (8 bytes),
    normed inputs (4), q, k, v and rotated q, k (10), attention output and its projection (4); of the MLP's width:
    value, gate, activation and product (8).
    """
    count = sum(parameters(model))
    h, i = model.hidden_size, model.intermediate_size
    activations = micro_batch_tokens * model.num_layers * (26 * h + (8 if model.block == "modern" else 4) * i)
    parts = {"weights (fp32)": 4 * count, "bf16 copies of the weights": 2 * count, "gradients": 4 * count,
             "optimiser's moments (bound)": 8 * count, "activations": activations,
             "loss workspace (bound)": 512 * 2 ** 20 if model.vocab_size > 4096 else 0}
    if teacher:
        t = teacher
        parts["teacher (weights, bf16 copies)"] = 6 * sum(parameters(t))
        parts["teacher's running activations"] = micro_batch_tokens * (14 * t.hidden_size + 8 * t.intermediate_size)
    return parts


def plan(model: UniBERTConfig, teacher: UniBERTConfig | None, *, gpus: int, gpu: str, tokens: float, tokens_per_batch: int,
         micro_batch_tokens: int, mask_rate: float, mfu: float, discriminator: bool) -> str:
    """The table, as text."""
    if gpu not in PEAK_FLOPS:
        raise ValueError(f"--gpu {gpu}: known are {', '.join(PEAK_FLOPS)}")
    if not 0 < tokens < float("inf"):
        raise ValueError(f"--tokens is {tokens:g}; it must be above 0")
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu is {mfu:g}; it must be above 0, up to 1")
    if tokens_per_batch < gpus:
        raise ValueError(f"--tokens-per-batch {tokens_per_batch:,} leaves some of --gpus {gpus} without a token")
    embedding, rest = parameters(model)
    flops = flops_per_token(model, mask_rate, model.max_length / 2, teacher, discriminator)
    per_token = sum(flops.values())
    speed = gpus * mfu * PEAK_FLOPS[gpu] / per_token
    step = tokens_per_batch / speed
    ring = 2 * (gpus - 1) / gpus * 4 * (embedding + rest) / LINK[gpu]
    lines = [f"{'parameters':34}{(embedding + rest) / 1e6:10.1f} M    {rest / 1e6:.1f} M layers and head, {embedding / 1e6:.1f} M embeddings",
             f"{'FLOPs a token':34}{per_token / 1e6:10.0f} M    " + ", ".join(f"{k} {v / per_token:.0%}" for k, v in flops.items())]
    micro = min(micro_batch_tokens, tokens_per_batch // gpus)
    parts = memory(model, micro, teacher)
    lines.append(f"{'memory a GPU':34}{sum(parts.values()) / 2 ** 30:10.1f} GiB  micro-batch of {micro:,} tokens")
    lines += [f"  {name:32}{size / 2 ** 30:10.2f} GiB" for name, size in parts.items() if size]
    lines += [f"{'tokens a second':34}{speed / 1e6:10.2f} M    {gpus} x {gpu} at an assumed MFU of {mfu:.0%} of {PEAK_FLOPS[gpu] / 1e12:.0f} TFLOP/s",
              f"{'time for ' + format(tokens, '.3g') + ' tokens':34}{tokens / speed / 86400:10.2f} days {tokens / tokens_per_batch:,.0f} steps of {tokens_per_batch:,} tokens",
              f"{'a step':34}{step * 1e3:10.1f} ms   all-reduce of fp32 gradients {ring * 1e3:.1f} ms at {LINK[gpu] / 1e9:.0f} GB/s, "
              f"{ring / step:.0%} of the step if nothing overlaps"]
    return "\n".join(lines)
