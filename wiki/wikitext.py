"""Wikitext to plain text, in time linear in the page, without a parser library.

`clean_wikitext(text, siteinfo)` returns the prose of a page: one paragraph, list item, heading or caption a line, no
blank lines, no markup. It never raises, whatever the page looks like.

The page goes through a fixed sequence of passes, each of which reads it once:

    entities -> comments and <tags> -> {{templates}} -> {| tables |} -> [links] -> lines, quotes and sections

Nesting is handled with an explicit stack (templates, tables) or a fixed number of innermost-first passes (links:
only a file's caption may hold a link). No regular expression here can backtrack over more than the stretch up to the
next bracket, and no search for a closing tag is repeated, which is what keeps a page of 100,000 `{{` or `<ref>`
linear.

Markup is resolved as MediaWiki does where that is cheap, and read kindly where a page is broken: an unclosed template,
table or reference costs its brackets, not the rest of the article.
"""
import html.entities
import re
from typing import NamedTuple

from wiki.languages import CATEGORY_NAMESPACES, DISAMBIGUATION, FILE_NAMESPACES, REFERENCE_HEADINGS


class SiteInfo(NamedTuple):
    """What the cleaner must know about a wiki: its language code and the lower-case names of two namespaces."""
    language: str = ""
    files: frozenset = FILE_NAMESPACES
    categories: frozenset = CATEGORY_NAMESPACES


def make_siteinfo(language, namespaces=()):
    """`SiteInfo` of a wiki from the (key, name) pairs of its dump's <namespaces>: -2 and 6 files, 14 categories."""
    names = {key: {name.lower().replace("_", " ") for k, name in namespaces if k == key} for key in (-2, 6, 14)}
    return SiteInfo(language, FILE_NAMESPACES | names[-2] | names[6], CATEGORY_NAMESPACES | names[14])


# ---------------------------------------------------------------------------------------------------------------------
# Whole-page questions

_REDIRECT = re.compile(r"\s*#\s*[^\s\[\]#*{}|<>]{2,40}\s*:?\s*\[\[[^\[\]\n]+\]\]")
_TEMPLATE_NAME = re.compile(r"\{\{\s*([^|{}<>\n]{1,60})")


def is_redirect(text):
    """True for `#REDIRECT [[target]]` in any language: a page that is one such line and little besides."""
    head = text[:300].lstrip()
    return head.startswith("#") and len(text) < 2000 and _REDIRECT.match(head) is not None


def is_disambiguation(title, text, templates=None):
    """True where the title's suffix or a template says that a page (under 30,000 characters) lists meanings.
    templates: "{{a}}{{b}}", where the text does not hold them."""
    if title.endswith((")", "）")):
        suffix = title[:-1].replace("（", "(").rpartition("(")[2]
        if suffix.lower() in DISAMBIGUATION:
            return True
    if len(text) > 30_000:
        return False
    if "__DISAMBIG__" in text:
        return True
    for name in _TEMPLATE_NAME.findall(text if templates is None else templates):
        name = name.strip().lower().replace("_", " ")
        if name.endswith(" needed") or "/" in name:              # a link in an article that leads to one; a list of such templates
            continue
        if name in DISAMBIGUATION or name.startswith(("disambig", "desambig")) or name.endswith(" disambiguation"):
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Characters

_LINK_MARK = "\x01"      # before an outside link and a list item that is only a link, until `_sections`
_APOSTROPHE = "\x02"     # an apostrophe inside <nowiki>, which must not become a quote mark
_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+")
_ENTITY = re.compile(r"&(#[0-9]{1,8}|#[xX][0-9a-fA-F]{1,7}|[a-zA-Z][a-zA-Z0-9]{1,31});")
# Invisible characters that carry no meaning. The joiners U+200C and U+200D do (Persian, Indic scripts) and stay.
_INVISIBLE = "\u200b\u200e\u200f\u2060\ufeff\u00ad\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffc"
_SPACES = "\t\r\u00a0\u2009\u200a\u202f\u2002\u2003\u2005\u3000\u2028\u2029\x85\x0b\x0c"


def _entity(match):
    name = match.group(1)
    if name[0] != "#":
        return html.entities.html5.get(name + ";", match.group())
    number = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
    if number in (9, 10) or 32 <= number < 127 or 160 <= number < 0xD800 or 0xE000 <= number < 0x110000:
        return chr(number)
    return " "


def decode_entities(text):
    """HTML entities to characters; `&amp;amp;lt;` (escaped twice or more) becomes `<` too."""
    if "&" not in text:
        return text
    return _ENTITY.sub(_entity, _AMPERSANDS.sub("&", text))


# ---------------------------------------------------------------------------------------------------------------------
# Comments and tags

_TAG = re.compile(r"<(?:(!--)|(/?)([a-zA-Z][a-zA-Z0-9]*)((?:\s[^<>]*|\s*/)?)>)")
_DROPPED_TAGS = frozenset("""ref references gallery math chem ce score timeline syntaxhighlight source imagemap hiero
pre graph mapframe maplink inputbox categorytree templatedata includeonly indicator style script dynamicpagelist phonos
""".split())
_BREAKING_TAGS = frozenset("""br p div li ul ol dl dd dt hr blockquote center poem h1 h2 h3 h4 h5 h6 section caption tr
""".split())
_PLAIN_TAGS = frozenset("""b i u s em strong small big sub sup span font tt code kbd samp var cite q abbr dfn del ins
strike a bdi bdo ruby rb rt rp rtc rbc mark time data wbr
nowiki noinclude onlyinclude translate tvar languages templatestyles
td th thead tbody tfoot col colgroup nobr noscript img figure figcaption ref references gallery math pre poem label
charinsert lang includeonly main article aside header footer""".split())
_CLOSING = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in _DROPPED_TAGS | {"nowiki"}}
_NESTED_REF = re.compile(r"<ref(?:\s[^<>]*[^<>/]|\s*)>", re.IGNORECASE)
_POWER = re.compile(r"([-−–+]?\d{1,4})</sup>", re.IGNORECASE)
_SUPERSCRIPTS = str.maketrans("0123456789-−–+", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻⁻⁺")
_NOWIKI_MARKUP = re.compile(r"[\[\]{}|<>]|''+|^[*#:;=]+", re.MULTILINE)


def _strip_tags(text):
    """Comments out; references, formulas, galleries, code with content out; other known tags out; tables to {| |}."""
    out, done, position, closing = [], 0, 0, {}
    search = _TAG.search
    while True:
        tag = search(text, position)
        if tag is None:
            break
        start, position = tag.span()
        if tag.group(1):                                        # comment; an unclosed one costs its line
            end = closing.get("!") or 0
            if 0 <= end < position:
                end = closing["!"] = text.find("-->", position)
            out.append(text[done:start])
            if end < 0:
                end = text.find("\n", position)
                done = position = len(text) if end < 0 else end
            else:
                done = position = end + 3
            continue
        name = tag.group(3).lower()
        replacement = ""
        if name in _CLOSING and not tag.group(2) and not tag.group(4).endswith("/"):
            # The position of the next closing tag is kept: looking for it again from each opening one is quadratic.
            end = closing.get(name, (0, 0))
            if end is not None and end[0] < position:
                match = _CLOSING[name].search(text, position)
                end = closing[name] = match and match.span()
            nested = end and name == "ref" and _NESTED_REF.search(text, position, end[0])
            if end and not nested:                              # a <ref> in a <ref>: the outer one was never closed
                if name == "nowiki":
                    replacement = _NOWIKI_MARKUP.sub("", text[position:end[0]].replace("'", _APOSTROPHE))
                position = end[1]
        elif name == "sup" and (power := _POWER.match(text, position)):
            replacement = power.group(1).translate(_SUPERSCRIPTS)               # 10<sup>9</sup> is not 109
            position = power.end()
        elif name == "table":
            replacement = "\n|}\n" if tag.group(2) else "\n{|\n"
        elif name in _BREAKING_TAGS:
            replacement = "\n"
        elif name not in _PLAIN_TAGS and name not in _DROPPED_TAGS:
            continue                                            # "<unknown>" is text
        out.append(text[done:start])
        if replacement:
            out.append(replacement)
        done = position
    out.append(text[done:])
    return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# Templates and tables

# Templates whose text belongs to the sentence: how many of their unnamed arguments are skipped and how many are shown,
# or the characters shown.
_SHOWN_ARGUMENTS = {
    **dict.fromkeys("""nowrap nobr nobold nobreak small big smaller larger abbr tooltip comment quote blockquote cquote
        citation bloc formatnum nts text noitalic sc script gras italique ill iw interlanguage link lien нп число flag
        angbr keypress railgauge nihongo val""".split() + ["не перекладено", "не переведено"], (0, 1)),
    **dict.fromkeys("lang langue langx lang2 transl translit transliteration".split(), (1, 1)),
    **dict.fromkeys("convert cvt unité unit nombre".split(), (0, 2)),
    **dict.fromkeys("date дата".split(), (0, 3)),
}
_SHOWN_TEXT = {"'": "'", "'s": "'s", "!": "|", "=": "=", "ndash": "–", "snd": " – ", "spaced ndash": " – ", "spd": " – ",
               "-": " – ", "mdash": "—", "mdashb": "—", "nbsp": " ", "·": " · ", "•": " • ", "okina": "ʻ", "hamza": "ʼ",
               "градус цельсія": "°C", "градус цельсия": "°C"}
_RANGES = frozenset(("to", "and", "or", "by", "x", "-", "–"))
_LABELLED = re.compile(r"\[\[[^\[\]|:]*\|([^\[\]|]*)\]\]")
_NAMED = re.compile(r"\s*([^\W\d]\w*)\s*=")


def _show_template(body):
    """The visible text of a template, given what stands between its braces; "" for most."""
    name, _, rest = body.partition("|")
    name = name.strip().lower().replace("_", " ")
    if name in _SHOWN_TEXT:
        return _SHOWN_TEXT[name]
    if name.startswith("formatnum:"):
        return name[10:].strip()
    skipped, shown = _SHOWN_ARGUMENTS.get(name) or ((0, 1) if name.startswith("lang-") else (0, 0))
    if not shown:
        return ""
    if "[[" in rest:                                            # the pipe of a link does not separate arguments
        rest = _LABELLED.sub(r"\1", rest)
    unnamed = []
    for argument in rest.split("|"):
        named = _NAMED.match(argument)
        if named is None:
            unnamed.append(argument.strip().removeprefix(f"{len(unnamed) + 1}="))
        elif named.group(1) in ("text", "quote", "texte"):
            return argument[named.end():].strip()
    if shown == 2 and unnamed[1:2] and unnamed[1] in _RANGES:   # {{convert|5|to|6|km}}
        shown = 4
    return " ".join(argument for argument in unnamed[skipped:skipped + shown] if argument)


def _strip_templates(text):
    """`{{...}}` out, however deeply nested, but for the text of those in `_SHOWN_*`. Unpaired braces stay."""
    closing = text.find("}}")
    if closing < 0:
        return text
    opening = text.find("{{")
    out, marks, done = [], [], 0
    while closing >= 0:
        if 0 <= opening < closing:
            out.append(text[done:opening])
            marks.append((len(out), opening))
            done = opening + 2
            opening = text.find("{{", done)
            continue
        braces = 2
        if marks:
            mark, start = marks.pop()
            out.append(text[done:closing])
            # Of bodies with a template inside only short ones are shown: text nested n deep is not copied n times.
            pieces = out[mark:mark + 20]
            body = "".join(pieces) if sum(map(len, pieces)) < (20_000 if len(pieces) == 1 else 500) else ""
            complete = mark + 20 >= len(out)
            del out[mark:]
            if complete and (shown := _show_template(body)):
                out.append(shown)
            if text.startswith("{{{", start) and text.startswith("}}}", closing):
                braces = 3                                      # {{{parameter}}}
        else:
            out.append(text[done:closing])
        done = closing + braces
        closing = text.find("}}", done)
        if 0 <= opening < done:
            opening = text.find("{{", done)
    out.append(text[done:])
    return "".join(out)


def _starts_line(text, position):
    """True where only blanks and list marks (at most 15) stand between the line's start and `position`."""
    before = text[max(0, position - 16):position].rstrip(" \t:*#;")
    return before.endswith("\n") or (not before and position < 16)


def _strip_tables(text):
    """`{| ... |}` out, nested ones too. A table that is never closed stays, for `_sections` to drop its rows."""
    opening = text.find("{|")
    if opening < 0:
        return text
    closing = text.find("|}")
    out, marks, done = [], [], 0
    while opening >= 0 or closing >= 0:
        if closing < 0 or 0 <= opening < closing:
            if _starts_line(text, opening):
                out.append(text[done:opening])
                marks.append(len(out))
                done = opening
            opening = text.find("{|", opening + 2)
        else:
            if marks and _starts_line(text, closing):
                del out[marks.pop():]
                done = closing + 2
            closing = text.find("|}", closing + 2)
    out.append(text[done:])
    for mark in marks:
        out[mark] = out[mark].partition("\n")[2]                # the line of {| holds its attributes
    return "".join(out)


# ---------------------------------------------------------------------------------------------------------------------
# Links

_URL = re.compile(r"(?:https?|ftp)://[^\s\[\]<>\"|{}]*[^\s\[\]<>\"|{}.,;:!?)'«»]")
_OUTSIDE_LINK = re.compile(r"\[(?:(?:https?|ftp|irc|news|git|mailto|tel|magnet):|//)[^\s\[\]<>]*"
                           r"((?:[ \t<>][^\[\]\n]*)?)\]", re.IGNORECASE)
_INSIDE_LINK = re.compile(r"\[\[([^\[\]|]*)(?:\|([^\[\]]*))?\]\]")
_LINK_ITEM = re.compile(r"\n[*#]+ *(?=\[\[[^\[\]\n]*\]\][ .,;]*(?:\n|\Z))")
_LANGUAGE_PREFIX = re.compile(r"(?:[a-z]{2,3}(?:-[a-z-]{1,12})?|simple)\Z")
_INTERPROJECT = frozenset("mw wmf doi rfc wikt cat".split())
_MEDIA_FILE = re.compile(r"\.(?:jpe?g|png|svg|gif|tiff?|og[agv]|webm|webp|wav|mp3|pdf|djvu|mid|xcf)\Z", re.IGNORECASE)
_FILE_OPTION = re.compile(r"[\w-]{2,20}\s*=|[0-9x ]+\w{2,4}\Z")
_VARIANT = re.compile(r"-\{([^{}]*)\}-")


def _caption(options):
    """The caption among a file link's options, on a line of its own; "" where the last is a size, side or word."""
    caption = options.rpartition("|")[2].strip()
    if len(caption) < 12 or (caption.isascii() and caption.count(" ") < 2):
        return ""
    if len(caption) < 60 and _FILE_OPTION.match(caption):
        return ""
    return f"\n{caption}\n"


def _link_renderer(siteinfo):
    files, categories = siteinfo.files, siteinfo.categories

    def render(match):
        target, label = match.groups()
        if ":" not in target:
            return label or target.partition("#")[0] or target[1:]
        prefix, _, name = target.partition(":")
        prefix = prefix.strip().replace("_", " ")
        lower = prefix.lower()
        if lower in files or (prefix and _MEDIA_FILE.search(name.rstrip())):
            return _caption(label) if label else ""
        if lower in categories or (_LANGUAGE_PREFIX.match(prefix) and prefix not in _INTERPROJECT):
            return ""                                           # [[Category:X]], [[de:X]]
        if label:
            return label
        if not prefix or prefix.islower():                      # [[:Category:X]], [[wikt:X]]
            return name.rpartition(":")[2]
        text, (start, end) = match.string, match.span()
        if name[:1] != " " and text[start - 1:start] == "\n" and text[end:end + 1] in ("\n", ""):
            return ""                                           # alone on its line: a category in an unknown language
        return target                                           # [[Terminator 2: Judgment Day]]

    return render


def _strip_links(text, siteinfo):
    """Links to what a reader sees of them; innermost first, three rounds for captions that hold links."""
    if "[" in text:
        text = _LINK_ITEM.sub(rf"\g<0>{_LINK_MARK}", text)
        render = _link_renderer(siteinfo)
        for _ in range(3):
            text = _OUTSIDE_LINK.sub(lambda match: _LINK_MARK + match.group(1).lstrip(" \t*#:;|="), text)
            text, count = _INSIDE_LINK.subn(render, text)
            if not count or "[[" not in text:
                break
    if "://" in text:
        text = _URL.sub(_LINK_MARK, text)
    return text


def _variant(match):
    """One spelling out of a language converter's `-{zh-hans:x; zh-hant:y}-`; nothing of its hidden rules."""
    flags, bar, rules = match.group(1).rpartition("|")
    if bar and set(flags) & set("HTD-"):
        return ""
    spelling = rules.partition(";")[0]
    code, colon, rest = spelling.partition(":")
    return (rest if colon and code.strip().replace("-", "").isascii() else spelling).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Lines

_QUOTES = re.compile("''+")
_MAGIC = re.compile(r"__[^\W\d_]\w{2,40}?__")
_MARKUP_LEFT = re.compile(r"\[\[(?:[^\[\]|\n]{0,200}\|)*|\]\]|\{\{+|\}\}+|\{\||\|\}")
_BRACKET_RUN = re.compile(r"[(（][()（） ,;:،؛、，；–-]*")
_BEFORE_CLOSING = re.compile(r"(?<![ ,;])[ ,;]+\)")            # looking back keeps a long run of commas linear
_LINE_START = frozenset("*#:;|!={} \t-")


def _strip_quotes(line):
    """Bold and italic marks out of a line, apostrophes next to them kept, as MediaWiki pairs them.

    Where the line has an odd number of both bold and italic marks, one triple mark was an apostrophe and a double one:
    that after a one-letter word (as in Italian `l` + triple mark + `Iliade`) if there is one, or else the first.
    """
    if "''" not in line:
        return line
    runs = [(match.start(), match.end() - match.start()) for match in _QUOTES.finditer(line)]
    bold = sum(length != 2 for _, length in runs)
    italic = sum(length == 2 or length > 4 for _, length in runs)
    apostrophes = {start for start, length in runs if length == 4 or length > 5}
    if bold % 2 and italic % 2:
        threes = [start for start, length in runs if length == 3]
        single = [s for s in threes if s > 0 and line[s - 1] != " " and (s == 1 or not line[s - 2].isalnum())]
        if threes:
            apostrophes.add((single or threes)[0])
    if not apostrophes:
        return _QUOTES.sub("", line)
    return _QUOTES.sub(lambda match: "'" if match.start() in apostrophes else "", line)


def _tidy_brackets(match):
    """`( ; born` -> `(born`, `( )` -> nothing: what is left of brackets whose templates are gone."""
    run = match.group()
    if len(run) == 1:
        return run
    kept = []
    for character in run:
        if character in ")）":
            index = len(kept) - 1
            while index >= 0 and kept[index] not in "(（)）":
                index -= 1
            if index >= 0 and kept[index] in "(（":
                del kept[index:]
                continue
        kept.append(character)
    index = len(kept)
    while index and kept[index - 1] not in "(（)）":
        index -= 1
    if index and kept[index - 1] in "(（":
        kept[index:] = "".join(kept[index:]).lstrip(" ,;:،؛、，；")
    return "".join(kept)


_PROSE, _ITEM, _LINK = range(3)
_YEAR = re.compile(r"\b(?:1[5-9]|20)\d\d\b")
_CONJUNCTION = re.compile(r" (?:and|und|et|y|e|i|och|og|en|ve|in|a|ja|és|dan|și|eta|ir|un|і|и|та|й|و|और|ও|와|및) |"
                          r", | ?/ ?| & |、|と|和|与")


def _holds_references(title, body, kinds):
    """Whether a section is one of references by its heading, or all parts of it ("Sources and literature"), and by
    what is in it: list items, or lines with a year. "Literature" may also be prose about poets."""
    title = title.lower().rstrip(" :")
    if title not in REFERENCE_HEADINGS and not all(part in REFERENCE_HEADINGS for part in _CONJUNCTION.split(title)):
        return False
    prose = sum(kind == _PROSE and not _YEAR.search(line) for line, kind in zip(body, kinds))
    return 2 * prose <= len(body)


def _sections(text):
    """The kept lines of a page: lists and indents unmarked, rows of broken tables out, sections of references out.

    A section is cut by its heading (`REFERENCE_HEADINGS`, with its subsections), or by its form: the last sections
    of a page as long as most of their lines are list items that start with an outside link, are nothing but a link,
    or name an ISBN. A heading with nothing under it goes too.
    """
    body, kinds = [], []
    sections = [(0, "", body, kinds)]
    for line in text.split("\n"):
        if not line:
            continue
        kind = _PROSE
        if line[0] in _LINE_START:
            line = line.strip()
            if not line:
                continue
            first = line[0]
            if first == "=":
                title = line.strip("=")
                level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")), 6)
                title = _strip_quotes(title.replace(_LINK_MARK, "")).lstrip("*#:;|= \t").rstrip()
                if title and level:
                    body, kinds = [], []
                    sections.append((level, title, body, kinds))
                    continue
                line = title
            elif first == "|" or line.startswith("{|") or (first == "!" and ("!!" in line or "|" in line)):
                continue
            elif first in "*#:;":
                line = line.lstrip("*#:; \t")
                kind = _LINK if line.startswith(_LINK_MARK) or "ISBN" in line else _ITEM
                line = line.removeprefix("- ")
            elif line.startswith("----"):
                line = line.lstrip("- ")
        if _LINK_MARK in line:
            line = line.replace(_LINK_MARK, "")
        line = _strip_quotes(line)
        if "(" in line or "（" in line:
            line = _BRACKET_RUN.sub(_tidy_brackets, line)
            if " )" in line or ",)" in line or ";)" in line:    # "(born 1900, )"
                line = _BEFORE_CLOSING.sub(")", line)
        line = line.strip()
        if line and line[0] in "*#:;|=":                        # what stood behind quotes or other marks
            line = line.lstrip("*#:;|= \t")
        if line:
            body.append(line)
            kinds.append(kind)

    while len(sections) > 1:
        _, title, body, kinds = sections[-1]
        if body and 2 * kinds.count(_LINK) <= len(body) and not _holds_references(title, body, kinds):
            break
        sections.pop()
    lines, pending, cut = [], [], 7
    for level, title, body, kinds in sections:
        if level > cut:
            continue
        cut = 7
        if level:
            if _holds_references(title, body, kinds):
                cut = level
                continue
            while pending and pending[-1][0] >= level:
                pending.pop()
            pending.append((level, title))
        if body:                                                # only now is it known that the headings have text
            lines += [title for _, title in pending]
            lines += body
            pending = []
    return "\n".join(lines)


def _clean_once(text, siteinfo):
    text = decode_entities(text)
    if "<" in text:
        text = _strip_tags(text)
    text = _strip_templates(text)
    text = _strip_tables(text)
    if "-{" in text:
        text = _VARIANT.sub(_variant, text)
    text = _strip_links(text, siteinfo)
    if "__" in text:
        text = _MAGIC.sub("", text)
    text = _MARKUP_LEFT.sub("", text)
    for character in _SPACES:
        text = text.replace(character, " ")
    for character in _INVISIBLE:
        text = text.replace(character, "")
    text = _sections(text)
    while "  " in text:
        text = text.replace("  ", " ")
    return text.replace(_APOSTROPHE, "'")


_MARKUP_PAIRS = re.compile(r"\[\[|\]\]|\{[{|]|\}\}|\|\}|-\{|\[//|\[\w{3,6}:")
_TAG_OR_ENTITY = re.compile(r"</?[a-zA-Z!]|&#?\w{2,32};")


def _may_hold_markup(text):
    """A cheap look, character by character first, for anything that a further round would change."""
    if any(character in text for character in "[]{}") and _MARKUP_PAIRS.search(text):
        return True
    if ("<" in text or "&" in text) and _TAG_OR_ENTITY.search(text):
        return True
    return "''" in text or "://" in text or "__" in text or "  " in text


def clean_wikitext(text, siteinfo=SiteInfo()):
    """The prose of a page of wikitext, a paragraph, list item, heading or caption a line.

    `siteinfo` (see `make_siteinfo`) adds the wiki's own names of the file and category namespaces to those known here.
    Any string is accepted; the time is linear in its length.
    """
    for mark in (_LINK_MARK, _APOSTROPHE):
        text = text.replace(mark, "")
    # What is left when marks are taken out may read as markup again (`[<b>[`); three rounds settle what people write.
    for _ in range(3):
        cleaned = _clean_once(text, siteinfo)
        if cleaned == text or not _may_hold_markup(cleaned):
            break
        text = cleaned
    return cleaned
