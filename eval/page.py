"""`python -m eval report`: training runs and evaluation reports as one HTML page.

The page holds its drawings as SVG, made here, so that it needs no script, no other file and no plotting library.
Every drawing has its numbers in a table below it, folded.
"""
import html
import json
import math
from pathlib import Path

import numpy as np

from eval import report
from eval.run import SCORES
from wiki.languages import LANGUAGES
from files import write_atomically

COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#b82e2e", "#66aa00", "#8b6914", "#316395",
           "#dd4477", "#22aa99")
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 220, 52, 26
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1020px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.5em}h2{font-size:1.2em;border-bottom:1px solid #ddd;margin-top:2em}figure{display:inline-block;margin:.5em;
vertical-align:top}figcaption{font-weight:600}table{border-collapse:collapse;font-size:13px}td,th{padding:1px 8px;
text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}svg text{font-size:11px;fill:#444}
details{margin:.5em 0}code{background:#f4f4f4}"""


def write(sources, out):
    """Run folders and report files -> the page `out`. Raises ValueError for a source that is neither."""
    body = []
    for source in map(Path, sources):
        if source.is_dir():
            body += run_section(source)
        else:
            body += report_section(report.load(source))
    text = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>UniBERT report</title><style>{STYLE}</style><h1>UniBERT report</h1>" + "\n".join(body) + "</html>\n")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, [text.encode()])


# ---- drawings -----------------------------------------------------------------------------------------------

def ticks(low, high):
    """Four to eight round numbers from low to high."""
    step = 10 ** np.floor(np.log10(max(high - low, 1e-12) / 3))
    step *= next(m for m in (5, 2, 1) if (high - low) / (step * m) >= 3 or m == 1)
    return np.arange(np.ceil(low / step - 1e-9), high / step + 1e-9) * step


def short(value):
    """1500000 -> 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value + 0.0:.3g}" if abs(value) > 1e-12 else "0"


def figure(title, drawing, rows=None):
    folded = f"<details><summary>numbers</summary>{table(rows)}</details>" if rows else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{drawing}{folded}</figure>"


def table(rows):
    """Rows of cells, the first the header."""
    head, *rest = [[html.escape(str(cell)) for cell in row] for row in rows]
    return ("<table><tr>" + "".join(f"<th>{c}" for c in head)
            + "".join("<tr>" + "".join(f"<td>{c}" for c in row) for row in rest) + "</table>")


def axes(x_range, y_range):
    """(svg of the grid, function x -> pixel, function y -> pixel)."""
    def at_x(x):
        return LEFT + (x - x_range[0]) / max(x_range[1] - x_range[0], 1e-12) * (WIDTH - LEFT - 10)

    def at_y(y):
        return HEIGHT - BOTTOM - (y - y_range[0]) / max(y_range[1] - y_range[0], 1e-12) * (HEIGHT - BOTTOM - 10)
    grid = "".join(f"<path d='M{LEFT} {at_y(t):.1f}H{WIDTH - 10}' stroke='#e4e4e4'/><text x={LEFT - 6} y={at_y(t) + 4:.1f} "
                   f"text-anchor=end>{short(t)}</text>" for t in ticks(*y_range))
    grid += "".join(f"<text x={at_x(t):.1f} y={HEIGHT - 8} text-anchor=middle>{short(t)}</text>" for t in ticks(*x_range))
    return grid, at_x, at_y


def svg(content, legend=(), width=WIDTH, height=HEIGHT):
    """The drawing with its legend, (name, colour) each, below."""
    names = " ".join(f"<span style='color:{colour}'>&#9632;</span> {html.escape(name)}" for name, colour in legend)
    return (f"<svg width={width} height={height} viewBox='0 0 {width} {height}' role=img>{content}</svg>"
            + f"<div style='font-size:12px;max-width:{width}px'>{names}</div>" * bool(legend))


def lines(title, series, floor=None):
    """series: {name: [(x, y)]} -> a figure; `floor`: the lowest y shown. What is not finite is left out."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    x, y = (np.array([p[i] for points in series.values() for p in points]) for i in (0, 1))
    low = y.min() if floor is None else floor
    grid, at_x, at_y = axes((x.min(), x.max()), (low, max(y.max(), low + 1e-6)))
    drawn = "".join("<polyline fill=none stroke-width=1.8 stroke='{}' points='{}'/>".format(
        colour, " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in points))
        for colour, points in zip(COLOURS, series.values()))
    drawn += "".join(f"<circle cx={at_x(a):.1f} cy={at_y(b):.1f} r=3 fill='{colour}' />"          # a line of one point
                     for colour, points in zip(COLOURS, series.values()) if len(points) == 1 for a, b in points)
    by_x = {name: dict(points) for name, points in series.items()}
    steps = sorted(set(x))
    rows = [["", *series], *([short(s), *(f"{by_x[n][s]:.4g}" if s in by_x[n] else "" for n in series)]
                             for s in steps[::-(-len(steps) // 20)])]
    return figure(title, svg(grid + drawn, list(zip(series, COLOURS)) if len(series) > 1 else ()), rows)


def bars(title, values, groups=None, spans=None, top=None):
    """{name: value} as horizontal bars; groups: {name: group}, for the colour; spans: {name: (low, high)}."""
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return ""
    groups = groups or dict.fromkeys(values, "")
    colours = {g: COLOURS[i % len(COLOURS)] for i, g in enumerate(dict.fromkeys(groups[n] for n in values))}
    left = 12 + 6.5 * max(map(len, values))
    room, top = WIDTH - left - 50, top or max(max(values.values()), 1e-9)
    drawn = ""
    for i, (name, value) in enumerate(values.items()):
        y = 4 + 16 * i
        drawn += (f"<text x={left - 6:.0f} y={y + 10} text-anchor=end>{html.escape(name)}</text>"
                  f"<rect x={left:.0f} y={y} height=12 width={max(0, room * value / top):.1f} fill='{colours[groups[name]]}' opacity=.8 />"
                  f"<text x={WIDTH - 42} y={y + 10}>{value:.3f}</text>")
        if spans:
            low, high = (left + room * max(0, v) / top for v in spans[name])
            drawn += f"<path d='M{low:.1f} {y + 6}H{high:.1f}' stroke='#222' stroke-width=1.5 />"
    return figure(title, svg(drawn, [(g, c) for g, c in colours.items() if g], height=8 + 16 * len(values)))


def scatter(title, points):
    """{name: [[x, y]]} within -1..1 -> a figure."""
    side = 420
    drawn = "".join(f"<circle cx={side / 2 * (1 + .97 * x):.1f} cy={side / 2 * (1 - .97 * y):.1f} r=3 fill='{colour}' "
                    "opacity=.7 />" for colour, xy in zip(COLOURS, points.values()) for x, y in xy)
    return figure(title, svg(f"<rect width={side} height={side} fill='#fafafa'/>{drawn}", list(zip(points, COLOURS)),
                             side, side))


# ---- sections -----------------------------------------------------------------------------------------------

def run_section(folder):
    """The curves of one training run."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder}: no metrics.jsonl in it; give the run folders of train.py, or reports of `eval run`")
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        if not records or any(not isinstance(r["step"], int) for r in records):
            raise ValueError("no steps in it")
        steps = [r for r in records if "loss" in r]
        looks = [r for r in records if "validation" in r]

        def curve(key, source=steps):
            return [(r["step"], r[key]) for r in source if key in r]
        yield f"<h2>Training: <code>{html.escape(str(folder))}</code></h2><p>The horizontal axes are steps.</p>"
        yield lines("Loss by part, nats", {n: curve(k) for n, k in (
            ("MLM", "mlm_loss"), ("distillation", "kd_loss"), ("adversary", "adv_loss"))})
        yield lines("Validation MLM loss, nats", {"all": [(r["step"], r["validation"]["mlm_loss"]) for r in looks], **{
            tier: [(r["step"], r["validation"]["tiers"][tier]) for r in looks]
            for tier in (looks[-1]["validation"]["tiers"] if looks else ())}})
        yield lines("How often the discriminator names the language", {
            "discriminator": curve("discriminator_accuracy"), "chance": curve("chance")}, floor=0)
        yield lines("Tokens a second", {"tokens/s": curve("tokens_per_second")}, floor=0)
        yield lines("Gradient norm", {"norm": curve("grad_norm")}, floor=0)
        if looks:
            by_language = dict(sorted(looks[-1]["validation"]["languages"].items(), key=lambda item: item[1]))
            scripts = {c: LANGUAGES[c].scripts[0] if c in LANGUAGES else "other" for c in by_language}
            yield bars(f"Validation MLM loss by language at step {looks[-1]['step']}, nats", by_language, scripts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the metrics of a training run ({type(error).__name__}: {error})") from None


def report_section(value):
    """The scores of one report: a bar a language, with the interval over its examples."""
    model = value["model"]
    yield f"<h2>Evaluation: <code>{html.escape(model['path'])}</code></h2>"
    yield f"<p>{model['parameters'] / 1e6:.1f} M parameters; sha256 {model['sha256'][:12]}; {value['seconds']:.0f} s. "
    trained = report.TRAINED[value["settings"].get("train_on", "source")]
    yield f"Black lines: 95% interval over examples (bootstrap), seeds averaged. Fine-tuned on {trained}.</p>"
    for (task, data) in dict.fromkeys((c["task"], c["data"]) for c in value["cells"]):
        cells = {c["language"]: c for c in value["cells"] if (c["task"], c["data"]) == (task, data)}
        scores = {language: float(np.mean(c["scores"])) for language, c in cells.items()}
        yield bars(f"{data}: {SCORES[task][0]}", scores, spans={n: interval(c) for n, c in cells.items()}, top=1)
    for name, found in value.get("neutrality", {}).items():
        layers = found["layers"]
        for title, keys in (("Language probes by layer", ("linear", "mlp", "centred")),
                            ("Across languages by layer", ("retrieval", "retrieval_centred", "cka", "cka_chance")),
                            ("Geometry by layer", ("between", "between_chance", "mean_cosine"))):
            series = {key: [(i, layer[key]) for i, layer in enumerate(layers)] for key in keys}
            if "linear" in keys:
                series["prior"] = [(i, found["prior"]) for i in range(len(layers))]
            yield lines(f"{title} ({name})", series, floor=min(0, min(y for points in series.values() for _, y in points)))
        if "map" in found:                               # a compacted report has none
            yield scatter("Sentences of the last layer, first two principal components", found["map"])
    if value["notes"]:
        yield "<p>Notes:</p><ul>" + "".join(f"<li>{html.escape(note)}" for note in value["notes"]) + "</ul>"


def interval(cell, resamples=300):
    """95% bootstrap interval of a cell's score over its examples, mean over seeds."""
    tables = np.array(cell["examples"], dtype=np.float64)
    n = tables.shape[1]
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)
    scores = np.mean([SCORES[cell["task"]][2](*table.T, weights=weights) for table in tables], axis=0)
    return tuple(np.quantile(scores, (0.025, 0.975)))
