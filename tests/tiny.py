"""What the tests of all scripts share: which scripts there are, a tiny run of each, and processes that start fast."""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parent.parent
getsource = functools.cache(inspect.getsource)  # what a command line is built from, read once, not once a run
TINY = {  # the flags of a model so small that a run of four steps takes a moment; a new script adds its own here
    "autoregressive": "--output bernoulli --width 8 --blocks 1",
    "vae": "--width 8 --blocks 1 --flow-hidden 16 --z-dim 4 --flow-steps 2 --pseudo-inputs 4 --iw-samples 2",
    "flow": "--width 8 --blocks 1 --steps-per-scale 1 --layers 1 --n-head 2",
    "gan": "--width 8 --z-dim 4",
    "vqgan": "--width 8 --n-codes 8 --code-dim 4 --prior-width 8 --prior-blocks 1 --n-head 2 --stage1 1 --disc-start 0",
    "diffusion": "--width 8 --mults 1 2 --blocks 1 --n-head 2 --nfe 2 --elbo-samples 1",
}
CORE = "--device cpu --steps 4 --batch-size 16 --num-samples 4 --log-every 1 --save-every 2 --seed 3"


def load_tool(name):
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sync = load_tool("sync")
SCRIPTS = [name.removesuffix(".py") for name in sync.SCRIPTS if (ROOT / name).exists()]


def flags(name, out, *more):
    """The command line of a tiny run; of a flag given twice the last holds."""
    return [*CORE.split(), *TINY[name].split(), "--out", str(out), *map(str, more)]


def run(module, argv):
    """The exit code of `python script.py argv`, in this process."""
    try:
        module.launch(lambda: module.main([str(a) for a in argv]))
    except SystemExit as e:
        return e.code or 0
    return 0


@contextlib.contextmanager
def handlers_kept():
    """Whatever handlers of stop signals are set within are gone afterwards."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tiny_run(name, out, *more):
    """Train a tiny run of digits in the folder `out`, far enough that noise, class and settings show in its images."""
    module = importlib.import_module(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        small_digits(module, monkeypatch)
        argv = flags(name, out, "--steps", 12, "--save-every", 100, "--warmup", 0, "--lr", 0.02, *more)
        assert run(module, argv) == 0
    return module


def make_data(module, train=40, test=11, shape=(1, 8, 8), classes=3, seed=0):
    """A data set of soft blobs, so small that loading and evaluating it costs nothing."""
    g, (c, h, w) = torch.Generator().manual_seed(seed), shape
    x = torch.rand(train + test, c, -(-h // 4), -(-w // 4), generator=g)
    x = torch.nn.functional.interpolate(x, (h, w), mode="bilinear").mul(255).byte()
    y = torch.arange(train + test) % max(classes, 1)
    return module.Data(x[:train], y[:train], x[train:], y[train:], tuple(map(str, range(classes))))


def small_digits(module, monkeypatch):
    """What module.load_data gives from now on: digits, loaded once, with 8 test images."""
    data = module.load_data("digits", "data")
    data = data._replace(test=data.test[:8], test_labels=data.test_labels[:8])
    monkeypatch.setattr(module, "load_data", lambda *args: data)
    return data


def error_line(err):
    """The one line of an error, without its `error: `."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one line of error but: {err}"
    return lines[0].removeprefix("error: ")


def load_checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", map_location="cpu", weights_only=True)


def leaves(tree, name=""):
    """(name, leaf) of each leaf of nested dicts, lists and tuples."""
    if isinstance(tree, dict):
        for k, v in tree.items():
            yield from leaves(v, f"{name}.{k}")
    elif isinstance(tree, (list, tuple)):
        for i, v in enumerate(tree):
            yield from leaves(v, f"{name}.{i}")
    else:
        yield name, tree


def assert_same_state(a, b, ignore=()):
    """Two checkpoints agree bit for bit, but for the clock, the length of the log (which holds it) and config's `ignore`."""
    skip = {".seconds", ".log_size", *(f".config.{name}" for name in ("out", "resume", "overwrite", *ignore))}
    a, b = ({n: v for n, v in leaves(c) if n not in skip} for c in (a, b))
    assert a.keys() == b.keys()
    assert sum(torch.is_tensor(v) for v in a.values()) > 10
    for name, value in a.items():
        if torch.is_tensor(value):
            assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def metrics(out):
    """The lines of metrics.jsonl, without their seconds."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return lines


@functools.cache
def cifar10_archive():
    """An archive like that of CIFAR-10, and its 60,000 rows of a label and 3072 pixels: noise in a few images, else black."""
    rng, rows, raw = np.random.RandomState(0), np.zeros((60_000, 3073), np.uint8), io.BytesIO()
    rows[:, 0] = rng.randint(0, 10, len(rows))
    rows[::5000, 1:] = rng.randint(0, 256, (12, 3072))
    rows[49_999, 1:] = rng.randint(0, 256, 3072)
    with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as archive:
        for i, part in enumerate(np.split(rows, 6)):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{'test_batch' if i == 5 else f'data_batch_{i + 1}'}.bin")
            info.size = part.size
            archive.addfile(info, io.BytesIO(part.tobytes()))
    return raw.getvalue(), rows


# ---- processes: forked from a server that has imported torch and the scripts already, so each starts in no time


def fork_server():
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows; each process then imports all by itself
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "sklearn.datasets", "matplotlib.pyplot", "torch._dynamo"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))  # the server finds the scripts by it
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _enter(folder, env, function, args):
    """In the new process: go to its folder, send what it prints into files there, call the function."""
    os.chdir(folder)
    os.environ.update(env)
    for number, name in ((1, "stdout"), (2, "stderr")):
        fd = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
        os.close(fd)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    function(*args)


def run_script(name, argv, before=None):
    """`python script.py argv`, after before(module)."""
    module = importlib.import_module(name)
    if before is not None:
        before(module)
    module.launch(lambda: module.main([str(a) for a in argv]))


def run_file(path, argv):
    """`python path argv`: the file as __main__, its folder and no other of ours on the path, no script imported before."""
    path = Path(path)
    sys.path[:] = [str(path.parent), *(p for p in sys.path if p and not Path(p).resolve().is_relative_to(ROOT))]
    for name in [n for n in sys.modules if n.split(".")[0] in (*SCRIPTS, "kernels")]:
        del sys.modules[name]
    sys.argv = [str(path), *map(str, argv)]
    runpy.run_path(str(path), run_name="__main__")


PATIENCE = 900  # seconds that a process may take: many, since nothing is wrong with one that is slow on a crowded machine


class Child:
    """function(*args) in a process of its own, in the new folder `folder`."""

    def __init__(self, folder, function, *args, env=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True)
        self.process = fork_server().Process(target=_enter, args=(str(folder), env or {}, function, args), daemon=True)
        self.process.start()

    def wait_for(self, condition, patience=PATIENCE):
        """Wait until condition() is true or the process is over; then say which of the two (True: the condition)."""
        end = time.monotonic() + patience
        while not condition():
            if not self.process.is_alive():
                return bool(condition())
            if time.monotonic() > end:
                self.process.kill()
                raise TimeoutError(f"nothing after {patience} s; {self.stderr}")
            time.sleep(0.005)
        return True

    def send(self, number):
        os.kill(self.process.pid, number)

    def join(self, patience=PATIENCE):
        """The exit code; minus the number of the signal that ended the process, where one did."""
        self.process.join(patience)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"not over after {patience} s; {self.stderr}")
        return self.process.exitcode

    def kill(self):
        self.send(signal.SIGKILL)
        return self.join()

    @property
    def stdout(self):
        return (self.folder / "stdout.txt").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr.txt").read_text()


def start_ranks(folder, world, function, *args):
    """function(*args, rank) in each of `world` processes of one run, as torchrun starts them.

    They meet at a store of this process, as they do under torchrun. Its port is taken before they are told of it: a port
    that is free when it is looked for may be another's a moment later.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
           "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        child = Child(Path(folder) / f"rank{rank}", function, *args, rank, env=env | own)
        child.store = store  # which lives as long as a child is known
        children.append(child)
    return children
