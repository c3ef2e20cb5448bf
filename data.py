"""Text or Wikipedia -> clean documents -> SentencePiece -> shards. (`batches.py` makes packed, masked batches of them.)

    python data.py download --languages ro,sw --out DUMPS         # Wikipedia's newest dumps
    python data.py prepare INPUT --out DIR --vocab-size 64000     # INPUT: dumps, or <code>.txt, or a folder of both
    python data.py inspect DIR                                    # what is in it, language by language
    python data.py verify DIR                                     # every checksum
"""
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import click
import numpy as np
import sentencepiece

import corpus_report
from wiki import download
from wiki.progress import progress
from batches import (BOS, EOS, FORMAT, MIN_DOCUMENT, PAD, SPLITS, UNK, VERSION, Corpus, check_files, load_tokenizer,
                     manifest_digest, memory_map, mix64, ordered, read_manifest, sampling_probabilities)
from wiki.curate import LanguageClassifier, near_duplicates
from files import sync_folder
from records import Output, digest, finish, finished, write
from sources import EXCERPT, SAMPLES, Reading, clean, clean_part, is_text, list_parts, part_size
# Training, evaluation and tests import these from here: data.py is the one door to the data.
from batches import (FIRST_PIECE, IGNORE, MASK, MIN_SEQUENCE, BatchConfig, PackedBatch, Prefetcher, pack_sequences,  # noqa: F401
                     packed_batch, slot_probabilities, validation_batches)
from sources import INVISIBLE, list_sources, read_documents  # noqa: F401

# ---------------------------------------------------------------------------------------------------------------
# Tokenizer

def encode_text(tokenizer, text):
    """Text, cleaned as prepare does it -> list of piece ids, without <s> and </s>."""
    return tokenizer.encode(clean(text))


def train_tokenizer(sentences, vocab_size):
    """SentencePiece unigram model with byte fallback, from an iterator of lines -> bytes of the model file.

    Special tokens are control symbols, which text cannot produce. The normalisation is 'nfkc': the default
    'nmt_nfkc' turns ZWNJ into a space. Threads are fixed because the model depends on their number.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=vocab_size,
            bos_id=BOS, pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_piece="<s>", pad_piece="<pad>", eos_piece="</s>",
            unk_piece="<unk>", control_symbols="<mask>", byte_fallback=True, character_coverage=0.9995,
            split_digits=True, normalization_rule_name="nfkc", num_threads=16, minloglevel=2)
    except RuntimeError as error:
        message = str(error)
        if found := re.search(r"Vocabulary size too high .*<= (\d+)", message):
            raise ValueError(f"a vocabulary of {vocab_size} is too large for this text: the largest that fits is "
                             f"{found[1]}; choose --vocab-size {found[1]} or less, or add text") from None
        if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
            raise ValueError(f"a vocabulary of {vocab_size} is too small: special tokens, bytes and the characters of "
                             f"this text alone need {found[1]}; choose a --vocab-size above that") from None
        raise ValueError(f"SentencePiece cannot train on this text: {message}") from None
    return model.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Prepare

TRAIN, VALIDATION, DUPLICATE, NEAR_DUPLICATE, OTHER_LANGUAGE = range(5)    # fate of a document; first two: SPLITS
DROPPED = {DUPLICATE: "duplicate", NEAR_DUPLICATE: "near duplicate", OTHER_LANGUAGE: "language"}
SAMPLED_CHARACTERS = 10_000                      # most that one document gives to the tokenizer's sample
LINE_CHARACTERS = 1_000                          # SentencePiece skips lines above 4,192 bytes
CHUNK_BYTES = 1 << 20                            # text that a worker tokenises at a time
CLASSIFIER_CHARACTERS = 300_000                  # of each language, from which the classifier learns


def _decide(hashes, validation_share):
    """Fate of each document, from its hash alone [n] uint64 -> [n] uint8. The first of equal documents stays.

    Validation = hashes below a threshold, so that it depends neither on order nor on other documents; only where
    20 documents or more give fewer than two, the two smallest hashes.
    """
    fate = np.full(len(hashes), DUPLICATE, np.uint8)
    unique, first = np.unique(hashes, return_index=True)          # ascending
    fate[first] = TRAIN
    count = np.count_nonzero(unique < np.uint64(validation_share * (2**64 - 2048)))
    if validation_share > 0 and len(unique) >= 20:
        count = max(count, 2)
    fate[first[:count]] = VALIDATION
    return fate


def _sample_lines(parts, budget):
    """Lines of one language for the tokenizer: training documents in the order of a second hash until `budget`
    characters are taken. parts: list of (path, index, fate)."""
    index, fate = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    order = np.argsort(np.where(fate == TRAIN, mix64(index[:, 0]), ~np.uint64(0)), kind="stable")
    order = order[:np.count_nonzero(fate == TRAIN)]
    taken = np.zeros(len(fate), bool)
    given = np.cumsum(np.minimum(index[order, 1], SAMPLED_CHARACTERS))
    taken[order[:np.searchsorted(given, budget) + 1]] = True
    for (path, index, _), chosen in zip(parts, np.split(taken, np.cumsum([len(part[2]) for part in parts])[:-1])):
        ends = np.cumsum(index[:, 2])
        with open(path, "rb") as file:
            for document in np.flatnonzero(chosen):
                file.seek(int(ends[document] - index[document, 2]))
                text = file.readline().decode()[:SAMPLED_CHARACTERS].rstrip("\n")
                while len(text) > LINE_CHARACTERS:
                    cut = text.rfind(" ", 1, LINE_CHARACTERS) + 1 or LINE_CHARACTERS
                    yield text[:cut]
                    text = text[cut:]
                yield text


def _read_chunk(path, start, size):
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size).decode().split("\n")[:-1]


def _start_classifier(classifier):
    global _classifier
    _classifier = classifier


def _judge_chunk(task):
    """Cleaned documents in a range of a file -> for each whether it is in another language than it should be."""
    path, start, size, fate, language = task
    return np.array([f <= VALIDATION and _classifier.is_wrong(text, language)
                     for text, f in zip(_read_chunk(path, start, size), fate)], bool)


def _start_tokenizer(path):
    global _tokenizer, _is_byte
    _tokenizer = load_tokenizer(path)
    _is_byte = np.array([_tokenizer.is_byte(i) for i in range(len(_tokenizer))])


def _tokenize_chunk(task):
    """Cleaned documents in a range of a file -> for each split (ids, document lengths, counts), and those too short."""
    path, start, size, fate, dtype = task
    texts = _read_chunk(path, start, size)
    result, short = [], 0
    for split in (TRAIN, VALIDATION):
        kept = [text for text, f in zip(texts, fate) if f == split]
        encoded = _tokenizer.encode(kept, num_threads=1)           # the others belong to the other workers
        lengths = np.array([len(ids) for ids in encoded], np.int64)
        short += int(np.count_nonzero(lengths < MIN_DOCUMENT))
        kept = [text for text, n in zip(kept, lengths) if n >= MIN_DOCUMENT]
        encoded = [ids for ids in encoded if len(ids) >= MIN_DOCUMENT]
        ids = np.fromiter((i for document in encoded for i in document), dtype)
        result.append((ids, lengths[lengths >= MIN_DOCUMENT], {
            "documents": len(kept), "tokens": len(ids), "characters": sum(map(len, kept)),
            "words": sum(text.count(" ") + 1 for text in kept), "byte_tokens": int(_is_byte[ids].sum()),
            "unknown_tokens": int(np.count_nonzero(ids == UNK))}))
    return result, short


def _chunks(parts, last_item):
    """Ranges of about CHUNK_BYTES at document borders, as tasks (path, start, size, fate, last_item)."""
    for path, index, fate in parts:
        ends = np.concatenate([[0], np.cumsum(index[:, 2])]).astype(np.int64)
        first = 0
        while first < len(fate):
            last = max(first + 1, int(np.searchsorted(ends, ends[first] + CHUNK_BYTES, side="right")) - 1)
            yield path, int(ends[first]), int(ends[last] - ends[first]), fate[first:last], last_item
            first = last


@contextlib.contextmanager
def _locked(partial, out):
    """The folder `partial`, made and locked. ValueError where another prepare has it."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = os.fstat(lock).st_ino != partial.stat().st_ino      # finished and renamed since we opened it
    except OSError:
        busy = True
    if busy:
        os.close(lock)
        raise ValueError(f"{out}: another prepare is writing it; wait for it, or choose another --out")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                         # there is work in it to go on with, or it is gone
            partial.rmdir()
        os.close(lock)


def prepare(source, out, vocab_size=64000, tokenizer=None, languages=None, alpha=0.3, validation_share=0.01,
            workers=None, overwrite=False, sample_characters=12_000_000, append=False, reading=Reading()):
    """Texts or Wikipedia dumps -> prepared folder `out`, built beside it in `out`.partial and renamed when whole.

    source, languages: as for `sources.list_parts`; reading: how dumps are read. tokenizer: a model file to use; else
    one is trained, with vocab_size pieces, on sample_characters of the training documents, shared out as
    n_characters^alpha. append: add the languages that `out` does not hold yet, with its tokenizer, alpha and
    validation share; files of the others are not touched. The same input gives the same bytes, whatever `workers`
    (None = all cores). Interrupted or refused, it keeps what is finished in `out`.partial, and the next call goes on
    from there.
    Memory: the tokenizer's sample, a byte a document, and some 80 bytes (with reading.signatures 250) a document of
    the largest language. Returns the manifest. Raises ValueError.
    """
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation share is {validation_share}; it must be at least 0 and below 1")
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha is {alpha}; it must be 0 or more")
    if append and (tokenizer is not None or overwrite):
        raise ValueError("--append takes the tokenizer of the folder and replaces nothing; leave out --tokenizer and "
                         "--overwrite")
    parts = list_parts(source, languages, reading, _warn)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    with _locked(partial, out):
        if (partial / "replaced").exists() and not out.exists():   # killed between the two renames at the end
            (partial / "replaced").rename(out)
        old = None
        if append:
            old = read_manifest(out)
            check_files(out, old, checksums=False)
            tokenizer, alpha, validation_share = out / "tokenizer.model", old["alpha"], old["validation_share"]
            parts = [part for part in parts if part.language not in old["languages"]]
            if not parts:
                raise ValueError(f"{out}: already holds every language of {source}; nothing to append")
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            if not (out / "manifest.json").is_file():
                raise ValueError(f"{out}: exists and is no prepared corpus; choose another --out")
            if not overwrite:
                raise ValueError(f"{out}: already prepared; choose another --out, add languages with --append, or "
                                 "replace it with --overwrite")
        try:
            manifest = _build(parts, partial, out, old, vocab_size, tokenizer, alpha, validation_share,
                              workers or len(os.sched_getaffinity(0)), sample_characters, reading)
        except BaseException:                                      # a wrong --vocab-size must not cost the cleaned text
            if any((partial / "clean").glob("*.json")):
                _warn(f"{partial}: keeps what is finished; prepare with the same INPUT and --out goes on from there")
            else:
                shutil.rmtree(partial)
            raise
        if append:                                                 # the manifest last: until then `out` is as it was
            for path in partial.iterdir():
                if path.is_file() and path.name not in ("manifest.json", "tokenizer.model"):
                    path.replace(out / path.name)
            sync_folder(out)
            (partial / "manifest.json").replace(out / "manifest.json")
            shutil.rmtree(partial)
        else:
            if out.exists():
                out.rename(partial / "replaced")
            partial.rename(out)
            for folder in ("replaced", "clean"):
                shutil.rmtree(out / folder, ignore_errors=True)
        sync_folder(out)
        sync_folder(out.parent)
    return manifest


def _warn(line):
    click.echo(line, err=True)


def _build(sources, folder, out, old, vocab_size, tokenizer, alpha, validation_share, workers, sample_characters,
           reading):
    """Builds `folder`: what the manifest names, and clean/ with the cleaned text and the records of finished work."""
    (folder / "clean").mkdir(exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    started = time.perf_counter()
    files, entries, left_out = {}, {}, {}
    records = _clean_sources(sources, folder, reading, workers)
    grouped = {code: list(group)
               for code, group in itertools.groupby(zip(sources, records), lambda pair: pair[0].language)}

    def leave_out(code, why):
        paths = ", ".join(dict.fromkeys(str(part.path) for part, _ in grouped[code]))
        if any(is_text(part) for part, _ in grouped[code]):
            raise ValueError(f"{paths}: {why}; add some, or leave {code} out with --languages")
        _warn(f"{paths}: {why} after the filters; {code} is left out")
        left_out[code] = {"pages": entries[code]["pages"], "dropped": entries[code]["dropped"],
                          "samples": _samples(parts[code], [record for _, record in grouped[code]])}
        del entries[code], parts[code]

    # 1. Decide each document's fate.
    if reading.signatures:
        _warn("looking for near-duplicates")
    parts, fates, dumps = {}, {}, {}
    for code, group in grouped.items():
        counts, dropped = Counter({"article": 0}), Counter({"empty": 0, "duplicate": 0, "short": 0})
        for _, record in group:
            counts.update(record["counts"])
            dropped.update(record["dropped"])
        entries[code] = {"invalid_utf8": counts.pop("invalid_utf8", 0), "pages": dict(counts), "dropped": dropped}
        indexes = [memory_map(folder / f"{record['text']}.index", np.uint64).reshape(-1, 3) for _, record in group]
        fate = _decide(np.concatenate([index[:, 0] for index in indexes]), validation_share)
        if reading.signatures:
            first = np.flatnonzero(fate != DUPLICATE)
            signatures = np.concatenate([memory_map(folder / f"{record['text']}.minhash", np.uint16).reshape(-1, 32)
                                         for _, record in group])
            fate[first[near_duplicates(signatures[first])]] = NEAR_DUPLICATE
        fates[code] = fate                                         # `parts` holds views of it
        parts[code] = [(folder / record["text"], index, f) for (_, record), index, f in zip(
            group, indexes, np.split(fate, np.cumsum([len(index) for index in indexes])[:-1]))]
        dumps[code] = [part for part, (source, _) in zip(parts[code], group) if not is_text(source)]
        if not np.any(fate <= VALIDATION):
            leave_out(code, "holds no text")
    _drop_other_languages(parts, dumps, out, old, workers)
    content = {}
    for code in list(parts):
        fate, hashes = fates[code], np.concatenate([index[:, 0] for _, index, _ in parts[code]])
        entries[code]["dropped"].update({name: int(np.count_nonzero(fate == f)) for f, name in DROPPED.items()})
        kept = fate <= VALIDATION                                  # held-out documents of those that are left
        fate[kept] = _decide(hashes[kept], validation_share)
        content[code] = digest([[record["files"] for _, record in grouped[code]], hashlib.sha256(fate).hexdigest()])
        if not np.any(kept):
            leave_out(code, "holds no text")
    if not parts:
        raise ValueError("no document is left after the filters")

    # 2. The tokenizer. A language gives each character once at most: the epoch cap is 1.
    model = folder / "tokenizer.model"
    if tokenizer is not None:
        files[model.name] = write(model, Path(tokenizer).read_bytes())
    else:
        at_hand = np.array([sum(np.minimum(index[fate == TRAIN, 1], SAMPLED_CHARACTERS).sum()
                                for _, index, fate in found) for found in parts.values()], np.float64)
        budget = min(sample_characters, at_hand.sum())
        shares = sampling_probabilities(at_hand, alpha, budget, max_epochs=1)
        for code, share, n in zip(parts, shares, at_hand):
            entries[code]["tokenizer_share"] = share * budget / n if n else 0.0
        key = digest([content, vocab_size, alpha, sample_characters])
        if record := finished(folder, "tokenizer", key):
            files |= record["files"]
        else:
            _warn(f"training a tokenizer of {vocab_size:,} pieces on {budget / 1e6:.1f} M of "
                  f"{at_hand.sum() / 1e6:.1f} M characters")
            lines = itertools.chain.from_iterable(_sample_lines(found, share * budget)
                                                  for found, share in zip(parts.values(), shares))
            files[model.name] = write(model, train_tokenizer(lines, vocab_size))
            finish(folder, "tokenizer", key, {model.name: files[model.name]})
    vocab_size = len(load_tokenizer(model))
    trained = time.perf_counter()

    # 3. Tokenise, in order, into one pair of files a language and split.
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    for code, record in _tokenize(parts, folder, {code: digest([files[model.name], content[code]]) for code in parts},
                                  model, dtype, workers):
        entries[code] |= {name: record[name]
                          for name in ("characters", "words", "byte_tokens", "unknown_tokens", *SPLITS)}
        entries[code]["dropped"]["short"] += record["short"]
        if not entries[code]["train"]["documents"]:
            leave_out(code, f"no document has {MIN_DOCUMENT} tokens or more")
            continue
        name = f"{code}.samples.json"
        rows = _samples(parts[code], [record for _, record in grouped[code]])
        files |= record["files"]
        files[name] = write(folder / name, json.dumps(rows, ensure_ascii=False, indent=1).encode())
    tokens = sum(entry[split]["tokens"] for entry in entries.values() for split in SPLITS)
    if not tokens:
        raise ValueError("no document is left after the filters")
    seconds = time.perf_counter() - trained
    _warn(f"{tokens:,} tokens; cleaning and tokenizer {trained - started:.1f} s, tokenising {seconds:.1f} s "
          f"({tokens / seconds:,.0f} tokens/s)")

    # 4. The manifest.
    for entry in (*entries.values(), *left_out.values()):
        entry["dropped"] = {name: n for name, n in entry["dropped"].items()
                            if n or name in ("empty", "duplicate", "short")}
    manifest = {"format": FORMAT, "version": VERSION, "vocab_size": vocab_size, "dtype": dtype, "alpha": alpha,
                "validation_share": validation_share, "languages": entries, "left_out": left_out, "files": files}
    if old is not None:
        for name in ("languages", "left_out", "files"):           # the new languages last: the others keep their number
            manifest[name] = old.get(name, {}) | manifest[name]
        manifest["left_out"] = {code: e for code, e in manifest["left_out"].items() if code not in entries}
    manifest["sha256"] = manifest_digest(manifest)
    for path in folder.iterdir():                                  # left by a run with other languages
        if path.name not in files and path.is_file():
            path.unlink()
    write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def _clean_sources(sources, folder, reading, workers):
    """Every part through `clean_part` -> records in the order of `sources`. The largest are begun first."""
    order = sorted(range(len(sources)), key=lambda i: -part_size(sources[i]))
    cleaned = list(_parallel(clean_part, [(sources[i], folder, reading) for i in order],
                             lambda task: part_size(task[0]), workers, "cleaning", ahead=len(sources)))
    done = dict(zip(order, cleaned))
    records = [done[i] for i in range(len(sources))]
    for line in dict.fromkeys(line for record in records for line in record["warnings"]):
        _warn(line)
    wanted = {Path(record["text"]).name for record in records}
    for path in (folder / "clean").iterdir():                      # left by a run with other sources or options
        if path.name.split(".")[0] not in wanted and not path.name.startswith(("tokenizer.", "shards-")):
            path.unlink()
    return records


def _drop_other_languages(parts, dumps, out, old, workers):
    """Fate OTHER_LANGUAGE, in place, for pages of dumps that a classifier takes for another language. It learns from
    all languages there are: those at hand and, when appending, those that `out` holds."""
    samples = {code: _sample_lines(found, CLASSIFIER_CHARACTERS) for code, found in parts.items()}
    if old is not None:
        tokenizer = load_tokenizer(out / "tokenizer.model")
        samples |= {code: corpus_report.kept_text(out, old, code, "train", CLASSIFIER_CHARACTERS, tokenizer)
                    for code in old["languages"]}
    if len(samples) < 2 or not any(dumps[code] for code in parts):
        return
    classifier = LanguageClassifier.fit(samples, CLASSIFIER_CHARACTERS)
    chunks = [chunk for code in parts for chunk in _chunks(dumps[code], code)]
    results = _parallel(_judge_chunk, chunks, lambda chunk: chunk[2], workers, "languages",
                        _start_classifier, classifier)
    for wrong, chunk in zip(results, chunks):
        chunk[3][wrong] = OTHER_LANGUAGE


def _samples(parts, records):
    """A few documents of a language for people to look at -> [[reason, title, excerpt]], reason "" = kept."""
    rows = sorted(sample for record in records for sample in record["samples"])      # by reason, then by hash
    rows = [row for _, group in itertools.groupby(rows, lambda row: row[0]) for row in itertools.islice(group, SAMPLES)]
    rows = [[reason, title, text] for reason, _, title, text in rows]
    index, fate = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    part_of = np.repeat(np.arange(len(parts)), [len(part[2]) for part in parts])
    start = np.concatenate([np.cumsum(part[1][:, 2]) - part[1][:, 2] for part in parts])
    for reason, chosen in [("", fate <= VALIDATION), *((name, fate == f) for f, name in DROPPED.items())]:
        chosen = np.flatnonzero(chosen)
        for i in chosen[np.argsort(mix64(index[chosen, 0]), kind="stable")[:SAMPLES]]:
            text = _read_chunk(parts[part_of[i]][0], int(start[i]), int(index[i, 2]))[0]
            rows.append([reason, "", text[:EXCERPT]])
    return sorted(rows, key=lambda row: row[0])


def _tokenize(parts, folder, keys, model, dtype, workers):
    """Languages, in order, into shards -> iterator of (code, record: files, counts). Finished ones are not repeated."""
    records = {code: finished(folder, f"shards-{code}", keys[code]) for code in parts}
    chunks = [(code, chunk) for code, found in parts.items() if not records[code] for chunk in _chunks(found, dtype)]
    results = _parallel(_tokenize_chunk, [chunk for _, chunk in chunks], lambda chunk: chunk[2], workers,
                        "tokenising", _start_tokenizer, model)
    for code, group in itertools.groupby(zip(results, chunks), key=lambda pair: pair[1][0]):
        outputs, told, short = {}, Counter(), 0
        counts = {split: Counter(documents=0, tokens=0) for split in SPLITS}
        for split in SPLITS:
            outputs[split] = Output(folder / f"{code}.{split}.tokens"), Output(folder / f"{code}.{split}.offsets")
            outputs[split][1].write(np.zeros(1, "<i8").tobytes())
        for (both, too_short), _ in group:
            short += too_short
            for split, (ids, lengths, n) in zip(SPLITS, both):
                outputs[split][0].write(ids.tobytes())
                outputs[split][1].write((counts[split]["tokens"] + np.cumsum(lengths)).astype("<i8").tobytes())
                counts[split].update({name: n.pop(name) for name in ("documents", "tokens")})
                told.update(n)
        files = {output.path.name: output.close() for split in SPLITS for output in outputs[split]}
        records[code] = finish(folder, f"shards-{code}", keys[code], files, short=short, **told, **counts)
    yield from records.items()


def _start_worker(initializer=None, *arguments):
    # A worker of a killed parent would wait for ever, and hold the lock of the folder.
    watch = threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True)
    watch.start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C reaches all processes: workers end at once, the parent tells
    if initializer:
        initializer(*arguments)


def _parallel(function, tasks, size, workers, label, initializer=None, *arguments, ahead=None):
    """function(task) for each task, in order, on `workers` processes, with progress in bytes: size(task).
    ahead: results that may wait for an earlier one, 4 a worker by default."""
    if not tasks:
        return
    workers = min(workers, len(tasks))
    with progress(sum(map(size, tasks)), label) as advance:
        if workers == 1:
            if initializer:
                initializer(*arguments)
            for task in tasks:
                yield function(task)
                advance(size(task))
        else:                                      # fork, for a spawned worker would import torch first
            fork = multiprocessing.get_context("fork")
            pool = ProcessPoolExecutor(workers, fork, _start_worker, (initializer, *arguments))
            yield from ordered(pool, function, tasks, ahead or 4 * workers, lambda task: advance(size(task)))


# ---------------------------------------------------------------------------------------------------------------
# Command line

class _Group(click.Group):
    """Bad input is one line and exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:                      # `| head` has read enough; click ends quietly
            raise
        except (ValueError, OSError, BrokenProcessPool) as error:
            told = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            failure = click.ClickException(told)
            failure.exit_code = 2
            raise failure from None


@click.group(cls=_Group)
def main():
    """Text -> clean documents -> SentencePiece -> shards -> packed, masked batches."""


@main.command("prepare")
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--vocab-size", default=64000, type=click.IntRange(1), show_default=True,
              help="Pieces of the tokenizer to train.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Use this SentencePiece model; train none.")
@click.option("--languages", help="Codes to take, as in ro,sw; all otherwise.")
@click.option("--alpha", default=0.3, type=click.FloatRange(0), show_default=True,
              help="Tokenizer sample: p ~ characters^alpha.")
@click.option("--sample-characters", default=12_000_000, type=click.IntRange(1), show_default=True,
              help="Characters that the tokenizer is trained on.")
@click.option("--validation-share", default=0.01, show_default=True, help="Share of documents held out.")
@click.option("--workers", type=click.IntRange(1), help="Processes; all cores otherwise.")
@click.option("--overwrite", is_flag=True, help="Replace a prepared folder.")
@click.option("--append", is_flag=True, help="Add languages to a prepared folder, with its tokenizer.")
@click.option("--near-duplicates", is_flag=True, help="Drop documents that nearly repeat another, as bots write them.")
@click.option("--opening-text", is_flag=True, help="Of dumps, keep just the leads of articles.")
@click.option("--limit", type=click.IntRange(1), help="Articles to take of each dump.")
def prepare_command(source, languages, near_duplicates, opening_text, limit, **options):
    """Wikipedia dumps, <code>.txt (documents separated by blank lines), or a folder of both -> shards and tokenizer.

    Dumps are MediaWiki XML or CirrusSearch JSON lines, plain or .bz2, .gz, .xz; their pages go through filters, which
    `inspect` counts. Run the same command again to continue after an interruption.
    """
    if languages is not None:
        languages = [code.strip() for code in languages.split(",") if code.strip()]
        if not languages:
            raise click.UsageError("--languages names none; write codes, as in ro,sw, or leave the option out")
    manifest = prepare(source, languages=languages, reading=Reading(limit, opening_text, near_duplicates), **options)
    head, rows = corpus_report.language_table(manifest, options["alpha"])
    click.echo(head)
    for row in rows if len(rows) <= 16 else [*rows[:8], "...", *rows[-8:]]:
        click.echo(row)


ATLAS_MARK = Path("eval/ner/atlas")                # a folder that `data.py atlas` has written holds this


@main.command("atlas")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--seed", default=0, show_default=True)
def atlas_command(out, seed):
    """Write the embedded atlas: OUT/text for prepare, OUT/eval with four tasks and retrieval for evaluation."""
    import atlas
    if out.is_dir() and any(out.iterdir()) and not (out / ATLAS_MARK).is_dir():
        raise ValueError(f"{out}: holds other files, which could be overwritten; choose another --out")
    (out / ATLAS_MARK).mkdir(parents=True, exist_ok=True)            # first, so that an interrupted one can be written again
    sizes = atlas.write(out, seed)
    click.echo(f"{out}: {len(sizes)} languages, {sum(n for n, _ in sizes.values()):,} documents; see it with "
               f"`python data.py inspect {out}`")


@main.command("inspect")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--alpha", default=0.3, type=click.FloatRange(0), show_default=True, help="Sampling: p ~ tokens^alpha.")
@click.option("--budget", type=float, help="Training tokens, for the epochs column; all tokens once otherwise.")
@click.option("--max-epochs", type=float, help="Cap on how often a language is read.")
@click.option("--sample", metavar="CODE", help="Show documents of a language: what was kept, what was dropped and why.")
@click.option("--compare", metavar="MODEL", type=click.Path(path_type=Path),
              help="Compare the tokenizer with this SentencePiece model, such as XLM-R's sentencepiece.bpe.model.")
def inspect_command(folder, alpha, budget, max_epochs, sample, compare):
    """What a prepared folder, or the atlas as `data.py atlas` writes it, holds, language by language."""
    if (folder / ATLAS_MARK).is_dir():
        import atlas
        return click.echo("\n".join(atlas.describe(folder)))
    manifest = read_manifest(folder)
    if sample:
        return click.echo("\n".join(corpus_report.sample_lines(folder, manifest, sample)))
    if compare:
        head, rows = corpus_report.comparison_table(folder, manifest, compare)
        return click.echo("\n".join([f"left: {folder / 'tokenizer.model'}, right: {compare}", head, *rows]))
    if budget is None:
        budget = sum(entry["train"]["tokens"] for entry in manifest["languages"].values())
    for head, rows in (corpus_report.page_table(manifest),
                       corpus_report.language_table(manifest, alpha, budget, max_epochs)):
        click.echo("\n".join([head, *rows, ""]))
    click.echo(corpus_report.totals(manifest))


@main.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify_command(folder):
    """Compare every file with the manifest's checksums."""
    manifest = read_manifest(folder)
    with progress(sum(entry["size"] for entry in manifest["files"].values()), "verifying") as advance:
        for name, entry in manifest["files"].items():
            check_files(folder, {"files": {name: entry}})
            advance(entry["size"])
    for split in SPLITS:
        Corpus(folder, split, verify=False)
    if unknown := sorted({path.name for path in folder.iterdir()} - {"manifest.json", *manifest["files"]}):
        raise ValueError(f"{folder}: holds what its manifest does not name, {', '.join(unknown[:5])}; delete it (an "
                         "interrupted prepare leaves such files)")
    click.echo(f"{folder}: {len(manifest['files'])} files, "
               f"{sum(entry['size'] for entry in manifest['files'].values()):,} bytes, all as in the manifest")


main.add_command(download.command)

if __name__ == "__main__":
    main()
