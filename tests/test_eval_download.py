"""eval/download.py against a local server; eval/prepare.py on small files in each release's own layout."""
import functools
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_download import leftovers, server  # noqa: F401

from eval import __main__ as cli
from eval import download, prepare, tasks
from wiki.download import Client

PINNED = download.pinned
SHARED = Path(os.environ.get("UNIBERT_SHARED") or Path(__file__).resolve().parents[2] / "shared") / "data" / "eval"


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def refused(result, *words):
    """Exit code 2 and one line with all the words."""
    lines = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert result.exit_code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), result.output


# ---- the releases, in small ---------------------------------------------------------------------------------

def zipped(files):
    """{name: bytes} -> bytes of a zip file."""
    with zipfile.ZipFile(data := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(files):
    with tarfile.open(fileobj=(data := io.BytesIO()), mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def conll(language, count, index=False, prefix=False):
    words = [("Alba", "B-PER"), ("Iulia", "I-PER"), ("lives", "O"), ("in", "O"), ("Cluj", "B-LOC"), (".", "O")]
    return "".join("".join(f"{f'{i}' + chr(9) if index else ''}{f'{language}:' if prefix else ''}{w}\t{t}\n"
                           for i, (w, t) in enumerate([*words[:-1], (f"no{n}", "B-ORG"), words[-1]])) + "\n"
                   for n in range(count)).encode()


def xnli(languages, count):
    head = ["language", "gold_label", "sentence1_binary_parse", "sentence1", "sentence2", "promptID", "match"]
    rows = [[language, ("neutral", "entailment", "contradiction")[n % 3], "( a )", f'{language} says "{n}',
             f"{language} is {n}", str(n), "True"] for language in languages for n in range(count)]
    return "".join("\t".join(row) + "\n" for row in [head, *rows]).encode()


def multinli(language, count):
    labels = ("neutral", "entailment", "contradictory")
    return ("premise\thypo\tlabel\n" + "".join(f"{language} {n}\tso {n}\t{labels[n % 3]}\n" for n in range(count))).encode()


def squad(count, language="x", prefix=""):
    def question(n):
        return {"id": f"{prefix}{n}-3", "question": "Where?", "answers": [{"text": "här", "answer_start": 0}]}

    return json.dumps({"version": "1.1", "data": [{"title": f"a{n}", "paragraphs": [
        {"context": f"här {language} {n}.", "qas": [question(n)]}]} for n in range(count)]}).encode()


def tydiqa(count):
    parts = [json.loads(squad(count, name, f"{name}-"))["data"] for name in ("finnish", "english", "swahili")]
    return json.dumps({"version": "TyDiQA", "data": [article for row in zip(*parts) for article in row]}).encode()


def stsb(language, count):
    return "".join(f'"{language}, {n}",b {n},{n % 6}.0\r\n' for n in range(count)).encode()


def releases():
    """{address without "https://": bytes} of every set, with German, Finnish, Swahili and English at most."""
    found = {}
    for name, files in {
        "panx": {"panx_dataset.zip": zipped({
            **{f"panx_dataset/{code}.tar.gz": tarred({s: conll(code, 4, prefix=True) for s in ("train", "dev", "test")})
               for code in ("de", "en", "zh-min-nan", "simple")}, "__MACOSX/panx_dataset/._de.tar.gz": b"\0"})},
        "wikineural": {f"{code}/{split}.conllu": conll(code, 3, index=True) for code in ("de", "en")
                       for split in ("train", "val", "test")},
        "xnli": {"XNLI-1.0.zip": zipped({"XNLI-1.0/": b"", "XNLI-1.0/README.md": b"x", "__MACOSX/._XNLI-1.0": b"\0",
                                         "XNLI-1.0/xnli.dev.tsv": xnli(("de", "en", "sw"), 6),
                                         "XNLI-1.0/xnli.dev.jsonl": b"{}",
                                         "XNLI-1.0/xnli.test.tsv": xnli(("de", "en", "sw"), 9)}),
                 "XNLI-MT-1.0.zip": zipped({f"XNLI-MT-1.0/multinli/multinli.train.{code}.tsv": multinli(code, 12)
                                            for code in ("de", "en", "sw")} | {"XNLI-MT-1.0/xnli/xnli.test.de.tsv": b"x"})},
        "squad": {"train-v1.1.json": squad(20), "dev-v1.1.json": squad(5)},
        "xquad": {f"xquad.{code}.json": squad(4, code) for code in ("de", "en")},
        "mlqa": {"MLQA_V1.zip": zipped({f"MLQA_V1/{split}/{split}-context-{a}-question-{b}.json": squad(3, a)
                                        for split in ("dev", "test") for a in ("de", "en") for b in ("de", "en")})},
        "tydiqa": {"tydiqa-goldp-v1.1-train.json": tydiqa(6), "tydiqa-goldp-v1.1-dev.json": tydiqa(2)},
        "stsb": {f"stsb-{code}-{split}.csv": stsb(code, 7) for code in ("de", "en") for split in ("train", "dev", "test")},
        "tatoeba": {"tatoeba.deu-eng.deu": b"Guten Tag.\nJa.\n", "tatoeba.deu-eng.eng": b"Hello.\nYes.\n"},
    }.items():
        address = download.SETS[name].address.removeprefix("https://")
        found |= {f"/{address}/{path}": data for path, data in files.items()}
    return found


# What has to be read in the end, with training data of the source language only: (train, dev, test) examples.
EXPECTED = {
    "ner/panx": {"de": (0, 4, 4), "en": (4, 4, 4), "zh-min-nan": (0, 4, 4)},
    "ner/wikineural": {"de": (0, 3, 3), "en": (3, 3, 3)},
    "nli/xnli": {"de": (0, 6, 9), "en": (12, 6, 9), "sw": (0, 6, 9)},
    "qa/mlqa": {"de": (0, 3, 3), "en": (0, 3, 3)},
    "qa/squad": {"en": (20, 5, 0)},
    "qa/tydiqa": {"en": (6, 0, 2), "fi": (0, 0, 2), "sw": (0, 0, 2)},
    "qa/xquad": {"de": (0, 0, 4), "en": (0, 0, 4)},
    "retrieval/tatoeba": {"deu": (0, 0, 2)},
    "sts/stsb": {"de": (0, 7, 7), "en": (7, 7, 7)},
}


def read(folder):
    """What the readers find below a folder, in the form of EXPECTED."""
    found = {}
    for task in tasks.TASKS:
        with_data = tasks.find(folder, task) if (folder / task).is_dir() else []
        for dataset in with_data:
            loaded = prepare.MODULES[task].load(dataset.folder, dataset.splits or None)
            found[dataset.name] = {code: tuple(len(splits.get(s, ())) for s in ("train", "dev", "test"))
                                   for code, splits in loaded.items()}
    return found


@pytest.fixture
def mirror(server, monkeypatch):  # noqa: F811
    """A server with the small releases; no checksum is known of them."""
    server.files |= releases()
    monkeypatch.setattr(download, "pinned", dict)
    monkeypatch.setattr(download, "Client", functools.partial(Client, sleep=lambda seconds: None))
    return server


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The small releases as `download` lays them down."""
    folder = tmp_path_factory.mktemp("releases")
    files = releases()
    for name in download.SETS:
        for file in download.files(name, ["de"]):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file.name).write_bytes(files["/" + file.url.removeprefix("https://")])
    return folder


# ---- download -----------------------------------------------------------------------------------------------

def test_from_download_to_readers(mirror, tmp_path):
    options = ["--out", tmp_path / "d", "--base-url", mirror.url, "--languages", "de", "--contact", "a@b.example"]
    dry = run("download", *options, "--dry-run")
    assert dry.exit_code == 0 and not (tmp_path / "d").exists() and "total" in dry.output, dry.output
    panx = next(path for path in mirror.files if "panx" in path)
    mirror.faults[panx] = [("none",), ("cut", 300), ("cut", 0)]        # the first request asks for the size
    result = run("download", *options)
    assert result.exit_code == 0, result.output
    ranges = [headers.get("Range") for path, headers in mirror.requests if path == panx]
    assert ranges[-2:] == ["bytes=300-", "bytes=300-"]
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())["files"]
    assert manifest["panx/panx_dataset.zip"]["sha256"] == hashlib.sha256(mirror.files[panx]).hexdigest()
    assert len(manifest) == 1 + 6 + 2 + 2 + 2 + 1 + 2 + 6 + 2 and not leftovers(tmp_path)

    result = run("prepare", tmp_path / "d", tmp_path / "data")
    assert result.exit_code == 0 and "left out: simple" in result.output, result.output
    assert "nli/xnli: train 12, dev 18, test 27 examples" in result.output
    assert read(tmp_path / "data") == EXPECTED
    settings = json.loads((tmp_path / "data/tasks.json").read_text())
    assert {name: entry["source"] for name, entry in settings.items()} == dict.fromkeys(EXPECTED, "en")
    assert settings["qa/tydiqa"]["splits"] == {"dev": "test"}
    again = run("prepare", tmp_path / "d", tmp_path / "data")
    assert again.exit_code == 0 and again.output.count("there already") == len(EXPECTED)
    assert json.loads((tmp_path / "data/tasks.json").read_text()) == settings


def test_what_is_there_is_checked_and_kept(mirror, tmp_path):
    options = ["download", "--out", tmp_path / "d", "--base-url", mirror.url, "--sets", "squad"]
    assert run(*options).exit_code == 0
    train = next(path for path in mirror.files if path.endswith("/train-v1.1.json"))
    data, file = mirror.files[train], tmp_path / "d/squad/train-v1.1.json"
    mirror.requests.clear()
    assert run(*options).exit_code == 0
    assert all(headers.get("Range") == "bytes=0-0" for _, headers in mirror.requests)      # only sizes were asked for
    file.write_bytes(data[:-1] + b" ")                                 # damaged on disk, in its size
    result = run("prepare", tmp_path / "d", tmp_path / "x")
    refused(result, "train-v1.1.json: not what was downloaded")
    assert not (tmp_path / "x").exists()
    result = run(*options)
    assert result.exit_code == 0 and "fetched again" in result.output and file.read_bytes() == data
    file.unlink()
    mirror.files[train] = squad(21)                                    # the server's file is another one by now
    refused(run(*options), "train-v1.1.json: its sha256 is", "expected is")
    assert not file.exists() and not leftovers(tmp_path)
    mirror.files[train] = data
    assert run(*options).exit_code == 0 and file.read_bytes() == data


def test_pinned_checksums(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "pinned", PINNED)
    names = {f"{file.folder}/{file.name}" for name in download.SETS for file in download.files(name)}
    assert set(download.pinned()) <= names and len(names) == 304
    assert all(len(checksum) == 64 and size > 0 for checksum, size in download.pinned().values())
    monkeypatch.setitem(download.SETS, "squad", download.SETS["squad"]._replace(names="dev-v1.1.json"))
    dev = next(path for path in mirror.files if path.endswith("/dev-v1.1.json"))
    options = ["download", "--out", tmp_path, "--base-url", mirror.url, "--sets", "squad"]
    refused(run(*options), "bytes offered, 4,854,279 announced")
    mirror.files[dev] = b" " * 4_854_279
    refused(run(*options), "dev-v1.1.json: its sha256 is", "expected is 95aa6a52d5d6")
    assert not (tmp_path / "squad/dev-v1.1.json").exists() and not leftovers(tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="waits for ../shared (UNIBERT_SHARED)")
@pytest.mark.parametrize("name, path", [("xquad/xquad.de.json", "qa/xquad/xquad.de.json"),
                                        ("stsb/stsb-en-dev.csv", "sts/stsb_multi_mt/stsb-en-dev.csv"),
                                        ("tatoeba/tatoeba.afr-eng.afr", "retrieval/tatoeba/tatoeba.afr-eng.afr")])
def test_pinned_checksums_are_those_of_real_files(name, path):
    data = (SHARED / path).read_bytes()
    assert download.pinned()[name] == (hashlib.sha256(data).hexdigest(), len(data))


def test_files_of_several_hosts(server, tmp_path):  # noqa: F811
    server.files["/a"] = b"abc"
    there = f"localhost:{server.server_port}"
    client = Client(server.url, hosts=[there])
    for folder, host in (("x", f"127.0.0.1:{server.server_port}"), ("y", there)):
        download.transfers.fetch(client, download.RemoteFile(f"http://{host}/a", folder, "a", 3, None), tmp_path)
    assert (tmp_path / "x/a").read_bytes() == (tmp_path / "y/a").read_bytes() == b"abc"
    with pytest.raises(ValueError, match="leads away"):
        download.transfers.fetch(client, download.RemoteFile("http://example.org/a", "z", "a", 3, None), tmp_path)


def test_addresses():
    assert [f.url for f in download.files("xnli")] == ["https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip",
                                                       "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip"]
    assert [f.name for f in download.files("tatoeba", ["fr"])] == ["tatoeba.fra-eng.fra", "tatoeba.fra-eng.eng"]
    assert [f.name for f in download.files("xquad", ["ro"])] == ["xquad.en.json", "xquad.ro.json"]
    assert len(download.files("tatoeba")) == 224 and len({f.url for n in download.SETS for f in download.files(n)}) == 304
    assert download.choose((), ["sts", "ner"]) == ["panx", "wikineural", "stsb"]
    assert download.files("panx", base_url="http://h/m/")[0].url == (
        "http://h/m/s3.amazonaws.com/datasets.huggingface.co/wikiann/1.1.0/panx_dataset.zip")


@pytest.mark.parametrize("options, words", [
    (["--sets", "xnli,glue"], ["no data set glue", "panx"]),
    (["--tasks", "pos"], ["no task pos", "ner, nli"]),
    (["--tasks", "neutrality"], ["no task neutrality"]),
    (["--sets", "xnli", "--tasks", "qa"], ["none of xnli belongs to qa"]),
    (["--languages", "../x"], ["'../x'", "no language code"]),
    (["--languages", "German"], ["'German'"]),
    (["--sets", "tatoeba", "--languages", "qq"], ["none of the data sets has a file for qq"]),
    (["--base-url", "ftp://x"], ["not an http or https address"]),
    (["--sets", "xquad"], ["not there (404)", "xquad.ar.json"]),
])
def test_download_bad_input(mirror, tmp_path, options, words):
    if "--base-url" not in options:
        options = [*options, "--base-url", mirror.url]
    refused(run("download", "--out", tmp_path / "x", *options), *words)
    assert not (tmp_path / "x").exists()


def test_download_bad_folder(mirror, tmp_path):
    options = ["--base-url", mirror.url, "--sets", "squad"]
    (tmp_path / "file").write_text("x")
    assert run("download", "--out", tmp_path / "file", *options).exit_code == 2
    (tmp_path / "d").mkdir()
    for text in ("[]", "{", '{"files": {"squad/train-v1.1.json": {}}}'):
        (tmp_path / "d/manifest.json").write_text(text)
        refused(run("download", "--out", tmp_path / "d", *options), "not a manifest")
        refused(run("prepare", tmp_path / "d", tmp_path / "x"), "not a manifest")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["d", "file", "manifest.json"]


# ---- prepare ------------------------------------------------------------------------------------------------

def test_extracted_releases(source, tmp_path):
    """What somebody unpacked by hand gives the same."""
    for path in [*source.rglob("*.zip")]:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "s" / path.parent.name)
    for path in [*(tmp_path / "s").rglob("[a-z]*.tar.gz")]:
        with tarfile.open(path) as archive:
            archive.extractall(path.with_name(path.name.split(".")[0]), filter="data")
        path.unlink()
    result = run("prepare", tmp_path / "s", tmp_path / "data")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "data") == {k: v for k, v in EXPECTED.items() if k in ("ner/panx", "nli/xnli", "qa/mlqa")}


def test_prepare_keeps_bytes(source, tmp_path):
    prepare.prepare(source, tmp_path / "data", names=["panx", "xquad"], say=print)
    assert (tmp_path / "data/ner/panx/de.test.tsv").read_bytes() == conll("de", 4, prefix=True)
    assert (tmp_path / "data/qa/xquad/de.test.json").read_bytes() == squad(4, "de")
    assert (tmp_path / "data/ner/panx/en.test.tsv").exists() and not (tmp_path / "data/qa/mlqa").exists()


def test_languages_and_training_data(source, tmp_path):
    result = run("prepare", source, tmp_path / "a", "--languages", "swh,fi", "--sets", "xnli,tydiqa")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "a") == {"nli/xnli": {"en": (12, 6, 9), "sw": (0, 6, 9)}, "qa/tydiqa": EXPECTED["qa/tydiqa"]}
    result = run("prepare", source, tmp_path / "b", "--train-on", "all")
    assert result.exit_code == 0, result.output
    found = read(tmp_path / "b")
    assert found["nli/xnli"] == dict.fromkeys(("de", "en", "sw"), (12, 6, 9))
    assert found["ner/panx"] == dict.fromkeys(("de", "en", "zh-min-nan"), (4, 4, 4))
    assert found["qa/tydiqa"] == dict.fromkeys(("en", "fi", "sw"), (6, 0, 2))


def link(name, target):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {entry: target}


def odd_tar(kind, name="panx/x"):
    with tarfile.open(fileobj=(data := io.BytesIO()), mode="w:gz") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, "/etc/passwd"
        archive.addfile(entry)
    return data.getvalue()


EVIL = {
    **{f"zip {name}": ("panx.zip", zipped({"panx/de.tar.gz": tarred({"test": conll("de", 2)}), name: b"x"}))
       for name in ("../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:\\evil", "..")},
    **{f"tar {name}": ("panx.tar.gz", tarred({"de/test": conll("de", 2), name: b"x"}))
       for name in ("../evil", "a/../../evil", "/tmp/evil", "./../evil")},
    "tar in zip": ("panx.zip", zipped({"panx/de.tar.gz": tarred({"../test": conll("de", 2)})})),
    "zip link": ("panx.zip", zipped(link("panx/de", "/etc"))),
    "tar symbolic link": ("panx.tgz", odd_tar(tarfile.SYMTYPE)),
    "tar hard link": ("panx.tgz", odd_tar(tarfile.LNKTYPE)),
    "tar device": ("panx.tgz", odd_tar(tarfile.CHRTYPE)),
    "tar pipe": ("panx.tgz", odd_tar(tarfile.FIFOTYPE)),
}


@pytest.mark.parametrize("kind", EVIL)
def test_archives_cannot_leave_the_folder(tmp_path, kind):
    name, data = EVIL[kind]
    (tmp_path / "s/panx").mkdir(parents=True)
    (tmp_path / "s/panx" / name).write_bytes(data)
    refused(run("prepare", tmp_path / "s", tmp_path / "d"), "refused", name)
    assert not (tmp_path / "d").exists() and not list(tmp_path.rglob("*evil*"))


BAD = {
    "damaged archive": ({"panx/panx_dataset.zip": b"PK\3\4 no"}, ["panx_dataset.zip", "damaged archive", "download it again"]),
    "damaged inside": ({"panx/panx.zip": zipped({"panx/de.tar.gz": tarred({"test": conll("de", 900)})[:-40]})},
                       ["de.tar.gz", "damaged archive"]),
    "truncated": ({"xnli/XNLI-1.0.zip": zipped({"xnli.test.tsv": xnli(["de"], 500)})[:-200]}, ["damaged archive"]),
    "no tags": ({"wikineural/de.test.conllu": b"0\n1\n"}, ["wikineural/de.test.conllu:1", "no tag"]),
    "hidden labels": ({"xnli/xnli.test.tsv": xnli(["de"], 3).replace(b"neutral", b"-")}, ["xnli.test.tsv:2", "hidden"]),
    "other columns": ({"xnli/xnli.test.tsv": b"a\tb\n"}, ["first column", "'a'"]),
    "a language that is a path": ({"xnli/xnli.test.tsv": xnli(["de", "../../evil"], 2)},
                                  ["xnli.test.tsv:4", "the language is '../../evil'"]),
    "no header": ({"xnli/xnli.test.tsv": b""}, ["xnli.test.tsv"]),
    "no JSON": ({"xquad/xquad.de.json": b"{"}, ["xquad.de.json:1", "not JSON"]),
    "no GoldP": ({"tydiqa/tydiqa-goldp-v1.1-dev.json": squad(3)}, ["tydiqa-goldp-v1.1-dev.json: not TyDiQA-GoldP"]),
    "empty": ({"stsb/stsb-de-dev.csv": b""}, ["stsb-de-dev.csv", "empty"]),
    "one side": ({"tatoeba/tatoeba.deu-eng.deu": b"Ja.\n"}, ["tatoeba.deu-eng.eng: missing"]),
    "other lengths": ({"tatoeba/tatoeba.deu-eng.deu": b"Ja.\n", "tatoeba/tatoeba.deu-eng.eng": b"Yes.\nNo.\n"},
                      ["tatoeba", "1 lines, but 2"]),
    "twice": ({"a/xquad.de.json": squad(2), "b/xquad.de.json": squad(2)}, ["b/xquad.de.json", "is also in", "a/xquad.de.json"]),
    "nothing known": ({"x/data.csv": b"a,b\n"}, ["no data set found", "eval download"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_prepare_bad_input(tmp_path, kind):
    files, words = BAD[kind]
    for name, data in files.items():
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(data)
    refused(run("prepare", tmp_path / "s", tmp_path / "d"), *words)
    assert not (tmp_path / "d").exists()
    (tmp_path / "d/ner/mine").mkdir(parents=True)                      # what was there before stays as it was
    (tmp_path / "d/tasks.json").write_text('{"ner/mine": {"source": "ro"}}')
    refused(run("prepare", tmp_path / "s", tmp_path / "d"), *words)
    assert (tmp_path / "d/tasks.json").read_text() == '{"ner/mine": {"source": "ro"}}'
    assert sorted(p.name for p in (tmp_path / "d").rglob("*")) == ["mine", "ner", "tasks.json"]


def test_prepare_bad_options(source, tmp_path):
    refused(run("prepare", source, tmp_path / "d", "--sets", "glue"), "no data set glue")
    refused(run("prepare", source, tmp_path / "d", "--languages", "x/y"), "no language code")
    for inside in (source, source / "data", source / "panx/data"):
        refused(run("prepare", source, inside), "choose a folder beside it")
    refused(run("prepare", source, tmp_path / "d", "--languages", "qq", "--sets", "tatoeba"), "no data set found")
    assert run("prepare", source, tmp_path / "d", "--train-on", "target").exit_code == 2
    assert run("prepare", tmp_path / "none", tmp_path / "d").exit_code == 2
    assert run("prepare", source / "xquad/xquad.de.json", tmp_path / "d").exit_code == 2
    assert not (tmp_path / "d").exists()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/tasks.json").write_text("{")
    refused(run("prepare", source, tmp_path / "d"), "tasks.json:1: not JSON")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["tasks.json"]


def test_folders_that_are_laid_out_already(tmp_path):
    """Only tasks.json is written; the language to train on is told where English is not it."""
    data = tmp_path / "data"
    for name, content in {"ner/en.train.tsv": conll("en", 3), "ner/ro.test.tsv": conll("ro", 3),
                          "qa/mine/tr.train.json": squad(4), "qa/mine/az.train.json": squad(3),
                          "qa/xquad/xquad.en.json": squad(2), "nli/a/en.train.tsv": multinli("en", 6),
                          "nli/b/nl.train.tsv": multinli("nl", 6)}.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    result = run("prepare", data, tmp_path / "d")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "d/tasks.json").read_text())
    assert {name: entry.get("source") for name, entry in settings.items()} == {
        "ner": "en", "nli/a": "en", "nli/b": None, "qa/mine": "tr", "qa/xquad": "en"}
    assert settings["nli/b"]["folder"] == "../data/nli/b"
    assert [d.folder.resolve() for d in tasks.find(tmp_path / "d", "qa")] == [data / "qa/mine", data / "qa/xquad"]
    refused(run("prepare", data, tmp_path / "d", "--sets", "xquad"), "laid out already")
    assert run("prepare", data, data).exit_code == 0
    assert "folder" not in json.loads((data / "tasks.json").read_text())["ner"]
