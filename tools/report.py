"""One HTML page about one run or several: curves, samples, and the settings and final figures side by side.

  python tools/report.py runs/diffusion-mnist runs/gan-mnist             # writes report.html
  python tools/report.py runs/diffusion-mnist --out diffusion.html

The page is one file. It holds its pictures, has no script and needs no network. An axis is logarithmic where the values
span more than a factor of 20. What a damaged log or folder does not hold is left out.
"""

import argparse
import base64
import json
import math
import struct
import sys
from collections import namedtuple
from html import escape
from pathlib import Path

Run = namedtuple("Run", "name folder config lines final pictures")  # final: the last line that says so, or {}
Picture = namedtuple("Picture", "path data width height")
APART = ("step", "seconds", "final")  # in a line of metrics.jsonl, not metrics
CURVES = 8  # colours and dashes of the style sheet
WIDTH, HEIGHT = 420, 250  # of a plot, in its own units
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 36  # margins round its axes
STYLE = """
:root { --paper: #fff; --ink: #1c1f23; --faint: #59616b; --line: #d5dae0; --box: #f4f6f8;
  --c0: #0061a8; --c1: #b14a00; --c2: #00714f; --c3: #a03477; --c4: #6b5b00; --c5: #5b48b5; --c6: #33727f; --c7: #8a3a33 }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e6e9ec; --faint: #a3adb8; --line: #39424c; --box: #1d2228;
  --c0: #62b5f5; --c1: #f5a45c; --c2: #4fcfa2; --c3: #ee93c8; --c4: #d9c64a; --c5: #b0a2ff; --c6: #7fcbd8; --c7: #f0938a } }
* { box-sizing: border-box } html { background: var(--paper); color: var(--ink) }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere } h1 { font-size: 1.5rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) } a { color: var(--c0); margin-right: 1.25rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.25rem }
figure { margin: 0; padding: .75rem; border-radius: .4rem; background: var(--box); min-width: 0 }
figure h3 { margin: 0 0 .5rem; font-size: 1rem } figcaption, caption { color: var(--faint); font-size: .9em; text-align: left }
img, .plot { display: block; max-width: 100%; height: auto; margin: 0 auto .5rem } .plot { width: 100% }
svg text { fill: var(--faint); font-size: 13px } svg line { stroke: var(--line) } polyline { fill: none; stroke-width: 2 }
.wide { overflow-x: auto } .wide:focus-visible { outline: 2px solid var(--c0) }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th { overflow-wrap: anywhere; min-width: 6rem } th:first-child { text-align: left; font-weight: normal; min-width: 11rem }
figure table { width: 100%; font-size: .8rem } figure tr > * { padding-right: .4rem; min-width: 0 !important }
data { white-space: nowrap } summary { cursor: pointer; padding: .5rem 0 }
""" + "".join(f".k{i} {{ stroke: var(--c{i}); stroke-dasharray: {dash} }} circle.k{i} {{ fill: var(--c{i}) }}\n"
              for i, dash in enumerate(("none", "7 3", "2 2", "9 3 2 3", "12 4", "4 4", "1 3", "9 2 2 2 2 2")))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100  # NaN is not, either


def read_object(text):
    """The JSON object in a text, {} where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_picture(path):
    """A PNG file with its width and height, None where it is none."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < 24 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    return Picture(path, data, *struct.unpack(">II", data[16:24]))


def read_run(folder, name):
    """What the page needs of the run in a folder; a line of metrics.jsonl that is no object with a step is passed by."""
    text = (folder / "metrics.jsonl").read_text(errors="replace")
    lines = [line for line in map(read_object, text.splitlines()) if is_number(line.get("step"))]
    settings = folder / "config.json"
    config = read_object(settings.read_text(errors="replace")) if settings.is_file() else {}
    finals = [line for line in lines if line.get("final")]
    steps = sorted((folder / "samples").glob("step_*.png"))
    steps = steps[:: max(1, len(steps) // 3)][:3]  # a few from the whole of the training
    paths = [folder / "samples.png", *sorted(folder.glob("*.png")), *sorted((folder / "sampled").glob("*.png")), *steps]
    pictures = [picture for path in dict.fromkeys(paths) if (picture := read_picture(path))]
    curves = [line for line in lines if not line.get("final")]
    return Run(name, folder, config, curves, finals[-1] if finals else {}, pictures)


def show(value):
    """A number in a table: four digits to read, the whole value for a program. Of what is no number, its JSON."""
    if is_number(value):
        short = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return f'<data value="{value!r}">{short}</data>'
    return "" if value is None else escape(value if isinstance(value, str) else json.dumps(value))


def key(i):
    """The line, of its colour and dashes, that stands for run i in curves."""
    return f'<svg width="28" height="10" aria-hidden="true"><polyline class="k{i % CURVES}" points="0,5 28,5"/></svg> '


def table(caption, corner, columns, rows):
    """A table. columns and the first cell of each row are headers, in HTML."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in (corner, *columns))
    body = "".join(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>\n"
                   for first, *rest in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n"


def scrolling(what, *given):
    """A table that scrolls sideways where it is too wide, by touch and by keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{what}">{table(what, *given)}</div>\n'


def axis(values):
    """low, high, whether the axis is logarithmic, and its ticks."""
    low = min(values)
    high = max(values)
    if low > 0 and high / low > 20:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        powers = powers[:: math.ceil(len(powers) / 6)]
        factors = (1, 2, 5) if len(powers) <= 3 else (1,)
        return low, high, True, [t for p in powers for f in factors if low <= (t := f * 10.0**p) <= high]
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-290):  # flat
        half = max(abs(low), abs(high)) / 2 or 0.5
        low -= half
        high += half
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    return low, high, False, [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def place(value, scale, start, end):
    """Where a value stands on an axis from start to end."""
    low, high, logarithmic, _ = scale
    if logarithmic:
        value, low, high = map(math.log, (value, low, high))
    return start + (end - start) * (value - low) / (high - low)


def plot(name, curves):
    """A figure of one metric; curves: the number and the name of a run -> its pieces, lists of (step, value) without a gap."""
    points = [point for pieces in curves.values() for piece in pieces for point in piece]
    across = axis([step for step, _ in points])
    up = axis([value for _, value in points])
    parts = [f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>']
    for tick in across[3]:
        at = place(tick, across, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:,.10g}</text>')
    for tick in up[3]:
        at = place(tick, up, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    rows = []
    for (i, run), pieces in curves.items():
        for piece in pieces:
            at = [(place(a, across, LEFT, WIDTH - RIGHT), place(b, up, HEIGHT - BOTTOM, TOP)) for a, b in piece]
            if len(at) == 1:
                parts.append(f'<circle class="k{i % CURVES}" cx="{at[0][0]:.2f}" cy="{at[0][1]:.2f}" r="3"/>')
            else:
                parts.append(f'<polyline class="k{i % CURVES}" points="{" ".join(f"{a:.2f},{b:.2f}" for a, b in at)}"/>')
        values = [value for piece in pieces for _, value in piece]
        rows.append((key(i) + escape(run), *map(show, (values[0], min(values), max(values), values[-1]))))
    caption = f"{name}{', step logarithmic' * across[2]}{', value logarithmic' * up[2]}"
    ends = table(caption, "run", ("first", "least", "most", "last"), rows)
    return (f'<figure><h3>{escape(name)}</h3><svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(f"{caption}, against the step; the table below gives its ends and extremes")}">'
            f'{"".join(parts)}</svg><figcaption>{ends}</figcaption></figure>\n')


def pieces_of(run, name):
    """The curve of a metric, cut where the log says that the value was not finite (null)."""
    pieces = [[]]
    for line in run.lines:
        if name in line and is_number(line[name]):
            pieces[-1].append((line["step"], line[name]))
        elif name in line and pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def picture(run, shown):
    """A figure of one picture, inside the page."""
    where = shown.path.relative_to(run.folder).as_posix()
    data = base64.b64encode(shown.data).decode()
    what = escape(f"{where} of the run {run.name}: a grid of images")
    return (f'<figure><img src="data:image/png;base64,{data}" width="{shown.width}" height="{shown.height}" alt="{what}"/>'
            f"<figcaption>{escape(where)}</figcaption></figure>\n")


def page(runs):
    """The whole page, as text."""
    heads = [key(i) + escape(run.name) for i, run in enumerate(runs)]
    last = [run.final or (run.lines or [{}])[-1] for run in runs]
    rows = [("step", *(show(line.get("step")) for line in last)),
            ("seconds of training", *(show(line.get("seconds")) for line in last)),
            ("finished", *("yes" if run.final else "no" for run in runs))]
    for name in dict.fromkeys(name for run in runs for name in run.final if name not in APART):
        rows.append((escape(name), *(show(run.final.get(name)) for run in runs)))
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line if name not in APART)
    plots = []
    for name in names:
        curves = {(i, run.name): pieces for i, run in enumerate(runs) if (pieces := pieces_of(run, name))}
        plots += [plot(name, curves)] if curves else []
    settings = {name: [run.config.get(name) for run in runs] for run in runs for name in run.config if name != "out"}
    every = [(escape(name), *map(show, values)) for name, values in settings.items()]
    differ = [row for row in every if len(set(row[1:])) > 1]
    samples = ""
    for head, run in zip(heads, runs, strict=True):
        figures = "".join(picture(run, shown) for shown in run.pictures)
        samples += f'<h3>{head}</h3><div class="grid">{figures or "<p>none</p>"}</div>\n'
    parts = {"Figures": scrolling("The last line of each log", "figure", heads, rows),
             "Curves": f'<div class="grid">{"".join(plots)}</div>' if plots else "<p>No metric was logged yet.</p>",
             "Samples": samples,
             "Settings": scrolling("Settings that differ", "setting", heads, differ) * (len(runs) > 1)
             + f'<details><summary>All settings</summary>{scrolling("All settings", "setting", heads, every)}</details>'}
    links = "".join(f'<a href="#{name}">{name}</a>' for name in parts)
    title = escape(", ".join(run.name for run in runs))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
            f'<meta name="color-scheme" content="light dark"/><style>{STYLE}</style></head>\n'
            f'<body><header><h1>{title}</h1><nav aria-label="Parts of this page">{links}</nav></header><main>\n'
            + "".join(f'<section id="{name}"><h2>{name}</h2>\n{part}</section>\n' for name, part in parts.items())
            + "</main></body></html>\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="where to write the page [report.html]")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not (folder / "metrics.jsonl").is_file():
            sys.exit(f"error: {folder}: holds no metrics.jsonl, so it is not the folder of a run")
    folders = list(dict.fromkeys(args.runs))
    short = [folder.resolve().name for folder in folders]
    names = [name if short.count(name) == 1 else str(folder) for folder, name in zip(folders, short, strict=True)]
    try:
        runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
        args.out.write_text(page(runs), encoding="utf-8", errors="replace")
    except OSError as e:
        sys.exit(f"error: {e.filename or args.out}: {e.strerror or e}")
    print(f"{args.out}: {len(runs)} run{'s' * (len(runs) > 1)}, in one page")


if __name__ == "__main__":
    main()
