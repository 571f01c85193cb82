"""tools/likelihoods.py: a histogram of what flow.py leaves in likelihoods.npz."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tiny import ROOT, load_tool

likelihoods = load_tool("likelihoods")


def test_shares_of_each_data_set_sum_to_one():
    (axis,) = likelihoods.draw({"digits": np.array([1.0, 2.0, 2.0]), "noise": np.array([8.0])}).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["digits", "noise"]
    first, second = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert sum(first) == pytest.approx(1) and sum(second) == pytest.approx(1)
    assert max(first) == pytest.approx(2 / 3) and np.argmax(second) == 79  # both over the same 80 bins


@pytest.mark.parametrize("there", [True, False])
def test_from_the_command_line(there, tmp_path):
    if there:
        np.savez(tmp_path / "likelihoods.npz", test=np.array([1.0, 1.2]), compare=np.array([4.0]))
        (tmp_path / "config.json").write_text(json.dumps({"dataset": "mnist", "compare": "fashion_mnist"}))
    done = subprocess.run([sys.executable, ROOT / "tools" / "likelihoods.py", tmp_path], capture_output=True, text=True)
    if there:
        assert done.returncode == 0 and str(tmp_path / "likelihoods.png") in done.stdout
        assert Image.open(tmp_path / "likelihoods.png").size[0] > 500
    else:
        assert done.returncode == 1 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
