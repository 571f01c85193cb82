"""The plumbing that all scripts share, and the command line of each."""

import ast
import dataclasses
import gzip
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from tiny import ROOT, SCRIPTS, Child, error_line, flags, sync

p = importlib.import_module(SCRIPTS[0])  # the block is the same in all of them, as the first test says
every_script = pytest.mark.parametrize("module", SCRIPTS, indirect=True)


@pytest.fixture
def module(request):
    return importlib.import_module(request.param)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("inspect.getsource", tiny.getsource)


@pytest.fixture(autouse=True)
def keep_handlers():
    with tiny.handlers_kept():
        yield


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

CORE_FIELDS = """mode dataset data_dir image_size steps minutes batch_size lr seed device amp compile kernels out resume
    overwrite num_samples ema log_every save_every""".split()


def comments(module):
    """field: its comment, read by a parser of its own."""
    source, found = open(module.__file__).read(), {}
    node = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for line in source.splitlines()[node.lineno:node.end_lineno]:
        if m := re.match(r"    (\w+): [^#]*#(.*)", line):
            found[m[1]] = m[2].strip()
    return found


def kind_of(field):
    """(type of one value, whether it is a tuple)"""
    if get_origin(field.type) is Literal:
        return Literal, False
    if get_origin(field.type) is tuple:
        return get_args(field.type)[0], True
    return next((a for a in get_args(field.type) if a is not type(None)), field.type), False


def flag(field):
    return "--" + field.name.replace("_", "-")


@every_script
def test_core_fields_come_first_in_every_script(module):
    fields = [f.name for f in dataclasses.fields(module.Config)]
    assert fields[:len(CORE_FIELDS)] == CORE_FIELDS
    assert len(set(fields)) == len(fields)
    cfg = module.Config()
    assert (cfg.mode, cfg.dataset, cfg.data_dir, cfg.device, cfg.amp, cfg.kernels) == (
        "train", "digits", "data", "auto", "off", "auto")


@every_script
def test_defaults_without_flags(module):
    cfg, given = module.parse_args(module.Config, [])
    assert cfg == module.Config() and given == set()


@every_script
def test_every_field_has_its_flag(module):
    """A good value of each type arrives in its field and in no other, and only its name is given."""
    for field in dataclasses.fields(module.Config):
        kind, many = kind_of(field)
        if kind is bool:
            cases = [([flag(field)], True), (["--no-" + flag(field)[2:]], False)]
        elif kind is Literal:
            cases = [([flag(field), str(v)], v) for v in get_args(field.type)]
        elif many:
            cases = [([flag(field), "1", "2", "3"], (kind(1), kind(2), kind(3))), ([flag(field), "1"], (kind(1),))]
        else:
            cases = [([flag(field), "1"], kind("1")), ([f"{flag(field)}=1"], kind("1"))]
        for argv, value in cases:
            cfg, given = module.parse_args(module.Config, argv)
            got = getattr(cfg, field.name)
            assert got == value and type(got) is type(value), argv
            assert given == {field.name}
            assert dataclasses.replace(cfg, **{field.name: getattr(module.Config(), field.name)}) == module.Config()


@every_script
def test_help_explains_every_flag(module, capsys):
    with pytest.raises(SystemExit) as e:
        module.parse_args(module.Config, ["--help"])
    assert e.value.code == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count(module.__doc__.strip().splitlines()[0]) == 1
    words = " ".join(out.split())
    known = comments(module)
    for field in dataclasses.fields(module.Config):
        assert flag(field) in words
        assert " ".join(known[field.name].split()) in words, f"{flag(field)} is not explained"
        assert f"[{field.default}]" in words
        if get_origin(field.type) is Literal:
            assert "{" + ",".join(map(str, get_args(field.type))) + "}" in words


def bounded(module):
    for field in dataclasses.fields(module.Config):
        kind, _ = kind_of(field)
        comment = comments(module)[field.name]
        if kind in (int, float):
            yield field, kind, re.search(r"\((>=?) ([\d.]+)\)|\(([\d.]+) to ([\d.]+)\)", comment)


@every_script
def test_every_number_has_a_bound_and_what_lies_outside_is_refused(module, capsys):
    for field, kind, bound in bounded(module):
        assert bound, f"no bound in the comment of {field.name}"
        if bound[1]:
            low = float(bound[2])
            bad = [low - 1, *([low] if bound[1] == ">" else [])]
            good = [low + 1, *([low] if bound[1] == ">=" else [])]
        else:
            low, high = float(bound[3]), float(bound[4])
            bad, good = [low - 1, high + 1], [low, high]
        for value in bad + ([float("nan"), -float("inf")] if kind is float else []):
            with pytest.raises(SystemExit) as e:
                module.parse_args(module.Config, [f"{flag(field)}={kind(value)}"])
            assert e.value.code == 2
            line = error_line(capsys.readouterr().err)
            assert flag(field) in line and "must be" in line
        for value in good:
            cfg, _ = module.parse_args(module.Config, [flag(field), str(kind(value))])
            assert getattr(cfg, field.name) == (kind(value),) * kind_of(field)[1] or getattr(cfg, field.name) == kind(value)
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(v is None or (v > low if bound[1] == ">" else v >= low) for v in default)


@every_script
def test_every_value_of_a_tuple_is_checked(module, capsys):
    for field, kind, _ in bounded(module):
        if kind_of(field)[1]:
            with pytest.raises(SystemExit) as e:
                module.parse_args(module.Config, [flag(field), "2", str(kind(-1))])
            assert e.value.code == 2 and flag(field) in error_line(capsys.readouterr().err)


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
])
def test_wrong_flags_are_one_line_and_exit_code_2(module, argv, words, capsys):
    with pytest.raises(SystemExit) as e:
        module.parse_args(module.Config, argv)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and all(word in error_line(err) for word in words)


# ------------------------------------------------------------------------------------------------------------ the data


def idx(images):
    """The IDX file of uint8 images (N,H,W) or labels (N,)."""
    return struct.pack(f">HBB{images.ndim}I", 0, 8, images.ndim, *images.shape) + images.astype(np.uint8).tobytes()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def test_digits(no_network, tmp_path):
    data = p.load_data("digits", str(tmp_path))
    assert data.train.shape == (1500, 1, 8, 8) and data.test.shape == (297, 1, 8, 8) and data.classes == 10
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.train.min() == 0 and data.train.max() == 255
    assert set(data.train_labels.tolist()) == set(data.test_labels.tolist()) == set(range(10))
    again = p.load_data("digits", "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(data[:4], again[:4], strict=True))
    from sklearn.datasets import load_digits

    digits = load_digits()  # each image keeps its own label, and the two splits are the whole
    row = {(x * 255 / 16).round().astype(np.uint8).tobytes(): y for x, y in zip(digits.images, digits.target, strict=True)}
    x, y = torch.cat([data.train, data.test]), torch.cat([data.train_labels, data.test_labels])
    assert all(row[image.numpy().tobytes()] == label for image, label in zip(x[:, 0], y.tolist(), strict=True))
    assert sorted(image.numpy().tobytes() for image in x) == sorted(
        (im * 255 / 16).round().astype(np.uint8).tobytes() for im in digits.images)


@pytest.fixture
def small_idx(monkeypatch, tmp_path):
    """Writes a data set of 20 + 10 images in the format of MNIST, whose hashes the script then knows."""
    rng = np.random.RandomState(0)
    arrays = [rng.randint(*how) for how in ((0, 256, (20, 28, 28)), (0, 10, 20), (0, 256, (10, 28, 28)), (0, 10, 10))]
    content = dict(zip(p.SHA256["mnist"], map(idx, arrays), strict=True))

    def put(name, packed):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(p.SHA256, name, {file: hashlib.sha256(raw).hexdigest() for file, raw in content.items()})
        for file, raw in content.items():
            (tmp_path / name / (file + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
        return arrays

    return put


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(name, packed, small_idx, tmp_path, no_network):
    arrays = small_idx(name, packed)
    data = p.load_data(name, str(tmp_path))
    for got, want in zip(data[:4], arrays, strict=True):
        assert torch.equal(got.squeeze(), torch.from_numpy(want).to(got.dtype))
    assert data.train.shape == (20, 1, 28, 28) and data.train.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64 and data.classes == 10


def test_idx_tensors_can_be_written_to(small_idx, tmp_path):
    small_idx("mnist", True)
    data = p.load_data("mnist", str(tmp_path))
    for part in data[:4]:
        part.add_(1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_files_where_they_are(name, data_dir, no_network):
    data = p.load_data(name, data_dir)
    assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    known = {"mnist": ([5, 0, 4, 1, 9], 33.32), "fashion_mnist": ([9, 0, 0, 3, 0], 72.94)}[name]
    assert data.train_labels[:5].tolist() == known[0]
    assert data.train[:, :, :, :].float().mean().item() == pytest.approx(known[1], abs=0.01)
    assert torch.bincount(data.test_labels).sum() == 10_000


def test_cifar10_archive(tmp_path, monkeypatch, no_network):
    archive, rows = tiny.cifar10_archive()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar-10-binary.tar.gz").write_bytes(archive)
    monkeypatch.setitem(p.SHA256, "cifar10", {"cifar-10-binary.tar.gz": hashlib.sha256(archive).hexdigest()})
    data = p.load_data("cifar10", str(tmp_path))
    assert data.train.shape == (50_000, 3, 32, 32) and data.test.shape == (10_000, 3, 32, 32) and data.classes == 10
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    for x, y, i, row in ((data.train, data.train_labels, 49_999, 49_999), (data.test, data.test_labels, 0, 50_000)):
        assert y[i] == rows[row, 0]
        assert np.array_equal(x[i].numpy(), rows[row, 1:].reshape(3, 32, 32))  # planes of red, green, blue


def test_resize_of_a_data_set(tmp_path, no_network):
    whole = p.load_data("digits", str(tmp_path))
    for size in (4, 16, 13):
        data = p.load_data("digits", str(tmp_path), size)
        assert data.train.shape == (1500, 1, size, size) and data.test.shape == (297, 1, size, size)
        assert data.train.dtype == torch.uint8 and torch.equal(data.train_labels, whole.train_labels)
        mean = data.train.float().mean((1, 2, 3)) - whole.train.float().mean((1, 2, 3))
        assert mean.abs().max() < 14  # of 255: the same image
    assert torch.equal(p.load_data("digits", str(tmp_path), 8).train, whole.train)
    for size in (4, 13):  # as PIL does it: bilinear, antialiased, so that every pixel of the original counts
        pil = [Image.fromarray(x[0].numpy()).resize((size, size), Image.BILINEAR) for x in whole.test]
        test = p.load_data("digits", str(tmp_path), size).test[:, 0]
        assert (test.int() - torch.from_numpy(np.stack(pil)).int()).abs().max() <= 2


def paint(path, value=128, size=(6, 6), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path, **options)


def test_folder_flat(tmp_path):
    for i in range(20):
        paint(tmp_path / f"{i:02d}.png", i, mode="L")
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.classes == 0 and data.train.shape == (18, 1, 6, 6) and data.test.shape == (2, 1, 6, 6)
    mixed = np.random.RandomState(0).permutation(20).tolist()
    assert data.test[:, 0, 0, 0].tolist() == [i for i in mixed if i in (1, 11)]  # every tenth by name
    assert data.train[:, 0, 0, 0].tolist() == [i for i in mixed if i not in (1, 11)]
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert not data.train_labels.any() and not data.test_labels.any()


def test_folder_with_a_subfolder_a_class(tmp_path):
    for label, name in enumerate(("apple", "berry", "cherry")):
        for i in range(10):
            paint(tmp_path / name / f"{i}.png", (80 * label + i, 0, 0))
    data = p.load_data(str(tmp_path), "nowhere")
    assert data.classes == 3 and data.train.shape == (27, 3, 6, 6) and data.test.shape == (3, 3, 6, 6)
    for x, y in (data[:2], data[2:4]):
        assert torch.equal(x[:, 0, 0, 0].long() // 80, y)  # the label is that of the subfolder
        assert not x[:, 1:].any()
    assert sorted(data.test_labels.tolist()) == [0, 1, 2] and set(data.train_labels[:9].tolist()) == {0, 1, 2}  # mixed


def test_folder_is_read_in_the_same_order_every_time(tmp_path):
    for i in random.Random(0).sample(range(30), 30):
        paint(tmp_path / f"{i:02d}.png", i, mode="L")
    a, b = p.load_data(str(tmp_path), ""), p.load_data(str(tmp_path), "")
    order = [i for i in np.random.RandomState(0).permutation(30).tolist() if i % 10 != 1]
    assert torch.equal(a.train, b.train) and torch.equal(a.test, b.test) and a.train[:, 0, 0, 0].tolist() == order


def test_folder_at_an_image_size(tmp_path):
    for i in range(3):
        paint(tmp_path / f"{i}.png", (0, 0, 0), size=(12, 8))
    data = p.load_data(str(tmp_path), "", 4)
    assert data.train.shape[1:] == (3, 4, 4)


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
    cfg, given = module.parse_args(module.Config, [*tiny.CORE.split(), "--out", str(out), *map(str, more)])
    return module.Run(cfg, given, module.FREE)


def numbered(n):
    """n images of one pixel that is the image's number, and so is its label."""
    number = torch.arange(n)
    return p.Data(number.to(torch.uint8).view(-1, 1, 1, 1), number, number[:0], number[:0], n)


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
    return [torch.rand(4).tolist() for _ in itertools.islice(make_run(out, *more).steps(), count)]


def test_noise_of_a_step_depends_on_seed_and_step(tmp_path):
    a = noise(tmp_path)
    assert a == noise(tmp_path)
    assert len(set(map(tuple, a))) == 3
    for other in (0, 1, 2, 4, 2**16):
        b = noise(tmp_path, "--seed", other)
        assert not set(map(tuple, a)) & set(map(tuple, b)), f"seeds 3 and {other} draw the same noise"


@pytest.mark.parametrize("seed", [2**31, 2**32, 2**32 + 3, 10**12])
def test_a_large_seed_works_or_is_refused(seed, tmp_path, capsys):
    try:
        a = noise(tmp_path, "--seed", seed)
    except SystemExit as e:
        assert e.code == 2 and "--seed" in error_line(capsys.readouterr().err)
    else:
        assert a != noise(tmp_path, "--seed", 3)


# ---------------------------------------------------------------------------------------------------------- checkpoint


def make_parts():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(torch.rand(8, 1, 4, 4)).square().mean().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def test_checkpoint_round_trip(tmp_path):
    run, parts = make_run(tmp_path / "run"), make_parts()
    run.step, run.seconds, run.facts = 7, 1.5, {"shape": [1, 4, 4], "classes": 0, "train_images": 8}
    run.save(parts)
    saved = tiny.load_checkpoint(tmp_path / "run")
    assert saved["step"] == 7 and saved["seconds"] == 1.5 and saved["facts"] == run.facts
    assert saved["script"] == SCRIPTS[0] and saved["config"] == dataclasses.asdict(run.cfg)
    again, fresh = make_run(tmp_path / "run", "--resume"), make_parts()
    assert (again.step, again.seconds, again.facts) == (7, 1.5, run.facts)
    again.restore(fresh)
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


def test_config_of_the_checkpoint_is_taken_over_where_no_flag_says_otherwise(tmp_path):
    run = make_run(tmp_path / "run", "--lr", 0.5, "--steps", 9)
    run.save({})
    cfg, given = p.parse_args(p.Config, ["--out", str(tmp_path / "run"), "--resume", "--log-every", "7"])
    again = p.Run(cfg, given, p.FREE)
    assert (again.cfg.lr, again.cfg.steps, again.cfg.batch_size, again.cfg.log_every) == (0.5, 9, 16, 7)
    cfg, given = p.parse_args(p.Config, ["--out", str(tmp_path / "run"), "--resume", "--minutes", "2"])
    again = p.Run(cfg, given, p.FREE)
    assert (again.cfg.minutes, again.cfg.steps) == (2, None)  # a new budget replaces the old one whole


def test_metrics_are_means_since_the_last_line(tmp_path):
    run = make_run(tmp_path / "run", "--log-every", 2, "--steps", 4)
    run.begin({})
    for step in run.steps():
        run.log(loss=torch.tensor(float(step), requires_grad=True), other=2 * step)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(d["step"], d["loss"], d["other"]) for d in lines] == [(2, 0.5, 1), (4, 2.5, 5)]
    assert all(d["seconds"] >= 0 for d in lines)


def test_curves_shows_every_metric(tmp_path):
    run = make_run(tmp_path / "run", "--steps", 3)
    run.begin({})
    for step in run.steps():
        run.log(loss=float(step), other=1.0)
    run.curves()
    narrow = Image.open(tmp_path / "run" / "curves.png").size[0]
    run.write_metrics(final=True, test_bpd=1.0)
    run.curves()
    wide = Image.open(tmp_path / "run" / "curves.png").size[0]
    assert narrow > 500 and wide >= 1.4 * narrow  # a panel more
    run = make_run(tmp_path / "no lines", "--steps", 3, "--log-every", 100)
    run.begin({})
    run.curves()
    assert (tmp_path / "no lines" / "curves.png").exists()


@pytest.mark.parametrize("limits, steps", [(["--steps", 3], 3), (["--minutes", 1], 4), (["--steps", 2, "--minutes", 1], 2),
                                           (["--steps", 30, "--minutes", 1], 4)])
def test_the_budget_ends_the_steps(limits, steps, tmp_path, monkeypatch):
    """By steps, by a clock that moves on by 15 seconds a step, or by whichever comes first."""
    run, seen, now = make_run(tmp_path / "run", *limits), [], 1000.0
    if "--steps" not in limits:
        run.cfg.steps = None
    monkeypatch.setattr(p.time, "monotonic", lambda: now)
    for step in run.steps():
        seen.append(step)
        assert run.step == step + 1 and len(seen) < 10
        now += 15
    assert seen == list(range(steps)) and run.step == steps and run.seconds == 15 * steps
    assert list(run.steps()) == []  # nothing is left of it


def test_time_already_spent_counts(tmp_path, monkeypatch):
    run, now = make_run(tmp_path / "run", "--minutes", 1), 1000.0
    run.cfg.steps, run.seconds, run.step = None, 40.0, 7
    monkeypatch.setattr(p.time, "monotonic", lambda: now)
    seen = []
    for step in run.steps():
        seen.append(step)
        now += 15
    assert seen == [7, 8] and run.seconds == 70


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
    for _ in run.steps():
        x, y = run.batch(data)
        assert len(x) == 12 // world
        run.update((model(x / 255.0)[:, 0] - y).square().mean(), model, optimizer, 1e9)
        grads.append([q.grad.clone() for q in model.parameters() if q.grad is not None])
    return {"grads": grads, "weights": model.state_dict()}


def train_as_rank(out, world, rank):
    torch.save(train_a_few_steps(out, world), f"{out}.{rank}.pt")
    p.dist.destroy_process_group()


def start_ranks(tmp_path, world, function, *args):
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    return [Child(tmp_path / f"rank{rank}", function, *args, rank, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)]


def test_two_processes_with_half_the_batch_give_the_gradients_of_one(tmp_path):
    ranks = start_ranks(tmp_path, 2, train_as_rank, str(tmp_path / "run"), 2)
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


def share_noise(world, rank):
    """From now on each of `world` processes draws its rows of the noise that one process would draw."""
    randn, draws = torch.randn, itertools.count()

    def part(n, *shape, generator=None, **more):
        if generator is None:
            return randn(n * world, *shape, generator=torch.Generator().manual_seed(next(draws)), **more)[rank::world]
        return randn(n, *shape, generator=generator, **more)

    torch.randn = part


def run_as_rank(name, argv, world, rank):
    tiny.run_script(name, argv, (lambda module: share_noise(world, rank)) if name == "gan" else None)


@pytest.mark.parametrize("name, more", [("gan", ["--steps", 4]), ("vqgan", ["--steps", 4, "--stage1", 4])])
def test_two_networks_trained_by_two_processes(name, more, tmp_path):
    """Generator and discriminator, or autoencoder, codebook and discriminator: as one process trains them, to rounding."""
    ends = []
    for world in (1, 2):
        for child in start_ranks(tmp_path / str(world), world, run_as_rank, name, flags(name, tmp_path / f"out{world}", *more),
                                 world):
            assert child.join() == 0, child.stderr
        ends.append(dict(tiny.leaves(tiny.load_checkpoint(tmp_path / f"out{world}"))))
    one, two = ({n: v for n, v in end.items() if torch.is_tensor(v) and "optimizer" not in n} for end in ends)
    assert one.keys() == two.keys() and len(one) > 20
    for part, value in one.items():
        torch.testing.assert_close(two[part], value, rtol=1e-3, atol=1e-4, msg=lambda m, part=part: f"{part}: {m}")


def test_a_batch_that_cannot_be_split_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit) as e:
        make_run(tmp_path / "run", "--batch-size", 16)
    line = error_line(capsys.readouterr().err)
    assert e.value.code == 2 and "--batch-size 16" in line and "3 processes" in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_torchrun_with_two_processes(name, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / f"{name}.py"]
    done = subprocess.run([*map(str, command), *flags(name, out, "--steps", 3)], capture_output=True, text=True,
                          cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in tiny.metrics(out)] == [1, 2, 3, 3]  # each once: one process writes
    assert tiny.metrics(out)[-1]["final"] is True
    assert tiny.load_checkpoint(out)["step"] == 3
    assert done.stdout.count("samples in") == 1
    assert np.load(out / "samples.npz")["images"].shape == (4, 8, 8, 1)
    assert not list(out.glob("*.part")) and sorted(f.name for f in tmp_path.iterdir()) == ["run"]
