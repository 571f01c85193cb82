"""The plumbing that all scripts share, and the command line of each."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from tiny import ROOT, SCRIPTS, error_line, flags, sync

p = importlib.import_module(SCRIPTS[0])  # the block is the same in all of them, as the first test says
every_script = pytest.mark.parametrize("module", SCRIPTS, indirect=True)


@pytest.fixture
def module(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("inspect.getsource", tiny.getsource)


@pytest.fixture(autouse=True)
def nothing_left():
    """Handlers of stop signals and locks of folders end with the test that made them."""
    with tiny.handlers_kept():
        yield
    for module in map(importlib.import_module, SCRIPTS):
        while module.LOCKS:
            os.close(module.LOCKS.popitem()[1])


# ------------------------------------------------------------------------------------------------------ tools/sync.py


def test_the_plumbing_is_the_same_in_all_scripts(capsys):
    sync.main(["--check"])
    said = capsys.readouterr().out
    assert all(name in said for name in sync.SCRIPTS)
    assert {p.name for p in ROOT.glob("*.py") if sync.BEGIN in p.read_text(encoding="utf-8")} == set(sync.SCRIPTS)


@pytest.fixture
def house(tmp_path):
    """Three small scripts with the block of the real one between parts of their own."""
    block = sync.split(ROOT / f"{SCRIPTS[0]}.py")[1]
    for name in ("vae.py", "flow.py", "gan.py"):
        (tmp_path / name).write_text(f'"""{name}"""\n{block}\n\nprint("tail of {name}")')
    return tmp_path


def test_sync_check_accepts_equal_blocks(house, capsys):
    sync.main(["--check", "--root", str(house)])
    assert "vae.py, flow.py, gan.py" in capsys.readouterr().out


def test_sync_check_names_what_differs_and_writes_nothing(house):
    path = house / "flow.py"
    path.write_text(path.read_text().replace("def write(", "def  write("))
    before = {f: f.read_bytes() for f in house.iterdir()}
    with pytest.raises(SystemExit) as e:
        sync.main(["--check", "--root", str(house)])
    assert "flow.py" in e.value.code and "gan.py" not in e.value.code
    assert {f: f.read_bytes() for f in house.iterdir()} == before


def test_sync_from_copies_the_block_and_nothing_else(house):
    source = house / "gan.py"
    source.write_text(source.read_text().replace("def write(", "def write_it("))
    sync.main(["--from", "gan.py", "--root", str(house)])
    block = sync.split(source)[1]
    assert "def write_it(" in block
    for name in ("vae.py", "flow.py", "gan.py"):
        assert (house / name).read_text() == f'"""{name}"""\n{block}\n\nprint("tail of {name}")'
    sync.main(["--check", "--root", str(house)])


@pytest.mark.parametrize("spoil", [
    lambda s: s.replace(sync.BEGIN, "# plumbing"),
    lambda s: s.replace(sync.END, "# end"),
    lambda s: s + "\n" + sync.BEGIN + "\n" + sync.END,
    lambda s: "\n".join(reversed(s.splitlines())),
], ids=["no begin", "no end", "two blocks", "end before begin"])
@pytest.mark.parametrize("action", [["--check"], ["--from", "vae.py"]], ids=["check", "from"])
def test_sync_refuses_a_script_without_its_markers(house, spoil, action):
    path = house / "flow.py"
    path.write_text(spoil(path.read_text()))
    before = {f: f.read_bytes() for f in house.iterdir()}
    with pytest.raises(SystemExit) as e:
        sync.main([*action, "--root", str(house)])
    assert "flow.py" in e.value.code
    assert {f: f.read_bytes() for f in house.iterdir()} == before


def test_sync_from_a_script_that_is_not_there(house):
    with pytest.raises(SystemExit) as e:
        sync.main(["--from", "vqgan.py", "--root", str(house)])
    assert "vqgan.py" in e.value.code


# --------------------------------------------------------------------------------------------------- imports and shape


@every_script
def test_importing_does_nothing(module, tmp_path, monkeypatch, capfd):
    """No parsing, no files, no random numbers drawn, no signal handlers, nothing printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--bogus"])
    spec = importlib.util.spec_from_file_location("imported_again", module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported_again", again)

    def state():
        handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
        return (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), handlers,
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ),
                torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)

    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(12345)
    before = state()
    spec.loader.exec_module(again)
    assert state() == before
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@every_script
def test_no_door_to_another_file_but_the_kernels(module):
    """Imports at the top: the standard library and four packages; nothing of this repository but kernels.<name>, guarded."""
    tree = ast.parse(open(module.__file__).read())
    packages = {"torch", "numpy", "PIL", "tqdm"}
    house = {path.stem for path in ROOT.iterdir()} - {"kernels"}

    def names(nodes):
        for node in nodes:
            for n in ast.walk(node):
                if isinstance(n, ast.Import):
                    yield from (alias.name for alias in n.names)
                elif isinstance(n, ast.ImportFrom):
                    assert n.level == 0
                    yield n.module

    top = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert all(n.split(".")[0] in packages | sys.stdlib_module_names for n in names(top))
    everywhere = set(names([tree]))
    assert not house & {n.split(".")[0] for n in everywhere}
    assert {n.split(".")[0] for n in everywhere} <= packages | sys.stdlib_module_names | {
        "kernels", "sklearn", "matplotlib", "lpips"}
    guarded = set(names(n for n in ast.walk(tree) if isinstance(n, ast.Try)
                        and any(ast.unparse(h.type) in ("ImportError", "(ImportError, AttributeError)")
                               for h in n.handlers)))
    assert {n for n in everywhere if n.startswith("kernels")} <= guarded


# ---------------------------------------------------------------------------------------------------- the command line

GROUPS = {  # of Config, and the fields of the last two, the same in every script
    "model": None, "training": None, "evaluation and sampling, free to change on a trained model": None,
    "core, the same in all six scripts": "dataset image_size batch_size lr seed ema init",
    "core, free to change on a trained model": """mode data_dir steps minutes device amp compile kernels out resume overwrite
        num_samples eval_images log_every save_every""",
}


@functools.cache
def comments(module):
    """field: (its comment, the title of its group), read by a parser of its own."""
    source, found, title = Path(module.__file__).read_text(), {}, None
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for line in source.splitlines()[node.lineno:node.end_lineno]:
        if line.startswith("    # "):
            title = line[6:]
        elif m := re.match(r"    (\w+): [^#]*#(.*)", line):
            found[m[1]] = m[2].strip(), title
    return found


def kind_of(field):
    """(type of one value, how many there are: 0 for a plain one, -1 for any number)"""
    if get_origin(field.type) is Literal:
        return Literal, 0
    if get_origin(field.type) is tuple:
        args = get_args(field.type)
        return args[0], -1 if Ellipsis in args else len(args)
    return next((a for a in get_args(field.type) if a is not type(None)), field.type), 0


def flag(field):
    return "--" + field.name.replace("_", "-")


def within(module, field):
    """(the least value of a number, whether it may be that one, the largest) by its comment."""
    kind, _ = kind_of(field)
    comment = comments(module)[field.name][0]
    bound = re.search(r"\((>=?) ([\d.]+)(?: to ([\d.]+))?\)|\((-?[\d.]+) to ([\d.]+)\)", comment)
    assert bound, f"no bound in the comment of {field.name}"
    low, high = float(bound[2] or bound[4]), bound[3] or bound[5]
    return low, bound[1] != ">", float(high or (2**31 - 1 if kind is int else torch.finfo(torch.float32).max))


def numbers(module):
    return [field for field in dataclasses.fields(module.Config) if kind_of(field)[0] in (int, float)]


def parse(module, field, *values):
    """What the flag of a field becomes with these values, those that a tuple has more being as good ones."""
    _, many = kind_of(field)
    cfg, _ = module.parse_args([flag(field), *values * max(many, 1)])
    value = getattr(cfg, field.name)
    assert isinstance(value, tuple) == (many != 0)
    return value


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@every_script
def test_groups_of_the_command_line(module):
    """Model, training, sampling; then the core, the same fields in the same order in every script."""
    fields = [f.name for f in dataclasses.fields(module.Config)]
    known = comments(module)
    assert list(known) == fields and len(set(fields)) == len(fields)
    assert list(dict.fromkeys(title for _, title in known.values())) == list(GROUPS)
    for title, core in GROUPS.items():
        assert core is None or [name for name in fields if known[name][1] == title] == core.split()
    cfg = module.Config()
    assert (cfg.mode, cfg.dataset, cfg.data_dir, cfg.device, cfg.amp, cfg.kernels) == (
        "train", "digits", "data", "auto", "off", "auto")


@every_script
def test_defaults_without_flags(module, elsewhere):
    cfg, saved = module.parse_args([])
    assert saved == {}
    assert cfg == dataclasses.replace(module.Config(), out=f"runs/{module.__name__}-digits", steps=2000)


@pytest.mark.parametrize("argv, out", [(["--dataset", "mnist"], "mnist"), (["--dataset", "my/photos/"], "photos"),
                                       (["--dataset", "."], "here"), (["--out", "x/y"], None)])
def test_the_folder_of_a_run_is_named_after_script_and_data(argv, out, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert p.parse_args(argv)[0].out == (f"runs/{SCRIPTS[0]}-{out}" if out else "x/y")


@every_script
def test_every_field_has_its_flag(module, elsewhere, monkeypatch):
    """A good value of each type arrives in its field and in no other."""
    usual = dataclasses.replace(module.Config(), out="out", steps=5)
    monkeypatch.setattr(module, "read_run", lambda folder: (usual, {"of": folder}))  # for --mode eval and sample
    for field in dataclasses.fields(module.Config):
        kind, many = kind_of(field)
        if kind is bool:
            cases = [([flag(field)], True), (["--no-" + flag(field)[2:]], False)]
        elif kind is Literal:
            cases = [([flag(field), str(v)], v) for v in get_args(field.type)]
        elif kind is str:
            cases = [([flag(field), "a b"], "a b"), ([f"{flag(field)}=-x"], "-x")]
        else:
            low, _, high = within(module, field)
            value = kind(min(low + 1, high))
            length = many if many > 0 else 3
            cases = [([flag(field), *[str(value)] * length], (value,) * length)] if many else [
                ([flag(field), str(value)], value), ([f"{flag(field)}={value}"], value)]
        for argv, value in cases:
            cfg, saved = module.parse_args(["--out", "out", "--steps", "5", *argv])
            got = getattr(cfg, field.name)
            assert got == value and type(got) is type(value), argv
            assert dataclasses.replace(cfg, **{field.name: getattr(usual, field.name)}) == usual
            assert saved == ({"of": "out"} if value in ("eval", "sample") else {})


def test_minutes_alone_set_no_steps(elsewhere):
    assert p.parse_args(["--minutes", "3"])[0].steps is None
    assert p.parse_args(["--minutes", "3", "--steps", "4"])[0].steps == 4


@every_script
def test_help_explains_every_flag(module, capsys):
    """In the groups of Config, in its order, each with its comment and its default."""
    with pytest.raises(SystemExit) as e:
        module.parse_args(["--help"])
    assert e.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    words, known, at, title = " ".join(out.split()), comments(module), 0, None
    for field in dataclasses.fields(module.Config):
        comment, group = known[field.name]
        if group != title:
            title, at = group, words.index(f" {group}: ", at)
        kind, _ = kind_of(field)
        what = {Literal: "{" + ",".join(map(str, get_args(field.type))) + "}"}.get(kind, getattr(kind, "__name__", ""))
        what = f", --no-{flag(field)[2:]}" if kind is bool else f" {what}"
        at = words.index(f" {flag(field)}{what} ", at)
        at = words.index(f" {' '.join(comment.split())} [{field.default}]", at)
    first = " ".join(module.__doc__.strip().splitlines()[0].split())
    assert words.count(first) == 1 and words.index(first) < words.index(" model: ")


@every_script
@pytest.mark.parametrize("columns", ["80", "200"])
def test_help_fits_100_columns(module, columns, monkeypatch, capsys):
    """Whatever the terminal is."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 50 and not [line for line in lines if len(line) > 100]


@every_script
def test_every_number_has_bounds_and_what_lies_outside_is_refused(module, elsewhere, capsys):
    for field in numbers(module):
        kind, many = kind_of(field)
        low, included, high = within(module, field)
        above = [high + 1] if kind is int else [math.nextafter(high, math.inf), 2 * high, 1e308, math.inf, math.nan, -math.inf]
        below = [low - 1] + [low] * (not included)
        for value in [*above, *below]:
            argv = [flag(field), *[str(kind(value))] * many] if many > 0 else [f"{flag(field)}={kind(value)}"]
            with pytest.raises(SystemExit) as e:
                module.parse_args(argv)
            assert e.value.code == 2
            line = error_line(capsys.readouterr().err)
            assert flag(field) in line
            if not (many > 0 and value == -math.inf):  # which looks like a flag where several values follow
                assert "must be" in line and comments(module)[field.name][0] in line
        for value in [high, min(low + 1, high)] + [low] * included:
            got = parse(module, field, str(kind(value)))
            assert set(got if isinstance(got, tuple) else (got,)) == {kind(value)}
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(v is None or (low <= v <= high and (included or v > low)) for v in default)


@every_script
@pytest.mark.parametrize("text", ["2147483648", "99999999999999999999999", "1e308", "1e400", "-1", "nan", "", "0x10", "1,5"])
def test_numbers_that_no_run_can_have(module, text, elsewhere, capsys):
    """One line that names the flag, for each number of each script."""
    for field in numbers(module):
        if text.isdigit() and within(module, field)[2] >= float(text):  # a real number, or a seed
            continue
        with pytest.raises(SystemExit) as e:
            module.parse_args([f"{flag(field)}={text}"])
        assert e.value.code == 2 and flag(field) in error_line(capsys.readouterr().err)


@every_script
def test_every_value_of_a_tuple_is_checked(module, elsewhere, capsys):
    for field in numbers(module):
        kind, many = kind_of(field)
        if many:
            low, _, _ = within(module, field)
            good, bad = str(kind(low + 1)), str(kind(low - 1))
            for i in range(many if many > 0 else 3):
                values = [bad if i == j else good for j in range(many if many > 0 else 3)]
                with pytest.raises(SystemExit) as e:
                    module.parse_args([flag(field), *values])
                assert e.value.code == 2 and flag(field) in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("value", ["0.9999", "0.999", "0.51", "0"])
def test_ema_is_a_share_and_no_decay_rate(value, elsewhere, capsys):
    with pytest.raises(SystemExit) as e:
        p.parse_args(["--ema", value])
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 2 and f"--ema: {value}" in line and "share" in line and "not a decay rate" in line


def test_a_tilde_is_the_home_folder(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cfg, _ = p.parse_args(["--out", "~/run", "--data-dir", "~", "--dataset", "~/photos", "--init=~/other"])
    home = str(tmp_path / "home")
    assert (cfg.out, cfg.data_dir, cfg.dataset, cfg.init) == (f"{home}/run", home, f"{home}/photos", f"{home}/other")
    assert p.parse_args(["--out", "a~b/~"])[0].out == "a~b/~"


@every_script
@pytest.mark.parametrize("argv, words", [
    (["--bogus"], ["--bogus"]),
    (["--bogus", "3"], ["--bogus"]),
    (["stray"], ["stray"]),
    (["--datase", "mnist"], ["--datase"]),  # no abbreviations: a new flag must not change what an old command means
    (["--steps"], ["--steps"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "1.5"], ["--steps", "1.5"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--mode", "trian"], ["--mode", "trian", "train", "eval", "sample"]),
    (["--device", "tpu"], ["--device", "tpu", "auto", "cpu", "cuda", "mps"]),
    (["--amp", "fp8"], ["--amp", "fp8", "off", "bf16", "fp16"]),
    (["--kernels", "cutlass"], ["--kernels", "cutlass", "auto", "torch", "triton"]),
    (["--resume", "yes"], ["yes"]),
    (["--out", "a\nb", "--bogus\nflag"], ["--bogus flag"]),
])
def test_wrong_flags_are_one_line_and_exit_code_2(module, argv, words, elsewhere, capsys):
    with pytest.raises(SystemExit) as e:
        module.parse_args(argv)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in error_line(err) for word in words)


# -------------------------------------------------------------------------------------- the checkpoint and the command line


def test_what_no_flag_says_is_the_checkpoints(tmp_path):
    make_run(tmp_path, "--lr", 0.5, "--steps", 9).save({})
    cfg, saved = p.parse_args(["--out", str(tmp_path), "--resume", "--log-every", "7"])
    assert (cfg.lr, cfg.steps, cfg.batch_size, cfg.log_every, cfg.resume) == (0.5, 9, 16, 7, True)
    assert saved["step"] == 0 and saved["config"]["lr"] == 0.5
    for more, want in (("--minutes 2", (None, 2)), ("--steps 3", (3, None)), ("--steps 3 --minutes 4", (3, 4))):
        cfg, _ = p.parse_args(["--out", str(tmp_path), "--resume", *more.split()])
        assert (cfg.steps, cfg.minutes) == want  # a new budget replaces the old one whole


@pytest.mark.parametrize("mode", ["eval", "sample", "resume"])
def test_only_what_is_free_may_change(mode, tmp_path, capsys):
    """By the groups of Config, in every field; the same value said again is no change."""
    run = make_run(tmp_path)
    run.save({})
    go = ["--out", str(tmp_path), *(["--resume"] if mode == "resume" else ["--mode", mode])]
    counts = {True: 0, False: 0}
    for field in dataclasses.fields(p.Config):
        kind, many = kind_of(field)
        if field.name in ("mode", "out", "resume", "overwrite") or many:
            continue
        old = getattr(run.cfg, field.name)
        if kind is bool:
            argv = ["--no-" + flag(field)[2:] if old else flag(field)]
        elif kind is Literal:
            argv = [flag(field), next(v for v in get_args(field.type) if v != old)]
        elif kind is str:
            argv = [flag(field), f"{old}x"]
        else:
            low, _, high = within(p, field)
            new = kind((old or low) / 2 if old == high else min((old or low) + 1, high))
            argv = [flag(field), str(new)]
        free = "free to change" in comments(p)[field.name][1]
        counts[free] += 1
        if free:
            assert getattr(p.parse_args([*go, *argv])[0], field.name) != old
        else:
            with pytest.raises(SystemExit) as e:
                p.parse_args([*go, *argv])
            line = error_line(capsys.readouterr().err)
            assert e.value.code == 2 and flag(field) in line and str(tmp_path) in line and line.endswith(f"has {old}")
            if kind is not bool and old is not None:
                p.parse_args([*go, flag(field), str(old)])
    assert counts[True] > 10 and counts[False] > 10


ASKED = {  # what a training may be asked to show besides, and what says that it is not
    "diffusion": (["--inpaint", "left", "--label", "1", "--nfe", "7"], {"inpaint": None}),
    "autoregressive": (["--complete", "top", "--label", "1", "--temperature", "0.5"], {"complete": "no"}),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_training_was_asked_to_show_does_not_come_back(name, tmp_path):
    """In evaluation and sampling it must be said again; how to sample is kept, and resuming goes on with the whole of it."""
    module = importlib.import_module(name)
    argv, off = ASKED[name]
    run = make_run(tmp_path, *argv, module=module)
    run.save({})
    asked = dataclasses.asdict(run.cfg)
    assert all(asked[field] != value for field, value in off.items())
    for mode in ("eval", "sample"):
        cfg, _ = module.parse_args(["--out", str(tmp_path), "--mode", mode])
        assert dataclasses.asdict(cfg) == asked | off | {"mode": mode}
        cfg, _ = module.parse_args(["--out", str(tmp_path), "--mode", mode, *argv])
        assert dataclasses.asdict(cfg) == asked | {"mode": mode}
    cfg, _ = module.parse_args(["--out", str(tmp_path), "--resume"])
    assert dataclasses.asdict(cfg) == asked | {"resume": True}


def test_a_folder_that_holds_something_is_not_written_to(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as e:
        p.parse_args(["--out", str(tmp_path)])
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 2 and str(tmp_path) in line and "--resume" in line and "--overwrite" in line
    assert p.parse_args(["--out", str(tmp_path), "--overwrite"])[1] == {}
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "checkpoint.pt.77.part").write_text("left over")  # is nothing that could be lost
    assert p.parse_args(["--out", str(tmp_path)])[1] == {}


@pytest.mark.parametrize("folder", ["nothing", "empty", "killed early"])
def test_resume_where_there_is_no_checkpoint_begins(folder, tmp_path):
    if folder != "nothing":
        (tmp_path / folder).mkdir()
    if folder == "killed early":
        (tmp_path / folder / "checkpoint.pt.77.part").write_text("half")
    cfg, saved = p.parse_args(["--out", str(tmp_path / folder), "--resume", "--steps", "7"])
    assert saved == {} and cfg.steps == 7


@pytest.mark.parametrize("mode", ["eval", "sample"])
def test_what_was_never_trained_is_not_evaluated(mode, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        p.parse_args(["--out", str(tmp_path / "run"), "--mode", mode])
    assert e.value.code == 2 and str(tmp_path / "run" / "checkpoint.pt") in error_line(capsys.readouterr().err)


# ----------------------------------------------------------------------------------------------- grids, files, batches


def test_large_images_are_taken_fewer_at_once():
    shapes = ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 2048, 2048))
    assert [p.at_once(s) for s in shapes] == [250, 250, 250, 62, 1]
    assert [p.at_once(s, 784) for s in shapes] == [250, 250, 63, 15, 1]


@pytest.mark.parametrize("shape, columns", [((7, 1, 8, 8), 3), ((6, 3, 5, 9), 3), ((1, 1, 1, 1), 10), ((3, 3, 64, 64), 2)])
def test_grid_shows_each_image_in_its_place(shape, columns, tmp_path):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    p.save_grid(images, tmp_path / "grid.png", columns)
    n, c, h, w = shape
    columns = min(columns, n)
    rows, zoom = -(-n // columns), max(1, 56 // max(h, w))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (rows * (h + 2) * zoom, columns * (w + 2) * zoom) + ((3,) if c == 3 else ())
    grid = grid[::zoom, ::zoom].reshape(rows, h + 2, columns, w + 2, c).transpose(0, 2, 4, 1, 3).reshape(-1, c, h + 2, w + 2)
    assert np.array_equal(grid[:n, :, 1:-1, 1:-1], images.numpy())
    assert not grid[n:].any() and not grid[:, :, 0].any() and not grid[:, :, :, -1].any()


def test_write_makes_the_folders_and_leaves_one_file(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    p.write(path, lambda f: f.write(b"one"))
    p.write(path, lambda f: f.write(b"two"))
    assert path.read_bytes() == b"two" and [f.name for f in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_write_that_fails_leaves_the_old_file(tmp_path, error, capsys):
    path = tmp_path / "file.bin"
    p.write(path, lambda f: f.write(b"old"))

    def fail(f):
        f.write(b"half of the n")
        raise error

    with pytest.raises(SystemExit if isinstance(error, OSError) else type(error)):
        p.write(path, fail)
    if isinstance(error, OSError):
        line = error_line(capsys.readouterr().err)
        assert str(path) in line and "No space left" in line
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["file.bin"]


def test_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Flushed and synced, then renamed: the other order loses the file when the power goes."""
    order, path = [], tmp_path / "file.bin"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(("fsync", os.fstat(fd).st_size)), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(("replace", path.exists())), replace(a, b))[1])
    p.write(path, lambda f: f.write(b"content"))
    assert order[:2] == [("fsync", 7), ("replace", False)]


def test_shuffle_is_a_permutation_of_seed_and_epoch():
    assert sorted(p.shuffle(50, 1, 2).tolist()) == list(range(50))
    orders = [p.shuffle(50, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9
    p.shuffle.cache_clear()
    assert p.shuffle(50, 0, 0).tolist() == orders[0]


def make_run(out, *more, module=p):
    run = module.Run(*module.parse_args([*tiny.CORE.split(), "--out", str(out), *map(str, more)]))
    run.facts = {"shape": [1, 8, 8], "classes": 3, "names": ["0", "1", "2"], "train_images": 40}  # those of tiny.make_data
    vars(run).update(run.facts)
    return run


def preview():
    return torch.zeros(2, 1, 8, 8, dtype=torch.uint8)


def numbered(n):
    """n images of one pixel that is the image's number, and so is its label."""
    number = torch.arange(n)
    return p.Data(number.to(torch.uint8).view(-1, 1, 1, 1), number, number[:0], number[:0])


def draws(run, data, steps):
    out = []
    for step in range(steps):
        run.step = step + 1
        x, y = run.batch(data)
        assert torch.equal(x[:, 0, 0, 0].long(), y)
        out.append(y.tolist())
    return out


@pytest.mark.parametrize("n, batch", [(10, 3), (10, 10), (10, 1), (3, 8), (1, 4), (7, 20)])
def test_batches_run_through_all_images_again_and_again(n, batch, tmp_path):
    steps = 4 * n
    row = list(itertools.chain(*draws(make_run(tmp_path, "--batch-size", batch), numbered(n), steps)))
    assert len(row) == steps * batch
    epochs = [row[i:i + n] for i in range(0, len(row), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 10 or len(set(map(tuple, epochs))) == len(epochs)


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    run = make_run(tmp_path, "--batch-size", 4)
    a = draws(run, numbered(10), 8)
    run.step = 6
    assert run.batch(numbered(10))[1].tolist() == a[5]
    assert draws(make_run(tmp_path, "--batch-size", 4, "--seed", 4), numbered(10), 8) != a


def test_processes_share_the_batch_of_the_single_one(tmp_path):
    run = make_run(tmp_path, "--batch-size", 6)
    whole = draws(run, numbered(10), 10)
    run.world, parts = 3, []
    for run.rank in range(3):
        parts.append(draws(run, numbered(10), 10))
    for step, batch in enumerate(whole):
        assert all(len(part[step]) == 2 for part in parts)
        assert sorted(sum((part[step] for part in parts), [])) == sorted(batch)


def noise(out, *more, count=3):
    return [torch.rand(4).tolist() for _ in itertools.islice(make_run(out, "--overwrite", *more).steps({}, preview), count)]


def test_noise_of_a_step_depends_on_seed_and_step(tmp_path):
    a = noise(tmp_path)
    assert a == noise(tmp_path)
    assert len(set(map(tuple, a))) == 3
    for other in (0, 1, 2, 4, 2**16):
        b = noise(tmp_path, "--seed", other)
        assert not set(map(tuple, a)) & set(map(tuple, b)), f"seeds 3 and {other} draw the same noise"


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1])
def test_the_largest_seeds(seed, tmp_path):
    assert noise(tmp_path, "--seed", seed) != noise(tmp_path, "--seed", 3)


# ---------------------------------------------------------------------------------------------------- images and averages


def test_levels_from_minus_one_to_one():
    """[-1,1] -> {0..255}: each level comes back, what lies between goes to the nearest, what lies outside to the end."""
    level = torch.arange(256)
    got = p.to_uint8(level / 127.5 - 1)
    assert got.dtype == torch.uint8 and torch.equal(got, level.byte())
    assert p.to_uint8(torch.tensor([-7.0, -1.001, -1, 0.9999, 1, 1.001, 9])).tolist() == [0, 0, 0, 255, 255, 255, 255]
    between = (level[:-1] + torch.tensor([[0.4], [0.6]])) / 127.5 - 1
    assert torch.equal(p.to_uint8(between), torch.stack([level[:-1], level[1:]]).byte())
    assert p.to_uint8(torch.zeros(2, 3, dtype=torch.bfloat16)).shape == (2, 3)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_average_of_the_weights_by_its_formula(share):
    """After n steps each step's weights count by the power profile tau^gamma of Karras et al. 2024, eq. 127, in closed form.

    beta_i = (1 - 1/(i+1))^(gamma+1), so the weight of step i is ((i+1)^(gamma+1) - i^(gamma+1)) / (n+1)^(gamma+1).
    """
    model, ema = (nn.Linear(3, 2).double() for _ in range(2))
    history, n = [], 40
    for step in range(n + 1):
        for q in model.parameters():
            q.data = torch.randn_like(q)
        history.append([q.detach().clone() for q in model.parameters()])
        p.update_ema(ema, model, step, share)
    i = torch.arange(n + 1, dtype=torch.float64)
    weight = ((i + 1) ** (1 / share) - i ** (1 / share)) / (n + 1) ** (1 / share)
    torch.testing.assert_close(weight.sum(), torch.tensor(1.0).double())
    for got, *steps in zip(ema.parameters(), *history, strict=True):
        want = sum(w * q for w, q in zip(weight, steps, strict=True))
        torch.testing.assert_close(got.detach(), want)
        assert got.requires_grad and got.grad is None and not got.grad_fn


def test_the_average_leaves_the_model_alone():
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [q.clone() for q in model.parameters()]
    p.update_ema(ema, model, 0, 0.15)
    assert all(torch.equal(a, q) and torch.equal(a, b) for a, q, b in
               zip(before, model.parameters(), ema.parameters(), strict=True))  # of one step: its weights
    with torch.no_grad():
        ema.weight.add_(1)
    assert all(torch.equal(a, q) for a, q in zip(before, model.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------- checkpoint


def make_parts(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.rand(8, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.fixture
def checkpoint(tmp_path):
    """The path of a good one."""
    run = make_run(tmp_path / "run")
    run.step, run.seconds = 7, 1.5
    run.save(make_parts())
    return tmp_path / "run" / "checkpoint.pt"


def refused(path, capsys, parts=None):
    """The line in which a checkpoint is refused, as it is read or into these parts, with exit code 2."""
    with pytest.raises(SystemExit) as e:
        _, saved = p.read_run(path.parent)
        p.restore(parts if parts is not None else make_parts(1), saved, path.parent)
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 2 and str(path) in line
    return line


def test_checkpoint_round_trip(checkpoint, tmp_path):
    saved = tiny.load_checkpoint(tmp_path / "run")
    again, fresh, parts = make_run(tmp_path / "run", "--resume"), make_parts(1), make_parts()
    assert saved["format"] == 2 and saved["script"] == SCRIPTS[0] and saved["facts"] == again.facts
    assert {k: saved[k] for k in ("step", "seconds", "log_size")} == {"step": 7, "seconds": 1.5, "log_size": 0}
    cfg, same = p.read_run(tmp_path / "run")
    assert dataclasses.asdict(cfg) == saved["config"] and dict(tiny.leaves(same)).keys() == dict(tiny.leaves(saved)).keys()
    assert (again.step, again.seconds, again.shape, again.names) == (7, 1.5, [1, 8, 8], ["0", "1", "2"])
    p.restore(fresh, saved, tmp_path / "run")
    for name, part in parts.items():
        a, b = dict(tiny.leaves(part.state_dict())), dict(tiny.leaves(fresh[name].state_dict()))
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def test_saving_changes_nothing_in_memory(tmp_path):
    run, parts = make_run(tmp_path / "run"), make_parts()
    before = {k: v.clone() if torch.is_tensor(v) else v for k, v in tiny.leaves({n: q.state_dict() for n, q in parts.items()})}
    grads = [q.grad.clone() for q in parts["model"].parameters()]
    state, training = torch.get_rng_state(), parts["model"].training
    run.save(parts)
    after = dict(tiny.leaves({n: q.state_dict() for n, q in parts.items()}))
    assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())
    assert all(torch.equal(g, q.grad) for g, q in zip(grads, parts["model"].parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state) and parts["model"].training == training


def test_names_that_are_no_utf8_come_back(tmp_path):
    run = make_run(tmp_path / "run")
    run.facts["names"] = ["日本", os.fsdecode(b"not \xff utf-8"), "a\nb"]
    run.save({})
    assert p.read_run(tmp_path / "run")[1]["facts"] == run.facts


def same(a, b):
    a, b = dict(tiny.leaves(a)), dict(tiny.leaves(b))
    return a.keys() == b.keys() and all(
        v.dtype == b[k].dtype and torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k] for k, v in a.items())


def test_a_flipped_bit_anywhere(checkpoint, capsys):
    """It is refused, or stands where the file holds no content: what is read then is what was written."""
    good, whole = checkpoint.read_bytes(), p.read_run(checkpoint.parent)
    rng = random.Random(0)
    places = {*range(0, 80), *range(len(good) - 200, len(good)), *rng.sample(range(len(good)), 300)}
    count = 0
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= 1 << rng.randrange(8)
        checkpoint.write_bytes(bad)
        try:
            got = p.read_run(checkpoint.parent)
        except SystemExit as e:
            assert e.code == 2 and str(checkpoint) in error_line(capsys.readouterr().err)
            count += 1
        else:
            assert got[0] == whole[0] and same(got[1], whole[1]), f"byte {place}"
    assert count > len(places) / 2
    checkpoint.write_bytes(good)
    assert same(p.read_run(checkpoint.parent)[1], whole[1])


def test_each_tensor_is_guarded(checkpoint, capsys):
    """A bit in the middle of the content of every one."""
    good = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        places = [(m.header_offset, m.file_size, m.filename) for m in archive.infolist() if "/data/" in m.filename]
    assert len(places) > 10
    for offset, size, name in places:
        bad = bytearray(good)
        start = offset + 30 + sum(struct.unpack("<HH", good[offset + 26:offset + 30]))  # behind the local header
        bad[start + size // 2] ^= 16
        checkpoint.write_bytes(bad)
        assert "checksum" in refused(checkpoint, capsys), name


@pytest.mark.parametrize("length", [0, 1, 30, 0.3, 0.9, -1])
def test_a_checkpoint_that_is_cut_short(length, checkpoint, capsys):
    good = checkpoint.read_bytes()
    checkpoint.write_bytes(good[:int(length * len(good)) if isinstance(length, float) else length])
    refused(checkpoint, capsys)


@pytest.mark.parametrize("kind", ["html", "a folder", "missing", "zip", "weights", "list", "old format", "pickle"])
def test_what_is_no_checkpoint(kind, checkpoint, capsys):
    checkpoint.unlink()
    if kind == "html":
        checkpoint.write_text("<!DOCTYPE html>")
    elif kind == "a folder":
        checkpoint.mkdir()
    elif kind == "zip":
        with zipfile.ZipFile(checkpoint, "w") as archive:
            archive.writestr("x", "y")
    elif kind == "weights":
        torch.save(make_parts()["model"].state_dict(), checkpoint)
    elif kind == "list":
        torch.save([1, 2], checkpoint)
    elif kind == "old format":
        torch.save({"format": 2, "script": SCRIPTS[0]}, checkpoint, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        torch.save({"format": 2, "script": SCRIPTS[0], "config": Path("x")}, checkpoint)
    refused(checkpoint, capsys)


def change(saved, key, value):
    *way, last = key.split("/")
    for step in way:
        saved = saved[int(step) if step.isdigit() else step]
    last = int(last) if last.isdigit() else last
    if value is None:
        del saved[last]
    else:
        saved[last] = value(saved[last]) if callable(value) else value


CHANGES = {  # what is changed, how, and what the line says
    "another script": ("script", "gpt", ["gpt.py", f"not of {SCRIPTS[0]}.py"]),
    "another format": ("format", 1, ["format 1", "format 2"]),
    "a field more": ("config/brand_new", 1, ["another version", "brand_new"]),
    "a field fewer": ("config/seed", None, ["another version", "seed"]),
    "no step": ("step", None, ["step"]),
    "no facts": ("facts", None, ["facts"]),
    "no length of the log": ("log_size", None, ["log_size"]),
    "no config": ("config", None, ["config"]),
    "NaN in a weight": ("model/3.bias", lambda v: v * math.nan, ["not finite"]),
    "an infinity in a running mean": ("model/1.running_mean", lambda v: v - math.inf, ["not finite"]),
    "NaN in a moment": ("optimizer/state/2/exp_avg", lambda v: v * math.nan, ["not finite"]),
    "one infinity in a moment": ("optimizer/state/4/exp_avg_sq", lambda v: v.flatten().index_fill(
        0, torch.tensor([3]), math.inf).view_as(v), ["not finite"]),
    "NaN in bf16": ("model/3.bias", lambda v: v.bfloat16() * math.nan, ["not finite"]),
    "NaN as the learning rate": ("optimizer/param_groups/0/lr", math.nan, ["not finite"]),
    "an infinity in the config": ("config/lr", math.inf, ["not finite"]),
    "NaN seconds": ("seconds", math.nan, ["not finite"]),
    "no model": ("model", None, ["model"]),
    "no optimizer": ("optimizer", None, ["optimizer"]),
    "a weight of another shape": ("model/3.weight", lambda v: v[:1], ["model", "3.weight"]),
    "a weight fewer": ("model/3.weight", None, ["model", "3.weight"]),
    "a weight more": ("model/4.weight", torch.zeros(1), ["model", "4.weight"]),
    "a first moment of another shape": ("optimizer/state/4/exp_avg", lambda v: v[:1], ["optimizer", "shape"]),
    "a second moment that is too small": ("optimizer/state/0/exp_avg_sq", lambda v: v[:1, :, :1, :1], ["optimizer", "shape"]),
    "a moment transposed": ("optimizer/state/4/exp_avg", lambda v: v.T, ["optimizer", "shape"]),
    "a moment with no elements": ("optimizer/state/4/exp_avg", lambda v: v[:0], ["optimizer", "shape"]),
    "a moment that is a number": ("optimizer/state/4/exp_avg", 1.0, ["optimizer"]),
    "a count of steps of another shape": ("optimizer/state/4/step", lambda v: v.repeat(3), ["optimizer"]),
    "no second moment": ("optimizer/state/4/exp_avg_sq", None, ["optimizer"]),
    "a parameter too many in the optimizer": ("optimizer/state/99", {"exp_avg": torch.zeros(1)}, ["optimizer"]),
    "a parameter fewer in the optimizer": ("optimizer/param_groups/0/params", lambda v: v[:-1], ["optimizer"]),
}


@pytest.mark.parametrize("key, value, words", CHANGES.values(), ids=CHANGES)
def test_a_checkpoint_with(key, value, words, checkpoint, capsys):
    """Whole by its checksums, and yet none to go on from: the difference is named, before anything can crash."""
    saved = torch.load(checkpoint, weights_only=True)
    change(saved, key, value)
    torch.save(saved, checkpoint)
    line = refused(checkpoint, capsys)
    assert all(word in line for word in words), line


# ---------------------------------------------------------------------------------------------------------- steps and log


def log_lines(out):
    """The lines of metrics.jsonl, read as strictly as JSON is meant."""
    def no(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=no) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_means_since_the_last_line(tmp_path):
    run = make_run(tmp_path / "run", "--log-every", 2, "--steps", 4)
    for step in run.steps({}, preview):
        run.log(loss=torch.tensor(float(step), requires_grad=True), other=2 * step)
    lines = log_lines(tmp_path / "run")
    assert [(d["step"], d["loss"], d["other"]) for d in lines] == [(2, 0.5, 1), (4, 2.5, 5)]
    assert all(d["seconds"] >= 0 for d in lines)


def test_another_stage_has_metrics_of_its_own(tmp_path):
    """From the step on that logs other names; what the stage before it had since its last line is not mixed in."""
    run = make_run(tmp_path / "run", "--log-every", 2, "--steps", 6)
    for step in run.steps({}, preview):
        run.log(**({"loss": float(step), "usage": 1.0} if step < 3 else {"loss": float(step)}))
    assert [{k: v for k, v in d.items() if k != "seconds"} for d in log_lines(tmp_path / "run")] == [
        {"step": 2, "loss": 0.5, "usage": 1.0}, {"step": 4, "loss": 3.0}, {"step": 6, "loss": 4.5}]


def test_what_is_not_finite_becomes_null(tmp_path):
    """JSON knows no NaN; in training a diagnostic may be none, and the run goes on."""
    run = make_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run.write_metrics(loss=1.0, a=math.nan, b=math.inf, c=-math.inf, d=torch.tensor(math.nan).item())
    (line,) = log_lines(tmp_path / "run")
    line.pop("seconds")
    assert line == {"step": 0, "loss": 1.0, "a": None, "b": None, "c": None, "d": None}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_test_figure_that_is_not_finite_ends_with_exit_code_1(value, tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit) as e:
        run.write_metrics(final=True, test_bpd=value, test_nll=2.0)
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 1 and "test_bpd" in line and "not finite" in line and "test_nll" not in line
    (line,) = log_lines(tmp_path / "run")  # the others are not lost
    assert line["test_bpd"] is None and line["test_nll"] == 2.0 and line["final"] is True


@pytest.mark.parametrize("torn", ['{"step": 1, "lo', "", '{"step": 1}\n', '{"step": 1}\n{"st'])
def test_a_line_cut_short_does_not_swallow_the_next(torn, tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(torn)
    run.step = 2
    run.write_metrics(loss=1.0)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.startswith(torn) and text.endswith("\n") and not text.startswith("\n")
    assert json.loads(text.splitlines()[-1])["step"] == 2
    assert run.log_size == len(text.encode())


def test_the_log_is_cut_at_what_the_checkpoint_has_seen(tmp_path):
    """Lines of steps that are taken again, whole or not, and those that an evaluation added."""
    def steps(run, count):
        for _ in itertools.islice(run.steps({}, preview), count):
            run.log(loss=float(run.step))
            yield

    list(steps(make_run(tmp_path / "run", "--steps", 9, "--save-every", 3), 5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"final": true}\n{"step')
    assert p.read_run(tmp_path / "run")[1]["step"] == 3
    list(steps(make_run(tmp_path / "run", "--steps", 9, "--save-every", 3, "--resume"), 9))
    assert [d["step"] for d in log_lines(tmp_path / "run")] == list(range(1, 10))


def test_what_a_killed_save_leaves_is_removed(tmp_path):
    list(make_run(tmp_path / "run", "--steps", 1, "--save-every", 1).steps({}, preview))
    for name in ("checkpoint.pt.77.part", "samples/step_000002.png.78.part", "sampled/samples.npz.79.part"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("half")
    list(make_run(tmp_path / "run", "--steps", 2, "--resume").steps({}, preview))
    assert not list((tmp_path / "run").rglob("*.part"))


def test_saves_and_grids_come_in_their_steps(tmp_path, capsys):
    """Every --save-every steps and at the end; a grid is of the weights that were just saved."""
    saves, shown, run = [], [], make_run(tmp_path / "run", "--steps", 7, "--save-every", 3)
    real = run.save
    run.save = lambda parts: (saves.append(run.step), real(parts))
    seen = list(run.steps({}, lambda: (shown.append(run.step), torch.full((2, 1, 8, 8), run.step, dtype=torch.uint8))[1]))
    assert seen == list(range(7)) and saves == [0, 3, 6, 7] and shown == [3, 6]
    assert sorted(f.name for f in (tmp_path / "run" / "samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    newest = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    assert newest.max() == 6 and np.array_equal(newest, np.asarray(Image.open(tmp_path / "run/samples/step_000006.png")))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == dataclasses.asdict(run.cfg) | run.facts
    said = capsys.readouterr().out
    assert all(name in said for name in ("config.json", "metrics.jsonl", "checkpoint.pt", "samples.png", str(tmp_path / "run")))


def test_grids_of_steps_that_are_taken_again_go(tmp_path):
    list(itertools.islice(make_run(tmp_path / "run", "--steps", 9, "--save-every", 2).steps({}, preview), 5))
    late = tmp_path / "run" / "samples" / "step_000100.png"
    late.write_bytes((tmp_path / "run" / "samples.png").read_bytes())
    run = make_run(tmp_path / "run", "--steps", 9, "--resume", "--save-every", 50)
    next(run.steps({}, preview))
    assert sorted(f.name for f in late.parent.iterdir()) == ["step_000002.png", "step_000004.png"]


@pytest.mark.parametrize("first", [1, 3, 4])
def test_two_stages(first, tmp_path):
    """A loop that ends at a step, and a second one that goes on from there; `over` says whether the run is."""
    run = make_run(tmp_path / "run", "--steps", 4)
    a = list(run.steps({}, preview, until=first))
    assert a == list(range(first)) and run.over == (first == 4)
    b = list(run.steps({}, preview))
    assert a + b == [0, 1, 2, 3] and run.over and tiny.load_checkpoint(tmp_path / "run")["step"] == 4


def test_a_run_that_has_had_its_steps_says_so(tmp_path, capsys):
    list(make_run(tmp_path / "run", "--steps", 4).steps({}, preview))
    capsys.readouterr()
    assert list(make_run(tmp_path / "run", "--steps", 3, "--resume").steps({}, preview)) == []
    assert "--steps 3 leaves nothing to train" in capsys.readouterr().out
    assert tiny.load_checkpoint(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("limits, steps", [(["--steps", 3], 3), (["--minutes", 1], 4), (["--steps", 2, "--minutes", 1], 2),
                                           (["--steps", 30, "--minutes", 1], 4)])
def test_the_budget_ends_the_steps(limits, steps, tmp_path, monkeypatch):
    """By steps, by a clock that moves on by 15 seconds a step, or by whichever comes first."""
    run, seen, now = make_run(tmp_path / "run", *limits), [], 1000.0
    if "--steps" not in limits:
        run.cfg.steps = None
    monkeypatch.setattr(p.time, "monotonic", lambda: now)
    for step in run.steps({}, preview):
        seen.append(step)
        assert run.step == step + 1 and len(seen) < 10
        now += 15
    assert seen == list(range(steps)) and run.step == steps and run.seconds == 15 * steps
    assert list(run.steps({}, preview)) == []  # nothing is left of it


def test_time_already_spent_counts(tmp_path, monkeypatch):
    run, now = make_run(tmp_path / "run", "--minutes", 1), 1000.0
    run.cfg.steps, run.seconds, run.step = None, 40.0, 7
    monkeypatch.setattr(p.time, "monotonic", lambda: now)
    seen = []
    for step in run.steps({}, preview):
        seen.append(step)
        now += 15
    assert seen == [7, 8] and run.seconds == 70


# ------------------------------------------------------------------------------------------------------ a step that fails


class Scaled(nn.Module):
    """A loss whose gradients have these values."""

    def __init__(self, **grads):
        super().__init__()
        self.grads = grads
        for name, value in grads.items():
            setattr(self, name, nn.Parameter(torch.zeros_like(torch.tensor(value))))

    def forward(self):
        return sum((getattr(self, name) * torch.tensor(value)).sum() for name, value in self.grads.items())


def one_update(run, model, add=0.0, **more):
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    run.step = 5
    return run.update(model() + add, model, optimizer, **more)


def test_gradients_are_clipped_and_their_norm_returned(tmp_path):
    model = Scaled(first=[3.0, 0.0], second=[4.0])
    assert one_update(make_run(tmp_path / "run"), model).item() == pytest.approx(5)
    torch.testing.assert_close(torch.cat([model.first, model.second]).detach(), -torch.tensor([0.6, 0, 0.8]))
    model = Scaled(first=[3.0, 0.0], second=[4.0])
    assert one_update(make_run(tmp_path / "run"), model, max_norm=1e9).item() == pytest.approx(5)
    torch.testing.assert_close(torch.cat([model.first, model.second]).detach(), -torch.tensor([3.0, 0, 4]))


BAD = {  # gradients, what is added to the loss, and what the line says and does not say
    "a gradient": ({"good": [1.0], "spoilt": [1.0, math.nan], "too": [math.inf]}, 0, ["first bad gradient that of spoilt"], []),
    "an infinite one": ({"good": [1.0], "spoilt": [math.inf]}, 0, ["first bad gradient that of spoilt"], []),
    "the norm": ({"large": [1e30], "good": [1.0]}, 0, ["gradient norm inf", "each gradient is finite"], ["first bad"]),
    "the loss": ({"good": [1.0]}, math.inf, ["loss inf"], ["first bad"]),
    "the loss, NaN": ({"good": [1.0]}, math.nan, ["loss nan"], ["first bad"]),
}


@pytest.mark.parametrize("grads, add, words, absent", BAD.values(), ids=BAD)
def test_what_is_not_finite_ends_the_run_and_is_named(grads, add, words, absent, tmp_path, capsys):
    run, model = make_run(tmp_path / "run"), Scaled(**grads)
    with pytest.raises(SystemExit) as e:
        one_update(run, model, add, rate="--lr-d")
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 1 and all(word in line for word in ["step 5", "--lr-d", str(tmp_path / "run/checkpoint.pt"), *words])
    assert not any(word in line for word in absent)
    assert all(q.eq(0).all() for q in model.parameters())  # no step was taken


def test_fp16_tries_smaller_scales_first(tmp_path, capsys):
    """An overflow under a scale skips the step and lowers the scale; without a scale it ends the run."""
    run = make_run(tmp_path / "run")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = Scaled(large=[1e38])
    one_update(run, model)
    assert run.scaler.get_scale() == 2 and model.large.item() == 0
    one_update(run, Scaled(good=[2.0]))
    model = Scaled(spoilt=[math.nan])
    with pytest.raises(SystemExit) as e:
        for _ in range(5):
            one_update(run, model)
    assert e.value.code == 1 and "spoilt" in error_line(capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------------- what is said


def ready(tmp_path, *more, name="gan", data=None, labels=True):
    module = importlib.import_module(name)
    run = module.Run(*module.parse_args([*tiny.CORE.split(), "--out", str(tmp_path / "run"), *map(str, more)]))
    return run, run.describe(data or tiny.make_data(module), labels)


def test_one_line_says_what_was_loaded(tmp_path, capsys):
    ready(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("digits: 40 images to train on, 11 to test on, of 1 x 8 x 8") and line.endswith("3 classes: 0, 1, 2")
    data = tiny.make_data(p, shape=(3, 5, 7), classes=0)._replace(note="; 4 skipped")
    run, _ = ready(tmp_path, "--dataset", "my/photos", data=data)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("my/photos: 40 images to train on, 11 to test on, of 3 x 5 x 7")
    assert "no classes" in line and line.endswith("4 skipped")
    assert run.shape == [3, 5, 7] and run.classes == 0 and list(run.names) == []
    _, data = ready(tmp_path, labels=False)
    assert capsys.readouterr().out.splitlines()[-1].endswith("3 classes (not used): 0, 1, 2")
    assert not data.train_labels.any() and not data.test_labels.any() and data.names == ()
    ready(tmp_path, data=tiny.make_data(p, classes=40))
    (line,) = capsys.readouterr().out.splitlines()
    assert "40 classes: 0, 1, " in line and line.endswith("19, ...")


def test_only_one_process_says_it(tmp_path, monkeypatch, capsys):
    run, _ = ready(tmp_path)
    run.rank = 1
    capsys.readouterr()
    run.describe(tiny.make_data(p))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("count, n, tested", [(0, 11, "all 11 test images"), (4, 4, "the first 4 of 11 test images"),
                                              (11, 11, "all 11 test images"), (999, 11, "all 11 test images")])
def test_eval_images(count, n, tested, tmp_path, capsys):
    """The first so many are evaluated, and the words for it say so."""
    run, data = ready(tmp_path, "--eval-images", count)
    whole = tiny.make_data(p)
    assert run.tested == tested
    assert torch.equal(data.test, whole.test[:n]) and torch.equal(data.test_labels, whole.test_labels[:n])
    assert torch.equal(data.train, whole.train) and torch.equal(data.train_labels, whole.train_labels)
    assert "11 to test on" in capsys.readouterr().out


def test_labels_to_sample(tmp_path, capsys):
    """All classes in turn, or one by its name or its number."""
    names = ("cat", "dog", "2", "0")  # a name comes before a number
    data = tiny.make_data(p, classes=4)._replace(names=names)
    assert ready(tmp_path, data=data)[0].labels(6).tolist() == [0, 1, 2, 3, 0, 1]
    for label, want in (("cat", 0), ("dog", 1), ("2", 2), ("0", 3), ("1", 1), ("3", 3)):
        got = ready(tmp_path, "--label", label, data=data)[0].labels(2)
        assert got.tolist() == [want, want] and got.dtype == torch.int64
    none = tiny.make_data(p, classes=0)
    assert ready(tmp_path, data=none)[0].labels(3).tolist() == [0, 0, 0]
    capsys.readouterr()
    for label, these in (("4", data), ("Cat", data), ("", data), ("-1", data), ("0", none)):
        with pytest.raises(SystemExit) as e:
            ready(tmp_path, f"--label={label}", data=these)
        line = error_line(capsys.readouterr().err)
        assert e.value.code == 2 and f"--label {label}".strip() in line and all(name in line for name in these.names)


@pytest.mark.parametrize("more", [{"shape": (1, 8, 9)}, {"shape": (3, 8, 8)}, {"classes": 2}, {"train": 41}, {"names": "abc"}])
def test_other_data_than_the_runs_is_refused(more, tmp_path, capsys):
    run, data = ready(tmp_path)
    run.save({})
    capsys.readouterr()
    again, _ = ready(tmp_path, "--resume")  # the same is not
    assert again.facts == run.facts
    capsys.readouterr()
    other = tiny.make_data(p)._replace(names=tuple("abc")) if "names" in more else tiny.make_data(p, **more)
    with pytest.raises(SystemExit) as e:
        ready(tmp_path, "--resume", data=other)
    assert e.value.code == 2 and "--dataset digits" in error_line(capsys.readouterr().err)


def test_samples_are_named_with_what_is_in_them(tmp_path, capsys):
    run, _ = ready(tmp_path)
    capsys.readouterr()
    images = torch.arange(90, dtype=torch.uint8).view(90, 1, 1, 1).expand(90, 3, 8, 4)
    run.write_samples(images, torch.arange(90) % 3, " in 2 passes")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / "run" / name) for name in ("samples.npz", "samples.png")]
    assert "90 images" in lines[0] and "labels" in lines[0] and "in 2 passes" in lines[0] and "first 80" in lines[1]
    saved = np.load(tmp_path / "run" / "samples.npz")
    assert sorted(saved.files) == ["images", "labels"]
    assert saved["images"].shape == (90, 8, 4, 3) and saved["images"].dtype == np.uint8
    assert np.array_equal(saved["images"], images.permute(0, 2, 3, 1)) and saved["labels"].tolist() == [0, 1, 2] * 30
    assert np.asarray(Image.open(tmp_path / "run" / "samples.png")).max() == 79


def test_samples_of_no_class_have_no_labels(tmp_path, capsys):
    run, _ = ready(tmp_path, data=tiny.make_data(p, classes=0))
    run.write_samples(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2))
    assert np.load(tmp_path / "run" / "samples.npz").files == ["images"]
    assert "labels" not in capsys.readouterr().out


def test_samples_of_a_trained_model_lie_beside_those_of_training(tmp_path, capsys):
    run, _ = ready(tmp_path)
    run.save({})
    (tmp_path / "run" / "samples.npz").write_text("training's")
    again, _ = ready(tmp_path, "--mode", "sample")
    capsys.readouterr()
    again.write_samples(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2))
    out = capsys.readouterr().out
    for name in ("samples.npz", "samples.png"):
        assert (tmp_path / "run" / "sampled" / name).is_file() and str(tmp_path / "run" / "sampled" / name) in out
    assert (tmp_path / "run" / "samples.npz").read_text() == "training's"


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def watch(monkeypatch, terminal, seconds, count):
    """What progress() shows of `count` things that take so many seconds each, by a clock of its own."""
    now, screen = 1000.0, Screen(terminal)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(sys, "stderr", screen)
    items = []
    for item in p.progress(range(count), "evaluating"):
        items.append(item)
        now += seconds
    assert items == list(range(count))
    return screen.getvalue()


@pytest.mark.parametrize("seconds, count", [(1, 600), (0.1, 6000), (20, 30), (100, 6)])
def test_a_line_a_minute_without_a_terminal(seconds, count, monkeypatch):
    """Of ten minutes nine to ten lines, each whole, further than the one before; with things of 100 seconds one for each."""
    lines = watch(monkeypatch, False, seconds, count).splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    assert min(count, 9) - 1 <= len(lines) <= 11
    percent = [int(re.search(r"evaluating +(\d+)%", line)[1]) for line in lines]
    assert percent == sorted(percent) and percent[-1] >= 80


def test_what_takes_less_than_a_minute_says_nothing_without_a_terminal(monkeypatch):
    assert watch(monkeypatch, False, 1, 50).strip() == ""


def test_a_bar_on_a_terminal(monkeypatch):
    shown = watch(monkeypatch, True, 1, 50)
    assert shown.count("\r") >= 50 and "evaluating" in shown and "100%" in shown


def test_a_training_says_a_line_a_minute(tmp_path, monkeypatch):
    """How far it is, its step, its loss and its speed."""
    now, screen = 1000.0, Screen(False)
    run = make_run(tmp_path / "run", "--steps", 60, "--save-every", 60)
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(p.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", screen)
    for step in run.steps({}, preview):
        now += 5
        run.log(loss=float(step))
    lines = [line for line in screen.getvalue().splitlines() if line.strip()]
    assert 4 <= len(lines) <= 6
    percent = [int(re.search(rf"{SCRIPTS[0]} +(\d+)%", line)[1]) for line in lines]
    assert percent == sorted(percent) and 10 < percent[0] < 40
    assert all(re.search(r"step \d+ loss \d+\.\d+ \d+\.\d steps/s", line) for line in lines)
    step, loss = map(float, re.search(r"step (\d+) loss ([\d.]+)", lines[0]).groups())
    assert loss == step - 1 and abs(step / 60 - percent[0] / 100) < 0.05
    assert "0.2 steps/s" in lines[0]


# ----------------------------------------------------------------------------------------------------- the program's ends


def program(main):
    try:
        p.launch(main)
    except SystemExit as e:
        return e.code
    return 0


class Broken(io.StringIO):
    """A terminal that is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]])
@pytest.mark.parametrize("how", ["broken", "none"])
def test_nobody_reads_what_is_said(names, how, tmp_path, monkeypatch):
    """The training goes on to its end, its bar, its lines and its errors too."""
    for name in names:
        monkeypatch.setattr(sys, name, Broken() if how == "broken" else None)
    done = []

    def main():
        print("a line")
        print("a warning", file=sys.stderr)
        run = make_run(tmp_path / "run", "--steps", 3)
        for step in run.steps({}, preview):
            run.log(loss=float(step))
        p.write(tmp_path / "file", lambda f: f.write(b"x"), "a result")
        sys.stdout.flush()
        done.append(run.step)
        p.fail("its end", 7)

    assert program(main) == 7 and done == [3]
    assert (tmp_path / "file").exists() and len(log_lines(tmp_path / "run")) == 3


def test_a_reader_that_leaves_does_not_end_the_program(tmp_path):
    """`script | head -1`, a real pipe: exit code 0 and nothing on stderr, also as the interpreter ends."""
    code = f"import {SCRIPTS[0]} as p; p.launch(lambda: [print('x' * 1000) for _ in range(1000)])"
    end, start = os.pipe()
    os.close(end)
    done = subprocess.run([sys.executable, "-c", code], stdout=start, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(start)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_below_the_normal_ones_become_0_in_every_thread(name, tmp_path):
    """Of a run in a process of its own, whose threads begin after it: each half of a large tensor is another thread's."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    code = f"""
import torch
torch.set_num_threads(2)
import {name}
{name}.Run({name}.Config(out="run", kernels="torch"), {{}})
product = torch.full((1 << 20,), 1e-40) * 0.9
assert not product.view(torch.int32).any()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_that_stdout_cannot_show(encoding, tmp_path, monkeypatch):
    """Shown as well as can be, in what is printed and in an error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    names = ("日本", "Größe", os.fsdecode(b"\xff"))

    def main():
        ready(tmp_path, data=tiny.make_data(p)._replace(names=names))
        ready(tmp_path, "--label", "ё", data=tiny.make_data(p)._replace(names=names))

    assert program(main) == 2
    said = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    assert "3 classes: " in said[0] and r"\udcff" in said[0] and said[1].startswith("error: --label")
    assert ("日本" if encoding == "utf-8" else r"\u65e5\u672c") in said[0]


ERRORS = {
    "memory": (MemoryError(), 1, ["out of memory", "--batch-size"]),
    "memory of a device": (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 1, ["out of memory", "--batch-size"]),
    "memory of the CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, ["out of memory"]),
    "a file": (PermissionError(13, "Permission denied", "/some/file"), 1, ["/some/file", "Permission denied"]),
    "no reason": (OSError(), 1, [SCRIPTS[0]]),
    "kernels": (RuntimeError("kernels.mode is 'triton', but no GPU is here"), 2, ["--kernels: ", "'triton'", "no GPU is here"]),
    "a mode of kernels": (RuntimeError("kernels.mode (--kernels, M2_KERNELS) must be auto, not 'x'"), 2, ["M2_KERNELS", "'x'"]),
}


@pytest.mark.parametrize("error, code, words", ERRORS.values(), ids=ERRORS)
def test_what_the_machine_refuses_is_one_line(error, code, words, capsys):
    def main():
        raise error

    assert program(main) == code
    line = error_line(capsys.readouterr().err)
    assert all(word in line for word in words)


def test_what_is_wrong_in_the_program_is_shown_in_full():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        program(main)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_launch_leaves_nothing_behind(tmp_path):
    """Handlers and locks are as they were: a notebook goes on."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before, inside = [signal.getsignal(n) for n in numbers], []

    def main():
        inside.extend(signal.getsignal(n) for n in numbers)
        (tmp_path / "run").mkdir()
        make_run(tmp_path / "run", "--overwrite")
        assert p.LOCKS

    assert program(main) == 0
    assert [signal.getsignal(n) for n in numbers] == before and not set(inside) & set(before) and not p.LOCKS


@every_script
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
@pytest.mark.parametrize("stepping", [False, True], ids=["at once", "after a step"])
def test_a_run_after_one_that_was_stopped(tmp_path, stepping, module, monkeypatch):
    """What stopped a run in this process (a notebook) does not stop the next one, whether it goes through launch() or not."""

    def main():
        module.Run.stepping = stepping
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(SystemExit) as stopped:
        module.launch(main)
    assert stopped.value.code == 129
    tiny.small_digits(module, monkeypatch)
    module.main(flags(module.__name__, tmp_path / "run"))
    assert (tmp_path / "run/samples.npz").exists()
    assert tiny.run(module, flags(module.__name__, tmp_path / "again")) == 0


# ----------------------------------------------------------------------------------------------------- several processes


def train_a_few_steps(out, world):
    """Three steps of a small model on images of digits; the gradients of each step and the weights at the end."""
    run = make_run(out, "--batch-size", 12, "--steps", 3)
    assert run.world == world
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
    model[1].unused = nn.Linear(3, 3)  # has no gradient
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data, grads = tiny.make_data(p), []
    for _ in run.steps({}, preview):
        x, y = run.batch(data)
        assert len(x) == 12 // world
        run.update((model(x / 255.0)[:, 0] - y).square().mean(), model, optimizer, 1e9)
        grads.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
    return {"grads": grads, "weights": model.state_dict()}


def train_as_rank(out, world, rank):
    torch.save(train_a_few_steps(out, world), f"{out}.{rank}.pt")
    p.dist.destroy_process_group()


def test_two_processes_with_half_the_batch_give_the_gradients_of_one(tmp_path):
    ranks = tiny.start_ranks(tmp_path, 2, train_as_rank, str(tmp_path / "run"), 2)
    single = train_a_few_steps(tmp_path / "single", 1)
    for child in ranks:
        assert child.join() == 0, child.stderr
    a, b = (torch.load(tmp_path / f"run.{rank}.pt") for rank in range(2))
    assert all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
    assert len(a["grads"]) == len(single["grads"]) == 3 and len(a["grads"][0]) == 4
    for double, one in zip(a["grads"], single["grads"], strict=True):
        torch.testing.assert_close(double, one)
        assert all(g.abs().max() > 0 for g in one)
    torch.manual_seed(0)
    assert not torch.equal(a["weights"]["1.weight"], nn.Linear(64, 8).weight)  # where they began
    torch.testing.assert_close(a["weights"], single["weights"])


def log_as_rank(out, rank):
    """Rank r logs the losses 1 + 2r and 5 + 2r, and then 10r."""
    run = make_run(out, "--steps", 3, "--log-every", 2)
    for step in run.steps({}, preview):
        run.log(loss=torch.tensor([1 + 2.0 * rank, 5 + 2.0 * rank, 10.0 * rank][step]), lr=0.5)
    run.step = 4
    run.log(loss=10 * rank, lr=0.25)
    p.dist.destroy_process_group()


def test_what_is_logged_is_the_mean_of_all_processes(tmp_path):
    for child in tiny.start_ranks(tmp_path, 4, log_as_rank, str(tmp_path / "run")):
        assert child.join() == 0, child.stderr
    assert tiny.metrics(tmp_path / "run") == [{"step": 2, "loss": 6.0, "lr": 0.5}, {"step": 4, "loss": 15.0, "lr": 0.375}]


def share_noise(module, world, rank):
    """From now on each of `world` processes draws its rows of the noise that one process would draw in that step."""
    batch, rand, randn, calls = module.Run.batch, torch.rand, torch.randn, None

    def counted(self, data):
        nonlocal calls
        calls = itertools.count(1000 * self.step)
        return batch(self, data)

    def part(draw, *size, generator=None, **more):
        if generator is not None or calls is None:  # samples, or the weights that a network starts from
            return draw(*size, generator=generator, **more)
        n, *shape = torch.empty(*size, device="meta").shape
        return draw(n * world, *shape, generator=torch.Generator().manual_seed(next(calls)), **more)[rank::world]

    module.Run.batch = counted
    torch.rand, torch.randn = functools.partial(part, rand), functools.partial(part, randn)
    torch.rand_like, torch.randn_like = (lambda x: torch.rand(x.shape)), (lambda x: torch.randn(x.shape))


def run_as_rank(name, argv, world, rank):
    tiny.run_script(name, argv, lambda module: share_noise(module, world, rank))


@pytest.mark.parametrize("command", [
    "gan", "vqgan --stage1 4", "vqgan --stage1 1 --dropout 0", "vae --levels 2", "vae --prior vamp --posterior iaf",
    "flow --dequantize variational", "flow --arch glow", "autoregressive --dropout 0", "diffusion"])
def test_each_script_trained_by_several_processes(command, tmp_path):
    """Two processes, or four, end with the weights of one that has the joint batch and the same noise, and log what it logs."""
    ends, logs = [], []
    name, *more = command.split()
    worlds = (1, 2, 4) if name == "gan" or os.environ.get("M2_ALL_VARIANTS") else (1, 2)
    for world in worlds:
        argv = flags(name, tmp_path / f"out{world}", *more)
        for child in tiny.start_ranks(tmp_path / str(world), world, run_as_rank, name, argv, world):
            assert child.join() == 0, child.stderr
        end = dict(tiny.leaves(tiny.load_checkpoint(tmp_path / f"out{world}")))
        ends.append({n: v for n, v in end.items() if torch.is_tensor(v) and "optimizer" not in n})
        logs.append(tiny.metrics(tmp_path / f"out{world}")[:-1])
    for end, log in zip(ends[1:], logs[1:], strict=True):
        assert ends[0].keys() == end.keys() and len(end) > 20
        for part, value in ends[0].items():
            torch.testing.assert_close(end[part], value, rtol=1e-3, atol=1e-4, msg=lambda m, part=part: f"{part}: {m}")
        for one, several in zip(logs[0], log, strict=True):
            assert several == pytest.approx(one, rel=1e-3, abs=1e-4)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as e:
        make_run(tmp_path / "run", "--batch-size", 16)
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 2 and "--batch-size 16" in line and "3 processes" in line


def test_several_processes_do_not_share_an_mps_device(tmp_path, monkeypatch, capsys):
    """gloo has no tensors of it: "auto" takes the CPU, and asking for it is refused."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert make_run(tmp_path / "one", "--device", "mps").device.type == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(p.dist, "is_initialized", lambda: True)
    assert make_run(tmp_path / "two", "--device", "auto").device.type == "cpu"
    with pytest.raises(SystemExit) as e:
        make_run(tmp_path / "three", "--device", "mps")
    assert e.value.code == 2 and "--device mps" in error_line(capsys.readouterr().err)


NAME_THREADS = """
import atexit, os, pathlib

def name_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    pathlib.Path(__file__).with_name("rank" + os.environ["RANK"]).write_text("".join(names))

if "RANK" in os.environ:
    atexit.register(name_threads)
"""


@pytest.mark.parametrize("name", SCRIPTS if os.environ.get("M2_ALL_VARIANTS") else ["gan", "vqgan"])
def test_torchrun_with_two_processes(name, tmp_path, tmp_path_factory):
    """No thread of the group is left when the interpreter closes down: one that still holds a tensor then is a SIGABRT."""
    out = tmp_path / "run"
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(NAME_THREADS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / f"{name}.py"]
    done = subprocess.run([*map(str, command), *flags(name, out, "--steps", 3)], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)})
    assert done.returncode == 0, done.stderr
    assert not any("gloo" in (site / f"rank{rank}").read_text() for rank in (0, 1))
    assert [line["step"] for line in tiny.metrics(out)] == [1, 2, 3, 3]  # each once: one process writes
    assert tiny.metrics(out)[-1]["final"] is True
    assert tiny.load_checkpoint(out)["step"] == 3
    assert all(done.stdout.count(words) == 1 for words in ("images to train on", "samples.npz: ", "metrics.jsonl"))
    assert np.load(out / "samples.npz")["images"].shape == (4, 8, 8, 1)
    assert not list(out.glob("*.part")) and sorted(f.name for f in tmp_path.iterdir()) == ["run"]
