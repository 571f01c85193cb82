"""tools/scoreboard.py: a tiny scoreboard end to end, what is kept and what is made anew, other processes, page; record.py."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import ROOT, TINY, load_tool

board = load_tool("scoreboard")
record = load_tool("record")
ARGS = "--dataset digits --minutes 0.005 --num-samples 40".split()
ROWS = [board.Row("gan-tiny", "gan", "the first", TINY["gan"], best=True),
        board.Row("diffusion-two", "diffusion", "samples otherwise", sampling="--nfe 2", of="diffusion-tiny"),
        board.Row("diffusion-tiny", "diffusion", "the second", f"{TINY['diffusion']} --save-every 1 --log-every 1", best=True)]
SAID = "digits-0.005min-gan-tiny-0"


def error_of(capsys, argv, code=2):
    assert board.main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(board, "ROWS", ROWS)
    monkeypatch.setattr(board, "POLL", 0.05)


def test_a_tiny_scoreboard(rows, tmp_path, monkeypatch, capsys):
    """Three rows of digits; nothing is made twice; a row that lost its file is continued; the page has what was found."""
    out = tmp_path / "rows"
    page = tmp_path / "docs" / "page.md"
    argv = [*ARGS, "--out", str(out), "--write", str(page)]
    assert board.main(argv) == 0, capsys.readouterr().err
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*-0.json")}
    assert {r["row"] for r in found.values()} == {row.name for row in ROWS}
    gan = found[SAID]
    one = found["digits-0.005min-diffusion-tiny-0"]
    two = found["digits-0.005min-diffusion-two-0"]
    assert gan["processor"] == one["processor"] == board.processor()
    assert gan["command"] == f"python gan.py --dataset digits --minutes 0.005 {TINY['gan']}"
    assert "bpd" not in gan and one["bpd"] == two["bpd"] > 1 and one["kind"] == "at most, given the label"
    for name, r in found.items():
        assert r["steps"] > 0 and r["peak_mb"] > 100 and 0 < r["seconds_1"] and 0 < r["seconds_64"]
        images = np.load(out / f"{'digits-0.005min-diffusion-tiny-0' if r is two else name}.npz")["images"]
        if r is not two:  # the figures are those of tools/evaluate.py
            known = board.evaluate(images, "digits")
            assert r["distance"] == pytest.approx(known["frechet"], rel=1e-6) and r["floor"] == known["floor"]["frechet"]
            assert (r["density"], r["coverage"], r["n"]) == (known["density"], known["coverage"], len(images))
    module = board.importlib.import_module("gan")
    G, D, _ = module.load(out / SAID)
    assert gan["parameters"] == sum(p.numel() for network in (G, D) for p in network.parameters())
    assert gan["seconds"] == pytest.approx(0.3, abs=10)

    text = page.read_text()
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[0].strip("| *") for line in table[1:]] == [row.name for row in ROWS]
    heads = [head.strip("| ") for head in table[0]]
    cells = dict(zip(heads, table[1], strict=True))
    assert (cells["likelihood"], cells["distance"], cells["steps"]) == ("none", f"{gan['distance']:.3f}", f"{gan['steps']:,}")
    assert f"{one['bpd']:.3f} bits/dim, at most, given the label" in table[3]
    assert f"\n## digits, 0.005 minutes, {board.processor()}, PyTorch {torch.__version__}\n" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 2
    assert all(np.asarray(Image.open(page.with_name(name))).std() > 5 for name in pictures)

    made = []
    monkeypatch.setattr(board, "make", lambda row, args, seed: made.append(row.name))
    capsys.readouterr()
    assert board.main([*argv, "--models", "gan-tiny"]) == 0
    assert f"{SAID}: there already" in capsys.readouterr().out and not made


def started(tmp_path, *more):
    argv = [*ARGS, "--out", str(tmp_path), *more]
    return board.parse(argv)[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_the_memory_of_a_command_is_its_own(rows, tmp_path):
    """Not that of the process that started it, which has PyTorch loaded; and its peak, not what it has at its end."""
    command = [sys.executable, "-c", "import time; x = bytes([1]) * 80_000_000; time.sleep(0.4); del x; time.sleep(0.4)"]
    assert 80 < board.run_command(command, tmp_path / "log", board.Watch()) < 130


def test_a_killed_run_is_taken_up(rows, tmp_path):
    """With --resume from its checkpoint; not where another processor, or other flags, began it, nor without --resume."""
    row = ROWS[2]
    found = {"processor": "A", "torch": "1", "seed": 0}
    flags = board.flags_of(row, 1)
    folder = tmp_path / "run"
    watch = board.Watch()

    def step():
        return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    board.train(row, folder, started(tmp_path), 0.002, [*flags, "--num-samples", "10"], found, watch)
    assert board.done(folder)
    (folder / "samples.npz").unlink()  # as if it had been killed
    before = step()
    more = [*flags, "--num-samples", "10"]
    board.train(row, folder, started(tmp_path, "--resume"), 0.002, more, found, watch)
    again = step()
    assert again[:len(before) - 1] == before[:-1] and board.done(folder)
    log = (tmp_path / "run.log").read_text()
    assert "leaves nothing to train" in log or again[-1] >= before[-1]
    stamp = (folder / "checkpoint.pt").stat().st_mtime_ns
    assert board.train(row, folder, started(tmp_path, "--resume"), 0.002, more, found, watch) is None  # done
    assert (folder / "checkpoint.pt").stat().st_mtime_ns == stamp
    called = []
    board_run = board.run_command
    try:
        board.run_command = lambda command, log, watch: called.append(command[-1])
        for resume, processor in ((["--resume"], "B"), ([], "B"), (["--resume"], "B")):
            board.train(row, folder, started(tmp_path, *resume), 0.002, more, found | {"processor": processor}, watch)
            (folder / "samples.npz").unlink(missing_ok=True)
    finally:
        board.run_command = board_run
    assert called == ["--overwrite", "--overwrite", "--resume"]


def test_a_network_of_another_machine_is_not_sampled(rows, tmp_path, capsys):
    base = "digits-0.005min-diffusion-tiny-0"
    board.write_json(tmp_path / f"{base}.json", {"processor": "another", "torch": "1", "n": 40,
                                                 "command": board.command_of(ROWS[2], started(tmp_path))})
    argv = [*ARGS, "--out", str(tmp_path), "--models", "diffusion-two"]
    assert "is gone" in error_of(capsys, argv, 1)
    (tmp_path / base).mkdir()
    (tmp_path / base / "checkpoint.pt").touch()
    assert "another machine: another" in error_of(capsys, argv, 1)


def test_a_script_that_fails_is_one_line(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(board, "ROWS", [board.Row("gan-bad", "gan", "", "--width -1")])
    err = error_of(capsys, [*ARGS, "--out", str(tmp_path)], 1)
    assert "gan-bad" in err and "exit code 2" in err and "--width" in err and "gan-bad-0.log" in err
    assert not list(tmp_path.glob("*-0.json"))


@pytest.mark.skipif(not board.processes(), reason="no /proc here")
def test_a_busy_machine_is_named(monkeypatch):
    """A process that is no child of this one and computes is named, with its share; our own children are not."""
    spin = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    ours = subprocess.Popen([sys.executable, "-c", spin])
    orphan = subprocess.run([sys.executable, "-c", "import subprocess, sys\n"
                             f"print(subprocess.Popen([sys.executable, '-c', {spin!r}], stdout=subprocess.DEVNULL).pid)"],
                            stdout=subprocess.PIPE, text=True)
    number = int(orphan.stdout)
    try:
        real = board.processes

        def only():  # the two, and this one: what else is at work on the machine does not count
            return {key: (value[0], f"pid {key[0]}", value[2]) for key, value in real().items()
                    if key[0] in (number, ours.pid, board.os.getpid())}

        monkeypatch.setattr(board, "processes", only)
        monkeypatch.setattr(board, "LIMIT", 0.002)  # a machine with much to do gives the process little
        watch = board.Watch()
        end = time.monotonic() + 60
        while not watch.busy() and time.monotonic() < end:
            time.sleep(0.2)
        busy = watch.busy()
    finally:
        ours.kill()
        ours.wait()
        board.os.kill(number, 9)
    assert set(busy) == {f"pid {number}"} and 0 < busy[f"pid {number}"] < 1.5


def test_shares_of_a_core(monkeypatch):
    """Processor time since the start, of processes that began later too, by name; under 5 % of a core is not named."""
    clock = [100.0]
    me = board.os.getpid()
    now = {(me, "1"): (1, "us", 0.0), (2, "1"): (1, "old", 50.0), (3, "1"): (me, "child", 0.0)}
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(board, "processes", lambda: dict(now))
    watch = board.Watch()
    now |= {(me, "1"): (1, "us", 9.0), (2, "1"): (1, "old", 52.0), (3, "1"): (me, "child", 9.0),
            (4, "7"): (3, "grandchild", 9.0), (5, "7"): (1, "make", 0.3), (6, "7"): (1, "make", 0.4),
            (7, "7"): (1, "idle", 0.4)}
    watch.look()
    del now[5, "7"]  # it is over
    clock[0] = 110.0
    assert watch.busy() == {"old": 0.2, "make": 0.07}


def test_a_busy_row_is_said(rows, tmp_path, capsys):
    result = {"row": "gan-tiny", "dataset": "digits", "minutes": 1.0, "seed": 0, "n": 40, "command": "python gan.py",
              "commit": "c", "processor": "P", "torch": "2", "distance": 1.0, "floor": 0.5, "density": 1.0, "coverage": 0.5,
              "seconds_1": 0.1, "seconds_64": 0.2, "steps": 7, "parameters": 10, "peak_mb": 5.0, "busy": {"cc1": 0.4}}
    assert "not alone: other processes took, of a core, cc1 40%" in board.summary(result)
    for seed, processor in ((0, "P"), (1, "P"), (2, "Q")):
        r = result | {"seed": seed, "processor": processor, "distance": 1.0 + seed}
        r["strip"] = board.strip_of(np.zeros((12, 8, 8, 1), np.uint8))
        board.write_json(tmp_path / f"digits-1min-gan-tiny-{seed}.json", r)
    (tmp_path / "digits-1min-gan-tiny-3.json").write_text("{")  # cut short
    assert board.main(["--models", "none", "--out", str(tmp_path), "--write", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| **gan-tiny**")]
    assert len(lines) == 2  # no row is made of two processors
    assert " | 1.000, 2.000 | " in lines[0] and " | 3.000 | " in lines[1]
    first, second = text.split("\n## ")[1:]  # each processor has its table and its pictures
    assert first.startswith("digits, 1 minutes, P, PyTorch 2\n") and second.startswith("digits, 1 minutes, Q, PyTorch 2\n")
    assert lines[0] in first and lines[1] in second
    assert (tmp_path / "page-digits-1min-p-pytorch-2.png").is_file() and "(page-digits-1min-q-pytorch-2.png)" in second
    assert "- Not alone: gan-tiny, seed 0: other processes took, of a core, cc1 40%." in text

    # another sitting, in another folder: the rows of before stay, one that was made again is replaced
    other = tmp_path / "other"
    other.mkdir()
    for seed in (1, 4):
        board.write_json(other / f"{seed}.json", r | {"seed": seed, "processor": "P", "distance": 5.0 + seed})
    assert board.main(["--models", "none", "--out", str(other), "--write", str(tmp_path / "page.md")]) == 0
    lines = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| **gan-tiny**")]
    assert len(lines) == 2 and " | 1.000, 6.000, 9.000 | " in lines[0] and " | 3.000 | " in lines[1]


def test_a_strip_is_the_first_samples_in_a_row():
    images = np.arange(12 * 8 * 8, dtype=np.uint8).reshape(12, 8, 8, 1)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(board.strip_of(images)))))
    assert strip.shape == (10, 100)
    for i in range(10):
        assert np.array_equal(strip[1:9, 10 * i + 1:10 * i + 9], images[i, :, :, 0])


def test_likelihoods_are_named_for_what_they_are():
    final = {"test_bpd": 1.25, "test_nats": 80.0, "test_neg_iw_7": 83.5, "test_bits_per_code": 2.5}
    one = {"dataset": "mnist"}
    for script, config, text in (
            ("vae", {"likelihood": "bernoulli", "iw_samples": 7}, "83.50 nats, at most, k = 7 (0.154 bits/dim of 1 bit)"),
            ("vae", {"likelihood": "mixture", "iw_samples": 7}, "1.250 bits/dim, at most, k = 7"),
            ("autoregressive", {"output": "bernoulli"}, "80.00 nats, exact (0.147 bits/dim of 1 bit)"),
            ("autoregressive", {"output": "softmax"}, "1.250 bits/dim, exact"),
            ("flow", {}, "1.250 bits/dim, at most"), ("diffusion", {"labels": False}, "1.250 bits/dim, at most"),
            ("vqgan", {}, "2.500 bits a code, of the codes"), ("gan", {}, "none")):
        assert board.likelihood_text([one | board.likelihood(script, config, final)]) == text


def test_the_rows_are_commands_of_the_scripts(tmp_path, monkeypatch):
    """Each command is taken by its script; each family has one best row; a row takes its network from one that trains."""
    args = board.parse(["--minutes", "10"])[0]
    names = [row.name for row in board.ROWS]
    assert len(set(names)) == len(names)
    monkeypatch.chdir(tmp_path)
    for row in board.ROWS:
        module = board.importlib.import_module(row.script)
        words = [*board.flags_of(row, 10), *row.sampling.split(), "--dataset", "mnist", "--minutes", "5", "--out", row.name]
        cfg, _ = module.parse_args(words)
        assert cfg.minutes == 5
        if row.of:
            assert next(r for r in board.ROWS if r.name == row.of).of == ""
        assert board.command_of(row, args).startswith(f"python {row.script}.py --dataset mnist ")
    for script in {row.script for row in board.ROWS}:
        assert sum(row.best for row in board.ROWS if row.script == script) == 1
    tuned = next(row for row in board.ROWS if row.name == "diffusion-tuned")
    start = "python diffusion.py --dataset mnist --minutes 5"
    assert board.command_of(tuned, args) == (f"{start} --out runs/first && {start} --consistency --init runs/first "
                                             "--out runs/tuned")


@pytest.mark.parametrize("multiplies", [True, False])
def test_bf16_is_for_processors_that_multiply_it(monkeypatch, multiplies):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True} if multiplies else {})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rows = {row.name: row for row in board.ROWS}
    assert board.flags_of(rows["gan-relativistic"], 10) == ["--amp", "bf16"] * multiplies
    eight_bits = ["--output", "softmax", "--patch", "2", *["--amp", "bf16"] * multiplies]
    assert board.flags_of(rows["autoregressive-8bit"], 10) == eight_bits
    words = "python gan.py --dataset mnist --minutes 10" + " --amp bf16" * multiplies
    assert board.command_of(rows["gan-relativistic"], board.parse(["--minutes", "10"])[0]) == words


def test_rows_are_chosen():
    def names(models, seeds=1):
        return [(row.name, seed) for row, seed in board.chosen(models, seeds)]

    assert names(["none"]) == []
    assert names(["gan"], 2) == [("gan-minimax", 0), ("gan-relativistic", 0), ("gan-relativistic", 1)]
    assert names(["flow-jacobi"]) == [("flow-transformer", 0), ("flow-jacobi", 0)]
    assert len(names(["best"], 3)) == 18
    assert {name for name, _ in names(["all"])} == {row.name for row in board.ROWS}


@pytest.mark.parametrize("argv, message", [
    (["--models", "bert"], "--models bert: one of all, best, none, autoregressive"),
    (["--minutes", "0"], "--minutes 0.0: must be"),
    (["--minutes", "nan"], "--minutes nan: must be"), (["--seeds", "101"], "--seeds 101: must be from 1 to 100"),
    (["--num-samples", "2"], "--num-samples 2: must be from 10"), (["--dataset", "cifar10"], "invalid choice: 'cifar10'"),
    (["--frobnicate"], "unrecognized arguments"), (["--models", "none", "--write", "page.md"], "holds no finished row")])
def test_errors(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, [*argv, "--out", str(tmp_path)])


# ---- tools/record.py


def test_the_first_minute_at_the_target(tmp_path, monkeypatch, capsys):
    """Looks at each step of the clock, resumes in between, and stops at the first figure that is low enough."""
    figures = iter([(3.0, 1.0), (2.0, 2.01), (1.5, 3.0)])
    commands = []
    monkeypatch.setattr(record, "run_command", lambda command, log, watch: commands.append(list(map(str, command))))
    monkeypatch.setattr(record, "figure_of", lambda args: next(figures))
    argv = ["gan", "--target", "distance", "2", "--out", str(tmp_path / "r")]
    assert record.main([*argv, "--minutes", "5", "--loss", "hinge"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| gan | distance 2 | 2.0 | 2 | `python gan.py --dataset mnist --minutes 2 --loss hinge` | ")
    assert [(c[c.index("--minutes") + 1], c[-1]) for c in commands] == [("1.0", "--overwrite"), ("2.0", "--resume")]
    figures = iter([(3.0, 1.0), (2.5, 1.5)])
    assert record.main([*argv, "--minutes", "1.5"]) == 1
    assert "was not reached in 1.5 minutes" in capsys.readouterr().err
    assert commands[-1][commands[-1].index("--minutes") + 1] == "1.5"


def test_a_record_of_a_tiny_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(board, "POLL", 0.05)
    argv = ["diffusion", "--dataset", "digits", "--target", "bpd", "99", "--every", "0.002", "--num-samples", "10",
            "--out", str(tmp_path / "r"), *TINY["diffusion"].split()]
    assert record.main(argv) == 0, capsys.readouterr().err
    final = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()][-1]
    assert f" | {final['test_bpd']:.4g} | " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_record_that_is_stopped_ends_its_training(number, tmp_path):
    """The script saves and ends: nothing goes on behind the back of who stopped it."""
    out = tmp_path / "run"
    argv = ["gan", "--target", "distance", "0.001", "--dataset", "digits", "--width", "4", "--log-every", "1", "--out", out]
    program = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "record.py", *argv], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # nohup ignores it
    while program.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.1)
    program.send_signal(number)
    program.communicate(timeout=300)
    assert program.returncode == 128 + number
    assert "stopped by SIGTERM" in (tmp_path / "run.log").read_text() and (out / "checkpoint.pt").exists()


def test_a_likelihood_is_found_without_samples(tmp_path, monkeypatch):
    """10,000 of them may take longer than the training."""
    drawn = []

    def run(command, log, watch):
        drawn.append(command[command.index("--num-samples") + 1])

    monkeypatch.setattr(record, "run_command", run)
    monkeypatch.setattr(record, "figure_of", lambda args: (0.5, 1.0))
    for name in ("bpd", "nats", "distance"):
        assert record.main(["flow", "--target", name, "1", "--dataset", "digits", "--out", str(tmp_path / "run")]) == 0
    assert drawn == [1, 1, 10_000]


def test_no_label_of_the_plot_covers_another(tmp_path, monkeypatch):
    """Eight rows at one point, two beside it: their labels lie apart, within the axes, and not on a point."""
    rows = board.ROWS[:10]
    results = [{"seconds_64": 1.0, "distance": 0.5, "floor": 0.04, "bpd": 1.0 + i} for i in range(8)]
    results += [{"seconds_64": 100.0, "distance": 0.5, "floor": 0.04}]
    results += [{"seconds_64": 1.1, "distance": 2.0, "floor": 0.04, "nats": 80}]
    place = board.place_label
    placed = []

    def noted(axis, text, point, taken):
        box = place(axis, text, point, taken)
        placed.append((text, box, axis, list(taken)))
        return box

    monkeypatch.setattr(board, "place_label", noted)
    groups = [board.Group(row, [result]) for row, result in zip(rows, results, strict=True)]
    board.draw_plot(groups, tmp_path / "plot.png")
    assert [text.split(",")[0] for text, *_ in placed] == [row.name for row in rows]
    assert placed[0][0].endswith(", 1.00 bits/dim") and placed[9][0].endswith(", 80.0 nats")
    for _, box, axis, taken in placed:
        assert not any(box.overlaps(other) for other in taken)
        assert axis.bbox.x0 < box.x0 < box.x1 < axis.bbox.x1
    texts = [text.get_text() for text in placed[0][2].texts]
    assert sorted(texts) == sorted(text for text, *_ in placed)  # those that found no place at first are gone


@pytest.mark.parametrize("argv, message", [(["distance", "x"], "--target distance x"), (["fid", "1"], "--target fid 1"),
                                           (["bpd", "1", "--every", "0"], "--every 0.0: must be above 0")])
def test_errors_of_records(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        record.main(["gan", "--target", *argv])
    err = capsys.readouterr().err
    assert e.value.code == 2 and message in err and err.count("\n") == 1


def test_the_records_meet_their_targets():
    """Each row's figure is at its target or below, and stands in another page of docs."""
    text = (ROOT / "docs" / "records.md").read_text()
    others = " ".join(path.read_text() for path in (ROOT / "docs").glob("*.md") if path.name != "records.md")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(rf"\| ({'|'.join(record.NAMES)}) ", line)]
    assert len(rows) >= 9
    for row in rows:
        target = float(re.search(r"[\d.]+", row[1])[0])
        figure = re.match(r"[\d.]+", row[3])[0]
        assert float(figure) <= target
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", others)
        assert re.fullmatch(r"[0-9a-f]{7,40} \|", row[6])
