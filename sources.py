"""Texts and Wikipedia dumps -> clean documents, one a line: the first stage of `data.py prepare`.

    list_sources("texts")            # [("ro", Path("texts/ro.txt")), ...]
    read_documents("texts/ro.txt")   # a document after the other, streamed
    list_parts("dumps")              # texts and dumps, cut into pieces that are worked on at once
    clean_part((part, folder, Reading()))

Text files are taken as they are. Pages of dumps go through the filters of `wiki/curate.py`, while they still have lines.
"""
import hashlib
import heapq
import itertools
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wiki import curate
from wiki import wikipedia
from records import Output, digest, finish, finished
from wiki.wikipedia import Part

# Control characters that are no white space; soft hyphen; zero-width space, word joiner, bidirectional marks, byte
# order mark, interlinear annotation. U+200C ZWNJ and U+200D ZWJ stay: they carry spelling in Persian and Indic.
INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
                       "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]")
LANGUAGE = re.compile(r"[a-z][a-z0-9_-]*\.")      # start of a file name: a Wikipedia code
DOWNLOAD = re.compile(r"\w+wiki-\d{4}-?\d{2}-?\d{2}-(cirrus|xml|xml-legacy)")      # a folder that `data.py download` makes
PART_BYTES = 1 << 28                              # of a multistream dump; a constant, so that workers do not matter
DOCUMENT_LIMIT = 1 << 26                          # bytes of a text's document: above, its blank lines are missing
SAMPLES = 3                                       # pages kept for people to look at, a reason and language
EXCERPT = 300                                     # characters of each

# ---------------------------------------------------------------------------------------------------------------
# Text


def clean(text):
    """NFC, no control or invisible characters, any run of white space (newlines too) as one space. Idempotent."""
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", text)).split())


def list_sources(folder):
    """Text files of `folder` -> sorted list of (language, path). Language = file name up to the first dot, in lower
    case, so that README.txt is none. ValueError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    sources = _texts(folder)
    if not sources:
        raise ValueError(f"{folder}: holds no <code>.txt file (one language a file, blank line between documents)")
    return sources


def _texts(folder):
    return sorted((path.name.split(".")[0], path) for path in folder.glob("*.txt")
                  if LANGUAGE.match(path.name) and not wikipedia.language_of(path.name))    # lists beside a dump


def read_documents(path):
    """Streams a text file -> iterator of (raw text of a document, count of invalid UTF-8 sequences replaced in it).
    ValueError for a document above DOCUMENT_LIMIT, as a file with a document a line would be."""
    lines, invalid, size = [], 0, 0
    with open(path, "rb") as file:
        if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8")
        for line in file:
            size += len(line)
            if size > DOCUMENT_LIMIT:
                raise ValueError(f"{path}: holds a document of more than {DOCUMENT_LIMIT:,} bytes; write a blank line "
                                 "between documents")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("utf-8", errors="replace")
                invalid += text.count("\ufffd") - line.count("\ufffd".encode())
            if text.strip("\ufeff \t\r\n"):
                lines.append(text)
            else:
                if lines:
                    yield "".join(lines), invalid
                lines, invalid, size = [], 0, 0
    if lines:
        yield "".join(lines), invalid


# ---------------------------------------------------------------------------------------------------------------
# Texts and dumps

class Reading(NamedTuple):
    """How sources are read."""
    limit: int | None = None       # articles of each dump
    opening_text: bool = False     # leads of articles only
    signatures: bool = False       # keep each document's MinHash, for near-duplicates


def is_text(part):
    return part.path.suffix == ".txt"


def list_parts(source, languages=None, reading=Reading(), on_warning=print):
    """A text file, a dump, or a folder of <code>.txt and of dumps (with its subfolders) -> sorted list of `Part`.

    languages: codes to take (None = all). A dump that does not tell its language, neither by its name nor inside, is
    left out with a warning, unless it is `source` itself and `languages` one code. Only a dump whose index lies beside
    it is more than one part. Raises ValueError where nothing is found, or nothing in one of the languages.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source}: no such folder or file")
    if source.is_file() and source.suffix == ".txt":
        parts, dumps = [Part(path, code) for code, path in _texts(source.parent) if path == source], []
    else:
        parts = [Part(path, code) for code, path in (_texts(source) if source.is_dir() else ())]
        dumps = wikipedia.list_dumps(source)
    for code, path in dumps:
        if not code and source.is_file() and languages and len(languages) == 1:
            code = languages[0]
        if not code:
            on_warning(f"{path}: neither its name nor its pages tell its language; left out "
                       "(as INPUT itself it can be named with --languages CODE)")
        elif languages is None or code in languages:
            pieces = 1 if reading.limit else 1 + path.stat().st_size // PART_BYTES
            parts += [part._replace(language=code) for part in wikipedia.split(path, pieces)]
    if begun := sorted(source.rglob("*.part")) if source.is_dir() else ():
        on_warning(f"{source}: downloads are not finished ({len(begun)} .part files, {begun[0].name} first), so that a part of their "
                   "dumps is missing: run `data.py download` again first")
    for code, group in itertools.groupby(dumps, key=lambda dump: dump[0]):
        downloads = sorted({path.parent.name for _, path in group if DOWNLOAD.fullmatch(path.parent.name)})
        if len(downloads) > 1:
            on_warning(f"{source}: holds {len(downloads)} dumps of {code}, {', '.join(downloads)}; all are read, so "
                       "that pages that changed come twice: keep just one")
    if languages is not None and (missing := sorted(set(languages) - {part.language for part in parts})):
        there = sorted({part.language for part in parts} | {code for code, _ in dumps if code})
        raise ValueError(f"{source}: holds no text for {', '.join(missing)}; its languages are {', '.join(there) or 'unknown'}")
    if not parts:
        raise ValueError(f"{source}: holds no <code>.txt file (one language a file, blank line between documents) "
                         "and no Wikipedia dump")
    if languages is not None:
        parts = [part for part in parts if part.language in languages]
    return sorted(parts, key=lambda part: (part.language, str(part.path), part.start))


def part_size(part):
    """Bytes on the disk."""
    return (part.path.stat().st_size if part.end is None else part.end) - part.start


def _code_digest():
    """Of the files that decide what a page becomes: work done by an earlier version of them is done again."""
    modules = ("sources", "wiki/wikipedia", "wiki/wikitext", "wiki/curate", "wiki/languages")
    return digest([hashlib.sha256((Path(__file__).parent / f"{name}.py").read_bytes()).hexdigest() for name in modules])


def _pages(part, reading, counts, warnings):
    """Documents of a part -> iterator of (title, text, reason to drop it or "")."""
    if is_text(part):
        invalid = 0
        for text, replaced in read_documents(part.path):
            counts["article"] += 1
            invalid += replaced
            yield "", text, ""
        if invalid:
            counts["invalid_utf8"] = invalid
            warnings.append(f"{part.path}: {invalid} invalid UTF-8 sequences replaced by U+FFFD")
        return
    lines = curate.RepeatedLines()
    try:
        for document in wikipedia.read_documents(part, limit=reading.limit, opening_text=reading.opening_text,
                                                 counts=counts, on_warning=warnings.append):
            yield document.title, *curate.curate(document.text, part.language, lines)
    except ValueError as error:                   # no dump at all: that must not end the work on a hundred others
        warnings.append(f"{error}; left out")


def clean_part(task):
    """(Part, folder, Reading) -> record of one cleaned document a line in the file `record["text"]` of the folder.

    Beside it .index, three uint64 a document: its hash, its characters, its bytes with the line end; and with
    `signatures` .minhash, [32] uint16 a document. The record tells "counts" (of the reader, and "empty"), "dropped"
    {reason: count}, "samples" [[reason, hash, title, excerpt]] of what was dropped, and "warnings".
    """
    part, folder, reading = task
    stat = part.path.stat()
    key = [str(part.path.resolve()), stat.st_size, stat.st_mtime_ns, part.language, part.start, part.end, *reading,
           _code_digest()]
    name = f"{part.language}-{digest(key)[:16]}"
    if record := finished(folder, name, key):
        return record
    counts, dropped, warnings, samples = Counter(), Counter(), [], {}
    outputs = [Output(folder / "clean" / f"{name}{end}") for end in ("", ".index", ".minhash")[:2 + reading.signatures]]
    index = []

    def flush():
        outputs[1].write(np.array(index, np.uint64).tobytes())
        index.clear()

    for title, text, reason in _pages(part, reading, counts, warnings):
        text = clean(text)
        if reason or not text:
            dropped[reason or "empty"] += 1
            if text:
                place = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
                kept = samples.setdefault(reason, [])
                kept.append([reason, place, title, text[:EXCERPT]])
                samples[reason] = heapq.nsmallest(SAMPLES, kept)
            continue
        line = text.encode() + b"\n"
        outputs[0].write(line)
        place = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
        index.append((place, len(text), len(line)))
        if reading.signatures:
            outputs[2].write(curate.minhash(text).tobytes())
        if len(index) == 10_000:
            flush()
    flush()
    files = {f"clean/{output.path.name}": output.close() for output in outputs}
    return finish(folder, name, key, files, text=f"clean/{name}", counts=counts, dropped=dropped, warnings=warnings,
                  samples=[sample for kept in samples.values() for sample in kept])
