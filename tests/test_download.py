"""download.py against a local server with the faults of real ones."""
import email.utils
import errno
import hashlib
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wiki import download as dl
from wiki import progress
from wiki.download import Client, DownloadError, NotFound, RemoteFile

DAY = "20260105"
CIRRUS = f"/other/cirrus_search_index/{DAY}/index_name=ltgwiki_content"
DATA = bytes(range(256)) * 2000                       # 512,000 bytes


class Server(ThreadingHTTPServer):
    """Serves `files`; a listing for each folder; `faults[path]` are used up one a request, then all is well."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests, self.extra_links = {}, {}, [], []
        self.ranges, self.tag, self.slow, self.lock = True, '"v1"', 0.0, threading.Lock()
        self.active = self.most_active = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, address):
        pass                                          # a client that hangs up is part of the tests

    def listing(self, folder):
        names = {p[len(folder):].partition("/")[0] + ("/" if "/" in p[len(folder):] else "")
                 for p in self.files if p.startswith(folder)}
        if not names:
            return None
        links = "".join(f'<a href="{name.replace("=", "%3D")}">{name}</a>\n' for name in ["../", *sorted(names)])
        return f"<html><body><pre>{links}{''.join(self.extra_links)}</pre></body></html>".encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        path = self.path.replace("%3D", "=")
        with server.lock:
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            server.requests.append((path, dict(self.headers)))
            faults = server.faults.get(path)
            fault = faults.pop(0) if faults else ("none",)
        time.sleep(server.slow)
        with server.lock:
            server.active -= 1                        # before the answer: after it the client may already ask again
        self.close_connection = True
        self.answer(path, *fault)

    def answer(self, path, kind, *values):
        data = self.server.files.get(path)
        is_file = data is not None
        if data is None and path.endswith("/"):
            data = self.server.listing(path)
        if kind == "status":
            self.send_response(values[0])
            if len(values) > 1:
                self.send_header("Retry-After", values[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", values[0])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if data is None:
            return self.answer(path, "status", 404)
        if kind == "corrupt":
            data = data[:100] + bytes([data[100] ^ 255]) + data[101:]
        start, wanted = 0, self.headers.get("Range")
        same = self.headers.get("If-Range", self.server.tag) == self.server.tag
        if is_file and wanted and self.server.ranges and same:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            if start >= len(data):
                return self.answer(path, "status", 416)
            start += 5 if kind == "shift" else 0      # another part than was asked for
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start:end + 1]
        else:
            self.send_response(200)
        if kind == "length":                          # promises more or less than it has
            self.send_header("Content-Length", str(len(data) + values[0]))
        elif kind != "no length":
            self.send_header("Content-Length", str(len(data)))
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        self.end_headers()
        if kind == "length":
            self.wfile.write(data[:len(data) + min(values[0], 0)])
        elif kind == "interrupt":                     # Ctrl-C while a long file arrives
            for i in range(100):
                self.wfile.write(data[i * 5000:(i + 1) * 5000])
                time.sleep(0.1)
                if i == 2:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        elif kind == "cut":
            self.wfile.write(data[:values[0]])
        else:
            self.wfile.write(data)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def client(server):
    waits = []
    client = Client(server.url, "tester@example.org", sleep=waits.append)
    client.waits = waits
    return client


def put_cirrus(server, count=1):
    for i in range(count):
        server.files[f"{CIRRUS}/ltgwiki_content-{DAY}-{i:05d}.json.bz2"] = DATA + bytes([i])
    server.files[f"{CIRRUS}/_SUCCESS"] = b""
    return f"{CIRRUS}/ltgwiki_content-{DAY}-00000.json.bz2"


def one_file(server, data=DATA, checksum=True, size=True):
    server.files["/d/a.bin"] = data
    return RemoteFile(f"{server.url}/d/a.bin", "d", "a.bin", len(data) if size else None,
                      ("sha256", hashlib.sha256(data).hexdigest()) if checksum else None)


def leftovers(folder):
    return sorted(p.name for p in folder.rglob("*") if p.name.endswith((".part", ".etag")))


# ---------------------------------------------------------------------------------------------------------------
# Resolving

def test_cirrus_newest_complete(server, client):
    path = put_cirrus(server, 2)
    newer = path.replace(DAY, "20260112")
    server.files[newer] = DATA                        # no _SUCCESS there: still being written
    files = dl.resolve(client, "ltg")
    assert [f.url for f in files] == [server.url + path, server.url + path.replace("00000", "00001")]
    assert {f.folder for f in files} == {f"ltgwiki-{DAY}-cirrus"}
    server.files["/other/cirrus_search_index/20260112/_SUCCESS"] = b""
    client.listings.clear()
    assert [f.url for f in dl.resolve(client, "ltg")] == [server.url + newer]       # mark of the whole day
    assert dl.resolve(client, "ltg", date=DAY)[0].url == server.url + path
    with pytest.raises(NotFound, match="20200101"):
        dl.resolve(client, "ltg", date="20200101")
    with pytest.raises(NotFound, match="rowiki"):
        dl.resolve(client, "ro")


def test_xml_with_checksums(server, client):
    root = "/other/mediawiki_content_current/ltgwiki"
    for day in ("2026-01-01", "2026-02-01"):
        folder = f"{root}/{day}/xml/bzip2"
        name = f"ltgwiki-{day}-p1p9.xml.bz2"
        server.files[f"{folder}/{name}"] = DATA
        server.files[f"{folder}/SHA256SUMS"] = f"{hashlib.sha256(DATA).hexdigest()}  {name}\n".encode()
    server.files[f"{root}/2026-01-01/xml/bzip2/_SUCCESS"] = b""
    (file,) = dl.resolve(client, "ltg", "xml")
    assert file.name == "ltgwiki-2026-01-01-p1p9.xml.bz2"
    assert file.checksum == ("sha256", hashlib.sha256(DATA).hexdigest())
    assert dl.measure(client, file).size == len(DATA)
    sums = f"{root}/2026-01-01/xml/bzip2/SHA256SUMS"
    server.files[sums] = server.files[sums].replace(b"  ", b" *")      # sha256sum --binary
    assert dl.resolve(client, "ltg", "xml") == [file]
    del server.files[f"{root}/2026-01-01/xml/bzip2/SHA256SUMS"]
    client.listings.clear()
    (file,) = dl.resolve(client, "ltg", "xml")
    assert file.checksum is None                      # its length is verified, and our own sha256 recorded


def test_legacy_with_checksums(server, client):
    def status(state):
        files = {"ltgwiki-x-pages-articles-multistream.xml.bz2": {"size": 9, "sha1": "ab", "url": "/etc"},
                 "../../evil": {"size": 1, "sha1": "cd"}}
        return json.dumps({"jobs": {"articlesmultistreamdump": {"status": state, "files": files}}}).encode()

    server.files["/ltgwiki/20260101/dumpstatus.json"] = status("done")
    server.files["/ltgwiki/20260120/dumpstatus.json"] = status("waiting")
    (file,) = dl.resolve(client, "ltg", "xml-legacy")
    assert file.url == f"{server.url}/ltgwiki/20260101/ltgwiki-x-pages-articles-multistream.xml.bz2"
    assert (file.size, file.checksum) == (9, ("sha1", "ab"))
    server.files["/ltgwiki/20260101/dumpstatus.json"] = b'{"jobs": []}'
    with pytest.raises(DownloadError, match="dumpstatus.json: not in the known form"):
        dl.resolve(client, "ltg", "xml-legacy")


def test_truncated_listing_is_not_believed(server, client):
    path = put_cirrus(server)
    folder = "/other/cirrus_search_index/"
    whole = server.listing(folder)
    server.files[folder] = whole[:len(whole) - 40]    # no </html>: length is right, content is not
    with pytest.raises(DownloadError, match="no end"):
        dl.resolve(client, "ltg")
    del server.files[folder]
    server.faults[folder] = [("cut", 20), ("cut", 60)]
    assert dl.resolve(client, "ltg")[0].url == server.url + path
    assert len(client.waits) >= 2


def test_names_cannot_leave_the_folder(server, client, tmp_path):
    put_cirrus(server)
    evil = ["../../../evil", "%2e%2e%2fevil", "/etc/passwd", "http://127.0.0.1:1/x", "a%2F..%2F..%2Fevil", "..%5Cevil",
            ".bashrc", "-rf", "con%00x", "%E2%80%AEx", f"{CIRRUS}/../evil", "?C=N;O=D", "a" * 300]
    server.extra_links = [f'<a href="{name}">x</a>' for name in evil]
    names = dl.list_folder(client, server.url + CIRRUS)
    assert sorted(names) == ["_SUCCESS", f"ltgwiki_content-{DAY}-00000.json.bz2"]
    for name in ("../evil", "a/b", "..", "", ".part", "a\\b", "a\nb", "C:x"):
        file = one_file(server)._replace(name=name)
        with pytest.raises(DownloadError, match="stays in"):
            dl.fetch(client, file, tmp_path)
    assert not list(tmp_path.rglob("*evil*"))


# ---------------------------------------------------------------------------------------------------------------
# One file

@pytest.mark.parametrize("checksum", [True, False])
def test_cut_connections_are_continued(server, client, tmp_path, checksum):
    file = one_file(server, checksum=checksum)
    server.faults["/d/a.bin"] = [("cut", 100_000), ("cut", 1), ("cut", 0), ("cut", 300_000)]
    seen = []
    entry = dl.fetch(client, file, tmp_path, seen.append)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA and sum(seen) == len(DATA)
    assert entry["sha256"] == hashlib.sha256(DATA).hexdigest() and entry["size"] == len(DATA)
    assert entry["verified"] == ("sha256" if checksum else "length")
    starts = [headers.get("Range") for _, headers in server.requests]
    assert starts == [None, "bytes=100000-", "bytes=100001-", "bytes=100001-", "bytes=400001-"]
    assert all("tester@example.org" in headers["User-Agent"] for _, headers in server.requests)
    assert not leftovers(tmp_path)


def test_resume_in_a_new_process(server, client, tmp_path):
    file = one_file(server)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.bin.part").write_bytes(DATA[:200_000])
    (tmp_path / "d/a.bin.etag").write_text('"v1"')
    dl.fetch(client, file, tmp_path)
    assert server.requests[0][1]["Range"] == "bytes=200000-" and (tmp_path / "d/a.bin").read_bytes() == DATA


def test_a_whole_part_gets_its_name_without_a_request(server, client, tmp_path):
    """Killed between the last byte and the renaming."""
    file = one_file(server)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.bin.part").write_bytes(DATA)
    (tmp_path / "d/a.bin.etag").write_text('"v1"')
    assert dl.fetch(client, file, tmp_path)["verified"] == "sha256"
    assert not server.requests and (tmp_path / "d/a.bin").read_bytes() == DATA and not leftovers(tmp_path)
    (tmp_path / "d/a.bin.part").write_bytes(DATA[::-1])              # whole, and wrong: once more from the first byte
    (tmp_path / "d/a.bin.etag").write_text('"v1"')
    dl.fetch(client, file, tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA


def test_a_full_disk_ends_it_at_once(server, tmp_path, monkeypatch):
    """No other attempt and no other file: the disk stays full."""
    put_cirrus(server, 16)
    real = dl._append

    def full(response, part, total, on_bytes):
        if "00001" in part.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)
        real(response, part, total, on_bytes)
    monkeypatch.setattr(dl, "_append", full)
    result = run(server, tmp_path)
    assert result.exit_code == 2 and "No space left on device" in result.output and "attempt" not in result.output
    assert sum("00001" in path for path, _ in server.requests) <= 2             # its size, its bytes
    assert len(dl.read_manifest(tmp_path / "x")) <= 8                           # what three at a time had begun


def test_another_part_than_asked_for_is_not_joined(server, client, tmp_path):
    server.faults["/d/a.bin"] = [("cut", 100_000), ("shift",)]
    dl.fetch(client, one_file(server, checksum=False), tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA


def test_changed_file_is_not_joined(server, client, tmp_path):
    new = DATA[::-1]
    file = one_file(server, new, checksum=False)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.bin.part").write_bytes(DATA[:200_000])
    (tmp_path / "d/a.bin.etag").write_text('"v0"')
    dl.fetch(client, file, tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == new


@pytest.mark.parametrize("ranges, tag", [(False, '"v1"'), (True, ""), (True, 'W/"v1"')])
def test_server_without_ranges_or_tags(server, client, tmp_path, ranges, tag):
    server.ranges, server.tag = ranges, tag
    server.faults["/d/a.bin"] = [("cut", 5000), ("cut", 400_000)]
    dl.fetch(client, one_file(server, checksum=False), tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA and not leftovers(tmp_path)


def test_wrong_lengths(server, client, tmp_path):
    file = one_file(server, size=False, checksum=False)
    server.faults["/d/a.bin"] = [("length", 1000)]                     # promises 1,000 bytes that never come
    dl.fetch(client, file, tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA
    server.faults["/d/a.bin"] = [("length", -1000)]                    # fewer than the listing announced
    dl.fetch(client, one_file(server, checksum=False), tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA
    server.faults["/d/a.bin"] = [("no length",)]
    dl.fetch(client, one_file(server), tmp_path)
    assert (tmp_path / "d/a.bin").read_bytes() == DATA
    (tmp_path / "d/a.bin").unlink()
    with pytest.raises(DownloadError, match="512,000 bytes offered, 512,007 announced"):
        dl.fetch(client, file._replace(size=len(DATA) + 7), tmp_path)
    assert not (tmp_path / "d/a.bin").exists()


def test_wrong_checksum(server, client, tmp_path):
    server.faults["/d/a.bin"] = [("corrupt",)]
    dl.fetch(client, one_file(server), tmp_path)                       # the second try is right
    assert (tmp_path / "d/a.bin").read_bytes() == DATA
    (tmp_path / "d/a.bin").unlink()
    server.faults["/d/a.bin"] = [("corrupt",), ("corrupt",)]
    with pytest.raises(DownloadError, match="a.bin: its sha256 is"):
        dl.fetch(client, one_file(server), tmp_path)
    assert not (tmp_path / "d/a.bin").exists() and not leftovers(tmp_path)


def test_retry_after_is_honoured(server, client, tmp_path):
    in_30_s = email.utils.formatdate(time.time() + 30, usegmt=True)
    server.faults["/d/a.bin"] = [("status", 429, "7"), ("status", 503, in_30_s), ("status", 500)]
    dl.fetch(client, one_file(server), tmp_path)
    assert client.waits[0] == 7 and 25 < client.waits[1] <= 30 and 0 < client.waits[2] < 10
    server.faults["/d/a.bin"] = [("status", 429, "86400")]
    with pytest.raises(DownloadError, match="asks to wait 86,400 s"):
        dl.fetch(client, one_file(server), tmp_path)


def test_gives_up_in_one_line(server, client, tmp_path, capsys):
    file = one_file(server)
    server.faults["/d/a.bin"] = [("cut", 0)] * 20
    with pytest.raises(DownloadError, match="after 8 attempts without progress") as error:
        dl.fetch(client, file, tmp_path)
    assert "\n" not in str(error.value) and len(server.requests) == 8
    assert "attempt 3 of 8 in" in capsys.readouterr().err                      # nobody waits before a silent terminal
    assert client.waits == sorted(client.waits) and client.waits[-1] > 30      # doubling, whatever the random share
    for status, message in ((404, "not there"), (403, "--contact"), (400, "status 400")):
        server.faults["/d/a.bin"] = [("status", status)]
        with pytest.raises(DownloadError, match=message):
            dl.fetch(client, file, tmp_path)
    server.faults["/d/a.bin"] = [("redirect", "http://example.org/a.bin")]
    with pytest.raises(DownloadError, match="leads away"):
        dl.fetch(client, file, tmp_path)
    server.faults["/d/a.bin"] = [("redirect", "/d/a.bin")] * 9
    with pytest.raises(DownloadError, match="too many redirects"):
        dl.fetch(client, file, tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Everything

def run(server, tmp_path, *options):
    arguments = ["--languages", "ltg", "--base-url", server.url, "--out", str(tmp_path / "x")]
    return CliRunner().invoke(dl.command, [*arguments, *options])


def test_download_manifest_and_repeat(server, tmp_path):
    put_cirrus(server, 7)
    dry = run(server, tmp_path, "--dry-run")
    assert dry.exit_code == 0 and "7 files" in dry.output and "3.6 MB" in dry.output and not (tmp_path / "x").exists()
    server.slow = 0.05
    result = run(server, tmp_path)
    assert result.exit_code == 0, result.output
    assert server.most_active == 3
    files = dl.read_manifest(tmp_path / "x")
    assert len(files) == 7
    for key, entry in files.items():
        data = (tmp_path / "x" / key).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"] and len(data) == entry["size"] == len(DATA) + 1
    server.slow = 0
    lost = tmp_path / "x" / sorted(files)[3]
    lost.unlink()
    server.requests.clear()
    assert run(server, tmp_path).exit_code == 0
    whole = [path for path, headers in server.requests
             if path.endswith(".bz2") and headers.get("Range") != "bytes=0-0"]
    assert whole == [f"{CIRRUS}/{lost.name}"] and lost.exists()
    server.files[whole[0]] = DATA * 2                                  # made anew there, longer
    assert run(server, tmp_path).exit_code == 0 and lost.read_bytes() == DATA * 2


def test_a_language_is_had_whole_or_not_at_all(server, client):
    path = put_cirrus(server, 3)
    server.faults[path.replace("00000", "00002")] = [("status", 404)]        # listed, and gone when it is asked for
    files, missing = dl.plan(client, ["ltg"])
    assert not files and len(missing) == 1 and missing[0].startswith("ltg: ")
    assert len(dl.plan(client, ["ltg"])[0]) == 3


def test_one_bad_file_does_not_stop_the_others(server, tmp_path, monkeypatch):
    put_cirrus(server, 4)
    monkeypatch.setattr(dl, "LONGEST_WAIT", 0.0)
    server.faults[f"{CIRRUS}/ltgwiki_content-{DAY}-00001.json.bz2"] = [("none",)] + [("status", 429, "9")]
    result = run(server, tmp_path)
    assert result.exit_code == 2 and "00001.json.bz2: the server asks to wait 9 s" in result.output
    assert len(dl.read_manifest(tmp_path / "x")) == 3


@pytest.fixture
def ctrl_c():
    """A shell starts what runs in its background with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted(server, client, tmp_path, ctrl_c):
    """Ctrl-C stops within a file, not at its end, and the next call goes on from there."""
    file = one_file(server)
    server.faults["/d/a.bin"] = [("interrupt",)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dl.transfer(client, [file], tmp_path)
    assert time.monotonic() - start < 5                                # 10 s for the whole of it
    begun = (tmp_path / "d/a.bin.part").stat().st_size
    server.requests.clear()
    dl.transfer(client, [file], tmp_path)
    assert server.requests[0][1]["Range"] == f"bytes={begun}-" and (tmp_path / "d/a.bin").read_bytes() == DATA


def test_progress_in_a_log_file(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.progress(4_000_000, "cleaning") as advance:
        advance(0)
        advance(1_000_000)
    with progress.progress(107, "looking for dumps", "languages") as advance:
        advance(107)
    assert capsys.readouterr().err.splitlines() == ["cleaning: 1 of 4 MB, 0 minutes left",
                                                    "looking for dumps: 107 of 107 languages, 0 minutes left"]


def test_bad_input_is_one_line(server, tmp_path):
    put_cirrus(server)
    for options, message in ((["--date", "yesterday"], "neither YYYYMMDD nor latest"),
                             (["--languages", "../x"], "not a Wikipedia code"),
                             (["--base-url", "ftp://x"], "not an http or https"),
                             (["--base-url", "http://x:y"], "not an http or https"),
                             (["--contact", "a\nb"], "goes into an HTTP header"),
                             (["--date", "20200101"], "nothing to download")):
        result = run(server, tmp_path, *options)
        assert result.exit_code == 2 and message in result.output, result.output
    (tmp_path / "x").mkdir()
    (tmp_path / "x/manifest.json").write_text("[]")
    result = run(server, tmp_path)
    assert result.exit_code == 2 and "not a manifest" in result.output


def test_two_downloads_into_one_folder(server, tmp_path):
    put_cirrus(server)
    (tmp_path / "x").mkdir()
    with dl._only_one(tmp_path / "x"):
        result = run(server, tmp_path)
    assert result.exit_code == 2 and "another download" in result.output
    assert run(server, tmp_path).exit_code == 0
