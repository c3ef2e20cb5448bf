"""wikitext.py and wikipedia.py: what pages become, what dumps are read, what damage does."""
import bz2
import gc
import gzip
import json
import lzma
import os
import random
import re
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from wiki import languages
from wiki.languages import LANGUAGES
from wiki.wikipedia import Part, clean_cirrus, language_of, list_dumps, read_documents, split
from wiki.wikitext import clean_wikitext, is_disambiguation, is_redirect, make_siteinfo

DUMPS = Path(os.environ.get("UNIBERT_SHARED", ROOT.parent / "shared")) / "data" / "dumps"
xz_compress = partial(lzma.compress, preset=0)
needs_dumps = pytest.mark.skipif(not DUMPS.is_dir(), reason="waits for real dumps in $UNIBERT_SHARED/data/dumps")
LTG = make_siteinfo("ltg", [(-2, "Medeja"), (6, "Fails"), (14, "Kategoreja")])

# ---------------------------------------------------------------------------------------------------------------
# Pages

EXAMPLES = [
    # links
    ("The [[bus]]es of [[Riga|the capital]].", "The buses of the capital."),
    ("[[Foo#History]] and [[#Below]] and [[Terminator 2: Judgment Day]]", "Foo and Below and Terminator 2: Judgment Day"),
    ("A [[:Category:Cats|list]] [[:fr:Chat]] [[wikt:cat|cat]]", "A list Chat cat"),
    ("Text[[Category:Cats|*]]\n[[Kategoreja:Kači]]\n[[de:Katze]]\n[[zh-min-nan:Niau]]", "Text"),
    ("Text\n[[Bólkr:X]]\n[[Unknown:Y]]", "Text"),
    ("See [http://x.org/a?b=1 the site] and [https://y.org] or http://z.org/q.", "See the site and or ."),
    ("[[File:A.jpg|thumb|200px|A [[cat]] on a [http://m.org mat]]]Cats sleep.", "A cat on a mat\nCats sleep."),
    ("[[Fails:A.svg|20px]] [[Datei:B.png|mini|links|hochkant=0.9]]Text", "Text"),
    ("[[Bild:C.jpg|thumb|Ein Bild von [[Ort|einem Ort]] am [[Fluss]]]]", "Ein Bild von einem Ort am Fluss"),
    ("[[ไฟล์:X.jpg|thumb]]ก", "ก"),
    # templates
    ("Born{{efn|a {{b|{{c}}}} d}} in {{lang|la|Roma}}, {{convert|5|km|mi}} off.", "Born in Roma, 5 km off."),
    ("{{Infobox\n| a = {{b}}\n| c = [[d|e]]\n}}\n'''X''' is.", "X is."),
    ("A {{{1|default}}} b {{#if:{{{x}}}|y|z}}c", "A b c"),
    ("{{unclosed | a\n| b = c\nText stays.", "unclosed | a\nText stays."),
    ("Text }} stays {{x}} here.", "Text stays here."),
    ("'''X''' ({{lang-la|Y}}; {{IPA|z}}) and ({{a}}) and (born {{b}} in 1900, {{c}})", "X (Y) and and (born in 1900)"),
    ("{{nowrap|[[a|b]] c}}", "b c"),
    ("{{convert|5|to|6|km|mi}}, {{date|1|mai|1990|x}}, {{lang|la|2=Roma}}, {{quote|text=Said so.|source=x}}, 20{{nbsp}}km",
     "5 to 6 km, 1 mai 1990, Roma, Said so., 20 km"),
    ("{{cite web|a|title=b}}{{lang}}{{quote|x=1}}{{convert}}Text", "Text"),
    # tables, tags
    ("Before\n{| class=x\n|-\n| a || b\n{|\n| nested\n|}\n|}\nAfter", "Before\nAfter"),
    ("Before\n{| class=x\n| lost\nAfter", "Before\nAfter"),
    ("A<table><tr><td>b<table><td>c</td></table></td></tr></table>D", "A\nD"),
    ("One.<ref>note</ref> Two.<ref name=a /> Three.<ref name=\"b\">{{cite|x}}</ref>", "One. Two. Three."),
    ("One.<ref>never closed. Two.<ref>note</ref> Three.", "One.never closed. Two. Three."),
    ("A<!-- b -->c <!-- unclosed\nd", "Ac\nd"),
    ("x<math>\\frac{a}{b}</math>y <gallery>\nA.jpg|b\n</gallery>z<score>c</score>", "xy z"),
    ("<nowiki>[[a]] '' </nowiki>L<nowiki>'</nowiki>''Iliade''", "a L'Iliade"),
    ("5 < 6 and a<b>b</b><br/>c <unknown>d", "5 < 6 and ab\nc <unknown>d"),
    ("10<sup>9</sup> m<sup>-1</sup> x<sup>n</sup> H<sub>2</sub>O", "10⁹ m⁻¹ xn H2O"),
    ("<div style='x'>A</div><span>b</span><REF>c</REF>", "A\nb"),
    # quotes
    ("'''''both''''' '''bold''' ''it'' l'''Iliade'' e ''''a'''", "both bold it l'Iliade e 'a"),
    ("dell''''amico'''", "dell'amico"), ("dogs''' and ''cats", "dogs' and cats"),
    # entities, magic words, variants
    ("a&nbsp;b &amp;amp; &lt;br&gt;c &#1575;&#x644; &unknown; &#0;d", "a b &\nc ال &unknown; d"),
    ("__NOTOC__A __БЕЗ_СОДЕРЖАНИЯ__ b {{PAGENAME}}", "A b"),
    ("-{zh-hans:计算机;zh-hant:電腦}-是-{A|x}-", "计算机是x"),
    # lines and sections
    ("* one\n** two\n#three\n: four\n; term : def\n----\n= H =\nx", "one\ntwo\nthree\nfour\nterm : def\nH\nx"),
    ("Lead.\n== A ==\na\n=== B ===\n== C ==\n=== D ===\nd\n== References ==\n{{reflist}}\n* Smith, ''Book''",
     "Lead.\nA\na\nC\nD\nd"),
    ("Lead.\n== Weblinks ==\n* x\n=== sub ===\ny\n== Nachleben ==\nz", "Lead.\nNachleben\nz"),
    ("Lead.\n== Literature ==\nPoets write.\n== Literatur ==\n* A: B. 1990.", "Lead.\nLiterature\nPoets write."),
    ("Lead.\n== Literature ==\nSmith: A book. 1990.\nJones: A tale. 1985.", "Lead."),
    ("Lead.\n==Unknown heading==\n* [[A]]\n* [http://b.org B]\n==Another==\n* [[C]]\n", "Lead."),
    ("Lead.\n==Works==\n* [[A]], a book of 1900\n* [[B]]", "Lead.\nWorks\nA, a book of 1900\nB"),
    ("a\u200bb می\u200cخواهم \ufeffc", "ab می\u200cخواهم c"),
]


@pytest.mark.parametrize("wikitext, text", EXAMPLES)
def test_examples(wikitext, text):
    assert clean_wikitext(wikitext, LTG) == text


def test_redirects_and_disambiguation():
    for text in ("#REDIRECT [[A]]", "#redirect: [[A|b]]", "# ПЕРЕНАПРАВЛЕНИЕ [[А]]", "#重定向 [[甲]]", "#تحويل [[ا]]"):
        assert is_redirect(text)
    assert not is_redirect("# [[A]]\n# [[B]]") and not is_redirect("The #1 [[hit]]")
    assert is_disambiguation("A", "'''A''' is:\n* [[B]]\n{{disambig}}") and is_disambiguation("A (disambiguation)", "")
    assert is_disambiguation("A", "{{Begriffsklärung}}") and is_disambiguation("A", "{{Geo disambiguation|x}}")
    assert not is_disambiguation("A (town)", "'''A''' {{lang|la|B}} is a town.")
    assert not is_disambiguation("A", "'''A''' lies in [[B]] {{disambiguation needed|date=May 2026}}.")
    assert is_disambiguation("A", "x", "{{Infobox}}{{Disambig}}") and not is_disambiguation("A", "x" * 40_000, "{{Disambig}}")


# ---------------------------------------------------------------------------------------------------------------
# Properties, over pages drawn at random

FRAGMENTS = ["{{", "}}", "{{{", "}}}", "{|", "|}", "|-", "[[", "]]", "[", "]", "|", "||", "'", "''", "'''",
             "'''''", "<ref>", "</ref>", "<ref name=a/>", "<!--", "-->", "<nowiki>", "</nowiki>", "<math>",
             "</math>", "<table>", "</table>", "<b>", "<br>", "<", ">", "=", "==", "== H ==\n", "\n", "\n\n",
             "\n* ", "\n# ", "\n: ", "\n; ", "\n{|\n", "\n|}\n", "\n| ", " ", "  ", "&amp;", "&lt;", "&nbsp;",
             "&#91;", "&", ";", "-{", "}-", "__TOC__", "__", "http://a.b/c", "[http://a.b c]", "://",
             "File:a.jpg|thumb|", "Category:x", "de:", "#REDIRECT", "(", ")", "(;", ",)", "\x00", "\x01", "\x02",
             "\ud800", "𐍈", "word", "слово", "字", "عربي", "a.", "Word word"]


def broken_page(rng, pieces):
    return "".join(rng.choice(FRAGMENTS) for _ in range(pieces))


def whole_page(rng, depth=3):
    """Well-formed wikitext of every kind, and the words that must survive."""
    kept, dropped = [], []

    def word(shown=True):
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzäжω", k=6))
        (kept if shown else dropped).append(letters := ("k" if shown else "d") + letters)
        return letters

    def inline(depth):
        kind = rng.randrange(11) if depth else 0
        return {0: lambda: word(), 1: lambda: f"[[{word(False)}|{word()}]]", 2: lambda: f"[[{word()}]]s",
                3: lambda: f"{{{{{word(False)}|a={hidden(depth - 1)}}}}}", 4: lambda: f"'''{inline(depth - 1)}'''",
                5: lambda: f"''{inline(depth - 1)}''", 6: lambda: f"<ref name=x>{hidden(depth - 1)}</ref>",
                7: lambda: f"[http://{word(False)}.org/x {word()}]", 8: lambda: f"<!-- {word(False)} [[ -->",
                9: lambda: f"<small>{inline(depth - 1)}</small>",
                10: lambda: f"<math>{word(False)}{{x}}</math>"}[kind]()

    def hidden(depth):
        inner = f"{{{{{word(False)}|{hidden(depth - 1)}}}}}" if depth and rng.random() < 0.5 else word(False)
        return f"{inner} [[{word(False)}|{word(False)}]]"

    def sentence():
        return " ".join(inline(depth) for _ in range(8)) + f" {word()}."

    blocks = []
    for _ in range(rng.randrange(3, 12)):
        kind = rng.randrange(8)
        blocks.append({0: lambda: f"== {word()} ==\n{sentence()}", 2: sentence, 3: sentence,
                       1: lambda: f"{sentence()}\n{sentence()}\n* {sentence()}\n* {sentence()}",
                       4: lambda: f": {sentence()}\n{{{{{word(False)}}}}}",
                       5: lambda: f"{{| class=x\n|-\n! {word(False)}\n|-\n| {hidden(2)} || {hidden(1)}\n|}}",
                       6: lambda: f"[[File:{word(False)}.jpg|thumb|left|{word()} {word()} {word()}]]",
                       7: lambda: f"<gallery>\nFile:{word(False)}.jpg|{word(False)}\n</gallery>"}[kind]())
    blocks.append(f"[[Category:{word(False)}]]\n[[de:{word(False)}]]")
    return "\n\n".join(blocks), kept, dropped


def test_whole_pages_keep_their_words_and_no_markup():
    rng = random.Random(5)
    for _ in range(400):
        page, kept, dropped = whole_page(rng)
        text = clean_wikitext(page)
        assert not re.search(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|''|==|[<>|]|https?:|\n\n|  ", text), (page, text)
        words = Counter(re.findall(r"[kd][a-zäжω]{6}", text))
        assert not set(dropped) & set(words), (page, text)
        missing = Counter(kept) - words
        assert not missing, (missing, page, text)
        assert clean_wikitext(text) == text


def test_broken_pages_never_raise_and_settle():
    rng = random.Random(6)
    unsettled = 0
    for i in range(3000):
        page = broken_page(rng, rng.randrange(1, 120))
        text = clean_wikitext(page)
        assert not re.search(r"\[\[|\]\]|\{\{|\}\}|\x01|\x02", text), (page, text)
        unsettled += clean_wikitext(text) != text
    assert unsettled <= 3                             # of 3,000 pages of nothing but broken marks


LONG = ["{{", "}}", "{{a|", "[[", "]]", "[[a|", "[[File:a.jpg|", "[", "[http://a", "[http://a b ", "{|", "\n{|",
        "\n|}", "\n|", "<ref>", "<ref", "<ref name=", "<ref>a<ref/>", "</ref>", "<!--", "<", "<b", "<nowiki>",
        "<math>", "<table>", "'", "''", "'''a", "' ''", "=", "\n==", "=a", "\n=a=", "(", "( ", ")", ",)", "( )",
        ",", " ", "\n ", "\n*", "*", "&", "&amp;", "&#38;", "&lt;", "__", "__a", "-{", "-{a", "{{lang|x|",
        "http://", "http://a.", "{{{", "}}}", "{", "|", "{{a}", "[[a]", "{{nowrap|a", "\n* [[a]]", "{{a\n|b=",
        "#", ";", "\n#a [[", "ab ", "字", "a|b|"]


@pytest.mark.parametrize("unit", LONG)
def test_linear_time(unit):
    """Half a megabyte of each mark, alone and closed at its end: less than a second a megabyte of processor time, at best of three;
    on a slower machine at most 2.5 times as long as half of it, where squares would be 4 times."""
    def best(text, enough):
        gc.disable()                                      # its rounds look at all that other tests have left
        times = []
        while len(times) < 3 and (not times or min(times) >= enough):                # again only where another's load may have been measured
            start = time.process_time()
            clean_wikitext(text)
            is_redirect(text), is_disambiguation(text, text[:29_000])
            times.append(time.process_time() - start)
        gc.enable()
        return min(times)

    closing = {"{": "}", "[": "]", "<": ">"}.get(unit.strip()[:1], "x") * 3
    halves, wholes = ((page, page + closing * (len(page) // 25), "{{" + page + "}}", "[[File:x.jpg|thumb|" + page + "]]")
                      for page in (unit * (size // len(unit)) for size in (125_000, 250_000)))
    for half, text in zip(halves, wholes):
        took = best(text, len(text) / 1e6)
        assert took < len(text) / 1e6 or took < 2.5 * best(half, 0), f"{unit!r}: {took:.2f} s for {len(text):,} characters"


# ---------------------------------------------------------------------------------------------------------------
# XML dumps

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ltg">
<siteinfo><sitename>V</sitename><dbname>ltgwiki</dbname><namespaces><namespace key="0" case="first-letter" />
<namespace key="6">Attālu fails</namespace><namespace key="14">Šķira</namespace></namespaces></siteinfo>
"""


def page_xml(number, text, title=None, ns=0, redirect=False, model="wikitext"):
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return (f"<page><title>{title or f'Page {number}'}</title><ns>{ns}</ns><id>{number}</id>"
            + ('<redirect title="x" />' if redirect else "")
            + f"<revision><id>{number + 5000}</id><timestamp>2026-01-01T00:00:00Z</timestamp>"
              f"<contributor><username>U</username><id>7</id></contributor><comment>c</comment><origin>1</origin>"
              f"<model>{model}</model><format>text/x-wiki</format>"
              f'<text bytes="9" sha1="x" xml:space="preserve">{text}</text><sha1>x</sha1></revision></page>\n')


def test_old_schema_without_ns(tmp_path):
    path = tmp_path / "ltgwiki-old.xml"
    text = HEAD + page_xml(1, "a") + page_xml(2, "b", title="Šķira:B") + page_xml(3, "c", title="Star: C") + "</mediawiki>"
    path.write_text(re.sub("<ns>.*?</ns>", "", text))
    assert [d[1] for d in read(path)[0]] == ["1", "3"]


def dump_xml(count=20):
    text = "Text ž &nbsp;{0} <b>with</b> [[Link {0}|a link]].[[Attālu fails:x|5px]][[Šķira:y]]"
    pages = [page_xml(i, text.format(i)) for i in range(1, count + 1)]
    pages += [page_xml(900, "talk", ns=1), page_xml(901, "x", redirect=True), page_xml(902, "#REDIRECT [[x]]"),
              page_xml(903, "{}", model="json"), page_xml(904, "{{disambig}}"),
              page_xml(905, "lua", ns=828, model="Scribunto")]
    return HEAD + "".join(pages) + "</mediawiki>\n"


EXPECTED = [("ltg", str(i), f"Page {i}", f"Text ž {i} with a link.") for i in range(1, 21)]


def read(path, **options):
    warnings = []
    documents = [tuple(d) for d in read_documents(path, on_warning=warnings.append, **options)]
    return documents, warnings


@pytest.mark.parametrize("suffix, pack", [("", bytes), (".bz2", bz2.compress), (".gz", gzip.compress),
                                          (".xz", xz_compress)])
def test_xml_plain_and_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"ltgwiki-20260101-pages-articles.xml{suffix}"
    path.write_bytes(pack(dump_xml().encode()))
    counts = Counter()
    assert read(path, counts=counts) == (EXPECTED, [])
    assert list_dumps(path.rename(tmp_path / f"dump.xml{suffix}")) == [("ltg", tmp_path / f"dump.xml{suffix}")]
    (tmp_path / f"dump.xml{suffix}").rename(path)
    assert counts == {"article": 20, "other namespace": 2, "redirect": 2, "other content model": 1, "disambiguation": 1}
    assert read(path, limit=3) == (EXPECTED[:3], [])
    assert list_dumps(tmp_path) == [("ltg", path)]


@pytest.mark.parametrize("encoding, declared", [
    ("utf-8", ""), ("utf-8-sig", ""), ("utf-16", ""), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"),
    ("iso-8859-4", "iso-8859-4"), ("windows-1257", "windows-1257")])
def test_xml_encodings_and_prefixes(tmp_path, encoding, declared):
    text = (f'<?xml version="1.0" encoding="{declared}"?>' if declared else "") + dump_xml()
    for prefix in ("", "mw:"):
        body = re.sub(r"<(/?)(\w)", rf"<\1{prefix}\2", text).replace("xmlns=", "xmlns:mw=" if prefix else "xmlns=")
        path = tmp_path / "dump.xml"
        path.write_bytes(body.encode(encoding))
        assert read(path) == (EXPECTED, [])


@pytest.mark.parametrize("pack", [bytes, bz2.compress, gzip.compress, xz_compress])
def test_cut_off_dump_keeps_whole_pages(tmp_path, pack):
    text = dump_xml(2000)
    path = tmp_path / "ltgwiki-x.xml"
    path.write_bytes(pack(text[:text.index("<title>Page 1500<") + 200].encode()))
    documents, warnings = read(path)
    assert len(documents) == 1499
    assert len(warnings) == 1 and "cut off in page 'Page 1500'" in warnings[0] and "1,499 whole articles kept" in warnings[0]
    noise = random.Random(1).randbytes(900_000).hex()                # more than one bzip2 block
    text = text.replace("</mediawiki>", page_xml(3000, noise) + page_xml(3001, noise[::-1]) + "</mediawiki>")
    packed = pack(text.encode())
    path.write_bytes(packed[:len(packed) * 2 // 3])
    documents, warnings = read(path)
    assert len(warnings) == 1 and "cut off" in warnings[0] and "\n" not in warnings[0]
    assert len(documents) in (2000, 2001)


@pytest.mark.parametrize("pack, name", [(bz2.compress, "bzip2"), (gzip.compress, "gzip"), (xz_compress, "xz")])
def test_damaged_compression(tmp_path, pack, name):
    rng = random.Random(1)
    words = [f"{rng.getrandbits(60):x}" for _ in range(3000)]
    text = HEAD + "".join(page_xml(i, " ".join(rng.choices(words, k=300))) for i in range(1, 400)) + "</mediawiki>"
    packed = bytearray(pack(text.encode()))
    packed[len(packed) // 2:len(packed) // 2 + 40] = bytes(40)
    path = tmp_path / "ltgwiki-x.xml"
    path.write_bytes(packed)
    documents, warnings = read(path)
    assert 0 < len(documents) < 399 and len(warnings) == 1
    assert "damaged" in warnings[0] or "no XML" in warnings[0]      # gzip finds out at the end, expat before
    path.write_bytes(pack(text.encode())[:6] + bytes(500))
    with pytest.raises(ValueError, match=f"{name} data"):
        read(path)


def test_bombs_are_bounded(tmp_path):
    blank = bytes(1 << 24).replace(b"\0", b" ")
    packed = bz2.compress(HEAD.encode()) + bz2.compress(blank) * 12
    path = tmp_path / "ltgwiki-x.xml.bz2"                            # 192 MiB of blanks in a few kB
    path.write_bytes(packed)
    start = time.process_time()
    documents, warnings = read(path)
    assert len(packed) < 5000 and not documents and len(warnings) == 1 and time.process_time() - start < 15
    assert "no end of a page" in warnings[0] or "compresses so well" in warnings[0]
    line = tmp_path / "ltgwiki_content-x.json.gz"
    line.write_bytes(gzip.compress(b'{"index":{"_id":1}}\n{"title":"a","text":"') + gzip.compress(blank) * 6)
    documents, warnings = read(line)
    assert not documents and len(warnings) == 1 and "a line of more than" in warnings[0]
    entities = "".join(f'<!ENTITY {b} "{f"&{a};" * 6}">' for a, b in zip("abcdefghij", "bcdefghijk"))
    path = tmp_path / "lol.xml"
    path.write_text('<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">' + entities + "]><mediawiki><page><title>&k;</title></page></mediawiki>")
    documents, warnings = read(path)
    assert not documents and "document type" in warnings[0]


def test_what_is_no_dump(tmp_path):
    for data in (b"", b"hello", b"\x89PNG", gzip.compress(b"plain text"), b"BZh9"):
        path = tmp_path / "a.xml"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.xml"):
            read(path)
    path.write_text("<html><p>no dump</p></html>")
    assert read(path) == ([], [])
    path.write_text("<html><p>no dump")
    assert read(path)[1] == [f"{path}: cut off between pages; 0 whole articles kept"]
    with pytest.raises(OSError):
        read(tmp_path / "missing.xml")


def test_xml_that_is_no_mediawiki(tmp_path):
    path = tmp_path / "ltgwiki-x.xml"
    for encoding in ("foo-bar", "shift_jis", "rot13"):
        path.write_text(f'<?xml version="1.0" encoding="{encoding}"?>{HEAD}{page_xml(1, "a")}</mediawiki>')
        assert [line for line in read(path)[1] if "an encoding that cannot be read" in line]
    for odd in ("<page><title>A</title><page><title>B</title></page></page>", "<title>A</title><id>3</id>",
                "<dbname><id>1</id></dbname>"):
        path.write_text(HEAD + odd + page_xml(1, "a") + "</mediawiki>")
        documents, warnings = read(path)
        assert documents[-1] == ("ltg", "1", "Page 1", "a") and not warnings
    for code in ("../../x", "", "x/y"):                              # files are named by what a dump says it is
        path = tmp_path / "dump.xml"
        path.write_text(f'<mediawiki xml:lang="{code}">{page_xml(1, "a")}</mediawiki>')
        assert list_dumps(path) == [("", path)]


INDEX = "ltgwiki-20260101-pages-articles-multistream-index.txt.bz2"


def multistream(folder, pages=200, at_once=10):
    """A multistream dump and its index, as Wikimedia writes them."""
    path = folder / "ltgwiki-20260101-pages-articles-multistream.xml.bz2"
    streams, index = [bz2.compress(HEAD.encode())], []
    for start in range(1, pages + 1, at_once):
        offset = sum(map(len, streams))
        index += [f"{offset}:{i}:Page: {i}" for i in range(start, start + at_once)]
        stream = "".join(page_xml(i, f"Text {i} [[Attālu fails:x|5px]].") for i in range(start, start + at_once))
        streams.append(bz2.compress(stream.encode()))
    streams.append(bz2.compress(b"</mediawiki>"))
    path.write_bytes(b"".join(streams))
    path.with_name(INDEX).write_bytes(bz2.compress("\n".join(index).encode()))
    return path


def test_a_multistream_dump_is_cut_where_its_index_says(tmp_path):
    path = multistream(tmp_path)
    whole = read(path)[0]
    assert whole == [("ltg", str(i), f"Page {i}", f"Text {i} .") for i in range(1, 201)]
    for pieces in (2, 3, 7):
        parts = split(path, pieces)
        assert len(parts) == pieces and [d for part in parts for d in read(part)[0]] == whole
    assert list_dumps(tmp_path) == [("ltg", path)]                   # the index is none
    unnamed = [part._replace(language="") for part in split(path, 3)]
    assert [d for part in unnamed for d in read(part)[0]] == whole   # each part knows what the head says
    index = path.with_name(INDEX)
    for bad in (b"not bzip2", bz2.compress(b"x:y:z"), bz2.compress(b"400:1:a\n900:2:b\n1500:3:c\n4000:4:d")):
        index.write_bytes(bad)
        assert split(path, 3) == [Part(path, "ltg")]                 # an index that does not fit is not believed


# ---------------------------------------------------------------------------------------------------------------
# CirrusSearch dumps

def cirrus_lines(count, old=False):
    for i in range(1, count + 1):
        index = {"_type": "page", "_id": str(i)} if old else {"_id": i}
        page = {"namespace": 0, "title": f"Page {i}", "text": f"Text &amp; more {i}.", "opening_text": f"Lead {i}.",
                "template": ["Template:Infobox"], "category": [], "redirect": [], "timestamp": "2026-01-01T00:00:00Z"}
        yield json.dumps({"index": index})
        yield json.dumps(page if old else page | {"page_id": i, "wiki": "rowiki"}, ensure_ascii=False)
    for extra in ({"namespace": 4}, {"template": ["Template:Disambig"]}, {"content_model": "json"}):
        yield json.dumps({"index": {"_id": 99}})
        yield json.dumps({"namespace": 0, "title": "t", "text": "x"} | extra)


@pytest.mark.parametrize("old", [False, True])
def test_cirrus(tmp_path, old):
    path = tmp_path / "rowiki_content-20260105-00000.json.bz2"
    path.write_bytes(bz2.compress("\n".join(cirrus_lines(50, old)).encode()))
    counts = Counter()
    documents, warnings = read(path, counts=counts)
    assert documents == [("ro", str(i), f"Page {i}", f"Text & more {i}.") for i in range(1, 51)] and not warnings
    assert counts == {"article": 50, "other namespace": 1, "disambiguation": 1, "other content model": 1}
    assert read(path, opening_text=True, limit=1)[0] == [("ro", "1", "Page 1", "Lead 1.")]


def test_cirrus_damage(tmp_path):
    lines = list(cirrus_lines(50))
    path = tmp_path / "rowiki_content-20260105-00000.json"
    for bad in ("{", "[1, 2]", "null", '{"title": 5, "text": "x"}', '{"title": "x", "text": ["x"]}', '{"template": [1]}',
                '{"title": "x", "namespace": 0, "text": "unfinished', "[" * 100_000):
        path.write_text("\n".join(lines[:21] + [bad] + lines[22:]))
        documents, warnings = read(path)
        assert [d[1] for d in documents] == [str(i) for i in range(1, 51) if i != 11]      # the others stay
        assert len(warnings) == 1 and "1 of 106 lines are no CirrusSearch documents, line 22 first" in warnings[0]
    path.write_text("\n".join(lines)[:3000])
    assert len(read(path)[1]) == 1
    path.write_text("\n".join(lines[:21] + ["{}}"] * 1000 + lines[22:]))
    documents, warnings = read(path)
    assert len(documents) == 10 and len(warnings) == 1 and "101 of" in warnings[0]


def test_cirrus_oddities(tmp_path):
    path = tmp_path / "dump.json"
    page = {"title": "half \ud800 a pair", "text": "a pair \U0001F600, half of one \udc00"}
    path.write_text('{"index": {"_id": 7}}\r\n\r\n' + json.dumps(page | {"language": "ro"}) + "\r\n")
    (document,), warnings = read(path)
    assert document == ("ro", "7", "half ? a pair", "a pair \U0001F600, half of one ?") and not warnings
    raw = json.dumps({"title": "a", "text": "x? y", "language": "ro"}).encode().replace(b"?", b"\xed\xa0\xbd")
    path.write_bytes(raw)                                            # half a pair that no backslash announces
    assert read(path)[0][0][3] == "x? y"
    for template, kept in (("Module:Disambiguation", 1), ("Модуль:Disambiguation", 1), ("Modul:Disambig/x", 1),
                           ("Modèle:Disambiguation", 0), ("Template:Disambig", 0), ("Template:Disambiguation needed", 1)):
        path.write_text(json.dumps({"title": "a", "text": "b", "template": [template]}))
        assert len(read(path)[0]) == kept, template
    path.write_text('{ "index": {"_id": 8} }\n{"title": "a", "text": "b"}')
    assert read(path) == ([("", "8", "a", "b")], [])                 # blanks where the server writes none
    for language in ("../../x", ["ro"], 5, None):                    # files are named by it
        path.write_text(json.dumps(page | {"language": language}))
        assert read(path)[0][0][0] == "" and list_dumps(path) == [("", path)]


def test_cirrus_reference_list():
    body = "The house is old. It has a roof ^ not a flat one. " * 20
    assert clean_cirrus(body + "↑ Smith 1990. ↑ a b Jones. ↑ Third source, p. 5.") == body.strip()
    assert clean_cirrus(body + "^ a b c Smith 1990. ^ Jones. ^ Third source, p. 5.").startswith(body[:100])
    assert clean_cirrus(body) == body.strip()
    two = body + "↑ Smith 1990. ↑ Jones."
    assert clean_cirrus(two) == two                                  # arrows of the text, no list


# ---------------------------------------------------------------------------------------------------------------
# Names, real dumps

def test_languages():
    assert len(LANGUAGES) == 107 and LANGUAGES["ceb"].bot_written and not LANGUAGES["ro"].bot_written
    assert LANGUAGES["ja"].scripts == ("Han", "Hiragana", "Katakana") and LANGUAGES["no"].name == "Norwegian Bokmål"
    for name, code in (("rowiki-20260101-pages.xml", "ro"), ("zh_min_nanwiki_content-1.json", "zh-min-nan"),
                       ("simplewiki-x", "simple"), ("enwiktionary-x", ""), ("tinywiki-x", ""), ("wikidatawiki-x", ""), ("enwiki", "en")):
        assert language_of(name) == code


def test_words_of_the_tables_are_written_as_pages_write_them():
    """In lower case, composed, and in one script; but for Japanese, and Chuvash, which once borrowed Latin letters."""
    for word in languages.FILE_NAMESPACES | languages.CATEGORY_NAMESPACES | languages.DISAMBIGUATION | languages.REFERENCE_HEADINGS:
        scripts = {unicodedata.name(c).split()[0] for c in word if unicodedata.category(c) == "Lo"} - {"HIRAGANA", "KATAKANA"}
        assert word == unicodedata.normalize("NFC", word.lower()).strip() and len(scripts) <= 1, word


@needs_dumps
def test_whole_latgalian_wiki():
    counts = Counter()
    documents = list(read_documents(DUMPS / "ltgwiki_full" / "ltgwiki-latest-pages-articles.xml", counts=counts))
    assert counts == {"article": 896, "redirect": 147, "disambiguation": 7, "other namespace": 954}   # of 2,004
    text = "\n".join(d.text for d in documents)
    assert {d.language for d in documents} == {"ltg"} and 550_000 < len(text) < 700_000
    for mark, most in (("{{", 0), ("}}", 0), ("[[", 0), ("]]", 0), ("''", 0), ("==", 2), ("|", 5), ("<", 20), (">", 20)):
        assert text.count(mark) <= most, (mark, text.count(mark))
    assert not re.search(r"^Kategoreja:", text, re.MULTILINE)


@needs_dumps
def test_utf16_bulgarian_dump():
    documents, warnings = read(DUMPS / "gensim_pypi" / "bgwiki-latest-pages-articles-shortened.xml.bz2")
    assert documents and {d[0] for d in documents} == {"bg"} and all(re.search("[а-я]{4}", d[3]) for d in documents)


@needs_dumps
def test_truncated_ukrainian_dump():
    documents, warnings = read(DUMPS / "truncated" / "ukwiki-20230501-truncated-100k.xml.xz")
    assert len(documents) == 509 and len(warnings) == 1 and "cut off in page '1702'" in warnings[0]
    marks = sum(d[3].count(mark) for d in documents for mark in ("{{", "}}", "[[", "]]", "''"))
    assert marks == 0


@needs_dumps
def test_every_dump_there_is_can_be_read():
    found = Counter()
    for language, path in list_dumps(DUMPS / "dbpedia_minidumps"):
        documents, warnings = read(path)
        assert documents and not warnings and all(d[0] == language for d in documents)
        found[language] += len(documents)
    assert len(found) >= 40
