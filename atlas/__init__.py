"""The atlas: a small true encyclopedia that writes itself in many languages, with tasks whose answers are known.

`facts.json` holds language-independent facts (relation, subject, object). `languages/<code>.json` holds the
names of all entities and, per relation, sentence patterns, a negation and a question. From the two come, with
nothing to download: a training corpus, parallel sentences for retrieval, and NER, NLI, QA and STS sets.
Everything is a pure function of (facts, language files, seed): two runs give the same bytes.

Splits. Every *subject* (a country, a person, an animal ...) belongs to train, dev or test, and all its facts
with it, so the tasks' splits never share a fact. Of each test subject's facts every second one is *held out*: no
sentence of the corpus states it, in any language. The corpus states all other facts, test facts included.
"""

import csv
import io
import json
import os
import random
import re
from pathlib import Path

from .tasks import LABELS, SIZES, hypothesis_only, ner, nli, qa, sts, tokens
from .world import HERE, SCRIPTS, deny, entities, facts, languages, load, render, say, schema, subject_type

__all__ = ["corpus", "parallel", "write", "ner", "nli", "qa", "sts", "tokens", "hypothesis_only",
           "LABELS", "SIZES", "HERE", "SCRIPTS", "entities", "facts", "languages", "load", "render", "schema",
           "subject_type"]


def corpus(seed=0):
    """Training text. -> {code: documents}; a document is one line of a few sentences about one entity.

    A language gets about two thirds of the wordings, drawn by itself: the texts are comparable, not parallel.
    Besides statements there are questions with their answers and true negations.
    """
    return {code: _documents(load(code), random.Random(f"corpus/{seed}/{code}")) for code in languages()}


def _documents(language, rng):
    relations = schema()["relations"]
    topics = {}  # entity -> fact -> sentences
    for fact in facts():
        if fact.held_out:
            continue
        kinds = relations[fact.relation]["slots"].values()
        ends = [(kind, key) for kind, key in zip(kinds, (fact.subject, fact.object)) if kind != "year"]
        items = [render(language, fact, p).text for p in language.relations[fact.relation]["patterns"]
                 if rng.random() < 2 / 3]
        if rng.random() < 1 / 3:
            question = render(language, fact, language.relations[fact.relation]["question"]).text
            items.append(question + language.join + say(language, fact, rng)[0].text)
        if relations[fact.relation]["functional"] and rng.random() < 1 / 3:
            items.append(deny(language, fact, rng).text)
        for item in items:
            topics.setdefault(rng.choice(ends), {}).setdefault(fact, []).append(item)
    documents = []
    for by_fact in topics.values():
        queue = []
        for items in by_fact.values():
            rng.shuffle(items)
        for turn in range(max(map(len, by_fact.values()))):  # a document rarely says one thing twice
            round_ = [items[turn] for items in by_fact.values() if turn < len(items)]
            rng.shuffle(round_)
            queue += round_
        while queue:
            size = len(queue) if len(queue) <= 5 else rng.randint(3, min(5, len(queue) - 2))
            documents.append(language.join.join(queue[:size]))
            del queue[:size]
    rng.shuffle(documents)
    return documents


def parallel(n=300, seed=0):
    """Aligned sentences. -> {code: n sentences}; line i states the same fact everywhere and no other line does.

    The held-out facts come first, then the other test facts, then the rest. ValueError if n is too large.
    """
    if n > len(facts()):
        raise ValueError(f"parallel: n is {n}, but there are only {len(facts())} facts")
    rng = random.Random(f"parallel/{seed}")
    ranked = sorted(facts(), key=lambda f: (not f.held_out, f.split != "test", rng.random()))[:n]
    return {code: [say(load(code), f, random.Random(f"parallel/{seed}/{code}/{f}"))[0].text for f in ranked]
            for code in languages()}


def write(folder, seed=0, codes=None):
    """Write text/ and eval/ under `folder` in the layouts of the real data sets.

    English has train, dev and test, the others test. codes: these languages only, English among them.
    -> {code: (documents, characters)}
    """
    folder = Path(folder)
    documents = {code: texts for code, texts in corpus(seed).items() if codes is None or code in codes}
    for code, texts in documents.items():
        _write(folder / "text" / f"{code}.txt", "\n\n".join(texts) + "\n")
        for split in ("train", "dev", "test") if code == "en" else ("test",):
            _write(folder / f"eval/ner/atlas/{code}.{split}.tsv", "\n".join(
                "".join(f"{token}\t{tag}\n" for token, tag in zip(*example)) for example in ner(code, split)))
            _write(folder / f"eval/nli/atlas/{code}.{split}.tsv", "premise\thypothesis\tlabel\n" + "".join(
                "\t".join(row) + "\n" for row in nli(code, split)))
            _write(folder / f"eval/qa/atlas/atlas.{code}.{split}.json",
                   json.dumps(qa(code, split), ensure_ascii=False) + "\n")
            table = io.StringIO()
            csv.writer(table).writerows(sts(code, split))
            _write(folder / f"eval/sts/atlas/sts-{code}-{split}.csv", table.getvalue())
    lines = parallel(seed=seed)
    for code in documents:
        if code != "en":
            for side in (code, "en"):
                _write(folder / f"eval/retrieval/atlas/atlas.{code}-en.{side}", "\n".join(lines[side]) + "\n")
    return {code: (len(texts), sum(map(len, texts))) for code, texts in documents.items()}


def describe(folder):
    """What `write` put under `folder`: lines of text, a language each, then the sizes of the tasks."""
    folder, sentences, codes = Path(folder), 0, []
    yield f"{'code':6}{'language':12}{'script':12}{'family':28}{'documents':>10}{'sentences':>10}{'characters':>11}"
    for path in sorted((folder / "text").glob("*.txt")):
        language, text = load(path.stem), path.read_text(encoding="utf-8")
        distinct = len({part for part in re.split(r"(?<=[.!?。？।።؟։;])\s*", text) if part.strip()})
        sentences += distinct
        codes.append(path.stem)
        documents = text.count("\n\n") + 1
        yield (f"{path.stem:6}{language.name:12}{language.script:12}{language.family:28}{documents:>10,}{distinct:>10,}"
               f"{len(text):>11,}")
    yield f"{len(codes)} languages, {len({load(c).script for c in codes})} scripts, {sentences:,} distinct sentences"
    tasks = {"ner": ner, "nli": nli, "qa": lambda *which: qa(*which)["data"], "sts": sts}      # qa: a question an article
    for name, task in tasks.items():
        train, dev, test = (len(task("en", split)) for split in ("train", "dev", "test"))
        yield f"{name}: en train {train:,}, dev {dev:,}; test {test:,} in each language"
    chance = hypothesis_only(nli("en", "train"), nli("en", "test"))
    yield f"nli from the hypothesis alone: {chance:.1%} right (three labels)"


def _write(path, text):
    from files import write_atomically                   # here, because it imports torch: the text alone does without
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, [text.encode()])
