"""`data.py prepare` on Wikipedia dumps made here: what it drops and counts, appends, goes on with; its memory."""
import bz2
import gzip
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import corpus_report
import data
import sources
from data import Corpus, load_tokenizer, prepare
from records import finish, finished
from sources import Reading, list_parts
from wiki.wikipedia import Part

WORDS = {
    "ro": "râul coboară dintre dealuri vechi și verzi iar copiii duc coșuri mici cu pâine la piață în fiecare zi "
          "orașul are o bibliotecă mare unde oamenii citesc despre istoria regiunii și despre pădurile din munți",
    "sw": "mto unashuka kutoka milima ya kijani na watoto wanabeba vikapu vidogo vya mkate kwenda sokoni kila asubuhi "
          "mji una maktaba kubwa ambapo watu wanasoma kuhusu historia ya mkoa na misitu ya milimani",
    "en": "the river runs down from old green hills and children carry small baskets of bread to market every morning "
          "while the town has a large library where people read about history of the region and its mountain forests",
}
BOILERPLATE = "Acest articol a fost scris de un robot după datele oficiale ale recensământului"
HEAD = ('<mediawiki xml:lang="{0}"><siteinfo><dbname>{0}wiki</dbname><namespaces><namespace key="0" />'
        '<namespace key="1">Talk</namespace></namespaces></siteinfo>\n')


def text(code, number, words=60):
    """Words of a language in random order, in sentences of ten; no two texts are alike."""
    rng = np.random.default_rng([number, *code.encode()])
    drawn = rng.choice(WORDS[code].split(), words).tolist()
    sentences = [" ".join(drawn[i:i + 10]).capitalize() + "." for i in range(0, words, 10)]
    return "\n".join([f"{' '.join(drawn[:3])} {number}", *sentences])


def page(number, wikitext, namespace=0):
    return (f"<page><title>P{number}</title><ns>{namespace}</ns><id>{number}</id><revision><id>1</id>"
            f"<model>wikitext</model><text>{wikitext}</text></revision></page>\n")


def xml_dump(code, texts):
    return HEAD.format(code) + "".join(page(i, t) for i, t in enumerate(texts)) + "</mediawiki>"


def cirrus_dump(texts):
    lines = []
    for i, t in enumerate(texts):
        lines.append(json.dumps({"index": {"_id": i}}))
        lines.append(json.dumps({"page_id": i, "namespace": 0, "title": f"P{i}", "text": t.replace("\n", " "),
                                 "opening_text": t[:300], "wiki": "swwiki"}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def bot_page(i):
    names = "Alba Brad Cluj Deva Eforie Focșani Galați Huși Iași Jibou".split()
    return (f"{names[i]} este o comună cu {1000 + 37 * i} locuitori, așezată într-o regiune de deal din centrul țării, "
            "cu drumuri bune spre orașele vecine, cu o școală veche, o biserică de lemn, o moară pe malul râului și un "
            f"târg vestit care se ține în fiecare toamnă, la sărbătoarea recoltei, de la anul {1700 + 11 * i} încoace.")


RO_PAGES = [
    *(text("ro", i) for i in range(60)),
    *(f"{BOILERPLATE}\n{text('ro', 100 + i)}" for i in range(22)),       # the line goes from the 21st page on
    f"{BOILERPLATE}\n{text('ro', 130)[:180]}",                           # too short without it
    "#REDIRECT [[P1]]", "{{dezambiguizare}}\n* [[P1]]\n* [[P2]]",
    "Un oraș mic.",                                                      # length
    text("ro", 3),                                                       # duplicate
    # another script
    "".join(f"Река {i} течёт со старых зелёных холмов, и дети несут хлеб на рынок. " for i in range(5)),
    "Valori: " + " ".join(f"{n}; {n * 7};" for n in range(1000, 1060)),                                   # digits
    # an address a sentence
    "".join(f"Vezi pagina {i}, www.exemplu.ro/lista/orase/index.php?id={i} pentru o listă. " for i in range(5)),
    *(text("en", i) for i in range(3)),                                  # another language
    *(bot_page(i) for i in range(10)),                                   # near duplicates of each other
]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """A wiki in XML, one in CirrusSearch JSON, in a subfolder, and a text file."""
    folder = tmp_path_factory.mktemp("dumps")
    (folder / "swwiki-20260105-cirrus").mkdir()
    (folder / "rowiki-20260101-pages-articles.xml.bz2").write_bytes(bz2.compress(xml_dump("ro", RO_PAGES).encode()))
    (folder / "swwiki-20260105-cirrus" / "swwiki_content-20260105-00000.json.bz2").write_bytes(
        bz2.compress(cirrus_dump([text("sw", i) for i in range(50)] + [text("ro", 900), "Fupi."]).encode()))
    (folder / "en.txt").write_text("\n\n".join([*(text("en", i) for i in range(1000, 1050)), "One."]))
    return folder


OPTIONS = {"vocab_size": 500, "validation_share": 0.1}


@pytest.fixture(scope="module")
def prepared(dumps, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "d"
    prepare(dumps, out, workers=1, **OPTIONS)
    return out


def run(*arguments):
    return CliRunner().invoke(data.main, [str(a) for a in arguments])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(folder, code):
    """All documents of a language as prepared, decoded."""
    manifest, tokenizer = data.read_manifest(folder), load_tokenizer(folder / "tokenizer.model")
    return [t for split in data.SPLITS for t in corpus_report.kept_text(folder, manifest, code, split, 1e9, tokenizer)]


def test_filters_are_counted(prepared):
    entries = data.read_manifest(prepared)["languages"]
    assert entries["ro"]["pages"] == {"article": len(RO_PAGES) - 2, "redirect": 1, "disambiguation": 1}
    assert entries["ro"]["dropped"] == {"empty": 0, "duplicate": 1, "short": 0, "length": 1, "boilerplate": 1,
                                        "script": 1, "digits and punctuation": 1, "URLs": 1, "language": 3}
    assert entries["sw"]["pages"] == {"article": 52}
    assert entries["sw"]["dropped"] == {"empty": 0, "duplicate": 0, "short": 0, "length": 1, "language": 1}
    assert entries["en"]["dropped"] == {"empty": 0, "duplicate": 0, "short": 1}      # texts pass no filter of pages
    for code, entry in entries.items():
        assert entry["train"]["documents"] + entry["validation"]["documents"] + sum(entry["dropped"].values()) \
            == entry["pages"]["article"] and entry["validation"]["documents"] >= 2
        assert len(kept(prepared, code)) == entry["pages"]["article"] - sum(entry["dropped"].values())
    assert sum(BOILERPLATE in t for t in kept(prepared, "ro")) == 20
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    manifest = data.read_manifest(prepared)
    assert len(list(corpus_report.kept_text(prepared, manifest, "ro", "train", 1, tokenizer))) == 1
    assert " ".join(text("sw", 7).split()) in kept(prepared, "sw")


def test_inspect_tells_all_of_it(prepared, dumps, tmp_path):
    lines = run("inspect", prepared, "--budget", "1e5", "--max-epochs", "4").output.splitlines()
    columns = re.split(r"\s{2,}", next(line for line in lines if "articles" in line).strip())
    assert columns == ["language", "(disambiguation)", "(redirect)", "articles", "length", "script",
                       "digits and punctuation", "URLs", "boilerplate", "duplicate", "language", "short", "kept"]
    row = next(line for line in lines if line.startswith("ro ")).split()
    assert row == ["ro", "1", "1", "101", "1", "1", "1", "1", "1", "1", "3", "0", "92"]
    assert next(line for line in lines if line.startswith("3 languages")) == (
        "3 languages, vocabulary 500, <u2; dropped documents: 0 empty, 1 duplicate, 1 short, 1 boilerplate, 2 length, "
        "1 script, 1 digits and punctuation, 1 URLs, 4 language")
    sample = run("inspect", prepared, "--sample", "ro").output
    assert "kept:\n" in sample and "dropped, length (1):\n    P85: Un oraș mic." in sample
    assert "dropped, language (3):" in sample and "P88: Valori: 1000; 7000;" in sample
    assert sample.split("kept:\n")[1].split("dropped")[0].count("\n") == sources.SAMPLES
    assert "its languages are" in run("inspect", prepared, "--sample", "xx").output
    *_, share, epochs = [line for line in lines if line.startswith("ro ")][1].split()
    tokens = data.read_manifest(prepared)["languages"]["ro"]["train"]["tokens"]
    assert float(epochs) == pytest.approx(float(share.rstrip("%")) * 1e3 / tokens, abs=0.01)
    same = run("inspect", prepared, "--compare", prepared / "tokenizer.model").output.splitlines()
    assert len(same) == 5 and all(line.endswith("1.00x") for line in same[2:])
    prepare(dumps / "en.txt", tmp_path / "en", vocab_size=350, workers=1)
    other = run("inspect", prepared, "--compare", tmp_path / "en" / "tokenizer.model").output.splitlines()
    ratio = {line.split()[0]: float(line.split()[-1].rstrip("x")) for line in other[2:]}
    assert max(ratio["ro"], ratio["sw"]) < 0.9 * ratio["en"]             # a tokenizer of English cuts the others small
    assert run("inspect", prepared, "--compare", ROOT / "README.md").exit_code == 2


def test_same_bytes_whatever_the_workers(prepared, dumps, tmp_path):
    prepare(dumps, tmp_path / "d", workers=2, **OPTIONS)
    assert files(tmp_path / "d") == files(prepared)


def test_a_multistream_dump_is_cut_alike_for_any_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    path = tmp_path / "in" / "rowiki-20260101-pages-articles-multistream.xml.bz2"
    path.parent.mkdir()
    streams, index = [bz2.compress(HEAD.format("ro").encode())], []
    for start in range(0, 120, 10):
        index += [f"{sum(map(len, streams))}:{i}:P{i}" for i in range(start, start + 10)]
        streams.append(bz2.compress("".join(page(i, text("ro", i)) for i in range(start, start + 10)).encode()))
    path.write_bytes(b"".join([*streams, bz2.compress(b"</mediawiki>")]))
    path.with_name(path.name.replace("multistream.xml", "multistream-index.txt")).write_bytes(
        bz2.compress("\n".join(index).encode()))
    assert len(list_parts(path.parent)) >= 3
    assert len(list_parts(path.parent, reading=Reading(limit=5))) == 1
    for workers in (1, 2):
        prepare(path.parent, tmp_path / f"d{workers}", vocab_size=350, workers=workers)
    assert files(tmp_path / "d1") == files(tmp_path / "d2")
    assert sorted(kept(tmp_path / "d1", "ro")) == sorted(" ".join(text("ro", i).split()) for i in range(120))


def test_near_duplicates(prepared, dumps, tmp_path):
    assert sum("o comună cu" in t for t in kept(prepared, "ro")) == 10
    result = run("prepare", dumps, "--out", tmp_path / "d", "--tokenizer", prepared / "tokenizer.model", "--workers", 1,
                 "--near-duplicates", "--validation-share", 0.1)
    assert result.exit_code == 0, result.output
    entries = data.read_manifest(tmp_path / "d")["languages"]
    dropped = {code: entry["dropped"].get("near duplicate", 0) for code, entry in entries.items()}
    assert 9 <= dropped["ro"] <= 12 and dropped["sw"] == dropped["en"] == 0   # 83 texts in 40 words: a few as well
    assert [t[:4] for t in kept(tmp_path / "d", "ro") if "o comună cu" in t] == ["Alba"]      # the first of its kind
    assert f"dropped, near duplicate ({dropped['ro']}):" in run("inspect", tmp_path / "d", "--sample", "ro").output


def test_limit_and_leads(prepared, dumps, tmp_path):
    prepare(dumps, tmp_path / "d", tokenizer=prepared / "tokenizer.model", workers=1, languages=["sw"],
            reading=Reading(limit=20, opening_text=True))
    assert data.read_manifest(tmp_path / "d")["languages"]["sw"]["pages"] == {"article": 20}
    assert " ".join(text("sw", 7)[:300].split()) in kept(tmp_path / "d", "sw")


def test_append_leaves_other_languages_alone(prepared, dumps, tmp_path):
    out, model = tmp_path / "d", prepared / "tokenizer.model"
    command = ["prepare", dumps, "--out", out, "--workers", 1, "--validation-share", 0.1]
    assert run(*command, "--tokenizer", model, "--languages", "ro,sw").exit_code == 0
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    content = files(out)
    result = run(*command, "--append")
    assert result.exit_code == 0, result.output
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"manifest.json", *(name for name in files(prepared) if name.startswith("en."))}
    assert {n: c for n, c in files(out).items() if n not in changed} == \
        {n: c for n, c in content.items() if n != "manifest.json"}
    assert Corpus(out).languages == ["ro", "sw", "en"]                   # those that were there keep their number
    for name in ("en.train.tokens", "en.validation.offsets", "sw.train.tokens"):
        assert (out / name).read_bytes() == (prepared / name).read_bytes()
    assert run("verify", out).exit_code == 0 and not out.with_name("d.partial").exists()
    assert "nothing to append" in run(*command, "--append").output
    assert "--overwrite" in run(*command, "--append", "--overwrite").output
    assert run("prepare", dumps, "--out", tmp_path / "none", "--append").exit_code == 2
    assert not (tmp_path / "none.partial").exists()


def test_an_appended_language_is_judged_against_those_there(prepared, dumps, tmp_path):
    (tmp_path / "in").mkdir()
    pages = [*(text("sw", i) for i in range(40)), text("ro", 5)]
    (tmp_path / "in" / "swwiki-x.xml").write_text(xml_dump("sw", pages))
    model = prepared / "tokenizer.model"
    prepare(dumps, tmp_path / "d", tokenizer=model, languages=["ro"], workers=1)
    prepare(tmp_path / "in", tmp_path / "d", append=True, workers=1)
    prepare(tmp_path / "in", tmp_path / "alone", tokenizer=model, workers=1)
    assert data.read_manifest(tmp_path / "d")["languages"]["sw"]["dropped"]["language"] == 1
    assert "language" not in data.read_manifest(tmp_path / "alone")["languages"]["sw"]["dropped"]   # nothing to tell by


def test_a_held_out_page_in_another_language_is_replaced(prepared, tmp_path):
    """Validation has two documents of those that are left after all filters."""
    def place(page):
        line = sources.clean(page).encode() + b"\n"
        return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
    pages = [text("ro", i) for i in range(40)]
    first = min(map(place, pages))
    pages += [english := next(t for t in (text("en", i) for i in range(10_000)) if place(t) < first)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rowiki-x.xml").write_text(xml_dump("ro", pages))
    (tmp_path / "in" / "en.txt").write_text("\n\n".join(text("en", i) for i in range(20_000, 20_050)))
    prepare(tmp_path / "in", tmp_path / "d", tokenizer=prepared / "tokenizer.model", validation_share=1e-6, workers=1)
    entry = data.read_manifest(tmp_path / "d")["languages"]["ro"]
    assert entry["dropped"]["language"] == 1 and " ".join(english.split()) not in kept(tmp_path / "d", "ro")
    assert (entry["train"]["documents"], entry["validation"]["documents"]) == (38, 2)


def test_killed_while_appending(prepared, dumps, tmp_path, monkeypatch):
    """The new files lie in the folder, its manifest does not name them yet."""
    out = tmp_path / "d"
    prepare(dumps, out, tokenizer=prepared / "tokenizer.model", languages=["sw"], workers=1, validation_share=0.1)

    def stop(folder):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "sync_folder", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(dumps, out, append=True, workers=1)
    monkeypatch.undo()
    assert (out / "en.train.tokens").exists() and Corpus(out).languages == ["sw"]       # as before, for all who read it
    assert "en.train.offsets" in run("verify", out).output
    prepare(dumps, out, append=True, workers=1)
    assert Corpus(out).languages == ["sw", "en", "ro"] and run("verify", out).exit_code == 0


@pytest.mark.parametrize("stop", ["tokenizer", "shards-en", "shards-ro"])
def test_interrupted_work_goes_on(prepared, dumps, tmp_path, monkeypatch, stop):
    """Stopped when `stop` was finished; then one of the finished files is damaged."""
    out, work = tmp_path / "d", tmp_path / "d.partial" / "clean"

    def finish_and_stop(folder, name, *rest, **told):
        record = finish(folder, name, *rest, **told)
        if name == stop:
            raise KeyboardInterrupt
        return record
    monkeypatch.setattr(data, "finish", finish_and_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(dumps, out, workers=1, **OPTIONS)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(ValueError, match="interrupted"):
        Corpus(out.with_name("d.partial"))
    cleaned = sorted(path for path in work.iterdir() if not path.suffix)
    assert len(cleaned) == 3
    cleaned[1].write_bytes(cleaned[1].read_bytes()[:-3] + b"!!\n")       # Romanian
    done = []

    def counted(folder, name, *rest, **told):
        done.append(name)
        return finish(folder, name, *rest, **told)
    monkeypatch.setattr(data, "finish", counted)
    monkeypatch.setattr(sources, "finish", counted)
    prepare(dumps, out, workers=1, **OPTIONS)
    again = {"tokenizer": ["en", "ro", "sw"], "shards-en": ["ro", "sw"], "shards-ro": ["sw"]}[stop]
    assert done == [cleaned[1].name, *(f"shards-{code}" for code in again)]
    assert files(out) == files(prepared) and not out.with_name("d.partial").exists()


KILLED = """
import os, signal, data, sources
def finish_and_kill(folder, name, *rest, finish=sources.finish, **told):
    record = finish(folder, name, *rest, **told)
    if name.startswith("en-"):
        os.kill(os.getppid(), signal.SIGKILL)
    return record
sources.finish = finish_and_kill
data.main()
"""


def test_killed_while_cleaning(tmp_path):
    """By a worker that has finished one language, while another works on the largest."""
    (tmp_path / "in").mkdir()
    for code, count in (("ro", 1000), ("sw", 40), ("en", 40)):
        (tmp_path / "in" / f"{code}wiki-x.xml").write_text(xml_dump(code, [text(code, i) for i in range(count)]))
    out, work = tmp_path / "d", tmp_path / "d.partial" / "clean"
    arguments = ["prepare", tmp_path / "in", "--out", out, "--vocab-size", "500", "--workers", "2"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    record, = work.glob("en-*.json")
    assert "interrupted" in run("verify", out.with_name("d.partial")).output and run("verify", out).exit_code == 2
    deadline = time.monotonic() + 10                                     # its workers notice, and let go of the lock
    while True:
        result = run(*arguments)
        if "another prepare" not in result.output or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert result.exit_code == 0, result.output
    assert run("verify", out).exit_code == 0
    prepare(tmp_path / "in", tmp_path / "whole", vocab_size=500, workers=1)
    assert files(out) == files(tmp_path / "whole")


def test_a_record_is_worth_its_files(tmp_path):
    (tmp_path / "clean").mkdir()
    entry = data.write(tmp_path / "x", b"work")
    assert finish(tmp_path, "a", [1, "k"], {"x": entry}, count=3) == finished(tmp_path, "a", [1, "k"])
    assert finished(tmp_path, "a", [2, "k"]) is None and finished(tmp_path, "b", [1, "k"]) is None
    (tmp_path / "x").write_bytes(b"wort")
    assert finished(tmp_path, "a", [1, "k"]) is None
    data.write(tmp_path / "x", b"work")
    assert finished(tmp_path, "a", [1, "k"])["count"] == 3
    (tmp_path / "clean" / "a.json").write_bytes((tmp_path / "clean" / "a.json").read_bytes()[:-5])
    assert finished(tmp_path, "a", [1, "k"]) is None


def test_verify_notices_what_a_kill_at_the_end_leaves(prepared, dumps, tmp_path):
    out = tmp_path / "d"
    shutil.copytree(prepared, out)
    assert run("verify", out).exit_code == 0
    (out / "clean").mkdir()                                              # killed before the scratch was deleted
    result = run("verify", out)
    assert result.exit_code == 2 and "clean" in result.output
    (out / "clean").rmdir()
    (tmp_path / "d.partial").mkdir()                                     # killed between the two last renames
    out.rename(tmp_path / "d.partial" / "replaced")
    assert "already prepared" in run("prepare", dumps, "--out", out).output and files(out) == files(prepared)


def test_half_a_surrogate_pair_in_a_dump(prepared, tmp_path):
    """JSON can hold it, UTF-8 cannot; in a kept page, and in the title of one that is dropped."""
    pages = [text("ro", i) for i in range(30)] + ["Scurt \ud800."]
    pages[3] += " \udfff"
    dump = cirrus_dump(pages).replace("P30", "P\ud83030").encode("utf-8", "backslashreplace")
    (tmp_path / "rowiki_content-x.json").write_bytes(dump)
    result = run("prepare", tmp_path / "rowiki_content-x.json", "--out", tmp_path / "d", "--tokenizer",
                 prepared / "tokenizer.model", "--workers", 1)
    assert result.exit_code == 0 and "no CirrusSearch" not in result.output, result.output
    assert data.read_manifest(tmp_path / "d")["languages"]["ro"]["pages"] == {"article": 31}
    assert "P?30: Scurt ?." in run("inspect", tmp_path / "d", "--sample", "ro").output


def test_odd_input(prepared, tmp_path):
    """Dumps that hold nothing, are none, are cut off or do not tell their language end no work on the others."""
    folder, model = tmp_path / "in", prepared / "tokenizer.model"
    folder.mkdir()
    whole = xml_dump("ro", [text("ro", i) for i in range(30)])
    (folder / "rowiki-a.xml").write_text(whole[:-300])
    (folder / "swwiki-a.xml.gz").write_bytes(gzip.compress(xml_dump("sw", ["Fupi."]).encode()))
    (folder / "frwiki-a.json").write_text("Service unavailable")
    (folder / "tinywiki-a.xml").write_text(xml_dump("", [text("ro", i) for i in range(200, 220)]))
    command = ["prepare", folder, "--out", tmp_path / "d", "--tokenizer", model, "--workers", 1]
    result = run(*command)
    assert result.exit_code == 0, result.output
    for line in ("rowiki-a.xml: cut off in page 'P29'; 29 whole articles kept",
                 "frwiki-a.json: neither MediaWiki XML nor CirrusSearch JSON lines; left out",
                 "fr is left out", "swwiki-a.xml.gz: holds no text after the filters; sw is left out",
                 "tinywiki-a.xml: neither its name nor its pages tell its language"):
        assert result.output.count(line) == 1, line
    manifest = data.read_manifest(tmp_path / "d")
    assert list(manifest["languages"]) == ["ro"] and manifest["left_out"]["sw"]["dropped"]["length"] == 1
    assert "P0: Fupi." in run("inspect", tmp_path / "d", "--sample", "sw").output
    assert run("verify", tmp_path / "d").exit_code == 0
    assert run("prepare", folder / "tinywiki-a.xml", "--out", tmp_path / "e", "--tokenizer", model, "--workers", 1,
               "--languages", "ro").exit_code == 0
    assert data.read_manifest(tmp_path / "e")["languages"]["ro"]["pages"] == {"article": 20}
    for languages, message in (("sw", "no document is left"), ("de", "holds no text for de")):
        result = run(*command[:3], tmp_path / "f", *command[4:], "--languages", languages)
        assert result.exit_code == 2 and message in result.output
    enough = xml_dump("sw", [text("sw", i) for i in range(30)])
    (folder / "swwiki-a.xml.gz").write_bytes(gzip.compress(enough.encode()))
    assert run(*command[:4], "--append").exit_code == 0                  # what was left out can come later
    manifest = data.read_manifest(tmp_path / "d")
    assert list(manifest["languages"]) == ["ro", "sw"] and list(manifest["left_out"]) == ["fr"]
    assert run("verify", tmp_path / "d").exit_code == 0


def test_a_few_samples_of_what_was_dropped_are_kept(tmp_path):
    path = tmp_path / "rowiki-x.xml"
    path.write_text(xml_dump("ro", [f"Scurt {i}." for i in range(50)]))
    (tmp_path / "clean").mkdir()
    record = sources.clean_part((Part(path, "ro"), tmp_path, Reading()))
    assert record["dropped"] == {"length": 50} and len(record["samples"]) == sources.SAMPLES


@pytest.mark.parametrize("first, second", [("20251201-cirrus", "20260101-cirrus"), ("2025-12-01-xml", "2026-01-01-xml"),
                                           ("20251201-xml-legacy", "20260101-xml-legacy")])      # as download names them
def test_two_downloads_of_a_wiki_are_told(tmp_path, first, second):
    warnings = []
    for name in (first, second):
        (tmp_path / f"rowiki-{name}").mkdir()
        (tmp_path / f"rowiki-{name}" / "rowiki-x.xml").write_text(xml_dump("ro", [text("ro", 1)]))
        assert len(warnings) == 0
        parts = list_parts(tmp_path, on_warning=warnings.append)
    assert len(parts) == 2 and len(warnings) == 1
    assert f"2 dumps of ro, rowiki-{first}, rowiki-{second}" in warnings[0]


def test_a_download_that_is_not_finished_is_told(tmp_path):
    warnings, folder = [], tmp_path / "rowiki-20260105-cirrus"
    folder.mkdir()
    (folder / "rowiki-x.xml").write_text(xml_dump("ro", [text("ro", 1)]))
    assert len(list_parts(tmp_path, on_warning=warnings.append)) == 1 and not warnings
    for i in range(2):
        (folder / f"rowiki-{i}.json.bz2.part").touch()
    assert len(list_parts(tmp_path, on_warning=warnings.append)) == 1
    assert len(warnings) == 1 and "not finished (2 .part files, rowiki-0.json.bz2.part first)" in warnings[0]


MEASURE = """
import re, sys
from data import prepare
prepare(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], workers=1)
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])   # ru_maxrss would begin at the parent's
"""


def test_memory_does_not_grow_with_the_dump(prepared, tmp_path):
    peak = {}
    for megabytes in (1, 12):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        with gzip.open(folder / "swwiki-x.json.gz", "wt", compresslevel=1, encoding="utf-8") as file:
            for i in range(megabytes * 550):
                file.write(cirrus_dump([text("sw", i, 300)]))
        command = [sys.executable, "-c", MEASURE, folder, folder / "d", prepared / "tokenizer.model"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peak[megabytes] = int(process.stdout) / 1024
        entry = data.read_manifest(folder / "d")["languages"]["sw"]
        assert entry["train"]["documents"] + entry["validation"]["documents"] == megabytes * 550
    assert peak[12] < peak[1] + 6, peak                                  # MiB; the text alone has 11 more
