"""What a prepared folder holds, as tables of text: `python data.py inspect DIR`."""
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece

from batches import SPLITS, UNK, check_files, load_tokenizer, memory_map, sampling_probabilities
from wiki.curate import PAGE_FILTERS

# Why documents are dropped, in the order in which it is decided.
REASONS = ("empty", *PAGE_FILTERS, "boilerplate", "duplicate", "near duplicate", "language", "short")
COMPARED = 200_000             # characters of a language on which two tokenizers are compared


def language_table(manifest, alpha, budget_tokens=None, max_epochs=None):
    """Header and rows of text, a language each, largest first. tok/word is the fertility (in a script without spaces
    "words" are sentences: read tok/char there), bytes and unk the shares of tokens that are byte fallback and unknown,
    share the share of training tokens."""
    entries = manifest["languages"]
    tokens = np.array([entry["train"]["tokens"] for entry in entries.values()])
    shares = sampling_probabilities(tokens, alpha, budget_tokens, max_epochs)
    head = (f"{'language':9}{'documents':>11}{'tokens':>14}{'characters':>14}{'tok/word':>9}{'tok/char':>9}{'bytes':>8}"
            f"{'unk':>8}{'dropped':>9}{'share':>9}") + (f"{'epochs':>9}" if budget_tokens else "")
    rows = []
    for (code, entry), n, share in sorted(zip(entries.items(), tokens, shares), key=lambda row: -row[1]):
        total = sum(entry[split]["tokens"] for split in SPLITS)
        documents = sum(entry[split]["documents"] for split in SPLITS)
        row = (f"{code:9}{documents:>11,}{total:>14,}{entry['characters']:>14,}"
               f"{total / entry['words']:>9.2f}{total / entry['characters']:>9.3f}{entry['byte_tokens'] / total:>8.3%}"
               f"{entry.get('unknown_tokens', 0) / total:>8.3%}{sum(entry['dropped'].values()):>9,}{share:>9.3%}")
        rows.append(row + (f"{share * budget_tokens / n:>9.2f}" if budget_tokens else ""))
    return head, rows


def page_table(manifest):
    """Header and rows: documents read, how many each filter dropped, how many stay; and pages of dumps that are no
    articles (redirects and the like). Languages of which nothing stayed are rows too. A column that is 0 for every
    language is left out."""
    entries = dict(manifest["languages"], **manifest.get("left_out", {}))
    entries = {code: entry for code, entry in entries.items() if "pages" in entry}
    other = sorted({name for entry in entries.values() for name in entry["pages"]} - {"article"})
    reasons = [name for name in REASONS if any(entry["dropped"].get(name) for entry in entries.values())]
    head = "".join([f"{'language':9}", *(f"{'(' + name + ')':>{len(name) + 4}}" for name in other), f"{'articles':>11}",
                    *(f"{name:>{max(9, len(name) + 2)}}" for name in reasons), f"{'kept':>11}"])
    rows = []
    for code, entry in sorted(entries.items(), key=lambda item: -item[1]["pages"]["article"]):
        kept = sum(entry[split]["documents"] for split in SPLITS if split in entry)
        rows.append("".join([f"{code:9}", *(f"{entry['pages'].get(name, 0):>{len(name) + 4},}" for name in other),
                             f"{entry['pages']['article']:>11,}",
                             *(f"{entry['dropped'].get(name, 0):>{max(9, len(name) + 2)},}" for name in reasons),
                             f"{kept:>11,}"]))
    return head, rows


def totals(manifest):
    """One line: languages, vocabulary, dropped documents by reason."""
    dropped = Counter()
    for entry in manifest["languages"].values():
        dropped.update(entry["dropped"])
    return (f"{len(manifest['languages'])} languages, vocabulary {manifest['vocab_size']:,}, {manifest['dtype']}; "
            "dropped documents: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))


def sample_lines(folder, manifest, code):
    """Some documents of a language, what was kept and what was dropped and why, one a line."""
    left_out = manifest.get("left_out", {})
    name = f"{code}.samples.json"
    if code not in left_out and name not in manifest["files"]:
        raise ValueError(f"{folder}: holds no samples of {code!r}; its languages are "
                         f"{', '.join(manifest['languages'])}")
    if code not in left_out:
        check_files(folder, {"files": {name: manifest["files"][name]}})
    rows = left_out[code]["samples"] if code in left_out else json.loads((Path(folder) / name).read_bytes())
    dropped = (left_out.get(code) or manifest["languages"][code])["dropped"]
    lines = []
    for reason, group in itertools.groupby(rows, key=lambda row: row[0]):
        lines.append(f"dropped, {reason} ({dropped[reason]:,}):" if reason else "kept:")
        lines += [f"    {title}: {text}" if title else f"    {text}" for _, title, text in group]
    return lines


def kept_text(folder, manifest, code, split, characters, tokenizer):
    """Documents of a prepared language, decoded, until about so many characters -> iterator of str."""
    ids = memory_map(Path(folder) / f"{code}.{split}.tokens", np.dtype(manifest["dtype"]))
    offsets = memory_map(Path(folder) / f"{code}.{split}.offsets", np.dtype("<i8"))
    for start, end in zip(offsets[:-1], offsets[1:]):
        if characters <= 0:
            return
        text = tokenizer.decode(ids[start:end].tolist())
        characters -= len(text)
        yield text


def comparison_table(folder, manifest, model_file):
    """Header and rows: tokens a word and a character, byte-fallback and unknown shares of this folder's tokenizer
    (left) and of another SentencePiece model, such as XLM-R's sentencepiece.bpe.model (right), on the same text:
    up to 200,000 characters of each language, held-out documents first."""
    try:
        other = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model_file}: cannot be read as a SentencePiece model ({error})") from None
    ours = load_tokenizer(Path(folder) / "tokenizer.model")
    head = (f"{'language':9}{'words':>9}{'tok/word':>10}{'':8}{'tok/char':>10}{'':8}{'bytes':>9}{'':8}{'unk':>9}{'':8}"
            f"{'tokens':>9}")
    rows = []
    for code in manifest["languages"]:
        texts = []
        for split in reversed(SPLITS):
            texts += kept_text(folder, manifest, code, split, COMPARED - sum(map(len, texts)), ours)
        words, characters = sum(text.count(" ") + 1 for text in texts), sum(map(len, texts))
        counts = []
        for tokenizer, unknown in ((ours, UNK), (other, other.unk_id())):
            ids = np.fromiter(itertools.chain.from_iterable(tokenizer.encode(texts)), np.int64)
            is_byte = np.array([tokenizer.is_byte(i) for i in range(len(tokenizer))])
            counts.append((len(ids) / words, len(ids) / characters, is_byte[ids].mean(), (ids == unknown).mean(),
                           len(ids)))
        a, b = counts
        rows.append(f"{code:9}{words:>9,}{a[0]:>10.2f}{b[0]:>8.2f}{a[1]:>10.3f}{b[1]:>8.3f}{a[2]:>9.3%}{b[2]:>8.3%}"
                    f"{a[3]:>9.3%}{b[3]:>8.3%}{a[4] / b[4]:>8.2f}x")
    return head, rows
