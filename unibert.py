"""UniBERT: a compact multilingual encoder in one file.

    python unibert.py fill-mask --model runs/atlas/final "Paris is the capital of [MASK]."
    python unibert.py embed --model runs/atlas/final < sentences.txt > vectors.npy

    python unibert.py import SRC DST; python unibert.py export SRC DST              # hub/

    from unibert import UniBERT, UniBERTConfig, load_model, save_model

In reading order: configuration, the two block forms, the model, the language adversary, the distillation
terms, model folders, command line. Everything works on *packed* input: the sequences of a batch lie one after
the other in `tokens [T]`, `cu_seqlens [S+1]` (int32) holds where each begins and ends, and nothing is padded.

UniBERT: arXiv 2503.12608. Sizes and defaults here are ours; the paper's could not be read.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from data import IGNORE
from files import read_safetensors, write_atomically, write_safetensors
from kernels import attention, linear_cross_entropy, linear_distillation
from launch import UserError


# ---------------------------------------------------------------------------------------------- configuration

@dataclass
class UniBERTConfig:
    """Shape of a model. `block` chooses the form of a layer:

    "modern"  pre-norm, rotary positions, GeGLU, no biases (as ModernBERT, arXiv 2412.13663)
    "post"    BERT's: post-norm, learned positions, exact GELU, biases; XLM-R, MiniLM and e5 weights fit it
    """
    vocab_size: int = 64000
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 1024
    max_length: int = 512
    n_languages: int = 107
    block: str = "modern"
    dropout: float = 0.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # ModernBERT's local layers: layers 0, n, 2n, ... rotate by rope_theta, all others by local_rope_theta. There is no
    # sliding window: `import` keeps max_length so short that ModernBERT's would not cut anything either.
    global_every: int = 1             # n
    local_rope_theta: float = 10000.0
    mlm_head: bool = True             # False: an imported encoder without one
    head_size: int = 0                # 0: hidden_size / num_heads; else what pruned heads kept

    def __post_init__(self):
        if self.block not in ("modern", "post"):
            raise ValueError(f"block is {self.block!r}; it must be 'modern' or 'post'")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length", "global_every"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number, at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in ("norm_eps", "rope_theta", "local_rope_theta"):
            if not isinstance(getattr(self, name), (int, float)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a number above 0")
        if not isinstance(self.head_size, int) or self.head_size < 0 or self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size!r}; it must be an even number, or 0 for hidden_size / num_heads")
        if not self.head_size and (self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2):
            raise ValueError(f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} times an even number")

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads

    @classmethod
    def preset(cls, name: str, **changes) -> UniBERTConfig:
        """tiny 4x128, xsmall 6x256, small 6x384 (the student), base 12x768 (a teacher)."""
        sizes = {"tiny": (4, 128, 4), "xsmall": (6, 256, 8), "small": (6, 384, 12), "base": (12, 768, 12)}
        if name not in sizes:
            raise ValueError(f"no preset {name!r}; there are {', '.join(sizes)}")
        layers, hidden, heads = sizes[name]
        # GeGLU has three matrices where BERT's MLP has two: 8/3 of the width instead of 4 keeps the count.
        geglu = -(-8 * hidden // 3 // 64) * 64
        wide = 4 * hidden if changes.get("block") == "post" else geglu
        return cls(**{**dict(num_layers=layers, hidden_size=hidden, num_heads=heads, intermediate_size=wide), **changes})


# --------------------------------------------------------------------------------------------------- the model

@dataclass
class Layout:
    """Where the sequences of a packed batch lie; made once a batch, used by every layer."""
    cu_seqlens: Tensor           # [S+1] int32
    max_seqlen: int
    cos: Tensor | None = None    # [T, 1, 1, head_dim] rotary tables at each token's position
    sin: Tensor | None = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [T, heads, head_dim] -> attention within each sequence, same shape."""
        return attention(q, k, v, self.cu_seqlens, self.max_seqlen)


def positions_of(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cu_seqlens [S+1] -> (segment, position), both [length]: positions restart at 0 with each sequence.

    Tokens past the last sequence get segment S. Works on the device, without a look at the values.
    """
    index = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    return segment, (index - cu_seqlens[segment]).long()


def rotary_table(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles of RoPE (arXiv 2104.09864) in the two-halves layout: cos and sin, each [T, 1, 1, head_dim] fp32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position.float()[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)[:, None, None, :]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, any, heads, head_dim] turned by its position; the tables are rounded to x's dtype, as x itself is."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([-second, first], dim=-1), sin.to(x.dtype))


def norm(config: UniBERTConfig, bias: bool) -> nn.Module:
    """The norm of every place in the model, over the last dimension."""
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=bias)


class Block(nn.Module):
    """What both forms share: one fused projection to queries, keys and values, attention, output projection."""

    def __init__(self, config: UniBERTConfig, bias: bool):
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.dropout
        inner = config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=bias)
        self.out = nn.Linear(inner, config.hidden_size, bias=bias)
        self.attention_norm = norm(config, bias)
        self.mlp_norm = norm(config, bias)

    def heads(self, x: Tensor) -> Tensor:
        """x [T, H] -> queries, keys and values before any rotation [T, 3, heads, head_dim]."""
        return self.qkv(x).view(x.shape[0], 3, self.num_heads, -1)

    def mixed(self, x: Tensor, layout: Layout) -> Tensor:
        """x [T, H] -> what each head has gathered, side by side [T, heads * head_dim]."""
        qk, v = self.heads(x).split((2, 1), dim=1)      # not by slices: each one's gradient would be a tensor of all three, mostly zeros
        if layout.cos is not None:
            qk = rotate(qk, layout.cos, layout.sin)
        return layout.mix(*qk.unbind(1), v.squeeze(1)).flatten(1)

    def attend(self, x: Tensor, layout: Layout) -> Tensor:
        return F.dropout(self.out(self.mixed(x, layout)), self.dropout, self.training)


class PostBlock(Block):
    """BERT's layer: the norm comes after each residual sum."""

    def __init__(self, config: UniBERTConfig):
        super().__init__(config, bias=True)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def widened(self, x: Tensor) -> Tensor:
        """x [T, H] -> the MLP's neurons [T, intermediate_size]."""
        return F.gelu(self.up(x))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = self.attention_norm(x + self.attend(x, layout))
        return self.mlp_norm(x + F.dropout(self.down(self.widened(x)), self.dropout, self.training))


class ModernBlock(Block):
    """Pre-norm layer with a gated MLP. The residual stream itself is never normalised."""

    def __init__(self, config: UniBERTConfig, first: bool):
        super().__init__(config, bias=False)
        if first:  # the embeddings have just been normalised
            self.attention_norm = nn.Identity()
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)  # value and gate
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        return super().heads(self.attention_norm(x))

    def widened(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.mlp_norm(x)).chunk(2, dim=-1)
        return F.gelu(value) * gate

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        x = x + self.attend(x, layout)
        return x + F.dropout(self.down(self.widened(x)), self.dropout, self.training)


class UniBERT(nn.Module):
    """Encoder with a tied masked-language-model head.

        hidden = model.encode(tokens, cu_seqlens, max_seqlen)      # [T] -> [T, H]
        loss = model.mlm_loss(hidden[masked], targets)             # [M, H], [M] -> [M] fp32
    """

    def __init__(self, config: UniBERTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # True: keep each block's input alone, and compute the rest again in backward
        bias = config.block == "post"
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block == "post":
            self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
            self.blocks = nn.ModuleList(PostBlock(config) for _ in range(config.num_layers))
            self.final_norm = nn.Identity()
        else:
            self.blocks = nn.ModuleList(ModernBlock(config, first=i == 0) for i in range(config.num_layers))
            self.final_norm = norm(config, bias=False)
        self.embedding_norm = norm(config, bias)
        if config.mlm_head:
            self.head_dense = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
            self.head_norm = norm(config, bias)
            self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's matrix is the embedding
        self.apply(self._initialise)
        if config.block == "modern":  # keeps the residual stream's variance flat in depth (GPT-2)
            for block in self.blocks:
                for layer in (block.out, block.down):
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.num_layers))

    @staticmethod
    def _initialise(module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def encode(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, states: list | None = None) -> Tensor:
        """tokens [T] int, cu_seqlens [S+1] int32, max_seqlen: the bound on a sequence's length -> hidden [T, H].

        `states`, if a list, receives num_layers + 1 tensors [T, H]: the embeddings, then each layer's output.
        Raises ValueError when max_seqlen is beyond the model's positions.
        """
        if max_seqlen > self.config.max_length:
            raise ValueError(f"sequences of {max_seqlen} tokens are beyond the model's max_length "
                             f"{self.config.max_length}; crop them or use a model with more positions")
        _, position = positions_of(cu_seqlens, tokens.shape[0])
        layout = Layout(cu_seqlens, max_seqlen)
        x = self.embedding(tokens)
        if self.config.block == "post":
            x = x + self.position_embedding(position.clamp(max=self.config.max_length - 1))
        else:
            layout.cos, layout.sin = rotary_table(position, self.config.head_dim, self.config.rope_theta)
        local = layout
        if self.config.global_every > 1:
            local = Layout(cu_seqlens, max_seqlen,
                           *rotary_table(position, self.config.head_dim, self.config.local_rope_theta))
        x = F.dropout(self.embedding_norm(x), self.config.dropout, self.training)
        if states is not None:
            states.append(x)
        for i, block in enumerate(self.blocks):
            inputs = x, local if i % self.config.global_every else layout
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
            if states is not None:
                states.append(x)
        return self.final_norm(x)

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows [M, H] -> what the decoder multiplies with the embedding matrix [M, H]."""
        if not self.config.mlm_head:
            raise ValueError("this model is an encoder without a masked-language-model head; it gives states and "
                             "sentence vectors, no token predictions")
        return self.head_norm(F.gelu(self.head_dense(rows)))

    def mlm_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        """rows [M, H] of the masked positions, targets [M] (IGNORE = no loss) -> cross-entropy [M] fp32, in nats."""
        return linear_cross_entropy(self.head(rows), self.embedding.weight, self.decoder_bias, targets)

    def distillation_loss(self, rows: Tensor, targets: Tensor, teacher: UniBERT, teacher_rows: Tensor,
                          temperature: float) -> tuple[Tensor, Tensor]:
        """Cross-entropy and T^2 KL(teacher || student) at the masked rows, each [M] fp32, in one sweep over V."""
        with torch.no_grad():
            teacher_rows = teacher.head(teacher_rows)
        return linear_distillation(self.head(rows), self.embedding.weight, self.decoder_bias, targets, teacher_rows,
                                   teacher.embedding.weight, teacher.decoder_bias, temperature=temperature)

    def mlm_logits(self, rows: Tensor) -> Tensor:
        """rows [M, H] -> logits [M, V]. For a few rows at inference; training never makes logits."""
        return F.linear(self.head(rows), self.embedding.weight, self.decoder_bias)


# -------------------------------------------------------------------------------------- the language adversary

class GradientReversal(torch.autograd.Function):
    """Identity forward; backward multiplies the gradient by -scale (Ganin & Lempitsky 2015, arXiv 1409.7495)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        scale, = ctx.saved_tensors
        return -scale.to(gradient.dtype) * gradient, None


class LanguageDiscriminator(nn.Module):
    """Two-layer perceptron that names the language of a hidden state.

    It sees layer-normalised features, so the encoder cannot win by mere scale. On raw features a reversed
    discriminator was seen to diverge.
    """

    def __init__(self, hidden_size: int, n_languages: int, width: int | None = None):
        super().__init__()
        width = width or 2 * hidden_size
        self.hidden_size = hidden_size
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, n_languages)

    def forward(self, features: Tensor) -> Tensor:
        """features [N, H] -> logits [N, n_languages] fp32."""
        features = F.layer_norm(features, (self.hidden_size,))
        return self.outer(F.gelu(self.inner(features))).float()

    @staticmethod
    def pressure(ignorance: Tensor) -> Tensor:
        """The share of lambda that is applied. ignorance: the discriminator's loss over that of a guess by the prior.

        1 up to an ignorance of 1/2, then linear, 0 from 1 on. Not a step: there the last bit of a sum would decide over
        whole tokens, and two runs that differ in rounding alone would part.
        """
        return (2 - 2 * ignorance).clamp(0, 1)

    def adversarial_loss(self, features: Tensor, languages: Tensor, strength: float | Tensor,
                         prior: Tensor) -> tuple[Tensor, Tensor]:
        """features [N, H], languages [N] (IGNORE = none), prior [n_languages] -> (cross-entropy [N], correct [N] bool).

        The discriminator learns from the plain cross-entropy. The features receive -strength times its gradient, less
        and less where the loss nears -log prior[language], and nothing beyond (`pressure`): a discriminator that knows
        nothing but the prior has that loss. There nothing is left to hide, and an unbounded reversed loss would only
        blow up the encoder.
        """
        bound = -prior.clamp_min(1e-9).log()[languages.clamp_min(0)]
        bound = bound.clamp_min(1e-9)  # of the only language it is 0, and the loss too
        with torch.no_grad():
            loss = F.cross_entropy(self(features), languages, ignore_index=IGNORE, reduction="none")
        scale = strength * self.pressure(loss / bound).to(features.dtype)[:, None]
        logits = self(GradientReversal.apply(features, scale))
        loss = F.cross_entropy(logits, languages, ignore_index=IGNORE, reduction="none")
        return loss, (logits.argmax(-1) == languages) & (languages != IGNORE)


def mean_pool(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """hidden [T, H], cu_seqlens [S+1] -> mean over each sequence's tokens [S, H] fp32; empty sequences give 0."""
    length = cu_seqlens.diff().clamp_min(1)[:, None]
    return torch.segment_reduce(hidden.float(), "sum", offsets=cu_seqlens.long(), axis=0, initial=0.0) / length


# ------------------------------------------------------------------------------------------- distillation terms

def hidden_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of layer-normalised states, student (already projected) and teacher [N, H] -> [N].

    Layer-normalised, so that directions count and a few outlier dimensions of the teacher do not rule the sum.
    """
    shape = teacher.shape[-1:]
    return (F.layer_norm(student.float(), shape) - F.layer_norm(teacher.float(), shape)).square().mean(-1)


def relation_distillation(student: Tensor, teacher: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                          relation_heads: int) -> Tensor:
    """MiniLMv2 (arXiv 2012.15828): KL between token-to-token relations Q-Q, K-K and V-V of one layer each.

    student [T, 3, h, d] and teacher [T, 3, h', d'] as `Block.heads` gives them; widths may differ, both are cut
    anew into `relation_heads`. Returns [T] fp32: a token's KL, summed over Q, K, V, averaged over heads.
    Memory: 9 * relation_heads * max_seqlen floats a token, for each model.
    """
    total = student.shape[0]
    segment, _ = positions_of(cu_seqlens, total)

    def windows(x: Tensor) -> Tensor:
        """x [T, ...] -> [blocks, ..., 3 L]: each block of L = max_seqlen tokens, in the middle, and the two beside it.
        No sequence of a block's tokens reaches further. What is added at the ends is of segment -1, which is none."""
        after = max_seqlen + -total % max_seqlen
        return F.pad(x, (0, 0) * (x.ndim - 1) + (max_seqlen, after), value=-1).unfold(0, 3 * max_seqlen, max_seqlen)

    own = windows(segment)
    own = own[:, max_seqlen:-max_seqlen, None] == own[:, None, :]                            # [blocks, L, 3 L]

    def relations(x: Tensor) -> Tensor:
        keys = windows(x.flatten(2).unflatten(2, (relation_heads, -1)).float())              # [blocks, 3, h, d, 3 L]
        score = keys[..., max_seqlen:-max_seqlen].mT @ keys / math.sqrt(keys.shape[3])       # [blocks, 3, h, L, 3 L]
        return F.log_softmax(score.masked_fill(~own[:, None, None], -1e9), dim=-1)

    with torch.autocast(student.device.type, enabled=False):  # in bfloat16 small differences would be rounding alone
        ours = relations(student)
        with torch.no_grad():
            theirs = relations(teacher)
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(2).sum(1)                         # [blocks, L]
    return kl.flatten()[:total] * (segment < cu_seqlens.shape[0] - 1)


def similarity_distillation(student: Tensor, teacher: Tensor, real: Tensor, temperature: float, anchors: Tensor) -> Tensor:
    """KL(teacher || student) between a sentence's distributions over the sentences of its row and the anchors -> [B, S] fp32.

    student (already projected), teacher [B, S, H] sentence vectors; real [B, S] bool; anchors [N, H], the teacher's vectors
    of N other texts, perhaps none. Sentence i weighs all of these by softmax(cosine(i, j) / temperature), with the
    teacher's vector i and with the student's: the student has to rank as the teacher does, which small cosine
    distances alone do not bring about where all vectors lie in a narrow cone (e5: cosines of 0.7 to 1). A row has a few
    dozen sentences; the nearer neighbours that say more are among thousands (SEED, arXiv 2101.04731, keeps a queue).
    """
    student, teacher, anchors = (F.normalize(vectors.float(), dim=-1) for vectors in (student, teacher, anchors))
    absent = F.pad(torch.where(real, 0.0, -1e9), (0, len(anchors)))[:, None]                # [B, 1, S + N]
    # Not in bfloat16: it rounds a cosine of 0.8 by up to 0.002, which a temperature of 0.02 makes 0.1 of a logit.
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (F.log_softmax(torch.cat([own @ teacher.mT, own @ anchors.T], -1) / temperature + absent, dim=-1)
                        for own in (student, teacher))
    return (theirs.exp() * (theirs - ours)).sum(-1) * real


def language_directions(means: Tensor, count: int) -> Tensor:
    """The directions in which languages differ: means of each one's vectors [L, H] -> [count, H] fp32, orthonormal.

    A teacher's sentence vectors without their part in these few directions find translations better than with it, and need not be
    told the language (LSAR, arXiv 2401.05792). ValueError for more than L - 1 or H: there are no more.
    """
    if count > min(len(means) - 1, means.shape[1]):
        raise ValueError(f"the means of {len(means)} languages in {means.shape[1]} dimensions differ in no {count} directions")
    _, _, directions = torch.linalg.svd((means - means.mean(0)).double(), full_matrices=False)
    return directions[:count].float()


# ------------------------------------------------------------------------------------------------ model folders

def save_model(model: UniBERT, folder: os.PathLike | str, tokenizer: os.PathLike | str | None = None) -> None:
    """Write config.json, model.safetensors and, when `tokenizer` names a SentencePiece model, tokenizer.model."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_safetensors({k: v.detach() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    except OSError:
        with contextlib.suppress(OSError):  # leave no empty folder
            folder.rmdir()
        raise
    if tokenizer is not None:
        write_atomically(folder / "tokenizer.model", [pathlib.Path(tokenizer).read_bytes()])
    write_atomically(folder / "config.json", [json.dumps(dataclasses.asdict(model.config), indent=1).encode() + b"\n"])


class _NoDraws(torch.overrides.TorchFunctionMode):
    """Skips the random fills of torch.nn.init: on the meta device they fill nothing, and the first one imports for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config: UniBERTConfig, tensors: int | None = None) -> UniBERT:
    """A model of shapes alone, for load_state_dict(..., assign=True). ValueError for sizes that no file of `tensors` tensors has."""
    if tensors is not None and config.num_layers > tensors:  # else a config.json could keep us busy for days
        raise ValueError(f"config.json asks for {config.num_layers:,} layers, the weights are {tensors:,} tensors")
    try:
        with torch.device("meta"), _NoDraws():
            return UniBERT(config)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"config.json asks for sizes that no tensor can have ({str(error).splitlines()[0]})") from None


def load_model(folder: os.PathLike | str, device: str | torch.device = "cpu") -> UniBERT:
    """Read a model folder, in evaluation mode. Raises ValueError in one line that names the file and the fault."""
    folder = pathlib.Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = f"; the model is in {folder / 'final'}" if (folder / "final").is_dir() else ""  # of a run folder
            raise ValueError(f"{folder} is not a model folder: it has no {name}{inside}")
    try:
        config = UniBERTConfig(**json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a UniBERT's ({error}); others' checkpoints are brought in by "
                         "`python unibert.py import`") from None
    tensors = read_safetensors(folder / "model.safetensors")
    try:
        model = empty_model(config, len(tensors))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    wanted = model.state_dict()
    if different := wanted.keys() ^ tensors.keys():
        name = min(different)
        raise ValueError(f"{folder / 'model.safetensors'}: tensor {name} is " +
                         ("missing" if name in wanted else "not part of the model that config.json describes"))
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"{folder / 'model.safetensors'}: {name} has shape {list(tensor.shape)}, config.json "
                             f"asks for {list(wanted[name].shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder / 'model.safetensors'}: {name} is {tensor.dtype}; weights are floats")
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------- command line

@contextlib.contextmanager
def refusals():
    """What is wrong with the input, in one line on standard error, exit code 2; anything else stays a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error).strip()) from None


def main():
    import inference  # these here, because they build on this file
    from hub import checkpoints, export, prune

    @click.group(context_settings=dict(help_option_names=["-h", "--help"], show_default=True))
    def cli():
        """Use a trained UniBERT; bring in and take out others' checkpoints."""

    for command in (inference.fill_mask_command, inference.embed_command, inference.similarity_command,
                    checkpoints.import_command, export.export_command, checkpoints.trim_command, prune.prune_command):
        cli.add_command(command)
    cli()


if __name__ == "__main__":
    main()
