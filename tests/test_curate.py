"""curate.py: each filter drops what it is for and leaves prose alone, in several scripts."""
import hashlib
import random
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from wiki import curate as c
from wiki.languages import LANGUAGES

PROSE = {
    "en": "The river rises in the hills above the town and runs south for about ninety kilometres before it reaches the sea. ",
    "ru": "Река начинается на холмах над городом и течёт на юг около девяноста километров, прежде чем впадает в море. ",
    "ar": "ينبع النهر من التلال فوق المدينة ويجري جنوبا لمسافة تسعين كيلومترا تقريبا قبل أن يصب في البحر. ",
    "hi": "नदी शहर के ऊपर की पहाड़ियों से निकलती है और समुद्र तक पहुँचने से पहले लगभग नब्बे किलोमीटर दक्षिण की ओर बहती है। ",
    "ja": "この川は町の上の丘から流れ出て、海に注ぐまでおよそ九十キロメートル南へ流れる。カヌーもできる。",
    "zh": "这条河发源于城镇上方的丘陵，向南流约九十公里后入海。沿岸有许多村庄和桥梁。",
    "ko": "이 강은 마을 위의 언덕에서 시작하여 남쪽으로 약 구십 킬로미터를 흘러 바다에 이른다. ",
    "th": "แม่น้ำสายนี้มีต้นกำเนิดในเนินเขาเหนือเมืองและไหลไปทางใต้ประมาณเก้าสิบกิโลเมตรก่อนจะถึงทะเล ",
    "am": "ወንዙ ከከተማው በላይ ባሉት ኮረብቶች ይነሳል እና ወደ ባሕር ከመድረሱ በፊት ወደ ደቡብ ዘጠና ኪሎ ሜትር ያህል ይፈሳል። ",
    "sr": "Река извире на брдима изнад града и тече на југ. Reka izvire na brdima iznad grada i teče na jug. ",
}


@pytest.mark.parametrize("language", PROSE)
def test_prose_stays(language):
    text = PROSE[language] * 4
    assert c.curate(text, language) == (text, "")
    other = "en" if language not in ("en", "sr") else "hi"
    assert c.wrong_script(text, other)


def test_every_script_of_the_table_is_known():
    assert {script for language in LANGUAGES.values() for script in language.scripts} == set(c.SCRIPTS)
    classes = c._character_classes()
    for script, character in zip(c.SCRIPTS, "aяعकক字あア한αאաაአગਗಕកകကකகకก", strict=True):
        assert classes[ord(character)] == c._FIRST_SCRIPT + c.SCRIPTS.index(script), (script, character)


def test_length():
    assert c.too_short("x" * 199, "en") and not c.too_short("x" * 200, "en")
    assert c.too_short("字" * 69, "zh") and not c.too_short("字" * 70, "zh")
    assert c.curate("", "en")[1] == "length"


def test_symbols_and_addresses():
    table = "1990 | 12,5 | 13.7 % ; 1991 | 14,2 | 15.0 % ; 1992 | 11,9 | 12.2 % and so on\n" * 5
    assert c.curate(table, "en")[1] == "digits and punctuation"
    links = PROSE["en"] + "http://example.org/a/long/address www.example.com/other\n" * 3
    assert c.curate(links, "en")[1] == "URLs"
    assert c.curate(PROSE["en"] * 5 + " See http://example.org.", "en")[1] == ""
    assert not c.wrong_script("любой текст", "xx")


def test_lone_surrogates_and_other_planes():
    text = PROSE["en"] * 3 + "\ud800 𝒳 𠀀"
    assert c.curate(text, "en")[1] == ""
    assert c.RepeatedLines().strip("\ud800 𝒳 is a line that has thirty letters") and len(c.minhash(text)) == 32
    assert not c.wrong_script("𠀀" * 100, "zh") and c.wrong_script("𠀀" * 100, "en")


def test_repeated_lines():
    lines, stub = c.RepeatedLines(), "This article about a village is a stub. You can help by expanding it."
    kept = []
    for i in range(60):
        text = f"{PROSE['en']} It is number {i} of its kind. {i * 7919}\n" * 2 + f"{PROSE['en']}{i}\nHistory\n{stub}"
        text, reason = c.curate(text, "en", lines)
        assert reason == "" and "History" in text and text.count(f"number {i} of") == 1
        kept.append(stub in text)
    assert kept == [True] * c.LINE_PAGES + [False] * (60 - c.LINE_PAGES)
    only = "\n".join([PROSE["en"]] * 3 + [stub * 3])
    for i in range(c.LINE_PAGES):
        lines.strip(only)
    assert c.curate(only + f"\n{i}", "en", lines)[1] == "boilerplate"


def test_repeated_sentences_of_a_page_of_one_line():
    lines, stub = c.RepeatedLines(), "This article about a village is a stub. "
    pages = [f"The village number {i} lies at the river Nr. {i}! {stub}It has {i} inhabitants and a church." for i in range(30)]
    kept = [lines.strip(page) for page in pages]
    assert kept[:c.LINE_PAGES] == pages[:c.LINE_PAGES]
    assert kept[c.LINE_PAGES:] == [page.replace(stub, "") for page in pages[c.LINE_PAGES:]]


def test_repeated_lines_sketch_hardly_errs():
    lines, rng = c.RepeatedLines(), random.Random(1)
    for _ in range(30_000):
        line = f"an entirely different line {rng.getrandbits(64):x}"
        assert lines.strip(line) == line


def test_repeated_lines_do_not_fill_up(monkeypatch):
    """Eighty times as many lines as the sketch has counters: nearly every new line stays, and boilerplate is still known."""
    monkeypatch.setattr(c.RepeatedLines, "HALVED_AFTER", 300)
    lines, rng, stub = c.RepeatedLines(), random.Random(1), "This article about a village is a stub."

    def narrow(data, digest_size, blake2b=hashlib.blake2b):            # to 512 counters
        value = int.from_bytes(blake2b(data, digest_size=6).digest(), "little")
        return types.SimpleNamespace(digest=lambda: (value & 0x1FF | (value >> 24 & 0x1FF) << 24).to_bytes(6, "little"))
    monkeypatch.setattr(c.hashlib, "blake2b", narrow)
    for _ in range(c.LINE_PAGES + 1):
        lines.strip(stub)
    kept = [lines.strip(line) == line for line in (f"an entirely different line {rng.getrandbits(64):x}" for _ in range(40_000))]
    assert sum(kept[-10_000:]) > 9900 and lines.strip(stub) == ""


def words(rng, count):
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randrange(3, 10))) for _ in range(count))


def test_minhash_estimates_jaccard():
    rng = random.Random(2)
    errors = []
    for _ in range(60):
        base = words(rng, 200).split()
        other = [w if rng.random() < rng.choice((0.7, 0.9, 0.98)) else words(rng, 1) for w in base]
        a, b = " ".join(base), " ".join(other)
        shingles = [{t[i:i + c.SHINGLE] for i in range(len(t) - c.SHINGLE + 1)} for t in (a, b)]
        jaccard = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
        errors.append((c.minhash(a) == c.minhash(b)).mean() - jaccard)
    assert abs(np.mean(errors)) < 0.03 and np.std(errors) < 0.12      # standard error of 32 values is at most 0.09
    assert (c.minhash("a town of 1234 people") == c.minhash("a town of 5689 people")).all()      # digits are one and the same
    for text in ("", "a", "12345", "ab" * 3):
        assert c.minhash(text).shape == (32,)


def test_near_duplicates():
    rng = random.Random(3)
    bot = ("{} is a village in the municipality of {}. It had {} inhabitants at the census of {} and covers {} hectares. "
           "The climate is temperate, with warm summers and cold winters; the mean temperature is {} degrees. Most people "
           "work in agriculture.")
    pages = [(True, bot.format(words(rng, 1).title(), words(rng, 1).title(), *(rng.randrange(9999) for _ in range(4))))
             for _ in range(500)]
    pages += [(False, words(rng, rng.randrange(30, 300))) for _ in range(500)]
    rng.shuffle(pages)
    drop = c.near_duplicates(np.stack([c.minhash(text) for _, text in pages]))
    dropped = Counter(is_bot for (is_bot, _), d in zip(pages, drop) if d)
    assert dropped[False] == 0 and dropped[True] >= 490
    first = next(i for i, (is_bot, _) in enumerate(pages) if is_bot)
    assert not drop[first]                                            # the first of its kind stays
    assert c.near_duplicates(np.zeros((0, 32), np.uint16)).shape == (0,)
    assert list(c.near_duplicates(np.zeros((3, 32), np.uint16))) == [False, True, True]
    a, b, d = np.repeat([[0, 0], [0, 1], [2, 1]], 16, axis=1)         # half of b is a's, the other half is d's
    assert list(c.near_duplicates(np.stack([a, b, d]))) == [False, True, False]   # b is gone, so that d repeats nothing


def test_language_classifier():
    rng = random.Random(4)
    endings = {"aa": "en", "bb": "um", "cc": "a"}
    vocabularies = {code: [words(rng, 1) + ending for _ in range(300)] for code, ending in endings.items()}
    pages = {code: [" ".join(rng.choices(v, k=120)) for _ in range(40)] for code, v in vocabularies.items()}
    pages["aa"][:4] = pages["bb"][30:34]                              # a tenth of the sample is foreign
    classifier = c.LanguageClassifier.fit({code: texts[:25] for code, texts in pages.items()})
    for code, texts in pages.items():
        for text in texts[34:]:
            assert classifier.scores(text).argmax() == list(pages).index(code) and not classifier.is_wrong(text, code)
            assert all(classifier.is_wrong(text, other) for other in pages if other != code)
            assert not classifier.is_wrong(text, "zz")
    assert sum(classifier.is_wrong(text, "aa") for text in pages["aa"][:4]) == 4
    assert not classifier.is_wrong("", "aa")
    with pytest.raises(ValueError, match="two languages"):
        c.LanguageClassifier.fit({"aa": ["x"]})


def test_both_scripts_of_a_language_are_its_own():
    """A tenth of the Serbian sample is in Latin letters, beside a neighbour that has nothing else and four words of five in common."""
    rng = random.Random(5)
    common = [words(rng, 1) for _ in range(240)]
    latin = {"sr": common + [words(rng, 1) + "vo" for _ in range(60)], "hr": common + [words(rng, 1) + "je" for _ in range(60)]}
    pages = {code: [" ".join(rng.choices(v, k=100)) for _ in range(60)] for code, v in latin.items()}
    cyrillic = str.maketrans("abcdefghijklmnopvj", "абцдефгхијклмнопвј")
    pages["cyrillic"] = [page.translate(cyrillic) for page in pages["sr"]]
    classifier = c.LanguageClassifier.fit({"sr": pages["cyrillic"][:36] + pages["sr"][:4], "hr": pages["hr"][:40]})
    for page in pages["sr"][40:] + pages["cyrillic"][40:]:
        assert not classifier.is_wrong(page, "sr")
    assert all(classifier.is_wrong(page, "hr") for page in pages["cyrillic"][40:])
