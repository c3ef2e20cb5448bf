"""The atlas: every language renders, labels are right, splits are disjoint, two runs give the same bytes."""

import csv
import hashlib
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import atlas

CODES = atlas.languages()
each_language = pytest.mark.parametrize("code", CODES)


def all_sentences(code, facts):
    language = atlas.load(code)
    patterns = {relation: part["patterns"] for relation, part in language.relations.items()}
    return {f: [atlas.render(language, f, p) for p in patterns[f.relation]] for f in facts}


def test_atlas_facts_are_complete_and_consistent():
    facts = atlas.facts()
    assert len({f[:3] for f in facts}) == len(facts) > 600
    for relation, spec in atlas.schema()["relations"].items():
        assert all(kind in atlas.schema()["tags"] for kind in spec["slots"].values())
        if spec["functional"]:
            assert all(isinstance(o, str) for o in spec["facts"].values()), relation
        for split in ("train", "test"):
            assert any(f.relation == relation and f.split == split for f in facts), (relation, split)
    borders = {(f.subject, f.object) for f in facts if f.relation == "borders"}
    assert not borders & {(b, a) for a, b in borders}, "one half of a border would tell the other"


def test_atlas_splits_share_no_subject_and_hold_out_half_of_test():
    split = {}
    for f in atlas.facts():
        assert split.setdefault((atlas.subject_type(f.relation), f.subject), f.split) == f.split
        assert f.split == "test" or not f.held_out
    held_out = sum(f.held_out for f in atlas.facts())
    tested = sum(f.split == "test" for f in atlas.facts())
    assert 60 <= held_out and 0.45 <= held_out / tested <= 0.55


@each_language
def test_atlas_every_pattern_renders(code):
    language = atlas.load(code)
    texts = []
    for fact in atlas.facts():
        spec = language.relations[fact.relation]
        for pattern in spec["patterns"] + [spec["negation"], spec["question"]]:
            sentence = atlas.render(language, fact, pattern)
            assert not set("{}[]|\t\n\"") & set(sentence.text), sentence.text
            assert "  " not in sentence.text and sentence.text == sentence.text.strip()
            assert unicodedata.is_normalized("NFC", sentence.text)
            for start, end in sentence.spans.values():
                assert sentence.text[start:end].strip() == sentence.text[start:end] != ""
            texts.append(sentence.text)
    assert len(set(texts)) >= 700
    letters = [char for text in texts for char in text if char.isalpha()]
    own = sum(unicodedata.name(c, "").startswith(atlas.SCRIPTS[language.script]) for c in letters)
    assert own / len(letters) >= 0.8, f"{own / len(letters):.0%} of letters are {language.script}"


@each_language
def test_atlas_names_are_unique_within_a_type(code):
    for kind, names in atlas.load(code).names.items():
        bases = [next(iter(forms.values()))[0] for forms in names.values()]
        assert len(bases) == len(set(bases)), kind


def test_atlas_corpus_never_states_a_held_out_fact():
    corpus = atlas.corpus()
    held_out = [f for f in atlas.facts() if f.held_out]
    stated = [f for f in atlas.facts() if not f.held_out]
    for code in CODES:
        text = "\n".join(corpus[code])
        for sentences in all_sentences(code, held_out).values():
            for sentence in sentences:
                assert sentence.text not in text, (code, sentence.text)
        known = sum(any(s.text in text for s in v) for v in all_sentences(code, stated).values())
        assert known >= 0.9 * len(stated), f"{code}: the corpus states {known} of {len(stated)} facts"


def test_atlas_corpus_counts():
    corpus = atlas.corpus()
    distinct = 0
    for code, documents in corpus.items():
        assert len(documents) == len(set(documents)) > 200
        assert not any("\n" in d or not d.strip() for d in documents)
        text = "\n".join(documents)
        distinct += sum(s.text in text for v in all_sentences(code, atlas.facts()).values() for s in v)
    assert distinct >= 1100 * len(CODES)
    assert len({d for ds in corpus.values() for d in ds}) == sum(map(len, corpus.values()))


def test_atlas_tokens_follow_the_rule():
    def split(text):
        return [t for t, _, _ in atlas.tokens(text)]

    assert split("L'Italie, c'est ça.") == ["L", "'", "Italie", ",", "c", "'", "est", "ça", "."]
    assert split("巴黎是1周。") == ["巴", "黎", "是", "1", "周", "。"]
    assert split("ที่นี่") == ["ที่", "นี่"], "a Thai letter and its marks"
    assert split("भारत की राजधानी") == ["भारत", "की", "राजधानी"]
    assert split("می\u200cشود") == ["می\u200cشود"]


@each_language
def test_atlas_ner_tags_align(code):
    language = atlas.load(code)
    kinds = {"B-" + t for t in ("PER", "LOC", "ORG", "MISC")}
    kinds |= {"I" + k[1:] for k in kinds} | {"O"}
    rows = atlas.ner(code, "test")
    assert len(rows) == atlas.SIZES["ner"]["test"]
    found = set()
    people = {"".join(surface[a:b].split()) for forms in language.names["person"].values()
              for surface, a, b in forms.values()}
    for words, tags in rows:
        assert len(words) == len(tags) and set(tags) <= kinds
        previous = "O"
        for tag in tags:
            assert tag[0] != "I" or previous[1:] == tag[1:], (words, tags)
            previous = tag
        found |= {t[2:] for t in tags if t != "O"}
        if "B-PER" in tags:
            name = "".join(w for w, t in zip(words, tags) if t.endswith("PER"))
            assert any(person in name for person in people), name
    assert found == {"PER", "LOC", "ORG", "MISC"}


@each_language
def test_atlas_nli_says_nothing_by_the_hypothesis_alone(code):
    rows = atlas.nli(code, "test")
    labels = {}
    for premise, hypothesis, label in rows:
        assert premise and "\t" not in premise + hypothesis
        labels.setdefault(hypothesis, []).append(label)
    for hypothesis, given in labels.items():
        assert len({given.count(label) for label in atlas.LABELS}) == 1, hypothesis
    by_pair = {}
    for premise, hypothesis, label in rows:
        assert by_pair.setdefault((premise, hypothesis), label) == label, "one pair, two labels"


def test_atlas_nli_hypothesis_only_baseline_is_chance():
    accuracy = atlas.hypothesis_only(atlas.nli("en", "train"), atlas.nli("en", "test"))
    print(f"hypothesis-only accuracy {accuracy:.3f}, chance {1 / 3:.3f}")
    assert abs(accuracy - 1 / 3) < 1e-9


@each_language
def test_atlas_qa_offsets_are_exact(code):
    ids, several = set(), 0
    for article in atlas.qa(code, "test")["data"]:
        context, question = article["paragraphs"][0]["context"], article["paragraphs"][0]["qas"][0]
        answer = question["answers"][0]
        start = answer["answer_start"]
        assert context[start:start + len(answer["text"])] == answer["text"] != ""
        assert answer["text"] not in question["question"]
        ids.add(question["id"])
        several += len(context) > 3 * len(answer["text"])
    assert len(ids) == atlas.SIZES["qa"]["test"] == several


@each_language
def test_atlas_sts_scores(code):
    rows = atlas.sts(code, "test")
    scores = [score for _, _, score in rows]
    assert len(rows) == atlas.SIZES["sts"]["test"] and min(scores) == 0 and max(scores) == 5
    assert len(set(scores)) >= 6
    assert all(a != b for a, b, _ in rows)


def test_atlas_sts_scores_are_the_overlap_of_the_facts():
    """The facts are read back from the texts, whose sentences are all known."""
    facts = [f for f in atlas.facts() if f.split == "test"]
    sentences = {s.text: f for f, found in all_sentences("en", facts).items() for s in found}
    for *texts, score in atlas.sts("en", "test"):
        a, b = ([f for s, f in sentences.items() if f" {s} " in f" {text} "] for text in texts)
        assert 1 <= len(a) <= 3 and len(a) == len(set(a)) and b and len(b) == len(set(b)), texts
        same = (atlas.subject_type(a[0].relation), a[0].subject) == (atlas.subject_type(b[0].relation), b[0].subject)
        expected = round(1 + 8 * len({*a} & {*b}) / (len(a) + len(b)), 2) if same else 0.5 * ({f.relation for f in b} <= {f.relation for f in a})
        assert score == expected, (texts, score, expected)


@pytest.mark.parametrize("task", ["ner", "nli", "qa", "sts"])
def test_atlas_english_train_shares_no_sentence_of_test(task):
    """What a test example states stands in no train example (subjects are disjoint)."""
    train = repr(getattr(atlas, task)("en", "train")) if task != "ner" else "\n".join(
        " ".join(words) for words, _ in atlas.ner("en", "train"))
    tested = [f for f in atlas.facts() if f.split == "test"]
    for sentences in all_sentences("en", tested).values():
        for sentence in sentences:
            text = sentence.text if task != "ner" else " ".join(t for t, _, _ in atlas.tokens(sentence.text))
            assert text not in train, text


def test_atlas_parallel_lines_state_one_fact_each():
    lines = atlas.parallel(200, seed=1)
    assert set(lines) == set(CODES) and {len(v) for v in lines.values()} == {200}
    assert all(len(set(v)) == 200 for v in lines.values())
    owner = {s.text: f for f, v in all_sentences("en", atlas.facts()).items() for s in v}
    held_out = {f for f in atlas.facts() if f.held_out}
    assert {owner[line] for line in lines["en"]} >= held_out
    for code in CODES:
        own = {s.text: f for f, v in all_sentences(code, atlas.facts()).items() for s in v}
        assert [own[line] for line in lines[code]] == [owner[line] for line in lines["en"]]
    with pytest.raises(ValueError, match="only"):
        atlas.parallel(100000)


def test_atlas_writes_the_same_bytes_twice(tmp_path):
    root = Path(atlas.__file__).parent.parent
    script = "import sys, atlas; atlas.write(sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)], cwd=root, env={"PYTHONHASHSEED": hashing})
            for name, hashing in (("a", "1"), ("b", "2"))]
    assert [process.wait() for process in both] == [0, 0]
    files = {name: {p.relative_to(tmp_path / name): hashlib.sha256(p.read_bytes()).hexdigest()
                    for p in sorted((tmp_path / name).rglob("*")) if p.is_file()} for name in "ab"}
    assert files["a"] == files["b"]
    assert len(files["a"]) == len(CODES) * 5 + 2 * 4 + 2 * (len(CODES) - 1)
    evaluation = tmp_path / "a" / "eval"
    header = (evaluation / "nli/atlas/en.train.tsv").read_text(encoding="utf-8").split("\n")[0]
    assert header == "premise\thypothesis\tlabel"
    with open(evaluation / "sts/atlas/sts-en-test.csv", encoding="utf-8", newline="") as file:
        assert all(len(row) == 3 and 0 <= float(row[2]) <= 5 for row in csv.reader(file))
    squad = json.loads((evaluation / "qa/atlas/atlas.en.test.json").read_text(encoding="utf-8"))
    assert squad["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    assert atlas.corpus(0) != atlas.corpus(1)


def test_atlas_showcase_asks_by_rule_and_fills_each_mask(tmp_path):
    """The questions are a function of facts and tokenizer alone; the model answers each as if it stood alone."""
    import torch
    from atlas.showcase import fill, questions
    from data import MASK, load_tokenizer, train_tokenizer
    from unibert import UniBERT, UniBERTConfig
    sentences = all_sentences("ru", atlas.facts())
    (tmp_path / "tokenizer.model").write_bytes(train_tokenizer((s.text for v in sentences.values() for s in v), 1000))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    rendered = {f: s[0].text for f, s in sentences.items() if f.relation == "continent"}
    asked = {kind: questions("ru", tokenizer, "continent", held_out=kind == "held out", told=kind == "told")
             for kind in ("stated", "told", "held out")}
    for kind, found in asked.items():
        allowed = {text for f, text in rendered.items() if f.held_out == (kind == "held out")}
        assert found
        for text, ids, place, answer in found:
            word = tokenizer.id_to_piece(answer).strip("\u2581")
            assert ids[place] == MASK and ids.count(MASK) == 1
            filled = text.replace("[MASK]", word)
            assert tokenizer.decode([*ids[:place], answer, *ids[place + 1:]]) == filled
            assert filled in allowed if kind != "told" else any(filled.endswith(s) and filled != s for s in allowed)
    torch.manual_seed(0)
    model = UniBERT(UniBERTConfig.preset("tiny", vocab_size=1000, n_languages=1, max_length=64)).eval()
    p, pieces = fill(model, asked["told"])
    assert len(p) == len(asked["told"]) and ((0 < p) & (p < 1)).all()
    assert pieces.tolist() == [fill(model, [question])[1].item() for question in asked["told"]]


@pytest.mark.parametrize("change, message", [
    (lambda d: d["names"]["country"].pop("france"), "names.country.france: missing"),
    (lambda d: d["names"]["city"].update(paris="London"), "same name as"),
    (lambda d: d["names"]["city"].update(atlantis="Atlantis"), "names.city.atlantis: no such entity"),
    (lambda d: d["names"]["city"].update(paris="Paris | Paree"), "names.city.paris: has 2 columns"),
    (lambda d: d["names"]["river"].update(nile="the [Nile"), "brackets"),
    (lambda d: d["names"]["city"].update(paris="Pari\u0073\u030c"), "NFC"),
    (lambda d: d["relations"].pop("born"), "relations.born.patterns: missing"),
    (lambda d: d["relations"]["born"].update(question="When?"), "must use person"),
    (lambda d: d["relations"]["born"].update(negation="{person} {yaer}."), "unknown slot {yaer}"),
    (lambda d: d["relations"]["city"]["patterns"].append("{city:gen} {country}."), "no form 'gen'"),
    (lambda d: d.update(script="Runic"), "script"),
])
def test_atlas_bad_language_file_is_named_in_one_line(tmp_path, change, message):
    data = json.loads((atlas.HERE / "languages" / "en.json").read_text(encoding="utf-8"))
    data["code"] = "xx"
    change(data)
    (tmp_path / "xx.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(ValueError) as error:
        atlas.load("xx", tmp_path)
    assert str(error.value).startswith("xx.json: ") and message in str(error.value)
    assert "\n" not in str(error.value)
