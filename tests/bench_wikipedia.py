"""Speed, memory and cleanliness of the dump reader against its yardsticks; not a test, run it by hand.

    python tests/bench_wikipedia.py cirrus --scratch DIR --corpus TEXT      # against only unpacking and parsing JSON
    python tests/bench_wikipedia.py xml DUMP... --scratch DIR [--peer PYTHON]                # against wikiextractor

`cirrus` writes a file of the documented format, 200 MB of JSON by default, from the pages of a plain-text corpus,
and packs it with bzip2 and with gzip. `xml` joins the pages of the dumps into one of `--megabytes`; PYTHON is an
interpreter that has wikiextractor (any version; it is run with --no-templates, which is faster and does the same
work). Times are processor seconds of all processes, children too: that is what a core does. Each is the median of
`--repeat` runs, taken in turn.
"""
import bz2
import gzip
import html
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("{{", "}}", "[[", "]]", "|", "==", "<", ">")

BASELINE = """
import bz2, gzip, json, sys
path = sys.argv[1]
pages = 0
with {"z2": bz2.open, "gz": gzip.open}.get(path[-2:], open)(path, "rb") as file:
    for line in file:
        pages += "title" in json.loads(line)
"""
READER = """
import sys
sys.path.insert(0, sys.argv[1])
from wiki.wikipedia import read_documents
source, out = sys.argv[2:]
with open(out, "w", encoding="utf-8", errors="replace") as file:
    for document in read_documents(source):
        file.write(document.text)
        file.write("\\n\\n")
"""


def run(*command):
    """-> processor seconds, wall seconds, peak MB of the largest process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_memory(process.pid))
        time.sleep(0.02)
    error = process.stderr.read().decode(errors="replace")
    if process.returncode:
        raise click.ClickException(f"{' '.join(map(str, command))[:200]}: {error[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, time.perf_counter() - start, peak / 1e6


def _tree_memory(pid):
    """Resident bytes of a process and its children (Linux; pages shared between them count twice)."""
    total = 0
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _tree_memory(int(child))
    except OSError:
        pass
    return total


def median_runs(repeat, **commands):
    """Commands in turn, `repeat` rounds -> {name: (median processor seconds, median wall seconds, peak MB)}."""
    runs = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            runs[name].append(run(*command))
    return {name: (statistics.median(r[0] for r in rs), statistics.median(r[1] for r in rs), max(r[2] for r in rs))
            for name, rs in runs.items()}


def leftovers(text):
    return {mark: text.count(mark) * 1e4 / max(1, len(text)) for mark in MARKS}


@click.group()
def main():
    pass


@main.command()
@click.option("--scratch", required=True, type=click.Path(path_type=Path))
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), required=True,
              help="Text of pages, with a blank line between them.")
@click.option("--megabytes", default=200)
@click.option("--repeat", default=3)
def cirrus(scratch, corpus, megabytes, repeat):
    scratch.mkdir(parents=True, exist_ok=True)
    pages = [page for page in corpus.read_text(encoding="utf-8", errors="replace").split("\n\n") if len(page) > 200]
    plain = scratch / "enwiki_content-20260105-00000.json"
    if not plain.exists() or plain.stat().st_size < megabytes * 1e6:
        number = 0
        with open(plain, "w", encoding="utf-8") as file:
            while file.tell() < megabytes * 1e6:
                number += 1
                text = " ".join(pages[number % len(pages)].split()) + f" {number}"
                file.write(json.dumps({"index": {"_id": number}}) + "\n")
                file.write(json.dumps({
                    "namespace": 0, "namespace_text": "", "title": f"Page {number}", "page_id": number,
                    "wiki": "enwiki", "language": "en", "timestamp": "2026-01-01T00:00:00Z",
                    "content_model": "wikitext", "text": text,
                    "opening_text": text[:300], "auxiliary_text": [text[:200]], "text_bytes": len(text),
                    "incoming_links": number % 999, "popularity_score": 1e-7, "redirect": [],
                    "category": [f"Category {i}" for i in range(6)],
                    "template": [f"Template:Cite web/{i}" for i in range(8)], "heading": ["History", "See also"],
                    "outgoing_link": [f"Link_{i * number % 9999}" for i in range(40)],
                    "external_link": [f"https://example.org/{i}/{number}" for i in range(8)],
                }, ensure_ascii=False) + "\n")
        (scratch / (plain.name + ".bz2")).write_bytes(bz2.compress(plain.read_bytes()))
        (scratch / (plain.name + ".gz")).write_bytes(gzip.compress(plain.read_bytes(), 6))
    size = plain.stat().st_size / 1e6
    click.echo(f"CirrusSearch, {size:.0f} MB of JSON lines        cpu s      MB/s   peak MB   of the baseline's speed")
    for path in (plain, scratch / (plain.name + ".gz"), scratch / (plain.name + ".bz2")):
        results = median_runs(repeat, baseline=[sys.executable, "-c", BASELINE, path],
                              reader=[sys.executable, "-c", READER, ROOT, path, "/dev/null"])
        for name, (seconds, _, peak) in results.items():
            share = f"{results['baseline'][0] / seconds:8.2f}" if name == "reader" else ""
            click.echo(f"{path.suffix[1:]:5} {name:10} {seconds:32.2f} {size / seconds:9.1f} {peak:9.0f} {share}")


@main.command()
@click.argument("dumps", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--scratch", required=True, type=click.Path(path_type=Path))
@click.option("--peer", help="Python interpreter with wikiextractor.")
@click.option("--megabytes", default=60)
@click.option("--repeat", default=3)
def xml(dumps, scratch, peer, megabytes, repeat):
    scratch.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    from wiki.wikipedia import _chunks
    for dump in dumps:
        data = b"".join(_chunks(dump))
        head, pages = data[:data.index(b"<page>")], data[data.index(b"<page>"):data.rindex(b"</page>") + 7]
        joined = scratch / (re.sub(r"\.(bz2|gz|xz)$", "", dump.name).replace(".xml", "") + ".joined.xml")
        joined.write_bytes(head + (pages + b"\n") * max(1, int(megabytes * 1e6 / len(pages))) + b"</mediawiki>\n")
        size = joined.stat().st_size / 1e6
        ours, theirs = scratch / "ours.txt", scratch / "theirs"
        commands = {"ours": [sys.executable, "-c", READER, ROOT, joined, ours]}
        if peer:
            commands["wikiextractor"] = [peer, "-m", "wikiextractor.WikiExtractor", "--no-templates", "--processes", 1,
                                         "-q", "-b", "500M", "-o", theirs, joined]
        results = median_runs(repeat, **commands)
        texts = {"ours": ours.read_text(encoding="utf-8")}
        if peer:
            text = "".join(p.read_text(encoding="utf-8") for p in sorted(theirs.rglob("wiki_*")))
            # It escapes < > & for HTML; the marks are counted in the text that is meant.
            texts["wikiextractor"] = html.unescape(re.sub(r"^</?doc[^\n]*$", "", text, flags=re.MULTILINE))
        click.echo(f"{dump.name} joined to {size:.0f} MB")
        click.echo("                   cpu s      MB/s   peak MB   characters   marks left per 10,000 characters")
        for name, (seconds, _, peak) in results.items():
            marks = "  ".join(f"{mark} {share:.2f}" for mark, share in leftovers(texts[name]).items())
            click.echo(f"{name:14} {seconds:9.2f} {size / seconds:9.1f} {peak:9.0f} {len(texts[name]):12,}   {marks}")
        if peer:
            click.echo(f"speed: {results['wikiextractor'][0] / results['ours'][0]:.2f} times wikiextractor's")


if __name__ == "__main__":
    main()
