"""Public downloads -> DST/<task>/<data set>/<language>.<split>.<ending> and DST/tasks.json, for the readers of eval/.

    python -m eval prepare SRC DST [--sets xnli] [--languages de,sw] [--train-on all]

SRC is what `python -m eval download` wrote, or a folder with the releases as their authors give them: archives, or what
was taken out of them, at any depth. What is known and where it is found:

panx        PAN-X's <language>.tar.gz, alone or inside panx_dataset.zip, with the files train, dev and test
wikineural  wikineural/<language>/train.conllu, val.conllu, test.conllu
xnli        xnli.dev.tsv and xnli.test.tsv, all languages in each, told by a column; multinli.train.<language>.tsv
squad       train-v1.1.json, dev-v1.1.json
xquad       xquad.<language>.json
mlqa        dev-context-<l>-question-<l>.json and test-..., of one language only
tydiqa      tydiqa-goldp-v1.1-train.json and -dev.json, all languages in each, told by the ids; dev is what is scored
stsb        stsb-<language>-train.csv, -dev.csv, -test.csv
tatoeba     tatoeba.<language>-eng.<language>, tatoeba.<language>-eng.eng

Contents stay as they are, byte for byte, but for files of many languages, which are parted. Each file is read with its
reader before it gets its place. Nothing is ever taken out of an archive under a name that the archive gives.

Where SRC is DIR/<task>/<data set>/ already, only DST/tasks.json is written: where each data set is, and its language to
train on where names cannot tell.
"""
import contextlib
import functools
import gzip
import io
import json
import os
import re
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from eval import download, tasks
from eval.run import MODULES
from files import write_atomically
from wiki.download import read_manifest

# Data set, pattern of a path below SRC (which begins with SRC's own name); groups: language, split, name to keep.
# Without a language there are many in the file, but for SQuAD; without a split it is test.
PATTERNS = [(name, re.compile(pattern)) for name, pattern in (
    ("panx", r".*panx.*/(?P<language>[a-z]+(?:-[a-z]+)*)(?:\.tar\.gz)?/(?P<split>train|dev|test)"),
    ("wikineural", r".*wikineural/(?P<language>[a-z]{2})[./](?P<split>train|val|test)\.conllu"),
    ("xnli", r".*/xnli\.(?P<split>dev|test)\.tsv"),
    ("xnli", r".*/multinli\.(?P<split>train)\.(?P<language>[a-z]{2})\.tsv"),
    ("squad", r".*/(?P<split>train|dev)-v1\.1\.json"),
    ("xquad", r".*/xquad\.(?P<language>[a-z]{2})\.json"),
    ("mlqa", r".*/(?P<split>dev|test)-context-(?P<language>[a-z]{2})-question-(?P=language)\.json"),
    ("tydiqa", r".*/tydiqa-goldp-v1\.1-(?P<split>train|dev)\.json"),
    ("stsb", r".*/stsb-(?P<language>[a-z]{2})-(?P<split>train|dev|test)\.csv"),
    ("tatoeba", r".*/(?P<name>tatoeba\.(?P<language>[a-z]{3})-eng\.(?:(?P=language)|eng))"),
)]
SETTINGS = {"tydiqa": {"splits": {"dev": "test"}}}       # GoldP's test set is not public: its dev set is what is scored
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)


# ---- what is there ------------------------------------------------------------------------------------------

def entries(path, name):
    """(name, function that returns the bytes) of every file below a folder, and of archives as if they were folders.

    Raises ValueError for an archive with an entry that could lie outside it: "..", an absolute path, a link.
    """
    if path.is_dir():
        for inside in sorted(path.iterdir()):
            if not inside.name.startswith(".") and not inside.is_symlink():
                yield from entries(inside, f"{name}/{inside.name}")
    elif is_archive(name):
        with open(path, "rb") as file:
            yield from archived(file, name)
    else:
        yield name, path.read_bytes


def is_archive(name):
    return name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


def archived(file, name):
    """As `entries`, for an open archive; those inside it are opened too."""
    with damage(name):
        if name.endswith(".zip"):
            archive = zipfile.ZipFile(file)
            found = [(e.filename, e, not stat.S_ISLNK(e.external_attr >> 16), e.is_dir()) for e in archive.infolist()]
        else:
            archive = tarfile.open(fileobj=file)
            found = [(e.name, e, e.isfile() or e.isdir(), e.isdir()) for e in archive.getmembers()]

    def read(entry):
        with damage(name):
            return archive.read(entry) if name.endswith(".zip") else archive.extractfile(entry).read()

    for inside, _, plain, _ in found:
        if not plain:
            raise ValueError(f"{name}: {inside!r} in it is a link or no file: refused")
        if inside.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", inside) or re.match("[A-Za-z]:", inside):
            raise ValueError(f"{name}: {inside!r} in it leads out of the folder: refused")
    for inside, entry, _, folder in found:
        if folder or os.path.basename(inside).startswith("."):           # not data: what macOS adds
            continue
        if is_archive(inside):
            yield from archived(io.BytesIO(read(entry)), f"{name}/{inside}")
        else:
            yield f"{name}/{inside.removeprefix('./')}", functools.partial(read, entry)


@contextlib.contextmanager
def damage(name):
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"{name}: damaged archive ({error}); delete it and download it again") from None


def verify(src):
    """Raises ValueError if a file is not what SRC/manifest.json says was downloaded."""
    for name, entry in read_manifest(src).items():
        path = src / name
        if path.is_file() and download.sha256(path) != entry["sha256"]:
            raise ValueError(f"{path}: not what was downloaded; run `python -m eval download` again")


# ---- files --------------------------------------------------------------------------------------------------

def part_xnli(data, name):
    """XNLI's table -> {language: the header and the language's rows}; the first column says which."""
    header, *rows = data.split(b"\n")
    if header.split(b"\t")[0] != b"language":
        raise ValueError(f"{name}:1: the first column is {header.split(bytes([9]))[0][:20]!r}, not language")
    parts = {}
    for line, row in enumerate(rows, 2):
        language = row.split(b"\t")[0].decode(errors="replace")
        if row.strip() and not tasks.CODE.fullmatch(language):
            raise ValueError(f"{name}:{line}: the language is {language[:20]!r}")
        if row.strip():
            parts.setdefault(language, [header]).append(row)
    return {language: b"\n".join(part) + b"\n" for language, part in parts.items()}


def part_tydiqa(data, name):
    """SQuAD JSON whose ids begin with a language ("finnish-...") -> {language: SQuAD JSON}."""
    try:
        value = json.loads(data)
        parts = {}
        for article in value["data"]:
            spoken = article["paragraphs"][0]["qas"][0]["id"].partition("-")[0]
            parts.setdefault(tasks.SPELLED_OUT[spoken], []).append(article)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: not TyDiQA-GoldP ({type(error).__name__}: {error})") from None
    return {language: json.dumps({"version": value.get("version"), "data": part}, ensure_ascii=False).encode()
            for language, part in parts.items()}


def pieces(name, found, path, data):
    """One file of a release, with the groups of its pattern -> (file name to write, language, split, bytes), once for
    each language in it."""
    split = tasks.SPLITS.get(found.get("split"), "test")
    if "language" in found or name == "squad":
        parts = {found.get("language", download.SOURCE): data}
    else:
        parts = (part_xnli if name == "xnli" else part_tydiqa)(data, path)
    ending = ".tsv" if name == "panx" else os.path.splitext(path)[1]
    for language, part in parts.items():
        yield found.get("name", f"{language}.{split}{ending}"), language, split, part


def wanted(language, split, languages, train_on):
    """Is this file asked for? The training data of other languages only with train_on "all"."""
    if languages and tasks.language_code(language) not in languages:
        return False
    return split != "train" or language == download.SOURCE or train_on == "all"


def convert(src, staging, names, languages, train_on, say):
    """Write the files of all data sets below `staging` -> {"task/set": Counter of examples by split}."""
    written, counts, left_out = {}, {}, set()
    known = [(name, pattern) for name, pattern in PATTERNS if name in names]
    for path, read in entries(src, src.resolve().name):
        name, match = next(((name, match) for name, pattern in known if (match := pattern.fullmatch(path))), (None, None))
        found = match.groupdict() if match else {}
        if not match or "language" in found and not wanted(found["language"], found.get("split"), languages, train_on):
            continue
        dataset = f"{download.SETS[name].task}/{name}"
        for file, language, split, data in pieces(name, found, path, read()):
            if not wanted(language, split, languages, train_on):
                continue
            if not tasks.CODE.fullmatch(language):                       # PAN-X has Simple English
                left_out.add(language)
                continue
            target = staging / dataset / file
            if target in written:
                raise ValueError(f"{path}: {language} {split} is also in {written[target]}; keep one")
            written[target] = path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as output:
                output.write(data)
                output.flush()
                os.fsync(output.fileno())
            count = counts.setdefault(dataset, Counter())
            if name != "tatoeba":                                        # its pairs are read when both sides are there
                count[split] += check(MODULES[dataset.split("/")[0]], target, language, path, say)
    if "retrieval/tatoeba" in counts:
        with named(staging / "retrieval/tatoeba", "tatoeba"):
            counts["retrieval/tatoeba"]["test"] = sum(
                len(rows) for splits in MODULES["retrieval"].load(staging / "retrieval/tatoeba").values() for rows in splits.values())
    if left_out:
        say(f"note: left out: {', '.join(sorted(left_out))}: no language's code")
    return counts


@contextlib.contextmanager
def named(path, name):
    """In errors about the file `path`, its name in the release."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from None


def check(reader, target, language, name, say):
    """The number of examples that the reader finds in a file."""
    with named(target, name), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        count = sum(1 for _ in reader.read(target, language))
        if not count:
            raise ValueError(f"{name}: empty: no example in it")
    for warning in caught:
        say(f"note: {warning.message}".replace(str(target), name))
    return count


# ---- the command --------------------------------------------------------------------------------------------

def prepare(src, dst, names=(), languages=(), train_on="source", say=print):
    """SRC -> DST, as above. Data sets that DST has already are left alone.

    names, languages: limits. train_on: "source", or "all" for the training data of every language. Raises ValueError,
    in one line, for bad input; then nothing new is in DST.
    """
    src, dst = Path(src), Path(dst)
    names_given, names, codes = names, download.choose(names), download.language_set(languages)
    if any((src / task).is_dir() for task in tasks.TASKS):
        if names_given or languages or train_on == "all":
            raise ValueError(f"{src}: laid out already; only tasks.json is written, and all of it: no further options")
        return index(src, dst, say)
    if not src.is_dir():
        raise ValueError(f"{src}: no such folder")
    if src.resolve() in (dst.resolve(), *dst.resolve().parents):
        raise ValueError(f"{dst}: lies in {src}, which is searched for data; choose a folder beside it")
    settings = tasks.read_settings(dst)
    verify(src)
    new = not dst.exists()
    dst.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=dst) as staging:
            there = [name for name in names if (dst / download.SETS[name].task / name).exists()]
            for name in there:
                say(f"{download.SETS[name].task}/{name}: there already, left alone")
            counts = convert(src, Path(staging), [n for n in names if n not in there], codes, train_on, say)
            if not counts and not there:
                raise ValueError(f"{src}: no data set found; expected what `python -m eval download` writes, or "
                                 "DIR/<task>/<data set>")
            for name in names:
                dataset = f"{download.SETS[name].task}/{name}"
                if name in there or dataset in counts:
                    settings.setdefault(dataset, {"source": download.SOURCE, **SETTINGS.get(name, {})})
            for dataset, count in sorted(counts.items()):
                (dst / dataset).parent.mkdir(exist_ok=True)
                os.rename(Path(staging, dataset), dst / dataset)
                say(f"{dataset}: " + ", ".join(f"{split} {count[split]:,}" for split in ("train", "dev", "test")
                                               if split in count) + " examples")
        write_settings(dst, settings)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                dst.rmdir()
        raise


def write_settings(dst, settings):
    write_atomically(dst / "tasks.json", [json.dumps(dict(sorted(settings.items())), indent=1).encode() + b"\n"])


def index(src, dst, say):
    """DST/tasks.json for the data sets of DIR/<task>/<data set>, which stay where they are.

    The language to train on is English where a data set has it; otherwise, if the task has no English to train on, the
    one with the largest training set.
    """
    settings = tasks.read_settings(dst)
    for task in tasks.TASKS:
        if not (src / task).is_dir():
            continue
        found = [(d, MODULES[task].load(d.folder, d.splits or None)) for d in tasks.find(src, task)]
        english = any({"train", "dev"} & set(splits.get(download.SOURCE, ())) for _, splits in found)
        for dataset, content in found:
            trained = {code: len(splits["train"]) for code, splits in content.items() if "train" in splits}
            source = dataset.source or (download.SOURCE if download.SOURCE in content else
                                        None if english or not trained else max(trained, key=trained.get))
            entry = {"source": source} if source and task != "retrieval" else {}
            if dataset.splits:
                entry["splits"] = dataset.splits
            if src.resolve() != dst.resolve():
                entry["folder"] = os.path.relpath(dataset.folder.resolve(), dst.resolve())
            settings[dataset.name] = entry
            say(f"{dataset.name}: {', '.join(content)}" + (f"; trains on {source}" if trained and source else ""))
    dst.mkdir(parents=True, exist_ok=True)
    write_settings(dst, settings)
