"""Finding evaluation data below a folder: language and split from file and folder names; tables.

Layout: DIR/<task>/<data set>/files, where <task> is one of TASKS, each a module of eval/. All of them have

    load(folder, splits=None) -> {language: {split: [examples]}}

for one data set. The names of the public releases work as they are: de.test.tsv, zh_ocnli.dev.tsv,
xquad.ar.json, stsb-de-dev.csv, en/train, de/dev_2k.tsv, translated_train.tsv. The splits are "train", "dev"
and "test"; a file that names none is "test". A file without a language has it in a column, or an error says
so.

DIR/tasks.json is optional and says what names cannot (`python -m eval prepare` writes one):

    {"ner/wikineural": {"source": "en", "splits": {"dev": "train"}}, "sts/mine": {"folder": "../elsewhere"}}

source: the language to train on. splits: other names for the splits. folder: where the data set is, from
tasks.json.
"""
import bisect
import csv
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

TASKS = ("ner", "nli", "qa", "sts", "retrieval")           # by name: `--help` is not to wait for torch, which they import
SPLITS = {"train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
          "test": "test"}
# Two- and three-letter words in public file names that are not languages.
NOT_LANGUAGES = {"of", "set", "hub", "ner", "nli", "qa", "sts", "all", "raw", "txt", "tsv", "csv", "iob", "bio", *SPLITS}
# Words that are codes too (Burmese, Maltese, Newari): a language only where they stand between dots, as in my.test.tsv.
AMBIGUOUS = {"my", "mt", "new"}
# A language: two or three letters, or more of a Wikipedia code or script (zh-min-nan, be-tarask, zh-hans).
CODE = re.compile("[a-z]{2,3}(-([a-z]{1,3}|hans|hant|latn|cyrl|arab|classical|tarask))*")
SPELLED_OUT = {"arabic": "ar", "bengali": "bn", "chinese": "zh", "english": "en", "finnish": "fi", "french": "fr",
               "german": "de", "hindi": "hi", "indonesian": "id", "japanese": "ja", "korean": "ko", "romanian": "ro",
               "russian": "ru", "spanish": "es", "swahili": "sw", "telugu": "te", "thai": "th", "turkish": "tr",
               "vietnamese": "vi"}
# Codes of ISO 639-3 (Tatoeba, MasakhaNER) -> Wikipedia's, so that a language has one name in every task.
CODES = dict(pair.split(":") for pair in """
afr:af amh:am ara:ar aze:az bel:be ben:bn bos:bs bre:br bul:bg cat:ca ces:cs cmn:zh cym:cy dan:da deu:de ell:el
epo:eo est:et eus:eu ewe:ee fao:fo fin:fi fra:fr fry:fy gla:gd gle:ga glg:gl hau:ha heb:he hin:hi hrv:hr hun:hu
hye:hy ibo:ig ido:io ile:ie ina:ia ind:id isl:is ita:it jav:jv jpn:ja kat:ka kaz:kk khm:km kin:rw kor:ko kur:ku
lat:la lit:lt lug:lg lvs:lv mal:ml mar:mr mkd:mk mon:mn nld:nl nno:nn nob:no nor:no nya:ny oci:oc pes:fa pol:pl
por:pt ron:ro rus:ru slk:sk slv:sl sna:sn spa:es sqi:sq srp:sr swa:sw swe:sv swh:sw tam:ta tat:tt tel:te tgl:tl
tha:th tsn:tn tuk:tk tur:tr twi:tw uig:ug ukr:uk urd:ur uzb:uz vie:vi wol:wo xho:xh yid:yi yor:yo zsm:ms zul:zu
""".split())
# No data in these: notes that come with a download.
NOT_DATA = re.compile(r"readme|licen[sc]e|provenance|tasks\.json|\.md$|^\.", re.IGNORECASE)


@dataclass(frozen=True)
class DataSet:
    """One data set on disk. `name` is "ner/wikineural"; `source` is None where nothing was said."""
    name: str
    task: str
    folder: Path
    source: str | None = None
    splits: dict = field(default_factory=dict)


def find(data, task):
    """The data sets of one task below the folder `data` -> [DataSet], by name.

    A data set is a sub-folder of data/<task>, or data/<task> itself if files or language folders (en/, de/)
    lie there. Raises ValueError if there is none, or tasks.json is not as described above.
    """
    data, settings = Path(data), read_settings(Path(data))
    root, found = data / task, {}
    if root.is_dir():
        inside = [p for p in sorted(root.iterdir()) if not NOT_DATA.search(p.name)]
        folders = [p for p in inside if p.is_dir()]
        data_here = any(p.is_file() and any(parse_name(p.name)) for p in inside)
        if data_here or folders and all(any(_parse_folder(p.name)) for p in folders):
            found[task] = root
        else:
            found = {f"{task}/{p.name}": p for p in folders}
    for name, entry in settings.items():
        if name.split("/")[0] == task and (name in found or "folder" in entry):
            found[name] = data / entry["folder"] if "folder" in entry else found[name]
        elif name.split("/")[0] == task:
            raise ValueError(f"{data / 'tasks.json'}: {name}: no such folder there, and no \"folder\" given")
    if not found:
        inside = f"; {data / 'eval'} has some" if (data / "eval" / task).is_dir() else ""   # `data.py atlas` writes text/ too
        raise ValueError(f"{data}: no data for {task}; expected files below {root}{inside}")
    return [DataSet(name, task, folder, **{k: v for k, v in settings.get(name, {}).items() if k != "folder"})
            for name, folder in sorted(found.items())]


def present(data):
    """The tasks that the folder `data` has something for, in the order of TASKS. Raises ValueError if it is nothing."""
    named = {name.split("/")[0] for name in read_settings(Path(data))}
    found = [task for task in TASKS if task in named or (Path(data) / task).is_dir()]
    if not found:
        raise ValueError(f"{data}: no folder of a task in it: {', '.join(TASKS)}")
    return found


def read_settings(data):
    path = data / "tasks.json"
    if not path.exists():
        return {}
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected an object with one entry a data set")
    for name, entry in settings.items():
        if name.split("/")[0] not in TASKS:
            raise ValueError(f"{path}: {name}: a data set is named <task>/<name>, with a task of {', '.join(TASKS)}")
        if not isinstance(entry, dict) or not set(entry) <= {"source", "splits", "folder"}:
            raise ValueError(f"{path}: {name}: expected an object with source, splits or folder")
        for key in ("source", "folder"):
            if not isinstance(entry.get(key, ""), str):
                raise ValueError(f"{path}: {name}: {key} is a text, not {entry[key]!r}")
        splits = entry.get("splits", {})
        allowed = ("train", "dev", "test")
        if not isinstance(splits, dict) or any(s not in allowed for s in [*splits, *splits.values()]):
            raise ValueError(f"{path}: {name}: splits maps train, dev or test to one of these, not {splits}")
    return settings


def parse_name(name):
    """(language, split) in a file name, None for what it does not say. Dots part it first, then "_", then "-".

    >>> parse_name("zh_ocnli.dev.tsv"), parse_name("xquad.ar.json"), parse_name("translated_train.tsv")
    (('zh', 'dev'), ('ar', None), (None, 'train'))
    """
    words = re.split("[-_.]", name.lower())
    split = next((SPLITS[w] for w in words if w in SPLITS), None)
    for separators in ("[.]", "[._]", "[-._]"):
        for word in re.split(separators, name.lower()):
            if _language(word) and (separators == "[.]" or word not in AMBIGUOUS):
                return _language(word), split
    return None, split


def _language(word):
    """The language code that the whole word is, or None."""
    if word in SPELLED_OUT or CODE.fullmatch(word) and not NOT_LANGUAGES & set(word.split("-")):
        return SPELLED_OUT.get(word, word)
    return None


def _parse_folder(name):
    """As parse_name, but the whole name has to be the language or the split: "my_data" is not Burmese."""
    return _language(name.lower()), SPLITS.get(name.lower())


def collect(folder, suffixes, read, splits=None, parse=parse_name):
    """Read every data file below `folder` -> {language: {split: [examples]}}.

    read(path, language) yields (language, example) in file order; `language` is what the names say, or None.
    The suffix "" stands for files that are only named after a split (en/train). `parse` is for names of other
    kinds; it returns (False, None) for a file to leave out. Raises ValueError (one line, with the file) for
    no data, an empty file, no language or two, or two files for one split.
    """
    folder, found, origin = Path(folder), {}, {}
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and not NOT_DATA.search(p.name)
             and p.suffix.lower() in suffixes and (p.suffix or p.name in SPLITS)]
    for path in paths:
        *folders, name = path.relative_to(folder).parts
        language, split = parse(name)
        if language is False:
            continue
        around = [_parse_folder(part) for part in reversed(folders)]      # the innermost first
        outer = next((code for code, _ in around if code), None)
        if outer and language in name.lower().split(".") and language_code(language) != language_code(outer):
            raise ValueError(f"{path}: the folder says the language is {outer}, the name {language}; rename one of them")
        language = outer or language                       # any short word in a name may look like a language
        split = split or next((s for _, s in around if s), "test")
        split = (splits or {}).get(split, split)
        count = 0
        for language_of, example in read(path, language):
            if language_of is None:
                raise ValueError(f"{path}: neither the name nor a column says the language; name it like "
                                 f"en.{split}{path.suffix}")
            if origin.setdefault((language_of, split), path) != path:
                raise ValueError(f"{path}: {language_of} {split} is also in {origin[language_of, split]}; keep one, "
                                 "or put each data set into a folder of its own")
            found.setdefault(language_of, {}).setdefault(split, []).append(example)
            count += 1
        if not count:
            raise ValueError(f"{path}: empty: no example in it")
    if not found:
        raise ValueError(f"{folder}: no data file ({', '.join(s for s in suffixes if s)})")
    return found


def spoken(row):
    """What the language column of a row says, as file names are read ("EN " is en); "" for nothing."""
    return (row.get("language") or "").strip().lower()


def language_code(code):
    """swa, swh -> sw; cmn -> zh. Unknown codes stay."""
    return CODES.get(code, code)


# ---- text, JSON, tables -------------------------------------------------------------------------------------

def read_text(path):
    """The file as text without a byte-order mark. Raises ValueError if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path):
    """The file's JSON value. Raises ValueError with file and line."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: empty file")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


def read_table(path, columns, names):
    """Rows of a CSV, TSV or JSONL file -> (line number, {column: text, or None where it is missing}).

    columns: what to return, in the order of a file without header. names: {name in a header or JSON key:
    column}; the first row is a header if it has two such names. CSV is quoted as in RFC 4180. So is TSV if
    the whole file keeps to it; otherwise its quotes are text, as in XNLI and PAWS-X. Raises ValueError with
    file and line for too few or too many fields, and for broken JSON or quoting.
    """
    if Path(path).suffix.lower() == ".jsonl":
        for line, row in _json_rows(path):
            yield line, dict.fromkeys(columns) | {names[k]: v for k, v in row.items() if k in names}
        return
    header = None
    for line, row in (_csv_rows if Path(path).suffix.lower() == ".csv" else _tsv_rows)(path):
        if header is None:
            header = [names.get(cell.strip().lower()) for cell in row]
            if len(set(header) - {None}) >= 2:
                continue
            header = columns
        if len(row) != len(header):
            raise ValueError(f"{path}:{line}: {len(row)} fields instead of {len(header)}"
                             + (f"; without a header they are {', '.join(columns)}" if header is columns else ""))
        yield line, dict.fromkeys(columns) | {column: cell for column, cell in zip(header, row) if column}


def _json_rows(path):
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{line}: not JSON ({error.msg}); expected one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{line}: not a JSON object")
            yield line, {k.lower(): None if v is None else str(v) for k, v in row.items()}


def _csv_rows(path):
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: broken quoting ({error})") from None
        if row:
            yield line, row


def _tsv_rows(path):
    text = read_text(path)
    literal = [(line, row.rstrip("\r").split("\t")) for line, row in enumerate(text.split("\n"), 1) if row.strip()]
    rows = _quoted_tsv(text) if '"' in text else None
    return literal if rows and _has_stray_quotes(rows, literal) else rows or literal


def _has_stray_quotes(rows, literal):
    """Is there a row of several lines whose first and last line are whole rows by themselves? Then the quotes that hold
    it together are two stray ones, with rows between them that would be lost."""
    fields = [(line, len(row)) for line, row in literal]
    for (start, row), (end, _) in zip(rows, [*rows[1:], (fields[-1][0] + 1, None)]):
        first = bisect.bisect_left(fields, (start,))
        last = bisect.bisect_left(fields, (end,)) - 1
        if last > first and fields[first][1] == fields[last][1] == len(row):
            return True
    return False


_QUOTED_FIELD = re.compile(r'(?:"((?:[^"]|"")*)"|([^"\t\r\n]*))(\t|\r?\n|$)')


def _quoted_tsv(text):
    """Rows of a TSV in which every quote belongs to a field quoted as a whole; None if the text is not one."""
    rows, row, line, start, position = [], [], 1, 1, 0
    while position < len(text):
        field_ = _QUOTED_FIELD.match(text, position)
        if not field_:
            return None
        quoted, plain, end = field_.groups()
        row.append(plain if quoted is None else quoted.replace('""', '"'))
        line += field_[0].count("\n")
        position = field_.end()
        if end != "\t":
            if any(row):
                rows.append((start, row))
            row, start = [], line
    return rows if len({len(row) for _, row in rows}) == 1 else None
