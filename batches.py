"""From a prepared folder to packed, masked batches: what training reads. (`data.py` prepares the folder.)

    corpus = Corpus("DIR")
    p = sampling_probabilities(corpus.tokens_per_language, alpha=0.3, budget_tokens=1e9, max_epochs=4)
    config = BatchConfig(vocab_size=corpus.vocab_size, row_tokens=1024, max_length=128)
    batch = packed_batch(corpus, p, config, seed=0, step=17, rows=range(0, 8))

A prepared folder holds `tokenizer.model`, `manifest.json` and, for each language and split, two flat files that
are memory-mapped: `ro.train.tokens` (piece ids without specials, uint16 or uint32, document after document) and
`ro.train.offsets` (int64, documents + 1: document i is tokens[offsets[i]:offsets[i + 1]]).

The loader has no state. Row r of step s is a pure function of (corpus, probabilities, config, seed, s, r), so a
resumed run, another number of processes or another micro-batch split reads the same global batches.
"""
import hashlib
import json
import mmap
import re
import resource
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from files import sha256_of

BOS, PAD, EOS, UNK, MASK = range(5)        # '<s>' '<pad>' '</s>' '<unk>' '<mask>'
FIRST_PIECE = 5                            # ids below are special: never masked, never drawn as a replacement
IGNORE = -100                              # language of a padding segment, target of an unused masking slot
MIN_SEQUENCE = 8                           # shortest sequence, <s> and </s> included: bounds the segments of a row
MIN_DOCUMENT = MIN_SEQUENCE - 2            # shorter documents are dropped by prepare
SPARE = 1.1                                # draws at once for a row: so many times the sequences that one is expected to hold
FORMAT, VERSION = "unibert-corpus", 1
SPLITS = ("train", "validation")
# Thai, Lao, Tibetan, Myanmar, Khmer, Hiragana, Katakana, Bopomofo, Han
NO_SPACES = re.compile("[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31f0-\u31ff"
                       "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

# ---------------------------------------------------------------------------------------------------------------
# Counter-based random numbers: SplitMix64 (Steele, Lea, Flood 2014) over uint64 arrays.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# What is drawn: one stream of numbers each. The order is part of a run: another one gives other batches.
DRAW_LANGUAGE, DRAW_TOKEN, DRAW_WINDOW, DRAW_MASKED, DRAW_ACTION, DRAW_PIECE = range(6)
NEVER = ~np.uint64(0)                      # the rank of a position that is not masked


def mix64(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*words):
    """One 64-bit key from several integers or integer arrays (broadcast), order mattering."""
    key = np.zeros(1, np.uint64)
    for word in words:
        word = np.uint64(word % 2**64) if isinstance(word, int) else word.astype(np.uint64)
        key = mix64(mix64(key + GOLDEN) ^ word)
    return key


def _bits(key, stream, counter):
    """Draw number `counter` of `stream`; key [N, 1], counter [K] or [N, K] -> uint64 [N, K]."""
    return mix64(mix64(key + np.uint64(stream)) + (counter.astype(np.uint64) + np.uint64(1)) * GOLDEN)


def _uniform(bits):
    return (bits >> np.uint64(11)) * 2.0**-53


# ---------------------------------------------------------------------------------------------------------------
# Prepared folders

def read_manifest(folder):
    """manifest.json of a prepared folder -> dict. ValueError when there is none or it is not ours."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: not found; {folder} is no prepared corpus, or its preparation was interrupted "
                         "(run `python data.py prepare`)") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); run prepare again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{path}: not a {FORMAT} manifest of version {VERSION}; run prepare again")
    digest = manifest.pop("sha256", None)
    if digest != manifest_digest(manifest):
        raise ValueError(f"{path}: damaged or edited by hand (its own checksum does not match); run prepare again")
    return manifest


def manifest_digest(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_files(folder, manifest, checksums=True):
    """ValueError naming the first file that is missing, has another size or, with checksums, another sha256."""
    for name, entry in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; run prepare again")
        if path.stat().st_size != entry["size"]:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes where the manifest has {entry['size']:,}; "
                             "run prepare again")
        if checksums and sha256_of(path) != entry["sha256"]:
            raise ValueError(f"{path}: damaged, its sha256 differs from the manifest's; run prepare again")


def memory_map(path, dtype, random=False):
    """A file as an array that is read where it is looked at; random: without what lies next to it."""
    if path.stat().st_size == 0:                 # an empty file cannot be mapped
        return np.empty(0, dtype)
    _allow_open_files()
    array = np.memmap(path, dtype, mode="r")
    if random:                                   # read-ahead makes hundreds of kilobytes of one cold sequence
        array._mmap.madvise(mmap.MADV_RANDOM)
    return np.asarray(array)


def _allow_open_files(wanted=8192):
    """Each mapping keeps its file open: a hundred languages in a dozen parts are more than the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:                       # below 0: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def load_tokenizer(path):
    """sentencepiece.SentencePieceProcessor of a model with our ids. ValueError when it is none."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read as a SentencePiece model ({error})") from None
    pieces = [tokenizer.id_to_piece(i) for i in range(min(FIRST_PIECE, len(tokenizer)))]
    if pieces != ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] or not tokenizer.is_control(MASK):
        raise ValueError(f"{path}: ids 0-4 are {' '.join(pieces)}; needed are <s> <pad> </s> <unk> <mask>, the last "
                         "one a control symbol (train a tokenizer with `python data.py prepare`)")
    return tokenizer


class Corpus:
    """One split of a prepared folder, memory-mapped.

    verify: check sha256 of every file; None does so when the folder is under 1 GB, sizes alone otherwise.
    Raises ValueError, naming the file, when anything does not match the manifest.
    """

    def __init__(self, folder, split="train", verify=None):
        folder = Path(folder)
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
        self.folder, self.split, self.manifest = folder, split, read_manifest(folder)
        if verify is None:
            verify = sum(entry["size"] for entry in self.manifest["files"].values()) < 1e9
        check_files(folder, self.manifest, checksums=verify)
        self.languages = list(self.manifest["languages"])
        self.vocab_size = self.manifest["vocab_size"]
        self.tokenizer_path = folder / "tokenizer.model"
        self.tokenizer_sha256 = self.manifest["files"]["tokenizer.model"]["sha256"]
        dtype = np.dtype(self.manifest["dtype"])
        self._tokens, self._offsets = [], []
        for language in self.languages:
            tokens = memory_map(folder / f"{language}.{split}.tokens", dtype, random=True)
            offsets = memory_map(folder / f"{language}.{split}.offsets", np.dtype("<i8"))
            if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(tokens):
                raise ValueError(f"{folder / f'{language}.{split}.offsets'}: does not fit its tokens file; "
                                 "run prepare again")
            self._tokens.append(tokens)
            self._offsets.append(offsets)
        self.tokens_per_language = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self._lengths, self._slots, self._word_start = {}, {}, None

    def tokens(self, language):
        """The stream of a language (its code): ids without specials, document after document [n] uint16 or uint32."""
        return memory_map(self.folder / f"{language}.{self.split}.tokens", np.dtype(self.manifest["dtype"]))

    def lengths(self, max_length):
        """How often a sequence of each language has each length, specials included, when documents are drawn in proportion
        to their length and cut to max_length -> [languages, max_length + 1] float64; a row sums to 1, or is 0 without text."""
        if max_length not in self._lengths:
            shares = np.zeros((len(self.languages), max_length + 1))
            for index, offsets in enumerate(self._offsets):
                size = np.diff(offsets)
                if len(size):
                    shares[index] = np.bincount(np.minimum(size, max_length - 2) + 2, size, max_length + 1) / size.sum()
            self._lengths[max_length] = shares
        return self._lengths[max_length]

    @property
    def word_start(self):
        """[vocab_size] bool: pieces at which a word starts; so does every piece of a script that writes no spaces."""
        if self._word_start is None:
            tokenizer = load_tokenizer(self.tokenizer_path)
            pieces = [tokenizer.id_to_piece(i) for i in range(self.vocab_size)]
            self._word_start = np.array([p.startswith("\u2581") or NO_SPACES.search(p) is not None for p in pieces])
        return self._word_start


# ---------------------------------------------------------------------------------------------------------------
# Batches

@dataclass
class PackedBatch:
    """Sequences laid end to end; every shape is fixed by the config and the number of rows.

    tokens      [T] int64      <s> pieces </s> of each sequence, masked; T = rows * row_tokens
    cu_seqlens  [S + 1] int32  segment i is tokens[cu_seqlens[i]:cu_seqlens[i + 1]]; S = rows * row_tokens // 8
    max_seqlen  int            config.max_length
    languages   [S] int64      index into corpus.languages; -100 for padding and empty segments
    masked      [M] int64      positions in tokens, ascending in each row; M = rows * round(mask_rate * row_tokens)
    targets     [M] int64      the original id there; -100 where the slot is unused (its position is then 0)
    """
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    languages: torch.Tensor
    masked: torch.Tensor
    targets: torch.Tensor

    def _map(self, function):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in values.items() if isinstance(v, torch.Tensor)})

    def to(self, device, non_blocking=False):
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self._map(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class BatchConfig:
    """Shape of a row and masking of its tokens (BERT's 80/10/10 by default)."""
    vocab_size: int                # random replacements are drawn from ids 5 .. vocab_size - 1
    row_tokens: int = 1024         # R: sequences are packed into rows of R tokens
    max_length: int = 128          # L: longest sequence, <s> and </s> included
    mask_rate: float = 0.15        # exactly round(mask_rate * R) positions a row are predicted ...
    mask_share: float = 0.8        # ... of which this share becomes <mask>,
    random_share: float = 0.1      # this share a random piece, and the rest stays
    whole_word: bool = False       # predict whole words (scripts without spaces: single pieces)

    def __post_init__(self):
        if self.row_tokens % MIN_SEQUENCE or not MIN_SEQUENCE <= self.max_length <= self.row_tokens < 2**20:
            raise ValueError(f"row_tokens ({self.row_tokens}) must be a multiple of {MIN_SEQUENCE} below 2^20, "
                             f"and max_length ({self.max_length}) between {MIN_SEQUENCE} and row_tokens")
        if not 0 < self.masked_per_row < self.row_tokens:
            raise ValueError(f"mask_rate {self.mask_rate} predicts {self.masked_per_row} of {self.row_tokens} tokens")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share {self.mask_share} and random_share {self.random_share} must be shares of 1")
        if self.vocab_size <= FIRST_PIECE:
            raise ValueError(f"vocab_size {self.vocab_size} leaves no normal piece")

    @property
    def masked_per_row(self):
        return round(self.mask_rate * self.row_tokens)

    @property
    def segments_per_row(self):
        return self.row_tokens // MIN_SEQUENCE


def sampling_probabilities(token_counts, alpha, budget_tokens=None, max_epochs=None):
    """Share of the batch tokens that each language gets: p ~ n^alpha, capped so that p * budget <= max_epochs * n.

    What the cap takes from small languages is spread over the others in proportion to n^alpha (water-filling), so
    alpha = 0 with a cap is UniMax (Chung et al. 2023). Where all languages at the cap cannot fill the budget, the
    cap rises to the smallest that can: then p ~ n. token_counts [languages] -> float64 [languages], sum 1.
    """
    n = np.asarray(token_counts, np.float64)
    if n.ndim != 1 or not np.all(n >= 0) or not n.sum() > 0:
        raise ValueError("token_counts must be one non-negative number a language, not all zero")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha is {alpha}; it must be 0 or more")
    for name, value in (("budget of tokens", budget_tokens), ("cap on epochs", max_epochs)):
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"the {name} is {value:g}; it must be above 0")
    weight = np.where(n > 0, n ** alpha, 0.0)
    if budget_tokens is None or max_epochs is None:
        return weight / weight.sum()
    cap = n * max_epochs / budget_tokens
    if cap.sum() <= 1:
        return n / n.sum()
    p, capped = np.zeros_like(n), n == 0
    while True:
        p = np.where(capped, cap, 0.0)
        p[~capped] = (1 - p.sum()) * weight[~capped] / weight[~capped].sum()
        over = ~capped & (p > cap)
        if not over.any():
            return p
        capped |= over


def slot_probabilities(corpus, probabilities, config):
    """Language distribution of a *sequence*, such that `probabilities` is the distribution of a *token* of a row.

    A language of short documents fills fewer tokens a sequence, so it must be drawn more often. Without this an epoch
    cap in tokens would not hold. What counts is the length that is left of a sequence in its row: the last one is
    cropped, and a long one more often. Where a row holds a few sequences, that is much. [languages] -> float64 [languages].
    """
    p = np.asarray(probabilities, np.float64)
    key = config.max_length, config.row_tokens, p.tobytes()
    if key not in corpus._slots:                             # asked once a micro-batch, and the same for a whole run
        lengths = corpus.lengths(config.max_length)
        if p.shape != lengths.shape[:1] or not np.all(p >= 0) or not p.sum() > 0 or np.any((p > 0) & ~lengths.any(1)):
            raise ValueError(f"probabilities must be non-negative, one for each of the corpus' {len(lengths)} languages, "
                             f"and 0 for languages with no text in split {corpus.split!r}")
        left = np.arange(config.max_length + 1.0)            # of a sequence of each length; at first the whole
        for _ in range(8):                                   # q depends on what is left, and that on q: converges fast
            q = np.divide(p, lengths @ left, out=np.zeros_like(p), where=p > 0)
            q /= q.sum()
            left = expected_lengths(q @ lengths, config.row_tokens)
        corpus._slots[key] = q
    return corpus._slots[key]


def expected_lengths(shares, row_tokens):
    """What is left, on average, of a sequence of each length in a row that sequences fill from the left.

    shares [L + 1]: how often a sequence has each length -> [L + 1] float64. By the renewal equation: one starts at x as
    often as one starts at x - length, summed over lengths. None starts where fewer than MIN_SEQUENCE tokens are left.
    """
    longest, starts = len(shares) - 1, np.zeros(row_tokens - MIN_SEQUENCE + 1)
    starts[0] = 1
    for x in range(1, len(starts)):
        near = starts[max(0, x - longest):x]
        starts[x] = near[::-1] @ shares[1:len(near) + 1]
    begun = np.cumsum(starts) / starts.sum()
    # A sequence has a j-th token if it starts at row_tokens - j or before.
    return np.concatenate([[0], np.cumsum(begun[np.minimum(row_tokens - np.arange(1, longest + 1), len(starts) - 1)])])


def packed_batch(corpus, probabilities, config, seed, step, rows):
    """Rows `rows` (a range) of the global batch of `step` -> PackedBatch. A pure function of its arguments.

    Slot k of a row draws a language, then a uniformly random token of that language's stream, hence a document
    (in proportion to its length). The document is taken whole when it has at most L - 2 tokens, else a window of
    L - 2 tokens that contains the drawn one at a uniformly random place, moved inside where it would pass an end.
    Coverage is flat inside a long document; in the L tokens next to an end it is 0.5 to 1.5 times as high.
    Slots fill the row from the left. The one that passes the row's end is cropped, keeping </s>.
    """
    key = _key(seed, step, np.arange(rows.start, rows.stop, rows.step))[:, None]
    drawn = _draw_sequences(corpus, probabilities, config, key)
    return _assemble(corpus, config, key, *drawn)


def _draw_sequences(corpus, probabilities, config, key):
    """key [N, 1] -> language, start (in the language's stream), length (specials included; 0 = none), all [N, K]."""
    slot = slot_probabilities(corpus, probabilities, config)
    cumulative = np.cumsum(slot)
    cumulative /= cumulative[-1]
    filled = np.zeros((len(key), 1), np.int64)
    parts = []
    # Draws are indexed by slot, so drawing them block by block changes nothing but saves the slots not needed.
    block = 2 + int(SPARE * config.row_tokens / (slot @ corpus.lengths(config.max_length) @ np.arange(config.max_length + 1)))
    for first in range(0, config.segments_per_row, block):
        k = np.arange(first, min(first + block, config.segments_per_row))
        language = np.searchsorted(cumulative, _uniform(_bits(key, DRAW_LANGUAGE, k)), side="right")
        token = (_uniform(_bits(key, DRAW_TOKEN, k)) * corpus.tokens_per_language[language]).astype(np.int64)
        begin, end = np.empty_like(token), np.empty_like(token)
        for index, where in _by_language(language.ravel()):
            document = np.searchsorted(corpus._offsets[index], token.flat[where], side="right") - 1
            begin.flat[where] = corpus._offsets[index][document]
            end.flat[where] = corpus._offsets[index][document + 1]
        size = np.minimum(end - begin, config.max_length - 2)
        start = np.clip(token - (_uniform(_bits(key, DRAW_WINDOW, k)) * size).astype(np.int64), begin, end - size)
        at = filled + np.cumsum(size + 2, axis=1) - (size + 2)
        room = config.row_tokens - at
        length = np.where(room >= MIN_SEQUENCE, np.minimum(size + 2, room), 0)
        filled += length.sum(axis=1, keepdims=True)
        parts.append((language, start, length))
        if np.all(filled > config.row_tokens - MIN_SEQUENCE):
            break
    return (np.concatenate(part, axis=1) for part in zip(*parts))


def _by_language(language):
    """Yields (index, positions in `language` that hold it) for each index present."""
    order = np.argsort(language, kind="stable")
    bounds = np.flatnonzero(np.diff(language[order], prepend=-1, append=-1))
    for first, last in zip(bounds[:-1], bounds[1:]):
        yield language[order[first]], order[first:last]


def _assemble(corpus, config, key, language, start, length):
    """Copies the sequences [N, K] of each row into place, pads and masks -> PackedBatch."""
    (n_rows, slots), row_tokens, segments = language.shape, config.row_tokens, config.segments_per_row
    # Segments of a row: its sequences, then what is left as padding in pieces of at most max_length, then empty ones.
    sizes = np.zeros((n_rows, segments), np.int64)
    sizes[:, :slots] = length
    after = np.arange(segments) - np.count_nonzero(length, axis=1)[:, None]
    left = row_tokens - length.sum(axis=1, keepdims=True)
    sizes += np.where(after >= 0, np.clip(left - after * config.max_length, 0, config.max_length), 0)
    cu_seqlens = np.concatenate([[0], np.cumsum(sizes.ravel())])
    used = np.flatnonzero(after.ravel() < 0)
    languages = np.full(n_rows * segments, IGNORE, np.int64)
    languages[used] = language[length > 0]

    tokens = np.full(n_rows * row_tokens, PAD, np.int64)
    tokens[cu_seqlens[used]] = BOS
    tokens[cu_seqlens[used + 1] - 1] = EOS
    source, target, size = start[length > 0], cu_seqlens[used] + 1, length[length > 0] - 2
    for index, where in _by_language(languages[used]):
        n = size[where]
        within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        tokens[within + np.repeat(target[where], n)] = corpus._tokens[index][within + np.repeat(source[where], n)]

    masked, targets = _mask(tokens.reshape(n_rows, row_tokens), config, key, corpus, left.ravel())
    return PackedBatch(torch.from_numpy(tokens), torch.from_numpy(cu_seqlens.astype(np.int32)), config.max_length,
                       torch.from_numpy(languages), torch.from_numpy(masked), torch.from_numpy(targets))


def _mask(grid, config, key, corpus, padding):
    """Masks grid [N, R], whose rows end in padding [N], in place -> positions [M] in the flat grid, original ids [M].

    Each position gets a 64-bit rank: random upper bits, the position itself in the low 20, and NEVER for a special
    token. The round(mask_rate * R) lowest ranks of a row are masked, or round(mask_rate * tokens) where MIN_SEQUENCE
    slots of it or more are padding. With whole_word all pieces of a word share the upper bits, so words are taken
    whole, until the count is full (which may cut the last one).
    """
    n_rows, row_tokens = grid.shape
    position, low = np.arange(row_tokens, dtype=np.uint64), np.uint64(2**20 - 1)
    special = grid < FIRST_PIECE
    anchor = position
    if config.whole_word:
        starts = corpus.word_start[grid] | special          # what a window cut off a word hangs on its <s>
        anchor = np.maximum.accumulate(np.where(starts, position, np.uint64(0)), axis=1)
    rank = (_bits(key, DRAW_MASKED, anchor) & ~low) | position
    rank[special] = NEVER
    count = config.masked_per_row
    rank = np.partition(rank, count - 1, axis=1)[:, :count]
    for row in np.flatnonzero(padding >= MIN_SEQUENCE):     # of validation; those of training are full
        rank[row].sort()
        rank[row, round(config.mask_rate * (row_tokens - padding[row])):] = NEVER
    chosen = np.where(rank == NEVER, row_tokens, (rank & low).astype(np.int64))
    chosen.sort(axis=1)
    valid = chosen < row_tokens
    chosen[~valid] = 0
    original = np.take_along_axis(grid, chosen, axis=1)
    action = _uniform(_bits(key, DRAW_ACTION, chosen))
    pieces = FIRST_PIECE + (_uniform(_bits(key, DRAW_PIECE, chosen)) * (config.vocab_size - FIRST_PIECE)).astype(np.int64)
    random_end = config.mask_share + config.random_share
    new = np.where(action < config.mask_share, MASK, np.where(action < random_end, pieces, original))
    flat = chosen + np.arange(n_rows)[:, None] * row_tokens
    grid.reshape(-1)[flat[valid]] = new[valid]
    return np.where(valid, flat, 0).ravel(), np.where(valid, original, IGNORE).ravel()


def validation_batches(corpus, config, languages, max_tokens, rows=1):
    """At most max_tokens of `languages` (a code or a list of codes), `rows` rows a batch -> list of PackedBatch.

    The first L - 2 tokens of each document, each document at most once, languages in turn; the same documents with
    the same masks at every call. A last, partly filled batch is padded, so that shapes stay static.
    """
    codes = [languages] if isinstance(languages, str) else list(languages)
    unknown = sorted(set(codes) - set(corpus.languages))
    if unknown:
        raise ValueError(f"languages not in {corpus.folder}: {', '.join(unknown)}")
    n_rows = max(1, max_tokens // config.row_tokens)
    packed, room = [], 0
    queues = deque((corpus.languages.index(code), 0) for code in codes)
    while queues:
        index, document = queues.popleft()
        if document + 1 >= len(corpus._offsets[index]):
            continue
        if room < MIN_SEQUENCE:
            if len(packed) == n_rows:
                break
            packed.append([])
            room = config.row_tokens
        begin, end = corpus._offsets[index][document:document + 2]
        length = min(int(end - begin) + 2, config.max_length, room)
        packed[-1].append((index, int(begin), length))
        room -= length
        queues.append((index, document + 1))
    batches = []
    for first in range(0, len(packed), rows):
        table = np.zeros((3, rows, config.segments_per_row), np.int64)
        for row, sequences in enumerate(packed[first:first + rows]):
            table[:, row, :len(sequences)] = np.array(sequences).T
        batches.append(_assemble(corpus, config, _key(0, 0, np.arange(first, first + rows))[:, None], *table))
    return batches


def pack_sequences(sequences):
    """Lists of ids, as they are -> tokens [T] int64, cu_seqlens [len + 1] int32, max_seqlen int."""
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return tokens, cu_seqlens, max(lengths, default=0)


def ordered(pool, function, items, ahead, on_done=lambda item: None):
    """function(item) for each item, in order, at most `ahead` of them in flight; leaving the loop stops the pool.
    on_done(item) is called from another thread when an item is done, whichever it is."""
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            pending[-1].add_done_callback(lambda future, item=item: future.cancelled() or on_done(item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Prefetcher:
    """Iterates make_batch(step) for each step, in order, made ahead of time by `workers` threads (numpy releases
    the interpreter lock in its loops). An error in make_batch surfaces at its step; leaving the loop stops all."""

    def __init__(self, make_batch, steps, depth=4, workers=1):
        self.make_batch, self.steps, self.depth, self.workers = make_batch, steps, depth, workers

    def __iter__(self):
        return ordered(ThreadPoolExecutor(self.workers), self.make_batch, self.steps, self.depth)
