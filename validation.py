"""What a run has learnt: masked-token loss on held-out documents by language, beside a unigram model and the teacher.

Functions of a `train.Run`. All processes call `evaluate`, each on its share of the languages.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from batches import IGNORE, validation_batches


@torch.no_grad()
def evaluate(run) -> dict:
    """Masked-token loss and accuracy on validation documents: over all, by language, by resource tier.

    With a teacher also its own loss, and how often and how closely the student agrees with it. Empty where no text is held out.
    """
    model, world = run.model, run.world
    teacher = run.objective.teacher if run.objective.predictions_of_teacher else None
    model.eval()
    n = len(run.corpus.languages)
    totals = torch.zeros(n, 6, dtype=torch.float64)  # masked, loss, right, teacher's loss, same answer, KL
    for index, language in enumerate(run.corpus.languages):
        if index % world.size != world.rank:
            continue
        for batch in validation_batches(run.held_out, run.batch_config, language, run.config.eval_tokens):
            batch = batch.to(run.device)
            packed = (batch.tokens, batch.cu_seqlens, batch.max_seqlen)
            used = batch.targets != IGNORE
            rows, targets = batch.masked[used], batch.targets[used]
            with run.autocast:
                logits = model.mlm_logits(model.encode(*packed)[rows]).float()
                theirs = teacher.mlm_logits(teacher.encode(*packed)[rows]).float() if teacher is not None else logits
            ours, theirs = logits.log_softmax(-1), theirs.log_softmax(-1)
            guess, other = ours.argmax(-1), theirs.argmax(-1)
            totals[index] += torch.stack([
                used.sum(), F.nll_loss(ours, targets, reduction="sum"), (guess == targets).sum(),
                F.nll_loss(theirs, targets, reduction="sum"), (guess == other).sum(),
                F.kl_div(ours, theirs, log_target=True, reduction="sum")]).double().cpu()
    totals = world.sum(totals.to(run.device, torch.float32)).double().cpu()
    model.train()
    if not totals[:, 0].sum():
        return {}
    means = totals / totals[:, :1].clamp_min(1)
    whole = totals.sum(0) / totals[:, 0].sum().clamp_min(1)
    order = np.argsort(-run.corpus.tokens_per_language, kind="stable")
    tiers = dict(zip(("most text", "middle", "least text"), np.array_split(order, 3)))
    tier = {name: (totals[i, 1].sum() / totals[i, 0].sum()).item() for name, i in tiers.items() if totals[i, 0].sum()}
    scores = dict(mlm_loss=whole[1].item(), accuracy=whole[2].item(), tiers=tier,
                  languages={c: means[i, 1].item() for i, c in enumerate(run.corpus.languages) if totals[i, 0]})
    if teacher is not None:
        scores |= dict(teacher_loss=whole[3].item(), agreement=whole[4].item(), kl=whole[5].item())
    return scores


def unigram_loss(run) -> float:
    """Nats a masked token of a model that knows only each language's own token frequencies (plus one)."""
    total, count = 0.0, 0
    for language in run.corpus.languages:
        seen = np.bincount(run.corpus.tokens(language)[:10_000_000], minlength=run.corpus.vocab_size) + 1.0
        for batch in validation_batches(run.held_out, run.batch_config, language, run.config.eval_tokens):
            targets = batch.targets[batch.targets != IGNORE].numpy()
            total -= np.log(seen[targets] / seen.sum()).sum()
            count += len(targets)
    return total / max(1, count)


def final_table(run, scores: dict, baseline: float, last: dict, speed: float) -> str:
    """The end of a run in one screen. speed: tokens/s."""
    rows = [("validation", "none", "no held-out text")]
    if scores:
        rows = [("validation MLM loss", f"{scores['mlm_loss']:.3f}", f"unigram model {baseline:.3f}"),
                ("masked tokens right", f"{scores['accuracy']:.1%}", "")]
    if "teacher_loss" in scores:
        rows[0] = (*rows[0][:2], rows[0][2] + f", teacher {scores['teacher_loss']:.3f}")
        before = scores.get("before")
        rows.append(("agreement with the teacher", f"{scores['agreement']:.1%}", f"KL {scores['kl']:.3f} nats"
                     + (f"; before training {before['agreement']:.1%}, KL {before['kl']:.3f}" if before else "")))
    if "adv_loss" in last:
        rows.append(("adversary names the language", f"{last['discriminator_accuracy']:.1%}", f"chance {last['chance']:.1%}"))
    for name, loss in scores.get("tiers", {}).items():
        rows.append((f"  MLM loss, languages with {name}", f"{loss:.3f}", ""))
    parameters = sum(p.numel() for p in run.model.parameters())
    rows.append(("parameters", f"{parameters / 1e6:.2f} M", f"{run.tokens_seen:,} tokens, {speed:,.0f} tokens/s"))
    rows.append(("loader alone", f"{run.loader_speed() / 1e6:.1f} M", "tokens/s on one core"))
    return "\n".join(f"{a:36}{b:>10}   {c}".rstrip() for a, b, c in rows)
