"""What a model trained on the atlas has learnt, in a few lines: masks filled across scripts, translations found."""

import itertools

import numpy as np
import torch

from data import BOS, EOS, MASK, encode_text, pack_sequences

from . import facts, languages, load, parallel, render, schema

# One relation and one script each. Which fact is asked is decided by its place in facts.json, never by the answer.
EXAMPLES = (("en", "capital"), ("ru", "continent"), ("ar", "language"), ("hi", "currency"), ("zh", "class"))
RELATIONS = tuple(relation for _, relation in EXAMPLES)
LATIN = ("en", "ro", "fr", "de", "es", "it", "pt", "nl")
SCRIPTS = ("en", "ru", "ar", "hi", "zh", "ko", "el", "th")


def questions(code, tokenizer, relation, held_out=False, told=False):
    """Facts of one relation in one language as cloze tests, in the order of facts.json.

    -> [(text with [MASK], ids, place of the mask in ids, id of the answer)]. A fact is asked in the relation's first
    pattern, with its object masked, if the object there is one piece (else the number of masks would tell its length).
    told: the fact stands before it, in the second pattern.
    """
    language, found = load(code), []
    slot, patterns = list(schema()["relations"][relation]["slots"])[1], load(code).relations[relation]["patterns"]
    for fact in facts():
        if fact.relation != relation or fact.held_out != held_out:
            continue
        sentence = render(language, fact, patterns[0])
        start, end = sentence.spans[slot]
        ids = encode_text(tokenizer, sentence.text)
        answer = sentence.text[start:end]
        places = [i for i, piece in enumerate(ids) if tokenizer.id_to_piece(piece).strip("\u2581") == answer]
        if len(places) != 1:
            continue
        before = render(language, fact, patterns[1]).text + language.join if told else ""
        whole, tail = encode_text(tokenizer, before + sentence.text), ids[places[0]:]
        place = len(whole) - len(tail)
        if whole[place:] == tail:
            found.append((before + sentence.text[:start] + "[MASK]" + sentence.text[end:],
                          [*whole[:place], MASK, *tail[1:]], place, tail[0]))
    return found


@torch.no_grad()
def fill(model, asked):
    """The model's first guess for each of `questions`. -> (probability, piece id) arrays [n]"""
    probabilities, pieces = [np.zeros(0)], [np.zeros(0, np.int64)]
    for first in range(0, len(asked), 256):
        group = asked[first:first + 256]
        tokens, cu_seqlens, longest = pack_sequences([[BOS, *ids, EOS] for _, ids, _, _ in group])
        places = cu_seqlens[:-1].long() + 1 + torch.tensor([place for _, _, place, _ in group])
        p, piece = model.mlm_logits(model.encode(tokens, cu_seqlens, longest)[places]).float().softmax(-1).max(-1)
        probabilities.append(p.numpy())
        pieces.append(piece.numpy())
    return np.concatenate(probabilities), np.concatenate(pieces)


def shares_right(model, tokenizer, codes, **kind):
    """{relation: (share of `questions` in all of `codes` that the first guess answers, their number)}; the share of
    the commonest right answer of each language stands third: what a guess without reading would reach."""
    shares = {}
    for relation in RELATIONS:
        right, common, count = 0, 0, 0
        for code in codes:
            asked = questions(code, tokenizer, relation, **kind)
            answers = np.array([answer for *_, answer in asked], np.int64)
            right += (fill(model, asked)[1] == answers).sum()
            common += np.bincount(answers, minlength=1).max()
            count += len(asked)
        shares[relation] = right / max(1, count), count, common / max(1, count)
    return shares


def retrieval(model, tokenizer, lines):
    """{code: sentences}, line i of each says the same -> float64 [layers + 1, 2], the embeddings first.

    Mean accuracy over all ordered pairs of languages, of mean-pooled states as they are, and with each language's
    mean subtracted.
    """
    from eval.finetune import vectors
    from eval.metrics import retrieval_hits
    by_language = [vectors(model, tokenizer, part, layers=True) for part in lines.values()]
    return np.mean([[[retrieval_hits(x, y, centre).mean() for centre in (False, True)] for x, y in zip(*pair)]
                    for pair in itertools.combinations(by_language, 2)], axis=0)


def showcase(model, tokenizer, corpus):
    """corpus: the prepared atlas, either split. Yields lines of text: five filled masks in five scripts, how often each
    kind of question is answered over all languages, and how often a sentence finds its translation, by layer."""
    codes = [code for code in languages() if code in corpus.languages]
    for title, told in (("said in the sentence before", True), ("stated in training", False)):
        yield f"masks whose answer is {title}: of each relation the first fact whose object is one piece"
        for code, relation in EXAMPLES:
            asked = questions(code, tokenizer, relation, told=told)[:1] if code in codes else []
            for (text, _, _, answer), p, piece in zip(asked, *fill(model, asked)):
                word, wanted = (tokenizer.id_to_piece(int(i)).strip("\u2581") or "\u2581" for i in (piece, answer))
                yield f"  {code}  {text}  ->  {word} ({p:.2f}, {'right' if piece == answer else 'it is ' + wanted})"
        yield f"  of all in {len(codes)} languages (in brackets one answer for all of a language): " + ", ".join(
            f"{relation} {right:.0%} ({common:.0%})" for relation, (right, _, common) in
            shares_right(model, tokenizer, codes, told=told).items())
    held_out = shares_right(model, tokenizer, codes, held_out=True).values()
    yield (f"facts that no training sentence states, {sum(n for _, n, _ in held_out):,} masks: "
           f"{sum(right * n for right, n, _ in held_out) / max(1, sum(n for _, n, _ in held_out)):.0%} right")
    lines = parallel(100)
    yield "translations found among 100 sentences, mostly of held-out facts; chance 1%:"
    for name, group in (("eight related languages in Latin script", LATIN), ("eight scripts", SCRIPTS)):
        found = retrieval(model, tokenizer, {code: lines[code] for code in group if code in codes})
        layers = (("embeddings", found[0]), ("middle layer", found[len(found) // 2]), ("last layer", found[-1]))
        yield f"  {name}: " + ", ".join(f"{layer} {raw:.1%} ({centred:.1%} with each language's mean removed)"
                                        for layer, (raw, centred) in layers)
