"""What do the scripts do when something goes wrong? Disturbs tiny runs on digits, and prints what came of it as a table.

  python tools/chaos.py [--scripts vae gan ...] [--faults kill signal ...] [--rounds 3] [--seed 0]

Each fault is tried --rounds times on each script, at moments and places drawn from --seed. What must happen:

  kill      SIGKILL. --resume ends bit for bit as a run that nothing disturbed: checkpoint, metrics, samples
  signal    SIGINT, SIGTERM or SIGHUP. Exit code 128 + signal and one line that says so; then as after kill
  truncate  checkpoint.pt cut short. --resume refuses it in one line, with exit code 2, and leaves the file as it is
  flip      one bit of checkpoint.pt changed. The same; where the bit means nothing the run may end as an undisturbed one
  log       metrics.jsonl of a stopped run cut short, or a byte of it changed. --resume ends with the same checkpoint
  images    a folder of images of which a third are cut short. The run works and counts them
  disk      no file can grow to half a checkpoint's size. Exit code 1 and one line; an old checkpoint stays; then as after kill
  flags     each number of Config at each of EXTREMES, once. Exit code 2 and one line that names the flag, or a run

Nothing may print a traceback, nor last longer than PATIENCE. A case that is not as it must be is printed with its command, and
then the exit code is 1. Processes are forked from one that has imported PyTorch, so that each starts at once. For Linux.
"""

import argparse
import dataclasses
import importlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import tiny
from tiny import SCRIPTS, assert_same_state, flags, load_checkpoint, metrics

PATIENCE = 300  # seconds that one process may take
STEPS = 12
EXTREMES = ("-1", "0", "1e308", "nan", 2**31, 10**30, "word")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Wrong(Exception):
    """A case that is not as it must be."""


def program(name, argv, limit):
    """In a process of its own: the script. The file `begun` says that it hears signals; no file may grow beyond limit bytes."""
    module = importlib.import_module(name)
    main = module.main

    def begin(argv):
        Path("begun").touch()
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as it does on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        main(argv)
    module.main = begin
    tiny.run_script(name, argv)


class Bench:
    """A script, a folder for its runs, and a run of it that nothing disturbs."""

    def __init__(self, name, folder, rng):
        self.name = name
        self.folder = folder
        self.rng = rng
        self.straight = self.new()
        self.run(self.straight)  # the first is slow
        start = time.monotonic()
        self.expect(self.run(self.straight, "--overwrite"), 0)
        self.seconds = time.monotonic() - start  # of a whole run; moments are drawn from them

    def new(self):
        return Path(tempfile.mkdtemp(dir=self.folder)) / "run"

    def copy(self):
        out = self.new()
        shutil.copytree(self.straight, out)
        return out

    def start(self, out, *more, limit=None):
        argv = flags(self.name, out, "--steps", STEPS, "--eval-images", 20, *more)
        self.command = f"python {self.name}.py {' '.join(argv)}"
        return tiny.Child(Path(tempfile.mkdtemp(dir=self.folder)) / "process", program, self.name, argv, limit)

    def end(self, child):
        """Exit code and what stood on stderr."""
        try:
            code = child.join(PATIENCE)
        except TimeoutError as e:
            raise Wrong(f"{self.command}: {e}") from None
        if "Traceback" in child.stderr:
            raise Wrong(f"{self.command}: a traceback\n{child.stderr[-2000:]}")
        return code, child.stderr

    def run(self, out, *more, limit=None):
        return self.end(self.start(out, *more, limit=limit))

    def some_time(self, child):
        """Wait for a moment between the child's begin and a little after its end."""
        child.wait_for((child.folder / "begun").exists)
        child.process.join(self.rng.uniform(0, 1) * self.seconds)

    def expect(self, ended, code, words=""):
        """The exit code; where it is no success, one line of error with these words in it."""
        got, err = ended
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        if got != code or (code and (len(errors) != 1 or words not in errors[0])):
            raise Wrong(f"{self.command}: exit code {got}, not {code}, or not one error with {words!r}\n{err[-2000:]}")

    def resume(self, out, log=True):
        """Resume, and compare with the undisturbed run bit for bit."""
        self.expect(self.run(out, "--resume"), 0)
        try:
            assert_same_state(load_checkpoint(self.straight), load_checkpoint(out), ["overwrite"])
            assert not log or metrics(self.straight) == metrics(out), "other metrics"
            with np.load(self.straight / "samples.npz") as a, np.load(out / "samples.npz") as b:
                assert np.array_equal(a["images"], b["images"]), "other samples"
            assert not list(out.rglob("*.part")), "a part file is left"
        except AssertionError as e:
            raise Wrong(f"{out}: resumed, it differs from an undisturbed run: {e}") from e


# ---- the faults: each tries one thing, and says in a few words what came of it


def kill(bench):
    out = bench.new()
    child = bench.start(out)
    bench.some_time(child)
    child.process.kill()
    code, _ = bench.end(child)
    first = not (out / "checkpoint.pt").exists()
    bench.resume(out)
    return "was over before" if code == 0 else "killed before the first save, same end" if first else "killed, same end"


def stop(bench):
    number = bench.rng.choice(SIGNALS)
    out = bench.new()
    child = bench.start(out)
    bench.some_time(child)
    child.process.is_alive() and child.send(number)
    ended = bench.end(child)
    if ended[0]:
        bench.expect(ended, 128 + number, f"stopped by {number.name}")
    bench.resume(out)
    return "128 + signal, same end" if ended[0] else "was over before"


def damaged(bench, content):
    """--resume of a finished run whose checkpoint.pt has this content."""
    out = bench.copy()
    (out / "checkpoint.pt").write_bytes(content)
    ended = bench.run(out, "--resume")
    if ended[0] == 0:
        bench.resume(out)
        return "of no effect, same end"
    bench.expect(ended, 2, "is not a checkpoint to go on from")
    if (out / "checkpoint.pt").read_bytes() != content:
        raise Wrong(f"{bench.command}: wrote to the damaged checkpoint")
    return "refused"


def truncate(bench):
    content = (bench.straight / "checkpoint.pt").read_bytes()
    return damaged(bench, content[:bench.rng.randrange(len(content))])


def flip(bench):
    content = bytearray((bench.straight / "checkpoint.pt").read_bytes())
    content[bench.rng.randrange(len(content))] ^= 1 << bench.rng.randrange(8)
    return damaged(bench, content)


def log(bench):
    out = bench.new()
    bench.expect(bench.run(out, "--steps", STEPS // 2), 0)
    content = bytearray((out / "metrics.jsonl").read_bytes())
    place = bench.rng.randrange(len(content))
    cut = bench.rng.random() < 0.5
    content[place:None if cut else place + 1] = [] if cut else [bench.rng.randrange(256)]
    (out / "metrics.jsonl").write_bytes(content)
    bench.resume(out, log=False)
    return "same end"


def images(bench):
    folder = bench.new()
    folder.mkdir()
    for i in range(30):
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
    for i in range(0, 30, 3):
        content = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(content[:bench.rng.randrange(40)])  # within the header
    code, err = bench.run(bench.new(), "--dataset", folder)
    if code or "skipped 10 images that cannot be read" not in err:
        raise Wrong(f"{bench.command}: exit code {code}, or not 10 skipped\n{err[-2000:]}")
    return "skipped and counted"


def disk(bench):
    limit = bench.rng.randrange(1, (bench.straight / "checkpoint.pt").stat().st_size // 2)
    out = bench.new()
    bench.expect(bench.run(out, limit=limit), 1, str(out))
    bench.expect(bench.run(out, "--steps", STEPS // 2, "--resume"), 0)
    content = (out / "checkpoint.pt").read_bytes()
    bench.expect(bench.run(out, "--resume", limit=limit), 1, str(out))
    if (out / "checkpoint.pt").read_bytes() != content:
        raise Wrong(f"{bench.command}: the old checkpoint is gone")
    bench.resume(out)
    return "one line, same end"


def extremes(bench, field, value):
    flag = "--" + field.replace("_", "-")
    ended = bench.run(bench.new(), "--steps", 2, "--eval-images", 4, f"{flag}={value}")
    code = ended[0] if ended[0] in (0, 1) else 2  # 1: a loss that is not finite, or lack of memory
    bench.expect(ended, code, flag if code == 2 else "")
    return ("a run", "stopped in one line", "refused")[code]


def cases(fault, bench, rounds):
    """What is tried, a function without arguments for each case of a fault."""
    if fault != "flags":
        return [partial(FAULTS[fault], bench)] * rounds
    fields = dataclasses.fields(importlib.import_module(bench.name).Config)
    numbers = [f.name for f in fields if {f.type, *get_args(f.type)} & {int, float}]
    return [partial(extremes, bench, name, value) for name in numbers for value in EXTREMES]


FAULTS = dict(kill=kill, signal=stop, truncate=truncate, flip=flip, log=log, images=images, disk=disk, flags=extremes)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    wrong = []
    print("| script | fault | cases | what happened |\n|---|---|---|---|", flush=True)
    for name in args.scripts:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            bench = Bench(name, Path(folder), random.Random(f"{args.seed} {name}"))
            for fault in args.faults:
                found = Counter()
                for case in cases(fault, bench, args.rounds):
                    try:
                        found[case()] += 1
                    except Wrong as e:
                        found["WRONG"] += 1
                        wrong.append(str(e))
                what = ", ".join(f"{count} {words}" for words, count in sorted(found.items()))
                print(f"| {name}.py | {fault} | {found.total()} | {what} |", flush=True)
    print(*wrong, sep="\n\n", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
