"""Vocabularies of other people's checkpoints, brought into our layout: ids 0-4 are <s> <pad> </s> <unk> <mask>.

    tokenizer = load_vocabulary("runs/e5")      # a model folder with tokenizer.model (SentencePiece) or vocab.txt
    tokenizer.encode("Paris is big")            # [11, 402, ...], ids of the model

A model's embedding rows are put in the order of its pieces when it is imported, so the specials have the same ids
in every model and nothing downstream has to ask. SentencePiece files are rewritten here as protobuf messages, field
by field, because that package has no writer; WordPiece (BERT) is plain Python.
"""
from __future__ import annotations

import base64
import functools
import json
import re
import struct
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import BOS, EOS, FIRST_PIECE, INVISIBLE, MASK, PAD, UNK, load_tokenizer

# ------------------------------------------------------------------------------------- SentencePiece model files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)     # ModelProto.SentencePiece.Type
OURS = [("<s>", 0.0, CONTROL), ("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN),
        ("<mask>", 0.0, CONTROL)]
PIECES, TRAINER, NORMALIZER = 1, 2, 3                                  # fields of ModelProto
UNIGRAM = 1                                                            # TrainerSpec.model_type
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_fields(data: bytes):
    """A protobuf message -> iterator of (field number, value, its bytes with the tag).

    The value is an int (wire type 0) or bytes (1, 2, 5). Raises ValueError when the message is cut off.
    """
    at = 0
    try:
        while at < len(data):
            start = at
            tag, at = _varint(data, at)
            if tag & 7 == 0:
                value, at = _varint(data, at)
            else:
                if tag & 7 == 2:
                    size, at = _varint(data, at)
                else:
                    size = {1: 8, 5: 4}[tag & 7]
                value, at = data[at:at + size], at + size
                if at > len(data):
                    raise IndexError
            yield tag >> 3, value, data[start:at]
    except (IndexError, KeyError):
        raise ValueError("not a SentencePiece model, or cut off") from None


def write_field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _encode_varint(number << 3) + _encode_varint(value)
    return _encode_varint(number << 3 | 2) + _encode_varint(len(value)) + value


@dataclass
class SentencePieceModel:
    """A SentencePiece model file as its pieces and, untouched, the rest: training and normalisation settings."""
    pieces: list[tuple[str, float, int]]     # text, score, type; the place in the list is the id
    rest: list[tuple[int, bytes]]            # field number and value, in the order of the file

    @classmethod
    def read(cls, path: Path | str) -> SentencePieceModel:
        """ValueError, naming the file, when it is no such model."""
        model = cls([], [])
        try:
            for number, value, _ in read_fields(Path(path).read_bytes()):
                if number != PIECES:
                    model.rest.append((number, value))
                    continue
                piece = {1: b"", 2: b"\0\0\0\0", 3: NORMAL}
                piece.update((field, content) for field, content, _ in read_fields(value))
                model.pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
        except (ValueError, AttributeError, TypeError, struct.error) as error:
            raise ValueError(f"{path}: cannot be read as a SentencePiece model ({error})") from None
        if not model.pieces:
            raise ValueError(f"{path}: cannot be read as a SentencePiece model (it has no pieces)")
        return model

    def setting(self, message: int, field: int, default):
        """A field of the trainer's (2) or normaliser's (3) settings."""
        for number, value in self.rest:
            if number == message:
                for inner, content, _ in read_fields(value):
                    if inner == field:
                        return content
        return default

    def to_bytes(self) -> bytes:
        """The file, with the settings that speak of ids brought in line with the pieces."""
        out = [write_field(PIECES, write_field(1, text.encode()) + b"\x15" + struct.pack("<f", score) +
                           write_field(3, kind)) for text, score, kind in self.pieces]
        changed = {4: len(self.pieces), 40: UNK, 41: BOS, 42: EOS, 43: PAD,
                   45: b"<unk>", 46: b"<s>", 47: b"</s>", 48: b"<pad>", 30: b"<mask>"}
        for number, value in self.rest:
            if number == TRAINER:
                value = b"".join([raw for inner, _, raw in read_fields(value) if inner not in changed] +
                                 [write_field(*item) for item in changed.items()])
            out.append(write_field(number, value))
        return b"".join(out)

    def files(self) -> dict[str, bytes]:
        """As they stand in a model folder of ours."""
        return {"tokenizer.model": self.to_bytes()}


def is_ours(model: SentencePieceModel) -> bool:
    return [(text, kind) for text, _, kind in model.pieces[:FIRST_PIECE]] == [(t, k) for t, _, k in OURS]


def from_fairseq(model: SentencePieceModel, path: Path | str) -> tuple[SentencePieceModel, list[int]]:
    """XLM-R's layout -> (model in ours, rows): piece i of the result is row rows[i] of the checkpoint's embedding.

    XLM-R's file begins <unk> <s> </s>, its ids with <s> <pad> </s> <unk>; so piece i >= 3 has id i + 1, and <mask>
    comes after the last. Scores, types and normalisation stay, so the segmentation does too.
    """
    names = [text for text, _, _ in model.pieces]
    if names[:3] != ["<unk>", "<s>", "</s>"] or "<mask>" in names or "<pad>" in names:
        raise ValueError(f"{path}: begins with {' '.join(names[:5])}; known are XLM-R's layout (<unk> <s> </s>, then "
                         "pieces) and ours (<s> <pad> </s> <unk> <mask>)")
    count = len(names)
    return (SentencePieceModel(OURS + model.pieces[3:], model.rest),
            [BOS, PAD, EOS, UNK, count + 1, *range(4, count + 1)])


def tokenizer_json(model: SentencePieceModel) -> dict:
    """The tokenizer.json of the `tokenizers` package that gives data.encode_text's ids, with <s> and </s> around.

    It repeats data.clean() and SentencePiece's own steps: charsmap, collapsed spaces, leading U+2581. Raises
    ValueError for settings that it cannot express.
    """
    if model.setting(TRAINER, 3, UNIGRAM) != UNIGRAM:
        raise ValueError("only SentencePiece unigram models can be exported; this is another kind")
    if not all(model.setting(NORMALIZER, field, 1) for field in (3, 4, 5)):
        raise ValueError("a SentencePiece model without leading space, with extra spaces or with unescaped spaces "
                         "cannot be exported")
    charsmap = model.setting(NORMALIZER, 2, b"")
    spaces = {"Regex": "[\\t-\\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"}
    steps = [{"type": "Replace", "pattern": {"Regex": INVISIBLE.pattern}, "content": ""}, {"type": "NFC"},
             {"type": "Replace", "pattern": spaces, "content": " "}]
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    steps += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
              {"type": "Strip", "strip_left": True, "strip_right": True}]
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}

    def around(*sequences: str) -> list[dict]:
        out = []
        for name in sequences:
            out.append({"Sequence": {"id": name, "type_id": 0}} if name in "AB" else
                       {"SpecialToken": {"id": name, "type_id": 0}})
        return out
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": i == MASK, "rstrip": False,
                          "normalized": False, "special": True} for i, (text, _, _) in enumerate(OURS)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace,
        "post_processor": {
            "type": "TemplateProcessing", "single": around("<s>", "A", "</s>"),
            "pair": around("<s>", "A", "</s>", "</s>", "B", "</s>"),
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}
                               for i, text in ((BOS, "<s>"), (EOS, "</s>"))}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": UNK, "byte_fallback": any(k == BYTE for _, _, k in model.pieces),
                  "vocab": [[text, score] for text, score, _ in model.pieces]}}


# ------------------------------------------------------------------------------------------------------ WordPiece

WORDPIECE_SPECIALS = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]    # take the ids of <s> <pad> </s> <unk> <mask>
LONGEST_WORD = 100                                                     # characters; longer words are [UNK]


def _is_punctuation(c: str) -> bool:
    return "!" <= c <= "/" or ":" <= c <= "@" or "[" <= c <= "`" or "{" <= c <= "~" or unicodedata.category(c)[0] == "P"


def _is_cjk(c: str) -> bool:
    """Ideographs as BERT counts them: not Hangul, not Kana, and no block newer than Unicode 8."""
    n = ord(c)
    return (0x4E00 <= n <= 0x9FFF or 0x3400 <= n <= 0x4DBF or 0x20000 <= n <= 0x2A6DF or 0x2A700 <= n <= 0x2CEAF
            or 0xF900 <= n <= 0xFAFF or 0x2F800 <= n <= 0x2FA1F)


class WordPiece:
    """BERT's tokenizer (Devlin et al. 2018), with the part of SentencePieceProcessor's interface that we use.

    Text is split at white space, punctuation and (split_cjk) around each ideograph; lower_case folds case, and
    strip_accents (None: as lower_case) drops combining marks. A word is cut into the longest known pieces from the
    left, "##" in front of all but the first; a word that cannot be is one [UNK]. Special tokens written in a text
    are plain text. Characters younger than Unicode 8 follow Python's tables.
    """

    def __init__(self, pieces: list[str], lower_case: bool = True, strip_accents: bool | None = None,
                 split_cjk: bool = True):
        self.pieces, self.lower_case, self.split_cjk = pieces, lower_case, split_cjk
        self.strip_accents = lower_case if strip_accents is None else strip_accents
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self._word = functools.lru_cache(1 << 16)(self._cut)           # natural text repeats its words
        self._spread = functools.cache(self._normal)                   # and its characters

    def __len__(self) -> int:
        return len(self.pieces)

    get_piece_size = __len__

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def is_control(self, i: int) -> bool:
        return i < FIRST_PIECE and i != UNK

    def is_byte(self, i: int) -> bool:
        return False

    def _normal(self, c: str) -> str:
        """What a character becomes before the text is split at blanks. A Greek sigma at a word's end becomes a plain one."""
        if c in "\t\n\r" or (category := unicodedata.category(c)) in ("Zs", "Zl", "Zp"):
            return " "
        if c == "\ufffd" or category in ("Cc", "Cf", "Co"):
            return ""
        text = f" {c} " if self.split_cjk and _is_cjk(c) else c
        if self.strip_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        if self.lower_case:
            text = "".join(c.lower() for c in text)
        return "".join(f" {c} " if _is_punctuation(c) else c for c in text)

    def words(self, text: str) -> list[str]:
        return "".join(map(self._spread, text)).split()

    def _cut(self, word: str) -> list[int]:
        if len(word) > LONGEST_WORD:
            return [UNK]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(len(word), start, -1):
                if (found := self.ids.get(mark + word[start:end])) is not None:
                    break
            else:
                return [UNK]
            ids.append(found)
            start = end
        return ids

    def encode(self, text: str | list[str]) -> list:
        """Text -> ids without specials; a list of texts -> a list of those."""
        if not isinstance(text, str):
            return [self.encode(one) for one in text]
        return [i for word in self.words(text) for i in self._word(word)]

    def EncodeAsOffsetMapping(self, text: str) -> dict[str, list]:  # noqa: N802
        """Text -> {"ids": as `encode` gives them, "offsets": (begin, end) of each in `text`}. An accent that was dropped belongs to
        its letter."""
        parts = [self._spread(c) for c in text]
        origin = [i for i, part in enumerate(parts) for _ in part]
        ids, spans = [], []
        for match in re.finditer(r"\S+", "".join(parts)):
            at, pieces = match.start(), self._word(match[0])
            for i in pieces:
                length = len(match[0]) if i == UNK else len(self.pieces[i]) - 2 * (at > match.start())      # "##"
                end = origin[at + length - 1] + 1
                while end < len(text) and not parts[end]:
                    end += 1
                spans.append((origin[at], end))
                at += length
            ids += pieces
        return {"ids": ids, "offsets": spans}

    def files(self) -> dict[str, bytes]:
        """vocab.txt, a piece a line in the order of the ids, and tokenizer_config.json, as on the model hub."""
        config = dict(tokenizer_class="BertTokenizer", do_lower_case=self.lower_case, strip_accents=self.strip_accents,
                      tokenize_chinese_chars=self.split_cjk, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]",
                      unk_token="[UNK]", mask_token="[MASK]")
        return {"vocab.txt": "".join(piece + "\n" for piece in self.pieces).encode(),
                "tokenizer_config.json": json.dumps(config, indent=1).encode() + b"\n"}


def read_wordpiece(folder: Path | str) -> tuple[WordPiece, list[int]]:
    """vocab.txt, with tokenizer_config.json if there is one -> (tokenizer in our order, rows as in from_fairseq)."""
    path = Path(folder) / "vocab.txt"
    try:
        pieces = path.read_text(encoding="utf-8").split("\n")
        settings = Path(folder) / "tokenizer_config.json"
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        options = (config.get("do_lower_case", True), config.get("strip_accents"),
                   config.get("tokenize_chinese_chars", True))
        kind, first = config.get("tokenizer_class") or "BertTokenizer", config.get("word_tokenizer_type") or "basic"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: its vocabulary cannot be read ({error})") from None
    if first != "basic" or not re.fullmatch("(Bert|DistilBert|Electra|MobileBert|PreTrained)Tokenizer(Fast)?", kind):
        raise ValueError(f"{settings}: {kind} splits text in a way of its own{'' if first == 'basic' else f' ({first})'}; "
                         "only BERT's WordPiece can be imported")
    pieces = [piece.removesuffix("\r") for piece in (pieces if pieces[-1] else pieces[:-1])]
    rows = _in_our_order(pieces, WORDPIECE_SPECIALS, path)
    return WordPiece([pieces[i] for i in rows], *options), rows


# ---------------------------------------------------------------------------------------------------- both kinds

def _in_our_order(pieces: list[str], specials: list[str], path: Path | str) -> list[int]:
    """rows: the ids of the five specials, then all others in their order."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise ValueError(f"{path}: a piece stands in it twice")
    if missing := [s for s in specials if s not in ids]:
        raise ValueError(f"{path}: has no {' '.join(missing)}; a vocabulary of BERT's or XLM-R's kind has")
    first = [ids[s] for s in specials]
    return first + [i for i in range(len(pieces)) if i not in first]


def read_tokenizer_json(path: Path | str):
    """A tokenizer.json with a unigram or WordPiece model -> as from_fairseq or read_wordpiece; None for BPE.

    What a folder has that the `tokenizers` package alone wrote. ValueError for normalisation that we do not do.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        model, normalizer = whole["model"], whole["normalizer"] or {"type": "Sequence", "normalizers": []}
        if "continuing_subword_prefix" in model and "merges" not in model:
            pieces = sorted(model["vocab"], key=model["vocab"].get)
            if (normalizer["type"], whole["pre_tokenizer"]["type"]) != ("BertNormalizer", "BertPreTokenizer") or \
                    [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
                raise ValueError("its text or its ids are not prepared as BERT's")
            rows = _in_our_order(pieces, WORDPIECE_SPECIALS, path)
            return WordPiece([pieces[i] for i in rows], normalizer["lowercase"], normalizer["strip_accents"],
                             normalizer["handle_chinese_chars"]), rows
        if model.get("type") != "Unigram":
            return None
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        if unknown := [step["type"] for step in steps if step["type"] not in ("Precompiled", "NFC", "Strip") and
                       step.get("content") not in ("", " ", "\u2581")]:
            raise ValueError(f"its text is prepared by {', '.join(unknown)}, which is not supported")
        charsmap = b"".join(base64.b64decode(step["precompiled_charsmap"]) for step in steps
                            if step["type"] == "Precompiled")
        names = [text for text, _ in model["vocab"]]
        rows = _in_our_order(names, [text for text, _, _ in OURS], path)
        byte = bool(model.get("byte_fallback"))
        pieces = OURS + [(names[i], float(model["vocab"][i][1]),
                          BYTE if byte and BYTE_PIECE.fullmatch(names[i]) else NORMAL) for i in rows[5:]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: cannot be used ({type(error).__name__}: {error})") from None
    trainer = write_field(3, UNIGRAM) + write_field(35, int(byte))
    settings = write_field(1, b"custom") + write_field(2, charsmap) + b"".join(write_field(i, 1) for i in (3, 4, 5))
    return SentencePieceModel(pieces, [(TRAINER, trainer), (NORMALIZER, settings)]), rows


def vocabulary_file(folder: Path | str) -> Path:
    """vocab.txt (WordPiece) or tokenizer.model (SentencePiece) of a model folder. ValueError where there is neither."""
    for name in ("vocab.txt", "tokenizer.model"):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ValueError(f"{folder}: no tokenizer.model and no vocab.txt, so this model cannot read text")


def load_vocabulary(folder: Path | str):
    """The tokenizer of a model folder: a SentencePieceProcessor or a WordPiece. ValueError where there is none."""
    path = vocabulary_file(folder)
    return read_wordpiece(folder)[0] if path.name == "vocab.txt" else load_tokenizer(path)


def read_vocabulary(folder: Path | str) -> SentencePieceModel | WordPiece:
    """The vocabulary of a model folder of ours, to be written elsewhere. Raises ValueError."""
    path = vocabulary_file(folder)
    if path.name == "vocab.txt":
        return read_wordpiece(folder)[0]
    model = SentencePieceModel.read(path)
    if not is_ours(model):
        raise ValueError(f"{path}: ids 0-4 are not <s> <pad> </s> <unk> <mask>")
    return model


def choose_pieces(model: SentencePieceModel | WordPiece, counts: np.ndarray, size: int, prior: bool = False) -> np.ndarray:
    """Ids of the `size` pieces to keep, ascending; counts [V] says how often the corpus uses each.

    Always kept: specials, bytes, and the lowest-scored piece, which sets the price of an unknown character; so a
    text whose pieces all stay is cut as before. Then the most frequent; with `prior`, the largest geometric means of a
    piece's count (plus 1) and its probability in the tokenizer itself. A single character counts with every piece
    that holds it, because where its longer pieces go, it is what is left of them. Raises ValueError when `size` is
    too small for what is always kept or larger than V, and for a prior of WordPiece, which has no probabilities.
    """
    unigram = isinstance(model, SentencePieceModel)
    texts = [piece[0] for piece in model.pieces] if unigram else model.pieces
    worth = counts.astype(np.float64)
    if unigram:
        kinds, scores = (np.array([piece[k] for piece in model.pieces]) for k in (2, 1))
    if prior and not unigram:
        raise ValueError("--prior needs the probabilities of a SentencePiece tokenizer; WordPiece has none")
    if prior:
        worth = np.sqrt((worth + 1) * np.where(kinds == NORMAL, np.exp(scores), 0))
    bare = [text.removeprefix("\u2581" if unigram else "##") for text in texts]
    characters: dict[str, float] = {}
    for text, count in zip(bare, worth.tolist()):
        if count:
            for c in set(text):
                characters[c] = characters.get(c, 0) + count
    for i, text in enumerate(texts):
        if (text if unigram else bare[i]) in characters:               # one character
            worth[i] = max(worth[i], characters[text if unigram else bare[i]])
    always = np.zeros(len(texts), bool)
    always[:FIRST_PIECE] = True
    if unigram:
        always |= (kinds != NORMAL) & (kinds != UNUSED)
        always[np.where(kinds == NORMAL, scores, np.inf).argmin()] = True
        worth += 1e-9 * (scores - scores.min()) / max(1e-9, scores.max() - scores.min())   # ties: the better score
    if not always.sum() <= size <= len(texts):
        raise ValueError(f"--vocab-size {size} must be from {always.sum()} (special tokens and bytes) to {len(texts)} "
                         "(the model's own)")
    worth[always] = np.inf
    return np.sort(np.argsort(-worth, kind="stable")[:size])


def keep_pieces(model: SentencePieceModel | WordPiece, keep: np.ndarray) -> SentencePieceModel | WordPiece:
    """The vocabulary with the pieces `keep` only, in that order."""
    pieces = [model.pieces[i] for i in keep.tolist()]
    if isinstance(model, SentencePieceModel):
        return SentencePieceModel(pieces, model.rest)
    return WordPiece(pieces, model.lower_case, model.strip_accents, model.split_cjk)
