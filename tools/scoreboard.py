"""All families on one footing: each row trains for the same time on this machine, one after another.

  python tools/scoreboard.py --minutes 10 --dataset mnist --seeds 3 --write
  python tools/scoreboard.py --minutes 10 --dataset mnist --models vae flow-affine
  python tools/scoreboard.py --models none --write                # the page of the rows that are there

A row is a script with flags (ROWS below). It is trained, evaluated, sampled, and measured; what was
found is kept in OUT/ROW.json, and a row that is there is not made again. A run that was killed is
begun anew, or with --resume continued from its checkpoint. Three kinds of rows share the time:
- most rows train for --minutes;
- a row that tunes another network trains that one for half of the time, and tunes in the other half;
- a row that only samples in another way takes the network of another row, and trains nothing.
Of each family one row is the best; --seeds counts its seeds, the other rows have seed 0.

Leave the machine alone meanwhile. On Linux each row notes the other processes that took more than
5 % of a core while it was made. A row names its processor and its versions of PyTorch and the code,
and is never made of two processors: a run that another one began is begun anew.

--write makes a page of all rows in OUT and of those that the page had before, which a file beside it
keeps. So a page may grow in several sittings. Beside it stand, for each data set and time, a picture
of samples and a plot of the distance against the time of sampling.
"""

import argparse
import base64
import contextlib
import importlib
import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from evaluate import evaluate, read_samples
from features import SHAPES

# flags: of the training; sampling: of the samples; of: the row whose network is sampled; tunes: whether the first half of
# the time trains a network with the default flags, which --init names; same: draws the images of the row `of` in another way
Row = namedtuple("Row", "name script says flags sampling of tunes same best", defaults=("", "", "", False, False, False))
ROWS = [
    Row("vae-gaussian", "vae", "weakness: a Gaussian prior"),
    Row("vae-flow", "vae", "remedy: a flow as the prior", "--prior flow", best=True),
    Row("vae-vamp", "vae", "remedy: the VampPrior", "--prior vamp --pseudo-inputs 64"),
    Row("vae-iaf", "vae", "remedy: a flow in the posterior", "--posterior iaf --flow-hidden 256"),
    Row("vae-chain", "vae", "remedy: a chain of two latents", "--levels 2"),
    Row("flow-affine", "flow", "weakness: affine couplings", "--arch glow --coupling affine"),
    Row("flow-spline", "flow", "remedy: couplings of splines", "--arch glow --coupling spline"),
    Row("flow-transformer", "flow", "remedy: an autoregressive flow of splines", best=True),
    Row("flow-variational", "flow", "the same with learned noise", "--dequantize variational"),
    Row("flow-jacobi", "flow", "remedy: the inverse by fixed-point iteration", sampling="--inverse jacobi",
        of="flow-transformer", same=True),
    Row("flow-learned", "flow", "remedy: a learned inverse", "--learn-inverse", tunes=True),
    Row("gan-minimax", "gan", "weakness: the first loss", "--loss minimax"),
    Row("gan-relativistic", "gan", "remedy: a relativistic loss with penalties", "--amp bf16", best=True),
    Row("autoregressive-naive", "autoregressive", "weakness: the network runs once for each pixel",
        sampling="--sampler naive", of="autoregressive-8bit", same=True),
    Row("autoregressive-jacobi", "autoregressive", "remedy: fixed-point sampling", sampling="--sampler jacobi",
        of="autoregressive-8bit", same=True),
    Row("autoregressive-8bit", "autoregressive", "remedy: caches and patches", "--output softmax --patch 2 --amp bf16",
        best=True),
    Row("autoregressive-1bit", "autoregressive", "the same for black and white pixels", "--output bernoulli"),
    Row("autoregressive-pixelcnn", "autoregressive", "the gated PixelCNN", "--output bernoulli --arch pixelcnn"),
    Row("autoregressive-made", "autoregressive", "MADE", "--output bernoulli --arch made"),
    Row("vqgan-plain", "vqgan", "weakness: no discriminator", "--stage1 STAGE1 --disc-weight 0 --perceptual-weight 0"),
    Row("vqgan-codes", "vqgan", "remedy: codes learned with a discriminator", "--stage1 STAGE1", best=True),
    Row("vqgan-unguided", "vqgan", "the same without guidance", sampling="--guidance 1", of="vqgan-codes"),
    Row("diffusion-ddpm", "diffusion", "weakness: the first sampler, 20 evaluations", sampling="--sampler ddpm",
        of="diffusion-chain"),
    Row("diffusion-chain", "diffusion", "remedy: a solver of second order, 20 evaluations", best=True),
    Row("diffusion-4", "diffusion", "the same with 4 evaluations", sampling="--nfe 4", of="diffusion-chain"),
    Row("diffusion-tuned", "diffusion", "remedy: consistency tuning, 2 evaluations", "--consistency", tunes=True),
]
STAGE1 = 120  # steps of vqgan.py's first stage for each minute
STRIP = 10  # samples of a row in the picture
POLL = 1.0  # seconds between two looks at a process
LIMIT = 0.05  # of a core: another process that takes more is named
FLOOR = "the distance of as many real test images"


class Problem(Exception):
    """What stops a row, in a line for the user."""


# ---- the machine


def processor():
    """The name of the processor, its cores and the instructions that PyTorch uses, as far as they are known."""
    info = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        info = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' * (cores > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def commit():
    """The commit of the code, with a + where files differ from it; "" outside a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        return head + "+" * bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ""


def processes(proc="/proc"):
    """Of each process its number and start -> its parent, name and seconds of processor time; {} where there is no /proc."""
    found = {}
    for path in Path(proc).glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is over
            before, after = path.read_text(errors="replace").rsplit(")", 1)
            number, name = before.split(" (", 1)
            fields = after.split()  # state, parent, ...: fields 3, 4, ... of proc(5)
            seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            found[int(number), fields[19]] = int(fields[1]), name, seconds
    return found


class Watch:
    """The processor time that processes other than this one and its children take from now on."""

    def __init__(self):
        self.start = time.monotonic()
        self.ours = {os.getpid()}
        self.last = {key: seconds for key, (_, _, seconds) in processes().items()}
        self.taken = Counter()  # by name

    def look(self):
        found = processes()
        parents = {number: parent for (number, _), (parent, _, _) in found.items()}
        before = 0
        while before < len(self.ours):  # children of children
            before = len(self.ours)
            self.ours |= {number for number, parent in parents.items() if parent in self.ours}
        for key, (_, name, seconds) in found.items():
            if key[0] not in self.ours:
                self.taken[name] += seconds - self.last.get(key, 0.0)  # a new one started after the last look
            self.last[key] = seconds

    def busy(self):
        """{name: share of a core} of those above LIMIT since the start."""
        self.look()
        elapsed = time.monotonic() - self.start
        return {name: round(seconds / elapsed, 3) for name, seconds in self.taken.most_common() if seconds > LIMIT * elapsed}


def peak_mb(process="self"):
    """The peak of the memory of a running process, given by its number, so far in MB; None where it is not known.

    It is not the ru_maxrss of getrusage: that begins at the memory of the program that started the process.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    return None


def run_command(command, log, watch):
    """Run a command of the project, its output into the file `log` -> its peak of memory in MB, None where it is not known."""
    with open(log, "w") as file:  # in a session of its own: Ctrl-C comes here alone
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    peak = None
    try:
        while process.poll() is None:
            peak = peak_mb(process.pid) or peak  # it never falls; a process that has just ended has none
            watch.look()
            time.sleep(POLL)
    finally:
        if process.poll() is None:  # this program was stopped: the script saves and ends
            process.terminate()
            process.wait()
    if process.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Problem(f"exit code {process.returncode}: {said[-1] if said else 'nothing said'} (all of it in {log})")
    return peak


def leave_at_sigterm():
    """SIGTERM ends this program as an exception does, so run_command ends the script that it runs."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def exit_code(work, argv, when_stopped):
    """work(argv) -> its exit code; 130 where Ctrl-C stopped it, 2 where it cannot go on, each with one line."""
    try:
        return work(argv)
    except KeyboardInterrupt:
        print(f"error: stopped; {when_stopped}", file=sys.stderr)
        return 130
    except (Problem, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is a Problem. The help begins with the docstring of the program."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise Problem(message)

    def check(self, args, **bounds):
        """bounds: the name of a number -> the least and the most that it may be; a least of None means above 0."""
        for name, (least, most) in bounds.items():
            value = getattr(args, name)
            large_enough = value > 0 if least is None else value >= least
            if not (large_enough and value <= most):
                wanted = f"from {'above 0' if least is None else least} to {most}"
                self.error(f"--{name.replace('_', '-')} {value}: must be {wanted}")


# ---- one row


def identity(row, args, seed):
    return f"{args.dataset}-{args.minutes:g}min-{row.name}-{seed}"


def command_of(row, args):
    """What a reader types for a row of seed 0."""
    start = f"python {row.script}.py --dataset {args.dataset}"
    if row.of:
        return f"{start} --mode sample {row.sampling}"
    flags = " ".join(flags_of(row, args.minutes))
    if row.tunes:
        half = f"{start} --minutes {args.minutes / 2:g}"
        return f"{half} --out runs/first && {half} {flags} --init runs/first --out runs/tuned"
    return f"{start} --minutes {args.minutes:g} {flags}".strip()


def flags_of(row, minutes):
    """The flags of a row's training. bf16 is for processors that multiply it: elsewhere it is slower than float32."""
    flags = row.flags.replace("STAGE1", str(max(1, round(STAGE1 * minutes))))
    if not (torch.cuda.is_available() or torch.cpu.get_capabilities().get("avx512_bf16")):
        flags = flags.replace("--amp bf16", "")
    return flags.split()


def train(row, folder, args, minutes, more, found, watch):
    """One training in a folder, continued where --resume says so and the same processor began it -> peak of memory."""
    begun = args.out / f"{folder.name}.begun.json"
    wanted = {"processor": found["processor"], "torch": found["torch"], "flags": more, "minutes": minutes}
    continues = args.resume and (folder / "checkpoint.pt").is_file() and read_json(begun) == wanted
    if continues and done(folder):
        return None
    if not continues:
        write_json(begun, wanted)
    command = [sys.executable, ROOT / f"{row.script}.py", "--dataset", args.dataset, "--data-dir", args.data_dir,
               "--minutes", minutes, "--seed", found["seed"], "--out", folder, *more]
    return run_command([*command, "--resume" if continues else "--overwrite"], args.out / f"{folder.name}.log", watch)


def sampling_seconds(row, folder, n):
    """The seconds that the script's generate takes for n samples, the median of three calls (one where it takes long)."""
    module = importlib.import_module(row.script)
    generate = module.generate
    taken = []

    def timed(*given):
        start = time.perf_counter()
        result = generate(*given)
        taken.append(time.perf_counter() - start)
        return result

    module.generate = timed
    try:
        while len(taken) < 3 and sum(taken) < 30:
            quiet = io.StringIO()
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                module.main(["--mode", "sample", "--out", str(folder), "--num-samples", str(n), *row.sampling.split()])
    except SystemExit as e:
        raise Problem(f"sampling: {quiet.getvalue().strip().splitlines()[-1:]}") from e
    finally:
        module.generate = generate
        while module.LOCKS:
            os.close(module.LOCKS.popitem()[1])
    return sorted(taken)[len(taken) // 2]


def likelihood(script, config, final):
    """Of a run's last line of the log: bits/dim of 8-bit images or nats of binarised ones, and what kind of figure it is."""
    if script == "vae":
        k = config["iw_samples"]
        kind = f"at most, k = {k}"
        if config["likelihood"] == "bernoulli":
            return {"nats": final[f"test_neg_iw_{k}"], "kind": kind}
        return {"bpd": final["test_bpd"], "kind": kind}
    if script == "autoregressive":
        if config["output"] == "bernoulli":
            return {"nats": final["test_nats"], "kind": "exact"}
        return {"bpd": final["test_bpd"], "kind": "exact"}
    if script == "flow":
        return {"bpd": final["test_bpd"], "kind": "at most"}
    if script == "diffusion":
        return {"bpd": final["test_bpd"], "kind": "at most, given the label" if config["labels"] else "at most"}
    if script == "vqgan":
        return {"bits_per_code": final["test_bits_per_code"], "kind": "of the codes"}
    return {}


def trained_figures(row, folder):
    """Steps, seconds, parameters and likelihood of the run in a folder."""
    config = read_json(folder / "config.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line.get("final")][-1]
    networks = [part for part in importlib.import_module(row.script).load(folder) if isinstance(part, torch.nn.Module)]
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    found = {"steps": final["step"], "seconds": final["seconds"], "parameters": parameters}
    return found | likelihood(row.script, config, final)


def strip_of(images):
    """The first samples in one row, on white: a PNG as text, which a result in JSON can hold."""
    x = images[:STRIP]
    strip = np.concatenate([np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255) for image in x], 1)
    file = io.BytesIO()
    Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def make(row, args, seed):
    """Train, sample and measure a row; what was found is written to its file."""
    name = identity(row, args, seed)
    found = {"row": row.name, "dataset": args.dataset, "minutes": args.minutes, "seed": seed, "n": args.num_samples,
             "command": command_of(row, args), "processor": processor(), "torch": torch.__version__, "commit": commit()}
    watch = Watch()
    folder = args.out / name
    if row.of:
        base = identity(next(r for r in ROWS if r.name == row.of), args, seed)
        folder = args.out / base
        kept = read_json(args.out / f"{base}.json")
        if not kept:
            raise Problem(f"the row {row.of}, whose network it takes, is not there")
        if not (folder / "checkpoint.pt").is_file():
            raise Problem(f"{folder} with the network of {row.of} is gone; remove {args.out / base}.json to train it again")
        if (kept["processor"], kept["torch"]) != (found["processor"], found["torch"]):
            other = f"{kept['processor']}, PyTorch {kept['torch']}"
            raise Problem(f"the network of {row.of} was trained on another machine: {other}")
        samples = args.out / f"{base}.npz"
        if not row.same:
            command = [sys.executable, ROOT / f"{row.script}.py", "--mode", "sample", "--out", folder]
            command += ["--num-samples", args.num_samples, *row.sampling.split()]
            found["peak_mb"] = run_command(command, args.out / f"{name}.log", watch)
            samples = folder / "sampled" / "samples.npz"
        figures = ("steps", "seconds", "parameters", "bpd", "nats", "bits_per_code", "kind")
        found |= {key: kept[key] for key in figures if key in kept}
    else:
        peaks = []
        minutes = args.minutes
        flags = [*flags_of(row, minutes), "--num-samples", str(args.num_samples)]
        if row.tunes:
            minutes /= 2
            first = args.out / f"{name}-first"
            peaks.append(train(row, first, args, minutes, [], found, watch))
            flags += ["--init", str(first)]
        peaks.append(train(row, folder, args, minutes, flags, found, watch))
        found["peak_mb"] = max((peak for peak in peaks if peak), default=None)
        samples = folder / "samples.npz"
        found |= trained_figures(row, folder)
    images, labels = read_samples(samples)
    quality = evaluate(images, args.dataset, args.data_dir, labels)
    names = ("density", "coverage", "precision", "recall", "kernel_distance", "class_kl", "label_accuracy")
    found |= {key: quality[key] for key in names} | {"distance": quality["frechet_at_floor_n"]}
    found |= {"floor": quality["floor"]["frechet"], "floor_n": quality["floor"]["n"]}
    if not row.of:
        np.savez_compressed(args.out / f"{name}.npz", images=images, **({} if labels is None else {"labels": labels}))
    sampling_seconds(row, folder, 1)  # the first call is slower
    found["seconds_1"] = sampling_seconds(row, folder, 1)
    found["seconds_64"] = sampling_seconds(row, folder, 64)
    found["strip"] = strip_of(images)
    found["busy"] = watch.busy()
    write_json(args.out / f"{name}.json", found)
    return found


def done(folder):
    """Whether the run in a folder has written its last line and its samples."""
    log = folder / "metrics.jsonl"
    return (folder / "samples.npz").is_file() and '"final": true' in log.read_text()


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def write_json(path, value):
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


# ---- the page


Group = namedtuple("Group", "row rows")  # the results of one row, by seed


def groups_of(results):
    """The results of one table in the order of ROWS, together where row and command are the same."""
    found = {}
    order = [row.name for row in ROWS]
    for r in sorted(results, key=lambda r: (order.index(r["row"]), r["seed"])):
        found.setdefault((r["row"], r["command"]), []).append(r)
    return [Group(next(row for row in ROWS if row.name == key[0]), rows) for key, rows in found.items()]


def listed(rows, key, form):
    """The figures of all seeds, as text."""
    values = [r.get(key) for r in rows]
    return ", ".join("" if v is None else form.format(v) for v in values) if any(v is not None for v in values) else ""


def likelihood_text(rows):
    forms = {"bpd": ("{:.3f}", "bits/dim"), "nats": ("{:.2f}", "nats"), "bits_per_code": ("{:.3f}", "bits a code")}
    for key, (form, unit) in forms.items():
        if key in rows[0]:
            text = f"{listed(rows, key, form)} {unit}, {rows[0]['kind']}"
            if key == "nats" and rows[0]["dataset"] in SHAPES:
                pixels = np.prod(SHAPES[rows[0]["dataset"]])
                text += f" ({rows[0]['nats'] / pixels / np.log(2):.3f} bits/dim of 1 bit)"
            return text
    return "none"


def table(groups):
    heads = ("row", "what it shows", "command", "likelihood", "distance", "floor", "density", "coverage", "s, 64 samples",
             "s, one", "steps", "parameters", "MB")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for g in groups:
        rows = g.rows
        name = f"**{g.row.name}**" if g.row.best else g.row.name
        cells = [name, g.row.says, f"`{rows[0]['command']}`", likelihood_text(rows), listed(rows, "distance", "{:.3f}"),
                 listed(rows[:1], "floor", "{:.3f}"), listed(rows, "density", "{:.2f}"), listed(rows, "coverage", "{:.2f}"),
                 listed(rows, "seconds_64", "{:.3g}"), listed(rows, "seconds_1", "{:.3g}"), listed(rows, "steps", "{:,}"),
                 listed(rows[:1], "parameters", "{:,}"), listed(rows, "peak_mb", "{:.0f}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_samples(groups, path):
    """A row of samples for each row of the table."""
    from matplotlib.figure import Figure

    figure = Figure((8, 0.62 * len(groups) + 0.2))
    axes = np.atleast_1d(figure.subplots(len(groups), 1, squeeze=False)[:, 0])
    for axis, g in zip(axes, groups, strict=True):
        r = g.rows[0]
        strip = Image.open(io.BytesIO(base64.b64decode(r["strip"])))
        axis.imshow(np.asarray(strip), cmap="gray", vmin=0, vmax=255)
        axis.set_title(g.row.name, x=-0.02, y=0.35, ha="right", fontsize=9)
        axis.axis("off")
    figure.subplots_adjust(left=0.3, right=0.99, top=0.99, bottom=0.01, hspace=0.05)
    figure.savefig(path, dpi=100)


def place_label(axis, text, point, taken):
    """Write beside a point, as near as no box of `taken` is covered, with a line to it -> the box of the text, in pixels."""
    from matplotlib.text import Text

    for up in (0, 11, -11, 22, -22, 33, -33, 44, -44, 55, -55, 66, -66):  # points of 1/72 inch
        for right in (8, -8):
            side = "left" if right > 0 else "right"
            line = {"arrowstyle": "-", "linewidth": 0.4} if up else None
            label = axis.annotate(text, point, (right, up), textcoords="offset points", fontsize=7, ha=side, va="center",
                                  arrowprops=line)
            label.get_window_extent()  # this puts the text in its place
            box = Text.get_window_extent(label).padded(2)  # without the line
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1 and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                return box
            label.remove()
    axis.add_artist(label)  # no place is free
    return box


def draw_plot(groups, path):
    """The distance against the seconds for 64 samples, the mean of seeds; the likelihood is the colour and stands beside it."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    figure = Figure((9, 6), layout="tight")
    axis = figure.add_subplot(xlabel="seconds for 64 samples", ylabel="distance of the samples", xscale="log", yscale="log")
    x = [np.mean([r["seconds_64"] for r in g.rows]) for g in groups]
    y = [max(np.mean([r["distance"] for r in g.rows]), 1e-4) for g in groups]
    bits = np.array([np.mean([r.get("bpd", np.nan) for r in g.rows]) for g in groups])
    known = np.isfinite(bits)
    axis.scatter(np.array(x)[~known], np.array(y)[~known], 60, "white", edgecolors="black", label="no bits/dim of 8-bit images")
    if known.any():
        dots = axis.scatter(np.array(x)[known], np.array(y)[known], 60, bits[known], cmap="viridis_r", edgecolors="black")
        figure.colorbar(dots, label="bits/dim")
    axis.axhline(groups[0].rows[0]["floor"], color="grey", linestyle="--", label=FLOOR)
    legend = axis.legend(fontsize=8)
    axis.margins(0.2, 0.12)
    figure.draw_without_rendering()  # from here on the place of everything is known
    figure.set_layout_engine("none")
    points = axis.transData.transform(np.column_stack([x, y]))
    taken = [legend.get_window_extent(), *(Bbox.from_extents(*(point - 8), *(point + 8)) for point in points)]
    for g, a, b in zip(groups, x, y, strict=True):
        r = g.rows[0]
        nats = f", {np.mean([s['nats'] for s in g.rows]):.1f} nats" if "nats" in r else ""
        bpd = f", {np.mean([s['bpd'] for s in g.rows]):.2f} bits/dim" if "bpd" in r else ""
        taken.append(place_label(axis, g.row.name + nats + bpd, (a, b), taken))
    figure.savefig(path, dpi=100)


INTRO = """# Scoreboard

`tools/scoreboard.py` makes this page. Every row of a table is trained for the same time on the same processor,
one after another. Tables of different processors do not compare: the faster one makes more steps.

- **Likelihood.** bits/dim is the mean negative log-likelihood of a test image, in bits for each pixel and colour. nats are
  of a whole image whose pixels were made black or white. Less is better, and the two do not compare. "At most" marks a bound.
- **Distance** is the Fréchet distance between the features of samples and of training images
  ([more](results.md#how-to-read-the-tables)). Less is better. **Floor** is the distance of as many real test images.
- **Density** says how near the samples are to the data, **coverage** how much of the data they reach.
- **Seconds** are those of drawing 64 samples and of one: the median of three calls, without the start of the program.
- **MB** is the peak of memory of the whole command: training, evaluation and sampling.
- A row with `--mode sample` draws from the network of another row. A row with two commands trains a network for half of the
  time, and tunes it in the other half.
- Several figures in one cell are of seeds 0, 1, 2 in this order. The best row of each family is in bold.
- Other pages say "Zen 3" for the family 25, model 1 of AMD's processors, and "Zen 5" for the family 26.
"""


def section(results, page):
    """The part of the page about one data set, time and processor, with its two pictures."""
    groups = groups_of(results)
    first = results[0]
    machine = f"{first['processor']}, PyTorch {first['torch']}"
    key = "-".join(re.findall(r"[a-z0-9]+", f"{first['dataset']}-{first['minutes']:g}min {machine}".lower()))
    samples = page.with_name(f"{page.stem}-{key}-samples.png")
    plot = page.with_name(f"{page.stem}-{key}.png")
    draw_samples(groups, samples)
    draw_plot(groups, plot)
    ns = sorted({r["n"] for r in results})
    commits = ", ".join(sorted({r["commit"] for r in results if r["commit"]})) or "unknown"
    command = f"python tools/scoreboard.py --dataset {first['dataset']} --minutes {first['minutes']:g}"
    lines = [f"## {first['dataset']}, {first['minutes']:g} minutes, {machine}", "", f"    {command}", "",
             f"Figures of {' or '.join(f'{n:,}' for n in ns)} samples. Code: {commits}.", "", table(groups), ""]
    for r in sorted(results, key=lambda r: (r["row"], r["seed"])):
        if r["busy"]:
            others = ", ".join(f"{name} {share:.0%}" for name, share in r["busy"].items())
            lines.append(f"- Not alone: {r['row']}, seed {r['seed']}: other processes took, of a core, {others}.")
    lines += ["", f"![a row of samples for each row of the table]({samples.name})", "",
              "*A row of samples for each row of the table.*", "",
              f"![distance against seconds for 64 samples]({plot.name})", "",
              "*Quality against sampling time. Left is faster, down is better. The colour is the likelihood.*", ""]
    return "\n".join(lines)


def write_page(out, page):
    """The page of all rows in a folder and of those that the page has already; Problem where there are none.

    The file beside the page, of the same name with .json, keeps the rows, so that they may be made in several sittings.
    """
    names = {row.name for row in ROWS}
    kept = page.with_suffix(".json")
    found = [*(read_json(kept) or []), *(read_json(path) for path in sorted(out.glob("*.json")))]
    results = {}
    for r in found:
        if isinstance(r, dict) and r.get("row") in names:
            results[r["dataset"], r["minutes"], r["row"], r["seed"], r["processor"], r["torch"]] = r  # a later one counts
    results = list(results.values())
    if not results:
        raise Problem(f"{out}: holds no finished row")
    tables = {}
    for r in sorted(results, key=lambda r: (r["dataset"] != "mnist", r["dataset"], r["minutes"], r["processor"], r["torch"])):
        tables.setdefault((r["dataset"], r["minutes"], r["processor"], r["torch"]), []).append(r)
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [section(rows, page) for rows in tables.values()]
    page.write_text("\n".join([INTRO, *parts]), encoding="utf-8")
    write_json(kept, results)
    print(f"{page}: {len(results)} rows")


# ---- the command line


def chosen(models, seeds):
    """The rows that --models names, with those that they take a network from, and the seeds of each."""
    scripts = {row.script for row in ROWS}
    wanted = set()
    for word in models:
        names = {row.name for row in ROWS if word == "all" or word in (row.script, row.name) or word == "best" and row.best}
        if not names and word != "none":
            raise Problem(f"--models {word}: one of all, best, none, {', '.join(sorted(scripts))}, "
                          f"{', '.join(row.name for row in ROWS)}")
        wanted |= names
    wanted |= {row.of for row in ROWS if row.name in wanted and row.of}
    rows = sorted((row for row in ROWS if row.name in wanted), key=lambda row: bool(row.of))  # those that train come first
    return [(row, seed) for row in rows for seed in range(seeds if row.best else 1)]


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["all"], metavar="NAME",
                        help="rows, scripts, all, best or none [all]")
    parser.add_argument("--dataset", default="mnist", choices=list(SHAPES), help="[mnist]")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each row (> 0 to 100000) [10]")
    parser.add_argument("--seeds", type=int, default=1, help="of the best row of each family (1 to 100) [1]")
    parser.add_argument("--num-samples", type=int, default=10_000, help="for the distance (10 to 1000000) [10000]")
    parser.add_argument("--data-dir", default="data", help="folder where data sets are looked for [data]")
    parser.add_argument("--out", type=Path, default=Path("runs/scoreboard"), help="folder of rows and runs [runs/scoreboard]")
    parser.add_argument("--resume", action="store_true", help="continue the run that was killed from its checkpoint")
    parser.add_argument("--write", nargs="?", type=Path, const=ROOT / "docs" / "scoreboard.md", metavar="PAGE.md",
                        help="write the page [docs/scoreboard.md]")
    args = parser.parse_args(argv)
    parser.check(args, minutes=(None, 100_000), seeds=(1, 100), num_samples=(10, 1_000_000))
    return args, chosen(args.models, args.seeds)


def summary(found):
    text = f"distance {found['distance']:.4g} (floor {found['floor']:.4g}), {likelihood_text([found])}, {found['steps']} steps"
    if found["busy"]:
        others = ", ".join(f"{name} {share:.0%}" for name, share in found["busy"].items())
        text += f"\n  warning: not alone: other processes took, of a core, {others}"
    return text


def work(argv):
    """Make the rows and the page -> the exit code: 1 where a row could not be made."""
    code = 0
    args, rows = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if rows and not Path("/proc/stat").exists():
        print("note: there is no /proc here, so other busy processes are not seen", file=sys.stderr)
    for row, seed in rows:
        name = identity(row, args, seed)
        kept = read_json(args.out / f"{name}.json")
        if kept and (kept["command"], kept["n"]) == (command_of(row, args), args.num_samples):
            print(f"{name}: there already, {kept['processor']}")
            continue
        print(f"{name}: {command_of(row, args)}", flush=True)
        try:
            print(f"  {summary(make(row, args, seed))}", flush=True)
        except (Problem, ValueError) as error:
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
            code = 1
    if args.write:
        write_page(args.out, args.write)
    return code


def main(argv=None):
    """The command line; returns the exit code."""
    return exit_code(work, argv, "--resume goes on")


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
