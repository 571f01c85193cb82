"""notebooks/tour.ipynb: its cells run in order, with trained networks and with tiny ones of other shapes."""

import json
import os
import re

import matplotlib
import pytest

from tiny import ROOT, SCRIPTS, load_tool, tiny_run

NOTEBOOK = json.loads((ROOT / "notebooks" / "tour.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def execute(capsys):
    """Run the code cells in one namespace, in the current folder -> the namespace, what was printed, titles of figures."""
    matplotlib.use("agg", force=True)
    import matplotlib.pyplot as plt

    titles = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        def show():
            titles.append(plt.gca().get_title())
            plt.close()

        monkeypatch.setattr(plt, "show", show)
        namespace = {"__name__": "tour"}
        for i, source in enumerate(CODE):
            exec(compile(source, f"tour.ipynb, code cell {i + 1}", "exec"), namespace)
    return namespace, capsys.readouterr().out, titles


def check(namespace, printed, titles):
    """What holds of any networks, trained or not."""
    assert len(titles) >= 12 and all(titles)
    assert "nan" not in printed
    assert namespace["difference"] < 1 / 64  # of the two inverses of a flow: two of 256 levels, where the flow is steepest
    assert min(namespace["same"]) > 0.999  # of the three samplers
    pixels, codes = map(int, re.search(r"(\d+) pixels of 8 bits become (\d+) codes", printed).groups())
    assert 0 < codes < pixels


@pytest.fixture
def path_kept(monkeypatch):
    """The notebook puts its folder before all others; afterwards it is gone."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) > 20
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and all(isinstance(line, str) for line in cell["source"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    assert all(f"{name}.py" in text for name in SCRIPTS)


def test_it_runs_with_tiny_networks(tmp_path, monkeypatch, capsys, path_kept):
    """Of digits, so that no shape can be written into a cell; read as what tools/strip.py keeps of them."""
    strip = load_tool("strip")
    for name in SCRIPTS:
        tiny_run(name, tmp_path / "runs" / name)
        strip.strip(tmp_path / "runs" / name, tmp_path / "pretrained" / f"{name}-digits")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    check(*execute(capsys))


def test_it_runs_with_the_trained_networks(data_dir, monkeypatch, capsys, path_kept):
    if not all((ROOT / "pretrained" / f"{name}-mnist").is_dir() for name in SCRIPTS):
        pytest.skip("not all six networks are in pretrained/")
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("M2_DATA_DIR", os.path.abspath(data_dir))
    namespace, printed, titles = execute(capsys)
    check(namespace, printed, titles)
    digits, flipped, noise = (float(x) for x in re.findall(r": ([\d.]+) bits a pixel", printed))
    assert digits < flipped < noise > 8
    spread = {float(t): float(d) for t, d in re.findall(r"temperature ([\d.]+): diversity ([\d.]+)", printed)}
    assert spread[0.1] < spread[1.0] > 0.7
