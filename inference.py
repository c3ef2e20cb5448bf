"""A trained model at work: fill-mask, sentence vectors, similarity. Packed like training: no padding is computed.

    from inference import embed, load
    model, tokenizer = load("runs/atlas/final")
    vectors = embed(model, tokenizer, ["A sentence.", "Une phrase."], normalize=True)        # [2, H]
"""
from __future__ import annotations

import json
import os
import sys
import tempfile

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import BOS, EOS, FIRST_PIECE, MASK, encode_text, pack_sequences
from launch import UserError
from unibert import UniBERT, load_model, mean_pool, refusals
from hub.vocabulary import load_vocabulary

WINDOW = 16384             # lines of a stream that are held, sorted by length and embedded at a time


def load(folder: os.PathLike | str, device: str | torch.device = "cpu"):
    """A model folder -> (UniBERT, tokenizer). Raises ValueError in one line."""
    model, tokenizer = load_model(folder, device), load_vocabulary(folder)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {len(tokenizer)} pieces, the model {model.config.vocab_size}")
    return model, tokenizer


def encode_masked(tokenizer, text: str) -> list[int]:
    """Text with [MASK] -> ids, <s> and </s> included. A word after a mask keeps its own leading space or none."""
    # SentencePiece puts a space before whatever it is given, but not between this character, which no text has, and the next.
    ids, mark = [BOS], "\ue000"
    for i, part in enumerate(text.split("[MASK]")):
        ids += [MASK] if i else []
        if i and part.strip() and not part[0].isspace():
            ids += encode_text(tokenizer, mark + part)[len(encode_text(tokenizer, mark)):]
        elif part.strip():
            ids += encode_text(tokenizer, part)
    return ids + [EOS]


@torch.inference_mode()
def fill_mask(model: UniBERT, tokenizer, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
    """For each [MASK] in `text` the `top` most probable pieces with their probabilities, best first."""
    ids = encode_masked(tokenizer, text)
    if MASK not in ids:
        raise ValueError("the text has no [MASK]; write it where the missing word is")
    tokens, cu_seqlens, max_seqlen = pack_sequences([ids])
    device = model.embedding.weight.device
    hidden = model.encode(tokens.to(device), cu_seqlens.to(device), max_seqlen)
    logits = model.mlm_logits(hidden[tokens.to(device) == MASK]).float()
    logits[:, :FIRST_PIECE] = float("-inf")
    values, pieces = logits.softmax(-1).topk(min(top, logits.shape[1] - FIRST_PIECE))
    return [[(tokenizer.id_to_piece(p).replace("\u2581", " ").strip() or "\u2581", v) for p, v in zip(ps, vs)]
            for ps, vs in zip(pieces.tolist(), values.tolist())]


@torch.no_grad()  # not inference_mode, whose tensors no classifier could be trained on
def embed_ids(model: UniBERT, sequences: list[list[int]], tokens_per_batch: int = 4096) -> Tensor:
    """Sequences of ids, <s> and </s> included -> the mean of each one's last hidden states [n, H] fp32, on the CPU.

    Batches hold sequences of like length, at most `tokens_per_batch` tokens.
    """
    vectors = torch.empty(len(sequences), model.config.hidden_size)
    device = model.embedding.weight.device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    while order:
        batch, used = [], 0
        while order and (not batch or used + len(sequences[order[-1]]) <= tokens_per_batch):
            batch.append(order.pop())
            used += len(sequences[batch[-1]])
        tokens, cu_seqlens, max_seqlen = pack_sequences([sequences[i] for i in batch])
        cu_seqlens = cu_seqlens.to(device)
        vectors[batch] = mean_pool(model.encode(tokens.to(device), cu_seqlens, max_seqlen), cu_seqlens).cpu()
    return vectors


def embed(model: UniBERT, tokenizer, sentences: list[str], tokens_per_batch: int = 4096, normalize: bool = False,
          prefix: str = "") -> Tensor:
    """Sentences -> the mean of each one's last hidden states over its real tokens [n, H] fp32, on the CPU.

    `prefix` is put in front of each ("query: " for e5), `normalize` gives unit length. Texts longer than the
    model's max_length are cut.
    """
    most = model.config.max_length - 2
    sequences = [[BOS, *encode_text(tokenizer, prefix + sentence)[:most], EOS] for sentence in sentences]
    vectors = embed_ids(model, sequences, tokens_per_batch)
    return F.normalize(vectors) if normalize else vectors


def embed_stream(model: UniBERT, tokenizer, source, target, progress=lambda lines: None, **options) -> int:
    """Lines of the binary file `source` -> a .npy array [n, H] fp32 in the binary file `target`; returns n.

    The lines wait in a temporary file, because the array's head says how many there are; memory stays flat.
    `progress` is called with the number of lines done, and once before with minus their total.
    """
    with tempfile.TemporaryFile() as spool:
        count = 0
        for line in source:
            spool.write(line.rstrip(b"\r\n") + b"\n")
            count += 1
        spool.seek(0)
        progress(-count)
        np.lib.format.write_array_header_1_0(target, dict(
            descr="<f4", fortran_order=False, shape=(count, model.config.hidden_size)))
        done = wrong = 0
        while done < count:
            lines = [spool.readline()[:-1].decode("utf-8", "replace") for _ in range(min(WINDOW, count - done))]
            wrong += sum("\ufffd" in line for line in lines)
            target.write(embed(model, tokenizer, lines, **options).numpy().astype("<f4").tobytes())
            done += len(lines)
            progress(len(lines))
        target.flush()
    if wrong:
        click.echo(f"warning: {wrong} of {count} lines held invalid UTF-8 (U+FFFD stands for it)", err=True)
    return count


# -------------------------------------------------------------------------------------------------------- commands

MODEL = click.option("--model", "folder", required=True, help="A model folder, such as runs/atlas/final.")
DEVICE = click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]), show_default=True)
PREFIX = click.option("--prefix", default="", help="Put in front of each sentence; e5 wants 'query: '.")


def load_checked(folder: str, device: str):
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    return load(folder, device)


def utf8(ctx, param, value):
    """Arguments as a terminal of another encoding gives them hold what is no text."""
    try:
        "".join(value).encode()
    except UnicodeEncodeError:
        raise click.BadParameter("not UTF-8 text; set the terminal to UTF-8") from None
    return value


@click.command("fill-mask")
@MODEL
@DEVICE
@click.option("--top", default=5, type=click.IntRange(1), show_default=True, help="Pieces to show for each mask.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines for people.")
@click.argument("text", callback=utf8)
def fill_mask_command(folder, device, top, as_json, text):
    """The most probable pieces for each [MASK] in TEXT."""
    with refusals():
        answers = fill_mask(*load_checked(folder, device), text, top)
    if as_json:
        masks = [[dict(piece=piece, probability=p) for piece, p in answer] for answer in answers]
        return click.echo(json.dumps(dict(text=text, masks=masks), ensure_ascii=False))
    for i, answer in enumerate(answers, 1):
        for piece, probability in answer:
            click.echo(f"{f'mask {i}  ' if len(answers) > 1 else ''}{probability:7.4f}  {piece}")


@click.command("embed")
@MODEL
@DEVICE
@PREFIX
@click.option("--normalize", is_flag=True, help="Vectors of length 1.")
def embed_command(folder, device, prefix, normalize):
    """Sentence vectors: one sentence a line on standard input, a .npy array [n, H] fp32 on standard output."""
    if sys.stdout.isatty():
        raise click.UsageError("the vectors are binary; send them to a file: ... > vectors.npy")
    with refusals():
        model, tokenizer = load_checked(folder, device)
    bar = None

    def progress(lines):
        nonlocal bar
        if bar is None:
            bar = click.progressbar(length=-lines, file=sys.stderr, hidden=not sys.stderr.isatty(), show_pos=True)
        else:
            bar.update(lines)
    try:
        embed_stream(model, tokenizer, sys.stdin.buffer, sys.stdout.buffer, progress, prefix=prefix, normalize=normalize)
    except BrokenPipeError:  # whoever read the vectors has enough; click ends quietly
        raise
    except OSError as error:
        raise UserError(f"standard output or {tempfile.gettempdir()}: {error.strerror}; the vectors are not whole") from None
    bar.render_finish()


@click.command("similarity")
@MODEL
@DEVICE
@PREFIX
@click.argument("text", callback=utf8)
@click.argument("others", nargs=-1, required=True, callback=utf8)
def similarity_command(folder, device, prefix, text, others):
    """Cosine similarity of TEXT to each of OTHERS, the most similar first."""
    with refusals():
        model, tokenizer = load_checked(folder, device)
    vectors = embed(model, tokenizer, [text, *others], normalize=True, prefix=prefix)
    for score, other in sorted(zip((vectors[1:] @ vectors[0]).tolist(), others), reverse=True):
        click.echo(f"{score:7.4f}  {other}")
