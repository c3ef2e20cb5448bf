"""Extractive question answering: SQuAD 1.1 JSON (XQuAD, MLQA, TyDiQA-GoldP, TQuAD and others).

Scored by exact match and F1 (metrics.answer_scores), after training where answers begin and end (`Spans`).
"""
import copy
import re
import warnings
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import BOS, EOS, UNK, clean, encode_text
from eval import finetune, metrics, tasks

MAX_QUESTION = 64         # pieces
STRIDE = 128              # pieces between the starts of two windows, as BERT's doc_stride
MAX_ANSWER = 30           # pieces


@dataclass(frozen=True)
class Answer:
    """context[start:start + len(text)] == text, in characters; start is None where the file's is wrong."""
    text: str
    start: int | None


@dataclass(frozen=True)
class Question:
    """article: number of the article in its file, so that a split never has one article on both sides."""
    id: str
    article: int
    context: str
    question: str
    answers: tuple[Answer, ...]


def load(folder, splits=None):
    """One data set -> {language: {split: [Question]}}.

    Of MLQA's files those with context and question in one language are read. Questions marked is_impossible
    are left out, with a warning that counts them. Answers that are not at their offset keep their text (it is
    scored) but lose their start (it cannot be learnt), with a warning that names them. Raises ValueError with
    the file if they concern over 1% of its questions, and for questions without an answer (a hidden test
    set), missing fields or an empty file.
    """
    return tasks.collect(folder, (".json",), read, splits, parse)


def parse(name):
    """(language, split) of a file name; language False (leave out) for MLQA's files in two languages."""
    if match := re.search(r"context-(\w\w)-question-(\w\w)", name):
        return match[1] if match[1] == match[2] else False, tasks.parse_name(name)[1]
    return tasks.parse_name(name)


def read(path, language):
    """(language, Question) of one file; TyDiQA's question ids begin with a language ("finnish-...")."""
    value = tasks.read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise ValueError(f"{path}: not SQuAD 1.1: expected an object with a list \"data\"")
    questions, wrong, impossible = [], [], 0
    for article, entry in enumerate(value["data"]):
        for p, paragraph in enumerate(_field(entry, "paragraphs", list, f"{path}: article {article}")):
            where = f"{path}: article {article}, paragraph {p}"
            context = _field(paragraph, "context", str, where)
            for qa in _field(paragraph, "qas", list, where):
                id_ = str(qa.get("id", len(questions))) if isinstance(qa, dict) else "?"
                where_question = f"{path}: question {id_}"
                text = _field(qa, "question", str, where_question)
                if qa.get("is_impossible"):
                    impossible += 1
                    continue
                if not qa.get("answers"):
                    raise ValueError(f"{where_question} has no answer: a hidden test set cannot be scored")
                answers = tuple(_answer(a, context, where_question) for a in _field(qa, "answers", list, where_question))
                if any(a.start is None for a in answers):
                    wrong.append(id_)
                spoken = language or tasks.SPELLED_OUT.get(id_.partition("-")[0])
                questions.append((spoken, Question(id_, article, context, text, answers)))
    if wrong:
        named = f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}"
        message = (f"{path}: {len(wrong)} of {len(questions)} questions have an answer that is not at its offset: "
                   f"{named}")
        if len(wrong) > 0.01 * len(questions):
            raise ValueError(f"{message}; at most 1% may")
        warnings.warn(message, stacklevel=2)
    if impossible:
        if not questions:
            raise ValueError(f"{path}: all {impossible} questions are marked is_impossible")
        warnings.warn(f"{path}: left out {impossible} questions marked is_impossible", stacklevel=2)
    yield from questions


def _field(value, name, kind, where):
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        raise ValueError(f"{where}: not SQuAD 1.1: no {name!r}")
    return value[name]


def _answer(answer, context, where):
    """An Answer; its start is a number or, as in TQuAD, the text of one."""
    text = _field(answer, "text", str, where)
    if not text.strip():
        raise ValueError(f"{where} has an empty answer")
    try:
        start = int(answer.get("answer_start"))
    except (TypeError, ValueError):
        return Answer(text, None)
    return Answer(text, start if start >= 0 and context.startswith(text, start) else None)


# ---- fine-tuning --------------------------------------------------------------------------------------------

def offsets(tokenizer, text):
    """Text -> (piece ids as data.encode_text gives them, [(begin, end)]: the characters of `text` behind each).

    White space before a piece is not part of it. Cleaning and the tokenizer's normalisation both change lengths;
    SentencePiece undoes its own, `_origin` that of cleaning.
    """
    cleaned = clean(text)
    if hasattr(tokenizer, "EncodeAsOffsetMapping"):                       # sentencepiece 0.2.3 and later, and our WordPiece
        found = tokenizer.EncodeAsOffsetMapping(cleaned)
        ids, spans = found["ids"], found["offsets"]
    else:
        found = tokenizer.EncodeAsImmutableProto(cleaned)
        ids, spans = [p.id for p in found.pieces], [(p.begin, p.end) for p in found.pieces]
    origin = _origin(text, cleaned)
    result = []
    for begin, end in spans:
        while begin < end and cleaned[begin] == " ":
            begin += 1
        # The end is that of the last character, so that text which cleaning drops after it stays outside.
        result.append((origin[begin][0], origin[end - 1][1] if end > begin else origin[begin][0]))
    return ids, result


def _origin(text, cleaned):
    """For each character of clean(text), and one past the last, the (begin, end) in `text` that it came from."""
    if cleaned == text:
        return [(i, i + 1) for i in range(len(text) + 1)]
    origin = []
    for match in re.finditer(r"\S+", text):
        word, whole = match[0], clean(match[0])
        if not whole:
            continue
        if origin:
            origin.append((origin[-1][1], match.start()))                 # the one space between words
        if word == whole:
            origin += [(i, i + 1) for i in range(match.start(), match.end())]
            continue
        # Composition joins characters with those before them: cleaning longer and longer beginnings of the word
        # shows which characters each cleaned one took.
        lengths = [len(clean(word[:k])) for k in range(len(word) + 1)]
        first = 0
        for position in range(len(whole)):
            last = next(k for k in range(len(word) + 1) if lengths[k] > position)
            while last < len(word) and lengths[last + 1] == lengths[last]:
                last += 1
            origin.append((match.start() + first, match.start() + last))
            first = last
    return [*origin, (len(text), len(text))]


def windows(length, width, stride):
    """Ranges of at most `width` that cover 0..length, `stride` apart; the last one ends at `length`."""
    found = [(0, min(width, length))]
    while found[-1][1] < length:
        start = found[-1][0] + stride
        found.append((start, min(start + width, length)))
    return found


class Spans(finetune.Task):
    """<s> question </s> window of the context </s>; a linear layer scores each context piece as start and as end.

    A window without the whole answer learns to point at <s>. Every question does have an answer, so decoding
    never returns "none": it takes the best span of any window, by log-probability within the window, where
    <s> takes its share, so that a window that points at <s> gives way to one that does not.
    """
    epochs, longest, outputs = 3, 384, 2
    metric, column_names = "F1", ("exact", "f1")
    also = (("exact match", lambda exact, f1: metrics.mean(exact)),)

    def __init__(self, tokenizer, max_length, train=(), prefix=""):
        super().__init__(tokenizer, max_length, train, prefix)
        self.normalise, self.contexts = metrics.squad_normalise, {}

    def target(self, name, language, questions):
        """MLQA has its own normalisation, by language; all others have SQuAD's."""
        if "mlqa" not in name:
            return self, None
        if language not in metrics.MLQA_ARTICLES:
            return self, "MLQA has no normalisation for this language; scored with SQuAD's"
        other = copy.copy(self)
        other.normalise = lambda text: metrics.mlqa_normalise(text, language)
        return other, None

    def context(self, text):
        """(ids, spans) of a context, kept: many questions share one."""
        if text not in self.contexts:
            ids, spans = offsets(self.tokenizer, text)
            self.contexts[text] = (ids, spans) if ids else ([UNK], [(0, len(text))])
        return self.contexts[text]

    def items(self, questions, learn=False):
        """One item a window; rows: <s>, then the window's pieces; targets: the rows of start and end, 0 for none.

        In training, of a question's windows without its answer only one is kept, another one for each question: in a
        long article nearly all windows teach the same, to point at <s>, and would take nearly all of the time.
        """
        items = []
        for i, question in enumerate(questions):
            ids, spans = self.context(question.context)
            asked = encode_text(self.tokenizer, question.question)[:min(MAX_QUESTION, self.limit // 3)]
            width = self.limit - len(asked) - 3
            answer = next((a for a in question.answers if a.start is not None), None)
            if answer is None and learn:
                continue
            first, last = pieces_of(spans, answer.start, answer.start + len(answer.text)) if answer else (0, 0)
            ranges = windows(len(ids), width, min(STRIDE, max(1, width // 2)))
            if learn:
                without = [r for r in ranges if not (r[0] <= first and last < r[1])]
                ranges = [r for r in ranges if r not in without or r == without[i % len(without)]]
            for start, end in ranges:
                offset = len(asked) + 2
                inside = start <= first and last < end
                items.append(Window(
                    np.array([BOS, *asked, EOS, *ids[start:end], EOS], dtype=np.int64), i,
                    np.array([0, *range(offset, offset + end - start)], dtype=np.int64),
                    (first - start + 1, last - start + 1) if inside else (0, 0), start))
        return items

    def loss(self, outputs, batch):
        padded = pad_sequence(outputs.split(batch.counts), batch_first=True, padding_value=float("-inf"))
        targets = batch.targets.view(-1, 2)                               # [items, 2]; padded [items, rows, 2]
        return F.cross_entropy(padded, targets, reduction="sum"), targets.numel()

    def answers(self, questions, items, outputs):
        """The best span of each question, as text of its context."""
        best = [(-np.inf, "")] * len(questions)
        for item, logits in zip(items, outputs):
            score, first, last = best_span(logits)
            if score > best[item.example][0]:
                context = questions[item.example].context
                spans = self.context(context)[1][item.start:]
                best[item.example] = score, context[spans[first][0]:spans[last][1]]
        return [text for _, text in best]

    def columns(self, questions, items, outputs):
        return np.array([metrics.answer_scores(text, [a.text for a in question.answers], self.normalise)
                         for text, question in zip(self.answers(questions, items, outputs), questions)])

    @staticmethod
    def score(exact, f1, weights=None):
        return metrics.mean(f1, weights)


@dataclass
class Window(finetune.Item):
    """start: which piece of the context the window begins with."""
    start: int = 0


def pieces_of(spans, begin, end):
    """The first and the last piece that share a character with begin..end."""
    touching = [i for i, (b, e) in enumerate(spans) if b < end and e > begin]
    return (touching[0], touching[-1]) if touching else (0, 0)


def best_span(logits):
    """logits [1 + pieces, 2] (row 0 is <s>) -> (log-probability, first piece, last piece), first <= last, at most
    MAX_ANSWER pieces."""
    shifted = logits.astype(np.float64) - logits.max(0)
    start, end = (shifted - np.log(np.exp(shifted).sum(0)))[1:].T
    scores = np.full((len(start), MAX_ANSWER), -np.inf)
    for length in range(min(MAX_ANSWER, len(start))):
        scores[:len(start) - length, length] = start[:len(start) - length] + end[length:]
    first, length = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, length]), int(first), int(first + length)


HEAD = Spans
