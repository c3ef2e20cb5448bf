"""What a student is trained on: masked language modelling, the language adversary, and the teacher, in one sum.

`Objective.forward` gives sums over a micro-batch, `Objective.loss` weighs and adds them, each divided by its count over
the global batch (`batch_counts`). The terms themselves are in unibert.py, their kernels in kernels/.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import IGNORE, PackedBatch
from hub.reread import Remembered, Reread, reader_of
from options import DISTILLATION, TrainConfig, rows_of
from unibert import (LanguageDiscriminator, UniBERT, hidden_distillation, mean_pool, positions_of, relation_distillation,
                     similarity_distillation)


class Objective(nn.Module):
    """The student and all that its losses need. `forward` returns sums, so that they can be divided by counts
    over *all* ranks and micro-batches; `loss` is the one place where the parts are weighted and added."""

    PARTS = ("mlm", "kd", "adv", "hidden", "relation", "sentence", "similarity", "correct")

    def __init__(self, model: UniBERT, config: TrainConfig, prior: Tensor, teacher: UniBERT | None,
                 reread: Reread | None = None):
        super().__init__()
        self.reread, self.remembered = reread, None
        if config.teacher_cache and teacher is not None:
            reader = reader_of(teacher, reread, config) if config.teacher_cache_file else ""
            self.remembered = Remembered(config.teacher_cache, config.teacher_cache_file, reader)
        self.model, self.config = model, config
        # A plain attribute, not a submodule: the teacher is not trained, saved or broadcast with the student.
        object.__setattr__(self, "teacher", teacher)
        hidden = model.config.hidden_size
        self.adv_layer = config.adv_layer or (model.config.num_layers + 1) // 2
        if self.adv_layer > model.config.num_layers:
            raise ValueError(f"--adv-layer is {self.adv_layer}; the model has {model.config.num_layers} layers")
        inner = model.config.num_heads * model.config.head_dim                        # a pruned model's are not hidden_size
        if teacher is not None and config.kd_relation_weight and inner % teacher.config.num_heads:
            raise ValueError(f"--kd-relation-weight cuts the {inner} dimensions of the student's heads into as many as the teacher has, "
                             f"and {inner} is no multiple of {teacher.config.num_heads}; choose another student, or another weight")
        self.register_buffer("prior", prior.float(), persistent=False)
        self.discriminator = LanguageDiscriminator(hidden, len(prior)) if config.adv_weight else None
        self.projection = None
        if teacher is not None and (config.kd_hidden_weight or config.kd_sentence_weight or config.kd_similarity_weight):
            # Equal widths need none, and then the student's own vectors end where the teacher's are.
            wide = teacher.config.hidden_size
            self.projection = nn.Identity() if wide == hidden else nn.Linear(hidden, wide)
            # Run.study_teacher fills these: nothing to compare with, nothing to take out.
            for name, shape in dict(anchors=(0, wide), centre=(wide,), directions=(0, wide)).items():
                self.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, batch: PackedBatch, strength: Tensor) -> Tensor:
        """-> sums [8] fp32, in the order of PARTS. strength: the adversary's current lambda, a 0-d tensor."""
        config, model, teacher = self.config, self.model, self.teacher
        packed = (batch.tokens, batch.cu_seqlens, batch.max_seqlen)
        states: list[Tensor] = []
        hidden = model.encode(*packed, states=states)
        rows, languages = hidden[batch.masked], self.token_languages(batch)
        sums = dict.fromkeys(self.PARTS, hidden.new_zeros((), dtype=torch.float32))
        if teacher is not None and config.distils_tokens:
            teacher_states: list[Tensor] = []
            # Only its predictions at masked positions need a teacher that sees the masks; else it reads the whole text.
            text = batch.tokens if config.kd_weight else self.unmasked(batch)
            reading = (text, *packed[1:])
            if self.reread is not None:
                reading = self.reread(text, batch.cu_seqlens, teacher.config.max_length)
                same, same_there = self.reread.same_tokens(text, batch.cu_seqlens, *reading[:2])
            with torch.no_grad():
                teacher_hidden = teacher.encode(*reading, states=teacher_states)
        if teacher is not None and config.kd_weight:
            mlm, kl = model.distillation_loss(rows, batch.targets, teacher, teacher_hidden[batch.masked], config.kd_temperature)
            sums["mlm"], sums["kd"] = mlm.sum(), kl.sum()
        elif config.mlm_weight:
            sums["mlm"] = model.mlm_loss(rows, batch.targets).sum()
        if teacher is not None and config.kd_hidden_weight:
            if self.reread is None:
                apart = hidden_distillation(self.projection(hidden), teacher_hidden) * (languages != IGNORE)
            else:
                apart = hidden_distillation(self.projection(hidden[same]), teacher_hidden[same_there])
            sums["hidden"] = apart.sum()
        if teacher is not None and config.kd_relation_weight:
            apart = relation_distillation(model.blocks[-1].heads(states[-2]), teacher.blocks[-1].heads(teacher_states[-2]),
                                          batch.cu_seqlens, batch.max_seqlen, teacher.config.num_heads)
            sums["relation"] = (apart * (languages != IGNORE)).sum()
        if teacher is not None and (config.kd_sentence_weight or config.kd_similarity_weight):
            ours, real = self.projection(mean_pool(hidden, batch.cu_seqlens)).float(), batch.languages != IGNORE
            theirs = self.neutral(mean_pool(teacher_hidden, reading[1])) if config.distils_tokens else self.teacher_vectors(batch)
            sums["sentence"] = ((1 - F.cosine_similarity(ours, theirs, dim=-1)) * real).sum()
            if config.kd_similarity_weight:  # row by row, so that it is the same with other micro-batches
                n = batch.tokens.shape[0] // rows_of(1, config.max_length)[1]
                sums["similarity"] = similarity_distillation(ours.view(n, -1, ours.shape[-1]), theirs.view(n, -1, theirs.shape[-1]),
                                                             real.view(n, -1), config.kd_similarity_temperature, self.anchors).sum()
        if self.discriminator is not None:
            features = states[self.adv_layer]
            if config.adv_level == "sequence":
                features, languages = mean_pool(features, batch.cu_seqlens), batch.languages
            cross_entropy, correct = self.discriminator.adversarial_loss(features, languages, strength, self.prior)
            sums["adv"], sums["correct"] = cross_entropy.sum(), correct.sum().float()
        return torch.stack([sums[name] for name in self.PARTS])

    @property
    def predictions_of_teacher(self) -> bool:
        """Whether the teacher predicts tokens, and those of the student's tokenizer: then the two can be compared."""
        return self.teacher is not None and self.teacher.config.mlm_head and self.reread is None

    @torch.no_grad()
    def teacher_vectors(self, batch: PackedBatch) -> Tensor:
        """What the student is to make of each text as it was before masking [S, H'] fp32; empty ones give anything."""
        texts = self.unmasked(batch), batch.cu_seqlens
        return self.neutral(self.read(*texts) if self.remembered is None else self.remembered(*texts, self.read))

    def neutral(self, vectors: Tensor) -> Tensor:
        """The teacher's vectors [S, H'] fp32 with all languages in one place along `directions` (--kd-neutral)."""
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors - (vectors - self.centre) @ self.directions.T @ self.directions

    def read(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        longest = self.config.max_length
        if self.reread is not None:
            tokens, cu_seqlens, longest = self.reread(tokens, cu_seqlens, self.teacher.config.max_length)
        return mean_pool(self.teacher.encode(tokens, cu_seqlens, longest), cu_seqlens)

    @staticmethod
    def unmasked(batch: PackedBatch) -> Tensor:
        """The batch's tokens [T] as they were before masking. (Unused slots point at position 0, never a masked one.)"""
        before = torch.where(batch.targets != IGNORE, batch.targets, batch.tokens[batch.masked])
        return batch.tokens.scatter(0, batch.masked, before)

    @staticmethod
    def token_languages(batch: PackedBatch) -> Tensor:
        """The language of each token [T]; IGNORE in padding."""
        segment, _ = positions_of(batch.cu_seqlens, batch.tokens.shape[0])
        return F.pad(batch.languages, (0, 1), value=IGNORE)[segment]

    def loss(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The training loss: sums of a micro-batch over counts [3] (masked, tokens, sequences) of the global batch.

        The adversary enters with weight 1: its own parameters learn at full speed, and the encoder already gets
        the gradient times -lambda by the reversal.
        """
        config, part = self.config, dict(zip(self.PARTS, sums))
        masked, tokens, sequences = counts.clamp_min(1).unbind()
        return ((config.mlm_weight * part["mlm"] + config.kd_weight * part["kd"]) / masked
                + (config.kd_hidden_weight * part["hidden"] + config.kd_relation_weight * part["relation"]) / tokens
                + (config.kd_sentence_weight * part["sentence"] + config.kd_similarity_weight * part["similarity"]) / sequences
                + part["adv"] / (sequences if config.adv_level == "sequence" else tokens))

    def teacher_terms(self, part: dict[str, float], masked: float, tokens: float, sequences: float) -> dict[str, float]:
        """Sums and counts of a global batch -> the mean of each of the teacher's terms in use, under its name in the log."""
        counts = dict(kd=masked, hidden=tokens, relation=tokens, sentence=sequences, similarity=sequences)
        return {f"{name}_loss": part[name] / counts[name] for name, weight in zip(counts, DISTILLATION)
                if self.teacher is not None and getattr(self.config, weight)}


def batch_counts(batches: list[PackedBatch], n_languages: int, level: str = "token") -> np.ndarray:
    """[3 + n_languages] float64: masked targets, tokens, sequences, and those of each language at `level` (--adv-level: tokens
    or sequences), padding apart."""
    counts = np.zeros(3 + n_languages)
    for batch in batches:
        languages, lengths = batch.languages.numpy(), batch.cu_seqlens.diff().numpy()
        real = (languages != IGNORE) & (lengths > 0)
        counts[:3] += (batch.targets != IGNORE).sum().item(), lengths[real].sum(), real.sum()
        counts[3:] += np.bincount(languages[real], lengths[real] if level == "token" else None, n_languages)
    return counts
