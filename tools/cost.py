"""How the cost of our scripts grows: seconds and memory of a step and of a sample against side, batch and depth.

  python tools/cost.py --write                              # about ten minutes of two cores
  python tools/cost.py --models vae flow

Images are random, of one channel and 8 bits, as a FILE.npz. Each figure comes from a process of its own: the script's own
training loop runs for some steps, or its own sampling for 1 and 16 images. A time is a median, after a first step or call
that does not count. Memory is the peak above what the process holds after it has trained, or sampled, a tiny network.
A patch has the same size at every side (CASES below), since the default would change with the side.

An exponent k says that the cost grows like size^k. It is the slope of a line through all points, log against log. The
slope between the last two points stands beside it: where small sizes cost little but a constant, it is the truer one. Less
than 5 MB are no point.

What was measured is kept in OUT/cost.json, and not measured again on the same processor. --write puts the tables into
docs/peers.md, between the marks that stand there.
"""

import contextlib
import gc
import importlib
import io
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from peers import machines, parser_of, put
from scoreboard import Problem, Watch, commit, exit_code, leave_at_sigterm, peak_mb, processor, read_json, write_json

# flags: the same at every side; depth: the flag that says how deep the network is, and its values
Case = namedtuple("Case", "name script flags depth values")
CASES = [
    Case("vae", "vae", "--patch 4", "--blocks", (1, 2, 4)),
    Case("flow", "flow", "--patch 4", "--blocks", (1, 2, 4)),
    Case("gan", "gan", "--patch 2", "--blocks", (1, 2, 4)),
    Case("autoregressive", "autoregressive", "--patch 4", "--blocks", (2, 4, 8)),
    Case("vqgan, stage 1", "vqgan", "--downsample 4 --disc-start 0", "--blocks", (1, 2, 4)),
    Case("vqgan, stage 2", "vqgan", "--downsample 4", "--prior-blocks", (2, 4, 8)),
    Case("diffusion", "diffusion", "--patch 2", "--blocks", (1, 2, 4)),
]
SIDES = (8, 16, 28, 56)  # pixels
BATCHES = (8, 16, 32, 64)  # images a step
SIDE = 28  # where another size grows
BATCH = 16
DRAWN = (1, 16)  # images of a call of sampling
STEPS = 20  # that are timed, at most
FEWEST = 3
SMALL = 5.0  # MB, of which no exponent is taken
Size = namedtuple("Size", "side batch depth")  # depth: None is the script's default


# ---- in a process of its own


class Enough(Exception):
    """Raised to leave the training."""


def forget_peak():
    """From now on the peak is that of what follows, where the system can forget the one before (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def write_images(path, side, n):
    """n random images to train on and 16 to test on, with labels of ten classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 10
    parts = {"images": rng.integers(0, 256, (n, side, side), dtype=np.uint8), "labels": labels,
             "test_images": rng.integers(0, 256, (16, side, side), dtype=np.uint8), "test_labels": np.arange(16) % 10}
    np.savez(path, **parts)


@contextlib.contextmanager
def quiet():
    """What is printed within goes into the StringIO that this gives."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def caught(module, argv, leave):
    """Run the script until leave, which takes the place of Run.steps, has had enough."""
    kept = module.Run.steps, module.Run.save
    module.Run.steps = leave
    module.Run.save = lambda run, parts: None
    try:
        with quiet() as said, contextlib.suppress(Enough):
            module.main(list(map(str, argv)))
    except SystemExit as stopped:
        raise Problem(said.getvalue().strip().splitlines()[-1].removeprefix("error: ")) from stopped
    finally:
        module.Run.steps, module.Run.save = kept
        while module.LOCKS:
            os.close(module.LOCKS.popitem()[1])


def step_seconds(module, argv, budget, second_stage=False):
    """The median of the seconds of a step, of as many as fit into the budget."""
    real = module.Run.steps
    times = []

    def steps(run, parts, preview, until=math.inf):
        if second_stage and until < math.inf:  # the first stage is left out
            run.step = until
            run.over = False
            return
        for step in real(run, parts, preview, until):
            times.append(time.perf_counter())
            spent = times[-1] - times[0]
            if len(times) > 1 + STEPS or len(times) > 1 + FEWEST and spent > budget:
                raise Enough
            yield step

    caught(module, argv, steps)
    return statistics.median(np.diff(times[1:] if len(times) > 2 else times))


def networks_of(module, argv):
    """The parts of a run, untrained, and the run itself."""
    found = []

    def steps(run, parts, preview, until=math.inf):
        found.extend([parts, run])
        raise Enough
        yield

    caught(module, argv, steps)
    return found


def sample_seconds(module, argv, n, budget):
    """The median of the seconds that the script's generate takes for n images, of three calls where they fit."""
    parts, run = networks_of(module, argv)
    cfg = run.cfg
    networks = [parts[name] for name in ("ema_model", "ema_generator", "ema_prior") if name in parts]
    drawn = run.labels(n) if module.__name__ == "gan" else n
    times = []
    with quiet():
        while not times or len(times) < 4 and sum(times) < budget:
            begin = time.perf_counter()
            module.generate(*networks, drawn, cfg, run)
            times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def measure(case, size, what, budget):
    """In this process: what is "step" or a number of images -> seconds, and MB above those with a tiny network."""
    module = importlib.import_module(case.script)
    stage2 = case.name.endswith("stage 2")
    seconds = 0.0
    before = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for small in (True, False):  # a tiny network first: what is loaded once is no part of the cost
            now = Size(8, 2, None) if small else size
            data = Path(folder, f"{now.side}-{small}.npz")
            write_images(data, now.side, now.batch)
            argv = [*case.flags.split(), "--dataset", data, "--batch-size", now.batch, "--save-every", 10**6, "--steps", 10**6,
                    "--device", "cpu", "--out", Path(folder, f"run-{small}"), "--overwrite"]
            argv += ["--stage1", 10**5] if case.script == "vqgan" else []
            argv += [case.depth, now.depth] if now.depth else []
            limit = 0 if small else budget
            forget_peak()
            before = peak_mb()
            if what == "step":
                seconds = step_seconds(module, argv, limit, stage2)
            else:
                seconds = sample_seconds(module, argv, 1 if small else what, limit)
    return {"seconds": seconds, "mb": None if before is None else max(0.0, peak_mb() - before)}


# ---- all of them


def plan(cases):
    """Every measurement once: (case, size, what)."""
    found = []
    for case in cases:
        sizes = [Size(side, BATCH, None) for side in SIDES] + [Size(SIDE, BATCH, depth) for depth in case.values]
        found += [(case, size, what) for size in sizes for what in ("step", *DRAWN)
                  if what == "step" or case.name != "vqgan, stage 1"]
        found += [(case, Size(SIDE, batch, None), "step") for batch in BATCHES if batch != BATCH]
    return found


def key_of(case, size, what):
    """The name of a measurement in the file."""
    depth = f" {case.depth} {size.depth}" if size.depth else ""
    return f"{case.name}: {size.side} x {size.side}, batch {size.batch}{depth}, {what}"


def in_process(case, size, what, budget):
    """measure() in a new process."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:  # a server that has imported PyTorch: its processes start in no time
        context.set_forkserver_preload(["cost", "torch._dynamo", *{case.script for case in CASES}])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(measure, case, size, what, budget).result()


def exponent(sizes, costs, least=0.0):
    """The slope of log cost against log size through all points above least, and between the last two of them; else nan."""
    points = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost is not None and cost > least]
    if len(points) < 2:
        return math.nan, math.nan
    x, y = np.log(points).T
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


# ---- the page


def number(value):
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def rows_of(case, found, sizes, of_size, samples):
    """Rows of a table: what is measured, its figures at all sizes, the two exponents. Rows that lack a figure are left out."""
    whats = [("step", "seconds", "a step, ms"), ("step", "mb", "a step, MB")]
    if samples and case.name != "vqgan, stage 1":
        whats += [(n, "seconds", f"{n} image{'s' * (n > 1)}, ms") for n in DRAWN]
        whats.append((DRAWN[-1], "mb", f"{DRAWN[-1]} images, MB"))
    for what, unit, says in whats:
        entries = [found.get(key_of(case, of_size(size), what)) for size in sizes]
        if all(entries):
            costs = [entry[unit] for entry in entries]
            shown = [number(cost * 1000 if unit == "seconds" else cost) for cost in costs]
            slopes = exponent(sizes, costs, SMALL if unit == "mb" else 0.0)
            slopes = ["" if math.isnan(slope) else f"{round(slope, 1) + 0.0:.1f}" for slope in slopes]  # no -0.0
            yield [case.name, says, *shown, *slopes]


def table(heads, rows):
    lines = [f"| {' | '.join(map(str, heads))} |", "|" + "---|" * len(heads)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def tables(kept):
    """The page's part: three tables of everything that is kept, and where it was measured."""
    found = kept.get("found", {})
    if not found:
        return "No row yet."
    ends = ["exponent", "of the last two"]
    by_side = [row for case in CASES for row in rows_of(case, found, SIDES, lambda s: Size(s, BATCH, None), True)]
    by_batch = [row for case in CASES for row in rows_of(case, found, BATCHES, lambda b: Size(SIDE, b, None), False)]
    by_depth = [[row[0], f"`{case.depth}` {', '.join(map(str, case.values))}", *row[1:]] for case in CASES
                for row in rows_of(case, found, case.values, lambda d: Size(SIDE, BATCH, d), True)]
    depths = ["small", "middle", "large"]
    _, said = machines([kept])
    flags = "; ".join(f"{case.name} `{case.flags}`" for case in CASES)
    parts = [f"**Image side** (batch {BATCH}).", table(["script", "what", *map(str, SIDES), *ends], by_side),
             f"**Batch** (images of {SIDE} x {SIDE}).", table(["script", "what", *map(str, BATCHES), *ends], by_batch),
             f"**Depth** (images of {SIDE} x {SIDE}, batch {BATCH}).",
             table(["script", "depth", "what", *depths, *ends], by_depth),
             f"Flags at every size: {flags}. Code: {kept['commit'] or 'unknown'}.\n{said}"]
    if kept["busy"]:
        parts.append("Not alone: " + ", ".join(f"{name} {share:.0%} of a core" for name, share in kept["busy"].items()) + ".")
    return "\n\n".join(parts)


# ---- the command line


def parse(argv):
    parser = parser_of(__doc__, list(dict.fromkeys(case.script for case in CASES)))
    parser.add_argument("--seconds", type=float, default=1.0, help="for the steps or calls of a figure (> 0 to 1000) [1]")
    args = parser.parse_args(argv)
    parser.check(args, seconds=(None, 1000))
    return args, [case for case in CASES if {"all", case.script} & set(args.models)]


def work(argv):
    """Measure what is not there yet, and write the page -> the exit code: 1 where something could not be measured."""
    code = 0
    args, cases = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cost.json"
    here = {"processor": processor(), "torch": torch.__version__}
    kept = read_json(path) or {}
    if cases and any(kept.get(name) != value for name, value in here.items()):
        kept = here | {"commit": commit(), "busy": {}, "found": {}}
    for case, size, what in plan(cases):
        key = key_of(case, size, what)
        if key in kept["found"]:
            continue
        watch = Watch()
        try:
            kept["found"][key] = in_process(case, size, what, args.seconds)
        except Exception as error:  # whatever a script raises: the others go on
            print(f"error: {key}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            code = 1
            continue
        for name, share in watch.busy().items():
            kept["busy"][name] = max(share, kept["busy"].get(name, 0))
        write_json(path, kept)
        entry = kept["found"][key]
        memory = "" if entry["mb"] is None else f", {entry['mb']:.0f} MB"
        print(f"{key}: {1000 * entry['seconds']:.3g} ms{memory}", flush=True)
    if args.write:
        put(args.write, "cost", tables(kept))
    return code


def main(argv=None):
    """The command line; returns the exit code."""
    return exit_code(work, argv, "the same command goes on")


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
