"""Lines of text -> one document each, cut where a tokenizer makes more than LONGEST pieces of it.

    python examples/lines.py TEXT OUT TOKENIZER        # TEXT/<code>.txt -> OUT/<code>.txt, for `data.py prepare`

A document that is longer than --max-length is read in windows that are drawn anew each time, and a teacher whose sentence
vectors are kept (--teacher-cache) would have to read each of them. What is cut beforehand is the same text in every epoch.
"""
import sys
from pathlib import Path

import sentencepiece

LONGEST = 60               # with <s>, </s> and a space that a piece may gain at its new beginning: at most 64


def cut(tokenizer, line):
    """A line -> its parts, each ending before a word, or where there are none (Chinese, Thai) before any piece."""
    pieces = tokenizer.encode(line, out_type=str)
    while len(pieces) > LONGEST:
        places = [i for i in range(LONGEST // 2, LONGEST + 1) if not pieces[i].startswith("<0x")]      # not within a character
        at = max([i for i in places if pieces[i].startswith("\u2581")] or places or [LONGEST])
        yield tokenizer.decode(pieces[:at])
        pieces = pieces[at:]
    yield tokenizer.decode(pieces)


def main(text, out, model):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(text).glob("*.txt")):
        parts = [part for line in file.read_text(encoding="utf-8").splitlines() for part in cut(tokenizer, line) if part.strip()]
        (Path(out) / file.name).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
