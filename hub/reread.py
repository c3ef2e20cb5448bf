"""A teacher that has a tokenizer of its own reads a batch's text anew.

The pieces of a trimmed vocabulary are all pieces of the teacher's, but where a piece was dropped, a word is cut into
others. Trimming multilingual-e5-small from 250,002 to 83,000 pieces cost it a sixth of its own retrieval accuracy
(RESULTS.md), and a student of the trimmed teacher could not have been better. So the teacher stays whole, reads the same
text in its own pieces, and is compared by sentence vectors, which need no common tokens, and by the states of those tokens
that both cut alike (`same_tokens`). Sentence vectors do not change from epoch to epoch, so they can be kept (`Remembered`): most
of a small student's step is its teacher's.
"""
from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from data import BOS, EOS, UNK, Corpus, encode_text, load_tokenizer, pack_sequences
from files import read_safetensors, write_safetensors
from inference import load
from launch import UserError
from options import DISTILLATION, TrainConfig
from unibert import UniBERT


def split_sequences(tokens: Tensor, cu_seqlens: Tensor) -> list[np.ndarray]:
    """The S sequences of a packed batch; tokens after the last belong to none."""
    bounds = cu_seqlens.tolist()
    return np.split(tokens[:bounds[-1]].cpu().numpy(), bounds[1:-1])


class Remembered:
    """Sentence vectors by text, so that a teacher reads a text once and not once an epoch. At most `limit`, in 16 bits.

    A vector depends, in its last bits, on the batch that it was computed in, so a resumed run, which reads anew, goes
    on with the same batches and nearly the same numbers, but not to the bit. With a file it finds them again, and so does
    the next student of the same teacher.
    """

    def __init__(self, limit: int, file: str = "", reader: str = ""):
        """reader: what the vectors depend on besides the text (`reader_of`). UserError for another's file, or a damaged one."""
        self.limit, self.file, self.reader = limit, file, reader
        self.vectors, self.asked, self.read, self.written = {}, 0, 0, 0
        if not Path(file).absolute().parent.is_dir():                # known now, not at the first checkpoint
            raise UserError(f"--teacher-cache-file: there is no folder {Path(file).parent}; make it first")
        if file and Path(file).exists():
            try:
                found = read_safetensors(file)
                whose, keys, vectors = (found[name].numpy() for name in ("reader", "keys", "vectors"))
                if len(keys) != len(vectors):
                    raise ValueError(f"{file} has {len(keys)} keys for {len(vectors)} vectors")
            except (ValueError, KeyError, OSError) as error:
                raise UserError(f"--teacher-cache-file: {file} holds no teacher's vectors ({error}); name a new file") from None
            if whose.tobytes().hex() != reader:
                raise UserError(f"--teacher-cache-file: {file} is of another teacher, prefix, tokenizer, --max-length or --dtype; "
                                f"name a new file")
            self.vectors = {key.tobytes(): vector for key, vector in zip(keys[:limit], vectors)}
        self.written = len(self.vectors)

    def write(self) -> None:
        """All vectors into the file, if there is one and it lacks some."""
        if self.file and len(self.vectors) > self.written:
            keys = torch.frombuffer(bytearray(b"".join(self.vectors)), dtype=torch.uint8).view(-1, 16)
            write_safetensors({"reader": torch.frombuffer(bytearray.fromhex(self.reader), dtype=torch.uint8), "keys": keys,
                               "vectors": torch.from_numpy(np.stack(list(self.vectors.values())))}, self.file)
            self.written = len(self.vectors)

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """tokens [T], cu_seqlens [S + 1] -> [S, H] fp32; read(tokens, cu_seqlens) -> the vectors of texts that are new."""
        texts = split_sequences(tokens, cu_seqlens)
        keys = [hashlib.blake2b(text.tobytes(), digest_size=16).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self.vectors}
        found = {}
        if new:
            packed, ends, _ = pack_sequences([text.tolist() for text in new.values()])
            rows = read(packed.to(tokens.device), ends.to(tokens.device)).to(torch.float16).cpu().numpy()
            found = dict(zip(new, rows))
            room = max(0, self.limit - len(self.vectors))
            self.vectors |= {key: row.copy() for key, row in list(found.items())[:room]}
        self.asked, self.read = self.asked + len(keys), self.read + len(new)
        rows = np.stack([found[key] if key in found else self.vectors[key] for key in keys])
        return torch.from_numpy(rows).to(tokens.device).float()


def characters(tokenizer, i: int) -> int:
    """How many characters of a text piece i stands for: none for <s>, </s>, <pad>, one for <unk> and the first of a
    character's bytes."""
    piece = tokenizer.id_to_piece(i)
    if i > UNK and tokenizer.is_byte(i):
        return int(not 0x80 <= int(piece[3:5], 16) < 0xC0)
    return len(piece) if i > UNK else int(i == UNK)


class Reread:
    """Batches in `ours`, a SentencePiece tokenizer, as packed sequences in `theirs`, each text after `prefix`."""

    def __init__(self, ours, theirs, prefix: str = ""):
        self.ours, self.theirs, self.prefix = ours, theirs, prefix

    @functools.cached_property
    def sizes(self) -> list[np.ndarray]:
        """Characters of each piece, ours and theirs."""
        return [np.array([characters(t, i) for i in range(len(t))]) for t in (self.ours, self.theirs)]

    @functools.cached_property
    def whole(self) -> list[np.ndarray]:
        """Whether a piece is one of characters, ours and theirs."""
        return [np.array([i > UNK and not t.is_byte(i) for i in range(len(t))]) for t in (self.ours, self.theirs)]

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor, int]:
        """tokens [T], cu_seqlens [S + 1] -> the teacher's (tokens, cu_seqlens [S + 1], longest), on the same device.

        Empty and padding sequences become an empty text, so that sequence i stays sequence i. Texts are cut at
        max_length.
        """
        texts = [self.ours.decode(ids[ids > UNK].tolist()) for ids in split_sequences(tokens, cu_seqlens)]
        cut = [[BOS, *encode_text(self.theirs, self.prefix + text)[:max_length - 2], EOS] for text in texts]
        packed, ends, longest = pack_sequences(cut)
        return packed.to(tokens.device), ends.to(tokens.device), longest

    def same_tokens(self, tokens: Tensor, cu_seqlens: Tensor, their_tokens: Tensor, their_cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Where both cut the same piece out of the same place of a text -> positions [K] in tokens, [K] in their_tokens.

        A window that begins inside a word is read with a space before it; texts that were cut short have no positions.
        """
        before = int(self.sizes[1][encode_text(self.theirs, self.prefix)].sum()) if self.prefix else 0
        sides = []
        for sizes, whole, ids, ends in zip(self.sizes, self.whole, (tokens, their_tokens), (cu_seqlens, their_cu_seqlens)):
            ids, ends = ids[:int(ends[-1])].cpu().numpy(), ends.cpu().numpy().astype(np.int64)
            stop = np.concatenate([[0], sizes[ids].cumsum()])
            sequence = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
            sides.append((sequence, stop[:-1] - stop[ends[:-1]][sequence], sizes[ids] * whole[ids], np.diff(stop[ends])))
        space = sides[1][3] - before - sides[0][3]                   # characters that theirs has and ours has not
        keys = []
        for (sequence, start, size, _), shift in zip(sides, (space, np.full_like(space, -before))):
            start = start + shift[sequence]
            at = np.flatnonzero((size > 0) & (start >= 0) & ((space == 0) | (space == 1))[sequence])
            keys.append(((sequence << 28 | start << 8 | np.minimum(size, 255))[at], at))
        (ours, here), (theirs, there) = keys
        _, i, j = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        return torch.from_numpy(here[i]).to(tokens.device), torch.from_numpy(there[j]).to(tokens.device)

    def rows(self) -> np.ndarray:
        """Ids in the teacher's vocabulary of each of our pieces [V] int64. ValueError where one is not in it."""
        theirs = {self.theirs.id_to_piece(i): i for i in range(len(self.theirs))}
        pieces = [self.ours.id_to_piece(i) for i in range(len(self.ours))]
        unknown = [piece for piece in pieces if piece not in theirs]
        if unknown:
            raise ValueError(f"{len(unknown):,} of the data's {len(pieces):,} pieces (first {unknown[0]!r}) are none of "
                             "the teacher's, so its embeddings cannot be taken over; prepare the data with a vocabulary "
                             "trimmed from the teacher's (python unibert.py trim), or leave --init-from-teacher out")
        return np.array([theirs[piece] for piece in pieces], np.int64)


def reader_of(teacher: UniBERT, reread: Reread | None, config: TrainConfig) -> str:
    """A digest of all that a text's vector depends on besides its tokens, as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{teacher.config} {config.max_length} {config.dtype} ".encode())
    for value in teacher.state_dict().values():
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    if reread is not None:
        for part in (reread.ours.serialized_model_proto(), reread.theirs.serialized_model_proto(), reread.prefix.encode()):
            digest.update(part)
    return digest.hexdigest()


def load_start(folder: str, corpus: Corpus, max_length: int) -> UniBERT:
    """A model folder -> the model that training goes on from. UserError where its tokens are not those of the corpus."""
    try:
        model, _ = load(folder)
    except (ValueError, OSError) as error:
        raise UserError(f"--init: {error}") from None
    tokenizer = Path(folder) / "tokenizer.model"
    if not tokenizer.is_file() or tokenizer.read_bytes() != corpus.tokenizer_path.read_bytes():
        raise UserError(f"--init: the model in {folder} has another tokenizer than {corpus.folder}: its token ids mean other "
                        f"pieces. Prepare the data with --tokenizer {tokenizer}")
    if model.config.max_length < max_length:
        raise UserError(f"--init: the model in {folder} reads at most {model.config.max_length} tokens; "
                        f"use --max-length {model.config.max_length} or less")
    return model


def load_teacher(folder: str, corpus: Corpus, config: TrainConfig) -> tuple[UniBERT, Reread | None]:
    """A model folder -> the teacher, and how it reads text that is not cut its way (None: as the student does).

    Raises UserError for what cannot be compared with the student.
    """
    try:
        teacher, theirs = load(folder)
        tokenizer = Path(folder) / "tokenizer.model"
        same = tokenizer.is_file() and tokenizer.read_bytes() == corpus.tokenizer_path.read_bytes()
        reread = None
        if not same or config.teacher_prefix:
            reread = Reread(load_tokenizer(corpus.tokenizer_path), theirs, config.teacher_prefix)
    except (ValueError, OSError) as error:
        raise UserError(f"--teacher: {error}") from None
    by_token = [f"--{name.replace('_', '-')}" for name in ("kd_weight", "kd_relation_weight") if getattr(config, name)]
    if reread is not None and by_token:
        why = "--teacher-prefix moves its tokens" if same else (
            f"it has another tokenizer than {corpus.folder}: its token ids mean other pieces. Prepare the data with "
            f"--tokenizer {tokenizer}")
        raise UserError(f"the teacher in {folder} cannot be compared token by token ({', '.join(by_token)}): {why}, or use "
                        f"only --kd-hidden-weight, --kd-sentence-weight and --kd-similarity-weight")
    if reread is not None and config.compile:
        raise UserError("--compile does not go with a teacher that has another tokenizer or a prefix")
    if not teacher.config.mlm_head and config.kd_weight:
        raise UserError(f"the teacher in {folder} is an encoder without MLM head: it predicts no tokens to distil from. Use "
                        f"--kd-weight 0 and one of {', '.join('--' + n.replace('_', '-') for n in DISTILLATION[1:])}")
    if teacher.config.max_length < config.max_length:
        raise UserError(f"the teacher in {folder} reads at most {teacher.config.max_length} tokens; "
                        f"use --max-length {teacher.config.max_length} or less")
    return teacher, reread
