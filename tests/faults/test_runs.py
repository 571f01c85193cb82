"""Runs that are stopped, killed or fed with nonsense: what is on the disk afterwards, the exit code and the one line said."""

import contextlib
import copy
import dataclasses
import fcntl
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import tiny
from tiny import SCRIPTS, Child, assert_same_state, error_line, flags, load_checkpoint, make_data, metrics

one_script = pytest.mark.parametrize("module", ["gan"], indirect=True)  # for what is the same in all six
ALL = os.environ.get("M2_ALL_VARIANTS")
CODES = {signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}
SIGNALS = pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"])
EVERY_SIGNAL = pytest.mark.parametrize("number, code", CODES.items(), ids=["sighup", "ctrl-c", "sigterm"])


@pytest.fixture(params=SCRIPTS)
def module(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The source is read once, and the handlers of stop signals are gone afterwards."""
    monkeypatch.setattr("inspect.getsource", tiny.getsource)
    with tiny.handlers_kept():
        yield


def few_images(module):
    """Every data set is a handful of images."""
    module.load_data = lambda *args: make_data(module)


@pytest.fixture
def few(module, monkeypatch):
    monkeypatch.setattr(module, "load_data", None)
    few_images(module)


@pytest.fixture
def go(module, few):
    """go(out, flag, ...): the exit code of a tiny run on a few images."""
    return lambda out, *more: tiny.run(module, flags(module.__name__, out, *more))


@pytest.fixture
def straight(module, few, tmp_path_factory):
    """straight(flag, ...): the folder of a run that nothing disturbed; made once, not to be changed."""
    def run(*more):
        key = (module.__name__, *map(str, more))
        if key not in STRAIGHT:
            out = tmp_path_factory.mktemp("straight") / "run"
            assert tiny.run(module, flags(module.__name__, out, *more)) == 0
            STRAIGHT[key] = out
        return STRAIGHT[key]
    return run


STRAIGHT = {}


@pytest.fixture
def at_step(module, monkeypatch):
    """at_step(k, action): action(run) in the middle of step k (counted from 1)."""
    def arrange(step, action):
        batch = module.Run.batch

        def wrapped(self, *args):
            out = batch(self, *args)
            if self.step == step:
                action(self)
            return out
        monkeypatch.setattr(module.Run, "batch", wrapped)
    return arrange


@pytest.fixture
def at_batch(module, monkeypatch):
    """at_batch(function, k, action): action() just before the k-th batch in evaluate or generate."""
    def arrange(function, count, action):
        inside, original, progress, seen = [], getattr(module, function), module.progress, itertools.count(1)

        def wrapped(*args, **kwargs):
            inside.append(True)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        def watched(items=None, *args, **more):
            for item in progress(items, *args, **more):
                if inside and next(seen) == count:
                    action()
                yield item
        monkeypatch.setattr(module, function, wrapped)
        monkeypatch.setattr(module, "progress", lambda items=None, *args, **more: (
            progress(items, *args, **more) if items is None else watched(items, *args, **more)))
    return arrange


def undo(monkeypatch, module):
    """Take back what a test broke, but keep the few images."""
    monkeypatch.undo()
    monkeypatch.setattr(module, "load_data", None)
    few_images(module)


def assert_stopped(err, number, out, in_step=False):
    """What a stop signal makes a run say: in a step that it will stop, and in the end how to go on."""
    name = signal.Signals(number).name
    said = [f"{name}: stopping after this step"] * in_step + [f"error: stopped by {name}; --resume continues {out}"]
    assert err.splitlines() == said


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_same_run(a, b, ignore=()):
    """Two runs end in the same weights, metrics and samples, bit for bit."""
    assert_same_state(load_checkpoint(a), load_checkpoint(b), ignore)
    assert metrics(a) == metrics(b)
    with np.load(a / "samples.npz") as x, np.load(b / "samples.npz") as y:
        assert x.files == y.files and all(np.array_equal(x[name], y[name]) for name in x.files)
    assert (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    assert {p.name for p in a.iterdir()} - {"samples"} == {p.name for p in b.iterdir()} - {"samples"}


# ------------------------------------------------------------------------------------- resuming gives the same numbers


def test_a_run_twice_is_the_same(straight, go, tmp_path):
    assert go(tmp_path / "again") == 0
    assert_same_run(straight(), tmp_path / "again")


def test_another_seed_is_another_run(straight, go, tmp_path):
    assert go(tmp_path / "other", "--seed", 4) == 0
    a, b = load_checkpoint(straight()), load_checkpoint(tmp_path / "other")
    assert any(torch.is_tensor(v) and not torch.equal(v, dict(tiny.leaves(b))[n]) for n, v in tiny.leaves(a))
    with np.load(straight() / "samples.npz") as x, np.load(tmp_path / "other" / "samples.npz") as y:
        assert not np.array_equal(x["images"], y["images"])


@pytest.mark.parametrize("before", [1, 2, 3])
def test_some_steps_and_some_more_are_all_the_steps(before, straight, go, tmp_path):
    """No schedule depends on the end."""
    assert go(tmp_path / "run", "--steps", before) == 0
    assert load_checkpoint(tmp_path / "run")["step"] == before
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@pytest.mark.parametrize("number, code, step", [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 3)])
def test_stopped_in_a_step_and_resumed_is_all_the_steps(number, code, step, straight, go, tmp_path, at_step, capsys,
                                                        monkeypatch, module):
    saves, save = [], module.Run.save
    monkeypatch.setattr(module.Run, "save", lambda self, parts: (saves.append(self.step), save(self, parts)))
    at_step(step, lambda run: signal.raise_signal(number))
    assert go(tmp_path / "run") == code
    assert_stopped(capsys.readouterr().err, number, tmp_path / "run", in_step=True)
    meanwhile = {2} | ({1} if module.__name__ == "vqgan" else set())  # where its first stage ends
    assert saves == sorted({0, step} | {k for k in meanwhile if k < step})  # the step is finished, and saved once
    assert load_checkpoint(tmp_path / "run")["step"] == step
    assert not (tmp_path / "run" / "samples.npz").exists()
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


def test_resumed_step_by_step(straight, go, tmp_path, module, monkeypatch):
    """Stopped after each of its steps."""
    batch = module.Run.batch
    monkeypatch.setattr(module.Run, "batch", lambda self, data: (signal.raise_signal(signal.SIGTERM), batch(self, data))[1])
    for step in (1, 2, 3, 4):
        assert go(tmp_path / "run", *["--resume"] * (step > 1)) == 143
        assert load_checkpoint(tmp_path / "run")["step"] == step
    assert go(tmp_path / "run", "--resume") == 0  # nothing is left but evaluation and sampling
    assert_same_run(straight(), tmp_path / "run")


@SIGNALS
@pytest.mark.parametrize("function", ["evaluate", "generate"])
def test_stopped_in_evaluation_or_sampling(number, code, function, straight, go, tmp_path, at_batch, capsys, monkeypatch,
                                           module):
    final = 1 if function == "evaluate" else 3  # sample grids are made in the loop too, twice in four steps
    at_batch(function, final, lambda: signal.raise_signal(number))
    assert go(tmp_path / "run") == code
    assert_stopped(capsys.readouterr().err, number, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert not (tmp_path / "run" / "samples.npz").exists()
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143)])
def test_stopped_while_a_grid_of_samples_is_made_in_the_loop(number, code, straight, go, tmp_path, at_batch, monkeypatch,
                                                             module, capsys):
    at_batch("generate", 1, lambda: signal.raise_signal(number))
    assert go(tmp_path / "run") == code
    assert_stopped(capsys.readouterr().err, number, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_state(load_checkpoint(straight()), load_checkpoint(tmp_path / "run"))
    assert metrics(straight()) == metrics(tmp_path / "run")


@pytest.mark.parametrize("mode, function", [("sample", "generate"), ("eval", "evaluate")])
def test_stopped_in_sampling_or_evaluation_alone(mode, function, straight, go, tmp_path, at_batch):
    shutil.copytree(straight(), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    at_batch(function, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert go(tmp_path / "run", "--mode", mode) == 143
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("mode, function", [("sample", "generate"), ("eval", "evaluate")])
def test_stopped_after_the_last_batch(mode, function, trained, go, module, monkeypatch):
    original = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: (original(*args), signal.raise_signal(signal.SIGTERM))[0])
    assert go(trained, "--mode", mode) == 143


@pytest.mark.parametrize("more", [["--save-every", 1], ["--save-every", 1000], ["--log-every", 1000], ["--num-samples", 7]],
                         ids=lambda more: " ".join(map(str, more)))
def test_saving_sampling_and_logging_change_nothing(more, straight, go, tmp_path):
    assert go(tmp_path / "run", *more) == 0
    assert_same_state(load_checkpoint(straight()), load_checkpoint(tmp_path / "run"), [more[0][2:].replace("-", "_")])
    assert metrics(straight())[-1] == metrics(tmp_path / "run")[-1]
    with np.load(straight() / "samples.npz") as a, np.load(tmp_path / "run" / "samples.npz") as b:
        assert np.array_equal(a["images"], b["images"]) or more[0] == "--num-samples"


def test_sampling_alone_repeats_the_samples_of_the_run(straight, go, tmp_path):
    """In a folder of its own: whatever the training left stays as it is."""
    out = tmp_path / "run"
    shutil.copytree(straight(), out)
    assert go(out, "--mode", "sample") == 0
    sampled = snapshot(out / "sampled")
    assert snapshot(out) == snapshot(straight()) | {f"sampled/{name}": content for name, content in sampled.items()}
    assert {"samples.npz", "samples.png"} <= sampled.keys()
    with np.load(out / "samples.npz") as x, np.load(out / "sampled" / "samples.npz") as y:
        assert x.files == y.files and all(np.array_equal(x[name], y[name]) for name in x.files)
    assert all(content == (out / name).read_bytes() for name, content in sampled.items() if name.endswith(".png"))


def test_sampling_needs_no_data(straight, go, tmp_path, module, monkeypatch):
    shutil.copytree(straight(), tmp_path / "run")
    monkeypatch.setattr(module, "load_data", lambda *args: pytest.fail("the data set was loaded"))
    assert tiny.run(module, ["--mode", "sample", "--out", tmp_path / "run", "--num-samples", 3]) == 0
    assert np.load(tmp_path / "run" / "sampled" / "samples.npz")["images"].shape == (3, 8, 8, 1)


def test_evaluation_alone_repeats_the_result_of_the_run(straight, go, tmp_path):
    shutil.copytree(straight(), tmp_path / "run")
    assert go(tmp_path / "run", "--mode", "eval") == 0
    lines = metrics(tmp_path / "run")
    assert lines[:-1] == metrics(straight()) and lines[-1] == lines[-2]
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == (straight() / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize("steps", [None, 4, 2])
def test_a_finished_run_resumed_trains_no_more(steps, straight, tmp_path, at_step, module, capsys):
    """It says so, evaluates and samples."""
    shutil.copytree(straight(), tmp_path / "run")
    at_step(5, lambda run: pytest.fail("a fifth step"))
    assert tiny.run(module, ["--resume", "--out", tmp_path / "run", *(["--steps", steps] if steps else [])]) == 0
    assert f"step 4: --steps {steps or 4} leaves nothing to train" in capsys.readouterr().out.splitlines()
    if steps == 2:
        assert metrics(straight()) == metrics(tmp_path / "run")
    else:
        assert_same_run(straight(), tmp_path / "run")


def test_a_finished_run_can_be_continued_for_longer(straight, go, tmp_path):
    shutil.copytree(straight(), tmp_path / "run")
    assert go(tmp_path / "run", "--resume", "--steps", 6) == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 6]
    assert [line.get("final", False) for line in metrics(tmp_path / "run")] == [False] * 6 + [True]


def test_checkpoints_hold_only_tensors_and_plain_types(straight):
    saved = torch.load(straight() / "checkpoint.pt", weights_only=True)  # loads nothing else
    kinds = {type(leaf) for _, leaf in tiny.leaves(saved)}
    assert kinds <= {torch.Tensor, int, float, bool, str, type(None)}
    devices = {leaf.device.type for _, leaf in tiny.leaves(saved) if torch.is_tensor(leaf)}
    assert devices == {"cpu"}
    assert not any(leaf.requires_grad for _, leaf in tiny.leaves(saved) if torch.is_tensor(leaf))
    assert all(leaf.isfinite().all() for _, leaf in tiny.leaves(saved) if torch.is_tensor(leaf))


def test_the_learning_rate_follows_its_flags(go, tmp_path, module):
    """It rises in --warmup steps, and falls as 1 / sqrt(step) after --decay where the script has that flag."""
    fields = {f.name for f in dataclasses.fields(module.Config)}
    more = ["--decay", 3] * ("decay" in fields) + ["--stage1", 6] * ("stage1" in fields)
    assert go(tmp_path / "run", "--lr", 0.01, "--warmup", 1, "--steps", 6, *more) == 0
    found = [line["lr"] for line in metrics(tmp_path / "run")[:-1]]
    falling = [1, 1, 1, (3 / 4) ** 0.5, (3 / 5) ** 0.5, (3 / 6) ** 0.5] if "decay" in fields else [1] * 6
    assert found == pytest.approx([0.01 * f * (0.5 if i == 0 else 1) for i, f in enumerate(falling)], rel=1e-5)


MORE = {"vae": {"reconstructions.png", "reconstructions.npz", "interpolations.png"}, "flow": {"likelihoods.npz"},
        "gan": {"interpolations.png"}, "vqgan": {"reconstructions.png", "reconstructions.npz"}}  # than all scripts leave


def test_what_a_run_leaves(straight, module):
    assert set(snapshot(straight())) == MORE.get(module.__name__, set()) | {
        "checkpoint.pt", "config.json", "metrics.jsonl", "samples.npz", "samples.png", "samples/step_000002.png",
        "samples/step_000004.png"}
    lines = metrics(straight())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["final"] is True
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert np.load(straight() / "samples.npz")["images"].dtype == np.uint8


# ------------------------------------------------------------------------------------------------- killed at any moment


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed_at(point, count, module):
    """Kill the process at the count-th save of a checkpoint: in the file, before or after the renaming, or in between."""
    few_images(module)
    seen, fsync, replace, save = itertools.count(1), os.fsync, os.replace, torch.save

    def last(path):
        return "checkpoint" in str(path) and next(seen) == count

    if point == "in the pickle":
        torch.save = lambda state, f: die() if next(seen) == count else save(state, f)
    elif point == "half written":
        def half(fd):
            if last(os.readlink(f"/proc/self/fd/{fd}")):
                os.ftruncate(fd, os.fstat(fd).st_size // 2)
                die()
            fsync(fd)
        os.fsync = half
    elif point == "before the renaming":
        os.replace = lambda a, b: die() if last(b) else replace(a, b)
    elif point == "after the renaming":
        os.replace = lambda a, b: (replace(a, b), die() if last(b) else None)


@one_script
@pytest.mark.parametrize("point", ["in the pickle", "half written", "before the renaming", "after the renaming"])
def test_killed_in_a_save(point, straight, go, tmp_path, module):
    """The third save of a run is that of step 4; the last complete checkpoint is that of step 2, or of 4 if it is there."""
    out = tmp_path / "run"
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out),
                  functools.partial(killed_at, point, 3))
    assert child.join() == -signal.SIGKILL
    assert load_checkpoint(out)["step"] == (4 if point == "after the renaming" else 2)
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)  # and no part file is left


@pytest.mark.parametrize("point", ["half written", "before the renaming"])
@one_script
def test_killed_in_the_first_save(point, straight, go, tmp_path, module):
    """Then there is nothing to resume, and --resume starts the run."""
    out = tmp_path / "run"
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out),
                  functools.partial(killed_at, point, 1))
    assert child.join() == -signal.SIGKILL
    assert [p.suffix for p in out.iterdir()] == [".part"]
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)


@one_script
def test_killed_in_a_save_of_a_run_that_was_to_be_overwritten(straight, go, tmp_path, module):
    """The first save of the new run fails half-way: the old checkpoint is there still, and whole."""
    out = tmp_path / "run"
    shutil.copytree(straight(), out)
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out, "--overwrite"),
                  functools.partial(killed_at, "half written", 1))
    assert child.join() == -signal.SIGKILL
    assert (out / "checkpoint.pt").read_bytes() == (straight() / "checkpoint.pt").read_bytes()
    assert go(out, "--overwrite") == 0
    assert_same_state(load_checkpoint(straight()), load_checkpoint(out))


@one_script
def test_killed_at_random_moments(straight, go, tmp_path, module):
    """Again and again, saving after each step: never a broken checkpoint nor a step back, at the end the same numbers."""
    name, out, rng, last = module.__name__, tmp_path / "run", random.Random(0), 0
    path, argv = out / "checkpoint.pt", flags(name, out, "--steps", 16, "--save-every", 1)
    for trial in range(5):
        more = ["--resume"] if trial else []
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = Child(tmp_path / f"child{trial}", tiny.run_script, name, [*argv, *more], few_images)
        if trial:  # else it may not have come to its first step
            child.wait_for(lambda before=before: path.exists() and path.stat().st_mtime_ns != before)
        if trial == 4:  # once at least after a step, on a machine however slow
            child.wait_for(lambda last=last: load_checkpoint(out)["step"] > last)
        time.sleep(rng.random() / 5)
        with contextlib.suppress(ProcessLookupError):
            child.send(signal.SIGKILL)
        assert child.join() in (-signal.SIGKILL, 0), child.stderr
        if path.exists():
            step = load_checkpoint(out)["step"]
            assert step >= last
            last = step
    assert last > 0
    assert go(out, "--steps", 16, "--save-every", 1, "--resume") == 0
    assert not list(out.rglob("*.part"))
    whole = straight("--steps", 16, "--save-every", 1)
    assert_same_state(load_checkpoint(whole), load_checkpoint(out))
    assert metrics(whole) == metrics(out)


@one_script
@pytest.mark.parametrize("tail", ['{"step": 3, "seconds": 0.1, "loss": 1.0', "\0\0\0\0", "{",
                                  '{"step": 2, "lo{"step": 2, "seconds": 1, "final": true}\n'])
def test_a_half_written_line_of_the_log(tail, straight, go, tmp_path, at_step, monkeypatch, module):
    """What a power cut or a full disk leaves at the end of metrics.jsonl: the line is dropped, the run goes on."""
    at_step(2, lambda run: signal.raise_signal(signal.SIGTERM))
    assert go(tmp_path / "run") == 143
    undo(monkeypatch, module)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write(tail)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@one_script
def test_lines_of_the_log_beyond_the_checkpoint_are_dropped(straight, go, tmp_path, module):
    """Killed between two saves: what was logged after the last one is logged again, not twice."""
    out = tmp_path / "run"
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out), killed_in_step_4)
    assert child.join() == -signal.SIGKILL
    assert [line["step"] for line in metrics(out)] == [1, 2, 3] and load_checkpoint(out)["step"] == 2
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)


def killed_in_step_4(module):
    few_images(module)
    batch = module.Run.batch
    module.Run.batch = lambda self, data: die() if self.step == 4 else batch(self, data)


def waits_in_step_3(module):
    """Stay in the third step until the end of days, and say by files when it began and when a stop signal came."""
    few_images(module)
    batch = module.Run.batch

    def wait(self, data):
        while self.step == 3:
            Path("in step").touch()
            if self.signal:
                Path("stopping").touch()
            time.sleep(0.01)
        return batch(self, data)
    module.Run.batch = wait


@one_script
@pytest.mark.parametrize("first, second, code", [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 143),
                                                 (signal.SIGINT, signal.SIGTERM, 143)])
def test_a_second_signal_exits_at_once(first, second, code, straight, go, tmp_path, module):
    out = tmp_path / "run"
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out), waits_in_step_3)
    assert child.wait_for((child.folder / "in step").exists), child.stderr
    child.send(first)
    assert child.wait_for((child.folder / "stopping").exists), child.stderr
    assert child.process.is_alive()  # the first signal lets the step finish
    child.send(second)
    assert child.join() == code
    assert "Traceback" not in child.stderr
    assert load_checkpoint(out)["step"] == 2
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)


@SIGNALS
def test_the_script_stopped_from_outside(number, code, tmp_path, module):
    """As `python script.py` on digits: the exit code that a shell sees, one line, a run that can be resumed."""
    out, name = tmp_path / "run", module.__name__
    child = Child(tmp_path / "child", tiny.run_file, tiny.ROOT / f"{name}.py",
                  flags(name, out, "--steps", 10**6, "--save-every", 5))
    assert child.wait_for(lambda: len(list(out.glob("samples/*.png"))) > 1), child.stderr
    child.send(number)
    assert child.join() == code
    assert_stopped(child.stderr, number, out, in_step="stopping" in child.stderr)
    step = load_checkpoint(out)["step"]
    assert step >= 10 and metrics(out)[-1]["step"] == step
    assert tiny.run(module, flags(name, out, "--resume", "--steps", step + 1, "--save-every", 5)) == 0
    assert load_checkpoint(out)["step"] == step + 1


def stopped_in_step_2_if_rank_1(module):
    few_images(module)
    batch = module.Run.batch

    def stop(self, data):
        if self.step == 2 and self.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, data)
    module.Run.batch = stop


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path, module):
    out = tmp_path / "run"
    children = pair(tmp_path, module, stopped_in_step_2_if_rank_1, "--steps", 1000, "--save-every", 999)
    assert [child.join() for child in children] == [143, 143], children[0].stderr + children[1].stderr
    assert load_checkpoint(out)["step"] == 2


# ------------------------------------------------------------------------------------------- stop signals, at any moment


def raises(number):
    return lambda *args, **kwargs: signal.raise_signal(number)


@one_script
@EVERY_SIGNAL
def test_stopped_before_there_is_a_run(number, code, go, tmp_path, monkeypatch, module, capsys):
    monkeypatch.setattr(module, "parse_args", raises(number))
    monkeypatch.setattr(module.Run, "out", "the run")  # as in a new process
    assert go(tmp_path / "run") == code
    assert_stopped(capsys.readouterr().err, number, "the run")


@one_script
@EVERY_SIGNAL
@pytest.mark.parametrize("place", ["decoder", "download", "data"])
def test_stopped_while_data_is_loaded(number, code, place, tmp_path, monkeypatch, module, capsys):
    """Whatever a decoder or a mirror raises is passed over, but not this. Nothing is left."""
    dataset = "mnist"
    if place == "decoder":
        dataset = tmp_path / "images"
        pictures(dataset, 5)
        opened, seen = Image.open, itertools.count(1)
        monkeypatch.setattr(Image, "open", lambda *args: (raises(number)() if next(seen) == 7 else 0, opened(*args))[1])
    elif place == "download":
        monkeypatch.setattr(module, "TORCHVISION", dict.fromkeys(module.TORCHVISION, "nowhere"))
        monkeypatch.setattr(Path, "exists", lambda path: False)
        monkeypatch.setattr(module, "urlopen", raises(number))
    else:
        monkeypatch.setattr(module, "load_data", raises(number))
    out = tmp_path / "run"
    argv = flags(module.__name__, out, "--dataset", dataset, "--data-dir", tmp_path / "data")
    assert tiny.run(module, argv) == code
    assert_stopped(capsys.readouterr().err, number, out)
    monkeypatch.undo()
    assert not out.exists()


@one_script
@pytest.mark.parametrize("moment", ["step", "evaluate", "generate"])
def test_stopped_by_a_terminal_that_is_closed(moment, straight, go, tmp_path, at_step, at_batch, capsys, monkeypatch, module):
    out = tmp_path / "run"
    if moment == "step":
        at_step(3, raises(signal.SIGHUP))
    else:
        at_batch(moment, 1 if moment == "evaluate" else 3, raises(signal.SIGHUP))
    assert go(out) == 129
    assert_stopped(capsys.readouterr().err, signal.SIGHUP, out, in_step=moment == "step")
    undo(monkeypatch, module)
    assert go(out, "--resume") == 0
    assert_same_state(load_checkpoint(straight()), load_checkpoint(out))
    assert metrics(straight()) == metrics(out)


@one_script
def test_a_terminal_that_is_closed_does_not_matter_under_nohup(straight, go, tmp_path, at_step, capsys):
    """nohup ignores the signal before the script begins, and so does the script then."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(2, raises(signal.SIGHUP))
    assert go(tmp_path / "run") == 0
    assert capsys.readouterr().err == ""
    assert_same_run(straight(), tmp_path / "run")


WRITTEN = {  # while this file is flushed the n-th time, with these flags: the checkpoint's step, lines of the log, in a step
    "the first checkpoint": ("checkpoint.pt", 1, [], None, 0, False),
    "the settings": ("config.json", 1, [], 0, 0, False),
    "a checkpoint": ("checkpoint.pt", 2, [], 2, 2, True),
    "a grid": ("step_000002.png", 1, [], 2, 2, False),
    "the last checkpoint": ("checkpoint.pt", 3, ["--save-every", 3], 4, 4, True),
    "the samples": ("samples.npz", 1, [], 4, 5, False),
    "the last file": ("interpolations.png", 1, [], 4, 5, False),
}


@one_script
@EVERY_SIGNAL
@pytest.mark.parametrize("what", WRITTEN)
def test_stopped_while_a_file_is_written(number, code, what, straight, go, tmp_path, capsys, monkeypatch, module):
    """The file is there whole or not at all, no part of it is left, and nothing but what was under way is done yet."""
    file, count, more, step, lines, in_step = WRITTEN[what]
    out, fsync, seen = tmp_path / "run", os.fsync, itertools.count(1)

    def flushed(fd):
        fsync(fd)
        if file in os.readlink(f"/proc/self/fd/{fd}") and next(seen) == count:
            signal.raise_signal(number)
    monkeypatch.setattr(os, "fsync", flushed)
    assert go(out, *more) == code
    assert_stopped(capsys.readouterr().err, number, out, in_step)
    assert (out / "checkpoint.pt").exists() == (step is not None)
    assert step is None or load_checkpoint(out)["step"] == step
    assert lines == 0 or len(metrics(out)) == lines  # 5 with the evaluation's
    assert (out / "samples.npz").exists() == (what == "the last file")
    assert not list(out.rglob("*.part"))
    undo(monkeypatch, module)
    assert go(out, *more, "--resume") == 0
    assert_same_state(load_checkpoint(straight()), load_checkpoint(out), ["save_every"])
    assert metrics(straight()) == metrics(out)


@one_script
def test_a_signal_whose_exception_gets_lost(go, tmp_path, monkeypatch, module, capsys):
    """A library may swallow it; the program ends as one that was stopped all the same."""
    generate = module.generate

    def swallow(*args):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return generate(*args)
    monkeypatch.setattr(module, "generate", swallow)
    assert go(tmp_path / "run") == 143
    assert "Traceback" not in capsys.readouterr().err


@one_script
@pytest.mark.parametrize("torchrun", [True, False])
def test_torchrun_passes_a_signal_on_and_adds_one_of_its_own(torchrun, tmp_path, module):
    """Under it a SIGTERM after Ctrl-C is no second signal of the user's: the step is finished, and saved."""
    env = {"TORCHELASTIC_RUN_ID": "none"} if torchrun else {}
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, tmp_path / "run"),
                  two_signals_in_step_3, env=env)
    assert child.join() == (130 if torchrun else 143)
    assert child.stderr.startswith("SIGINT: stopping after this step\n") and "Traceback" not in child.stderr
    assert load_checkpoint(tmp_path / "run")["step"] == (3 if torchrun else 2)


def two_signals_in_step_3(module):
    few_images(module)
    batch = module.Run.batch

    def stop(self, data):
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        return batch(self, data)
    module.Run.batch = stop


def stopped_in_the_reduction(rank, module):
    """The signal comes while the processes agree for the third time on whether to stop: in time for the next time."""
    few_images(module)
    reduce, seen = module.dist.all_reduce, itertools.count(1)

    def all_reduce(tensor, *args):
        reduce(tensor, *args)
        if len(tensor) == 2 and next(seen) == 3 and int(os.environ["RANK"]) == rank:
            signal.raise_signal(signal.SIGTERM)
    module.dist.all_reduce = all_reduce


@one_script
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_two_processes_agree_is_not_lost(rank, tmp_path, module):
    children = pair(tmp_path, module, functools.partial(stopped_in_the_reduction, rank), "--steps", 1000, "--save-every", 999)
    assert [child.join() for child in children] == [143, 143], children[0].stderr + children[1].stderr
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert "stopping after this step" in children[rank].stderr


def pair(tmp_path, module, before, *more):
    """Two processes of one run, as torchrun starts them."""
    return tiny.start_ranks(tmp_path, 2, run_as_rank, module.__name__, flags(module.__name__, tmp_path / "run", *more), before)


def run_as_rank(name, argv, before, rank):
    tiny.run_script(name, argv, before)


# ---------------------------------------------------------------------------------------- nowhere to write, no space left


@pytest.fixture
def no_training(module, monkeypatch):
    """The fault must be found before the first step."""
    monkeypatch.setattr(module.Run, "batch", lambda *args: pytest.fail("training began"))


@contextlib.contextmanager
def file_size_limit(size):
    """Files cannot grow beyond this: writing fails in the middle, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@one_script
@pytest.mark.parametrize("where", ["file", "file/run", "file/a/b"])
def test_out_under_a_file(where, go, tmp_path, capsys, no_training):
    (tmp_path / "file").write_text("precious")
    assert go(tmp_path / where) in (1, 2)
    assert str(tmp_path / where) in error_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "precious"


@one_script
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_out_where_nothing_can_be_made(go, capsys, no_training):
    assert go("/proc/there/run") in (1, 2)
    assert "/proc/there" in error_line(capsys.readouterr().err)


@one_script
def test_out_that_cannot_be_written_to(go, tmp_path, capsys, no_training, monkeypatch):
    real = open

    def refuse(path, mode="r", *args, **kwargs):
        if str(path).startswith(str(tmp_path / "run")) and mode[0] in "wax":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refuse)
    assert go(tmp_path / "run") in (1, 2)
    line = error_line(capsys.readouterr().err)
    assert "Permission denied" in line and str(tmp_path / "run") in line


@one_script
def test_a_full_disk_is_found_before_training(go, tmp_path, capsys, no_training):
    with file_size_limit(10_000):
        code = go(tmp_path / "run")
    assert code == 1
    assert str(tmp_path / "run" / "checkpoint.pt") in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoint.pt").exists() and not list((tmp_path / "run").glob("*.part"))


@one_script
def test_a_really_full_disk(go, tmp_path, capsys, no_training):
    (tmp_path / "small").mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "none", tmp_path / "small"], capture_output=True)
    if done.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        assert go(tmp_path / "small" / "run") == 1
        line = error_line(capsys.readouterr().err)
        assert "No space left" in line and str(tmp_path / "small" / "run" / "checkpoint.pt") in line
        assert not list((tmp_path / "small").rglob("*.part"))
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(straight, go, tmp_path, capsys, at_step, monkeypatch, module):
    """The save after step 4 fails half-way; that of step 2 stays, and the run goes on from there when there is space."""
    before, limit = {}, contextlib.ExitStack()
    with limit:
        def fill(run):
            before.update(snapshot(tmp_path / "run"))
            limit.enter_context(file_size_limit(10_000))
        at_step(3, fill)
        code = go(tmp_path / "run")
    assert code == 1
    assert str(tmp_path / "run" / "checkpoint.pt") in error_line(capsys.readouterr().err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
    assert not list((tmp_path / "run").rglob("*.part")) and load_checkpoint(tmp_path / "run")["step"] == 2
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@one_script
def test_a_log_that_cannot_grow(straight, go, tmp_path, capsys, at_step, monkeypatch, module):
    limit = contextlib.ExitStack()
    with limit:
        at_step(3, lambda run: limit.enter_context(file_size_limit((tmp_path / "run" / "metrics.jsonl").stat().st_size + 9)))
        code = go(tmp_path / "run")
    assert code == 1
    assert str(tmp_path / "run" / "metrics.jsonl") in error_line(capsys.readouterr().err)
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@one_script
def test_samples_that_do_not_fit_leave_the_old_ones(straight, go, tmp_path, capsys):
    shutil.copytree(straight(), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with file_size_limit(2_000):
        code = go(tmp_path / "run", "--mode", "sample", "--num-samples", 300)
    assert code == 1
    assert str(tmp_path / "run" / "sampled" / "samples.npz") in error_line(capsys.readouterr().err)
    assert snapshot(tmp_path / "run") == before


@one_script
def test_out_taken_away_during_training(go, tmp_path, capsys, at_step):
    at_step(3, lambda run: shutil.rmtree(tmp_path / "run"))
    assert go(tmp_path / "run") == 1
    assert str(tmp_path / "run") in error_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------ a run in the way


@one_script
@pytest.mark.parametrize("there", ["nothing", "an empty folder", "parts"])
def test_resume_where_there_is_no_checkpoint_starts_the_run(there, straight, go, tmp_path):
    out = tmp_path / "a" / "run"
    if there != "nothing":
        out.mkdir(parents=True)
    if there == "parts":
        (out / "checkpoint.pt.123.part").write_bytes(b"PK")
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)


@one_script
def test_resume_in_a_folder_of_something_else_is_refused(go, tmp_path, capsys, no_training):
    (tmp_path / "thesis.tex").write_text("precious")
    assert go(tmp_path, "--resume") == 2
    assert str(tmp_path) in error_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == {"thesis.tex": b"precious"}


@one_script
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_parts_that_a_killed_run_left_are_removed(flag, straight, go, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight(), out)
    for part in ("checkpoint.pt.123.part", "samples/step_000002.png.9.part", "samples.npz.7.part"):
        (out / part).write_bytes(b"half")
    assert go(out, flag) == 0
    assert_same_run(straight(), out)
    assert not list(out.rglob("*.part"))


@one_script
@pytest.mark.parametrize("point", ["before the renaming", "after the renaming"])
def test_killed_while_a_run_is_overwritten(point, straight, go, tmp_path, module):
    """What --resume continues is the old run with its log, or the new one with its own, never a mixture."""
    out = tmp_path / "run"
    assert go(out, "--seed", 5, "--steps", 6) == 0
    before = snapshot(out)
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out, "--overwrite"),
                  functools.partial(killed_at, point, 1))
    assert child.join() == -signal.SIGKILL
    if point == "before the renaming":
        assert {name: content for name, content in snapshot(out).items() if not name.endswith(".part")} == before
        assert tiny.run(module, ["--resume", "--out", out]) == 0
        assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5, 6, 6]
    else:
        assert go(out, "--resume") == 0
        assert_same_run(straight(), out)
        assert {p.name for p in out.glob("samples/*")} == {"step_000002.png", "step_000004.png"}


@one_script
def test_a_torn_line_of_the_log_does_not_swallow_the_next(straight, go, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight(), out)
    log = out / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "seco')
    assert go(out, "--mode", "eval") == 0
    lines = log.read_text().splitlines()
    assert lines[:-1] == [*(straight() / "metrics.jsonl").read_text().splitlines(), '{"step": 4, "seco']
    assert json.loads(lines[-1])["final"] is True


@contextlib.contextmanager
def held(folder):
    """The folder as another process holds it that writes to it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


USES = [["--resume"], ["--resume", "--steps", "6"], ["--overwrite"], ["--mode", "eval"], ["--mode", "sample"]]


@one_script
@pytest.mark.parametrize("more", USES, ids=" ".join)
@pytest.mark.parametrize("spelling", ["the same", "another"])
def test_a_second_process_is_refused(more, spelling, trained, go, capsys, module, monkeypatch):
    """In every mode, by whatever name it calls the folder; load() does not write and may read."""
    out = trained
    if spelling == "another":
        out = trained.with_name("link")
        out.symlink_to(trained, target_is_directory=True)
    before = snapshot(trained)
    with held(trained):
        assert go(out, *more) == 2
        assert f"--out {out}: another process" in error_line(capsys.readouterr().err)
        assert snapshot(trained) == before
        assert module.load(trained)[-1].seed == 3
    assert go(out, *more) == 0  # it is free again


@one_script
@pytest.mark.parametrize("more", [["--resume"], ["--mode", "eval"], ["--mode", "sample"]], ids=" ".join)
def test_a_checkpoint_is_read_by_who_holds_the_folder(more, trained, go, capsys, module, monkeypatch):
    """Else it might be an older one than that which the other process writes meanwhile."""
    read, seen = module.read_run, []
    monkeypatch.setattr(module, "read_run", lambda folder: (seen.append(folder), read(folder))[1])
    with held(trained):
        assert go(trained, *more) == 2
    assert "another process" in error_line(capsys.readouterr().err) and not seen
    assert go(trained, *more) == 0 and seen


@one_script
def test_a_folder_that_is_empty_yet_is_held_too(go, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"):
        assert go(tmp_path / "run") == 2
    assert "another process" in error_line(capsys.readouterr().err)
    assert snapshot(tmp_path / "run") == {}


@one_script
def test_two_processes_begin_the_same_run_at_once(go, tmp_path, capsys, monkeypatch, module):
    """Neither saw a folder when it started: who comes second is refused, and leaves what the first has written."""
    out = tmp_path / "run"

    def first_comes(*args):
        (out / "samples").mkdir(parents=True)
        (out / "metrics.jsonl").write_text('{"step": 1}\n')
        (out / "checkpoint.pt.1.part").write_text("half written")
        return make_data(module)
    monkeypatch.setattr(module, "load_data", first_comes)
    with contextlib.ExitStack() as stack:
        describe = module.Run.describe
        monkeypatch.setattr(module.Run, "describe", lambda *args: (stack.enter_context(held(out)), describe(*args))[1])
        assert go(out) == 2
        assert "another process" in error_line(capsys.readouterr().err)
    assert snapshot(out) == {"metrics.jsonl": b'{"step": 1}\n', "checkpoint.pt.1.part": b"half written"}


@one_script
def test_a_running_process_holds_its_folder_and_a_killed_one_frees_it(straight, go, tmp_path, capsys, module):
    out = tmp_path / "run"
    child = Child(tmp_path / "child", tiny.run_script, module.__name__, flags(module.__name__, out), waits_in_step_3)
    assert child.wait_for((child.folder / "in step").exists), child.stderr
    for more in USES:
        assert "another process" in refused(go, capsys, out, *more)
    child.kill()
    assert go(out, "--resume") == 0
    assert_same_run(straight(), out)


@one_script
def test_a_run_frees_its_folder_when_it_ends(trained, go, at_step):
    at_step(5, lambda run: signal.raise_signal(signal.SIGTERM))
    assert go(trained, "--resume", "--steps", 6) == 143
    with held(trained):
        pass  # nobody else does
    assert go(trained, "--resume", "--steps", 6) == 0


@one_script
def test_an_existing_run_is_not_overwritten(straight, go, tmp_path, capsys, no_training):
    out = tmp_path / "run"
    shutil.copytree(straight(), out)
    before = snapshot(out)
    assert go(out) == 2
    line = error_line(capsys.readouterr().err)
    assert str(out) in line and "--resume" in line and "--overwrite" in line
    assert snapshot(out) == before


@one_script
def test_a_folder_with_something_else_in_it_is_not_written_to(go, tmp_path, capsys, no_training):
    (tmp_path / "thesis.tex").write_text("precious")
    assert go(tmp_path) == 2
    assert "--out" in error_line(capsys.readouterr().err)
    assert snapshot(tmp_path) == {"thesis.tex": b"precious"}


@one_script
def test_an_empty_folder_is_free(go, tmp_path):
    (tmp_path / "run").mkdir()
    assert go(tmp_path / "run", "--steps", 1) == 0


def test_overwrite_begins_anew(straight, go, tmp_path):
    assert go(tmp_path / "run", "--seed", 5, "--steps", 5) == 0
    assert go(tmp_path / "run", "--overwrite") == 0
    assert_same_run(straight(), tmp_path / "run")


@one_script
def test_overwrite_leaves_no_samples_of_the_old_run_beside_the_new_checkpoint(trained, begun):
    (trained / "thesis.tex").write_text("precious")
    assert (trained / "samples.npz").exists() and (trained / "samples.png").exists()
    (trained / "sampled").mkdir()
    for name in ("samples.npz", "samples.png"):
        shutil.copy(trained / name, trained / "sampled" / name)
    assert begun(trained, "--overwrite")["step"] == 0
    assert snapshot(trained).keys() == {"checkpoint.pt", "config.json", "metrics.jsonl", "thesis.tex"} | {
        name for name in MORE["gan"]}


# --------------------------------------------------------------------------------------------------- checkpoints refused


@pytest.fixture
def trained(straight, tmp_path):
    shutil.copytree(straight(), tmp_path / "run")
    return tmp_path / "run"


every_mode = pytest.mark.parametrize("mode", [["--resume"], ["--mode", "eval"], ["--mode", "sample"]], ids=" ".join)


def refused(go, capsys, out, *more):
    """It exits with code 2, one line that names the checkpoint, and leaves every file as it was."""
    before = snapshot(out)
    assert go(out, *more) == 2
    line = error_line(capsys.readouterr().err)
    assert str(out) in line
    assert snapshot(out) == before
    return line


@one_script
@pytest.mark.parametrize("mode", [["--mode", "eval"], ["--mode", "sample"], ["--mode", "eval", "--resume"]], ids=" ".join)
def test_no_checkpoint(mode, go, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert "checkpoint" in refused(go, capsys, tmp_path / "run", *mode)
    assert go(tmp_path / "nowhere", *mode) == 2
    assert str(tmp_path / "nowhere") in error_line(capsys.readouterr().err)
    assert not (tmp_path / "nowhere").exists()


@one_script
@pytest.mark.parametrize("keep", [0, 1, 2, 4, 30, 100, 1000, 0.1, 0.5, 0.9, -100, -22, -1])
def test_truncated_checkpoint(keep, trained, go, capsys):
    content = (trained / "checkpoint.pt").read_bytes()
    (trained / "checkpoint.pt").write_bytes(content[:int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "checkpoint.pt" in refused(go, capsys, trained, "--resume")


@one_script
@pytest.mark.parametrize("content", [
    b"<html>404</html>", b"\0" * 5000, b"PK\x03\x04", b"\x80\x02.", b"\x80\x04N.", b"\x80\x04}.",
    pickle.dumps({"format": 1}), pickle.dumps([1, 2]), b"\n\n\n", bytes(range(256)) * 9])
@every_mode
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_not_a_checkpoint_at_all(content, mode, trained, go, capsys):
    (trained / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt" in refused(go, capsys, trained, *mode)


@one_script
def test_a_folder_under_the_name_of_the_checkpoint(trained, go, capsys):
    (trained / "checkpoint.pt").unlink()
    (trained / "checkpoint.pt").mkdir()
    assert "checkpoint.pt" in refused(go, capsys, trained, "--resume")


def changed(trained, change):
    saved = load_checkpoint(trained)
    saved = change(saved) or saved
    torch.save(saved, trained / "checkpoint.pt")


@every_mode
def test_checkpoint_of_another_script(mode, trained, go, capsys, module):
    changed(trained, lambda saved: saved.update(script="another_model"))
    line = refused(go, capsys, trained, *mode)
    assert "another_model" in line and module.__name__ in line


@one_script
@every_mode
def test_checkpoint_of_another_format(mode, trained, go, capsys):
    changed(trained, lambda saved: saved.update(format=1))
    assert "format" in refused(go, capsys, trained, *mode)


@every_mode
def test_checkpoint_of_another_version_of_the_script(mode, trained, go, capsys):
    """Whose configuration has a field more, or a field less: named."""
    changed(trained, lambda saved: saved["config"].update(number_of_heads=3))
    assert "number_of_heads" in refused(go, capsys, trained, *mode)
    changed(trained, lambda saved: (saved["config"].pop("number_of_heads"), saved["config"].pop("lr"))[:0])
    assert "lr" in refused(go, capsys, trained, *mode)


@one_script
@pytest.mark.parametrize("part", ["model", "model's tensors", "one tensor", "config", "step", "script"])
def test_weights_alone(part, trained, go, capsys):
    saved = load_checkpoint(trained)
    model = next(v for v in saved.values() if isinstance(v, dict) and v and all(map(torch.is_tensor, v.values())))
    torch.save({"model": {"model": model}, "model's tensors": dict(model), "one tensor": next(iter(model.values())),
                "config": {k: v for k, v in saved.items() if k != "config"},
                "step": {k: v for k, v in saved.items() if k != "step"},
                "script": {k: v for k, v in saved.items() if k != "script"}}[part], trained / "checkpoint.pt")
    assert "checkpoint" in refused(go, capsys, trained, "--resume")


@one_script
@pytest.mark.parametrize("name, value", [("step", "3"), ("step", None), ("seconds", "1"), ("log_size", "x"), ("facts", None)])
def test_a_checkpoint_whose_numbers_are_none(name, value, trained, go, capsys):
    changed(trained, lambda saved: saved.update({name: value}))
    assert name in refused(go, capsys, trained, "--resume")


@every_mode
def test_a_checkpoint_that_lacks_a_part(mode, trained, go, capsys):
    name = next(name for name in load_checkpoint(trained) if name.startswith("ema_"))
    changed(trained, lambda saved: saved.pop(name) and None)
    assert name in refused(go, capsys, trained, *mode)


@pytest.mark.parametrize("flag, value", [("--lr", 0.125), ("--batch-size", 8), ("--seed", 4), ("--dataset", "mnist"),
                                         ("--image-size", 16), ("--ema", 0.5), ("--init", "another")])
def test_another_configuration_is_refused(flag, value, trained, go, capsys, module):
    """A run keeps its configuration: a flag that differs is named, with both values."""
    had = load_checkpoint(trained)["config"][flag[2:].replace("-", "_")]
    line = refused(go, capsys, trained, "--resume", flag, value)
    assert flag in line and str(value) in line and str(had) in line
    if had is not None:  # said again it is no difference
        assert tiny.run(module, ["--resume", "--out", trained, flag, had]) == 0


def groups(module):
    """The title above each field of Config."""
    title, found = "", {}
    for line in tiny.getsource(module.Config).splitlines()[2:]:
        if line.strip().startswith("#"):
            title = line.strip("# ")
        elif ":" in line:
            found[line.split(":")[0].strip()] = title
    return found


def another(field, value):
    """What the command line must say for a field to have another value."""
    flag, choices = "--" + field.name.replace("_", "-"), get_args(field.type)
    if isinstance(value, bool):
        return [f"--no-{flag[2:]}" if value else flag]
    if get_origin(field.type) is Literal:
        return [flag, next(choice for choice in choices if choice != value)]
    if isinstance(value, tuple):
        return [flag, *(str(v + 1) for v in value)]
    if field.type is str or str in choices:
        return [flag, "another"]
    return [flag, str((value or 0) + 1 if int in (field.type, *choices) else (value or 0) * 0.4 + 0.17)]


def test_every_flag_is_refused_or_free(trained, module, capsys):
    """Whatever is not free to change is refused when it changes, and named."""
    saved, title = load_checkpoint(trained)["config"], groups(module)
    fields = dataclasses.fields(module.Config)
    assert title.keys() == {field.name for field in fields}
    kept = [field for field in fields if "free to change" not in title[field.name]]
    assert {"dataset", "image_size", "batch_size", "lr", "seed", "ema", "init"} < {field.name for field in kept}
    for field in kept:
        line = another(field, saved[field.name])
        with pytest.raises(SystemExit) as e:
            module.main(["--resume", "--out", str(trained), *line])
        said = error_line(capsys.readouterr().err)
        assert e.value.code == 2 and "--" + field.name.replace("_", "-") in said and str(trained) in said


def network(saved):
    """Name of the averaged network in a checkpoint."""
    return next(name for name in saved if name.startswith("ema_"))


def optimizer(saved):
    return next(name for name in saved if name.startswith("optimizer"))


def first_weight(saved):
    """(name of the network, of a tensor in it, the tensor): of more than one number, in floating point."""
    part = network(saved)
    return part, *next((k, v) for k, v in saved[part].items() if v.is_floating_point() and v.numel() > 1)


def spoil_weight(change):
    def spoil(saved):
        part, name, weight = first_weight(saved)
        saved[part][name] = change(weight.clone())
    return spoil


def spoil_moment(change):
    def spoil(saved):
        moments = saved[optimizer(saved)]["state"][0]
        moments["exp_avg"] = change(moments["exp_avg"].clone())
    return spoil


def a_nan(x):
    x[(-1,) * x.ndim] = math.nan
    return x


UNTRUSTED = {  # what is changed: (how, whether sampling and evaluation use it)
    "a weight of another shape": (spoil_weight(lambda w: torch.cat([w, w])), True),
    "a weight that lacks": (lambda saved: saved[network(saved)].__delitem__(first_weight(saved)[1]), True),
    "a weight too many": (lambda saved: saved[network(saved)].update(another=torch.zeros(3)), True),
    "a weight that is no tensor": (spoil_weight(lambda w: "weight"), True),
    "a weight that is not finite": (spoil_weight(a_nan), True),
    "a moment of another shape": (spoil_moment(lambda m: m.new_zeros(1)), False),
    "a moment with more numbers": (spoil_moment(lambda m: torch.cat([m, m])), False),
    "a moment that is no tensor": (spoil_moment(lambda m: 3), False),
    "a moment that is not finite": (spoil_moment(a_nan), True),
    "an optimizer of no parameters": (lambda saved: saved[optimizer(saved)]["param_groups"][0]["params"].clear(), False),
    "an optimizer without groups": (lambda saved: saved[optimizer(saved)].__delitem__("param_groups"), False),
    "seconds that are not finite": (lambda saved: saved.update(seconds=math.inf), True),
    "a learning rate that is not finite": (lambda saved: saved["config"].update(lr=math.nan), True),
    "a network that is none": (lambda saved: saved.update({network(saved): [1, 2]}), True),
}


@one_script
@every_mode
@pytest.mark.parametrize("what", UNTRUSTED)
def test_a_checkpoint_that_cannot_be_trusted(what, mode, trained, go, capsys):
    """Refused in one line in every mode that uses what is wrong with it."""
    change, always = UNTRUSTED[what]
    changed(trained, change)
    if always or mode == ["--resume"]:
        assert "checkpoint.pt" in refused(go, capsys, trained, *mode, "--steps", 6)
    else:
        assert go(trained, *mode) == 0


@every_mode
@pytest.mark.parametrize("what", ["a weight of another shape", "a weight that is not finite"])
def test_weights_that_cannot_be_trusted(what, mode, trained, go, capsys):
    """In each script."""
    changed(trained, UNTRUSTED[what][0])
    assert "checkpoint.pt" in refused(go, capsys, trained, *mode)


@pytest.mark.parametrize("what", ["a moment of another shape", "a moment with more numbers"])
def test_moments_of_another_shape(what, trained, go, capsys):
    """In each script, each of its optimizers."""
    saved = load_checkpoint(trained)
    for name in [name for name in saved if name.startswith("optimizer") and saved[name]["state"]]:
        moments = saved[name]["state"][0]
        right = moments["exp_avg"]
        moments["exp_avg"] = right.new_zeros(1) if what == "a moment of another shape" else torch.cat([right, right])
        torch.save(saved, trained / "checkpoint.pt")
        assert name in refused(go, capsys, trained, "--resume", "--steps", 6)
        moments["exp_avg"] = right


@one_script
@every_mode
@pytest.mark.parametrize("what", ["weight", "moment", "config"])
def test_one_flipped_byte(what, mode, trained, go, capsys):
    """Somewhere in a tensor or in the pickle: it would load, and be another model."""
    content = bytearray((trained / "checkpoint.pt").read_bytes())
    saved = load_checkpoint(trained)
    tensor = first_weight(saved)[2] if what == "weight" else saved[optimizer(saved)]["state"][0]["exp_avg"]
    inside = b"batch_size" if what == "config" else tensor.numpy().tobytes()
    content[content.index(inside) + len(inside) // 2] ^= 1
    (trained / "checkpoint.pt").write_bytes(content)
    assert "checkpoint.pt" in refused(go, capsys, trained, *mode)


@one_script
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_test_figure_that_is_not_finite(value, mode, straight, go, tmp_path, capsys, monkeypatch, module):
    """It is no result: exit code 1, and what is written is JSON all the same."""
    out = tmp_path / "run"
    if mode == "eval":
        shutil.copytree(straight(), out)
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *args: evaluate(*args) | {"test_score": value})
    assert go(out, "--mode", mode) == 1
    assert "test_score" in error_line(capsys.readouterr().err)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["final"] is True and lines[-1]["test_score"] is None
    assert all(v is not None for k, v in lines[-1].items() if k != "test_score")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@one_script
@every_mode
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "old torch", "torch", "inside a checkpoint"])
def test_a_malicious_checkpoint_runs_nothing(form, mode, trained, go, capsys, tmp_path):
    evil, path = Payload(tmp_path / "owned"), trained / "checkpoint.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif form == "inside a checkpoint":
        torch.save(load_checkpoint(trained) | {"optimizer": evil}, path)
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "torch")
    refused(go, capsys, trained, *mode)
    assert not (tmp_path / "owned").exists()
    with contextlib.suppress(Exception):
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # it would have
    assert (tmp_path / "owned").exists()


def test_a_run_resumed_on_other_data(go, tmp_path, capsys, monkeypatch, module):
    """Other sizes, channels, classes or numbers of images than those it was trained on: named, in one line."""
    assert go(tmp_path / "run", "--steps", 1) == 0
    capsys.readouterr()
    others = {"channels": {"shape": (3, 8, 8)}, "size": {"shape": (1, 16, 16)}, "number": {"train": 41},
              "classes": {"classes": 4}, "no classes": {"classes": 0}}
    for what, other in others.items():
        monkeypatch.setattr(module, "load_data", lambda *args, other=other: make_data(module, **other))
        for mode in (["--resume", "--steps", 2], ["--mode", "eval"]):
            if "classes" in what and module.__name__ == "vae":  # which knows of none
                continue
            before = snapshot(tmp_path / "run")
            try:
                code = go(tmp_path / "run", *mode)
            except RuntimeError as e:
                pytest.fail(f"{what}, {mode}: {str(e).splitlines()[0]}")
            assert code == 2, what
            assert "--dataset" in error_line(capsys.readouterr().err)
            assert snapshot(tmp_path / "run") == before


# ------------------------------------------------------------------------------------------------- numbers that explode


@pytest.fixture
def spoil(module, monkeypatch):
    """spoil(step, loss=, gradient=): multiply the loss, or the gradient of one parameter, by a number in this step."""
    update, found = module.Run.update, []

    def arrange(step, loss=1.0, gradient=None):
        def spoilt(self, batch_loss, model, *args, **more):
            if self.step == step:
                batch_loss = batch_loss * loss
                if gradient:
                    names = [n for n, q in model.named_parameters() if q.requires_grad]
                    found[:] = names[len(names) // 2:len(names) // 2 + 2]
                    hooks = [model.get_parameter(name).register_hook(lambda g: g * gradient) for name in found]
                    try:
                        return update(self, batch_loss, model, *args, **more)
                    finally:
                        for hook in hooks:
                            hook.remove()
            return update(self, batch_loss, model, *args, **more)
        monkeypatch.setattr(module.Run, "update", spoilt)
        return found
    return arrange


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite(value, spoil, go, tmp_path, capsys, straight, monkeypatch, module):
    spoil(3, loss=value)
    assert go(tmp_path / "run") == 1
    line = error_line(capsys.readouterr().err)
    assert "step 3" in line and str(value) in line and str(tmp_path / "run" / "checkpoint.pt") in line
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    undo(monkeypatch, module)
    assert go(tmp_path / "run", "--resume") == 0
    assert_same_run(straight(), tmp_path / "run")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value, spoil, go, tmp_path, capsys):
    found = spoil(3, gradient=value)
    assert go(tmp_path / "run", "--save-every", 1) == 1
    line = error_line(capsys.readouterr().err)
    assert "step 3" in line and found[0] in line and found[1] not in line
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert all(v.isfinite().all() for _, v in tiny.leaves(load_checkpoint(tmp_path / "run")) if torch.is_tensor(v))


def test_the_first_step_not_finite(spoil, go, tmp_path, capsys):
    spoil(1, loss=math.nan)
    assert go(tmp_path / "run") == 1
    assert "step 1" in error_line(capsys.readouterr().err)
    assert load_checkpoint(tmp_path / "run")["step"] == 0


def test_a_learning_rate_that_is_far_too_large(go, tmp_path, capsys, module):
    """Whether the weights, the loss or the gradient go first: it stops, and no file holds a number that is not finite."""
    flags = {"vqgan": [["--lr", "1e38", "--stage1", 20], ["--prior-lr", "1e38"]]}.get(module.__name__, [["--lr", "1e38"]])
    for i, rate in enumerate(flags):
        out = tmp_path / f"run{i}"
        assert go(out, *rate, "--save-every", 1, "--steps", 20) == 1
        assert f"a smaller {rate[0]} may help" in error_line(capsys.readouterr().err)
        assert all(v.isfinite().all() for _, v in tiny.leaves(load_checkpoint(out)) if torch.is_tensor(v))


@one_script
@pytest.mark.parametrize("value", ["inf", "1e999"])
def test_an_infinite_learning_rate_is_refused(value, go, tmp_path, capsys, no_training):
    assert go(tmp_path / "run", "--lr", value) == 2
    assert "--lr" in error_line(capsys.readouterr().err)


def test_fp16_skips_a_step_that_overflows_and_stops_at_a_loss_that_does(spoil, go, tmp_path, capsys):
    spoil(2, gradient=math.inf)
    assert go(tmp_path / "skips", "--amp", "fp16") == 0
    assert all(v.isfinite().all() for _, v in tiny.leaves(load_checkpoint(tmp_path / "skips")) if torch.is_tensor(v))
    spoil(2, loss=math.nan)
    capsys.readouterr()
    assert go(tmp_path / "stops", "--amp", "fp16") == 1
    assert "step 2" in error_line(capsys.readouterr().err)


def test_fp16_stops_at_gradients_that_no_scale_makes_finite(module, go, tmp_path, capsys, monkeypatch):
    update = module.Run.update

    def spoilt(self, loss, *args, **more):
        loss.register_hook(lambda gradient: gradient * math.nan)
        return update(self, loss, *args, **more)

    monkeypatch.setattr(module.Run, "update", spoilt)
    assert go(tmp_path / "run", "--amp", "fp16", "--steps", 40, "--save-every", 100) == 1
    assert "first bad gradient" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_resumes_bit_for_bit(amp, go, tmp_path, straight):
    assert go(tmp_path / "run", "--amp", amp, "--steps", 2) == 0
    assert go(tmp_path / "run", "--amp", amp, "--resume") == 0
    assert_same_state(load_checkpoint(straight("--amp", amp)), load_checkpoint(tmp_path / "run"))


@pytest.mark.filterwarnings("ignore")
def test_compiled_training_is_the_same(go, tmp_path, monkeypatch):
    """--compile, with the compiler's own graphs but not its slow code generator; the checkpoint is the plain network's."""
    functions, modules, calls = torch.compile, torch.nn.Module.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **more: calls.append(f) or functions(f, backend="aot_eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: calls.append(net) or modules(net, backend="aot_eager"))
    for flag in ("--no-compile", "--compile"):
        assert go(tmp_path / flag, flag, "--steps", 3) == 0
        assert bool(calls) == (flag == "--compile")
    plain, compiled = (dict(tiny.leaves(load_checkpoint(tmp_path / flag))) for flag in ("--no-compile", "--compile"))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        if torch.is_tensor(value) and value.is_floating_point():
            torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- nonsense on the line


@one_script
@pytest.mark.parametrize("argv, words", [
    (["--dataset", "imagenet"], ["--dataset imagenet", "digits", "mnist", "fashion_mnist", "cifar10", "folder"]),
    (["--dataset", "no/such/folder"], ["--dataset no/such/folder", "digits", "folder"]),
    (["--dataset", "MNIST"], ["--dataset MNIST", "mnist"]),
    (["--device", "tpu"], ["--device", "tpu", "auto", "cpu", "cuda", "mps"]),
    (["--kernels", "cutlass"], ["--kernels", "cutlass", "auto", "torch", "triton"]),
    (["--mode", "play"], ["--mode", "play", "train", "eval", "sample"]),
    (["--steps", "0"], ["--steps: 0", "> 0"]),
    (["--steps", "-5"], ["--steps: -5", "> 0"]),
    (["--minutes", "0"], ["--minutes: 0", "> 0"]),
    (["--minutes", "-1"], ["--minutes: -1", "> 0"]),
    (["--minutes", "nan"], ["--minutes: nan"]),
    (["--batch-size", "0"], ["--batch-size: 0", "1 to 65536"]),
    (["--batch-size", "-3"], ["--batch-size: -3", "1 to 65536"]),
    (["--image-size", "-8"], ["--image-size: -8", "0 to 4096"]),
    (["--num-samples", "0"], ["--num-samples: 0", "> 0"]),
    (["--save-every", "0"], ["--save-every: 0", "> 0"]),
    (["--log-every", "0"], ["--log-every: 0", "> 0"]),
    (["--lr", "0"], ["--lr: 0", "> 0"]),
    (["--lr", "nan"], ["--lr: nan", "must be"]),
    (["--ema", "-1"], ["--ema: -1", "must be"]),
    (["--seed", "-1"], ["--seed: -1", "must be"]),
    (["--batch-size", "sixteen"], ["--batch-size", "sixteen"]),
    (["--no-such-flag"], ["--no-such-flag"]),
])
def test_nonsense_is_one_line_and_exit_code_2(argv, words, module, tmp_path, capsys, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    assert tiny.run(module, argv) == 2
    out, err = capsys.readouterr()
    line = error_line(err)
    assert out == "" and all(word in line for word in words), line
    assert not list(tmp_path.iterdir())  # nothing was made


@one_script
@pytest.mark.parametrize("device, there", [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())])
def test_a_device_that_is_not_there(device, there, module, tmp_path, capsys, monkeypatch, no_training):
    if there:
        pytest.skip("it is there")
    monkeypatch.chdir(tmp_path)
    assert tiny.run(module, ["--device", device]) == 2
    line = error_line(capsys.readouterr().err)
    assert f"--device {device}" in line and "cpu" in line
    assert not list(tmp_path.iterdir())


THEIRS = types.SimpleNamespace(mode="auto")  # some other package of the name


@one_script
@pytest.mark.parametrize("package, word", [(None, "kernels/"), (THEIRS, "kernels/"), (kernels, "no CUDA device")])
@pytest.mark.parametrize("where", ["flag", "environment"])
def test_triton_that_cannot_be_had(package, word, where, module, tmp_path, capsys, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(kernels, "available", lambda kind: (False, "no CUDA device"))
    if where == "environment":
        monkeypatch.setenv("M2_KERNELS", "triton")
    assert tiny.run(module, ["--kernels", "triton"] if where == "flag" else []) == 2
    line = error_line(capsys.readouterr().err)
    assert "--kernels" in line and "triton" in line and word in line
    assert not list(tmp_path.iterdir())


@one_script
def test_an_unknown_mode_in_the_environment(module, tmp_path, capsys, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("M2_KERNELS", "cutlass")
    assert tiny.run(module, []) == 2
    line = error_line(capsys.readouterr().err)
    assert "--kernels" in line and "must be auto, torch or triton" in line and "cutlass" in line


@one_script
def test_lack_of_memory_is_one_line(module, few, tmp_path, capsys, monkeypatch):
    """What torch says when the memory of a device, or of the machine, is used up."""
    for error in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
                               "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)\n"), MemoryError()):
        def lack(*args, error=error):
            raise error
        monkeypatch.setattr(module.Run, "batch", lack)
        try:
            code = tiny.run(module, flags(module.__name__, tmp_path / "run", "--overwrite"))
        except (RuntimeError, MemoryError) as e:
            pytest.fail(f"a traceback of {e!r}")
        assert code == 1 and "--batch-size" in error_line(capsys.readouterr().err)


def numbers(module):
    """(flag, int or float, whether it takes several, smallest and largest value) of each number of Config.

    Those of the core, which are the same in all scripts, of one script alone.
    """
    comments, title = dict(re.findall(r"^    (\w+): .*?  # (.*)$", tiny.getsource(module.Config), re.M)), groups(module)
    for field in dataclasses.fields(module.Config):
        if title[field.name].startswith("core") and module.__name__ != "gan":
            continue
        kinds = {field.type, *get_args(field.type)} & {int, float}
        if kinds:
            kind, flag = kinds.pop(), "--" + field.name.replace("_", "-")
            bound = re.search(r"\((>=? )?(-?[\d.]+)(?: to ([\d.]+))?\)", comments[field.name])
            assert bound, f"{flag} has no bound"
            low, high = float(bound[2]), float(bound[3] or (2**31 - 1 if kind is int else torch.finfo(torch.float32).max))
            if bound[1] == "> ":
                low = low + 1 if kind is int else low + 1e-30
            yield flag, kind, get_origin(field.type) is tuple, kind(low), kind(high)


def test_numbers_beyond_their_bounds(module, capsys, monkeypatch, no_training, tmp_path):
    """Each number of each script: one line that names the flag, whatever Python or torch would say of the value."""
    monkeypatch.chdir(tmp_path)
    for flag, kind, several, low, high in numbers(module):
        beyond = [low - 1, high + 1 if kind is int else high * 1.001, 2**63, 2**64, -2**63, "1e308", "-1e308", "inf", "-inf",
                  "nan", "", " ", "x", "0x10", "9" * 400, "9" * 5000, *(["0.5", "1e3"] if kind is int else ["1e-9-"])]
        for value in beyond:
            if kind is float and high > 1e30 and value in (2**63, 2**64, "9" * 400, "9" * 5000):
                value = "1e39"
            assert tiny.run(module, [f"{flag}={value}"]) == 2, f"{flag} {value}"
            out, err = capsys.readouterr()
            assert out == "" and flag in error_line(err)
        if several:
            for values in ([high, 2**63], [low, low - 1], [2**64, low], [low, "nan"], []):
                assert tiny.run(module, [flag, *values]) == 2, f"{flag} {values}"
                assert flag in error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


class Enough(BaseException):
    """It runs, and that is all that is asked."""


def try_extremes(name, report):
    """A step, evaluation and samples with each number of Config as small, and as large, as its bound allows.

    With 2 GB of memory beyond what is in use, and for a moment of computing: what still runs then is all right.
    """
    module, found, struck = importlib.import_module(name), {}, []
    data = make_data(module, train=4, test=2)
    module.load_data = lambda *args: data
    module.getsource = tiny.getsource

    def enough(signum, frame):
        while frame is not None and frame.f_code is not tiny.run.__code__:
            frame = frame.f_back
        if frame is not None:  # a late signal, after the run, is none
            struck.append(True)
            raise Enough
    signal.signal(signal.SIGPROF, enough)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    least = flags(name, "run", "--steps", 1, "--batch-size", 2, "--num-samples", 1, "--overwrite")
    assert tiny.run(module, least) == 0  # to its end, however long that takes
    for flag, _, several, low, high in numbers(module):
        for values in {(low,), (high,)} | ({(high, high), (1,) * 40} if several else set()):
            case = " ".join(map(str, (flag, *values)))
            argv = [*least, flag, *map(str, values)]
            with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
                try:
                    struck.clear()
                    signal.setitimer(signal.ITIMER_PROF, 0.3, 0.3)  # again and again: one may get lost in a library
                    code = tiny.run(module, argv)
                except Enough:
                    code = "ran"
                except BaseException as e:
                    code = f"a traceback of {e!r}"[:300]
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
            found[case] = code, err.getvalue(), bool(struck)
    Path(report).write_text(json.dumps(found))


def test_numbers_at_their_bounds(tmp_path, module):
    """Each number of each script works, or cannot be had in one line: no traceback, and no crash of the interpreter."""
    child = Child(tmp_path / "child", try_extremes, module.__name__, "report.json", env={"OMP_NUM_THREADS": "1"})
    assert child.join() == 0, child.stderr
    found = json.loads((child.folder / "report.json").read_text())
    assert len(found) > 10
    bad = {case: (code, err[-300:]) for case, (code, err, _) in found.items()
           if code not in (0, "ran") and not (code in (1, 2) and err.splitlines()[-1].startswith("error: "))}
    assert not bad, "\n".join(f"{case}: {what}" for case, what in bad.items())
    # where the clock struck, it may have stopped a constructor half-way, or a destructor: Python then prints such a line
    traces = {case: err for case, (_, err, struck) in found.items()
              if "Traceback" in err and not (struck and "Exception ignored in" in err)}
    assert not traces, "\n".join(f"{case}: {err}" for case, err in traces.items())
    assert sum(code in (0, "ran") for code, _, _ in found.values()) > 5


@one_script
@pytest.mark.parametrize("flag", ["--out", "--data-dir", "--dataset", "--init"])
def test_the_home_folder(flag, straight, tmp_path, monkeypatch, module, capsys):
    """A ~ that no shell has expanded, as in --out=~/runs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(straight(), tmp_path / "home" / "it")
    seen, out = [], tmp_path / "home" / "it" if flag == "--out" else tmp_path / "run"
    monkeypatch.setattr(module, "load_data", lambda *args: seen.append(args) or make_data(module))
    argv = [*flags(module.__name__, out), "--overwrite", "--steps", 1, f"{flag}=~/it"]
    assert tiny.run(module, argv) == 0
    assert str(tmp_path / "home" / "it") in (load_checkpoint(out)["config"][flag[2:].replace("-", "_")],)
    assert load_checkpoint(out)["step"] == 1 and not list(tmp_path.glob("*~*"))
    assert (str(tmp_path / "home" / "it") in seen[0]) == (flag in ("--data-dir", "--dataset"))


@one_script
@pytest.mark.parametrize("value", ["", " ", ".", "~nobody/x", "x" * 5000, "/dev/null"])
def test_names_of_data_sets_that_are_none(value, module, tmp_path, capsys, monkeypatch, no_training):
    monkeypatch.chdir(tmp_path)
    assert tiny.run(module, ["--dataset", value]) in (1, 2)
    error_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@one_script
@pytest.mark.parametrize("flag", ["--out", "--init", "--data-dir"])
@pytest.mark.parametrize("value", ["", " ", "x" * 5000, "/dev/null", "/dev/null/x"])
def test_paths_that_are_none(flag, value, go, tmp_path, capsys, monkeypatch):
    """Either it does not matter, or one line says what is wrong."""
    monkeypatch.chdir(tmp_path)
    code = go(tmp_path / "run", "--steps", 1, f"{flag}={value}")
    err = capsys.readouterr().err
    assert code == 0 and err == "" or code in (1, 2) and error_line(err)
    assert code == 0 or flag != "--data-dir"  # of digits, which need none


# ----------------------------------------------------------------------------------------------------- what a run says


ALONG = {"config.json", "metrics.jsonl", "checkpoint.pt"}  # what a training writes as it goes, named in one line at its start


@pytest.mark.parametrize("mode", ["train", "eval", "sample"])
def test_every_file_is_named_with_what_is_in_it(mode, go, straight, tmp_path, capsys):
    out = tmp_path / "run"
    if mode != "train":
        shutil.copytree(straight(), out)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert go(out, "--mode", mode) == 0
    lines = capsys.readouterr().out.splitlines()
    new = [path for path in out.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)]
    assert new
    for path in new:
        if path.parent.name == "samples":
            continue  # the grids made meanwhile
        if path.name in ALONG:
            if mode == "train":
                assert any(line.startswith(f"{out}: ") and path.name in line for line in lines), path.name
        else:
            assert any(line.startswith(f"{path}: ") and len(line) > len(f"{path}: ") + 5 for line in lines), path.name


def test_evaluation_on_some_of_the_test_images(trained, go, capsys, monkeypatch, module):
    """--eval-images N is the first N; which were taken is said, and whatever is said of more than there are is all."""
    figures, said = {}, {}
    for n in (0, 5, 12):
        assert go(trained, "--mode", "eval", "--eval-images", n) == 0
        figures[n], said[n] = metrics(trained)[-1], capsys.readouterr().out
    assert "the first 5 of 11 test images" in said[5]
    assert all("all 11 test images" in said[n] for n in (0, 12))
    data = module.load_data()
    monkeypatch.setattr(module, "load_data", lambda *args: data._replace(test=data.test[:5], test_labels=data.test_labels[:5]))
    assert go(trained, "--mode", "eval") == 0
    assert metrics(trained)[-1] == figures[5] != figures[0] == figures[12]


def broken_stream(how):
    """Standard output or error into which nothing can be written."""
    if how == "closed before the start":
        return None
    if how == "reader gone":
        read, written = os.pipe()
        os.close(read)
    else:
        written = os.open("/dev/null", os.O_RDONLY) if how == "closed" else os.open("/dev/full", os.O_WRONLY)
    return os.fdopen(written, "w")


@one_script
@pytest.mark.parametrize("how", ["closed before the start", "reader gone", "closed", "disk full"])
@pytest.mark.parametrize("which", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids=" and ".join)
def test_a_closed_stream_does_not_end_a_run(how, which, straight, go, tmp_path, monkeypatch, at_step):
    out, streams = tmp_path / "run", {name: broken_stream(how) for name in which}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert go(out) == 0
    assert_same_run(straight(), out)
    at_step(5, lambda run: signal.raise_signal(signal.SIGTERM))
    assert go(out, "--resume", "--steps", 6) == 143  # what it says then is not heard
    assert load_checkpoint(out)["step"] == 5
    monkeypatch.undo()
    for stream in filter(None, streams.values()):
        with contextlib.suppress(OSError):  # what was not written
            stream.close()


@one_script
@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_pipe_whose_reader_leaves(which, tmp_path, module):
    """`python script.py | head -1`, in an interpreter of its own: the exit code too is that of an undisturbed run."""
    read, written = os.pipe()
    os.close(read)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {which: written}
    path = tiny.ROOT / f"{module.__name__}.py"
    done = subprocess.run([sys.executable, path, *flags(module.__name__, tmp_path / "run", "--steps", 2)], **both)
    os.close(written)
    assert done.returncode == 0 and not done.stderr
    assert (tmp_path / "run" / "samples.npz").exists()


@one_script
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_names_that_the_terminal_cannot_show(encoding, tmp_path, monkeypatch, module):
    """Of a class, of a folder, of a broken image: they are written another way, and the run goes on."""
    images, out = tmp_path / "Bilder \u5c0f", tmp_path / "L\u00e4ufe \U0001f600"
    for name in ("gr\u00f6\u00dfe", "\u5c0f"):
        pictures(images / name, 6)
    (images / "\u5c0f" / "kaputt \u0416.png").write_text("not an image")
    raw = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, buffer in raw.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding))
    assert tiny.run(module, flags(module.__name__, out, "--dataset", images, "--steps", 1)) == 0
    assert tiny.run(module, flags(module.__name__, out, "--mode", "eval", "--lr", 1)) == 2  # says the folder's name
    for name in raw:
        getattr(sys, name).flush()
    said = {name: buffer.getvalue().decode(encoding) for name, buffer in raw.items()}
    monkeypatch.undo()
    names = ["gr\u00f6\u00dfe", "\u5c0f"]
    assert ", ".join(n.encode(encoding, "backslashreplace").decode(encoding) for n in names) in said["stdout"]
    assert "kaputt" in said["stderr"] and "--lr" in said["stderr"]
    assert load_checkpoint(out)["facts"]["names"] == names


@one_script
def test_names_that_are_no_text(tmp_path, monkeypatch, module, capfd):
    """Linux allows any bytes in a file's name."""
    images = tmp_path / "images"
    pictures(images, 6)
    shutil.copytree(images, images / os.fsdecode(b"\xff\xfe"))
    shutil.rmtree(images / "000.png", ignore_errors=True)
    (images / os.fsdecode(b"broken \xff.png")).write_text("not an image")
    out = tmp_path / os.fsdecode(b"run \xff")
    for name, fd in (("stdout", 1), ("stderr", 2)):
        monkeypatch.setattr(sys, name, open(fd, "w", encoding="utf-8", closefd=False))
    assert tiny.run(module, flags(module.__name__, out, "--dataset", images, "--steps", 1)) == 0
    assert "skipped 1 images" in capfd.readouterr().err
    assert load_checkpoint(out)["step"] == 1


def test_what_load_gives_is_what_was_sampled_from(trained, go, monkeypatch, module, capsys):
    """The averaged networks, ready to use, and the config; another folder than a run's is refused in one line."""
    used, generate = [], module.generate

    def watch(*args):
        used.extend(copy.deepcopy(net) for net in args if isinstance(net, torch.nn.Module))
        return generate(*args)
    monkeypatch.setattr(module, "generate", watch)
    assert go(trained, "--mode", "sample") == 0
    *networks, cfg = module.load(trained)
    assert isinstance(cfg, module.Config) and cfg.seed == 3 and cfg.steps == 4
    assert used and len(networks) >= len(used)
    for ours, theirs in zip(networks, used, strict=False):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    for net in networks:
        assert not any(part.training for part in net.modules()) and not any(p.requires_grad for p in net.parameters())
    averages = [part for name, part in load_checkpoint(trained).items() if name.startswith("ema_")]
    for average in averages:
        assert any(average.keys() == net.state_dict().keys()
                   and all(torch.equal(average[name], value) for name, value in net.state_dict().items()) for net in networks)
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        module.load(trained / "nowhere")
    assert e.value.code == 2 and "nowhere" in error_line(capsys.readouterr().err)


# --------------------------------------------------------------------------------------------- the weights of another run


@pytest.fixture
def begun(go, at_step):
    """begun(out, flag, ...): the checkpoint of a run as it is before its first step."""
    def begin(out, *more):
        at_step(1, lambda run: sys.exit(99))
        assert go(out, *more) == 99
        return load_checkpoint(out)
    return begin


def networks_of(saved):
    return {name: part for name, part in saved.items()
            if isinstance(part, dict) and len(part) > 1 and all(map(torch.is_tensor, part.values()))}


def starts_as(saved, name):
    """What --init makes of the network of this name: the average, where there is one."""
    return saved.get(f"ema_{name.removeprefix('ema_')}", saved[name])


def test_init_starts_from_the_weights_of_another_run(straight, begun, go, tmp_path, capsys):
    other = load_checkpoint(straight())
    capsys.readouterr()
    saved = begun(tmp_path / "run", "--init", straight(), "--seed", 5)
    said = capsys.readouterr().out.splitlines()
    assert saved["step"] == 0 and len(networks_of(saved)) >= 2
    for name, part in networks_of(saved).items():
        assert f"--init {straight()}: {name} starts from its weights" in said  # and nothing of it that does not fit
        theirs = starts_as(other, name)
        assert part.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in part.items()), name
    plain = begun(tmp_path / "plain", "--seed", 5)
    name = network(saved)
    assert any(not torch.equal(value, saved[name][key]) for key, value in plain[name].items())
    assert go(tmp_path / "run", "--resume", "--seed", 5, "--init", straight()) == 99  # as it began; it is of its config


def test_init_trains_on(straight, go, tmp_path):
    """And what comes of it is resumed like any run, also when the other one is gone."""
    other, out = tmp_path / "other", tmp_path / "run"
    shutil.copytree(straight(), other)
    before = snapshot(other)
    assert go(out, "--init", other) == 0
    assert snapshot(other) == before
    shutil.rmtree(other)
    assert go(out, "--resume", "--init", other, "--steps", 5) == 0
    assert load_checkpoint(out)["step"] == 5


@one_script
def test_init_from_the_run_that_is_overwritten(trained, begun):
    """The weights of a run, its steps and its log begun anew, in the same folder."""
    other = load_checkpoint(trained)
    saved = begun(trained, "--init", trained, "--overwrite")
    name = network(saved)
    assert saved["step"] == 0 and all(torch.equal(value, other[name][key]) for key, value in saved[name].items())
    assert (trained / "metrics.jsonl").read_text() == ""


def names_of_odd(said, folder, network):
    """What the line on a network names as not fitting."""
    start = f"--init {folder}: {network} starts from its weights"
    (line,) = [line for line in said if line == start or line.startswith(f"{start}, but for what does not fit: ")]
    return line.removeprefix(start).removeprefix(", but for what does not fit: ").split(", ") if line != start else []


def assert_named(names, keys, fitting):
    """Each key is named, or a module that holds it: the outermost one in which nothing fits. Nothing else is named."""
    def covers(name, key):
        return f"{key}.".startswith(f"{name}.")
    for key in keys:
        assert sum(covers(name, key) for name in names) == 1, key
    for name in names:
        assert any(covers(name, key) for key in keys) and not any(covers(name, key) for key in fitting), name
        outer = name.rpartition(".")[0]
        assert not outer or any(covers(outer, key) for key in fitting), f"{outer} would do for {name}"


def test_init_names_what_does_not_fit(straight, begun, tmp_path, capsys, monkeypatch, module):
    """On data with more classes: those of their tensors are named and begin anew, the rest is the other run's."""
    other = load_checkpoint(straight())
    monkeypatch.setattr(module, "load_data", lambda *args: make_data(module, classes=5))
    plain = begun(tmp_path / "plain")
    capsys.readouterr()
    saved = begun(tmp_path / "run", "--init", straight())
    said, odd = capsys.readouterr().out.splitlines(), 0
    for name, part in networks_of(saved).items():
        theirs = starts_as(other, name)
        fits = {key for key, value in part.items() if key in theirs and theirs[key].shape == value.shape}
        assert all(torch.equal(part[key], (theirs if key in fits else plain[name])[key]) for key in part), name
        assert_named(names_of_odd(said, straight(), name), part.keys() - fits, fits)
        odd += len(part.keys() - fits)
    assert bool(odd) == (module.__name__ != "vae") == any("does not fit" in line for line in said)


@one_script
@pytest.mark.parametrize("ours, theirs", [(1, 2), (2, 1)])
def test_init_from_another_network(ours, theirs, begun, go, tmp_path, capsys):
    """Blocks that one has and the other lacks are named; what both have is taken over."""
    assert go(tmp_path / "other", "--blocks", theirs) == 0
    other = load_checkpoint(tmp_path / "other")
    capsys.readouterr()
    saved = begun(tmp_path / "run", "--blocks", ours, "--init", tmp_path / "other")
    said = capsys.readouterr().out.splitlines()
    for name, part in networks_of(saved).items():
        start = starts_as(other, name)
        fits = {key for key, value in part.items() if key in start and start[key].shape == value.shape}
        assert fits and all(torch.equal(part[key], start[key]) for key in fits), name
        names = names_of_odd(said, tmp_path / "other", name)
        assert_named(names, (part.keys() | start.keys()) - fits, fits)


@one_script
@pytest.mark.parametrize("what", ["another script", "nowhere", "damaged", "not finite"])
def test_init_from_what_is_no_run_of_this_script(what, straight, go, tmp_path, capsys, no_training):
    other, out = tmp_path / "other", tmp_path / "run"
    shutil.copytree(straight(), other)
    if what == "another script":
        changed(other, lambda saved: saved.update(script="another_model"))
    elif what == "nowhere":
        shutil.rmtree(other)
    elif what == "damaged":
        (other / "checkpoint.pt").write_bytes((other / "checkpoint.pt").read_bytes()[:-500])
    else:
        changed(other, spoil_weight(a_nan))
    assert go(out, "--init", other) == 2
    line = error_line(capsys.readouterr().err)
    assert str(other) in line and (what != "another script" or "another_model" in line)
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def picture(path, size=(8, 8), mode="RGB", seed=0, **options):
    """A picture of noise, in any mode and format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = {"L": 1, "LA": 2, "I;16": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)  # bytes a pixel
    noise = np.random.RandomState(seed).bytes(size[0] * size[1] * (depth or 3))
    image = Image.frombytes(mode, size, noise) if depth else Image.frombytes("RGB", size, noise).convert(mode)
    image.save(path, **options)


def pictures(folder, n, **more):
    for i in range(n):
        picture(folder / f"{i:03d}.png", seed=i, **more)


def load(module, folder, size=0):
    return module.load_data(str(folder), "nowhere", size)


def both(data):
    return torch.cat([data.train, data.test])


@pytest.fixture
def trains(module, tmp_path, capsys):
    """trains(folder, ...): two steps, evaluation and samples; every number finite and none of them an idle 0."""
    def check(folder, *more):
        out = tmp_path / "out"
        code = tiny.run(module, flags(module.__name__, out, "--steps", 2, "--dataset", folder, *more))
        assert code == 0, capsys.readouterr().err
        lines = metrics(out)
        assert [line["step"] for line in lines] == [1, 2, 2]
        assert all(math.isfinite(v) for line in lines for v in line.values())
        assert all(line["loss"] != 0 for line in lines[:2])
        assert any(v != 0 for k, v in lines[2].items() if k.startswith("test_"))
        return np.load(out / "samples.npz")["images"]
    return check


@one_script
@pytest.mark.parametrize("content", [[], ["readme.txt"], ["a/readme.txt", "b/"], ["a/", "b/"], ["fake.png"], ["only one"]])
def test_a_folder_with_too_little(content, module, folder, tmp_path, capsys):
    for name in content:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name == "only one":
            picture(folder / "one.png")
        else:
            path.write_text("not an image")
    assert tiny.run(module, flags(module.__name__, tmp_path / "run", "--dataset", folder)) == 2
    err = capsys.readouterr().err.splitlines()
    assert str(folder) in error_line(err[-1]) and "at least 2" in err[-1]
    assert len(err) == 1 + ("fake.png" in content)  # the broken one is named in a line of its own
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n", [2, 3, 5, 11] if ALL else [2, 11])
def test_fewer_images_than_a_batch(n, folder, trains):
    pictures(folder, n)
    assert trains(folder).shape == (4, 8, 8, 3)


def test_one_image_a_class(folder, trains):
    for i in range(3):
        picture(folder / f"class{i}" / "a.png", seed=i)
    trains(folder)


def test_flat_and_nested_folders_train(folder, trains, tmp_path):
    pictures(folder, 12, mode="L")
    assert trains(folder).shape == (4, 8, 8, 1)
    shutil.rmtree(tmp_path / "out")
    for name in ("a", "b"):
        pictures(tmp_path / "nested" / name, 6)
    assert trains(tmp_path / "nested").shape == (4, 8, 8, 3)
    found = np.load(tmp_path / "out" / "samples.npz")
    assert "labels" not in found or found["labels"].tolist() == [0, 1, 0, 1]


@one_script
def test_what_is_not_an_image_is_passed_by(module, folder, capsys):
    pictures(folder, 5)
    for name in ("notes.txt", ".DS_Store", "Thumbs.db", "labels.csv", "no_extension", "archive.zip"):
        (folder / name).write_bytes(b"\x00\x01 not an image")
    (folder / ".hidden").mkdir()
    data = load(module, folder)
    assert len(both(data)) == 5 and data.names == ()
    assert capsys.readouterr().err == ""


@one_script
@pytest.mark.parametrize("stray", ["__MACOSX", "empty", "notes/a.txt", "thumbnails/deeper/x.txt"])
def test_a_stray_folder_beside_the_images_hides_none_of_them(stray, module, folder):
    pictures(folder, 5)
    path = folder / stray
    if path.suffix:
        path.parent.mkdir(parents=True)
        path.write_text("x")
    else:
        path.mkdir()
    data = load(module, folder)
    assert len(both(data)) == 5 and data.names == ()


@one_script
def test_a_folder_without_images_is_no_class(module, folder):
    for name in ("a", "c"):
        pictures(folder / name, 5)
    (folder / "b").mkdir()
    data = load(module, folder)
    assert len(data.names) == 2 and sorted(set(data.train_labels.tolist())) == [0, 1]


@one_script
@pytest.mark.parametrize("stray", ["__MACOSX/a.png", "paper.pdf"])
def test_a_broken_image_makes_no_class(stray, module, folder, capsys):
    """A folder of which nothing can be read, or a file beside the classes that is no picture."""
    for name in ("a", "c"):
        pictures(folder / name, 5)
    (folder / stray).parent.mkdir(exist_ok=True)
    (folder / stray).write_bytes(b"\x00\x05\x16\x07")
    data = load(module, folder)
    assert len(both(data)) == 10 and len(data.names) == 2
    assert stray in capsys.readouterr().err


@one_script
def test_images_beside_classes_are_not_dropped_in_silence(module, folder, capsys):
    """Both a flat folder and one of classes: whichever it is taken for, the rest is loaded, or spoken of, or refused."""
    pictures(folder, 3)
    pictures(folder / "a", 4)
    pictures(folder / "b", 4)
    try:
        data = load(module, folder)
    except SystemExit as e:
        assert e.code == 2 and str(folder) in error_line(capsys.readouterr().err)
    else:
        assert len(both(data)) == 11 or capsys.readouterr().err.strip()


@one_script
def test_extensions_in_capitals_and_many_formats(module, folder):
    for i, name in enumerate(("a.PNG", "b.Jpg", "c.jpeg", "d.bmp", "e.gif", "f.tif", "g.webp", "h.ppm", "i.tga", "j.JPEG")):
        picture(folder / name, seed=i)
    assert both(load(module, folder)).shape == (10, 3, 8, 8)


@one_script
def test_broken_images_are_counted_and_named(module, folder, capsys, trains):
    pictures(folder, 10)
    broken = ["002.png", "007.png", "cut.jpg", "zero.gif", "text.bmp"]
    picture(folder / "cut.jpg", size=(64, 64))
    for name in broken[:3]:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:len(content) // 2])
    (folder / "zero.gif").write_bytes(b"")
    (folder / "text.bmp").write_text("<html>")
    data = load(module, folder)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(both(data)) == 8 and len(lines) == 1
    assert "skipped 5 images" in lines[0] and all(str(folder / name) in lines[0] for name in broken)
    trains(folder)


@one_script
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "tga", "ico", "pcx", "sgi", "dds", "jp2"])
@pytest.mark.filterwarnings("ignore")  # the decoders' own
def test_images_cut_or_garbled_anywhere(suffix, module, folder, capsys):
    """Whatever a decoder raises: the image is skipped and counted, or it was whole enough to be read."""
    pictures(folder, 2, size=(16, 16))
    try:
        picture(folder / f"whole.{suffix}", size=(16, 16))
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow writes no {suffix}")
    content, rng = (folder / f"whole.{suffix}").read_bytes(), random.Random(0)
    total = 3
    for i in range(30):
        if i < 15:
            spoilt = content[:len(content) * i // 15]
        else:  # some bytes of the beginning, where the structure is
            spoilt = bytearray(content)
            for _ in range(3):
                spoilt[rng.randrange(min(len(spoilt), 120))] = rng.randrange(256)
        (folder / f"spoilt{i}.{suffix}").write_bytes(spoilt)
        total += 1
    data = load(module, folder)
    err = capsys.readouterr().err
    skipped = int(err.split("skipped ")[1].split()[0]) if "skipped " in err else 0
    assert len(both(data)) + skipped == total and len(both(data)) >= 3
    assert data.train.shape[1:] == (3, 16, 16)


MODES = {  # file: (mode, a colour, what becomes of it in a folder of colour images)
    "grey.png": ("L", 100, (100, 100, 100)),
    "colour.png": ("RGB", (10, 20, 30), (10, 20, 30)),
    "opaque.png": ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    "transparent.png": ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    "half.png": ("RGBA", (0, 100, 200, 128), (127, 177, 227)),
    "grey_alpha.png": ("LA", (0, 128), (127, 127, 127)),
    "cmyk.jpg": ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    "cmyk.tif": ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    "one_bit.png": ("1", 1, (255, 255, 255)),
    "one_bit_black.png": ("1", 0, (0, 0, 0)),
    "deep.png": ("I;16", 0x80FF, (0x80, 0x80, 0x80)),
    "deep_white.png": ("I;16", 0xFFFF, (255, 255, 255)),
    "deep.tif": ("I;16", 0x4000, (0x40, 0x40, 0x40)),
}


@one_script
def test_every_kind_of_pixel(module, folder, trains):
    for name, (mode, colour, _) in MODES.items():
        if mode == "I;16":
            Image.fromarray(np.full((8, 8), colour, np.uint16)).save(folder / name)
        else:
            Image.new(mode, (8, 8), colour).save(folder / name)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50])
    palette.save(folder / "palette.png")
    palette.save(folder / "palette.gif", transparency=1)
    expected = {n: want for n, (_, _, want) in MODES.items()} | {"palette.png": (200, 100, 50), "palette.gif": (255, 255, 255)}
    data = load(module, folder)
    names = [sorted(expected)[i] for i in np.random.RandomState(0).permutation(len(expected))]
    for name, image in zip(names, both(data), strict=True):
        assert (image.int() - torch.tensor(expected[name])[:, None, None]).abs().max() <= 2, name
    trains(folder)


@one_script
@pytest.mark.parametrize("mode", ["L", "1", "I;16"])
def test_a_folder_of_grey_images_stays_grey(mode, module, folder):
    pictures(folder, 4, mode=mode)
    data = load(module, folder)
    assert both(data).shape == (4, 1, 8, 8) and both(data).float().std() > 20  # not all black or white


@one_script
def test_mixed_sizes_are_brought_to_the_commonest(module, folder, trains):
    for i, size in enumerate([(8, 8), (12, 10), (12, 10), (31, 9), (1, 1), (200, 3)]):
        picture(folder / f"{i}.png", size=size, seed=i)
    assert both(load(module, folder)).shape == (6, 3, 10, 12)
    assert both(load(module, folder, 16)).shape == (6, 3, 16, 16)
    trains(folder)


@one_script
def test_a_wide_image_is_cropped_at_its_centre_and_not_squeezed(module, folder):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255  # white in the middle third
    for i in range(2):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    assert both(load(module, folder, 8)).min() == 255


@pytest.mark.parametrize("size, mode", itertools.product([(1, 1), (7, 5), (28, 28), (33, 49)], ["L", "RGB"]) if ALL else [
    ((1, 1), "L"), ((1, 1), "RGB"), ((7, 5), "RGB"), ((28, 28), "L"), ((33, 49), "RGB")], ids=str)
def test_image_sizes(size, mode, folder, trains, module):
    pictures(folder, 3, size=size[::-1], mode=mode)
    more = ["--inverse", "jacobi"] if module.__name__ == "flow" and max(size) > 16 else []  # not each number by itself
    assert trains(folder, "--num-samples", 2, *more).shape == (2, *size, len(mode) if mode == "RGB" else 1)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_image_size_asked_for(size, folder, trains):
    pictures(folder, 3, size=(7, 5))
    assert trains(folder, "--image-size", size, "--num-samples", 2).shape == (2, size, size, 3)


# ------------------------------------------------------------------------------------------------------ the last of a row


def test_a_last_batch_of_one(module, tmp_path, monkeypatch):
    """In evaluation, in sampling, and as the only image of a step."""
    one_more = module.at_once((1, 4, 4)) + 1
    monkeypatch.setattr(module, "load_data", lambda *args: make_data(module, train=3, test=one_more, shape=(1, 4, 4)))
    argv = flags(module.__name__, tmp_path / "run", "--batch-size", 1, "--num-samples", one_more, "--steps", 2)
    assert tiny.run(module, argv) == 0
    assert np.load(tmp_path / "run" / "samples.npz")["images"].shape == (one_more, 4, 4, 1)
    assert all(math.isfinite(v) for line in metrics(tmp_path / "run") for v in line.values())


def test_one_test_image(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_data", lambda *args: make_data(module, train=1, test=1))
    assert tiny.run(module, flags(module.__name__, tmp_path / "run", "--num-samples", 1)) == 0
    assert all(math.isfinite(v) for line in metrics(tmp_path / "run") for v in line.values())
