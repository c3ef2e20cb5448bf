"""Which pages of a corpus are worth training on: one named function a filter, each of which can be counted.

    text, reason = curate(page, "ro", RepeatedLines())        # reason "" = kept, or else the name of a filter
    LanguageClassifier.fit({"ro": texts, "sw": texts}).is_wrong(page, "ro")

Filters see one page at a time and keep nothing of it, but for `RepeatedLines` (16 MiB, whatever the corpus) and
`near_duplicates`, which takes 64 bytes a page. The classifier needs a sample of every language first. Duplicates to
the letter are found by hash where the pages are stored. Thresholds are shares of characters; CCNet, mC4 and Gopher use
filters of this kind (Wenzek et al. 2020, Xue et al. 2021, Rae et al. 2021).
"""
import functools
import hashlib
import re
import unicodedata

import numpy as np

from wiki.languages import LANGUAGES

SHORTEST = 200                 # characters of a page ...
SHORTEST_CJK = 70              # ... where a character is a syllable or a word
SCRIPT_SHARE = 0.5             # least share of a page's letters in its language's scripts
SYMBOL_SHARE = 0.35            # most digits and punctuation, of all characters but blanks
URL_SHARE = 0.05               # most characters inside addresses
LINE_PAGES = 20                # a line seen on so many pages is boilerplate from then on
LINE_LENGTH = 25               # characters; shorter lines are headings and names, which may well come back
LANGUAGE_MARGIN = 0.15         # nats an n-gram by which another language must fit better

# ---------------------------------------------------------------------------------------------------------------------
# One page

_BLANK, _SYMBOL, _OTHER_SCRIPT, _FIRST_SCRIPT = 0, 1, 2, 3
SCRIPTS = ("Latin", "Cyrillic", "Arabic", "Devanagari", "Bengali", "Han", "Hiragana", "Katakana", "Hangul", "Greek",
           "Hebrew", "Armenian", "Georgian", "Ethiopic", "Gujarati", "Gurmukhi", "Kannada", "Khmer", "Malayalam",
           "Myanmar", "Sinhala", "Tamil", "Telugu", "Thai")


@functools.cache
def _character_classes():
    """[0x20000] uint8: blank, digit or symbol, letter of another script, or 3 + the letter's index in SCRIPTS.

    Python does not know scripts, but the first word of a letter's Unicode name is its script's ("CJK" for Han).
    """
    names = {name.upper(): _FIRST_SCRIPT + i for i, name in enumerate(SCRIPTS)}
    names["CJK"] = names["HAN"]
    classes = np.zeros(0x20000, np.uint8)
    for code in range(0x10000):
        category = unicodedata.category(chr(code))
        if category[0] in "LM":
            classes[code] = names.get(unicodedata.name(chr(code), "").split(" ")[0].split("-")[0], _OTHER_SCRIPT)
        elif category[0] in "NPS":
            classes[code] = _SYMBOL
    classes[0x300:0x370] = _BLANK                               # accents that join any letter
    classes[0x10000:] = _OTHER_SCRIPT
    return classes


def _codes(text):
    return np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)


def _class_counts(text):
    codes = _codes(text)
    codes = np.where(codes >= 0x20000, np.uint32(0x4E00), codes)   # planes 2 and 3 are Han
    return np.bincount(_character_classes()[codes], minlength=_FIRST_SCRIPT + len(SCRIPTS))


def too_short(text, language):
    """Fewer than 200 characters; 70 for Chinese, Japanese and Korean."""
    return len(text) < (SHORTEST_CJK if language in ("zh", "ja", "ko") else SHORTEST)


def wrong_script(text, language):
    """Less than half of the letters in the language's scripts. A language outside the 107 has none and passes."""
    if language not in LANGUAGES:
        return False
    counts = _class_counts(text)
    right = sum(counts[_FIRST_SCRIPT + SCRIPTS.index(script)] for script in LANGUAGES[language].scripts)
    return right < SCRIPT_SHARE * counts[_OTHER_SCRIPT:].sum()


def digits_and_punctuation(text, language):
    """More than 35 of 100 characters (but blanks) are digits, punctuation or symbols: a table or code, not prose."""
    counts = _class_counts(text)
    return counts[_SYMBOL] > SYMBOL_SHARE * counts[_SYMBOL:].sum()


def url_density(text, language):
    """More than 5 of 100 characters belong to words that are addresses."""
    if "://" not in text and "www." not in text:
        return False
    return sum(len(word) for word in text.split() if "://" in word or "www." in word) > URL_SHARE * len(text)


PAGE_FILTERS = {"length": too_short, "script": wrong_script, "digits and punctuation": digits_and_punctuation,
                "URLs": url_density}


def curate(text, language, lines=None):
    """A page through these filters -> (text without boilerplate lines, name of the filter that drops it or "").

    lines: a `RepeatedLines`, which learns from the page. "boilerplate" is the reason for a page that is too short
    only after its repeated lines are out.
    """
    if too_short(text, language):
        return text, "length"
    if lines is not None:
        kept = lines.strip(text)
        if len(kept) < len(text):
            text = kept
            if too_short(text, language):
                return text, "boilerplate"
    for name, drops in PAGE_FILTERS.items():
        if drops(text, language):
            return text, name
    return text, ""


# ---------------------------------------------------------------------------------------------------------------------
# Lines that come back on page after page

_SENTENCES = re.compile(r"[^.!?؟।。！？]*[.!?؟।。！？]* *")


class RepeatedLines:
    """Drops lines that stood on `LINE_PAGES` earlier pages, in one pass and in memory that does not grow.

    A page of one line, as CirrusSearch has them, is taken by sentences.

    Counts are a count-min sketch (Cormode and Muthukrishnan 2005): two of 2^24 one-byte counters a line, the smaller
    one taken; with ten million different lines fewer than one in fifty is counted too high by one. After so many,
    counts are halved, but for those of known boilerplate: else a hundred million lines would fill every counter.
    """
    HALVED_AFTER = 10_000_000
    _HALVES = bytes(c if c >= LINE_PAGES else c // 2 for c in range(256))

    def __init__(self):
        self._counts, self._added = bytearray(1 << 24), 0

    def strip(self, text):
        """text without the repeated ones among its lines. Lines under 25 characters always stay."""
        counts, kept, seen = self._counts, [], set()
        end = "\n" if "\n" in text else ""
        for line in text.split(end) if end else _SENTENCES.findall(text):
            if len(line) >= LINE_LENGTH and line not in seen:
                seen.add(line)
                digest = hashlib.blake2b(line.encode("utf-8", "replace"), digest_size=6).digest()
                value = int.from_bytes(digest, "little")
                first, second = value & 0xFFFFFF, value >> 24
                count = min(counts[first], counts[second])
                if count >= LINE_PAGES:
                    continue
                if counts[first] == count:                      # only the smaller one grows: fewer false counts
                    counts[first] += 1
                if counts[second] == count and second != first:
                    counts[second] += 1
                self._added += 1
            elif line in seen:
                continue                                        # twice on one page
            kept.append(line)
        if self._added >= self.HALVED_AFTER:
            self._counts, self._added = counts.translate(self._HALVES), 0
        return end.join(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates: the same sentences with another name or number in them, as bots write them

SIGNATURE = 32                 # uint16 values a page
BANDS = 8                      # of 4 values; pages that agree in one band are compared
SHINGLE = 6                    # characters


def minhash(text):
    """Signature of a page's set of 6-character shingles -> [32] uint16; the share of equal values estimates Jaccard.
    Digits count as one and the same: bots change them from page to page.

    One-permutation MinHash (Li, Owen and Zhang 2012): the hashes fall into 32 bins and the least of each is kept, so
    that a shingle is hashed once and not 32 times. An empty bin takes the value of the next full one (Shrivastava
    and Li 2014).
    """
    codes = _codes(text)
    codes = np.where((codes >= 48) & (codes < 58), np.uint32(48), codes)
    hashes = np.zeros(max(1, len(codes) - SHINGLE + 1), np.uint32)
    with np.errstate(over="ignore"):
        for i in range(min(SHINGLE, len(codes))):
            hashes = hashes * np.uint32(0x01000193) + codes[i:i + len(hashes)]
        hashes = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x2C1B3C6D)      # every input bit reaches the bin
        hashes = (hashes ^ (hashes >> np.uint32(12))) * np.uint32(0x297A2D39)
        hashes ^= hashes >> np.uint32(15)
    least = np.full(SIGNATURE, 0xFFFFFFFF, np.uint32)
    np.minimum.at(least, hashes >> np.uint32(27), hashes & np.uint32(0x07FFFFFF))
    full = np.flatnonzero(least != 0xFFFFFFFF)
    following = np.searchsorted(full, np.arange(SIGNATURE)) % len(full)
    return ((least[full[following]] ^ (least[full[following]] >> np.uint32(11))) & np.uint32(0xFFFF)).astype(np.uint16)


def near_duplicates(signatures, threshold=0.5):
    """signatures [n, 32] uint16 of pages in order -> [n] bool, True for a page to drop.

    A page is dropped when an earlier page that is kept shares a band with it and at least `threshold` of its
    signature; candidates are the first page of each band's value, so that time is n log n. The first of its kind
    always stays.
    """
    signatures = np.ascontiguousarray(signatures, np.uint16)
    n = len(signatures)
    drop = np.zeros(n, bool)
    rows = SIGNATURE // BANDS
    for band in range(BANDS):
        keys = np.ascontiguousarray(signatures[:, band * rows:(band + 1) * rows]).view(np.uint64).ravel()
        candidates = np.flatnonzero(~drop)                      # dropped pages stand for nobody
        _, first, inverse = np.unique(keys[candidates], return_index=True, return_inverse=True)
        earlier = candidates[first[inverse.ravel()]]
        later = candidates[earlier != candidates]
        earlier = earlier[earlier != candidates]
        for start in range(0, len(later), 1 << 16):             # in slices: memory stays at the signatures' own
            a, b = later[start:start + (1 << 16)], earlier[start:start + (1 << 16)]
            drop[a] |= (signatures[a] == signatures[b]).mean(axis=1) >= threshold
    return drop


# ---------------------------------------------------------------------------------------------------------------------
# Language

class LanguageClassifier:
    """Naive Bayes over hashed character n-grams (1 to 4), trained on the corpus that it then judges.

    Pages in a wrong language are few, so that each language's own sample is right on the whole. A page is wrong only
    when another language fits better by `LANGUAGE_MARGIN` nats an n-gram, which neighbours such as Bosnian and
    Croatian do not. A language written in two scripts (Serbian) is two distributions, of which the better counts: in one, the
    rarer script would be as unlikely as it is rare.
    """
    BUCKETS = 1 << 16
    CHARACTERS = 600               # of a page are looked at, from three places

    def __init__(self, languages, first, log_probabilities):
        self.languages = {language: i for i, language in enumerate(languages)}
        self._first = first                                     # [languages]: where a language's distributions begin
        self._log = log_probabilities                           # [BUCKETS, distributions] float32

    @classmethod
    def fit(cls, samples, characters=300_000):
        """samples: {language: iterable of texts}; `characters` of each are used. ValueError below two languages."""
        if len(samples) < 2:
            raise ValueError("a language classifier needs samples of two languages or more")
        counts, first = [], []
        for language, texts in samples.items():
            several, used, own = language in LANGUAGES and len(LANGUAGES[language].scripts) > 1, 0, {}
            for text in texts:
                text = text[:characters - used]
                script = int(_class_counts(text)[_FIRST_SCRIPT:].argmax()) if several else 0
                row = own.setdefault(script, np.zeros(cls.BUCKETS, np.float32))
                row += np.bincount(cls._buckets(text), minlength=cls.BUCKETS)
                used += len(text)
                if used >= characters:
                    break
            first.append(len(counts))
            counts += own.values() or [np.zeros(cls.BUCKETS, np.float32)]
        counts = np.stack(counts)
        # Smoothed by what all languages have in common: a small sample is not punished for what it lacks.
        background = counts.sum(axis=0) + 1.0
        background /= background.sum()
        mass = np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        share = 0.95 * counts / mass + 0.05 * background
        return cls(samples, np.array(first), np.ascontiguousarray(np.log(share).T.astype(np.float32)))

    @classmethod
    def _buckets(cls, text):
        codes = _codes(" ".join(text.lower().split()))
        found, hashes = [], np.zeros(len(codes), np.uint32)
        with np.errstate(over="ignore"):
            for n in range(1, min(4, len(codes)) + 1):
                hashes = hashes[:len(codes) - n + 1] * np.uint32(0x01000193) + codes[n - 1:] + np.uint32(n)
                mixed = (hashes ^ (hashes >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
                found.append((mixed >> np.uint32(16)).astype(np.int64))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def scores(self, text):
        """Mean log probability of the page's n-grams in each language -> [languages] float32."""
        third = self.CHARACTERS // 3
        if len(text) > self.CHARACTERS:
            middle = len(text) // 2
            text = " ".join((text[:third], text[middle:middle + third], text[-third:]))
        buckets = self._buckets(text)
        if not len(buckets):
            return np.zeros(len(self.languages), np.float32)
        return np.maximum.reduceat(self._log[buckets].mean(axis=0), self._first)

    def is_wrong(self, text, language):
        """True where another language fits clearly better. A language without a sample is never judged."""
        if language not in self.languages:
            return False
        scores = self.scores(text)
        return bool(scores.max() - scores[self.languages[language]] > LANGUAGE_MARGIN)
