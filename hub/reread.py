"""A teacher that has a tokenizer of its own reads a batch's text anew.

The pieces of a trimmed vocabulary are all pieces of the teacher's, but where a piece was dropped, a word is cut into
others. Trimming multilingual-e5-small from 250,002 to 83,000 pieces cost it a sixth of its own retrieval accuracy
(RESULTS.md), and a student of the trimmed teacher could not have been better. So the teacher stays whole, reads the same
text in its own pieces, and is compared by sentence vectors, which need no common tokens. Such vectors do not change from
epoch to epoch, so they can be kept (`Remembered`): most of a small student's step is its teacher's.
"""
from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from data import BOS, EOS, UNK, Corpus, encode_text, load_tokenizer, pack_sequences
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
    on with the same batches and nearly the same numbers, but not to the bit.
    """

    def __init__(self, limit: int):
        self.limit, self.vectors, self.asked, self.read = limit, {}, 0, 0

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


class Reread:
    """Batches in `ours`, a SentencePiece tokenizer, as packed sequences in `theirs`, each text after `prefix`."""

    def __init__(self, ours, theirs, prefix: str = ""):
        self.ours, self.theirs, self.prefix = ours, theirs, prefix

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor, int]:
        """tokens [T], cu_seqlens [S + 1] -> the teacher's (tokens, cu_seqlens [S + 1], longest), on the same device.

        Empty and padding sequences become an empty text, so that sequence i stays sequence i. Texts are cut at
        max_length.
        """
        texts = [self.ours.decode(ids[ids > UNK].tolist()) for ids in split_sequences(tokens, cu_seqlens)]
        cut = [[BOS, *encode_text(self.theirs, self.prefix + text)[:max_length - 2], EOS] for text in texts]
        packed, ends, longest = pack_sequences(cut)
        return packed.to(tokens.device), ends.to(tokens.device), longest

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
    by_token = [f"--{name.replace('_', '-')}" for name in DISTILLATION[:3] if getattr(config, name)]
    if reread is not None and by_token:
        why = "--teacher-prefix moves its tokens" if same else (
            f"it has another tokenizer than {corpus.folder}: its token ids mean other pieces. Prepare the data with "
            f"--tokenizer {tokenizer}")
        raise UserError(f"the teacher in {folder} cannot be compared token by token ({', '.join(by_token)}): {why}, or use "
                        f"only --kd-sentence-weight and --kd-similarity-weight")
    if reread is not None and config.compile:
        raise UserError("--compile does not go with a teacher that has another tokenizer or a prefix")
    if not teacher.config.mlm_head and config.kd_weight:
        raise UserError(f"the teacher in {folder} is an encoder without MLM head: it predicts no tokens to distil from. Use "
                        f"--kd-weight 0 and one of {', '.join('--' + n.replace('_', '-') for n in DISTILLATION[1:])}")
    if teacher.config.max_length < config.max_length:
        raise UserError(f"the teacher in {folder} reads at most {teacher.config.max_length} tokens; "
                        f"use --max-length {teacher.config.max_length} or less")
    return teacher, reread
