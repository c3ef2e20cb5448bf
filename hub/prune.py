"""Narrower layers without training: heads and MLP neurons go, and what stays is fitted anew.

    python unibert.py prune SRC DST --data DIR --heads 6 --intermediate-size 184

A layer adds two sums to its input, out(mixed) of its heads and down(widened) of its neurons. From the first layer
to the last, for each of the two: let c [T, A] be the columns that the output matrix reads, computed from the *pruned*
model's states on T tokens of text, and r [T, H] what is missing from them to the original's residual sum. The fit with the
columns S minimises |c_S W + b - r|^2: with the covariances G = cov(c, c) and B = cov(c, r), W = G_SS^-1 B_S. (A layer without
biases is fitted without b: then G and B are moments about zero.) As r aims at the
original's own state, each fit also mends what the layers below got wrong. Which columns stay:

  heads     one is left out after another, the one whose loss costs the fit least (all refits are computed)
  neurons   Optimal Brain Surgeon (Hassibi & Stork 1993): leaving j out costs |W_j|^2 / (G^-1)_jj, and moves the rest
            by -(G^-1)_:j W_j / (G^-1)_jj; one after another, since two that can stand for each other both cost little

Errors of dimensions count as the norm behind them scales them. Structured pruning without training by such fits: ZipLM
(arXiv 2302.04089), Kwon et al. (arXiv 2204.09656). Time: T * A^2 multiplications a layer for G, in float64.

`--steps` goes on from the fit by gradients, on all layers at once (`heal`): every state of the pruned model aims at the original's state
in the same place, token by token. That is far more to learn from than one vector a sentence, so it is a better start for distillation
than the fit alone (examples/tried.md). The original reads each text once, and its states are kept.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import BOS, EOS, encode_text, pack_sequences
from hub.checkpoints import new_folder, save_vocabulary, texts_by_language
from hub.vocabulary import load_vocabulary, read_vocabulary
from launch import default_dtype
from unibert import Layout, UniBERT, load_model, positions_of, refusals, rotary_table, save_model

RIDGE = 1e-4       # of G's mean diagonal, added to it: columns that are copies of each other have no unique fit
ROWS = 4096        # tokens whose float64 copies are alive at a time


def calibration(folder: Path | str, tokenizer, tokens: int, length: int) -> tuple[Tensor, Tensor, int]:
    """Texts in `folder`, about `tokens` tokens, as many of each language, in sequences of at most `length`
    -> packed batch: tokens [T], cu_seqlens [S + 1], max_seqlen."""
    sequences = []
    languages = texts_by_language(folder)
    for _, texts in languages:
        left = -(-tokens // len(languages))
        for text in texts:
            ids = encode_text(tokenizer, text)
            for start in range(0, len(ids), length - 2):
                if left > 0:
                    sequences.append([BOS, *ids[start:start + min(left, length - 2)], EOS])
                    left -= len(sequences[-1])
            if left <= 0:
                break
    if not sequences:
        raise ValueError(f"{folder}: holds no text")
    return pack_sequences(sequences)


class Fit:
    """Least squares of `missing` [T, H] on columns [T, A], both centred where there is a bias to take the means; `weight` [H] of
    the errors."""

    def __init__(self, columns: Tensor, missing: Tensor, weight: Tensor, bias: bool = True):
        self.means = columns.double().mean(0) * bias, missing.double().mean(0) * bias
        self.weight = weight.double()
        size, out = columns.shape[1], missing.shape[1]
        self.gram, self.cross = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, out, dtype=torch.float64)
        for c, r in zip(columns.split(ROWS), missing.split(ROWS)):
            c, r = c.double() - self.means[0], r.double() - self.means[1]
            self.gram += c.T @ c
            self.cross += c.T @ r
        self.gram += RIDGE * self.gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
        self.total = (missing.double() - self.means[1]).mul_(self.weight).square().sum().item()

    def solve(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """-> weight [H, S] and bias [H] of the output matrix that reads the columns `kept`."""
        w = torch.linalg.solve(self.gram[kept][:, kept], self.cross[kept])
        return w.T.float(), (self.means[1] - self.means[0][kept] @ w).float()

    def rest(self, kept: Tensor) -> float:
        """Share of the missing that the best fit with `kept` leaves."""
        cross = self.cross[kept] * self.weight
        return 1 - (cross * torch.linalg.solve(self.gram[kept][:, kept], cross)).sum().item() / self.total

    def choose_heads(self, count: int, head_dim: int) -> list[int]:
        heads = list(range(len(self.gram) // head_dim))
        while len(heads) > count:
            heads.remove(min(heads, key=lambda h: self.rest(columns_of([k for k in heads if k != h], head_dim))))
        return heads

    def choose_neurons(self, count: int) -> Tensor:
        kept = torch.arange(len(self.gram))
        inverse = torch.linalg.inv(self.gram)
        w = inverse @ (self.cross * self.weight)
        gone = torch.zeros(len(kept), dtype=torch.bool)
        for left in range(len(kept), count, -1):
            j = (w.square().sum(1) / inverse.diagonal()).masked_fill_(gone, torch.inf).argmin()
            column = inverse[:, j] / inverse[j, j]
            w.addr_(column, w[j].clone(), alpha=-1)
            inverse.addr_(column, inverse[j].clone(), alpha=-1)
            gone[j] = True
            if left % 64 == 0:                     # rows and columns of those that left
                kept, w, inverse = kept[~gone], w[~gone], inverse[~gone][:, ~gone]
                gone = gone[~gone]
        return kept[~gone]


def columns_of(heads: list[int], head_dim: int) -> Tensor:
    """The columns of `mixed` that belong to `heads`."""
    return torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in heads])


@torch.no_grad()
def prune(model: UniBERT, heads: int, intermediate_size: int, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int,
          layers: list[int] | None = None, say=lambda line: None) -> UniBERT:
    """The model with its `layers` (None: all), `heads` heads and `intermediate_size` neurons in each, fitted on a packed batch.

    The MLP of a kept layer aims at where the last of the layers dropped behind it would have ended. ValueError for more than there is,
    or for a batch too small to fit.
    """
    config = model.config
    layers = list(range(config.num_layers)) if layers is None else layers
    for name, wanted, there in (("heads", heads, config.num_heads),
                                ("intermediate size", intermediate_size, config.intermediate_size)):
        if not 1 <= wanted <= there:
            raise ValueError(f"{name} {wanted}: the model's layers have {there}")
    if layers != sorted(set(layers)) or layers[:1] != [0] or layers[-1] >= config.num_layers:
        raise ValueError(f"layers {','.join(map(str, layers))}: must be ascending numbers, the first 0, up to {config.num_layers - 1}")
    if config.global_every > 1 and len(layers) < config.num_layers:
        raise ValueError("the model mixes local and global layers; dropping some of them is not supported")
    if len(tokens) < 2 * config.intermediate_size:
        raise ValueError(f"{len(tokens)} tokens of text are too few to fit {config.intermediate_size} neurons; "
                         f"at least {2 * config.intermediate_size}")
    small = UniBERT(dataclasses.replace(config, num_layers=len(layers), num_heads=heads, head_size=config.head_dim,
                                        intermediate_size=intermediate_size)).eval()
    small.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}, strict=False)
    states: list[Tensor] = []
    model.eval().encode(tokens, cu_seqlens, max_seqlen, states)
    _, position = positions_of(cu_seqlens, len(tokens))
    x = states[0]
    for new, number, after in zip(small.blocks, layers, [*layers[1:], config.num_layers]):
        old, last, post = model.blocks[number], model.blocks[after - 1], config.block == "post"
        layout = Layout(cu_seqlens, max_seqlen)
        if not post:
            theta = config.rope_theta if number % config.global_every == 0 else config.local_rope_theta
            layout.cos, layout.sin = rotary_table(position, config.head_dim, theta)
        new.attention_norm.load_state_dict(old.attention_norm.state_dict())
        new.mlp_norm.load_state_dict((last if post else old).mlp_norm.state_dict())   # post: of the output, modern: of the input
        behind = (new.attention_norm, new.mlp_norm) if post else (nn.Identity(), nn.Identity())
        scales = (new.attention_norm.weight, new.mlp_norm.weight) if post else [torch.ones(config.hidden_size)] * 2

        goal = states[number] + old.attend(states[number], layout)
        fit = Fit(old.mixed(x, layout), goal - x, scales[0], new.out.bias is not None)
        kept = fit.choose_heads(heads, config.head_dim)
        columns = columns_of(kept, config.head_dim)
        rows = torch.cat([columns + part * len(old.qkv.weight) // 3 for part in range(3)])
        put(new.qkv, old.qkv.weight[rows], old.qkv.bias, rows)
        put(new.out, *fit.solve(columns))
        attention_rest = fit.rest(columns)
        x, middle = behind[0](x + new.attend(x, layout)), behind[0](goal)

        if last is not old:
            middle = states[after - 1] + last.attend(states[after - 1], layout)
            middle = last.attention_norm(middle) if post else middle
        goal = middle + last.down(last.widened(middle))
        fit = Fit(old.widened(x), goal - x, scales[1], new.down.bias is not None)
        columns = fit.choose_neurons(intermediate_size)
        rows = columns if post else torch.cat([columns, columns + config.intermediate_size])   # values and gates
        put(new.up, old.up.weight[rows], old.up.bias, rows)
        put(new.down, *fit.solve(columns))
        x = behind[1](x + new.down(new.widened(x)))
        off = (x - states[after]).square().sum() / (states[after] - states[after].mean(0)).square().sum()
        say(f"layer {number}: heads {','.join(map(str, kept))}; not fitted: attention {attention_rest:.1%}, MLP "
            f"{fit.rest(columns):.1%}, state {off:.1%}")
    return small


HEAL_BATCH, HELD_OUT = 8192, 2     # tokens a step; batches that are only looked at


def healing_batches(tokens: Tensor, cu_seqlens: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """A packed batch of all languages -> packed batches of HEAL_BATCH tokens, languages mixed. ValueError for too few to learn from."""
    sequences = [sequence.tolist() for sequence in tokens.split(cu_seqlens.diff().tolist())]
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    batches, chosen = [], []
    for i in order:
        chosen.append(sequences[i])
        if sum(map(len, chosen)) >= HEAL_BATCH:
            batches.append(pack_sequences(sorted(chosen, key=len)))     # neighbours of one length: one call of attention on the CPU
            chosen = []
    if len(batches) <= HELD_OUT:
        raise ValueError(f"{len(tokens):,} tokens of text are too few for --steps; give --heal-tokens {2 * (HELD_OUT + 1) * HEAL_BATCH:,} "
                         "or more, and as much text")
    return batches


def heal(model: UniBERT, small: UniBERT, layers: list[int], batches: list[tuple[Tensor, Tensor, int]], steps: int, lr: float = 1e-3,
         say=lambda line: None) -> None:
    """Train the layers of `small`, which `prune` made of the `layers` of `model`, towards the states of `model` on `healing_batches`.

    The loss of a layer is its states' squared error over the variance of their goals, a mean over tokens. Embeddings, norms outside
    the layers and the head stay. Memory: len(layers) * hidden_size * 2 bytes a token of the batches.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = default_dtype(device)
    goals = [*layers[1:], model.config.num_layers]               # where the layers dropped behind a kept one would have ended

    def states_of(which: UniBERT, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
        states: list[Tensor] = []
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            last = which.encode(tokens.to(device), cu_seqlens.to(device), max_seqlen, states)
        return [*states[:-1], last]                              # the last one after its norm, where there is one

    @torch.no_grad()
    def read(batch) -> tuple[list[Tensor], Tensor]:
        """The states to aim at, and the variance of each."""
        states = states_of(model, *batch)
        return [states[i].to(torch.bfloat16) for i in goals], torch.stack([states[i].float().var(0).mean() for i in goals])

    def errors(batch, wanted: list[Tensor], variances: Tensor) -> Tensor:
        """Each layer's error [len(layers)] fp32."""
        ours = states_of(small, *batch)[1:]
        return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(ours, wanted)]) / variances

    model.to(device)
    small.to(device)
    known = [(batch, *read(batch)) for batch in batches]
    held_out, known = known[:HELD_OUT], known[HELD_OUT:]
    parameters = list(small.blocks.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
    for step in range(steps + 1):
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                left = sum(errors(*batch) for batch in held_out) / HELD_OUT
            say(f"step {step:4d}/{steps}  error of each state, on held-out text: {' '.join(f'{e:.1%}' for e in left.tolist())}")
        if step == steps:
            break
        for group in optimizer.param_groups:                     # warm-up, then constant, then down to zero
            group["lr"] = lr * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        torch.autograd.backward(errors(*known[step % len(known)]).sum(), inputs=parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.cpu()
    small.cpu()


def put(layer: nn.Linear, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
    """Fill a linear layer; one without bias does without."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias if rows is None else bias[rows])


@click.command("prune")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path),
              help="Text to fit on: a folder that data.py prepared, or one of <code>.txt files.")
@click.option("--heads", required=True, type=click.IntRange(1), help="Heads to keep in each layer.")
@click.option("--intermediate-size", required=True, type=click.IntRange(1), help="MLP neurons to keep in each layer.")
@click.option("--layers", help="Layers to keep, as in 0,1,3,5 (from 0). [default: all]")
@click.option("--tokens", default=32768, show_default=True, type=click.IntRange(1), help="Of text to fit, all languages alike.")
@click.option("--steps", default=0, show_default=True, type=click.IntRange(0), help=f"Of gradient after the fit, {HEAL_BATCH:,} tokens each.")
@click.option("--heal-tokens", default=524288, show_default=True, type=click.IntRange(1), help="Of text for --steps, read again and again.")
@click.option("--max-length", default=64, show_default=True, type=click.IntRange(4), help="Of its sequences.")
def prune_command(source, target, data, heads, intermediate_size, layers, tokens, steps, heal_tokens, max_length):
    """Keep the heads and neurons that matter most, fitted anew: model folder SRC -> smaller model folder DST."""
    with refusals():
        model, vocabulary = load_model(source), read_vocabulary(source)
        tokenizer, length = load_vocabulary(source), min(max_length, model.config.max_length)
        if layers is not None and not all(part.strip().isdigit() for part in layers.split(",")):
            raise ValueError(f"--layers is {layers!r}; it must be numbers of layers, as in 0,1,3,5")
        layers = list(range(model.config.num_layers)) if layers is None else [int(n) for n in layers.split(",")]
        if steps:                                        # before the fit, so that too little text is refused at once
            packed, cu_seqlens, _ = calibration(data, tokenizer, heal_tokens, length)
            batches = healing_batches(packed, cu_seqlens)
        small = prune(model, heads, intermediate_size, *calibration(data, tokenizer, tokens, length), layers, say=click.echo)
        if steps:
            heal(model, small, layers, batches, steps, say=click.echo)
        with new_folder(target, source) as folder:
            pieces = source / "tokenizer.model"          # the same bytes, so that its data still fit
            save_model(small, folder, pieces if pieces.is_file() else None)
            if not pieces.is_file():
                save_vocabulary(vocabulary, folder)
    before, after = (sum(p.numel() for p in m.blocks.parameters()) for m in (model, small))
    click.echo(f"{target}: {after / 1e6:.2f} M parameters in the layers instead of {before / 1e6:.2f} M ({after / before:.1%})")
