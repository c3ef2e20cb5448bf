"""Download of Wikipedia dumps: resolve, resume, verify, record. Standard library only (and click for the command).

    download(["ro", "sw"], "DIR", source="cirrus", contact="me@example.org")

`resolve` asks the server what the newest complete dump of a wiki is and which files it has; `download` fetches them,
at most three at once, into DIR/<wiki>-<date>-<source>/. A file is written to NAME.part, continued from where it
stopped (HTTP Range, guarded by If-Range so that two versions are never joined), checked for length and published
checksum, and only then gets its name. `manifest.json` in DIR records for each file its URL, size, our own sha256 and
what was verified.

Sources (state of 2026):
  cirrus      CirrusSearch content index, JSON lines: text without templates or tables; weekly; no published checksums
  xml         MediaWiki content current, XML: wikitext, every namespace; monthly; SHA256SUMS
  xml-legacy  pages-articles-multistream, XML with its index; deprecated, still made; sha1 in dumpstatus.json
"""
import contextlib
import email.utils
import errno
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import click

from files import sync_folder
from wiki.languages import LANGUAGES
from wiki.progress import progress
from wiki.wikipedia import wiki_name

BASE_URL = "https://dumps.wikimedia.org"
SOURCES = ("cirrus", "xml", "xml-legacy")
CONNECTIONS = 3                # the server's limit for one address
ATTEMPTS = 8                   # of one request, without progress in between
LONGEST_WAIT = 300.0           # seconds; a longer Retry-After ends the download instead
TIMEOUT = 60.0                 # seconds without a byte
LISTING_LIMIT = 1 << 26        # bytes of a listing or a list of checksums
BLOCK = 1 << 18
PROJECT = "UniBERT-corpus/1.0"


class DownloadError(ValueError):
    """What could not be downloaded, and why, in one line."""


class NotFound(DownloadError):
    """The server has no such file or folder."""


class DiskError(DownloadError):
    """Nothing more can be written here: no other file will fare better."""


class Again(Exception):
    """A request that may succeed later: (reason, value of Retry-After or None, whether bytes were gained)."""


class RemoteFile(NamedTuple):
    """A file of a dump. `checksum` is ("sha256" | "sha1", hexadecimal) or None where none is published."""
    url: str
    folder: str                # below DIR, e.g. "rowiki-20260105-cirrus"
    name: str
    size: int | None
    checksum: tuple | None


# ---------------------------------------------------------------------------------------------------------------------
# HTTP

class Client:
    """GET with retries, back-off, redirects on the same host, and the User-Agent with a contact that servers want.

    hosts: others that files may come from.
    """

    def __init__(self, base_url=BASE_URL, contact=None, wait=1.0, sleep=time.sleep, hosts=()):
        parts = urllib.parse.urlsplit(base_url)
        try:
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:                                          # the port is no number
            known = False
        if not known:
            raise DownloadError(f"--base-url {base_url!r}: not an http or https address")
        if contact and not (contact.isascii() and contact.isprintable()):
            raise DownloadError(f"--contact {contact!r}: goes into an HTTP header; write an e-mail or web address in ASCII")
        self.base_url, self.host = base_url.rstrip("/"), parts.netloc
        self.hosts = {parts.netloc, *hosts}
        self.agent = f"{PROJECT} ({contact or 'no contact given'})"
        self.wait, self.sleep, self.listings = wait, sleep, {}

    @contextlib.contextmanager
    def open(self, url, headers=None, redirects=3):
        """One request -> http.client.HTTPResponse, whatever its status."""
        parts = urllib.parse.urlsplit(url)
        if parts.netloc not in self.hosts:
            raise DownloadError(f"{url}: leads away from {self.host}")
        secure = parts.scheme == "https"
        make = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = make(parts.hostname, parts.port, timeout=TIMEOUT)
        try:
            target = urllib.parse.quote(parts.path, safe="/%=~!$&'()*+,:;@") or "/"
            connection.request("GET", target + (f"?{parts.query}" if parts.query else ""),
                               headers={"User-Agent": self.agent, "Accept-Encoding": "identity", **(headers or {})})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308) and response.getheader("Location"):
                if not redirects:
                    raise DownloadError(f"{url}: too many redirects")
                target = urllib.parse.urljoin(url, response.getheader("Location"))
                with self.open(target, headers, redirects - 1) as response:
                    yield response
            else:
                yield response
        finally:
            connection.close()

    def retry(self, url, action):
        """action() until it returns; after `Again`, a broken connection or a timeout it is called again.

        Waits what the server asks for, or else twice as long each time, with a random share. `ATTEMPTS` in a row
        without progress end in DownloadError.
        """
        attempt = 0
        while True:
            retry_after, progress = None, False
            try:
                return action()
            except Again as again:
                reason, retry_after, progress = again.args
            except (OSError, http.client.HTTPException) as error:
                _not_the_disk(error)
                reason = f"{type(error).__name__}: {error}"
            attempt = 1 if progress else attempt + 1
            if attempt == ATTEMPTS:
                raise DownloadError(f"{url}: {reason}; gave up after {ATTEMPTS} attempts without progress")
            seconds = self.wait * 2**(attempt - 1) * random.uniform(0.75, 1.25)
            if retry_after is not None:
                seconds = retry_after_seconds(retry_after, seconds)
                if seconds > LONGEST_WAIT:
                    raise DownloadError(f"{url}: the server asks to wait {seconds:,.0f} s; run this again after that")
            if attempt > 1:                                         # one failure is nothing; many look like standing still
                click.echo(f"{url}: {reason}; attempt {attempt + 1} of {ATTEMPTS} in {seconds:.0f} s", err=True)
            self.sleep(min(seconds, LONGEST_WAIT))

    def read(self, url):
        """The whole of a small file -> bytes. Its length must be what the server said it is."""
        def action():
            with self.open(url) as response:
                if response.status != 200:
                    raise _failure(url, response)
                data = response.read(LISTING_LIMIT + 1)
                if len(data) > LISTING_LIMIT:
                    raise DownloadError(f"{url}: more than {LISTING_LIMIT:,} bytes")
                if response.length:                             # http.client leaves here what never came
                    raise Again(f"cut off after {len(data):,} bytes", None, False)
                return data

        return self.retry(url, action)


def _failure(url, response):
    """The exception for a status that is no success: `Again` where trying later may help."""
    if response.status in (404, 410):
        return NotFound(f"{url}: not there ({response.status})")
    if response.status == 403:
        return DownloadError(f"{url}: refused (403); say who you are with --contact NAME@HOST")
    if response.status not in (408, 425, 429) and response.status < 500:
        return DownloadError(f"{url}: status {response.status} {response.reason}")
    return Again(f"status {response.status}", response.getheader("Retry-After"), False)


def retry_after_seconds(value, default):
    """Retry-After, seconds or an HTTP date -> seconds from now."""
    if re.fullmatch(r"\s*\d{1,9}\s*", value):
        return float(value)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return default


# ---------------------------------------------------------------------------------------------------------------------
# Which files: listings are read, nothing about names or dates is guessed

class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.hrefs, self.complete = [], False

    def handle_starttag(self, tag, attributes):
        if tag == "a":
            self.hrefs += [value for key, value in attributes if key == "href" and value]

    def handle_endtag(self, tag):
        self.complete |= tag == "html"


def list_folder(client, url):
    """Names in a folder's HTML index, subfolders with their slash; only plain ones, which cannot leave a folder."""
    url = url.rstrip("/") + "/"
    if url in client.listings:                                  # all languages share those of the dates
        return client.listings[url]

    def action():
        links = _Links()
        links.feed(client.read(url).decode("utf-8", errors="replace"))
        if not links.complete:                                  # a listing cut short would hide the newest dump
            raise Again("the listing has no end", None, False)
        return links.hrefs

    path = urllib.parse.urlsplit(url).path
    names = []
    for href in client.retry(url, action):
        href = urllib.parse.urlsplit(urllib.parse.urljoin(url, href))
        link_path = urllib.parse.unquote(href.path)             # servers differ in whether they escape "="
        if link_path.startswith(path) and href.netloc == client.host and not href.query:
            name = link_path[len(path):]
            if name and _is_plain(name.removesuffix("/")):
                names.append(name)
    client.listings[url] = names
    return names


def _is_plain(name):
    """True for a file name that stays in its folder on every system."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,199}", name) is not None and ".." not in name


def _dates(client, url, pattern, wanted):
    """Subfolders that are dates, newest first; only `wanted` unless that is "latest"."""
    names = {name.rstrip("/") for name in list_folder(client, url)}
    names = sorted((name for name in names if re.fullmatch(pattern, name)), reverse=True)
    if wanted == "latest":
        if not names:
            raise NotFound(f"{url}: no dated folder")
        return names
    digits = wanted.replace("-", "")
    names = [name for name in names if name.replace("-", "") == digits]
    if not names:
        raise NotFound(f"{url}: no dump of {wanted}; dated folders vanish after some weeks, take --date latest")
    return names


def resolve(client, language, source="cirrus", date="latest"):
    """The newest complete dump (or that of `date`) of a language's Wikipedia -> list of `RemoteFile`.

    Complete means that the server's own mark is there: _SUCCESS, or status "done" in dumpstatus.json.
    Raises DownloadError (a ValueError) where there is none, with the wiki and the folder that was searched.
    """
    find = {"cirrus": _resolve_cirrus, "xml": _resolve_xml, "xml-legacy": _resolve_legacy}[source]
    wiki = wiki_name(language)
    files = find(client, wiki, date)
    if not files:
        raise NotFound(f"{wiki}: no complete {source} dump ({date}) at {client.base_url}")
    return files


def _resolve_cirrus(client, wiki, date):
    root = f"{client.base_url}/other/cirrus_search_index"
    for day in _dates(client, root, r"\d{8}", date):
        with contextlib.suppress(NotFound):
            # The mark stands beside the files or, for the whole day, above them.
            folder = f"{root}/{day}/index_name={wiki}_content"
            names = list_folder(client, folder)
            if "_SUCCESS" in names or "_SUCCESS" in list_folder(client, f"{root}/{day}"):
                pattern = re.compile(rf"{wiki}_content-\d+-\d+\.json\.(bz2|gz)")
                return [RemoteFile(f"{folder}/{name}", f"{wiki}-{day}-cirrus", name, None, None)
                        for name in sorted(names) if pattern.fullmatch(name)]
    return []


def _resolve_xml(client, wiki, date):
    root = f"{client.base_url}/other/mediawiki_content_current/{wiki}"
    for day in _dates(client, root, r"\d{4}-\d{2}-\d{2}", date):
        with contextlib.suppress(NotFound):
            folder = f"{root}/{day}/xml/bzip2"
            names = list_folder(client, folder)
            if "_SUCCESS" not in names:
                continue
            sums = {}
            published = client.read(f"{folder}/SHA256SUMS") if "SHA256SUMS" in names else b""
            for line in published.decode("ascii", errors="replace").splitlines():
                digest, _, name = line.partition(" ")
                if re.fullmatch("[0-9a-f]{64}", digest):
                    sums[name.strip(" *").rpartition("/")[2]] = ("sha256", digest)
            pattern = re.compile(rf"{wiki}-{day}-p\d+p\d+\.xml\.bz2")
            return [RemoteFile(f"{folder}/{name}", f"{wiki}-{day}-xml", name, None, sums.get(name))
                    for name in sorted(names) if pattern.fullmatch(name)]
    return []


def _resolve_legacy(client, wiki, date):
    root = f"{client.base_url}/{wiki}"
    for day in _dates(client, root, r"\d{8}", date):
        with contextlib.suppress(NotFound):
            try:
                job = json.loads(client.read(f"{root}/{day}/dumpstatus.json"))["jobs"]["articlesmultistreamdump"]
                if job["status"] != "done":
                    continue
                entries = job["files"].items()
                return [RemoteFile(f"{root}/{day}/{name}", f"{wiki}-{day}-xml-legacy", name, int(entry["size"]),
                                   ("sha1", entry["sha1"]) if entry.get("sha1") else None)
                        for name, entry in sorted(entries) if _is_plain(name)]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, DownloadError):
                    raise
                raise DownloadError(f"{root}/{day}/dumpstatus.json: not in the known form ({error!r})") from None
    return []


def measure(client, file):
    """`file` with its size filled in, from a request of one byte: some caches answer HEAD without a length."""
    if file.size is not None:
        return file

    def action():
        with client.open(file.url, {"Range": "bytes=0-0"}) as response:
            if response.status == 206:
                return _content_range(response)[2]
            if response.status == 416:
                return 0
            if response.status != 200:
                raise _failure(file.url, response)
            length = response.getheader("Content-Length") or ""
            return int(length) if length.isdigit() else None

    return file._replace(size=client.retry(file.url, action))


def _content_range(response):
    """(first, last, total) of a 206 answer; http.client.HTTPException where it has none."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.getheader("Content-Range") or "")
    if match is None:
        raise http.client.HTTPException("partial content without a Content-Range")
    return tuple(map(int, match.groups()))


# ---------------------------------------------------------------------------------------------------------------------
# One file

def fetch(client, file, out, on_bytes=lambda count: None):
    """Downloads `file` to out/folder/name, continuing a .part left there -> its manifest entry, a dict.

    Lengths and the published checksum are verified before the file gets its name. A failed checksum is retried once
    from the first byte; a second failure raises DownloadError and leaves nothing behind. `on_bytes` hears of bytes
    on disk (of a file begun again, negative).
    """
    folder = Path(out, file.folder)
    target = folder / file.name
    if not (_is_plain(file.folder) and _is_plain(file.name)):
        raise DownloadError(f"{file.url}: its name {file.name!r} is not one that stays in {out}")
    folder.mkdir(parents=True, exist_ok=True)
    part = _beside(target, ".part")
    for _ in range(2):
        total = _transfer(client, file, target, on_bytes)
        found = digests(part, {"sha256", file.checksum[0]} if file.checksum else {"sha256"})
        if file.checksum is None or found[file.checksum[0]] == file.checksum[1]:
            os.replace(part, target)
            _forget(_beside(target, ".etag"))
            sync_folder(folder)
            return {"url": file.url, "size": total, "sha256": found["sha256"],
                    "verified": file.checksum[0] if file.checksum else "length"}
        on_bytes(-total)
        _forget(part)
        _forget(_beside(target, ".etag"))
    kind, published = file.checksum
    raise DownloadError(f"{file.url}: its {kind} is {found[kind]}, expected is {published}")


def _transfer(client, file, target, on_bytes):
    """Bytes into target.part until all are there -> their number."""
    part, tag_file = _beside(target, ".part"), _beside(target, ".etag")
    if not tag_file.exists():                                   # no way to know that it is the same version
        _forget(part)
    on_bytes(_size(part))
    if _size(part) == file.size:                                # stopped between the last byte and its name
        return file.size

    def start_again():
        on_bytes(-_size(part))
        _forget(part)
        _forget(tag_file)

    def action():
        before = _size(part)
        headers = {"Range": f"bytes={before}-", "If-Range": tag_file.read_text()} if before else {}
        with client.open(file.url, headers) as response:
            if response.status == 416 and before:               # more bytes here than there
                start_again()
                raise Again("shorter than what was begun", None, False)
            if response.status not in (200, 206):
                raise _failure(file.url, response)
            if response.status == 206:
                first, _, total = _content_range(response)
                if first != before:
                    raise Again(f"asked for byte {before:,}, got {first:,}", None, False)
            else:                                               # another version, or ranges are not known there
                start_again()
                length = response.getheader("Content-Length") or ""
                total = int(length) if length.isdigit() else file.size
                tag = response.getheader("ETag") or response.getheader("Last-Modified") or ""
                if tag and not tag.startswith("W/"):            # weak tags do not guard a range
                    tag_file.write_text(tag)
            if file.size is not None and total != file.size:
                raise Again(f"{total:,} bytes offered, {file.size:,} announced", None, False)
            try:
                _append(response, part, total, on_bytes)
            except (OSError, http.client.HTTPException) as error:
                _not_the_disk(error)
                reason = f"{type(error).__name__}: {error}"
            else:
                if total is None or _size(part) == total:
                    return _size(part)
                reason = f"cut off after {_size(part):,} of {total:,} bytes"
        progress = _size(part) > before and tag_file.exists()
        if not tag_file.exists():
            start_again()
        raise Again(reason, None, progress)

    return client.retry(file.url, action)


def _not_the_disk(error):
    """DiskError for an error of this machine's files, which no other attempt will mend; others are the network's."""
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)):
        raise DiskError(f"{error.filename or 'the disk'}: {error.strerror}; run this again once that is mended") from None


def _append(response, part, total, on_bytes):
    with open(part, "ab") as output:
        have = output.tell()
        try:
            while block := response.read1(BLOCK):
                have += len(block)
                if total is not None and have > total:
                    raise http.client.HTTPException(f"more than the {total:,} bytes announced")
                output.write(block)
                on_bytes(len(block))
        finally:
            output.flush()
            os.fsync(output.fileno())


def _beside(target, suffix):
    return target.with_name(target.name + suffix)


def _size(path):
    return path.stat().st_size if path.exists() else 0


def digests(path, names):
    """{name: hexadecimal} of a file, for names of hashlib such as "sha256"."""
    hashes = {name: hashlib.new(name) for name in names}
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            for value in hashes.values():
                value.update(block)
    return {name: value.hexdigest() for name, value in hashes.items()}


def _forget(path):
    path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# All files

def plan(client, languages, source="cirrus", date="latest", on_language=lambda language: None):
    """Files with sizes of each language's dump -> (list of RemoteFile, list of lines about languages without one)."""
    files, missing = [], []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for language in languages:
            try:
                files += list(pool.map(lambda file: measure(client, file), resolve(client, language, source, date)))
            except NotFound as error:
                missing.append(f"{language}: {error}")
            on_language(language)
    return files, missing


def read_manifest(out):
    """DIR/manifest.json -> {"folder/name": entry}; {} where there is none. ValueError where it cannot be read."""
    path = Path(out, "manifest.json")
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_text())["files"]
        return {key: {"size": entry["size"], "sha256": entry["sha256"], **entry} for key, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DownloadError(f"{path}: not a manifest of downloads; move it away and run again") from None


def _write_manifest(out, files):
    path = Path(out, "manifest.json")
    temporary = path.with_name("manifest.json.part")
    with open(temporary, "w") as file:
        json.dump({"format": "unibert-downloads", "version": 1, "files": dict(sorted(files.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(out)


def download(languages, out, source="cirrus", date="latest", contact=None, base_url=BASE_URL, dry_run=False,
             echo=click.echo, client=None):
    """Newest complete dumps of `languages` into folder `out` -> list of paths. Prints sizes first, then bars.

    Files that the manifest knows and that are there in their size are left alone, so that running the command again
    continues. Languages without a dump are named and left out. Raises DownloadError for the first file that cannot be
    had, after the others that were under way have ended.
    """
    client = client or Client(base_url, contact)
    out = Path(out)
    with progress(len(languages), "looking for dumps", "languages") as advance:
        files, missing = plan(client, languages, source, date, lambda language: advance(1))
    for line in missing:
        echo(line, err=True)
    if not files:
        raise DownloadError("nothing to download")
    return transfer(client, files, out, dry_run, echo)


def transfer(client, files, out, dry_run=False, echo=click.echo):
    """Fetch `files` (list of RemoteFile, measured) into folder `out` -> list of paths; the second half of `download`."""
    folders = {}
    for file in files:
        folders.setdefault(file.folder, []).append(file)
    for folder, members in folders.items():
        known = sum(file.size or 0 for file in members)
        echo(f"{folder:40} {len(members):4} files {known / 1e6:12,.1f} MB")
    total = sum(file.size or 0 for file in files)
    echo(f"{'total':40} {len(files):4} files {total / 1e6:12,.1f} MB")
    if dry_run:
        return [out / file.folder / file.name for file in files]

    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        _download_all(client, files, out)
    return [out / file.folder / file.name for file in files]


@contextlib.contextmanager
def _only_one(out):
    """A lock on the folder: two downloads would write into one .part."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DownloadError(f"{out}: another download writes here; wait for it or take another folder") from None
        yield


def _download_all(client, files, out):
    manifest, lock = read_manifest(out), threading.Lock()
    todo = []
    for file in files:
        entry, path = manifest.get(f"{file.folder}/{file.name}"), out / file.folder / file.name
        have = path.stat().st_size if entry and path.is_file() else None
        if have is None or have != entry["size"] or file.size not in (None, have):
            todo.append(file)
    needed = sum(file.size or 0 for file in todo)
    begun = sum(_size(_beside(out / file.folder / file.name, ".part")) for file in todo)
    free = shutil.disk_usage(out).free
    if needed - begun > free:
        raise DownloadError(f"{out}: {(needed - begun) / 1e9:,.1f} GB to download, {free / 1e9:,.1f} GB free")
    failed = None
    stopped = threading.Event()
    with progress(needed, "downloading") as bar, ThreadPoolExecutor(CONNECTIONS) as pool:
        def advance(count):
            if stopped.is_set():                                # Ctrl-C must not wait for the end of three files
                raise DownloadError("stopped")
            with lock:
                bar(count)

        def one(file):
            entry = fetch(client, file, out, advance)
            with lock:
                manifest[f"{file.folder}/{file.name}"] = entry
                _write_manifest(out, manifest)

        futures = [pool.submit(one, file) for file in todo]
        try:
            for future in futures:
                try:
                    future.result()
                except DiskError:
                    raise
                except DownloadError as error:
                    failed = failed or error
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
    if failed:
        raise failed


@click.command("download")
@click.option("--languages", required=True, help="Codes as in ro,sw, or all (the 107).")
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder to download to.")
@click.option("--source", type=click.Choice(SOURCES), default="cirrus", show_default=True)
@click.option("--date", default="latest", show_default=True, help="YYYYMMDD, or latest.")
@click.option("--contact", help="E-mail or page by which the servers' operators can reach you; they ask for it.")
@click.option("--base-url", default=BASE_URL, show_default=True, help="Server, or a mirror of it.")
@click.option("--dry-run", is_flag=True, help="Print what would be downloaded and its size.")
def command(languages, out, source, date, contact, base_url, dry_run):
    """Download Wikipedia's newest complete dumps; run again to continue."""
    codes = list(LANGUAGES) if languages == "all" else [code.strip() for code in languages.split(",")]
    for code in codes:
        if not re.fullmatch(r"[a-z]{2,12}(-[a-z]{1,12}){0,2}", code):
            raise click.UsageError(f"--languages {code!r}: not a Wikipedia code such as ro or zh-min-nan")
    if date != "latest" and not re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", date):
        raise click.UsageError(f"--date {date!r}: neither YYYYMMDD nor latest")
    try:
        download(codes, out, source, date, contact, base_url, dry_run)
    except DownloadError as error:
        failure = click.ClickException(str(error))
        failure.exit_code = 2
        raise failure from None
