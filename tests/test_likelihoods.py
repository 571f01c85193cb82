"""tools/likelihoods.py: the bits/dim of flow.py on several data sets, and their histogram."""

import numpy as np
import pytest
from PIL import Image

import flow
import tiny

likelihoods = tiny.load_tool("likelihoods")


def test_shares_of_each_data_set_sum_to_one():
    (axis,) = likelihoods.draw({"digits": np.array([1.0, 2.0, 2.0]), "noise": np.array([8.0])}).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["digits", "noise"]
    first, second = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert sum(first) == pytest.approx(1) and sum(second) == pytest.approx(1)
    assert max(first) == pytest.approx(2 / 3) and np.argmax(second) == 79  # both over the same 80 bins


@pytest.fixture()
def run(request, tmp_path, monkeypatch):
    """A run of so many steps on digits, after which there are `inverted`, its negatives, and `large`, of 9 x 9 pixels."""
    digits = tiny.small_digits(flow, monkeypatch)
    sets = {"digits": digits, "inverted": digits._replace(test=255 - digits.test),
            "large": digits._replace(test=digits.test.repeat(1, 1, 2, 2)[:, :, :9, :9])}
    monkeypatch.setattr(flow, "load_data", lambda name, *args: sets[name])
    training = ["--steps", str(request.param), "--lr", "1e-2", "--num-samples", "4"]
    flow.main([*tiny.TINY["flow"].split(), *training, "--out", str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.mark.parametrize("run", [100], indirect=True)
def test_from_the_command_line(run, capsys):
    """The run's own figures are those that it left in likelihoods.npz; other images have more bits."""
    likelihoods.main([str(run), "inverted"])
    own = np.load(run / "likelihoods.npz")["test"]
    bits = likelihoods.bits_of(run, ["inverted"])
    assert list(bits) == ["digits", "inverted"]
    np.testing.assert_allclose(bits["digits"], own)
    assert bits["inverted"].mean() > own.mean() + 0.1
    said = capsys.readouterr().out
    assert f"digits: {own.mean():.4f} bits/dim, 8 test images" in said
    assert f"inverted: {bits['inverted'].mean():.4f} bits/dim" in said
    assert Image.open(run / "likelihoods.png").size[0] > 500


@pytest.mark.parametrize("run", [1], indirect=True)
@pytest.mark.parametrize("where, other", [("run", "large"), ("nowhere", "inverted")])
def test_what_does_not_fit_is_one_line(run, where, other, capsys):
    with pytest.raises(SystemExit):
        likelihoods.main([str(run.parent / where), other])
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert (other if where == "run" else where) in line
