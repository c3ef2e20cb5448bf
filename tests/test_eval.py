"""Evaluation with models: does the loop learn, are scores what the outputs say, what trains what?

The model is tiny and its weights random; the data are the atlas.
"""
import dataclasses
import random
import unicodedata

import numpy as np
import pytest
import torch

import atlas
from data import clean, encode_text
from eval import finetune, metrics, ner, neutrality, nli, qa, report, retrieval, run, sts
from eval_common import *  # noqa: F403  (the model, the data, the command)
from hub.vocabulary import WORDPIECE_SPECIALS, WordPiece


# ---- does it learn ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task, module, head, count, steps, reached", [
    ("nli", nli, nli.Classification, 24, 50, 0.95),
    ("ner", ner, ner.Tagging, 12, 80, 0.9),
    ("qa", qa, qa.Spans, 8, 50, 0.9),
    ("sts", sts, sts.Similarity, 24, 40, 0.95),
])
def test_the_loop_fits_a_small_training_set(folder, model, tokenizer, task, module, head, count, steps, reached):
    train = examples(folder, module, task, count=count)
    task = head(tokenizer, 128, train)
    items = task.items(train, learn=True)
    encoder, _ = finetune.compact(model, [items])
    before = finetune.evaluate(finetune.Net(encoder, task.outputs), task, train, items)[0]
    run_ = finetune.fit(encoder, task, (train, items), None, 3e-3, seed=0, steps=steps)
    after = finetune.evaluate(run_.net, task, train, items)[0]
    print(f"{head.__name__}: {before:.3f} -> {after:.3f}")
    assert before < reached - 0.1 and after >= reached


def test_shuffled_labels_give_chance(folder, model, tokenizer):
    """Labels that belong to other examples: the dev score stays at that of a guess (three balanced classes)."""
    train = examples(folder, nli, "nli", count=160)
    labels = [pair.label for pair in train]
    random.Random(0).shuffle(labels)
    train = [nli.Pair(p.premise, p.hypothesis, label) for p, label in zip(train, labels)]
    test = examples(folder, nli, "nli", "test", 300)
    task = nli.Classification(tokenizer, 128, train)
    items, test_items = task.items(train), task.items(test)
    encoder, _ = finetune.compact(model, [items, test_items])
    run_ = finetune.fit(encoder, task, (train, items), None, 1e-3, seed=0, steps=15)
    score = finetune.evaluate(run_.net, task, test, test_items)[0]
    largest = max(np.mean([p.label == label for p in test]) for label in task.labels)
    assert abs(score - largest) < 0.1, (score, largest)


def test_same_seed_same_scores_and_other_seed_other_weights(folder, model, tokenizer):
    train = examples(folder, sts, "sts", count=40)
    task = sts.Similarity(tokenizer, 128)
    items = task.items(train)
    encoder, _ = finetune.compact(model, [items])
    nets = [finetune.fit(encoder, task, (train, items), (train, items), 1e-3, seed, 6).net for seed in (1, 1, 2)]
    a, b, c = (net.state_dict()["encoder.embedding.weight"] for net in nets)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_seeds_side_by_side_are_the_same_seeds(folder, tokenizer, model):
    """Two processes: the same runs as one after the other. Each has as many threads here as there: the same sums."""
    train = examples(folder, nli, "nli", count=40)
    task = nli.Classification(tokenizer, 128, train)
    items = task.items(train)
    encoder, _ = finetune.compact(model, [items])
    plan = finetune.Plan(3, (1e-3, 2e-3), 3)
    arguments = (encoder, task, (train, items), (train, items), plan)
    alone = list(finetune.runs(*arguments))
    pool, workers = finetune.pool("cpu", 2, jobs=2)
    with pool:
        together = list(finetune.runs(*arguments, pool=pool, workers=workers))
    assert [(r.seed, r.lr, r.steps) for r, _ in together] == [(r.seed, r.lr, r.steps) for r, _ in alone]
    for (a, _), (b, _) in zip(alone, together):
        for x, y in zip(a.net.state_dict().values(), b.net.state_dict().values(), strict=True):
            assert torch.allclose(x, y, atol=1e-5)
    assert finetune.pool("cuda", 8) == (None, 1)


def test_the_order_of_examples_depends_on_the_seed_alone():
    seen = np.concatenate(list(finetune.orders(100, 10, seed=3)))
    assert len(seen) == 10 * finetune.BATCH
    assert np.array_equal(np.concatenate(list(finetune.orders(100, 40, seed=3, batch=finetune.SMALL))), seen)
    assert sorted(seen[:100]) == list(range(100)) and sorted(seen[100:200]) == list(range(100))
    assert np.array_equal(seen, np.concatenate(list(finetune.orders(100, 10, seed=3))))
    assert not np.array_equal(seen, np.concatenate(list(finetune.orders(100, 10, seed=4))))


@pytest.mark.parametrize("scores, looks, stopped, kept", [
    ([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1, 0.9], 6, "early", 1),         # four looks without a better one
    ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2], 8, "end", 7),           # nothing learnt yet is no plateau
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.7], 8, "end", 6),
])
def test_the_best_dev_state_is_kept(folder, model, tokenizer, monkeypatch, scores, looks, stopped, kept):
    train = examples(folder, nli, "nli", count=8)
    task = nli.Classification(tokenizer, 32, train)
    items, states, left = task.items(train), [], iter(scores)

    def evaluate(net, *rest):
        states.append(net.head.weight.detach().clone())
        return next(left), None
    monkeypatch.setattr(finetune, "evaluate", evaluate)
    found = finetune.fit(finetune.compact(model, [items])[0], task, (train, items), (train, items), 1e-3, 0, steps=16)
    assert (len(states), found.stopped, found.steps, found.dev) == (looks, stopped, 2 * looks, scores[kept])
    assert torch.equal(found.net.head.weight, states[kept]) and not torch.equal(states[kept], states[kept - 1])


def test_the_best_rate_on_dev_is_every_seeds_rate(monkeypatch):
    devs = {1e-5: 0.3, 1e-4: 0.7, 1e-3: 0.5}
    monkeypatch.setattr(finetune, "fit", lambda encoder, task, train, dev, lr, seed, *rest: finetune.Run(
        None, lr, seed, devs[lr] - seed, 1, 0.0, "end"))
    found = list(finetune.runs(None, None, None, None, finetune.Plan(1, tuple(devs), 3), first_seed=4))
    assert [(run_.lr, run_.seed) for run_, _ in found] == [(1e-4, 4), (1e-4, 5), (1e-4, 6)]
    assert found[0][1] == {lr: dev - 4 for lr, dev in devs.items()}


def test_micro_batches_do_not_change_the_step(folder, model, tokenizer):
    """The same batch in one piece and in many: the same update but for rounding."""
    train = examples(folder, ner, "ner", count=32)
    task = ner.Tagging(tokenizer, 128, train)
    items = task.items(train, learn=True)
    encoder, _ = finetune.compact(model, [items])
    encoder.config.dropout = 0.0
    for block in encoder.blocks:
        block.dropout = 0.0
    gradients = []
    for tokens in (64, 100000):
        torch.manual_seed(0)
        net = finetune.Net(encoder, task.outputs)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        dropout, finetune.DROPOUT = finetune.DROPOUT, 0.0
        finetune._train_step(net, task, finetune.by_example(items, 32), optimizer, tokens, torch.float32, torch.device("cpu"))
        finetune.DROPOUT = dropout
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_batch_size(folder, model, tokenizer, dtype):
    dev = examples(folder, qa, "qa", "dev", 40)
    task = qa.Spans(tokenizer, 64)
    items = task.items(dev)
    encoder, _ = finetune.compact(model, [items])
    torch.manual_seed(0)
    net = finetune.Net(encoder, 2).eval()
    results = [finetune.predict(net, items, tokens, dtype) for tokens in (1, 300, 100000)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2 * max(np.abs(out).max() for out in results[0])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_allclose(a, b, atol=tolerance)
    if dtype == torch.float32:
        assert len({tuple(task.answers(dev, items, out)) for out in results}) == 1


def test_compact_is_exact(folder, model, tokenizer):
    sentences = [p.sentence1 for p in examples(folder, sts, "sts", count=20)]
    items = [finetune.Item(finetune.sequence(encode_text(tokenizer, s), 128), i) for i, s in enumerate(sentences)]
    before = finetune.predict(finetune.Net(model, 0), items)
    small, _ = finetune.compact(model, [items])
    assert small.config.vocab_size < model.config.vocab_size
    np.testing.assert_array_equal(before, finetune.predict(finetune.Net(small, 0), items))


def test_rows_that_are_only_scored_come_back_after_training(folder, model, tokenizer):
    """What is trained holds the rows of train alone; extended, it reads the test sentences as the whole model does."""
    sentences = [p.sentence1 for p in examples(folder, sts, "sts", count=20)]
    items = [finetune.Item(finetune.sequence(encode_text(tokenizer, s), 128), i) for i, s in enumerate(sentences)]
    before = finetune.predict(finetune.Net(model, 0), items)
    everything, _ = finetune.compact(model, [[dataclasses.replace(item) for item in items]])
    small, rest = finetune.compact(model, [items[:5]], [items[5:]])
    assert len(rest) and small.config.vocab_size + len(rest) == everything.config.vocab_size
    net = finetune.Net(small, 0)
    finetune.extend(net, rest)
    np.testing.assert_array_equal(before, finetune.predict(net, items))


def test_cut_takes_from_the_longer_sentence():
    for n in range(12):
        for m in range(12):
            a, b = nli.cut([*range(n)], [*range(m)], 8)
            assert a == [*range(len(a))] and b == [*range(len(b))] and len(a) + len(b) == min(8, n + m)
            assert (len(a) == n or len(a) >= 4) and (len(b) == m or len(b) >= 4)


# ---- named entities -----------------------------------------------------------------------------------------

def test_ner_never_drops_words_when_truncating(tokenizer):
    """Long sentences, words of hundreds of pieces, words that vanish in cleaning: one tag a word comes out."""
    rng = random.Random(0)
    sentences = []
    for _ in range(30):
        words = [rng.choice(["Ada", "\u200b", "x" * rng.randint(1, 300), "北京", "of"]) for _ in range(rng.randint(1, 60))]
        sentences.append(ner.Sentence(tuple(words), tuple(rng.choice(["O", "B-PER", "I-PER"]) for _ in words)))
    task = ner.Tagging(tokenizer, 16, sentences)
    items = task.items(sentences)
    assert max(len(item.ids) for item in items) <= 16
    # Outputs that name the gold tag: then every tag has to come back, in its place.
    outputs = [np.eye(task.outputs)[list(item.targets)] for item in items]
    assert [tuple(tags) for tags in task.predictions(sentences, items, outputs)] == [s.tags for s in sentences]
    assert task.score(*task.columns(sentences, items, outputs).T) == 1.0


def test_ner_scores_only_shared_types_of_another_data_set(tokenizer):
    train = [ner.Sentence(("Ada", "x", "y"), ("B-PER", "B-MISC", "O"))]
    other = [ner.Sentence(("Ada", "today", "y"), ("B-PER", "B-DATE", "O"))]
    task = ner.Tagging(tokenizer, 16, train)
    as_scored, note = task.target("ner/other", "sw", other)
    assert note == "entity types PER scored; DATE, MISC left out"
    items = task.items(other)
    outputs = [np.eye(task.outputs)[[task.tags.index(t) for t in ("B-PER", "B-MISC", "O")]]]
    assert as_scored.columns(other, items, outputs).tolist() == [[1, 1, 1]]
    assert task.columns(other, items, outputs).tolist() == [[1, 2, 1]]            # the task itself is as it was
    assert task.target("ner/train", "de", train) == (task, None)


def test_mlqa_has_its_own_normalisation_and_goes_to_other_processes(tokenizer):
    """A window that points at the whole context "der Hof", where the answer is "Hof"."""
    questions = [qa.Question("1", 0, "der Hof", "Wo?", (qa.Answer("Hof", 4),))]
    task = qa.Spans(tokenizer, 64)
    items = task.items(questions)
    outputs = [np.stack([np.arange(len(items[0].rows)) == row for row in (1, len(items[0].rows) - 1)], axis=1) * 9.0]
    for name, language, scores in (("qa/mlqa", "de", [1, 1]), ("qa/mlqa", "en", [0, 2 / 3]), ("qa/xquad", "de", [0, 2 / 3])):
        assert task.target(name, language, questions)[0].columns(questions, items, outputs)[0].tolist() == scores
    assert task.normalise is metrics.squad_normalise                              # for the next seed's dev
    as_scored, note = task.target("qa/mlqa", "fr", questions)                     # MLQA has no French
    assert as_scored.normalise is metrics.squad_normalise and "no normalisation for this language" in note


def test_dev_is_scored_alike_for_all_seeds(model, tokenizer, monkeypatch):
    """After the first seed was scored on a data set with other entity types, too. Those that count are a data set's in all its
    languages; in the training's own, all that were learnt."""
    class Report:
        value = {"cells": [], "training": []}

        def note(self, text, say):
            pass
    train = [ner.Sentence(("Ada", "x"), ("B-PER", "B-MISC"))] * 8
    alone = [ner.Sentence(("Ada", "y"), ("B-PER", "O"))]
    other = [("ner/other", "sw", "test", [ner.Sentence(("Ada", "today"), ("B-PER", "B-DATE"))]), ("ner/other", "yo", "test", alone)]
    own = ("ner/x", "de", "test", list(alone))
    seen, evaluate = [], finetune.evaluate
    monkeypatch.setattr(finetune, "evaluate", lambda net, task, examples, *rest, **options: seen.append(
        (any(examples is target[3] for target in other), task.scored)) or evaluate(net, task, examples, *rest, **options))
    run.fine_tune(Report(), run.Training("ner", "ner/x", "en", "", train, train[:2], [*other, own]), model, tokenizer, "", 2,
                  torch.float32, float("inf"), None, lambda line: None, rates=(1e-3,))
    assert sum(here for here, _ in seen) == 4 and len(seen) > 8
    assert all(scored == ({"PER"} if here else {"PER", "MISC"}) for here, scored in seen)


# ---- questions ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "Plain text, with words.", "  two  spaces\tand\na line ", "Cafe\u0301 de\u0301ja\u0300 vu", "ﬁne Ⅳ １２ ｱｲｳ",
    "a\u200bb \u200b c\u00add", "한국어 \u1112\u1161\u11ab글 text", "北京是中国的首都。", "😀 emoji 👩‍👩‍👧 𐍈", "नमस्ते दुनिया", "\u0301x", "x",
])
def test_offsets_point_into_the_original_text(tokenizer, text):
    """Ids are those of encode_text; spans are in order, cover every visible character and no white space at their
    start; each character's own piece gives that character."""
    ids, spans = qa.offsets(tokenizer, text)
    assert ids == encode_text(tokenizer, text)
    assert all(0 <= b <= e <= len(text) for b, e in spans) and spans == sorted(spans)
    covered = {i for b, e in spans for i in range(b, e)}
    assert {i for i, c in enumerate(text) if clean(c) and not unicodedata.combining(c)} <= covered
    assert all(not text[b].isspace() for b, e in spans if e > b)
    for (b, e), piece in zip(spans, ids):
        word = tokenizer.id_to_piece(piece).lstrip("▁")
        # One character can give several pieces ("ﬁ": f, i): the last of them has its span, the others are empty.
        if e > b and not tokenizer.is_byte(piece) and not tokenizer.is_unknown(piece):
            assert unicodedata.normalize("NFKC", clean(text[b:e])).endswith(word)


def test_a_wordpiece_model_answers_questions():
    """Windows and spans of a tokenizer that is not SentencePiece."""
    words = "the river rises in hills above town".split()
    task = qa.Spans(WordPiece([*WORDPIECE_SPECIALS, *words, "?", "where"]), 32)
    questions = [qa.Question("1", 0, "The river rises in the hills above the town", "Where?", (qa.Answer("the hills", 19),))]
    items = task.items(questions, learn=True)
    outputs = [np.eye(len(items[0].rows))[list(items[0].targets)].T * 9.0]
    assert task.columns(questions, items, outputs)[0].tolist() == [1, 1]


def test_windows_cover_everything():
    for length in range(1, 60):
        for width in (1, 2, 5, 20):
            for stride in range(1, width + 1):
                found = qa.windows(length, width, stride)
                assert {i for a, b in found for i in range(a, b)} == set(range(length))
                assert all(0 < b - a <= width for a, b in found)
                assert len(set(found)) == len(found)


def test_span_decoding_finds_exact_offsets(tokenizer):
    """Logits that point at the gold span in windows that hold it, and at <s> elsewhere: the answer comes back."""
    rng, questions = random.Random(0), []
    words = ["Paris", "的", "река", "Cafe\u0301", "12", "is", "naïve", "x"]
    for n in range(40):
        chosen = [rng.choice(words) + str(i) for i in range(rng.randint(3, 60))]
        first = rng.randrange(len(chosen))
        last = min(len(chosen), first + rng.randint(1, 3))
        before, answer = "  ".join(chosen[:first]), "  ".join(chosen[first:last])
        start = len(before) + 2 * bool(before)
        context = "  ".join(chosen)
        questions.append(qa.Question(str(n), 0, context, "What is it?", (qa.Answer(answer, start),)))
    task = qa.Spans(tokenizer, 64)
    items, learnt = task.items(questions), task.items(questions, learn=True)
    assert len(items) > len(learnt) > len(questions) and max(len(item.ids) for item in items) <= 64
    for given in (items, learnt):
        assert {item.example for item in given if item.targets != (0, 0)} == set(range(40))
    # To learn from: every window with the answer, and at most one without.
    assert sum(i.targets != (0, 0) for i in items) == sum(i.targets != (0, 0) for i in learnt)
    without = [item.example for item in learnt if item.targets == (0, 0)]
    assert len(without) == len(set(without)) > 0
    outputs = []
    for item in items:
        logits = np.array([[rng.gauss(0, 1), rng.gauss(0, 1)] for _ in item.rows])
        for side in (0, 1):
            logits[item.targets[side], side] = 20
        outputs.append(logits)
    assert task.answers(questions, items, outputs) == [q.answers[0].text for q in questions]
    assert task.score(*task.columns(questions, items, outputs).T) == 1.0


def test_best_span_is_the_best_of_all_valid_ones():
    rng = np.random.default_rng(0)
    for _ in range(200):
        logits = rng.normal(size=(rng.integers(2, 80), 2)) * 3
        log = logits - np.log(np.exp(logits).sum(0))
        every = {(s, e): log[s + 1, 0] + log[e + 1, 1] for s in range(len(log) - 1)
                 for e in range(s, min(len(log) - 1, s + qa.MAX_ANSWER))}
        score, first, last = qa.best_span(logits)
        assert (first, last) == max(every, key=every.get) and score == pytest.approx(every[first, last])


# ---- sentence vectors and neutrality ------------------------------------------------------------------------

def test_vectors_do_not_depend_on_company(folder, model, tokenizer):
    lines = [p.translation for p in examples(folder, retrieval, "retrieval", "test", 30, "ro")]
    together = finetune.vectors(model, tokenizer, lines + lines[:1])
    alone = np.stack([finetune.vectors(model, tokenizer, [line])[0] for line in lines])
    np.testing.assert_allclose(together[:-1], alone, atol=1e-5)
    layers = finetune.vectors(model, tokenizer, lines, layers=True)
    assert layers.shape == (3, 30, 64)
    np.testing.assert_allclose(layers[-1], together[:-1], atol=1e-5)


def test_probes_see_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(4), 90)
    held_out = np.arange(360) % 3 == 2
    noise = rng.normal(size=(360, 16))
    offset = noise + 3 * rng.normal(size=(4, 16))[label]
    ring = noise / np.linalg.norm(noise, axis=1, keepdims=True) * (1 + label % 2)[:, None]   # told by length alone

    def measures(x):
        return neutrality.layer_measures(x, label, held_out, [(x, x)])
    found = {name: measures(x) for name, x in (("noise", noise), ("offset", offset))}
    assert found["offset"]["linear"] > 0.95 and found["offset"]["mlp"] > 0.95
    assert found["offset"]["centred"] < 0.45 and found["noise"]["linear"] < 0.45 and found["noise"]["mlp"] < 0.45
    assert found["offset"]["between"] > 0.5 and found["noise"]["between"] < 0.03
    halves = label % 2
    linear, mlp = (neutrality.probe(ring[~held_out], halves[~held_out], ring[held_out], halves[held_out], hidden)
                   for hidden in (0, 256))
    assert linear < 0.65 and mlp > 0.85, (linear, mlp)


def test_each_language_is_centred_by_its_training_rows(monkeypatch):
    """And not by those that the probe is tested on."""
    rng, seen = np.random.default_rng(0), []
    label, held_out = np.repeat(np.arange(3), 30), np.arange(90) % 3 == 2
    x = rng.normal(size=(90, 4)) + 5 * rng.normal(size=(3, 4))[label]
    monkeypatch.setattr(neutrality, "probe", lambda x, label, x_test, label_test, hidden: seen.append((x, x_test)) or 0.0)
    neutrality.layer_measures(x, label, held_out, [(x, x)])
    for k in range(3):
        train, test = (rows[label[part] == k] for rows, part in zip(seen[-1], (~held_out, held_out)))
        np.testing.assert_allclose(train.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(test, x[held_out & (label == k)] - x[~held_out & (label == k)].mean(0))


def test_neutrality_of_languages_of_unequal_size(folder, model, tokenizer):
    pairs = examples(folder, retrieval, "retrieval", "test", 30, "ro")
    few = examples(folder, retrieval, "retrieval", "test", neutrality.LEAST - 1, "fi")
    found = neutrality.measure(model, tokenizer, {"ro": pairs, "ru": pairs[:12], "fi": few})
    assert found["languages"] == ["ro", "ru", "en"] and found["n"] == 30 + 12 + 30
    assert found["prior"] == 10 / 24 and len(found["map"]["ru"]) == 12       # every third row is for testing: 10, 4 and 10


def test_geometry_measures_against_closed_forms():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 8))
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert neutrality.cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    assert neutrality.cka(x, rng.normal(size=(500, 8))) < 0.05
    exact, _ = np.linalg.qr(x - x.mean(0))
    assert neutrality.effective_rank(exact) == pytest.approx(8, rel=1e-6)
    assert neutrality.effective_rank(np.outer(np.arange(9.0), np.ones(4))) == pytest.approx(1, rel=1e-6)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(500, dtype=bool)].mean()
    assert neutrality.mean_cosine(x) == pytest.approx(pairs, abs=1e-12)
    assert neutrality.mean_cosine(np.ones((5, 3))) == pytest.approx(1)


# ---- plans and assignment -----------------------------------------------------------------------------------

def test_plan_cuts_in_the_order_it_says():
    wanted, step = finetune.Plan(400, (1e-5, 1e-4, 1e-3), 3), {finetune.BATCH: 4.0, finetune.SMALL: 1.0}
    cut = lambda seconds: finetune.plan(wanted, seconds, step, 2.0, 20.0)  # noqa: E731
    assert cut(float("inf")) == cut(10 ** 6) == wanted
    for seconds in (100, 200, 400, 800, 1600, 3200, 8000):
        plan = cut(seconds)
        runs = len(plan.rates) + plan.seeds - 1
        spent = runs * (plan.steps * step[plan.batch] + finetune.CHECKS * 2) + plan.seeds * plan.share * 20
        assert spent <= seconds or plan.steps == 1, (seconds, plan, spent)
    # Smaller batches before fewer steps, and both before fewer learning rates.
    assert cut(8000) == finetune.Plan(400, wanted.rates, 3, batch=finetune.SMALL)
    assert cut(1600) == finetune.Plan(int(((0.85 * 1600 - 60) / 5 - 16)), wanted.rates, 3, batch=finetune.SMALL)
    assert cut(10).share == pytest.approx(finetune.TESTING * 8.5 / 60)
    # One rate, and all seeds as long as a sixth of the steps is left; then fewer seeds.
    some, few = cut(800), cut(300)
    assert some.rates == (1e-4,) and few.rates == (1e-3,) and (some.seeds, few.seeds) == (3, 2)   # fewer steps, higher rate
    assert some.steps * 1e-3 > finetune.REACH >= max(some.steps * 1e-4, few.steps * 1e-3)
    assert min(some.steps, few.steps) >= 400 / 6
    # Two at a time: with one rate the second seed costs no time.
    one, two, three = (finetune.plan(finetune.Plan(400, (1e-4,), seeds), 250, step, 2.0, 0.1, 2) for seeds in (1, 2, 3))
    assert 400 > one.steps >= two.steps > one.steps - 2 and three.seeds == 3 and 0.3 < three.steps / one.steps < 0.5


def test_as_many_runs_at_once_as_leave_no_core_idle(monkeypatch):
    monkeypatch.setattr(finetune, "cores", lambda: 2)
    for runs, workers in ((1, 1), (2, 2), (3, 3), (4, 2), (8, 2)):
        pool, found = finetune.pool("cpu", runs)
        if pool:
            pool.shutdown()
        assert found == workers, runs


def test_training_data_are_found_or_made():
    class DataSet:
        def __init__(self, name, source=None):
            self.name, self.source = name, source
    class Notes:
        def note(self, text, say):
            notes.append(text)
    notes = []
    pairs = [nli.Pair(str(i), "b", ("entailment", "neutral")[i % 2]) for i in range(100)]
    odd = [nli.Pair("a", "b", "1")] * 9
    sets = [(DataSet("nli/a"), {"en": {"train": pairs, "dev": pairs[:5], "test": pairs[:7]}, "fr": {"dev": pairs}}),
            (DataSet("nli/b"), {"sw": {"train": pairs, "test": pairs[:8]}}), (DataSet("nli/c"), {"en": {"test": odd}})]
    training, = run.assign("nli", sets, Notes(), print)
    assert (training.train, training.dev) == (pairs, pairs[:5])
    assert [t[:3] for t in training.targets] == [("nli/a", "en", "test"), ("nli/a", "fr", "dev"), ("nli/b", "sw", "test")]
    assert "nli/c" in notes[0]
    # No training set: English dev; a tenth of it is held out, and it is not scored.
    training, = run.assign("nli", [(DataSet("nli/x"), {"en": {"dev": pairs, "test": pairs[:9]}})], Notes(), print)
    assert len(training.train) == 90 and len(training.dev) == 10 and [t[2] for t in training.targets] == ["test"]
    # Only English test articles: half are for training, and no article is on both sides.
    questions = [qa.Question(str(i), i // 5, "c", "q", (qa.Answer("c", 0),)) for i in range(200)]
    training, = run.assign("qa", [(DataSet("qa/x"), {"en": {"test": questions}})], Notes(), print)
    sides = [{q.article for q in part} for part in (training.train, training.dev, training.targets[0][3])]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2] and all(sides)
    # In parallel data the other languages' places are the same: no translation of a training article is scored.
    parallel = {code: {"test": [qa.Question(code, i // 5, "c", "q", (qa.Answer("c", 0),)) for i in range(200)]}
                for code in ("en", "de")}
    training, = run.assign("qa", [(DataSet("qa/x"), parallel)], Notes(), print)
    learnt = {q.article for q in training.train + training.dev}
    assert [len(t[3]) for t in training.targets] == [100, 100] and not learnt & {q.article for q in training.targets[1][3]}
    training, = run.assign("nli", [(DataSet("nli/x"), {"en": {"dev": pairs}, "de": {"dev": pairs}, "fr": {"dev": pairs[:1]}})],
                           Notes(), print)
    assert training.targets[0][:3] == ("nli/x", "de", "dev") and training.targets[0][3] == training.dev
    # One that lacks a row was drawn in another order: where articles are known they still tell, else it is left out.
    parallel["de"]["test"] = run.drawn(parallel["de"]["test"][1:])
    parallel["en"]["test"] = run.drawn(parallel["en"]["test"])
    training, = run.assign("qa", [(DataSet("qa/x"), parallel)], Notes(), print)
    learnt = {q.article for q in training.train + training.dev}
    assert learnt and training.targets[1][1] == "de" and not learnt & {q.article for q in training.targets[1][3]}
    mixed = [nli.Pair("a", str(i), ("entailment", "neutral", "contradiction")[i % 3]) for i in range(100)]
    sets = [(DataSet("nli/x"), {"en": {"test": mixed}, "de": {"test": mixed[1:]}, "fr": {"test": mixed}})]
    training, = run.assign("nli", sets, Notes(), print)
    assert [t[1] for t in training.targets] == ["en", "fr"] and "translation" in notes[-1] and notes[-1].endswith(": de")
    alone = [(DataSet("nli/x"), {"en": {"train": mixed}})]
    with pytest.raises(ValueError, match="nothing to score"):
        run.assign("nli", alone, Notes(), print)
    training, = run.assign("nli", [*alone, (DataSet("nli/y"), {"de": {"test": mixed}})], Notes(), print)
    assert [t[:2] for t in training.targets] == [("nli/y", "de")]
    with pytest.raises(ValueError, match="names no source"):
        run.assign("sts", [(DataSet("sts/x"), {"de": {"test": []}})], Notes(), print)


def test_training_in_language_and_on_all():
    class DataSet:
        def __init__(self, name):
            self.name, self.source = name, None
    class Notes:
        def note(self, text, say):
            notes.append(text)
    def pairs(code, count):
        return [nli.Pair(code, str(i), ("entailment", "neutral")[i % 2]) for i in range(count)]
    notes = []
    sets = [(DataSet("nli/a"), {"en": {"train": pairs("en", 50), "dev": pairs("en", 3), "test": pairs("en", 7)},
                                "fr": {"train": pairs("fr", 20), "test": pairs("fr", 5)}, "sw": {"test": pairs("sw", 4)},
                                "de": {"train": pairs("de", 30)}}),
            (DataSet("nli/b"), {"ro": {"test": pairs("ro", 8)}})]
    english, french = run.assign("nli", sets, Notes(), print, "target")
    assert (english.source, len(english.train), len(english.dev)) == ("en", 50, 3)
    assert (french.source, len(french.train), len(french.dev)) == ("fr", 18, 2)      # no dev: every tenth of train
    assert [[t[:3] for t in training.targets] for training in (english, french)] == [
        [("nli/a", "en", "test")], [("nli/a", "fr", "test")]]
    assert notes == ["nli/a: no training data, so left out: de, sw", "nli/b: no training data, so left out: ro"]
    every, = run.assign("nli", sets, Notes(), print, "all")
    assert (every.source, len(every.train), len(every.dev)) == ("en+fr+de", 50 + 18 + 27, 3 + 2 + 3)
    assert [e.premise for e in every.dev[:4]] == ["en", "fr", "de", "en"]            # they take turns
    assert [t[:3] for t in every.targets] == [("nli/a", "en", "test"), ("nli/a", "fr", "test"), ("nli/a", "sw", "test"),
                                              ("nli/b", "ro", "test")]
    for train_on in ("target", "all"):
        with pytest.raises(ValueError, match=f"--train-on {train_on} needs"):
            run.assign("nli", sets[1:], Notes(), print, train_on)


def test_train_on_is_recorded_and_compared(folder, tmp_path):
    """English and Romanian have training data: each a model of its own, or both one."""
    for code, split in (("en", "train"), ("en", "test"), ("ro", "train"), ("ro", "test"), ("fi", "test")):
        rows = ["\t".join(row) for row in atlas.nli(code, split)[:24]]
        (tmp_path / "data/nli/x").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/nli/x/{code}.{split}.tsv").write_text("\n".join(["premise\thypothesis\tlabel", *rows]))
    options = ["--model", folder / "model", "--data", tmp_path / "data", "--tasks", "nli", "--seeds", 1, "--rates", "1e-4"]
    with pytest.MonkeyPatch.context() as patch:
        each_trains(patch, epochs=1)
        for train_on, sources, scored in (("target", ["en", "ro"], {"en", "ro"}), ("all", ["en+ro"], {"en", "ro", "fi"})):
            path = tmp_path / f"{train_on}.json"
            done = command("run", *options, "--train-on", train_on, "--out", path)
            assert done.exit_code == 0, done.output
            value = report.load(path)
            assert value["settings"]["train_on"] == train_on and [t["source"] for t in value["training"]] == sources
            assert {c["language"] for c in value["cells"]} == scored
        done = command("run", *options, "--like", path, "--out", tmp_path / "x.json")
        assert done.exit_code == 2 and "made with --train-on all" in done.output and not (tmp_path / "x.json").exists()
    assert [(t["examples"], t["dev_examples"]) for t in value["training"]] == [(44, 4)]
    done = command("compare", tmp_path / "target.json", tmp_path / "all.json")
    assert "train_on: 'target' in the baseline, 'all' in the candidate" in done.output


def test_what_stays_of_a_split_is_drawn_and_parallel(tmp_path):
    """Files are sorted by genre, here captions, forums, news; what is cut keeps some of each, and the same of all languages."""
    genres = np.repeat(["caption", "forum", "news"], 40)
    (tmp_path / "sts").mkdir()
    for code in ("de", "en"):
        rows = "".join(f"{code} {genre} {i},b,{i % 6}\n" for i, genre in enumerate(genres))
        (tmp_path / f"sts/sts-{code}-test.csv").write_text(rows)
    [(_, whole)] = run.load(tmp_path, "sts")
    [(_, cut)] = run.load(tmp_path, "sts", 30)
    texts = {code: [e.sentence1.split()[1:] for e in splits["test"]] for code, splits in whole.items()}
    assert texts["de"] == texts["en"] and sorted(int(i) for _, i in texts["de"]) == list(range(120))
    assert all(splits["test"] == whole[code]["test"][:30] for code, splits in cut.items())
    counts = [[genre for genre, _ in texts["de"][:30]].count(genre) for genre in ("caption", "forum", "news")]
    assert min(counts) >= 5


def test_a_language_with_training_data_alone_is_not_scored(folder, tmp_path):
    rows = "".join(f"a {i},b {i},{i % 6}\n" for i in range(12))
    (tmp_path / "sts").mkdir()
    for name in ("en-train", "de-test"):
        (tmp_path / f"sts/sts-{name}.csv").write_text(rows)
    (tmp_path / "sts/sts-fr-test.csv").write_text("a,b,1\n")               # nor is one of one example, which is said
    with pytest.MonkeyPatch.context() as patch:
        each_trains(patch, epochs=1)
        done = command("run", "--model", folder / "model", "--data", tmp_path, "--tasks", "sts", "--seeds", 1, "--rates", "1e-4",
                       "--budget", "60s", "--out", tmp_path / "o.json")
    assert done.exit_code == 0, done.output
    assert [(c["task"], c["language"]) for c in report.load(tmp_path / "o.json")["cells"]] == [("sts-cosine", "de"), ("sts", "de")]
    assert "note: sts fr test: 1 example: left out" in done.output
