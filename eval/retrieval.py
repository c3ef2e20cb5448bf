"""Sentence retrieval: line-aligned pairs of a language and English, as in LASER's Tatoeba files.

tatoeba.fra-eng.fra and tatoeba.fra-eng.eng hold one sentence a line. Scored by metrics.retrieval_hits on
mean-pooled states; nothing is trained.

    load(folder)                                    {language: {"test": [Pair]}}
    hits(model, tokenizer, pairs, prefix)           per-example table of one language
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import finetune, metrics, tasks

COLUMNS = ("from English", "to English", "from English, centred", "to English, centred")

NAME = re.compile(r"(?:.*\.)?([a-z]{2,3})-([a-z]{2,3})")
ENGLISH = {"en", "eng"}


@dataclass(frozen=True)
class Pair:
    """`sentence` in the file's language and its translation, mostly into English."""
    sentence: str
    translation: str


def load(folder, splits=None):
    """One data set -> {language: {"test": [Pair]}}, without other splits; a language is called as in the file names ("fra").

    Pairs without English are called "fra-deu". Raises ValueError for a missing side, sides of different
    lengths and empty lines, with file and line.
    """
    data, folder = {}, Path(folder)
    for name, sides in _sides(folder).items():
        first, second = NAME.fullmatch(Path(name).name).groups()
        if set(sides) != {first, second}:
            missing = ({first, second} - set(sides)).pop()
            raise ValueError(f"{folder / name}.{missing}: missing; the pair needs both files")
        if first in ENGLISH:
            first, second = second, first
        language = first if second in ENGLISH else f"{first}-{second}"
        if language in data:
            raise ValueError(f"{sides[first]}: a second file pair for {language}; keep one")
        data[language] = {"test": read(sides[first], sides[second])}
    return data


def _sides(folder):
    """{pair name: {language: path}} of all files whose names are <pair>.<language>."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name, _, side = path.name.rpartition(".")
        if path.is_file() and (match := NAME.fullmatch(name)) and side in match.groups():
            found.setdefault(str(path.relative_to(folder).with_name(name)), {})[side] = path
    if not found:
        raise ValueError(f"{folder}: no sentence pairs; expected tatoeba.fra-eng.fra, tatoeba.fra-eng.eng and the like")
    return found


def read(path, translations):
    """The [Pair] of two line-aligned files."""
    sides = []
    for side in (path, translations):
        lines = tasks.read_text(side).replace("\r\n", "\n").split("\n")
        sides.append(lines[:-1] if lines[-1] == "" else lines)
        for line, text in enumerate(sides[-1], 1):
            if not text.strip():
                raise ValueError(f"{side}:{line}: empty line; the lines of the two files have to correspond")
    if not sides[0] or not sides[1]:
        raise ValueError(f"{path if not sides[0] else translations}: empty file")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{path}: {len(sides[0])} lines, but {len(sides[1])} in {translations}")
    return [Pair(a.strip(), b.strip()) for a, b in zip(*sides)]


# ---- scores -------------------------------------------------------------------------------------------------

def hits(model, tokenizer, pairs, prefix="", **options):
    """[Pair] -> bool [n, 4]: is the nearest neighbour right, in the order of COLUMNS.

    The first two columns use the vectors as they are, the last two subtract each language's mean. `prefix` is
    put before every sentence (e5 models want "query: "); options go to finetune.vectors.
    """
    found = finetune.vectors(model, tokenizer, [prefix + p.sentence for p in pairs]
                             + [prefix + p.translation for p in pairs], **options)
    foreign, english = found[:len(pairs)], found[len(pairs):]
    return np.concatenate([metrics.retrieval_hits(english, foreign),
                           metrics.retrieval_hits(english, foreign, centre=True)]).T


def score(from_english, to_english, centred_from, centred_to, weights=None):
    """Accuracy: the mean of both directions, of vectors as they are; as the metrics, with optional weights."""
    return metrics.mean((np.asarray(from_english) + np.asarray(to_english)) / 2, weights)
