"""tools/chaos.py and tools/soak.py: a round of each, and that they see what is wrong."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch

from tiny import ROOT, TINY, load_tool


def tool(*argv, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, env=env, cwd=cwd)


@pytest.fixture
def chaos(monkeypatch):
    """The module, as another process finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import chaos
    return chaos


def test_a_round_of_each_fault(chaos, capsys):
    """In this process, whose children have imported everything already."""
    faults = "kill signal truncate flip log images disk"
    with pytest.raises(SystemExit) as ended:
        chaos.main(["--scripts", "gan", "--rounds", "1", "--faults", *faults.split()])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    rows = [line.split(" | ") for line in said.out.splitlines()[2:]]
    assert [row[1] for row in rows] == faults.split()
    assert all(row[2] == "1" and row[3].startswith("1 ") for row in rows)


def test_it_starts_from_any_folder(tmp_path):
    done = tool(ROOT / "tools" / "chaos.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--rounds" in done.stdout, done.stderr


def test_extremes_and_what_is_wrong(chaos, tmp_path):
    bench = chaos.Bench("gan", tmp_path, random.Random(0))
    assert chaos.extremes(bench, "batch_size", "-1") == chaos.extremes(bench, "lr", "nan") == "refused"
    assert chaos.extremes(bench, "seed", 2**31) == "a run"
    numbers = chaos.cases("flags", bench, 1)
    assert len(numbers) > 100 and len(numbers) % len(chaos.EXTREMES) == 0
    out = bench.copy()
    bench.resume(out)
    log = (out / "metrics.jsonl").read_text()
    (bench.straight / "metrics.jsonl").write_text(re.sub(r'"loss": [\d.]+', '"loss": 7', log, count=1))
    with pytest.raises(chaos.Wrong, match="other metrics"):
        bench.resume(out)
    bench.resume(out, log=False)
    saved = torch.load(bench.straight / "checkpoint.pt")
    next(iter(saved["generator"].values())).view(-1)[0] += 1
    torch.save(saved, bench.straight / "checkpoint.pt")
    with pytest.raises(chaos.Wrong, match="generator"):
        bench.resume(out, log=False)
    with pytest.raises(chaos.Wrong, match="exit code 2, not 0"):
        bench.expect(bench.run(out, "--batch-size", "0"), 0)


def test_growth_and_speed():
    """1 MB a second for a minute, then none; half of a processor in the first 300 s, a quarter in the second.

    10 steps a second of the clock in the first third, 5 in the second, 20 in the last.
    """
    processor = [min(t, 300) / 2 + max(t - 300, 0) / 4 for t in range(601)]
    readings = [(t, 100.0 + min(t, 60), processor[t]) for t in range(601)]
    log = [(10 * t if t <= 200 else 2000 + 5 * (t - 200) if t <= 400 else 3000 + 20 * (t - 400), t) for t in range(10, 601, 10)]
    soak = load_tool("soak")
    flat = soak.summary(readings, log, 1)
    assert flat["growth"] == 0 and flat["peak"] == flat["last"] == 160 and flat["steps"] == 7000
    assert flat["speed"] == pytest.approx([2000 / 100, 1000 / 75, 4000 / 50])
    leak = soak.summary([(t, 100.0 + t / 10, t) for t in range(601)], log, 1)
    assert leak["growth"] == pytest.approx(100 * (157 / 108.95 - 1)) and leak["speed"] == pytest.approx([10, 5, 20])
    late = soak.summary([(t, 100.0 + 10 * (t > 300), t) for t in range(601)], log, 2501)  # the first grid adds 10 MB at 300 s
    assert late["growth"] == 0 and late["early"] == 110
    assert soak.row("vae", leak).startswith("| vae.py | 109 | 157 | +44.1 % | 160 | 7000 | 10.00, 5.00, 20.00 |")


def test_a_short_soak(tmp_path):
    done = tool(ROOT / "tools" / "soak.py", "gan", "--minutes", 0.1, "--out", tmp_path, "--log-every", 1, "--num-samples", 4,
                "--eval-images", 4, *TINY["gan"].split())
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| gan.py \| \d{3,} \| \d{3,} \| [+-]\d", done.stdout, re.M)
    readings = json.loads((tmp_path / "gan" / "soak.json").read_text())["readings"]
    assert 0 < readings[0][2] < readings[-1][2] < 60  # seconds of processor: one thread's, for six seconds after the start
    failed = tool(ROOT / "tools" / "soak.py", "gan", "vae", "--together", "--minutes", 0.1, "--out", tmp_path, "--width", 0)
    assert failed.returncode == 1 and "gan.py ended with exit code 2" in failed.stderr
