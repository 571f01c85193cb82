"""tools/report.py: one page about several runs, well formed, with the numbers of their logs."""

import base64
import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from tiny import ROOT, flags, load_tool, run, small_digits

report = load_tool("report")


def write_run(folder, lines, config=None, pictures=("samples.png",)):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for i, name in enumerate(pictures):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("L", (30 + i, 20), 50 * i).save(folder / name)
    return folder


def read(tmp_path, *runs):
    """The page of these runs as a tree: it is well-formed XML behind its doctype, so it is well-formed HTML too."""
    report.main([*map(str, runs), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def text_of(cell):
    return "".join(cell.itertext()).strip()


def tables(tree):
    """caption -> row header -> cells: the whole number where a cell holds one, else its text."""
    found = {}
    for table in tree.iter("table"):
        rows = {}
        for row in table.find("tbody"):
            numbers = [cell.find("data") for cell in row[1:]]
            rows[text_of(row[0])] = [text_of(cell) if number is None else float(number.get("value"))
                                     for cell, number in zip(row[1:], numbers, strict=True)]
        found[text_of(table.find("caption"))] = rows
    return found


A = [{"step": s, "seconds": s / 10, "loss": 2.0 / s, "bpd": 3.0 - s / 100} for s in (1, 2, 50, 100)]
A_FINAL = {"step": 100, "seconds": 10.123, "test_bpd": 1.2345678901234567, "final": True}
B = [{"step": s, "seconds": s / 5, "loss": 1.0 + s} for s in (1, 2, 3)]


def test_figures_are_those_of_the_last_final_line(tmp_path):
    early = {"step": 50, "seconds": 5.0, "test_bpd": 9.0, "final": True}
    a = write_run(tmp_path / "a", [*A[:3], early, A[3], A_FINAL])
    b = write_run(tmp_path / "b", B)
    found = tables(read(tmp_path, a, b))["The last line of each log"]
    assert found == {"step": [100, 3], "seconds of training": [10.123, 0.6], "finished": ["yes", "no"],
                     "test_bpd": [1.2345678901234567, ""]}


def test_curves_are_drawn_to_scale(tmp_path):
    """Every point lies where an affine map of (step, value), or of their logarithms, puts it; the ends are in the table."""
    tree = read(tmp_path, write_run(tmp_path / "a", [*A, A_FINAL]), write_run(tmp_path / "b", B))
    found = tables(tree)
    assert found["bpd, step logarithmic"] == {"a": [2.99, 2.0, 2.99, 2.0]}
    loss = found["loss, step logarithmic, value logarithmic"]
    assert loss == {"a": [2.0, 0.02, 2.0, 0.02], "b": [2.0, 2.0, 4.0, 4.0]}
    plots = {text_of(figure.find("h3")): figure.find("svg") for figure in tree.iter("figure") if figure.find("h3") is not None}
    for name, runs, warp in (("loss", (A, B), np.log), ("bpd", (A,), np.asarray)):
        lines = plots[name].findall("polyline")
        assert len(lines) == len(runs)
        points = np.array([p.split(",") for line in lines for p in line.get("points").split()], float)
        steps, values = np.array([(line["step"], line[name]) for lines in runs for line in lines]).T
        for at, true, sign in ((points[:, 0], np.log(steps), 1), (points[:, 1], warp(values), -1)):
            slope, offset = np.polyfit(true, at, 1)
            np.testing.assert_allclose(at, slope * true + offset, atol=0.02)  # printed to a hundredth
            assert slope * sign > 0
        assert points[:, 0].min() >= 0 and points[:, 0].max() <= report.WIDTH
        assert points[:, 1].min() >= 0 and points[:, 1].max() <= report.HEIGHT


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0, 5.0], [1.0, 1.0 + 1e-15], [5e-324, 0.0], [1e-30, 1e30],
                                    [7, 10**40]])
def test_an_axis_holds_its_values_and_a_few_ticks(values):
    scale = report.axis(values)
    at = [report.place(v, scale, 0, 1) for v in values]
    assert all(-1e-9 <= a <= 1 + 1e-9 for a in at)
    assert 1 <= len(scale[3]) <= 10 and scale[3] == sorted(scale[3])
    assert all(scale[0] <= tick <= scale[1] for tick in scale[3])


def test_a_value_that_is_not_finite_cuts_the_curve(tmp_path):
    lines = [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, 3.0), (6, None), (7, 7.0))]
    tree = read(tmp_path, write_run(tmp_path / "a", lines))
    plot = next(svg for svg in tree.iter("svg") if svg.get("role") == "img")
    assert [len(line.get("points").split()) for line in plot.findall("polyline")] == [2, 2]
    assert len(plot.findall("circle")) == 1
    assert tables(tree)["loss"] == {"a": [1.0, 1.0, 7.0, 7.0]}


def test_damaged_and_short_logs_survive(tmp_path):
    torn = ['{"step": 1, "loss": 2.0}\n', "\n", "[1, 2]\n", "7\n", '{"loss": 5.0}\n', '{"step": "x", "loss": 5.0}\n',
            '{"step": 2, "lo{"step": 2}\n', '{"step": 3, "loss": NaN}\n', '{"step": 4, "loss": "high", "ok": true}\n',
            '{"step": 5, "loss": 1.5}\n', '{"step": 6, "lo']
    a = write_run(tmp_path / "torn", torn)
    (a / "config.json").write_text('{"width": 3')
    (a / "samples.png").write_bytes(b"\x89PNG but cut")
    b = write_run(tmp_path / "empty", [], pictures=())
    tree = read(tmp_path, a, b)
    assert tables(tree)["loss"] == {"torn": [2.0, 1.5, 2.0, 1.5]}
    assert tables(tree)["The last line of each log"]["step"] == [5.0, ""]
    assert not list(tree.iter("img"))
    (a / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "No metric was logged yet." in "".join(read(tmp_path, a).itertext())


def test_names_and_values_are_escaped(tmp_path):
    nasty = '<b>&"\'</b>'
    folder = tmp_path / nasty.replace("/", "|")
    a = write_run(folder, [{"step": 1, nasty: 2.0}, {"step": 1, nasty: 3.0, "final": True}], {nasty: nasty, "label": None})
    tree = read(tmp_path, a)
    assert not list(tree.iter("b"))
    found = tables(tree)
    assert found["The last line of each log"][nasty] == [3.0]
    assert found[nasty] == {folder.name: [2.0, 2.0, 2.0, 2.0]}
    assert found["All settings"] == {nasty: [nasty], "label": [""]}
    assert text_of(tree.find("body/header/h1")) == folder.name


def test_settings_that_differ(tmp_path):
    a = write_run(tmp_path / "a", A, {"width": 8, "mults": [1, 2], "labels": True, "out": "a"})
    b = write_run(tmp_path / "b", B, {"width": 16, "mults": [1, 2], "labels": True, "out": "b", "z_dim": 4})
    assert tables(read(tmp_path, a, b))["Settings that differ"] == {"width": [8, 16], "z_dim": ["", 4]}
    assert "Settings that differ" not in tables(read(tmp_path, a))


def test_pictures_are_within_the_page(tmp_path):
    names = ("samples.png", "reconstructions.png", "samples/step_000002.png", "sampled/samples.png")
    a = write_run(tmp_path / "a", A, pictures=names)
    images = {}
    for image in read(tmp_path, a).iter("img"):
        head, data = image.get("src").split(",")
        assert head == "data:image/png;base64" and "of the run a" in image.get("alt")
        images[image.get("alt").split()[0]] = base64.b64decode(data)
        size = (int(image.get("width")), int(image.get("height")))
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == size
    assert images == {name: (a / name).read_bytes() for name in names}


def test_needs_nothing_from_outside_and_names_every_header(tmp_path):
    tree = read(tmp_path, write_run(tmp_path / "a", [*A, A_FINAL]), write_run(tmp_path / "b", B))
    for element in tree.iter():
        assert element.tag not in ("script", "link", "iframe")
        assert all(not element.get(name, "").startswith(("http", "//")) for name in ("src", "href"))
    assert "http" not in report.STYLE and "prefers-color-scheme: dark" in report.STYLE
    assert all(th.get("scope") in ("row", "col") for th in tree.iter("th"))
    ids = {section.get("id") for section in tree.iter("section")}
    assert {a.get("href").removeprefix("#") for a in tree.iter("a")} == ids
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in tree.iter("svg"))


def test_folders_of_one_name_are_told_apart(tmp_path):
    a = write_run(tmp_path / "x" / "run", A)
    b = write_run(tmp_path / "y" / "run", B)
    tree = read(tmp_path, a, b, a)
    assert text_of(tree.find("body/header/h1")) == f"{a}, {b}"


def test_a_real_run(tmp_path, monkeypatch):
    import diffusion

    small_digits(diffusion, monkeypatch)
    assert run(diffusion, flags("diffusion", tmp_path / "real")) == 0
    lines = [json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()]
    tree = read(tmp_path, tmp_path / "real")
    assert tables(tree)["The last line of each log"]["test_bpd"] == [lines[-1]["test_bpd"]]
    first = [line["loss"] for line in lines[:-1]]
    assert tables(tree)["loss"] == {"real": [first[0], min(first), max(first), first[-1]]}
    assert len(list(tree.iter("img"))) >= 2


def test_from_the_command_line(tmp_path):
    a = write_run(tmp_path / "a", A)
    command = [sys.executable, ROOT / "tools" / "report.py"]
    done = subprocess.run([*command, a], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "report.html").is_file()
    for argv, named in (([tmp_path], tmp_path), ([a, "--out", tmp_path / "no" / "p.html"], tmp_path / "no" / "p.html")):
        done = subprocess.run([*command, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and str(named) in done.stderr
