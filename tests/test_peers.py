"""tools/peers.py, tools/cost.py and what the peers share: order, resuming, tables, exponents, errors. No peer is installed."""

import argparse
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import tiny

sys.path.insert(0, str(tiny.ROOT / "tools"))
import cost
import peer
import peers
from scoreboard import processor

ARGS = ["--dataset", "mnist", "--minutes", "0.05", "--num-samples", "20", "--eval-images", "30"]


def said(tool, argv, capsys, code=2):
    assert tool.main(list(map(str, argv))) == code
    return tiny.error_line(capsys.readouterr().err)


def page_with_marks(tmp_path):
    page = tmp_path / "page.md"
    places = [mark for name in ("equal time", "equal network", "cost") for mark in
              (peers.MARK.format(name, "begin"), "old", peers.MARK.format(name, "end"))]
    page.write_text("\n".join(["# Head", *places, "Foot", ""]))
    return page


def row(family, who, **more):
    """A finished row, as make writes it."""
    _, (one,) = peers.parse([*ARGS, "--models", family])
    args, _ = peers.parse(ARGS)
    found = {"package": f"{family}.py" if who == "ours" else f"{one.package} 9.9", "steps": 1234, "seconds": 3.0,
             "parameters": 56789, "family": family, "who": who, "dataset": "mnist", "minutes": 0.05, "seed": 0, "n": 20,
             "command": " ".join(peers.command_of(one, who, args)), "eval_images": 30, "peak_mb": 321.4, "distance": 1.2345,
             "floor": 0.4, "density": 0.5, "coverage": 0.25, "processor": processor(), "torch": torch.__version__,
             "commit": "abc", "busy": {}}
    return found | more


# ---- the same time


def test_every_family_has_a_peer_and_its_program():
    assert {one.family for one in peers.PEERS} == set(tiny.SCRIPTS)
    for one in peers.PEERS:
        assert (tiny.ROOT / "tools" / one.program).is_file()
        assert any(pin.startswith(f"{one.package}==") for pin in peers.PINNED)
    assert all("==" in pin for pin in peers.PINNED + peers.BESIDE)


@pytest.mark.parametrize("one", peers.PEERS, ids=lambda one: one.family)
def test_the_programs_take_the_flags(one, tmp_path, monkeypatch):
    """The command lines of both programs of a row are taken; they are given the same time, data and number of samples."""
    monkeypatch.chdir(tmp_path)
    args, _ = peers.parse(ARGS)
    for who in ("ours", "peer"):
        program, *flags = peers.command_of(one, who, args)
        script = one.program == "peer_quantizer.py" or who == "ours"
        if script:
            cfg, _ = __import__(one.family).parse_args(flags)
        else:
            cfg = parsed(program, flags, monkeypatch)
        assert (cfg.minutes, cfg.dataset, cfg.num_samples, cfg.eval_images, cfg.seed) == (0.05, "mnist", 20, 30, 0)
        assert not script or not getattr(cfg, "labels", False)


def parsed(program, flags, monkeypatch):
    """What the parser of a peer's program makes of flags; that its package is missing comes later."""
    found = []
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, argv=None, namespace=None):
        found.append(real(parser, argv, namespace))
        raise peers.Problem("parsed")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(peers.Problem):
        tiny.load_tool(program.removeprefix("tools/").removesuffix(".py")).main(list(map(str, flags)))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", real)
    return found[0]


def test_the_peer_comes_first_and_nothing_is_made_twice(tmp_path, monkeypatch, capsys):
    """A row that is there is kept if its command and machine are the same; one that fails does not stop the others."""
    made = []

    def make(one, who, args, python):
        made.append((one.family, who, str(python)))
        if (one.family, who) == ("flow", "peer"):
            raise peers.Problem("it broke")
        found = row(one.family, who)
        peers.write_json(args.out / f"{peers.identity(one, who, args)}.json", found)
        return found

    monkeypatch.setattr(peers, "make", make)
    monkeypatch.setattr(peers, "make_environment", lambda folder: "PYTHON")
    argv = [*ARGS, "--models", "vae", "flow", "--out", str(tmp_path)]
    assert peers.main(argv) == 1
    assert tiny.error_line(capsys.readouterr().err) == "mnist-0.05min-flow-peer-0: it broke"
    assert made == [("vae", "peer", "PYTHON"), ("vae", "ours", sys.executable),
                    ("flow", "peer", "PYTHON"), ("flow", "ours", sys.executable)]
    made.clear()
    assert peers.main(argv) == 1
    assert made == [("flow", "peer", "PYTHON")]
    for change in ({"processor": "another"}, {"command": "another"}, {"torch": "1.0"}):
        peers.write_json(tmp_path / "mnist-0.05min-vae-ours-0.json", row("vae", "ours") | change)
        made.clear()
        peers.main(argv)
        assert ("vae", "ours", sys.executable) in made and ("vae", "peer", "PYTHON") not in made


def test_a_row_is_made_of_what_the_program_says(tmp_path, monkeypatch):
    """make reads the last line of a peer, measures its samples with tools/evaluate.py, and writes the row."""
    args, (one,) = peers.parse([*ARGS, "--models", "gan", "--out", str(tmp_path)])
    ran = []

    def run_command(command, log, watch):
        ran.append(list(map(str, command)))
        log.write_text('noise\n{"package": "torchgan 0.1.0", "steps": 7, "seconds": 3.0, "parameters": 5}\n')
        return 100.0

    labels = np.arange(20) % 10
    images = np.full((20, 28, 28, 1), 7, np.uint8)
    folder = tmp_path / "mnist-0.05min-gan-peer-0"
    folder.mkdir()
    np.savez(folder / "samples.npz", images=images, labels=labels)
    quality = {"n": 20, "frechet_at_floor_n": 2.0, "floor": {"frechet": 0.5}, "density": 0.1, "coverage": 0.2}
    monkeypatch.setattr(peers, "run_command", run_command)
    measured = []
    monkeypatch.setattr(peers, "evaluate", lambda *given: measured.append(given) or quality)
    found = peers.make(one, "peer", args, "PYTHON")
    assert ran[0][:2] == ["PYTHON", str(tiny.ROOT / "tools" / "peer_gan.py")]
    assert "--overwrite" not in ran[0] and ran[0][ran[0].index("--out") + 1] == str(folder)
    ((seen, dataset, data_dir, classes),) = measured
    assert np.array_equal(seen, images) and np.array_equal(classes, labels) and (dataset, data_dir) == ("mnist", args.data_dir)
    assert (found["steps"], found["distance"], found["floor"], found["n"]) == (7, 2.0, 0.5, 20)
    assert peers.kept_row(one, "peer", args) == json.loads(json.dumps(found))
    (tmp_path / "log").write_text("no object")
    with pytest.raises(peers.Problem, match="no JSON"):
        peers.last_line(tmp_path / "log")


def test_the_table_of_equal_time(tmp_path, capsys):
    """A row for each program, ours first, in the order of the families; processors have numbers where there are two."""
    assert peers.time_tables(tmp_path) == "No row yet."
    kind = "at most, k = 100"
    rows = [row("gan", "peer"), row("gan", "ours", busy={"editor": 0.5}),
            row("vae", "peer", nats=98.7654, kind=kind), row("vae", "ours", nats=88.1, kind=kind)]
    for i, r in enumerate(rows):
        peers.write_json(tmp_path / f"{i}.json", r)
    text = peers.time_tables(tmp_path)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert [line[:2] for line in table[2:]] == [["vae", "**vae.py**"], ["vae", "pythae 9.9"],
                                                ["gan", "**gan.py**"], ["gan", "torchgan 9.9"]]
    cells = dict(zip(table[0], table[3], strict=True))
    assert cells["likelihood"].startswith("98.77 nats, at most, k = 100") and cells["distance"] == "1.234"
    assert (cells["steps"], cells["parameters"], cells["MB"]) == ("1,234", "56,789", "321")
    assert "### mnist, 0.05 minutes each" in text and f"Processor: {processor()}" in text
    assert "- Not alone: gan, gan.py: editor 50% of a core." in text
    peers.write_json(tmp_path / "5.json", row("vae", "ours", processor="Another"))
    text = peers.time_tables(tmp_path)
    assert "Processor 1: " in text and "Processor 2: " in text and "| processor |" in text


# ---- the same network


def test_programs_run_in_turn():
    order = peers.turns((10, 50), 3)
    assert [who for _, who, _ in order] == ["ours", "peer"] * 6
    assert [(pair, steps) for pair, who, steps in order if who == "peer"] == [(p, n) for p in range(3) for n in (10, 50)]


def test_the_start_of_a_program_cancels():
    """Programs that start for 7 and 20 seconds and take 30 and 40 ms a step."""
    seconds = {(pair, who, n): start + 0.001 * ms * n + pair for who, start, ms in (("ours", 7, 30), ("peer", 20, 40))
               for pair in range(3) for n in (10, 50)}
    ms = peers.step_times(seconds, (10, 50), 3)
    assert ms["ours"] == pytest.approx([30] * 3) and ms["peer"] == pytest.approx([40] * 3)
    assert peers.ratio_of(ms) == pytest.approx(0.75)
    assert peers.ratio_of({"ours": [1, 2, 30], "peer": [2, 2, 3]}) == 1  # the median of the pairs' ratios


def test_equal_networks_are_timed_once(tmp_path, monkeypatch, capsys):
    ran = []

    def time_program(equal, who, steps, args, python):
        ran.append((equal.name, who, steps))
        return 5 + steps * (0.01 if who == "ours" else 0.02), 1000, {}

    monkeypatch.setattr(peers, "time_program", time_program)
    monkeypatch.setattr(peers, "make_environment", lambda folder: "PYTHON")
    page = page_with_marks(tmp_path)
    argv = ["--equal-network", "--pairs", "2", "--models", "flow", "--out", str(tmp_path / "rows"), "--write", str(page)]
    assert peers.main(argv) == 0
    equal = next(equal for equal in peers.EQUAL if equal.name == "flow")
    assert ran == [("flow", who, steps) for _ in range(2) for steps in equal.steps for who in ("ours", "peer")]
    ran.clear()
    assert peers.main(argv) == 0 and ran == []
    text = page.read_text()
    assert text.startswith("# Head\n") and text.endswith("Foot\n") and text.count("old") == 1  # that of the cost
    line = next(line for line in text.splitlines() if line.startswith("| flow: "))
    assert line.endswith("| 64 | 1,000, 1,000 | 10.0, 10.0 | 20.0, 20.0 | 0.50 | yes |")
    assert peers.main([*argv, "--pairs", "1"]) == 0 and len(ran) == 4


@pytest.mark.parametrize("equal", peers.EQUAL, ids=lambda equal: equal.name)
def test_the_programs_of_equal_networks_take_their_flags(equal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--dataset", "mnist", "--steps", "5", "--batch-size", str(equal.batch), "--eval-images", "1", "--num-samples", "1"]
    program, *flags = equal.ours.split()
    module = __import__(program.removesuffix(".py"))
    cfg, _ = module.parse_args([*flags, *more])
    assert cfg.batch_size == equal.batch and not cfg.labels
    program, *flags = equal.peer.split()
    if program == "peer_quantizer.py":
        theirs, _ = module.parse_args([*flags, *more])
    else:
        theirs = parsed(program, flags + more, monkeypatch)
    assert (theirs.batch_size, theirs.steps) == (cfg.batch_size, cfg.steps)


# ---- what the peers share


def test_a_missing_package_is_one_line(tmp_path):
    """A program in an environment without its package says what makes one, in a line, before it looks for data."""
    with pytest.raises(SystemExit) as stopped:
        peer.need("a_package_that_is_not_there")
    assert stopped.value.code == 2


def test_a_missing_package_names_what_installs_it(capsys):
    with pytest.raises(SystemExit):
        peer.need("a_package_that_is_not_there.models")
    line = tiny.error_line(capsys.readouterr().err)
    assert line.startswith("no package a_package_that_is_not_there; python tools/peers.py --models none")


def test_a_peer_trains_for_so_many_steps_or_so_long(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(peer.time, "monotonic", lambda: next(clock))
    taken = []
    assert peer.train(lambda: taken.append(1), SimpleNamespace(steps=3, minutes=10)) == (3, 3)
    assert peer.train(lambda: taken.append(1), SimpleNamespace(steps=None, minutes=5 / 60)) == (5, 5)
    assert len(taken) == 8


def test_a_peer_writes_samples_and_a_last_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peer, "AT_ONCE", 3)
    args = SimpleNamespace(num_samples=7, out=tmp_path / "run")
    value = torch.tensor([-0.5, 0.4, 2.0]).view(3, 1, 1, 1)
    learned = peer.parameters(nn.Linear(2, 3))
    peer.finish(args, "torch", (5, 1.5), learned, lambda n: value[:n].expand(n, 1, 28, 28), nats=1.0, kind="exact")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"package": f"torch {torch.__version__}", "steps": 5, "seconds": 1.5, "parameters": 9, "nats": 1.0,
                     "kind": "exact"}
    with np.load(tmp_path / "run" / "samples.npz") as archive:
        images = archive["images"]
    assert images.shape == (7, 28, 28, 1)
    assert images[:, 0, 0, 0].tolist() == [0, 102, 255, 0, 102, 255, 0]


def test_binarised_test_images_are_those_of_our_scripts():
    import autoregressive

    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ours = autoregressive.to_levels(x, SimpleNamespace(output="bernoulli"), torch.Generator().manual_seed(0))
    assert torch.equal(peer.binarise(x, torch.Generator().manual_seed(0)), ours.float())
    assert torch.equal(peer.crop(peer.pad(x)), x)


def test_the_bound_of_the_vae_is_exact_for_a_gaussian_latent():
    """Where q(z | x) is the prior and p(x | z) does not depend on z, every weight is p(x)."""
    tool = tiny.load_tool("peer_vae")
    torch.manual_seed(0)
    p = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    code = SimpleNamespace(embedding=zeros, log_covariance=zeros)
    model = SimpleNamespace(encoder=lambda x: code, decoder=lambda z: {"reconstruction": p.expand(len(z), 1, 4, 4)})
    x = (torch.rand(5, 1, 4, 4) < 0.5).double()
    log_w = torch.stack([tool.log_weights(model, x) for _ in range(4)])
    known = torch.distributions.Bernoulli(p).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(peer.importance_bound(log_w), known)


# ---- how the cost grows


def test_the_exponent_of_a_power_law():
    sizes = (8, 16, 28, 56)
    assert cost.exponent(sizes, [3e-4 * n**2.5 for n in sizes]) == pytest.approx((2.5, 2.5))
    fit, last = cost.exponent(sizes, [1 + 1e-4 * n**2 for n in sizes])  # a constant and a square
    assert 0 < fit < last < 2
    assert all(map(math.isnan, cost.exponent(sizes, [1, None, None, None])))
    assert cost.exponent(sizes, [0.1, 4.9, 10, 40], least=5.0) == pytest.approx((2, 2))


def test_the_plan_has_every_size_once():
    keys = [cost.key_of(*job) for job in cost.plan(cost.CASES)]
    assert len(keys) == len(set(keys))
    assert {job[0].script for job in cost.plan(cost.CASES)} == set(tiny.SCRIPTS)


@pytest.mark.parametrize("case", cost.CASES, ids=lambda case: case.name)
def test_a_step_and_a_sample_are_measured(case, monkeypatch):
    """With every script, in this process; the networks are small, and what was replaced in the script is put back."""
    monkeypatch.setattr("inspect.getsource", tiny.getsource)
    monkeypatch.setattr(cost, "FEWEST", 1)
    flags = f"{case.flags} {tiny.TINY[case.script].split(' --stage1')[0].replace('--nfe 2', '--nfe 1')}"
    module = __import__(case.script)
    before = module.Run.steps, module.Run.save
    for what in ("step", 2):
        found = cost.measure(case._replace(flags=flags), cost.Size(8, 2, None), what, 0)
        assert found["seconds"] > 0 and (found["mb"] is None or found["mb"] >= 0)
    assert (module.Run.steps, module.Run.save) == before and not module.LOCKS


def test_the_tables_of_the_cost(tmp_path, monkeypatch, capsys):
    """Costs that follow known laws, written into the page; what is kept is not measured again."""
    jobs = []

    def in_process(case, size, what, budget):
        jobs.append((case, size, what))
        scale = 1 if what == "step" else what
        return {"seconds": 1e-5 * size.side**2 * size.batch * (size.depth or 1) * scale, "mb": 0.1 * size.side**2}

    monkeypatch.setattr(cost, "in_process", in_process)
    page = page_with_marks(tmp_path)
    argv = ["--models", "vae", "--out", str(tmp_path / "rows"), "--write", str(page)]
    assert cost.main(argv) == 0
    assert len(jobs) == len(cost.plan([cost.CASES[0]]))
    text = page.read_text()
    assert "| vae | a step, ms | 10.2 | 41 | 125 | 502 | 2.0 | 2.0 |" in text
    assert "| vae | a step, MB | 6.4 | 25.6 | 78.4 | 314 | 2.0 | 2.0 |" in text
    assert "| vae | a step, ms | 62.7 | 125 | 251 | 502 | 1.0 | 1.0 |" in text
    assert "| vae | `--blocks` 1, 2, 4 | 16 images, ms | 2007 | 4014 | 8028 | 1.0 | 1.0 |" in text
    assert text.count("old") == 2 and f"Processor: {processor()}" in text
    jobs.clear()
    assert cost.main(argv) == 0 and jobs == []
    kept = json.loads((tmp_path / "rows" / "cost.json").read_text())
    cost.write_json(tmp_path / "rows" / "cost.json", kept | {"processor": "another"})
    assert cost.main(argv) == 0 and jobs


def test_what_a_script_says_when_it_stops_is_told(tmp_path):
    import vae

    with pytest.raises(cost.Problem, match="--dataset"):
        cost.networks_of(vae, ["--dataset", tmp_path / "none.npz", "--out", tmp_path / "run"])


# ---- the command lines


def test_errors_are_one_line(tmp_path, capsys):
    assert "--minutes 0" in said(peers, ["--minutes", 0], capsys)
    assert "--pairs 0" in said(peers, ["--pairs", 0], capsys)
    assert "--models" in said(peers, ["--models", "vea"], capsys)
    assert "--dataset" in said(peers, ["--dataset", "cifar10"], capsys)
    assert "--seconds 0" in said(cost, ["--seconds", 0], capsys)
    page = tmp_path / "page.md"
    page.write_text("no marks")
    for tool in (peers, cost):
        argv = ["--models", "none", "--out", tmp_path, "--write", page]
        assert "has no place between" in said(tool, argv, capsys)
    assert page.read_text() == "no marks"


def test_an_installation_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def run(command, **more):
        if "pip" in command:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: a\nERROR: No matching distribution\n")
        return subprocess.CompletedProcess(command, 0, f"{tmp_path}\n", "")

    monkeypatch.setattr(peers.venv, "create", lambda folder, **more: folder.mkdir())
    monkeypatch.setattr(peers.subprocess, "run", run)
    line = said(peers, ["--models", "none", "--venv", tmp_path / "venv", "--out", tmp_path / "rows"], capsys)
    assert line.startswith("pip install --no-deps denoising-diffusion-pytorch==") and line.endswith("No matching distribution")
    assert not (tmp_path / "venv" / "peers.json").exists()  # the next call begins anew


def test_the_page_has_the_places():
    text = peers.PAGE.read_text(encoding="utf-8")
    for name in ("equal time", "equal network", "cost"):
        assert text.index(peers.MARK.format(name, "begin")) < text.index(peers.MARK.format(name, "end"))
    for one in peers.PEERS:
        pin = next(pin for pin in peers.PINNED if pin.startswith(f"{one.package}=="))
        assert f"{pin.replace('==', ' ')} |" in text, "the table of the page names another version"
