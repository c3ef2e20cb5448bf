"""The readers of eval/: public layouts, names, and one clear line for bad input."""
import json
import os
import re
from pathlib import Path

import pytest

from eval import ner, nli, qa, retrieval, sts, tasks

SHARED = Path(os.environ.get("UNIBERT_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "eval"


def write(folder, files):
    """{relative name: text or JSON value} -> files below folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return folder


def refuse(load, folder, *words):
    """load(folder) has to raise one ValueError line that contains all words."""
    with pytest.raises(ValueError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and all(w in message for w in words), message


def squad(*questions, context="Paris is in France."):
    """SQuAD JSON of (id, answer text, start)."""
    qas = [{"id": i, "question": "Where?", "answers": [{"text": t, "answer_start": s}]} for i, t, s in questions]
    return {"version": "1.1", "data": [{"title": "a", "paragraphs": [{"context": context, "qas": qas}]}]}


# ---- names --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, expected", [
    ("ru.test.tsv", ("ru", "test")), ("en.val.tsv", ("en", "dev")), ("hau.dev.tsv", ("hau", "dev")),
    ("zh_ocnli.dev.tsv", ("zh", "dev")), ("en_sick.train.tsv", ("en", "train")), ("tr_tquad.dev.json", ("tr", "dev")),
    ("xquad.ar.json", ("ar", None)), ("stsb-de-dev.csv", ("de", "dev")), ("dev_2k.tsv", (None, "dev")),
    ("translated_train.tsv", (None, "train")), ("multinli.train.sw.tsv", ("sw", "train")),
    ("xnli.dev.tsv", (None, "dev")), ("tydiqa-goldp-dev-english.json", ("en", "dev")),
    ("tydiqa-goldp-v1.1-train.json", (None, "train")), ("tydiqa.goldp.bn.dev.json", ("bn", "dev")),
    ("zh-min-nan.test.tsv", ("zh-min-nan", "test")), ("xquad.zh-Hans.json", ("zh-hans", None)),
    ("my_data.en.test.tsv", ("en", "test")), ("mt.test.tsv", ("mt", "test")), ("train_en.tsv", ("en", "train")),
    ("my_data.tsv", (None, None)), ("stsb_mt_de.csv", ("de", None)), ("my.test.tsv", ("my", "test")),
    ("test-00000-of-00001.jsonl", (None, "test")),
])
def test_parse_name(name, expected):
    assert tasks.parse_name(name) == expected


def test_find(tmp_path):
    row = "a b c.,d e.,1\nf g.,h i.,2\n"
    write(tmp_path, {"sts/stsb/stsb-de-dev.csv": row, "sts/en_other/test.csv": row, "sts/PROVENANCE.txt": "", "sts/checksums": "",
                     "ner/en/train": "a\tO\n", "ner/de/test": "a\tO\n", "nli/en.test.tsv": "a\tb\tneutral\n",
                     "far/sts/ru.test.csv": row})
    assert [d.name for d in tasks.find(tmp_path, "sts")] == ["sts/en_other", "sts/stsb"]
    assert [d.name for d in tasks.find(tmp_path, "ner")] == ["ner"]              # language folders: one data set
    assert [d.folder for d in tasks.find(tmp_path, "nli")] == [tmp_path / "nli"]
    refuse(lambda d: tasks.find(d, "qa"), tmp_path, "no data for qa")
    assert tasks.present(tmp_path) == ["ner", "nli", "sts"]
    refuse(tasks.present, tmp_path / "far/sts", "no folder of a task", "ner, nli")
    write(tmp_path, {"tasks.json": {"sts/stsb": {"source": "de", "splits": {"dev": "train"}},
                                    "sts/far": {"folder": "far/sts"}, "qa/far": {"folder": "far/qa"}}})
    assert tasks.present(tmp_path) == ["ner", "nli", "qa", "sts"]
    other, far, stsb = tasks.find(tmp_path, "sts")
    assert (stsb.source, other.source, far.folder) == ("de", None, tmp_path / "far/sts")
    assert list(sts.load(stsb.folder, stsb.splits)["de"]) == ["train"] and list(sts.load(far.folder)) == ["ru"]


@pytest.mark.parametrize("text, words", [
    ("{", ["tasks.json:1", "not JSON"]), ("[]", ["tasks.json", "expected an object"]),
    ('{"sst/x": {}}', ["sst/x", "ner, nli, qa, sts, retrieval"]), ('{"sts/x": {}}', ["sts/x", "no such folder"]),
    ('{"sts/x": {"sauce": "en"}}', ["sts/x", "source, splits or folder"]),
    ('{"sts/x": {"splits": {"dev": "trian"}}}', ["sts/x", "trian"]), ('{"sts/x": {"splits": []}}', ["sts/x", "[]"]),
    ('{"sts/x": {"folder": 5}}', ["sts/x", "folder is a text, not 5"]),
])
def test_bad_settings(tmp_path, text, words):
    refuse(lambda d: tasks.find(d, "sts"), write(tmp_path, {"tasks.json": text, "sts/y/en.csv": "a,b,1\n"}), *words)


@pytest.mark.parametrize("load, name, text", [
    (ner.load, "en.test.tsv", "a\tB-PER\n"), (nli.load, "en.test.tsv", "a\tb\tneutral\n"),
    (sts.load, "en.test.csv", "a,b,1\n"), (qa.load, "en.test.json", squad(("1", "Paris", 0))),
])
def test_every_reader_refuses(tmp_path, load, name, text):
    suffix = Path(name).suffix
    assert set(load(write(tmp_path / "good", {name: text, "README.md": "x", "LICENSE": "x"}))["en"]) == {"test"}
    refuse(load, write(tmp_path / "empty", {name: ""}), name, "empty")
    refuse(load, write(tmp_path / "nothing", {"README.md": "x"}), "no data file", suffix)
    refuse(load, write(tmp_path / "who", {f"data{suffix}": text}), f"data{suffix}", "language", f"en.test{suffix}")
    refuse(load, write(tmp_path / "twice", {f"en_a{suffix}": text, f"en_b{suffix}": text}),
           f"en_b{suffix}", f"en_a{suffix}", "en test is also in")
    (tmp_path / "who" / f"data{suffix}").rename(tmp_path / "who" / f"de{suffix}")
    (tmp_path / "who" / f"de{suffix}").write_bytes(b"caf\xe9")
    refuse(load, tmp_path / "who", f"de{suffix}", "not UTF-8", "byte 3")


def test_a_folder_that_is_a_language_has_the_last_word(tmp_path):
    row = "a\tb\tneutral\nc\td\tentailment\n"
    data = nli.load(write(tmp_path / "a", {"en/test-00000-of-00001.tsv": row, "de/xnli_old.dev.tsv": row, "my/dev/all.tsv": row,
                                           "sw/swa.test.tsv": row}))
    assert {code: list(splits) for code, splits in data.items()} == {"en": ["test"], "de": ["dev"], "my": ["dev"], "sw": ["test"]}
    refuse(nli.load, write(tmp_path / "b", {"new/en.test.tsv": row}), "en.test.tsv", "folder says the language is new, the name en")
    column = "sentence1\tsentence2\tlabel\tlanguage\na\tb\tneutral\tEN\nc\td\tentailment\ten \n"
    assert len(nli.load(write(tmp_path / "c", {"test.tsv": column}))["en"]["test"]) == 2


# ---- NER ----------------------------------------------------------------------------------------------------

def test_ner_layouts(tmp_path):
    panx = write(tmp_path / "panx", {"en/train": "en:Bob\tB-PER\nen::\tO\n\nen:a\tO\n",
                                     "simple/test": "simple:Bob\tB-PER\n", "en/extra": "not read", "zh-min-nan/dev": "zh-min-nan:Bob\tB-PER\n"})
    data = ner.load(panx)
    assert data["en"]["train"] == [ner.Sentence(("Bob", ":"), ("B-PER", "O")), ner.Sentence(("a",), ("O",))]
    assert data["simple"]["test"] == data["zh-min-nan"]["dev"] == [ner.Sentence(("Bob",), ("B-PER",))]

    wikineural = {"de/train.conllu": "# text\n0\t1999\tO\n1\tBob\tB-PER\n\n0\tx\tO\n",
                  "de/test.conllu": "0\tA\tB-PER\n"}
    data = ner.load(write(tmp_path / "wikineural", wikineural))
    assert [s.words for s in data["de"]["train"]] == [("1999", "Bob"), ("x",)]

    conll = "\ufeff-DOCSTART- -X- O O\r\n\r\nEU NNP I-NP B-ORG\r\n# NN I-NP O\r\n\r\n\r\n1999 CD I-NP O\r\n"
    data = ner.load(write(tmp_path / "conll", {"en/test.txt": conll}))
    assert data["en"]["test"] == [ner.Sentence(("EU", "#"), ("B-ORG", "O")), ner.Sentence(("1999",), ("O",))]
    numbers = ner.load(write(tmp_path / "numbers", {"en.tsv": "1\tO\n2\tO\n"}))
    assert numbers["en"]["test"][0].words == ("1", "2")                           # words, not a word index
    # A word with a line separator, a time and a colon stay as they are.
    data = ner.load(write(tmp_path / "odd", {"hau/test.txt": "a\u2028b B-PER\n12:30 O\n: O\n"}))
    assert data["hau"]["test"][0].words == ("a\u2028b", "12:30", ":")


@pytest.mark.parametrize("text, words", [
    ("a\tO\nb\n", ["en.test.tsv:2", "'b' has no tag"]), ("a\tO\nb\t\n", ["en.test.tsv:2", "'b' has no tag"]),
    ("\tO\n", ["en.test.tsv:1", "without a word"]), ("a\tPER\n", ["en.test.tsv:1", "'PER' is not a tag"]),
    ("a\tO\n\n" * 10, ["en.test.tsv", "every tag is O"]),
])
def test_ner_bad_input(tmp_path, text, words):
    refuse(ner.load, write(tmp_path, {"en.test.tsv": text}), *words)


def test_ner_types_have_to_agree(tmp_path):
    train = {"en.train.tsv": "a\tB-PER\nb\tB-LOC\n"}
    write(tmp_path, train | {"en.dev.tsv": "a\tB-PER\n", "de.test.tsv": "a\tI-LOC\n"})
    assert ner.entity_types(ner.load(tmp_path)["en"]["train"]) == {"PER", "LOC"}
    refuse(ner.load, write(tmp_path / "b", train | {"de.test.tsv": "a\tB-DATE\n"}), "de test", "train lacks: DATE")
    refuse(ner.load, write(tmp_path / "c", train | {"de.test.tsv": "a\tB-PER\n"}), "no dev or test file has: LOC")


# ---- NLI ----------------------------------------------------------------------------------------------------

def test_nli_layouts(tmp_path):
    official = ("language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2\tpromptID\n"
                "sw\tentailment\t( a )\t\"Ndiyo\" alisema.\tB \"c\".\t1\nur\tneutral\t( a )\tD\tE\t2\n")
    data = nli.load(write(tmp_path / "xnli", {"xnli.test.tsv": official}))
    assert data["sw"]["test"] == [nli.Pair('"Ndiyo" alisema.', 'B "c".', "entailment")] and len(data["ur"]["test"]) == 1
    head = "id\tsentence1\tsentence2\tlabel\n"
    paws = write(tmp_path / "pawsx", {"de/dev_2k.tsv": head + "1\ta\tb\t0\n2\tc\td\t1\n",
                                      "de/translated_train.tsv": head + "1\ta\tb\t1\n2\ta\tb\t0\n"})
    assert nli.labels(nli.load(paws)["de"]["train"]) == ["0", "1"]
    mt = {"multinli.train.es.tsv": "premise\thypo\tlabel\nA\tB\tcontradictory\n"}
    assert nli.load(write(tmp_path / "mt", mt))["es"]["train"] == [nli.Pair("A", "B", "contradiction")]
    plain = {"fr.test.tsv": "A\tB\tneutral\r\nC\tD\tentailment\r\n",
             "id.test.jsonl": '{"premise": "A", "hypothesis": "B", "label": "e"}\n\n'
                              '{"premise": "A", "hypothesis": "B", "label": "neutral"}\n'}
    data = nli.load(write(tmp_path / "plain", plain))
    assert [p.label for p in data["fr"]["test"]] == ["neutral", "entailment"]
    assert data["id"]["test"][0] == nli.Pair("A", "B", "entailment")


@pytest.mark.parametrize("text, words", [
    ("a\tb\tneutral\na\tb\t\n", ["en.test.tsv:2", "no label", "hidden"]),
    ("a\tb\t-\n", ["en.test.tsv:1", "no label", "hidden"]),
    ("sentence1\tsentence2\na\tb\n", ["en.test.tsv:2", "no label"]),
    ("a\tb\n", ["en.test.tsv:1", "2 fields instead of 3", "premise, hypothesis, label"]),
    ("a\tb\tneutral\na\tneutral\n", ["en.test.tsv:2", "2 fields instead of 3"]),
    ("a\t\tneutral\n", ["en.test.tsv:1", "no hypothesis"]),
    ("a\tb\tneutral\n" * 10, ["en.test.tsv", "all 10 labels are 'neutral'"]),
    ("a\tb\t1\na\tb\t2\na\tb\tneutral\na\tb\tentailment\n", ["more than three labels"]),
])
def test_nli_bad_input(tmp_path, text, words):
    refuse(nli.load, write(tmp_path, {"en.test.tsv": text}), *words)


def test_nli_labels_have_to_agree(tmp_path):
    files = {"en.train.tsv": "a\tb\tneutral\na\tb\tentailment\n", "en.test.tsv": "a\tb\tcontradiction\n"}
    refuse(nli.load, write(tmp_path, files), "en test has labels that train lacks: contradiction")
    refuse(nli.load, write(tmp_path / "b", {"en.jsonl": '{"label": \n'}), "en.jsonl:1", "not JSON")
    refuse(nli.load, write(tmp_path / "c", {"en.jsonl": "[]\n"}), "en.jsonl:1", "not a JSON object")


# ---- QA -----------------------------------------------------------------------------------------------------

def test_qa_layouts(tmp_path):
    one = squad(("q", "France", 12))
    data = qa.load(write(tmp_path / "squad", {"xquad.en.json": one, "tr_tquad.train.json": squad((7, "Paris", "0"))}))
    assert data["en"]["test"] == [qa.Question("q", 0, "Paris is in France.", "Where?", (qa.Answer("France", 12),))]
    assert data["tr"]["train"][0].answers[0].start == 0 and data["tr"]["train"][0].id == "7"
    mlqa = {f"test/test-context-{c}-question-{q}.json": one for c in ("de", "ar") for q in ("de", "ar")}
    assert {k: list(v) for k, v in qa.load(write(tmp_path / "mlqa", mlqa)).items()} == {"de": ["test"], "ar": ["test"]}
    refuse(qa.load, write(tmp_path / "across", {"test-context-de-question-ar.json": one}), "no data file")
    tydi = {"tydiqa-goldp-v1.1-train.json": squad(("finnish-1-0", "Paris", 0), ("telugu-1-0", "Paris", 0)),
            "tydiqa-goldp-dev-finnish.json": squad(("finnish--2-0", "Paris", 0))}
    data = qa.load(write(tmp_path / "tydi", tydi))
    assert {k: list(v) for k, v in data.items()} == {"fi": ["dev", "train"], "te": ["train"]}


def test_qa_answers_off_their_offset(tmp_path):
    good = [(str(i), "Paris", 0) for i in range(199)]
    with pytest.warns(UserWarning, match="2 of 201 questions have an answer that is not at its offset: bad, none"):
        data = qa.load(write(tmp_path, {"en.json": squad(*good, ("bad", "Paris", 1), ("none", "Paris", None))}))
    assert len(data["en"]["test"]) == 201                                         # scored by their text all the same
    assert [q.id for q in data["en"]["test"] if q.answers[0].start is None] == ["bad", "none"]
    bad = [(f"b{i}", "France.", -7) for i in range(3)]                            # where Python would find it
    refuse(qa.load, write(tmp_path / "b", {"en.json": squad(*good, *bad)}),
           "en.json", "3 of 202", "b0, b1, b2", "at most 1%")


def test_qa_bad_input(tmp_path):
    hidden = squad(("1", "Paris", 0), ("2", "Paris", 0))
    hidden["data"][0]["paragraphs"][0]["qas"][1]["answers"] = []
    refuse(qa.load, write(tmp_path / "a", {"en.json": hidden}), "en.json", "question 2 has no answer", "hidden")
    hidden["data"][0]["paragraphs"][0]["qas"][1]["is_impossible"] = True
    with pytest.warns(UserWarning, match="left out 1 questions marked is_impossible"):
        assert len(qa.load(write(tmp_path / "a", {"en.json": hidden}))["en"]["test"]) == 1
    hidden["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    refuse(qa.load, write(tmp_path / "a", {"en.json": hidden}), "all 2 questions are marked is_impossible")
    hidden["data"][0]["paragraphs"][0]["qas"][1] |= {"answers": 5, "is_impossible": False}
    for value, words in [("[]", ["not SQuAD 1.1"]), ('{"data": [{}]}', ["article 0", "no 'paragraphs'"]),
                         ('{"data": [{"paragraphs": [{"qas": []}]}]}', ["article 0, paragraph 0", "no 'context'"]),
                         ('{"data": []}', ["empty"]), ('{"data":\n [}', ["en.json:2", "not JSON"]),
                         (squad(("1", " ", 5)), ["question 1 has an empty answer"]), (hidden, ["question 2", "no 'answers'"])]:
        refuse(qa.load, write(tmp_path / "b", {"en.json": value}), "en.json", *words)


# ---- STS ----------------------------------------------------------------------------------------------------

def test_sts_layouts(tmp_path):
    quoted = '"He said ""no"", then\nleft.",Plain \u2028 text.,2.5\r\nA,"b, c",0\r\n'
    table = "genre\tsentence1\tsentence2\tscore\nnews\tA\tB\t3.2\nnews\tC\tD\t5\n"
    files = {"stsb-de-test.csv": quoted, "fr.dev.tsv": table,
             "ru.jsonl": '{"sentence1": "A", "sentence2": "B", "score": 4.0}\n'
                         '{"text1": "A", "text2": "B", "score": 1}\n'}
    data = sts.load(write(tmp_path, files))
    assert data["de"]["test"] == [sts.Pair('He said "no", then\nleft.', "Plain \u2028 text.", 2.5),
                                  sts.Pair("A", "b, c", 0.0)]
    assert data["fr"]["dev"] == [sts.Pair("A", "B", 3.2), sts.Pair("C", "D", 5.0)]
    assert [p.score for p in data["ru"]["test"]] == [4.0, 1.0]


def test_tsv_quotes_are_syntax_only_if_the_whole_file_keeps_to_them(tmp_path):
    quoted = write(tmp_path / "a", {"en.tsv": '"A ""b""\tc\nd"\tE\t1\nF\t"G"\t2'})
    assert sts.load(quoted)["en"]["test"] == [sts.Pair('A "b"\tc\nd', "E", 1.0), sts.Pair("F", "G", 2.0)]
    refuse(sts.load, write(tmp_path / "c", {"en.tsv": '"A\nb"\t"C"\t1\nD\tE\tx\n'}), "en.tsv:3", "'x' is not a number")
    stray = write(tmp_path / "s", {"en.tsv": '"Come here\tb\t1\nc\td\t2\nand leave me."\tf\t3\n'})   # as quotes: one row
    assert [pair.sentence1 for pair in sts.load(stray)["en"]["test"]] == ['"Come here', "c", 'and leave me."']
    short = write(tmp_path / "s2", {"en.tsv": '"Come here\tb\t1\nc\td\nand leave me."\tf\t3\n'})      # not swallowed: told
    refuse(sts.load, short, "en.tsv:2", "2 fields instead of 3")
    literal = write(tmp_path / "d", {"en.tsv": '"A\tb\t1\nc\td"\t2\nE\tF\t3\n'})      # as quotes: 2 fields, then 3
    assert sts.load(literal)["en"]["test"][:2] == [sts.Pair('"A', "b", 1.0), sts.Pair("c", 'd"', 2.0)]
    literal = write(tmp_path / "b", {"en.tsv": '"A" he said.\t"B"\t1\n"C\tD "e"\t2\n'})
    assert sts.load(literal)["en"]["test"] == [sts.Pair('"A" he said.', '"B"', 1.0), sts.Pair('"C', 'D "e"', 2.0)]


@pytest.mark.parametrize("name, text, words", [
    ("en.csv", "a,b,1\nc,d,x\n", ["en.csv:2", "'x' is not a number"]),
    ("en.csv", "a,b,1\nc,d,5.5\n", ["en.csv:2", "5.5 is not between 0 and 5"]),
    ("en.csv", "a,b,nan\n", ["en.csv:1", "nan is not between"]), ("en.csv", "a,b,\n", ["en.csv:1", "no score"]),
    ("en.csv", "a,b\n", ["en.csv:1", "2 fields instead of 3"]), ("en.csv", ",b,1\n", ["en.csv:1", "no sentence1"]),
    ("en.csv", '"a\nb",c,1\nd,e,f,2\n', ["en.csv:3", "4 fields instead of 3"]),
    ("en.csv", 'a,b,1\n"a"b,c,2\n', ["en.csv:2", "broken quoting"]),
    ("en.csv", 'a,b,1\n"never closed,c,2\n', ["en.csv:2", "broken quoting"]),
    ("en.tsv", "a\tb\t3\nc\td\t3\n", ["en.tsv", "all 2 scores are 3"]),
    ("en.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', ["en.jsonl:1", "no score"]),
])
def test_sts_bad_input(tmp_path, name, text, words):
    refuse(sts.load, write(tmp_path, {name: text}), *words)


# ---- retrieval ----------------------------------------------------------------------------------------------

def test_retrieval(tmp_path):
    files = {"v1/tatoeba.fra-eng.fra": "Un.\nDeux.\n", "v1/tatoeba.fra-eng.eng": "One.\r\nTwo.\r\n",
             "v1/x.en-sw.en": "One.", "v1/x.en-sw.sw": "Moja.", "v1/README.md": "x",
             "v1/deu-ron.deu": "Eins.\n", "v1/deu-ron.ron": "Unu.\n"}
    assert retrieval.load(write(tmp_path, files)) == {
        "fra": {"test": [retrieval.Pair("Un.", "One."), retrieval.Pair("Deux.", "Two.")]},
        "sw": {"test": [retrieval.Pair("Moja.", "One.")]}, "deu-ron": {"test": [retrieval.Pair("Eins.", "Unu.")]}}


@pytest.mark.parametrize("files, words", [
    ({"readme.txt": "x"}, ["no sentence pairs", "tatoeba.fra-eng.fra"]),
    ({"t.fra-eng.fra": "a\n"}, ["t.fra-eng.eng", "missing"]),
    ({"t.fra-eng.fra": "a\nb\n", "t.fra-eng.eng": "a\n"}, ["t.fra-eng.fra", "2 lines", "but 1 in", "t.fra-eng.eng"]),
    ({"t.fra-eng.fra": "a\n\nb\n", "t.fra-eng.eng": "a\nb\nc\n"}, ["t.fra-eng.fra:2", "empty line"]),
    ({"t.fra-eng.fra": "", "t.fra-eng.eng": ""}, ["t.fra-eng.fra", "empty"]),
    ({f"{t}.fra-eng.{side}": "a" for t in "tu" for side in ("fra", "eng")}, ["second file pair for fra"]),
])
def test_retrieval_bad_input(tmp_path, files, words):
    refuse(retrieval.load, write(tmp_path, files), *words)


# ---- the shared data ----------------------------------------------------------------------------------------

@pytest.mark.skipif(not SHARED.is_dir(), reason="waits for ../shared/data/eval (or UNIBERT_SHARED)")
def test_shared_data():
    """Every example arrives: counts against the raw lines of the files, where one line is one example."""
    found = {}
    for task, module in [("ner", ner), ("nli", nli), ("qa", qa), ("sts", sts), ("retrieval", retrieval)]:
        for dataset in tasks.find(SHARED, task):
            found[dataset.name] = {(language, split): len(examples)
                                   for language, row in module.load(dataset.folder, dataset.splits).items()
                                   for split, examples in row.items()}
    for path in SHARED.rglob("*.tsv"):
        language, split = tasks.parse_name(path.name)
        text = path.read_text(encoding="utf-8").rstrip("\n")
        expected = text.count("\n") if "nli" in path.parts else len(re.split("\n\n+", text))
        assert found[f"{path.parts[-3]}/{path.parts[-2]}"][language, split] == expected, path
    assert found["nli/sick_en"]["en", "train"] == 4439
    assert found["qa/xquad"] == {(language, "test"): 1190 for language in ("ar", "de", "en", "es", "hi", "ru", "zh")}
    assert found["sts/stsb_multi_mt"]["en", "train"] == 5749
    assert found["retrieval/tatoeba"]["fra", "test"] == 1000
