"""tools/curves.py: a picture of every metric of a run."""

import subprocess
import sys

import pytest
from PIL import Image

from tiny import ROOT, load_tool

curves = load_tool("curves")
LOG = ('{"step": 1, "seconds": 0.1, "loss": 2.0, "bpd": null}\n\n[1, 2]\n7\n{"step": 2, "lo{"step": 2}\n'
       '{"step": 2, "seconds": 0.2, "loss": 1.5, "bpd": 3.0}\n{"step": 2, "seconds": 0.3, "test_bpd": 2.9, "final": true}\n')


def test_lines_that_are_no_object_are_passed_by(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LOG)
    assert [(line["step"], line.get("loss")) for line in curves.read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 2.0), (2, 1.5), (2, None)]


def test_a_panel_a_metric(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LOG)
    axes = curves.draw(curves.read_metrics(tmp_path / "metrics.jsonl")).axes
    assert {a.get_title(): a.lines[0].get_xydata().tolist() for a in axes} == {
        "loss": [[1, 2.0], [2, 1.5]], "bpd": [[2, 3.0]], "test_bpd": [[2, 2.9]]}


@pytest.mark.parametrize("there", [True, False])
def test_from_the_command_line(there, tmp_path):
    if there:
        (tmp_path / "metrics.jsonl").write_text(LOG)
    done = subprocess.run([sys.executable, ROOT / "tools" / "curves.py", tmp_path], capture_output=True, text=True)
    if there:
        assert done.returncode == 0 and str(tmp_path / "curves.png") in done.stdout
        assert Image.open(tmp_path / "curves.png").size[0] > 500
    else:
        assert done.returncode == 1 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
