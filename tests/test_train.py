"""The recipe: do the three objectives act, is the loss what it says, and does bad input get one clear line?

Figures are printed: run with -s to see them.
"""
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from click.testing import CliRunner

import atlas
import train
from data import MASK, Corpus, load_tokenizer, pack_sequences, prepare
from hub.export import model_card
from hub.reread import Remembered, Reread, reader_of
from hub.vocabulary import SentencePieceModel, keep_pieces
from kernels.bench import Clock
from launch import UserError, default_dtype
from objective import Objective, batch_counts
from options import TrainConfig
from train import Run, World, schedule
from unibert import UniBERT, UniBERTConfig, language_directions, load_model, relation_distillation, save_model, similarity_distillation
from validation import evaluate

REPO = pathlib.Path(train.__file__).parent
TINY = TrainConfig(preset="tiny", steps=40, optimizer="adamw", tokens_per_batch=2048, micro_batch_tokens=2048, max_length=32, lr=3e-3,
                   adv_weight=0.0, kd_weight=0.0, device="cpu", dtype="float32", log_every=10, eval_every=10 ** 9,
                   save_every=10 ** 9, eval_tokens=2048)
FAST = str(default_dtype("cpu")).removeprefix("torch.")  # bfloat16 on a CPU without it takes ten times as long as float32


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Five languages in four scripts of the embedded corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    texts = atlas.corpus()
    for code in ("en", "ro", "ru", "ar", "zh"):
        (folder / "text" / f"{code}.txt").write_text("\n\n".join(texts[code]))
    prepare(folder / "text", folder / "data", vocab_size=2000, validation_share=0.05)
    return Corpus(folder / "data")


@pytest.fixture
def make_run(corpus, tmp_path):
    made = []

    def make(teacher=None, **changes):
        folder = tmp_path / f"run{len(made)}"
        folder.mkdir()
        made.append(Run(dataclasses.replace(TINY, **changes), corpus, folder, World(), teacher))
        made[-1].study_teacher()
        return made[-1]
    return make


def steps_of(run, n):
    return [run.train_step(run.micro_batches(run.step), run.objective) for _ in range(n)]


# ------------------------------------------------------------------------------------------------- the loss

def test_loss_does_not_depend_on_micro_batches(make_run):
    """One global batch as one, two or four micro-batches: the same loss and the same new weights to 1e-6."""
    teacher = make_run(seed=3).model
    results = []
    for micro in (4096, 2048, 1024):
        run = make_run(teacher, tokens_per_batch=4096, micro_batch_tokens=micro, adv_weight=0.5, kd_weight=1.0,
                       kd_hidden_weight=0.5, kd_relation_weight=0.5, kd_sentence_weight=0.5)
        assert len(run.micro_batches(0)) == 4096 // micro
        record = steps_of(run, 3)[-1]
        results.append((record["loss"], torch.cat([p.detach().flatten() for p in run.model.parameters()])))
    for loss, weights in results[1:]:
        assert abs(loss - results[0][0]) < 1e-6 * abs(results[0][0])
        assert (weights - results[0][1]).norm() < 1e-4 * results[0][1].norm()


def test_loss_is_the_mean_over_masked_tokens(make_run):
    run = make_run()
    batch = run.micro_batches(0)[0]
    logits = run.model.mlm_logits(run.model.encode(batch.tokens, batch.cu_seqlens, batch.max_seqlen)[batch.masked])
    wanted = F.cross_entropy(logits, batch.targets).item()
    assert steps_of(run, 1)[0]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_counts_leave_out_padding(make_run):
    run = make_run()
    batch = run.micro_batches(0)[0]
    counts = batch_counts([batch], len(run.corpus.languages))
    assert counts[0] == (batch.targets != -100).sum() and counts[1] == counts[3:].sum()
    assert counts[1] == (batch.tokens != 1).sum()


def test_same_seed_same_bits(make_run):
    weights = []
    for seed in (0, 0, 1):
        run = make_run(seed=seed, adv_weight=0.1, dropout=0.1)
        steps_of(run, 3)
        weights.append(run.model.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["embedding.weight"], weights[2]["embedding.weight"])


def test_the_compiled_step_is_one_graph(make_run):
    """fullgraph, shapes static: three steps trace once and give the losses of the eager step."""
    torch._dynamo.reset()
    teacher = make_run(seed=3).model.eval()
    eager, compiled = (make_run(teacher, adv_weight=0.3, kd_weight=1.0, checkpoint_activations=c) for c in (False, True))
    counts = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = torch.compile(compiled.objective, fullgraph=True, dynamic=False, backend=counts)
    for _ in range(3):
        wanted = eager.train_step(eager.micro_batches(eager.step), eager.objective)
        record = compiled.train_step(compiled.micro_batches(compiled.step), module)
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert counts.frame_count == 1


def test_checkpointed_activations_take_less_memory_and_change_nothing_else(make_run):
    """Dropout as well, whose draws have to be repeated."""
    losses, peaks = [], []
    for checkpointed in (False, True):
        run = make_run(checkpoint_activations=checkpointed, dropout=0.1)
        losses.append(steps_of(run, 2)[-1]["loss"])
        batch, = run.micro_batches(0)
        packed = batch.tokens, batch.cu_seqlens, batch.max_seqlen
        peaks.append(Clock(run.device).memory(lambda: run.model.encode(*packed).sum().backward())[1])
    assert losses[0] == losses[1] and peaks[1] < 0.5 * peaks[0], peaks


def test_schedules():
    for name in ("wsd", "linear", "cosine"):
        config = dataclasses.replace(TINY, schedule=name, steps=100)
        factors = [schedule(i, config) for i in range(100)]
        assert factors[4] == 1 and factors[0] == pytest.approx(0.2) and 0 < factors[-1] < 0.06
        assert all(a >= b - 1e-12 for a, b in zip(factors[4:], factors[5:]))
    assert schedule(79, dataclasses.replace(TINY, schedule="wsd", steps=100)) == 1


def test_no_decay_on_norms_biases_and_embeddings(make_run):
    for optimizer in ("adamw", "muon"):
        run = make_run(optimizer=optimizer, adv_weight=0.1)
        names = {id(p): n for n, p in run.objective.named_parameters()}
        groups = [g for o in run.optimizers for g in o.param_groups]
        seen = [names[id(p)] for g in groups for p in g["params"]]
        assert sorted(seen) == sorted(names.values())  # each parameter once
        decayed = [names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]]
        assert decayed and not any(part in n for n in decayed for part in ("norm", "bias", "embedding", "discriminator"))


def test_muon_learns(make_run):
    run = make_run(optimizer="muon", lr=1e-2, steps=100, tokens_per_batch=1024, dtype=FAST)
    records = steps_of(run, 30)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)])
def test_muon_is_torchs_and_exact_where_bfloat16_is_emulated(monkeypatch, shape):
    """Its first update is the orthogonalised gradient: in float32 all singular values are those of the iteration in float64."""
    def update(kind, dtype):
        monkeypatch.setattr(train, "default_dtype", lambda device: dtype)
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        kind([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        return p.detach()
    torchs, same, ours = update(torch.optim.Muon, None), update(train.Muon, torch.bfloat16), update(train.Muon, torch.float32)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    values = values / grad.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    exact = -(left * values) @ right * max(1, shape[0] / shape[1]) ** 0.5
    error = lambda x: ((x - exact).norm() / exact.norm()).item()  # noqa: E731
    assert torch.equal(torchs, same) and error(ours) < 1e-5 < 1e-3 < error(torchs) < 0.05


# -------------------------------------------------------------------------------------- the objectives act

@pytest.fixture(scope="session")
def adversaries(corpus, tmp_path_factory):
    """Measurements of every step of the same run at three lambdas; at 1e-9 the discriminator only watches.

    The longest is a process of its own beside the other two, each with one thread.
    """
    config = dataclasses.replace(TINY, steps=200, adv_lr=3e-3, tokens_per_batch=1024, dtype=FAST)
    out = tmp_path_factory.mktemp("adversary")
    changed = {name: value for name, value in vars(config).items() if value != getattr(TrainConfig(), name)}
    options = changed | {"data": corpus.tokenizer_path.parent, "out": out / "strong", "adv_weight": 1.0, "steps": 500, "log_every": 1}
    strong = subprocess.Popen([sys.executable, "train.py", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())],
                              cwd=REPO, env=dict(os.environ, OMP_NUM_THREADS="1"), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    threads, records = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for strength in (1e-9, 0.07):
        run = Run(dataclasses.replace(config, adv_weight=strength), corpus, tmp_path_factory.mktemp("adversary"), World())
        records[strength] = steps_of(run, config.steps)
    torch.set_num_threads(threads)
    printed = strong.communicate(timeout=600)[0]
    assert strong.returncode == 0, printed
    records[1.0] = [r for r in map(json.loads, (out / "strong" / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    for strength, rows in records.items():
        end = {key: np.mean([r[key] for r in rows[-50:]]) for key in ("discriminator_accuracy", "chance", "mlm_loss", "adv_loss")}
        print(f"lambda {strength:g}: names {end['discriminator_accuracy']:.1%} of languages (chance {end['chance']:.1%}), "
              f"adv {end['adv_loss']:.3f}, mlm {end['mlm_loss']:.3f}")
        rows[-1]["end"] = end
    return records


def test_adversary_goes_towards_chance_at_little_cost(adversaries):
    """Watching, the discriminator is far above chance; obeyed, it falls, and MLM stays within 10%."""
    off, on = adversaries[1e-9][-1]["end"], adversaries[0.07][-1]["end"]
    assert off["discriminator_accuracy"] > off["chance"] + 0.4
    assert on["discriminator_accuracy"] < on["chance"] + 0.75 * (off["discriminator_accuracy"] - off["chance"])
    assert on["mlm_loss"] < 1.1 * off["mlm_loss"]


def test_a_strong_adversary_does_not_diverge(adversaries):
    """lambda 1 for 500 steps: finite, the reversed loss stays about the prior's entropy, MLM still learns."""
    records, entropy = adversaries[1.0], math.log(5)  # the prior of five languages has at most this
    means = np.reshape([r["adv_loss"] for r in records], (-1, 50)).mean(1)
    print(f"discriminator's loss over 50 steps at most {means.max():.2f} (entropy of the prior at most {entropy:.2f})")
    assert all(math.isfinite(r["loss"]) for r in records)
    assert means.max() < 1.5 * entropy and means[-1] < 1.2 * entropy
    assert any(r["lambda"] == 0 for r in records[1:])  # that the encoder had to wait is what holds it
    assert records[-1]["end"]["mlm_loss"] < records[0]["mlm_loss"] - 0.8


def test_distillation_alone_brings_the_student_to_the_teacher(make_run):
    short = dict(steps=100, optimizer="muon", lr=1e-2, tokens_per_batch=1024, dtype=FAST)
    teacher_run = make_run(seed=5, **short)
    steps_of(teacher_run, 100)
    run = make_run(teacher_run.model.eval(), mlm_weight=0.0, kd_weight=1.0, **short)
    before = evaluate(run)
    steps_of(run, 100)
    after = evaluate(run)
    print(f"agreement {before['agreement']:.1%} -> {after['agreement']:.1%}, KL {before['kl']:.3f} -> {after['kl']:.3f}")
    assert after["agreement"] > before["agreement"] + 0.15 and after["kl"] < 0.5 * before["kl"]


@pytest.mark.parametrize("part", ["kd_hidden_weight", "kd_relation_weight", "kd_sentence_weight", "kd_similarity_weight"])
def test_distillation_without_logits_falls(make_run, part):
    """From a teacher of another width, each of the terms alone."""
    teacher = make_run(seed=5, preset="xsmall").model.eval()
    run = make_run(teacher, mlm_weight=0.0, kd_weight=0.0, steps=15, tokens_per_batch=1024, **{part: 1.0})
    records = steps_of(run, 15)
    losses = [r["loss"] for r in records]
    print(f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < 0.8 * losses[0] and "mlm_loss" not in records[0]
    assert records[-1][part.removeprefix("kd_").replace("weight", "loss")] == pytest.approx(losses[-1], rel=1e-5)  # in the log


def test_a_teacher_reads_the_text_anew(make_run, corpus):
    """With another tokenizer or a prefix: the same sentences, unmasked, cut by the teacher's own pieces."""
    tokenizer = load_tokenizer(corpus.tokenizer_path)
    reread = Reread(tokenizer, tokenizer)
    run = make_run(make_run(seed=5).model.eval(), kd_sentence_weight=1.0, kd_similarity_weight=1.0, mlm_weight=0.0)
    batch, = run.micro_batches(0)
    clean = Objective.unmasked(batch)
    assert (clean[batch.masked[batch.targets >= 0]] == batch.targets[batch.targets >= 0]).all() and not (clean == MASK).any()
    tokens, cu_seqlens, longest = reread(clean, batch.cu_seqlens, 512)
    assert cu_seqlens.shape == batch.cu_seqlens.shape and longest == cu_seqlens.diff().max()
    real = (batch.languages >= 0).nonzero().flatten().tolist()
    sides = [[t[c[i]:c[i + 1]].tolist() for i in real] for t, c in ((clean, batch.cu_seqlens), (tokens, cu_seqlens))]
    texts = [[tokenizer.decode([t for t in ids if t > 4]).split() for ids in side] for side in sides]
    assert np.mean([a == b for a, b in zip(*texts)]) > 0.9   # of pieces fewer: a window may begin inside a word
    assert (cu_seqlens.diff()[batch.languages < 0] == 2).all()          # padding: <s> </s>
    _, longer, _ = Reread(tokenizer, tokenizer, "en: ")(clean, batch.cu_seqlens, 512)
    assert (longer.diff() > cu_seqlens.diff()).all()
    assert (reread.rows() == np.arange(corpus.vocab_size)).all()
    shorter = batch.cu_seqlens.clamp(max=int(batch.cu_seqlens[real[1]]))         # what lies past the end is of no sequence
    assert (reread(clean, shorter, 512)[1].diff()[real[1]:] == 2).all()
    asked = []

    def read(tokens, cu_seqlens):
        asked.append(len(tokens))
        return torch.zeros(len(cu_seqlens) - 1, 4)
    Remembered(9)(clean, shorter, read)
    assert asked == [int(shorter[-1])]
    losses = []
    for run.objective.reread in (None, reread):                          # two ways to read, nearly the same loss
        losses.append(run.objective(batch, torch.tensor(0.0)).detach())
    assert 0 < losses[0][6] and torch.allclose(*losses, rtol=0.1), losses
    # Predictions over other pieces cannot be compared with the student's.
    assert "teacher_loss" not in train.evaluate(run)
    run.objective.reread = None
    assert "teacher_loss" in train.evaluate(run)


@pytest.mark.parametrize("prefix", ["", "en: "])
def test_tokens_that_both_tokenizers_cut_alike(corpus, tmp_path, prefix):
    """Against a walk through the pieces, character by character."""
    whole = SentencePieceModel.read(corpus.tokenizer_path)
    (tmp_path / "fewer.model").write_bytes(keep_pieces(whole, np.delete(np.arange(len(whole.pieces)), np.arange(300, 420, 3))).to_bytes())
    theirs, ours = load_tokenizer(corpus.tokenizer_path), load_tokenizer(tmp_path / "fewer.model")
    texts = [theirs.decode(s[s > 4].tolist()) for s in np.split(corpus.tokens(corpus.languages[0])[:400], 10)] + ["", "word", " ".join(["word"] * 60)]
    packed, ends, _ = pack_sequences([[0, *ours.encode(text), 2] for text in texts[:-1]] + [[0, *ours.encode(texts[-1])[1:], 2]])
    reread = Reread(ours, theirs, prefix)
    their_packed, their_ends, _ = reread(packed, ends, 512)

    def places(tokenizer, ids, ends, skip):
        found = {}
        for s, (a, b) in enumerate(zip(ends.tolist(), ends[1:].tolist())):
            first = tokenizer.id_to_piece(int(ids[a + 1])) if b - a > 2 else ""
            at = -skip if first[:1] in ("", "▁") else 1           # a window that begins inside a word: read with a space
            for position in range(a, b):
                piece = tokenizer.id_to_piece(int(ids[position])) if ids[position] > 2 else ""
                if piece.startswith("<0x"):                           # of a character's bytes the first alone counts
                    at += not "<0x80>" <= piece <= "<0xBF>"
                    continue
                if piece and at >= 0:
                    found[s, at, piece] = position
                at += len(piece)
        return found
    assert not ours.id_to_piece(int(packed[ends[-2] + 1])).startswith("▁")
    skip = sum(len(theirs.id_to_piece(i)) for i in theirs.encode(prefix)) if prefix else 0
    mine, other = places(ours, packed, ends, 0), places(theirs, their_packed, their_ends, skip)
    wanted = {(mine[key], other[key]) for key in mine.keys() & other.keys()}
    here, there = reread.same_tokens(packed, ends, their_packed, their_ends)
    assert set(zip(here.tolist(), there.tolist())) == wanted and 0.5 * len(packed) < len(wanted) < 0.98 * len(packed)
    none, _ = reread.same_tokens(packed, ends, *reread(packed, ends, 12)[:2])      # texts cut short: only those that were not
    assert 0 < len(none) < len(here) and (torch.searchsorted(ends, none.int(), right=True) == len(texts)).sum() == 0


def test_a_teacher_that_is_remembered_reads_each_text_once(make_run):
    teacher = make_run(seed=5).model.eval()
    options = dict(kd_weight=0.0, kd_sentence_weight=1.0, kd_similarity_weight=1.0, mlm_weight=0.0)
    plain, cached, full = (make_run(teacher, **options, teacher_cache=n) for n in (0, 10_000, 3))
    remembered = cached.objective.remembered
    for step, new in ((0, True), (1, True), (0, False), (1, False)):
        batch, = plain.micro_batches(step)
        wanted = plain.objective(batch, torch.tensor(0.0))
        read, asked = remembered.read, remembered.asked
        for run in (cached, full):
            torch.testing.assert_close(run.objective(batch, torch.tensor(0.0)), wanted, rtol=1e-3, atol=1e-4)
        assert remembered.asked == asked + len(batch.languages) and (remembered.read > read) == new
    assert len(full.objective.remembered.vectors) == 3 and len(remembered.vectors) == remembered.read
    with pytest.raises(ValueError, match="--teacher-cache keeps sentence vectors"):
        dataclasses.replace(TINY, kd_weight=1.0, teacher_cache=10)


def test_teacher_vectors_in_a_file_serve_the_next_student_and_no_other_teacher(make_run, tmp_path):
    teacher, file = make_run(seed=5).model.eval(), str(tmp_path / "vectors")
    options = dict(kd_weight=0.0, kd_sentence_weight=1.0, mlm_weight=0.0, teacher_cache=10_000, teacher_cache_file=file)
    first = make_run(teacher, **options)
    batch, = first.micro_batches(0)
    wanted = first.objective(batch, torch.tensor(0.0))
    first.save()
    size = os.path.getsize(file)
    second = make_run(teacher, **options)
    assert torch.equal(second.objective(batch, torch.tensor(0.0)), wanted)
    assert second.objective.remembered.read == 0 < second.objective.remembered.asked
    second.objective(second.micro_batches(1)[0], torch.tensor(0.0))
    second.save()
    assert os.path.getsize(file) > size
    remembered, reader = second.objective.remembered, reader_of(teacher, None, second.config)
    assert Remembered(10_000, file, reader).vectors.keys() == remembered.vectors.keys() and len(Remembered(3, file, reader).vectors) == 3
    with pytest.raises(UserError, match="is of another teacher, prefix"):
        Remembered(10_000, file, reader_of(make_run(seed=6).model, None, second.config))
    pathlib.Path(file).write_bytes(pathlib.Path(file).read_bytes()[:-1])
    with pytest.raises(UserError, match="holds no teacher's vectors .* name a new file"):
        Remembered(10_000, file, reader)
    with pytest.raises(UserError, match="there is no folder .*nowhere; make it first"):
        Remembered(10_000, str(tmp_path / "nowhere" / "vectors"), reader)
    with pytest.raises(ValueError, match="give that, too"):
        dataclasses.replace(TINY, teacher_cache_file=file)


def test_similarity_distillation_is_zero_for_the_teacher_itself():
    torch.manual_seed(0)
    teacher, student, anchors = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(7, 8)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for known in (anchors[:0], anchors):
        assert similarity_distillation(teacher, teacher, real, 0.1, known).abs().max() < 1e-5
        loss = similarity_distillation(student, teacher, real, 0.1, known)
        assert (loss[real] > 0).all() and (loss[~real] == 0).all()
        for row, n in ((0, 5), (1, 3)):                              # sentence by sentence, in float64, without the padding
            others = F.normalize(torch.cat([teacher[row, :n], known]).double(), dim=-1)
            ours, theirs = ((F.normalize(own[row, :n].double(), dim=-1) @ others.T / 0.1).softmax(-1) for own in (student, teacher))
            torch.testing.assert_close(loss[row, :n], (theirs * (theirs / ours).log()).sum(-1).float(), rtol=1e-4, atol=1e-5)


def test_anchors_are_the_teachers_vectors_of_the_first_texts(make_run):
    """However the batches are cut, with or without memory of vectors; and each sentence is compared with them, too."""
    teacher = make_run(seed=5).model.eval()
    options = dict(kd_similarity_weight=1.0, mlm_weight=0.0, tokens_per_batch=4096)
    none, two, four, kept = (make_run(teacher, **options, **more) for more in (
        dict(), dict(kd_anchors=150), dict(kd_anchors=150, micro_batch_tokens=1024), dict(kd_anchors=150, teacher_cache=1000)))
    batches = [batch for step in (0, 1) for batch in four.micro_batches(step)]
    texts = [none.objective.teacher_vectors(batch)[batch.languages >= 0] for batch in batches]
    assert len(texts[0]) < 150 < sum(map(len, texts))
    torch.testing.assert_close(two.objective.anchors, torch.cat(texts)[:150])
    assert torch.equal(two.objective.anchors, four.objective.anchors) and not len(none.objective.anchors)
    torch.testing.assert_close(kept.objective.anchors, two.objective.anchors, rtol=1e-3, atol=1e-4)       # 16 bits
    losses = [steps_of(run, 1)[0]["loss"] for run in (none, two, four)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and losses[1] > 1.05 * losses[0]
    with pytest.raises(ValueError, match="--kd-anchors are what --kd-similarity-weight compares"):
        dataclasses.replace(TINY, kd_anchors=10)


def test_similarities_are_compared_in_float32_under_autocast():
    """In bfloat16 a cosine of 0.9 is known to 0.004: at temperature 0.02 the weights would be off by a fifth."""
    torch.manual_seed(0)
    teacher = 3 + torch.randn(2, 5, 32)                      # in a cone, as e5's
    student, anchors, real = teacher + 0.3 * torch.randn(2, 5, 32), 3 + torch.randn(9, 32), torch.ones(2, 5, dtype=torch.bool)
    wanted = similarity_distillation(student, teacher, real, 0.02, anchors)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(similarity_distillation(student, teacher, real, 0.02, anchors), wanted)


def test_a_neutral_teacher_says_less_of_the_language(make_run):
    """Along the directions taken out all languages have one mean; across them nothing has changed; it is what the student learns."""
    teacher = make_run(seed=5).model.eval()
    options = dict(kd_sentence_weight=1.0, mlm_weight=0.0)
    plain, neutral = make_run(teacher, **options), make_run(teacher, **options, kd_neutral=2)
    directions, centre = neutral.objective.directions, neutral.objective.centre
    torch.testing.assert_close(directions @ directions.T, torch.eye(2))
    batch, = plain.micro_batches(0)
    real = batch.languages >= 0
    before, after = (run.objective.teacher_vectors(batch)[real] for run in (plain, neutral))
    torch.testing.assert_close((after - centre) @ directions.T, torch.zeros(len(after), 2), atol=1e-4, rtol=0)
    across = torch.eye(len(centre)) - directions.T @ directions
    torch.testing.assert_close(after @ across, before @ across, atol=1e-4, rtol=1e-4)

    def between(vectors):                                    # of these sentences: other ones than the directions come from
        means = torch.stack([vectors[batch.languages[real] == language].mean(0) for language in batch.languages[real].unique()])
        return (means - means.mean(0)).square().sum() / (vectors - vectors.mean(0)).square().sum()
    assert between(after) < 0.7 * between(before)
    assert steps_of(plain, 1)[0]["loss"] != pytest.approx(steps_of(neutral, 1)[0]["loss"], rel=1e-3)
    means = torch.tensor([[0.0, 0, 1], [0, 9, 1], [0, 18, 1]])                      # a line along the second axis
    torch.testing.assert_close(language_directions(means, 1).abs(), torch.tensor([[0.0, 1, 0]]))
    with pytest.raises(ValueError, match="3 languages in 3 dimensions differ in no 3 directions"):
        language_directions(means, 3)
    with pytest.raises(ValueError, match="--kd-neutral changes sentence vectors"):
        dataclasses.replace(TINY, kd_neutral=2)


def test_a_student_starts_from_the_layers_of_its_teacher(make_run):
    teacher = make_run(seed=5).model.eval()
    alone = make_run(teacher, init_from_teacher="1,3")                   # its layers, and nothing more
    assert alone.objective.teacher is None and torch.equal(alone.model.embedding.weight, teacher.embedding.weight)
    run = make_run(teacher, init_from_teacher="1,3", kd_weight=1.0, dropout=0.1)
    assert run.model.config.num_layers == 2 and run.model.blocks[0].dropout == 0.1
    assert torch.equal(run.model.blocks[1].up.weight, teacher.blocks[3].up.weight)
    assert torch.equal(run.model.embedding.weight, teacher.embedding.weight)


# -------------------------------------------------------------------------------------------------- bad losses

def test_a_loss_that_is_not_finite_changes_nothing(make_run, monkeypatch):
    run = make_run()
    steps_of(run, 2)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in run.optimizers[0].state.values()]
    monkeypatch.setattr(Objective, "loss", lambda self, sums, counts: sums.sum() * float("nan"))
    record = steps_of(run, 1)[0]
    assert record["skipped_steps"] == 1 and run.step == 3
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(run.optimizers[0].state.values(), moments))


def test_ten_bad_steps_stop_with_the_weights_of_before(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(Objective, "loss", lambda self, sums, counts: sums.sum() * float("nan"))
    with pytest.raises(train.UserError, match="not finite for 10 steps in a row"):
        run.train()
    saved, last = load_model(run.out / "before-nan"), run.model.state_dict()             # --init can go on from there
    assert all(torch.equal(value, last[name]) for name, value in saved.state_dict().items())


def test_relations_are_compared_in_float32_under_autocast():
    torch.manual_seed(0)
    teacher = torch.randn(30, 3, 4, 16)
    student, ends = teacher + 0.02 * torch.randn(30, 3, 4, 16), torch.tensor([0, 10, 30], dtype=torch.int32)
    wanted = relation_distillation(student, teacher, ends, 20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(relation_distillation(student, teacher, ends, 20, 4), wanted)


def test_relations_of_a_pruned_student_need_heads_that_can_be_cut_anew(make_run):
    """Two of its four heads of 32: 64 dimensions, which are a multiple of a teacher's four heads and not of three."""
    teacher = make_run(seed=5).model.eval()
    small = UniBERT(dataclasses.replace(teacher.config, num_heads=2, head_size=32))
    config = dataclasses.replace(TINY, kd_relation_weight=1.0)
    prior = torch.full((5,), 0.2)
    Objective(small, config, prior, teacher)
    teacher.config = dataclasses.replace(teacher.config, num_heads=3, head_size=32)
    with pytest.raises(ValueError, match="cuts the 64 dimensions of the student's heads"):
        Objective(small, config, prior, teacher)


def test_an_extended_run_is_not_finished_by_what_the_shorter_one_left(make_run, corpus, monkeypatch):
    run = make_run(steps=2)
    stage = lambda steps: train.train_stage(dataclasses.replace(TINY, steps=steps, eval_tokens=1024), corpus, run.out, World(), "model")  # noqa: E731
    short = {name: value.clone() for name, value in stage(2).state_dict().items()}
    with monkeypatch.context() as patch:                                 # killed after its last step, in its last validation
        patch.setattr(train, "evaluate", lambda run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage(4)
    assert any(not torch.equal(value, short[name]) for name, value in stage(4).state_dict().items())
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda run: 1 / 0)
        stage(4)                                                         # that one is


def test_a_signal_in_the_last_step_stops_before_the_next_stage(make_run, corpus, monkeypatch, capsys):
    run, step = make_run(steps=2), Run.train_step

    def asked(self, *arguments):
        record = step(self, *arguments)
        if self.step == self.config.steps:
            self.on_signal(15, None)
        return record
    monkeypatch.setattr(Run, "train_step", asked)
    with pytest.raises(SystemExit):
        train.train_stage(dataclasses.replace(TINY, steps=2), corpus, run.out / "teacher", World(), "teacher", top=run.out)
    assert f"stopped after step 2; go on with: python train.py --out {run.out} --resume" in capsys.readouterr().out


def test_a_stop_that_could_not_save_says_so(make_run, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")
    run = make_run()
    monkeypatch.setattr(torch, "save", full)
    run.save()
    with pytest.raises(SystemExit) as stop:
        run.stop()
    printed = capsys.readouterr()
    assert stop.value.code == 1 and "could not be saved" in printed.err and "go on with" not in printed.out


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_all", lambda *arguments: open(tmp_path / "none" / "file", "w"))
    done = CliRunner().invoke(train.main, ["--out", str(tmp_path / "run"), "--device", "cpu"])
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "No such file" in done.stderr, (done.stderr, done.exception)


def test_without_held_out_text_no_figure_is_made_up(corpus, tmp_path, capsys):
    prepare(corpus.folder.parent / "text", tmp_path / "data", languages=["en"], vocab_size=500, validation_share=0.0)
    config = dataclasses.replace(TINY, steps=2, eval_every=1)
    train.train_stage(config, Corpus(tmp_path / "data"), tmp_path / "run", World(), "model")
    printed, log = capsys.readouterr().out, (tmp_path / "run" / "metrics.jsonl").read_text()
    assert printed.count("no held-out text") == 3 and "MLM loss" not in printed and "masked tokens right" not in printed
    assert len(log.splitlines()) == 2 and "validation" not in log
    assert "no held-out text" in model_card(load_model(tmp_path / "run" / "final"), "modernbert", tmp_path / "run" / "final")


def test_processes_that_see_different_checkpoints_stop(make_run, monkeypatch):
    run = make_run()
    run.resume()                                                        # all at step 0
    monkeypatch.setattr(run.world, "sum", lambda steps: steps + 40)     # one more process, on a machine that is behind
    with pytest.raises(train.UserError, match="others found another"):
        run.resume()


# ------------------------------------------------------------------------------------------------ command line

def command(*arguments, ok=True, cwd=REPO):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else (done.returncode, done.stderr)


SHORT = ("--preset", "tiny", "--steps", 4, "--tokens-per-batch", 1024, "--max-length", 32, "--device", "cpu",
         "--eval-tokens", 1024, "--log-every", 1)


@pytest.fixture(scope="session")
def finished_run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    printed = command("train.py", "--data", corpus.folder, "--out", out, *SHORT, "--teacher-preset", "tiny", "--teacher-steps", 2)
    return out, printed


def test_a_whole_run_on_the_command_line(finished_run):
    out, printed = finished_run
    for line in ("validation MLM loss", "unigram model", "agreement with the teacher", "adversary names", "tokens/s"):
        assert line in printed
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == [1, 2, 3, 4]
    assert {"step", "loss", "mlm_loss", "adv_loss", "kd_loss", "discriminator_accuracy", "chance", "lambda", "lr",
            "grad_norm", "tokens_per_second", "tokens_seen"} <= records[0].keys()
    assert {p.name for p in (out / "final").iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}


def test_fill_mask_and_embed(finished_run, tmp_path):
    out, _ = finished_run
    lines = command("unibert.py", "fill-mask", "--model", out / "final", "The [MASK] of France is [MASK].").splitlines()
    assert len(lines) == 10 and lines[0].startswith("mask 1")
    best = [float(line.split()[2]) for line in lines[:5]]
    assert best == sorted(best, reverse=True) and 0 < best[-1] <= best[0] < 1
    done = subprocess.run([sys.executable, "unibert.py", "embed", "--model", out / "final"], cwd=REPO, check=True,
                          input="one sentence\n\n\u0416\u0438\u0437\u043d\u044c\n".encode(), capture_output=True)
    (tmp_path / "v.npy").write_bytes(done.stdout)
    vectors = np.load(tmp_path / "v.npy")
    assert vectors.shape == (3, 128) and np.isfinite(vectors).all() and not np.allclose(vectors[0], vectors[2])


@pytest.mark.parametrize("options, wanted", [((), 4), (("--tokens-per-batch", "8192"), 8), (("--data", "x"), 6), (("--nproc", "3"), 3)])
def test_processes_without_nproc(tmp_path, monkeypatch, options, wanted):
    """One a GPU, here 8 or 6; of the atlas's four rows as many as can share them evenly."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6 if "--data" in options else 8)
    monkeypatch.setattr(train, "launch", lambda program, nproc, arguments: asked.append(nproc) or 0)
    assert CliRunner().invoke(train.main, ["--out", str(tmp_path / "run"), *options]).exit_code == 0
    assert asked == [wanted]


@pytest.mark.parametrize("started, wanted", [
    (dict(data="x"), [8]), (dict(data="x", device="cpu"), []), (dict(tokens_per_batch=6144), [6])])
def test_processes_of_a_resumed_run_are_chosen_by_how_it_was_started(tmp_path, monkeypatch, started, wanted):
    """`--out RUN --resume` alone, with 8 GPUs: all for data, none for a run on the CPU, 6 of the atlas's 6 rows."""
    asked = []
    run = dict(data=None, device="auto", steps=4, tokens_per_batch=4096, max_length=64) | started
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(train, "launch", lambda program, nproc, arguments: asked.append(nproc) or 0)
    monkeypatch.setattr(train, "train_all", lambda settings, out: None)
    assert CliRunner().invoke(train.main, ["--out", str(tmp_path), "--resume"]).exit_code == 0
    assert asked == wanted


def test_bad_input_gets_one_line(finished_run, corpus, tmp_path, monkeypatch):
    out, _ = finished_run
    other = tmp_path / "other"
    prepare(corpus.folder.parent / "text", other, vocab_size=1500, validation_share=0.05)
    wide, narrow, broken = (tmp_path / name for name in ("wide", "narrow", "broken"))
    for folder, changes in ((wide, dict(hidden_size=120, num_heads=6)), (narrow, dict(vocab_size=900))):
        save_model(UniBERT(UniBERTConfig.preset("tiny", **dict(vocab_size=corpus.vocab_size, max_length=32) | changes)), folder,
                   corpus.tokenizer_path)
    broken.mkdir()
    (broken / "run.json").write_text("{}")
    (tmp_path / "file").touch()
    cases = [
        (("--data", tmp_path / "none", "--out", tmp_path / "a"), "not found"),
        (("--data", corpus.folder, "--out", out), "--resume"),
        (("--data", corpus.folder, "--out", tmp_path / "b", "--resume"), "no run to resume"),
        (("--out", out, "--resume", "--dtype", "auto", "--lr", "0.5"), "more: --lr (was"),
        (("--data", other, "--out", tmp_path / "c", "--teacher", out / "final"), "another tokenizer"),
        (("--data", corpus.folder, "--out", tmp_path / "d", "--teacher", tmp_path), "not a model folder"),
        (("--data", corpus.folder, "--out", tmp_path / "e", "--teacher", out / "final", "--max-length", "64"), "at most 32"),
        (("--data", corpus.folder, "--out", tmp_path / "f", "--mlm-weight", "0", "--kd-weight", "0"), "nothing to learn"),
        (("--data", corpus.folder, "--out", tmp_path / "g", "--cuda-graphs", "--device", "cpu"), "needs a CUDA device and --compile"),
        (("--data", corpus.folder, "--out", tmp_path / "h", "--extend"), "--extend goes with --resume"),
        (("--data", corpus.folder, "--out", tmp_path / "i", "--adv-layer", "5"), "the model has 4 layers"),
        (("--data", corpus.folder, "--out", tmp_path / "j", "--teacher", wide, "--kd-relation-weight", "1"), "no multiple of 6"),
        (("--data", corpus.folder, "--out", tmp_path / "k", "--teacher", narrow), "pieces, the model 900"),
        (("--data", corpus.folder, "--out", tmp_path / "l", "--max-length", "1500"), "--max-length is 1500"),
        (("--data", corpus.folder, "--out", tmp_path / "m", "--lr", "inf"), "--lr is inf"),
        (("--data", corpus.folder, "--out", tmp_path / "file" / "n"), "cannot be written (Not a directory)"),
        (("--out", broken, "--resume"), "does not hold the options of a run"),
        (("--plan", "--tokens", "nan"), "--tokens is nan"),
        (("--plan", "--mfu", "nan"), "--mfu is nan"),
        (("--plan", "--data", corpus.folder), "--plan reads no --data"),
        (("--plan", "--lr", "0"), "--lr is 0.0"),
        (("--data", corpus.folder, "--out", tmp_path / "o", "--kd-sentence-weight", "1", "--teacher-steps", "0"), "needs a teacher"),
    ]
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    for arguments, wanted in cases:
        done = CliRunner().invoke(train.main, [*map(str, SHORT), *map(str, arguments)])
        assert done.exit_code == 2 and wanted in done.stderr, (done.stderr, done.exception)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr

    # Refused before its first step, a start leaves nothing: with the mistake mended, the same command works.
    assert {path.name for path in tmp_path.iterdir()} == {"other", "wide", "narrow", "broken", "file"}


def test_extend_needs_a_number_of_steps(finished_run):
    done = CliRunner().invoke(train.main, ["--out", str(finished_run[0]), "--resume", "--extend"])
    assert done.exit_code == 2 and done.stderr == "Error: --extend needs --steps, how many there shall be in all\n"


def test_what_is_not_as_asked_is_said(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    done = CliRunner().invoke(train.main, [
        *map(str, SHORT), "--data", str(corpus.folder), "--out", str(tmp_path / "run"), "--kd-weight", "0",
        "--tokens-per-batch", "3000", "--micro-batch-tokens", "512", "--steps", "2", "--profile"])
    assert done.exit_code == 0, (done.output, done.exception)
    for wanted in ("--tokens-per-batch 3,000: it will be 2,048,", "--micro-batch-tokens 512: it will be 1,024,",
                   "--profile: it looks at"):
        assert done.stdout.count(wanted) == 1, done.stdout
    assert not (tmp_path / "run" / "trace.json").exists()


def test_a_checkpoint_that_does_not_fit_gets_one_line(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    for name, change, wanted in (("older", lambda state: state.pop("adv_loss"), "lacks 'adv_loss'"),
                                 ("further", lambda state: state.update(step=5), "beyond the 4 steps"),
                                 ("other", lambda state: state["objective"].pop("discriminator.outer.bias"), "is not of this run")):
        shutil.copytree(finished_run[0], tmp_path / name)
        checkpoints = train.Checkpoints(tmp_path / name / "checkpoints")
        state = checkpoints.load_newest()[1]
        change(state)
        checkpoints.save(4, state)
        checkpoints.wait()
        (tmp_path / name / "finished").unlink()                         # a finished run needs no checkpoint
        done = CliRunner().invoke(train.main, ["--out", str(tmp_path / name), "--resume"])
        assert done.exit_code == 2 and wanted in done.stderr, (done.stderr, done.exception)
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_checkpoints_of_which_none_can_be_read_end_the_run_and_change_nothing(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    out = tmp_path / "run"
    shutil.copytree(finished_run[0], out)
    (out / "finished").unlink()                                          # killed in its last validation
    for path in (out / "checkpoints").glob("step-*/state.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in (out / "metrics.jsonl", *(out / "final").iterdir())}
    done = CliRunner().invoke(train.main, ["--out", str(out), "--resume"])
    assert done.exit_code == 2 and "none of the 1 checkpoints" in done.stderr, (done.stderr, done.exception)
    assert before == {path: path.read_bytes() for path in before}


def test_a_run_does_not_go_on_with_other_data(finished_run, corpus, tmp_path, monkeypatch):
    """Made anew from other text, of the same vocabulary size: every shape fits. A run of before the digest was kept goes on."""
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    out, data, text = tmp_path / "run", tmp_path / "data", tmp_path / "text"
    shutil.copytree(finished_run[0], out)
    settings = json.loads((out / "run.json").read_text())
    assert settings["data_sha256"] == json.loads((corpus.folder / "manifest.json").read_text())["sha256"]
    shutil.copytree(corpus.folder.parent / "text", text)
    (text / "en.txt").write_text((text / "en.txt").read_text()[:-1000])
    prepare(text, data, vocab_size=corpus.vocab_size, validation_share=0.05, tokenizer=corpus.tokenizer_path)
    (out / "run.json").write_text(json.dumps(settings | dict(data=str(data))))
    before = (out / "metrics.jsonl").read_bytes()
    done = CliRunner().invoke(train.main, ["--out", str(out), "--resume"])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1, (done.stderr, done.exception)
    assert "is not what it was" in done.stderr and f"--init {out / 'final'}" in done.stderr
    assert before == (out / "metrics.jsonl").read_bytes()
    del settings["data_sha256"]
    (out / "run.json").write_text(json.dumps(settings))
    assert CliRunner().invoke(train.main, ["--out", str(out), "--resume"]).exit_code == 0


def test_what_is_finished_needs_no_checkpoints(finished_run, tmp_path, monkeypatch):
    """Neither the teacher nor the student is trained again because somebody made room."""
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    monkeypatch.setattr(Run, "train", lambda run: 1 / 0)
    out = tmp_path / "run"
    shutil.copytree(finished_run[0], out)
    for folder in (out, out / "teacher"):
        shutil.rmtree(folder / "checkpoints")
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (out, out / "teacher")]
    done = CliRunner().invoke(train.main, ["--out", str(out), "--resume"])
    assert done.exit_code == 0 and done.stdout.count("finished before") == 2, (done.output, done.exception)
    assert logs == [(folder / "metrics.jsonl").read_bytes() for folder in (out, out / "teacher")]


def test_one_run_a_folder_at_a_time(finished_run):
    import fcntl
    out, _ = finished_run
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, error = command("train.py", "--out", out, "--resume", ok=False)
    assert code == 2 and "another process is training" in error
