"""Named-entity recognition: CoNLL files, one word and tag a line, a blank line between sentences.

Reads WikiANN/PAN-X (with its "en:" before every word), WikiNEuRal, MasakhaNER and CoNLL-2003 (the word is the
first column, the tag the last; a leading word index is skipped). Scored by entity micro F1
(metrics.entity_counts), after training a tag for the first sub-word of each word (`Tagging`).
"""
import copy
import re
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from data import BOS, EOS, UNK, encode_text
from eval import finetune, metrics, tasks

TAG = re.compile(r"O|[BIES]-\S+")


@dataclass(frozen=True)
class Sentence:
    """words and tags (IOB2, e.g. "B-PER") have one length."""
    words: tuple[str, ...]
    tags: tuple[str, ...]


def load(folder, splits=None):
    """One data set -> {language: {split: [Sentence]}}.

    Raises ValueError with file and line for a word without a tag, an unknown tag or an empty file, with the
    file for one without any entity (a hidden test set), and for entity types that differ between train and
    the rest.
    """
    data = tasks.collect(folder, (".tsv", ".txt", ".conll", ".conllu", ".bio", ".iob2", ""), read, splits)
    check_types(data, folder)
    return data


def read(path, language):
    """(language, Sentence) of one file; a `lang:` prefix of every word is stripped and names the language."""
    sentences = _sentences(path)
    if all(len(row) > 2 and row[0] in (str(i), str(i + 1)) for rows in sentences for i, row in enumerate(rows)):
        sentences = [[row[1:] for row in rows] for rows in sentences]         # a word index, as in WikiNEuRal
    if len(sentences) >= 10 and all(row[-1] == "O" for rows in sentences for row in rows):
        raise ValueError(f"{path}: every tag is O: a hidden test set cannot be scored")
    prefixes = {row[0].partition(":")[0] if ":" in row[0] else "" for rows in sentences for row in rows}
    strip = 0
    if len(prefixes) == 1 and re.fullmatch("[a-z][a-z-]+", prefix := prefixes.pop()):
        language, strip = prefix, len(prefix) + 1
    for rows in sentences:
        yield language, Sentence(tuple(row[0][strip:] for row in rows), tuple(row[-1] for row in rows))


def _sentences(path):
    """The file's lines as lists of fields, grouped by sentence; the last field is a tag."""
    sentences = [[]]
    for line, text in enumerate(tasks.read_text(path).split("\n"), 1):
        text = text.rstrip("\r")
        if not text.strip():
            sentences.append([])
        elif not text.startswith("-DOCSTART-") and not (path.suffix == ".conllu" and text.startswith("# ")):
            row = text.rstrip().split("\t") if "\t" in text else [field for field in text.split(" ") if field]
            if len(row) < 2:
                raise ValueError(f"{path}:{line}: {row[0]!r} has no tag: a hidden test set cannot be scored")
            if not row[0]:
                raise ValueError(f"{path}:{line}: a tag without a word")
            if not TAG.fullmatch(row[-1]):
                raise ValueError(f"{path}:{line}: {row[-1]!r} is not a tag; expected O, B-TYPE or I-TYPE")
            sentences[-1].append(row)
    return [rows for rows in sentences if rows]


def entity_types(sentences):
    """The entity types in use, as a set: {"PER", "LOC"}."""
    return {tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"}


def check_types(data, where):
    """Raise ValueError if train and the files to score have different entity types; without train, nothing is checked.

    A single file may lack a type, but no file may have one more, and together they have to have them all.
    """
    train = [s for by_split in data.values() for s in by_split.get("train", [])]
    if not train:
        return
    known, seen, scored = entity_types(train), set(), False
    for language, by_split in data.items():
        for split, sentences in by_split.items():
            if split == "train":
                continue
            types = entity_types(sentences)
            if types - known:
                raise ValueError(f"{where}: {language} {split} has entity types that train lacks: "
                                 f"{', '.join(sorted(types - known))} (train: {', '.join(sorted(known))})")
            seen, scored = seen | types, True
    if scored and known - seen:
        raise ValueError(f"{where}: train has entity types that no dev or test file has: "
                         f"{', '.join(sorted(known - seen))} (there: {', '.join(sorted(seen))})")


# ---- fine-tuning --------------------------------------------------------------------------------------------

class Tagging(finetune.Task):
    """A linear layer on the state of each word's first sub-word.

    No word is dropped: a sentence that is too long goes on in another sequence, a word that is too long is cut
    to its first pieces, and a word that the tokenizer makes nothing of is <unk>.
    """
    epochs = 10                                            # XTREME's, as in all tasks
    metric, column_names, score = "entity F1", ("correct", "predicted", "gold"), staticmethod(metrics.f1_from_counts)

    def __init__(self, tokenizer, max_length, train, prefix=""):
        super().__init__(tokenizer, max_length, train, prefix)
        self.known = self.scored = entity_types(train)
        self.pieces = {}
        self.tags = sorted({tag for sentence in train for tag in sentence.tags} | {"O"})
        self.outputs = len(self.tags)

    @staticmethod
    def mismatch(train, sentences):
        here = entity_types(sentences)
        return "none of its entity types occurs in train" if here and not here & entity_types(train) else None

    def target(self, name, language, sentences):
        """Score only the types that the model has learnt and the data set has; a note if some are left out."""
        here = entity_types(sentences)
        if here == self.known:
            return self, None
        other = copy.copy(self)
        other.scored = self.known & here
        left_out = ", ".join(sorted((self.known | here) - other.scored))
        return other, f"entity types {', '.join(sorted(other.scored))} scored; {left_out} left out"

    def items(self, sentences, learn=False):
        items = []
        for i, sentence in enumerate(sentences):
            ids, rows, targets = [BOS], [], []
            for word, tag in zip(sentence.words, sentence.tags):
                pieces = self._encode(word)
                if len(ids) + len(pieces) + 1 > self.limit:
                    items.append(self._item(ids, rows, targets, i))
                    ids, rows, targets = [BOS], [], []
                rows.append(len(ids))
                targets.append(self.tags.index(tag) if tag in self.tags else -100)
                ids += pieces
            items.append(self._item(ids, rows, targets, i))
        return items

    def _encode(self, word):
        if word not in self.pieces:
            self.pieces[word] = (encode_text(self.tokenizer, word) or [UNK])[:self.limit - 2]
        return self.pieces[word]

    @staticmethod
    def _item(ids, rows, targets, example):
        return finetune.Item(np.array([*ids, EOS], dtype=np.int64), example, np.array(rows, dtype=np.int64),
                             tuple(targets))

    def loss(self, outputs, batch):
        return (F.cross_entropy(outputs, batch.targets, ignore_index=-100, reduction="sum"),
                int((batch.targets != -100).sum()))

    def predictions(self, sentences, items, outputs):
        """-> a list of tags for each sentence, one a word."""
        tags = [[] for _ in sentences]
        for item, out in zip(items, outputs):
            tags[item.example] += [self.tags[k] for k in out.argmax(1)]
        return tags

    def columns(self, sentences, items, outputs):
        predicted = self.predictions(sentences, items, outputs)
        keep = [[[tag if tag[2:] in self.scored else "O" for tag in tags] for tags in side]
                for side in (predicted, [s.tags for s in sentences])]
        return metrics.entity_counts(*keep).astype(np.float64)


HEAD = Tagging
