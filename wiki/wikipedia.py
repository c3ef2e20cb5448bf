"""A streaming reader of Wikipedia's dumps.

    for document in read_documents("rowiki-20260101-pages-articles.xml.bz2"):     # or a CirrusSearch .json.bz2
        print(document.language, document.page_id, document.title, document.text)

Two kinds of dump, told apart by their first bytes, plain or compressed with bzip2, gzip or xz:

- MediaWiki XML (pages-articles, multistream, content_current), whose wikitext `clean_wikitext` turns to prose;
- CirrusSearch JSON lines (an index line, then a document), whose `text` is prose already, but in one line.

Only articles come out: namespace 0, content model wikitext, no redirects, no disambiguation pages. Memory does not
grow with the dump. What a file holds before a cut or a damaged byte is kept; the rest is named in one line.
"""
import bz2
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from wiki.wikitext import SiteInfo, clean_wikitext, decode_entities, is_disambiguation, is_redirect, make_siteinfo

# ---------------------------------------------------------------------------------------------------------------------
# Names

def wiki_name(code):
    """Language code -> database name of its Wikipedia: "ro" -> "rowiki", "zh-min-nan" -> "zh_min_nanwiki"."""
    return code.replace("-", "_") + "wiki"


def language_of(name):
    """File or database name -> language code, or "" where it does not say: "rowiki-2026..." -> "ro"."""
    match = re.match(r"((?:[a-z]{2,3}|simple)(?:_[a-z]+)*)wiki(?![a-z])", name)
    return match.group(1).replace("_", "-") if match else ""


def _plain_code(code):
    """What a dump says its language is, or "" where that is no code: files are named by it."""
    return code if isinstance(code, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{1,30}", code) else ""


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

CHUNK = 1 << 18                # bytes of text that are handled at a time
PAGE_LIMIT = 1 << 26           # bytes; MediaWiki's own limit of a page is 2 MiB
RATIO_LIMIT = 1000             # a file that grows more than this (and past 256 MiB) is no text
XZ_MEMORY = 1 << 28            # bytes that an xz file may ask for its dictionary


class Damaged(ValueError):
    """A dump that cannot be read further, and why, in one line without the file's name."""


class _Gunzip:
    """zlib with the interface of BZ2Decompressor."""

    def __init__(self):
        self._zlib, self._tail = zlib.decompressobj(31), b""

    def decompress(self, data, max_length):
        out = self._zlib.decompress(self._tail + data, max_length)
        self._tail = self._zlib.unconsumed_tail
        return out

    eof = property(lambda self: self._zlib.eof)
    needs_input = property(lambda self: not self._tail)
    unused_data = property(lambda self: self._zlib.unused_data)


_DECOMPRESSORS = {b"BZh": ("bzip2", bz2.BZ2Decompressor),
                  b"\x1f\x8b": ("gzip", _Gunzip),
                  b"\xfd7zXZ\x00": ("xz", lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY))}


def _raw_chunks(path, start, end):
    with open(path, "rb") as file:
        file.seek(start)
        left = (1 << 62) if end is None else end - start
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            left -= len(chunk)
            yield chunk


def _chunks(path, start=0, end=None):
    """Bytes start..end of a file, decompressed, in pieces of at most `CHUNK`; `Damaged` where they end too soon."""
    chunks = _raw_chunks(path, start, end)
    data = next(chunks, b"")
    name, make = next((entry for magic, entry in _DECOMPRESSORS.items() if data.startswith(magic)), ("", None))
    if make is None:
        yield data
        yield from chunks
        return
    consumed, produced = len(data), 0
    decompressor = make()
    while True:
        try:
            out = decompressor.decompress(data, CHUNK)
        except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise Damaged(f"{name} data damaged after {produced:,} bytes of text ({error})") from None
        data = b""
        produced += len(out)
        if produced > (1 << 28) and produced > RATIO_LIMIT * consumed:
            raise Damaged(f"{consumed:,} bytes of {name} grow to more than {produced:,}: no dump compresses so well")
        if out:
            yield out
        if decompressor.eof:                                    # multistream files are many streams end to end
            data = decompressor.unused_data.lstrip(b"\0")
            if not data:
                data = next(chunks, b"").lstrip(b"\0")
                consumed += len(data)
            if not data:
                return
            decompressor = make()
        elif decompressor.needs_input:
            data = next(chunks, b"")
            consumed += len(data)
            if not data and not out:
                raise Damaged(f"{name} data cut off after {produced:,} bytes of text")


# ---------------------------------------------------------------------------------------------------------------------
# MediaWiki XML

class _XmlPages:
    """Bytes of a dump in, pages out: feed() returns the pages completed so far as (id, title, wikitext).

    expat does the parsing: any encoding it or Python knows, any namespace prefix, entities. A document type
    declaration is refused, and with it every bomb made of entities.
    """
    _KEPT = frozenset("title ns id model text dbname namespace".split())

    def __init__(self, counts, siteinfo=None, fragment=False):
        self.counts, self.siteinfo, self.language = counts, siteinfo, ""
        self.title, self.page_id, self.done = None, "", []
        self._wanted, self._key, self._length = True, None, 0
        self._namespaces, self._local, self._pieces, self._since_page = [], {}, [], 0
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.buffer_size = CHUNK
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse
        if fragment:
            self._parser.Parse(b"<mediawiki>", False)

    def _refuse(self, *_):
        raise Damaged("a document type declaration, which no MediaWiki dump has")

    def _start(self, name, attributes):
        local = self._local.get(name)
        if local is None:
            local = self._local[name] = name.rpartition(":")[2]
        if local in self._KEPT:
            if self.title is None and local not in ("dbname", "namespace"):     # outside of pages
                return
            self._pieces.clear()
            self._key = attributes.get("key")
            if self._wanted or local == "title":
                self._parser.CharacterDataHandler = self._data
        elif local == "page":
            self.title, self.page_id, self.namespace, self.model, self.text = "", "", "", "wikitext", ""
            self.redirect, self._wanted = False, True
        elif local == "redirect":
            self.redirect, self._wanted = True, False
        elif local == "mediawiki":
            self.language = next((_plain_code(v) for k, v in attributes.items() if k.endswith("lang")), "")

    def _data(self, text):
        self._pieces.append(text)
        self._length += len(text)
        if self._length > PAGE_LIMIT:
            raise Damaged(f"page {self.title!r} of more than {PAGE_LIMIT:,} characters")

    def _end(self, name):
        local = self._local[name]
        if local == "page" and self.title is not None:          # None: a page in a page, which is no MediaWiki
            self._finish()
        elif local == "siteinfo":
            self.siteinfo = make_siteinfo(self.language, self._namespaces)
        if local not in self._KEPT or self._parser.CharacterDataHandler is None:
            return
        value = "".join(self._pieces)
        self._parser.CharacterDataHandler = None
        self._pieces.clear()
        self._length = 0
        if local == "text":
            self.text = value
        elif local == "title":
            self.title = value
        elif local == "id":
            self.page_id = self.page_id or value                # the first of page, revision and contributor
        elif local == "ns":
            self.namespace = value.strip()
            self._wanted = self.namespace == "0"                # the text of other pages is not even gathered
        elif local == "model":
            self.model = value
        elif local == "dbname":
            self.language = language_of(value) or self.language
        elif local == "namespace" and re.fullmatch(r"-?\d{1,6}", self._key or ""):
            self._namespaces.append((int(self._key), value))

    def _finish(self):
        self._since_page = 0
        if not self.namespace:                                  # schemas before 0.6 say it in the title alone
            prefix = self.title.partition(":")[0] if ":" in self.title else ""
            self.namespace = next((str(key) for key, name in self._namespaces if prefix and name == prefix), "0")
        if self.namespace != "0":
            self.counts["other namespace"] += 1
        elif self.redirect or is_redirect(self.text):
            self.counts["redirect"] += 1
        elif self.model != "wikitext":
            self.counts["other content model"] += 1
        elif is_disambiguation(self.title, self.text):
            self.counts["disambiguation"] += 1
        else:
            self.done.append((self.page_id, self.title, self.text))
        self.title, self._wanted = None, True

    def feed(self, data):
        """data b"" ends the dump. `Damaged` where it is cut off or not XML; pages before that are in `done`."""
        self._since_page += len(data)
        if self._since_page > 2 * PAGE_LIMIT:
            raise Damaged(f"no end of a page within {2 * PAGE_LIMIT:,} bytes")
        try:
            self._parser.Parse(data, not data)
        except expat.ExpatError as error:
            where = f"in page {self.title!r}" if self.title is not None else "between pages"
            if not data:
                raise Damaged(f"cut off {where}") from None
            raise Damaged(f"no XML {where}, line {error.lineno} ({expat.ErrorString(error.code)})") from None
        except Damaged:
            raise
        except (LookupError, ValueError) as error:              # an encoding that Python or expat does not know
            raise Damaged(f"an encoding that cannot be read ({error})") from None


def _read_xml(part, chunks, counts, opening_text):
    if part.start:                                              # streams further on do not repeat the head
        head = _XmlPages(Counter())
        for chunk in _chunks(part.path, 0, None):
            head.feed(chunk)
            if head.siteinfo:
                break
        pages = _XmlPages(counts, head.siteinfo, fragment=True)
        pages.language = head.language
    else:
        pages = _XmlPages(counts)
    damage = None
    while True:
        chunk = next(chunks, b"") if damage is None else b""
        try:
            if isinstance(chunk, Damaged):
                raise chunk
            if chunk or part.end is None:
                pages.feed(chunk)
        except Damaged as error:
            damage = error
        language = part.language or pages.language
        siteinfo = pages.siteinfo or SiteInfo()
        for page_id, title, text in pages.done:
            if opening_text:
                text = re.split(r"\n==", text, maxsplit=1)[0]
            yield Document(language, page_id, title, clean_wikitext(text, siteinfo))
        pages.done.clear()
        if damage is not None:
            raise damage
        if not chunk:
            return


# ---------------------------------------------------------------------------------------------------------------------
# CirrusSearch

_BACK_LINK = re.compile(r"(?:^|(?<=[.!?)\]\"”»/]) |(?= ↑))(?: ?↑|\^) ")


def clean_cirrus(text):
    """A CirrusSearch `text` or `opening_text`, one line of prose: entities to characters, the list of references at
    its end cut. The list shows by its back-links, ↑ or (after a full stop) ^: three or more, on average within 600
    characters."""
    if "↑" in text or " ^ " in text:
        starts = [match.start() for match in _BACK_LINK.finditer(text)]
        if len(starts) >= 3 and len(text) - starts[0] < 600 * len(starts):
            text = text[:starts[0]]
    return decode_entities(text).strip()


# The namespace of Lua modules, which CirrusSearch counts among a page's templates: Module:Disambiguation serves many articles.
_MODULE = re.compile("m(o|ó|ò|oo)d[uúüū]|mô đun|мод[уў]|մոդ|მოდ|モジュ|모듈|模[块塊組组]|وحدة|پودمان|ماڈیول|יחידה|मॉड्यू|विभाग|মডিউ|మాడ్యూ|"
                     "ਮੌਡਿਊ|ಮಾಡ್ಯೂ|ഘടകം|มอดูล", re.IGNORECASE)


def _read_cirrus(part, chunks, counts, opening_text):
    field = "opening_text" if opening_text else "text"
    index, number, bad, first_bad = b"", 0, 0, 0
    for line in _lines(chunks):
        number += 1
        if line.startswith(b'{"index"'):
            index = line
            continue
        if not line.strip():
            continue
        try:
            page = json.loads(line)
            title, text, templates = page.get("title") or "", page.get(field) or "", page.get("template") or ()
            page_id = page.get("page_id") or (json.loads(index)["index"]["_id"] if index else "")
            names = (template.partition(":") for template in templates)
            templates = "".join("{{" + name + "}}" for prefix, _, name in names if not _MODULE.match(prefix))
            language = part.language or language_of(page.get("wiki") or "") or _plain_code(page.get("language"))
            if not (isinstance(title, str) and isinstance(text, str)):
                raise TypeError
            if b"\\u" in line or b"\xed" in line:               # half a surrogate pair, which no file can hold
                title, text, page_id = (str(v).encode("utf-8", "replace").decode() for v in (title, text, page_id))
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            bad, first_bad, index = bad + 1, first_bad or number, b""
            if bad > 100 and bad > number / 20:
                break
            continue
        index = b""
        if "index" in page and "title" not in page:             # an index line written with other blanks
            index = line
        elif page.get("namespace", 0) != 0:
            counts["other namespace"] += 1
        elif page.get("content_model", "wikitext") != "wikitext":
            counts["other content model"] += 1
        elif is_disambiguation(title, text, templates):
            counts["disambiguation"] += 1
        else:
            yield Document(language, str(page_id), title, clean_cirrus(text))
    if bad:
        raise Damaged(f"{bad} of {number:,} lines are no CirrusSearch documents, line {first_bad:,} first")


def _lines(chunks):
    """Lines of at most PAGE_LIMIT bytes, without their ends."""
    tail, size = [], 0
    for chunk in chunks:
        if isinstance(chunk, Damaged):
            raise chunk
        lines = chunk.split(b"\n")
        tail.append(lines[0])
        size += len(lines[0])
        if size > PAGE_LIMIT:
            raise Damaged(f"a line of more than {PAGE_LIMIT:,} bytes")
        if len(lines) > 1:
            yield b"".join(tail)
            yield from lines[1:-1]
            tail, size = [lines[-1]], len(lines[-1])
    if size:
        yield b"".join(tail)


# ---------------------------------------------------------------------------------------------------------------------
# Files

class Document(NamedTuple):
    language: str                  # Wikipedia's code, "" where neither the file's name nor the dump tells
    page_id: str
    title: str
    text: str                      # may be empty


class Part(NamedTuple):
    """Bytes start..end (None: to its end) of a dump; a whole file unless `split` cut it at stream borders."""
    path: Path
    language: str
    start: int = 0
    end: int | None = None


def _warn(line):
    print(line, file=sys.stderr)


def read_documents(source, *, limit=None, opening_text=False, counts=None, on_warning=_warn):
    """The articles of a dump, cleaned -> iterator of `Document`, in the dump's order.

    source: a path, or a `Part`. limit: stop after so many. opening_text: leads only.
    counts: a `Counter` that is told "article", "redirect", "disambiguation", "other namespace", "other content model".
    A file cut off or damaged yields its whole pages; then `on_warning` gets one line that names the place.
    Raises ValueError for a file that is no dump at all, OSError where it cannot be opened.
    """
    part = source if isinstance(source, Part) else Part(Path(source), language_of(Path(source).name))
    counts = Counter() if counts is None else counts
    if limit is not None and limit <= 0:
        return
    chunks = _until_damaged(part)
    first = next(chunks, b"")
    start = b"" if isinstance(first, Damaged) else first.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"{"):
        read = _read_cirrus
    elif start.startswith((b"<", b"\xff\xfe<", b"\xfe\xff\0<", b"\0<")):
        read = _read_xml
    else:
        why = first if isinstance(first, Damaged) else "neither MediaWiki XML nor CirrusSearch JSON lines"
        raise ValueError(f"{part.path}: {why}")
    articles = 0
    try:
        for document in read(part, _chain(first, chunks), counts, opening_text):
            articles += 1
            counts["article"] += 1
            yield document
            if articles == limit:
                return
    except Damaged as damage:
        on_warning(f"{part.path}: {damage}; {articles:,} whole articles kept")


def _chain(first, rest):
    yield first
    yield from rest


def _until_damaged(part):
    """_chunks, with the error as the last item: what came before it is parsed before it is told."""
    try:
        yield from _chunks(part.path, part.start, part.end)
    except Damaged as damage:
        yield damage


_DUMP_NAME = re.compile(r"\.(xml|json|ndjson|jsonl)(-p\d+p\d+)?(\.(bz2|gz|xz))?$|\.xml[\w.-]*\.(bz2|gz|xz)$")


def list_dumps(path):
    """A dump, or a folder searched with all its subfolders -> sorted list of (language, Path).

    The language is what the file's name says, or else the first article in it; "" where neither does.
    """
    path = Path(path)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and _DUMP_NAME.search(p.name)]
    return sorted((language_of(file.name) or _language_inside(file), file) for file in files
                  if file.name != "manifest.json")


def _language_inside(path):
    try:
        documents = read_documents(path, limit=1, on_warning=lambda line: None)
        return next((document.language for document in documents), "")
    except ValueError:
        return ""


def _index_of(path):
    """The index that belongs to a multistream dump, or None."""
    name = re.sub(r"-multistream(\d*)\.xml(.*)\.bz2$", r"-multistream-index\1.txt\2.bz2", path.name)
    index = path.with_name(name)
    return index if name != path.name and index.is_file() else None


def split(path, pieces):
    """A dump -> list of at most `pieces` `Part`s of about the same size that can be read at once.

    Only a multistream dump next to its index can be cut; any other file, or one the index does not fit, is one part.
    """
    path = Path(path)
    whole = Part(path, language_of(path.name))
    index = _index_of(path)
    size = path.stat().st_size
    if index is None or pieces < 2:
        return [whole]
    cuts, last = [], 0
    try:
        for line in _lines(_chunks(index)):
            offset = int(line.partition(b":")[0])
            if offset - last >= size / pieces and len(cuts) < pieces - 1:
                cuts.append(offset)
                last = offset
    except ValueError:                                          # Damaged is one
        return [whole]
    with open(path, "rb") as file:
        for cut in cuts:
            file.seek(cut)
            if file.read(10) != b"BZh91AY&SY":
                return [whole]
    return [whole._replace(start=a, end=b) for a, b in zip([0, *cuts], [*cuts, None])]
