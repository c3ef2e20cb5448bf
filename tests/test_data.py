"""data.py and batches.py: the loader on corpora whose ids say where each token comes from; prepare on text from here."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import fcntl
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import batches
import data
import sources
from data import (BOS, EOS, FIRST_PIECE, IGNORE, MASK, PAD, BatchConfig, Corpus, Prefetcher, clean, encode_text,
                  load_tokenizer, pack_sequences, packed_batch, prepare, sampling_probabilities, slot_probabilities,
                  validation_batches)

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("UNIBERT_SHARED", ROOT.parent / "shared"))


# ------------------------------------------------------------------------------------------------ synthetic corpora

def write_corpus(folder, lengths, vocab_size=None):
    """A prepared folder in which every token of the corpus has its own id: id - 5 numbers all tokens, language after
    language. lengths: {language: [tokens of each document]}. Validation holds the same documents."""
    folder.mkdir()
    files, report, first = {"tokenizer.model": data.write(folder / "tokenizer.model", b"unused")}, {}, FIRST_PIECE
    for code, sizes in lengths.items():
        ids = np.arange(first, first + sum(sizes), dtype="<u4")
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype("<i8")
        for split in data.SPLITS:
            for kind, array in (("tokens", ids), ("offsets", offsets)):
                name = f"{code}.{split}.{kind}"
                files[name] = data.write(folder / name, array.tobytes())
        report[code] = {split: {"documents": len(sizes), "tokens": sum(sizes)} for split in data.SPLITS}
        first += sum(sizes)
    manifest = {"format": data.FORMAT, "version": data.VERSION, "vocab_size": vocab_size or first, "dtype": "<u4",
                "languages": report, "files": files}
    manifest["sha256"] = data.manifest_digest(manifest)
    data.write(folder / "manifest.json", json.dumps(manifest).encode())
    return Corpus(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three languages: short, mixed and long documents."""
    rng = np.random.default_rng(0)
    return write_corpus(tmp_path_factory.mktemp("synthetic") / "c", {
        "aa": rng.integers(6, 20, 400).tolist(), "bb": rng.integers(6, 300, 200).tolist(), "cc": [9000, 15000, 7, 6]})


P = np.array([0.5, 0.3, 0.2])


def config_for(corpus, **options):
    return BatchConfig(vocab_size=corpus.vocab_size, **{"row_tokens": 256, "max_length": 64, **options})


def restored(batch):
    """Tokens before masking."""
    tokens, used = batch.tokens.clone(), batch.targets != IGNORE
    tokens[batch.masked[used]] = batch.targets[used]
    return tokens.numpy()


def sequences(batch, tokens):
    """(language, ids) of each segment that is a sequence."""
    bounds = batch.cu_seqlens.tolist()
    return [(language, tokens[a:b]) for language, a, b in zip(batch.languages.tolist(), bounds, bounds[1:])
            if language != IGNORE]


def chi_square_ok(observed, expected):
    """Within five standard deviations of the chi-square distribution's mean (seeds are fixed, so this is no lottery)."""
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    assert expected.min() >= 5, "bins too small for a chi-square test"
    freedom = len(observed) - 1
    return abs(((observed - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


# ------------------------------------------------------------------------------------------------ the loader

@pytest.mark.parametrize("options", [{}, {"max_length": 256}, {"max_length": 8}, {"mask_rate": 0.4}])
def test_rows_are_a_pure_function_whatever_the_split(corpus, options):
    config = config_for(corpus, **options)
    whole = packed_batch(corpus, P, config, 7, 3, range(12))
    for cuts in ([0, 12], [0, 5, 12], [0, 1, 2, 12], list(range(13))):
        parts = [packed_batch(corpus, P, config, 7, 3, range(a, b)) for a, b in zip(cuts, cuts[1:])]
        at = [a * config.row_tokens for a in cuts[:-1]]
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
        assert torch.equal(torch.cat([p.languages for p in parts]), whole.languages)
        assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
        assert torch.equal(torch.cat([torch.where(p.targets == IGNORE, 0, p.masked + a) for p, a in zip(parts, at)]),
                           whole.masked)
        assert torch.equal(torch.cat([p.cu_seqlens[1:] + a for p, a in zip(parts, at)]), whole.cu_seqlens[1:])
    for seed, step in ((8, 3), (7, 4), (-7, 3), (2**63, 3)):
        other = packed_batch(corpus, P, config, seed, step, range(12))
        assert not torch.equal(other.tokens, whole.tokens) and not torch.equal(other.masked, whole.masked)


def test_drawing_in_blocks_changes_nothing(corpus, monkeypatch):
    """Rows draw as many slots as they are expected to need, then more; where those blocks end must not matter."""
    config = config_for(corpus)
    before = packed_batch(corpus, P, config, 1, 0, range(50))
    monkeypatch.setattr(batches, "SPARE", 0.02)
    after = packed_batch(corpus, P, config, 1, 0, range(50))
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.masked, after.masked)


@pytest.mark.parametrize("rows, options", [(1, {}), (5, {}), (3, {"row_tokens": 512, "max_length": 512})])
def test_shapes_are_static(corpus, rows, options):
    config = config_for(corpus, **options)
    for step in range(20):
        batch = packed_batch(corpus, P, config, 0, step, range(rows))
        assert batch.tokens.shape == (rows * config.row_tokens,) and batch.tokens.dtype == torch.int64
        assert batch.cu_seqlens.shape == (rows * config.row_tokens // 8 + 1,) and batch.cu_seqlens.dtype == torch.int32
        assert batch.languages.shape == (rows * config.row_tokens // 8,) and batch.languages.dtype == torch.int64
        assert batch.masked.shape == batch.targets.shape == (rows * round(0.15 * config.row_tokens),)
        assert batch.max_seqlen == config.max_length
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.tokens)
        lengths = batch.cu_seqlens.diff()
        assert lengths.min() >= 0 and lengths.max() <= config.max_length
        # what is left at the end of a row is too short for a sequence, and is <pad> of no language
        padding = batch.tokens == PAD
        assert padding.view(rows, -1).sum(1).max() < 8
        assert padding.sum() == lengths[batch.languages == IGNORE].sum()


def test_a_sequence_is_one_document_or_a_window_of_it(corpus):
    config, limit = config_for(corpus), 64 - 2
    first_of = np.concatenate([[0], np.cumsum(corpus.tokens_per_language)]) + FIRST_PIECE
    whole, windows, cropped = 0, 0, 0
    for step in range(30):
        batch = packed_batch(corpus, P, config, 5, step, range(4))
        ends = batch.cu_seqlens[1:].tolist()
        found = sequences(batch, restored(batch))
        row_end = [e % config.row_tokens == 0 for e, l in zip(ends, batch.languages.tolist()) if l != IGNORE]
        for (language, ids), last in zip(found, row_end):
            assert len(ids) >= 8 and ids[0] == BOS and ids[-1] == EOS
            assert np.array_equal(ids[1:-1], np.arange(ids[1], ids[1] + len(ids) - 2))        # one stretch, in order
            offsets = corpus._offsets[language] + first_of[language]
            document = np.searchsorted(offsets, ids[1], side="right") - 1
            size = offsets[document + 1] - offsets[document]
            assert ids[-2] < offsets[document + 1] <= first_of[language + 1]                   # of one document
            if len(ids) - 2 == min(size, limit):
                whole, windows = whole + (size <= limit), windows + (size > limit)
                assert size > limit or ids[1] == offsets[document]
            else:
                assert last                                            # only the row's end crops, before </s>
                cropped += 1
    assert min(whole, windows, cropped) > 50


def test_masking_is_80_10_10_exact_and_never_special(corpus):
    config = config_for(corpus)
    kept = replaced = mask = 0
    random_ids = []
    for step in range(100):
        batch = packed_batch(corpus, P, config, 11, step, range(8))
        assert (batch.targets >= FIRST_PIECE).all()                        # no unused slot here, no special predicted
        per_row = batch.masked.view(8, -1)
        assert (per_row.diff(dim=1) > 0).all()                             # ascending, so distinct
        assert (per_row // config.row_tokens == torch.arange(8)[:, None]).all()
        now = batch.tokens[batch.masked]
        mask += (now == MASK).sum().item()
        kept += (now == batch.targets).sum().item()
        different = (now != MASK) & (now != batch.targets)
        replaced += different.sum().item()
        random_ids.append(now[different])
        assert (batch.tokens == MASK).sum() == (now == MASK).sum()         # nothing outside `masked` was touched
    total = 100 * 8 * config.masked_per_row
    for count, share in ((mask, 0.8), (replaced, 0.1), (kept, 0.1)):
        assert abs(count - share * total) < 5 * np.sqrt(total * share * (1 - share))
    random_ids = torch.cat(random_ids).numpy()
    assert random_ids.min() >= FIRST_PIECE and random_ids.max() < corpus.vocab_size
    bins = np.histogram(random_ids, 50, (FIRST_PIECE, corpus.vocab_size))[0]
    assert chi_square_ok(bins, np.full(50, len(random_ids) / 50))


def test_masked_positions_are_uniform(tmp_path):
    one = write_corpus(tmp_path / "c", {"aa": [5000]})
    config = config_for(one, row_tokens=64)                                # one sequence fills the row
    hits = np.zeros(64)
    for step in range(200):
        np.add.at(hits, packed_batch(one, [1.0], config, 0, step, range(32)).masked.numpy() % 64, 1)
    assert hits[0] == hits[-1] == 0
    # Without replacement in a row the counts vary less than a chi-square's, which only makes the bound wider.
    assert chi_square_ok(hits[1:-1], np.full(62, hits.sum() / 62)) or ((hits[1:-1] - hits.sum() / 62) ** 2).sum() \
        / (hits.sum() / 62) < 62
    assert hits[1:-1].min() > 0.85 * hits.sum() / 62


def test_fewer_maskable_tokens_than_slots(tmp_path):
    tiny = write_corpus(tmp_path / "c", {"aa": [6, 6]})
    config = config_for(tiny, row_tokens=64, max_length=8, mask_rate=0.9)  # 48 of 64 can be masked, 58 are asked for
    batch = packed_batch(tiny, [1.0], config, 0, 0, range(3))
    used = (batch.targets != IGNORE).view(3, -1)
    assert used.sum(1).tolist() == [48] * 3 and (batch.masked.view(3, -1)[~used] == 0).all()
    assert sorted(set(restored(batch).tolist())) == [BOS, EOS, *range(5, 17)]


def test_languages_follow_the_probabilities(corpus):
    config = config_for(corpus, row_tokens=2048)
    first, share = np.zeros(3), np.zeros(3)
    for step in range(150):
        batch = packed_batch(corpus, P, config, 2, step, range(8))
        languages, lengths = batch.languages.numpy(), batch.cu_seqlens.diff().numpy()
        first += np.bincount(languages.reshape(8, -1)[:, 0], minlength=3)
        share += np.bincount(languages[languages >= 0], lengths[languages >= 0], minlength=3)
    slot = slot_probabilities(corpus, P, config)
    assert chi_square_ok(first, slot * first.sum())                        # a sequence: short documents more often,
    assert np.allclose(share / share.sum(), P, atol=0.01)                  # so that a token is of language i with P[i]
    assert slot[0] > 0.6
    assert packed_batch(corpus, [0, 0, 1], config, 0, 0, range(4)).languages.unique().tolist() == [IGNORE, 2]
    for wrong in ([0.5, 0.5], [1, -1, 1], [0, 0, 0]):
        with pytest.raises(ValueError, match="probabilities"):
            packed_batch(corpus, wrong, config, 0, 0, range(1))


@pytest.mark.parametrize("max_length, row_tokens", [(64, 64), (128, 128), (128, 256), (32, 128)])
def test_shares_hold_where_a_row_has_few_sequences(tmp_path, max_length, row_tokens):
    """Long documents lose more at the end of a row. Asked by tokens, so must be read by tokens: an epoch cap counts on it."""
    mixed = write_corpus(tmp_path / "c", {"aa": [500] * 9, "bb": [10] * 300, "cc": [12, 40, 90] * 20})
    config, p = config_for(mixed, row_tokens=row_tokens, max_length=max_length), np.array([0.5, 0.2, 0.3])
    read = np.zeros(3)
    for step in range(20):
        batch = packed_batch(mixed, p, config, 6, step, range(1000))
        languages, lengths = batch.languages.numpy(), batch.cu_seqlens.diff().numpy()
        read += np.bincount(languages[languages >= 0], lengths[languages >= 0], minlength=3)
    assert np.allclose(read / read.sum(), p, atol=0.012), read / read.sum()


def test_documents_are_drawn_by_length_and_windows_evenly(tmp_path):
    sizes, limit = [2000, 30, 60, 910], 62
    one = write_corpus(tmp_path / "c", {"aa": sizes})
    config = config_for(one, row_tokens=64)
    starts = []
    for step in range(100):
        batch = packed_batch(one, [1.0], config, 4, step, range(200))
        starts.append(restored(batch)[1::64] - FIRST_PIECE)
    starts = np.concatenate(starts)
    document = np.searchsorted(np.cumsum(sizes), starts, side="right")
    assert chi_square_ok(np.bincount(document), len(starts) * np.array(sizes) / sum(sizes))
    inside = starts[document == 0]                                         # first tokens of windows of the 2,000
    n, last = len(inside), 2000 - limit
    for end in (0, last):                                                  # windows that were moved inside
        expected = n * (limit + 1) / 2 / 2000
        assert abs(np.count_nonzero(inside == end) - expected) < 5 * np.sqrt(expected)
    bins = np.histogram(inside[(inside > 0) & (inside < last)], 40, (1, last))[0]
    assert chi_square_ok(bins, np.full(40, bins.sum() / 40))


def test_whole_words(prepared):
    corpus = Corpus(prepared)
    config = BatchConfig(vocab_size=corpus.vocab_size, row_tokens=512, max_length=128, whole_word=True)
    starts, p = corpus.word_start, sampling_probabilities(corpus.tokens_per_language, 1)
    partly = words = 0
    for step in range(10):
        batch = packed_batch(corpus, p, config, 0, step, range(4))
        assert (batch.targets >= FIRST_PIECE).all()
        tokens, chosen = restored(batch), np.zeros(4 * 512, bool)
        chosen[batch.masked.numpy()] = True
        begins = starts[tokens] | (tokens < FIRST_PIECE)
        begins[1:] |= tokens[:-1] < FIRST_PIECE
        word = np.cumsum(begins) - 1
        sizes, hits = np.bincount(word), np.bincount(word, chosen)
        row = np.repeat(np.arange(4), 512)[begins]
        partial = (hits > 0) & (hits < sizes)
        assert np.bincount(row, partial, 4).max() <= 1                     # only the word that fills the count is cut
        partly, words = partly + partial.sum(), words + ((hits == sizes) & (sizes > 1)).sum()
    assert words > 100
    pieces = [load_tokenizer(corpus.tokenizer_path).id_to_piece(i) for i in np.flatnonzero(starts)]
    assert all(piece.startswith("\u2581") or batches.NO_SPACES.search(piece) for piece in pieces)
    assert any(not piece.startswith("\u2581") for piece in pieces)        # the Thai or Chinese ones


def test_sampling_probabilities():
    n = np.array([10, 1000, 100_000, 0, 5_000_000])
    for alpha in (0, 0.3, 0.7, 1):
        p = sampling_probabilities(n, alpha)
        assert p.sum() == pytest.approx(1) and p[3] == 0
        expected = np.where(n > 0, n.astype(float) ** alpha, 0)
        assert np.allclose(p, expected / expected.sum())
        for budget in (1e3, 1e5, 1e6, 4e6):
            q = sampling_probabilities(n, alpha, budget, max_epochs=4)
            cap = 4 * n / budget
            assert q.sum() == pytest.approx(1) and (q <= cap * (1 + 1e-12)).all()
            free = (q < cap * (1 - 1e-9)) & (n > 0)                        # those below the cap keep p's proportions
            assert np.allclose(q[free] / q[free].sum(), p[free] / p[free].sum())
            assert (q[free] >= p[free] * (1 - 1e-12)).all()
    # UniMax: with alpha 0 each language gets the same, up to the cap
    assert np.allclose(sampling_probabilities([100, 1000, 10_000], 0, 3000, 1), [100 / 3000, 1000 / 3000, 1900 / 3000])
    # more asked than all languages hold at the cap: all are read equally often
    assert np.allclose(sampling_probabilities([100, 300], 0.3, 10_000, 2), [0.25, 0.75])
    for wrong in ([], [0, 0], [-1, 2], [np.nan, 1]):
        with pytest.raises(ValueError, match="token_counts"):
            sampling_probabilities(wrong, 0.3)


def test_validation_batches_hold_each_document_once(corpus):
    held_out, config = Corpus(corpus.folder, "validation"), config_for(corpus)
    for group, count in (("aa", 400), (["aa", "bb"], 600), (["cc"], 4)):
        batches = validation_batches(held_out, config, group, 10**6, rows=3)
        assert all(batch.tokens.shape == (3 * 256,) for batch in batches)
        found = [(language, ids[1]) for batch in batches for language, ids in sequences(batch, restored(batch))]
        starts = [(held_out.languages.index(code), offset + held_out.tokens(code)[0])
                  for code in ([group] if isinstance(group, str) else group)
                  for offset in held_out._offsets[held_out.languages.index(code)][:-1]]
        assert len(found) == count and sorted(found) == sorted(starts)
        again = validation_batches(held_out, config, group, 10**6, rows=3)
        for a, b in zip(batches, again, strict=True):
            assert all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("tokens", "cu_seqlens", "masked", "targets"))
            assert a.cu_seqlens.diff().max() <= config.max_length and a.cu_seqlens[-1] == len(a.tokens)
    (turns,) = validation_batches(held_out, config, ["aa", "bb"], 256)
    assert [language for language, _ in sequences(turns, restored(turns))][:4] == [0, 1, 0, 1]
    few = validation_batches(held_out, config, "bb", 1024)
    assert sum(len(batch.tokens) for batch in few) == 1024
    with pytest.raises(ValueError, match="zz"):
        validation_batches(held_out, config, ["aa", "zz"], 1024)


def test_a_row_of_validation_that_is_filled_in_part_has_its_share_masked_and_no_more(corpus):
    """The last row of each language, the only one of a small language: its few tokens must not all be predicted."""
    held_out, config = Corpus(corpus.folder, "validation"), config_for(corpus)
    for group in ("aa", "cc"):
        for batch in validation_batches(held_out, config, group, 10**6, rows=3):
            filled = (batch.tokens != PAD).view(3, -1).sum(1)
            rows = batch.masked[batch.targets != IGNORE] // config.row_tokens
            wanted = np.where(filled > config.row_tokens - 8, config.masked_per_row, np.rint(config.mask_rate * filled.numpy()))
            assert (torch.bincount(rows, minlength=3).numpy() == wanted).all()
            assert len(batch.masked) == 3 * config.masked_per_row                # shapes stay static


def test_pack_sequences():
    tokens, cu_seqlens, longest = pack_sequences([[0, 9, 2], [], [0, 2]])
    assert tokens.tolist() == [0, 9, 2, 0, 2] and cu_seqlens.tolist() == [0, 3, 3, 5] and longest == 3
    assert (tokens.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    tokens, cu_seqlens, longest = pack_sequences([])
    assert tokens.shape == (0,) and cu_seqlens.tolist() == [0] and longest == 0


def test_prefetcher_keeps_order_reports_errors_and_stops():
    def slow(step):
        time.sleep(0.002 * (step % 3))
        if step == 30:
            raise RuntimeError("step 30 broke")
        return step
    assert list(Prefetcher(slow, range(20), workers=3)) == list(range(20))
    seen = []
    with pytest.raises(RuntimeError, match="step 30 broke"):
        for step in Prefetcher(slow, range(25, 40)):
            seen.append(step)
    assert seen == [25, 26, 27, 28, 29]
    before, made = threading.active_count(), []
    for step in Prefetcher(lambda step: made.append(step) or step, iter(range(10**9)), depth=3):
        if step == 5:
            break
    assert len(made) <= 10 and threading.active_count() == before


@pytest.mark.parametrize("wrong", [{"row_tokens": 100}, {"max_length": 512}, {"max_length": 4}, {"mask_rate": 0.0},
                                   {"mask_rate": 1.0}, {"mask_share": 0.95}, {"random_share": -0.1}, {"vocab_size": 5}])
def test_impossible_batch_configs(wrong):
    with pytest.raises(ValueError):
        BatchConfig(**{"vocab_size": 100, "row_tokens": 256, "max_length": 64, **wrong})


# ------------------------------------------------------------------------------------------------ prepare

WORDS = {
    "en": "the river runs down from old green hills and children carry small baskets of bread to market every morning",
    "ro": "râul coboară dintre dealuri vechi și verzi iar copiii duc coșuri mici cu pâine la piață în fiecare dimineață",
    "fa": "رودخانه از تپه\u200cهای سبز پایین می\u200cآید و کودکان سبدهای کوچک نان را هر صبح به بازار می\u200cبرند خانه\u200cها",
    "th": "แม่น้ำไหลลงมาจากเนินเขาเขียว เด็กเด็กถือตะกร้าขนมปัง ไปตลาดทุกเช้า บ้านของเรา อยู่ใกล้ทะเล",
}


def document(code, number):
    """A text of 8 to 40 words in random order, some of them blends of two."""
    rng = np.random.default_rng([number, *code.encode()])
    words = rng.choice(WORDS[code].split(), rng.integers(8, 40)).tolist()
    blends = [a[:len(a) // 2 + 1] + b[len(b) // 2:] for a, b in zip(words[::3], words[1::3])]
    return " ".join(words + blends) + f" {number}"


def write_texts(folder, codes=WORDS, count=120):
    folder.mkdir(exist_ok=True)
    for code in codes:
        (folder / f"{code}.txt").write_text("\n\n".join(document(code, i) for i in range(count)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "in")


@pytest.fixture(scope="module")
def prepared(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "d"
    prepare(texts, out, vocab_size=600, validation_share=0.1, workers=1)
    return out


def documents(folder, split, code):
    """Decoded documents of a prepared folder."""
    corpus, tokenizer = Corpus(folder, split), load_tokenizer(folder / "tokenizer.model")
    index = corpus.languages.index(code)
    return [tokenizer.decode(ids.tolist()) for ids in np.split(corpus.tokens(code), corpus._offsets[index][1:-1])
            if len(ids)]


def run(*arguments):
    return CliRunner().invoke(data.main, [str(a) for a in arguments])


def test_what_prepare_writes_is_what_went_in(prepared, texts):
    manifest = data.read_manifest(prepared)
    assert list(manifest["languages"]) == sorted(WORDS) and manifest["dtype"] == "<u2"
    for code, entry in manifest["languages"].items():
        train, validation = documents(prepared, "train", code), documents(prepared, "validation", code)
        expected = sorted(unicodedata.normalize("NFKC", document(code, i)) for i in range(120))
        assert sorted(train + validation) == expected                      # SentencePiece's nfkc splits Thai sara am
        assert entry["characters"] == sum(len(document(code, i)) for i in range(120))
        assert entry["words"] == sum(len(document(code, i).split()) for i in range(120))
        assert 2 <= len(validation) <= 30
        tokenizer = load_tokenizer(prepared / "tokenizer.model")
        assert entry["train"]["tokens"] == len(Corpus(prepared).tokens(code))
        assert encode_text(tokenizer, "  " + train[0].replace(" ", "\n ")) == Corpus(prepared).tokens(code)[
            :Corpus(prepared)._offsets[Corpus(prepared).languages.index(code)][1]].tolist()
    assert run("verify", prepared).exit_code == 0
    table = run("inspect", prepared, "--budget", "1e6", "--max-epochs", "5").output
    assert all(code in table for code in WORDS)


def test_same_bytes_whatever_the_workers_and_the_run(prepared, texts, tmp_path):
    prepare(texts, tmp_path / "d", vocab_size=600, validation_share=0.1, workers=2)
    assert (tmp_path / "d" / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()


def test_split_depends_on_the_document_alone(prepared, tmp_path):
    """Another order, other documents beside them and other languages: each document stays in its split."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "ro.txt").write_text("\n\n".join(document("ro", i) for i in reversed(range(150))), encoding="utf-8")
    prepare(folder, tmp_path / "d", tokenizer=prepared / "tokenizer.model", validation_share=0.1, workers=1)
    before = set(documents(prepared, "validation", "ro"))
    after = set(documents(tmp_path / "d", "validation", "ro"))
    assert before == after & {document("ro", i) for i in range(120)}
    assert not after & set(documents(tmp_path / "d", "train", "ro"))


def test_a_corpus_of_many_languages_opens_where_few_files_may_be_open(corpus, tmp_path):
    """Each mapping keeps its file open, two a language."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = write_corpus(tmp_path / "c", {f"{a}{b}": [9] for a in "abcdefgh" for b in "abcdefgh"}).folder
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
        assert len(Corpus(many).languages) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_batches_read_without_read_ahead_and_streams_with_it(corpus):
    """A cold sequence costs its own pages of the disk, not the hundreds of kilobytes around it."""
    def advised(name):
        lines = Path("/proc/self/smaps").read_text().split(f"{corpus.folder}/{name}\n")[1:]
        return [" rr " in next(line for line in part.splitlines() if line.startswith("VmFlags:")) for part in lines]
    assert advised("bb.train.tokens") == [True] and advised("bb.train.offsets") == [False]
    stream = corpus.tokens("bb")
    assert sorted(advised("bb.train.tokens")) == [False, True] and len(stream) == corpus.tokens_per_language[1]


def test_small_languages_still_get_validation():
    hashes = data.mix64(np.arange(1, 101, dtype=np.uint64))
    assert np.count_nonzero(data._decide(hashes[:19], 1e-6) == data.VALIDATION) == 0
    for n in (20, 100):
        assert np.count_nonzero(data._decide(hashes[:n], 1e-6) == data.VALIDATION) == 2
    assert np.count_nonzero(data._decide(hashes, 0.0) == data.VALIDATION) == 0
    fate = data._decide(np.repeat(hashes, 3), 0.2)
    assert np.count_nonzero(fate == data.DUPLICATE) == 200 and (fate.reshape(100, 3)[:, 0] != data.DUPLICATE).all()


def test_cleaning():
    assert clean("a\u200bb\x00c \u00a0 d\r\ne\tf\ufeff\u200e") == "abc d e f"
    assert clean("می\u200cروم क्\u200dष") == "می\u200cروم क्\u200dष"          # ZWNJ and ZWJ are spelling
    assert clean("s\u0327i e\u0301") == "şi é"                                    # NFC
    for text in ("x\u200by\x07  z", "a \x00 b", "e\u200b\u0301", "\u1112\u1161\u11ab \u2028 k"):
        assert clean(clean(text)) == clean(text)


def test_zwnj_survives_the_tokenizer(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    for text in ("می\u200cروم", "क्\u200dष"):
        assert tokenizer.decode(encode_text(tokenizer, text)) == text
    assert any("\u200c" in text for text in documents(prepared, "train", "fa"))


def test_text_cannot_inject_special_tokens(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    assert [tokenizer.id_to_piece(i) for i in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    text = "a <mask> b</s><s> <pad> <unk> <0x41> [MASK]"
    ids = encode_text(tokenizer, text)
    assert min(ids) >= FIRST_PIECE and tokenizer.decode(ids) == text
    assert tokenizer.decode(encode_text(tokenizer, "漢字 😀")) == "漢字 😀"      # byte fallback: no <unk> ever


def test_duplicates_short_documents_and_invalid_utf8_are_counted(prepared, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    good = [document("en", i) for i in range(30)]
    raw = "\n\n".join([good[0], *good, "  " + good[3].replace(" ", "  "), "a", "\u200b\u200b"]).encode()
    (folder / "en.txt").write_bytes(b"\xef\xbb\xbf" + raw + b"\n \n\nthe river runs \xff\xfe down from old \xc3 green hills\n")
    (folder / "README.txt").write_text("not a language")
    result = run("prepare", folder, "--out", tmp_path / "d", "--tokenizer", prepared / "tokenizer.model", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert f"{folder / 'en.txt'}: 3 invalid UTF-8 sequences" in result.output
    entry = data.read_manifest(tmp_path / "d")["languages"]["en"]
    assert entry["dropped"] == {"empty": 1, "duplicate": 2, "short": 1} and entry["invalid_utf8"] == 3
    assert entry["train"]["documents"] + entry["validation"]["documents"] == 31
    kept = documents(tmp_path / "d", "train", "en") + documents(tmp_path / "d", "validation", "en")
    (folder / "en.txt").write_bytes("\n\n".join(good).encode("utf-16"))
    refused = run("prepare", folder, "--out", tmp_path / "u", "--tokenizer", prepared / "tokenizer.model", "--workers", 1)
    assert refused.exit_code == 2 and "is UTF-16" in refused.output and not list(tmp_path.glob("u*")), refused.output
    assert "the river runs \ufffd\ufffd down from old \ufffd green hills" in kept


def test_long_documents_reach_the_tokenizer_in_short_lines(tmp_path):
    index = np.array([[1, 25_000, 25_001]], np.uint64)
    (tmp_path / "0").write_bytes(b"word " * 5000 + b"\n")
    lines = list(data._sample_lines([(tmp_path / "0", index, np.array([data.TRAIN], np.uint8))], 10**6))
    assert "".join(lines) == "word " * 2000 and max(map(len, lines)) <= 1000


def test_the_tokenizer_s_sample_ends_when_its_budget_is_reached(tmp_path):
    (tmp_path / "0").write_bytes(b"ten chars.\n" * 5)
    index = np.array([[i, 10, 11] for i in range(5)], np.uint64)
    fate = np.array([data.TRAIN] * 4 + [data.VALIDATION], np.uint8)
    for budget, taken in ((1, 1), (10, 1), (11, 2), (30, 3), (10**6, 4)):
        assert len(list(data._sample_lines([(tmp_path / "0", index, fate)], budget))) == taken


def one_line(result):
    """The complaint of a command that ended with code 2."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and "Traceback" not in result.output
    return errors[0]


def test_bad_input_is_one_line(prepared, texts, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in one_line(run("prepare", tmp_path / "none", "--out", tmp_path / "d"))
    assert "<code>.txt" in one_line(run("prepare", tmp_path / "empty", "--out", tmp_path / "d"))
    blank = write_texts(tmp_path / "blank", ["en"])
    (blank / "ro.txt").write_text(" \n\n\u200b\n")
    assert "ro.txt: holds no text" in one_line(run("prepare", blank, "--out", tmp_path / "d", "--workers", 1))
    (blank / "ro.txt").write_text("da\n\nnu\n")
    model = prepared / "tokenizer.model"
    assert "ro.txt" in one_line(run("prepare", blank, "--out", tmp_path / "d", "--tokenizer", model, "--workers", 1))
    assert "xx, yy" in one_line(run("prepare", texts, "--out", tmp_path / "d", "--languages", "ro,yy,xx"))
    assert "README" in one_line(run("prepare", texts, "--out", tmp_path / "d", "--tokenizer", ROOT / "README.md"))
    assert "too small" in one_line(run("prepare", texts, "--out", tmp_path / "d", "--vocab-size", 300, "--workers", 1))
    assert "its languages are" in one_line(run("prepare", texts, "--out", tmp_path / "d", "--languages", "EN"))
    assert "--languages names none" in one_line(run("prepare", texts, "--out", tmp_path / "d", "--languages", ","))
    for option, value in (("--alpha", "nan"), ("--budget", "0"), ("--budget", "nan"), ("--max-epochs", "-1")):
        assert f"is {value}" in one_line(run("inspect", prepared, option, value))
    assert not (tmp_path / "d").exists()
    assert run("prepare", texts, "--out", tmp_path / "d", "--tokenizer", model, "--workers", 1).exit_code == 0
    assert not (tmp_path / "d.partial").exists()                             # what refused calls had finished is used up
    assert "<code>.txt" in one_line(run("prepare", tmp_path / "empty", "--out", tmp_path / "e"))
    assert not (tmp_path / "e.partial").exists()
    assert "holds other files" in one_line(run("atlas", "--out", blank))     # its text/en.txt could be the user's


def test_too_large_a_vocabulary_names_the_largest_that_fits_and_costs_no_work(texts, tmp_path, monkeypatch):
    arguments = ["prepare", texts, "--out", tmp_path / "d", "--languages", "en,ro", "--workers", 1, "--vocab-size"]
    message = one_line(run(*arguments, 50_000))
    largest = int(message.split("the largest that fits is ")[1].split(";")[0])
    monkeypatch.setattr(sources, "Output", None)                             # nothing is cleaned again
    assert run(*arguments, largest).exit_code == 0
    assert len(load_tokenizer(tmp_path / "d" / "tokenizer.model")) == largest


def test_a_file_without_blank_lines_is_refused(tmp_path, monkeypatch):
    """It would be one document, read into memory as a whole."""
    monkeypatch.setattr(sources, "DOCUMENT_LIMIT", 1000)
    (tmp_path / "in").mkdir()
    lines = "".join(document("en", i) + "\n" for i in range(100))
    (tmp_path / "in" / "en.txt").write_text(lines.replace("\n", "\n\n"))
    assert len(list(sources.read_documents(tmp_path / "in" / "en.txt"))) == 100
    (tmp_path / "in" / "en.txt").write_text(lines)
    assert "blank line" in one_line(run("prepare", tmp_path / "in", "--out", tmp_path / "d", "--workers", 1))
    assert not (tmp_path / "d.partial").exists()                             # nothing was finished


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.model", "ro.train.tokens", "fa.validation.offsets"])
def test_damage_is_named(prepared, tmp_path, name, damage):
    folder = tmp_path / "d"
    folder.mkdir()
    for path in prepared.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    Corpus(folder)
    damage(folder / name)
    with pytest.raises(ValueError, match=name):
        Corpus(folder)
    assert name in one_line(run("verify", folder))


def test_a_manifest_of_another_version_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    manifest = data.read_manifest(prepared) | {"version": 2}
    manifest["sha256"] = data.manifest_digest(manifest)
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="version 1"):
        Corpus(tmp_path / "d")


def test_damaged_samples_are_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "d")
    cut(tmp_path / "d" / "ro.samples.json")
    assert "ro.samples.json" in one_line(run("inspect", tmp_path / "d", "--sample", "ro"))


def test_a_prepared_folder_is_replaced_only_when_asked(prepared, texts, tmp_path):
    model, out = prepared / "tokenizer.model", tmp_path / "d"
    arguments = ["prepare", texts, "--out", out, "--tokenizer", model, "--workers", 1, "--languages"]
    assert run(*arguments, "en").exit_code == 0
    assert "--overwrite" in one_line(run(*arguments, "ro")) and Corpus(out).languages == ["en"]
    assert run(*arguments, "ro", "--overwrite").exit_code == 0 and Corpus(out).languages == ["ro"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"] and not any(p.is_dir() for p in out.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "no prepared corpus" in one_line(run("prepare", texts, "--out", tmp_path / "mine", "--tokenizer", model,
                                                "--overwrite"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_two_prepares_into_one_folder(prepared, texts, tmp_path):
    (tmp_path / "d.partial").mkdir()
    held = os.open(tmp_path / "d.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    arguments = "prepare", texts, "--out", tmp_path / "d", "--tokenizer", prepared / "tokenizer.model", "--workers", 1
    assert "another prepare" in one_line(run(*arguments)) and (tmp_path / "d.partial").exists()
    os.close(held)
    assert run(*arguments).exit_code == 0


def test_a_killed_prepare_leaves_nothing_that_loads(tmp_path):
    texts, out = write_texts(tmp_path / "in", count=3000), tmp_path / "d"
    command = [sys.executable, "-c", "import data; data.main()", "prepare", texts, "--out", out, "--vocab-size", "600",
               "--workers", "2"]
    for appears in ("clean", "tokenizer.model"):                           # killed while cleaning; while tokenising
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            while not (tmp_path / "d.partial" / appears).exists() and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        for folder in (out, tmp_path / "d.partial"):
            with pytest.raises(ValueError, match="interrupted"):
                Corpus(folder)
    deadline = time.monotonic() + 10                                       # its workers notice, and let go of the lock
    while True:
        result = run("prepare", texts, "--out", out, "--vocab-size", 480, "--workers", 1, "--languages", "en,ro")
        if "another prepare" not in result.output or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert result.exit_code == 0, result.output
    assert Corpus(out).languages == ["en", "ro"] and not (tmp_path / "d.partial").exists()


def test_real_text(tmp_path):
    if not (SHARED / "data" / "text").is_dir():
        pytest.skip(f"needs the shared texts in {SHARED / 'data' / 'text'} (or UNIBERT_SHARED)")
    manifest = prepare(SHARED / "data" / "text", tmp_path / "d", vocab_size=3000, languages=["ab", "ne", "th"],
                       sample_characters=200_000, workers=2)
    for code, entry in manifest["languages"].items():
        assert entry["train"]["documents"] > 100 and entry["validation"]["documents"] >= 1
        assert entry["byte_tokens"] < 0.02 * entry["train"]["tokens"]
    corpus = Corpus(tmp_path / "d")
    p = sampling_probabilities(corpus.tokens_per_language, 0.3)
    config = BatchConfig(vocab_size=corpus.vocab_size)
    batch = packed_batch(corpus, p, config, 0, 0, range(8))
    assert set(batch.languages.tolist()) == {IGNORE, 0, 1, 2}
    share = np.bincount(batch.languages[batch.languages >= 0], batch.cu_seqlens.diff()[batch.languages >= 0])
    assert np.allclose(share / share.sum(), p, atol=0.15)
