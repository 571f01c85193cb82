"""Our scripts beside other libraries, in the same sitting: the same time, and the time of a step of the same network.

  python tools/peers.py --minutes 2 --dataset mnist --write
  python tools/peers.py --minutes 2 --models vae flow
  python tools/peers.py --equal-network --pairs 3 --write
  python tools/peers.py --models none                       # makes the environment, and nothing else

The peers (PEERS below) come from PyPI in fixed versions, into an environment of their own that sees the packages of this
one. For each family the peer trains for --minutes by the clock, then our script does. Both are sampled, and measured by
tools/evaluate.py. What was found is kept in OUT, and a row that is there is not made again.

--equal-network times a step of two networks that are as equal as the flags of both allow. Whole programs run in turn, ours,
the peer, ours, the peer. Each program runs with few steps and with many, and the difference is that of the steps alone:
the start, the evaluation and the samples cancel.

Leave the machine alone meanwhile. On Linux each row notes the other processes that took more than 5 % of a core.
--write puts the tables of the rows in OUT into docs/peers.md, between the marks that stand there.
"""

import json
import site
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from evaluate import evaluate, read_samples
from scoreboard import (
    STAGE1,
    Parser,
    Problem,
    Watch,
    commit,
    exit_code,
    leave_at_sigterm,
    likelihood_text,
    processor,
    read_json,
    run_command,
    trained_figures,
    write_json,
)

from diffusion import load_data

# What a family's peer is. program: its file in tools/; flags: of the peer; ours: of our script; says: its settings
Peer = namedtuple("Peer", "family program package says ours flags", defaults=("", ""))
PEERS = [
    Peer("vae", "peer_vae.py", "pythae", "its default networks, one layer of 512 units; latent of 16; Adam 1e-4, batch 64",
         ours="--likelihood bernoulli"),
    Peer("flow", "peer_flow.py", "normflows", "its Glow, 3 scales of 8 steps, 64 channels; Adamax 1e-3, batch 64; "
         "images padded to 32 x 32, whose bits are counted", ours="--no-labels"),
    Peer("gan", "peer_gan.py", "torchgan", "its DCGAN; Adam 2e-4, batch 64; images padded to 32 x 32", ours="--no-labels"),
    Peer("autoregressive", "peer_autoregressive.py", "x-transformers", "a token for each pixel, width 128, 4 layers, 4 heads; "
         "Adam 1e-4, batch 4", ours="--output bernoulli --no-labels"),
    Peer("vqgan", "peer_quantizer.py", "vector-quantize-pytorch", "its VectorQuantize with its defaults, the rest is vqgan.py",
         ours="--stage1 STAGE1 --no-labels", flags="--stage1 STAGE1 --no-labels"),
    Peer("diffusion", "peer_diffusion.py", "denoising-diffusion-pytorch", "its Unet, width 32, 3 levels; its Trainer's "
         "settings with batch 64; DDIM with 20 evaluations", ours="--no-labels"),
]
# Without what they depend on: of that, only the second list is imported. torch and numpy are those of this environment.
PINNED = ["denoising-diffusion-pytorch==2.3.4", "normflows==1.7.3", "pythae==0.1.2", "torchgan==0.1.0",
          "vector-quantize-pytorch==1.32.0", "x-transformers==2.31.10"]
BESIDE = ["einops==0.8.2", "einx==0.4.3", "ema-pytorch==0.8.3", "frozendict==2.5.1", "loguru==0.7.3",
          "pydantic==2.13.4", "torch-einops-utils==0.2.0"]

# Two programs with networks as equal as their flags allow. steps: few and many
Equal = namedtuple("Equal", "name ours peer batch steps says")
EQUAL = [
    Equal("diffusion", "diffusion.py --no-labels --optimizer adam --blocks 2", "peer_diffusion.py --patch 2 --mults 1 2", 32,
          (10, 130),
          "U-Nets over patches of 2 x 2 pixels, two levels of 32 and 64 channels, two residual blocks a level"),
    Equal("flow", "flow.py --no-labels --arch glow --coupling affine --image-size 32 --scales 3", "peer_flow.py", 64, (10, 110),
          "Glow with three scales of eight affine couplings, 64 channels, images of 32 x 32"),
    Equal("autoregressive", "autoregressive.py --no-labels --optimizer adam --output bernoulli --patch 1",
          "peer_autoregressive.py --head-dim 32", 4, (5, 25),
          "transformers over 784 pixels, width 128, 4 layers, 4 heads of 32, fused attention"),
    Equal("autoregressive, default attention", "autoregressive.py --no-labels --optimizer adam --output bernoulli --patch 1",
          "peer_autoregressive.py --head-dim 32 --no-flash", 4, (5, 25), "the same with the peer's default attention"),
    Equal("vqgan", "vqgan.py --no-labels --stage1 100000 --disc-weight 0",
          "peer_quantizer.py --no-labels --stage1 100000 --disc-weight 0", 32, (10, 130),
          "one autoencoder with two quantizers of 256 codes"),
]
Script = namedtuple("Script", "script")  # what trained_figures asks of a row
AIM = 0.75  # of the peer's time for a step, at most
MARK = "<!-- {}: {} -->"  # name of a table, begin or end
PAGE = ROOT / "docs" / "peers.md"


# ---- the environment


def make_environment(folder):
    """The interpreter of an environment with the peers, made where it is not there or has other versions."""
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    done = folder / "peers.json"
    wanted = {"packages": PINNED + BESIDE, "beside": site.getsitepackages(), "python": sys.version}
    if read_json(done) == wanted:
        return python
    print(f"{folder}: an environment with {', '.join(PINNED)}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    where = [str(python), "-c", "import site; print(site.getsitepackages()[0])"]
    packages = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    Path(packages, "beside.pth").write_text("\n".join(wanted["beside"]) + "\n")  # torch is not installed twice
    for names in (["--no-deps", *PINNED], BESIDE):
        said = subprocess.run([python, "-m", "pip", "install", "--quiet", *names], capture_output=True, text=True)
        if said.returncode:
            lines = [line for line in said.stderr.splitlines() if "error" in line.lower()] or ["nothing said"]
            raise Problem(f"pip install {' '.join(names)}: {lines[-1]}")
    write_json(done, wanted)
    return python


# ---- the same time


def words(flags, minutes):
    return flags.replace("STAGE1", str(max(1, round(STAGE1 * minutes)))).split()


def identity(peer, who, args):
    return f"{args.dataset}-{args.minutes:g}min-{peer.family}-{who}-{args.seed}"


def command_of(peer, who, args):
    """The command line of a row, from the name of the program on: ours, or the peer's."""
    program = f"{peer.family}.py" if who == "ours" else f"tools/{peer.program}"
    flags = words(peer.ours if who == "ours" else peer.flags, args.minutes)
    common = f"--dataset {args.dataset} --minutes {args.minutes:g} --num-samples {args.num_samples}"
    common += f" --eval-images {args.eval_images} --seed {args.seed}"
    return [program, *common.split(), *flags]


def last_line(log):
    """The JSON object that a peer's program printed as its last line."""
    lines = log.read_text(errors="replace").splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise Problem(f"the last line of {log} is no JSON object") from error


def make(peer, who, args, python):
    """Train, sample and measure one program; what was found is written to its file."""
    name = identity(peer, who, args)
    folder = args.out / name
    command = command_of(peer, who, args)
    watch = Watch()
    log = args.out / f"{name}.log"
    ends = ["--data-dir", args.data_dir, "--out", folder]
    if who == "ours" or peer.program == "peer_quantizer.py":
        ends.append("--overwrite")
    peak = run_command([python, ROOT / command[0], *command[1:], *ends], log, watch)
    if who == "ours":
        found = {"package": f"{peer.family}.py"} | trained_figures(Script(peer.family), folder)
    else:
        found = last_line(log)
    images, labels = read_samples(folder / "samples.npz")
    quality = evaluate(images, args.dataset, args.data_dir, labels)
    found |= {"family": peer.family, "who": who, "dataset": args.dataset, "minutes": args.minutes, "seed": args.seed,
              "command": " ".join(command), "n": quality["n"], "eval_images": args.eval_images, "peak_mb": peak,
              "distance": quality["frechet_at_floor_n"], "floor": quality["floor"]["frechet"],
              "density": quality["density"], "coverage": quality["coverage"],
              "processor": processor(), "torch": torch.__version__, "commit": commit(), "busy": watch.busy()}
    write_json(args.out / f"{name}.json", found)
    return found


def kept_row(peer, who, args):
    """The row that is there already, where it is of this command and this machine."""
    kept = read_json(args.out / f"{identity(peer, who, args)}.json")
    wanted = (" ".join(command_of(peer, who, args)), processor(), torch.__version__)
    return kept if kept and tuple(kept.get(key) for key in ("command", "processor", "torch")) == wanted else None


def equal_time(peers, args, python):
    """All rows, the peer of a family and then ours -> the exit code: 1 where a row could not be made."""
    code = 0
    for peer in peers:
        for who in ("peer", "ours"):
            name = identity(peer, who, args)
            kept = kept_row(peer, who, args)
            if kept:
                print(f"{name}: there already, distance {kept['distance']:.4g}")
                continue
            print(f"{name}: {' '.join(command_of(peer, who, args))}", flush=True)
            try:
                found = make(peer, who, args, python if who == "peer" else sys.executable)
                print(f"  {found['steps']} steps, {likelihood_text([found])}, distance {found['distance']:.4g} "
                      f"(floor {found['floor']:.4g}){busy_text(found)}", flush=True)
            except (Problem, ValueError) as error:
                print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
                code = 1
    return code


# ---- the same network


def turns(steps, pairs):
    """The order of the runs: (pair, who, steps), the two programs in turn."""
    return [(pair, who, n) for pair in range(pairs) for n in steps for who in ("ours", "peer")]


def step_times(seconds, steps, pairs):
    """seconds: (pair, who, steps) -> seconds of a whole program. -> who -> milliseconds of a step, one figure a pair."""
    few, many = steps
    return {who: [1000 * (seconds[pair, who, many] - seconds[pair, who, few]) / (many - few) for pair in range(pairs)]
            for who in ("ours", "peer")}


def small_data(args, path):
    """The first 2,000 training and 100 test images as a FILE.npz: vqgan.py looks at all of its data when it ends."""
    data = load_data(args.dataset, args.data_dir)
    np.savez(path, images=data.train[:2000, 0], labels=data.train_labels[:2000],
             test_images=data.test[:100, 0], test_labels=data.test_labels[:100])


def time_program(equal, who, steps, args, python):
    """Of a whole program with so many steps: its seconds, its number of parameters, the processes beside it."""
    program, *flags = (equal.ours if who == "ours" else f"tools/{equal.peer}").split()
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        run = Path(folder, "run")
        data = args.dataset
        if equal.name == "vqgan":
            data = Path(folder, "images.npz")
            small_data(args, data)
        flags += ["--dataset", data, "--data-dir", args.data_dir, "--steps", steps, "--batch-size", equal.batch]
        flags += ["--eval-images", 1, "--num-samples", 1, "--out", run]
        command = [python if who == "peer" else sys.executable, ROOT / program, *flags]
        log = Path(folder, "log")
        watch = Watch()
        with open(log, "w") as file:
            begin = time.monotonic()
            code = subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT).returncode
            seconds = time.monotonic() - begin
        busy = watch.busy()
        if code:
            said = log.read_text(errors="replace").splitlines() or ["nothing said"]
            raise Problem(f"{program}: exit code {code}: {said[-1]}")
        found = last_line(log) if who == "peer" else trained_figures(Script(program.removesuffix(".py")), run)
        return seconds, found["parameters"], busy


def equal_name(equal, args):
    return args.out / f"step-{args.dataset}-{equal.name.replace(', ', '-').replace(' ', '-')}.json"


def equal_network(args, python):
    """The rows of --equal-network -> the exit code."""
    code = 0
    for equal in EQUAL:
        if not {"all", equal.name.split(",")[0]} & set(args.models):
            continue
        path = equal_name(equal, args)
        kept = read_json(path)
        wanted = {"ours": equal.ours, "peer": equal.peer, "batch": equal.batch, "steps": list(equal.steps),
                  "pairs": args.pairs, "dataset": args.dataset, "processor": processor(), "torch": torch.__version__}
        if kept and {key: kept.get(key) for key in wanted} == wanted:
            print(f"{equal.name}: there already, ratio {kept['ratio']:.2f}")
            continue
        print(f"{equal.name}: {equal.says}", flush=True)
        seconds = {}
        parameters = {}
        busy = {}
        try:
            for pair, who, steps in turns(equal.steps, args.pairs):
                taken = time_program(equal, who, steps, args, python)
                seconds[pair, who, steps], parameters[who], others = taken
                busy |= others
                print(f"  {who}, {steps} steps: {taken[0]:.1f} s{busy_text({'busy': others})}", flush=True)
        except (Problem, ValueError) as error:
            print(f"error: {equal.name}: {' '.join(str(error).split())}", file=sys.stderr)
            code = 1
            continue
        found = wanted | {"name": equal.name, "ms": step_times(seconds, equal.steps, args.pairs), "parameters": parameters}
        found |= {"ratio": ratio_of(found["ms"]), "commit": commit(), "busy": busy}
        write_json(path, found)
        print(f"  {equal_text(found)}", flush=True)
    return code


def ratio_of(ms):
    """The median, over the pairs, of our time for a step over the peer's."""
    return statistics.median(ours / peer for ours, peer in zip(ms["ours"], ms["peer"], strict=True))


def equal_text(found):
    ours, peer = (statistics.median(found["ms"][who]) for who in ("ours", "peer"))
    return f"{ours:.1f} ms a step, the peer {peer:.1f}: ratio {found['ratio']:.2f}{busy_text(found)}"


# ---- the page


def busy_text(found):
    if not found["busy"]:
        return ""
    return "; not alone: " + ", ".join(f"{name} {share:.0%} of a core" for name, share in found["busy"].items())


def machines(rows):
    """The processors of rows as a line, and where there are several, each with its number."""
    names = list(dict.fromkeys(f"{r['processor']}, PyTorch {r['torch']}" for r in rows))
    return names, "\n".join(f"Processor{f' {i}' * (len(names) > 1)}: {name}." for i, name in enumerate(names, 1))


def not_alone(rows, name):
    return [f"- Not alone: {name(r)}{busy_text(r).removeprefix('; not alone')}." for r in rows if r["busy"]]


def time_tables(out):
    """The tables of all rows of the same time in a folder: one for each data set and time."""
    order = [peer.family for peer in PEERS]
    found = [r for path in sorted(out.glob("*.json")) if (r := read_json(path)) and r.get("family") in order]
    lines = []
    for key in sorted({(r["dataset"], r["minutes"]) for r in found}, key=lambda key: (key[0] != "mnist", key)):
        rows = [r for r in found if (r["dataset"], r["minutes"]) == key]
        rows.sort(key=lambda r: (order.index(r["family"]), r["seed"], r["processor"], r["who"] != "ours"))
        names, said = machines(rows)
        heads = ["family", "program", "settings", "steps", "parameters", "likelihood", "distance", "density", "coverage"]
        heads += ["MB"] + ["processor"] * (len(names) > 1)
        lines += [f"### {key[0]}, {key[1]:g} minutes each", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for r in rows:
            peer = PEERS[order.index(r["family"])]
            ours = r["who"] == "ours"
            settings = f"`{' '.join(words(peer.ours, r['minutes']))}`" if ours else peer.says
            peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
            cells = [r["family"], f"**{r['package']}**" if ours else r["package"], settings, f"{r['steps']:,}",
                     f"{r['parameters']:,}", likelihood_text([r]), f"{r['distance']:.3f}", f"{r['density']:.2f}",
                     f"{r['coverage']:.2f}", peak]
            if len(names) > 1:
                cells.append(str(1 + names.index(f"{r['processor']}, PyTorch {r['torch']}")))
            lines.append(f"| {' | '.join(cells)} |")
        ns = " or ".join(f"{n:,}" for n in sorted({r["n"] for r in rows}))
        tested = " or ".join(f"the first {n:,}" if n else "all 10,000" for n in sorted({r["eval_images"] for r in rows}))
        floors = " or ".join(f"{floor:.3f}" for floor in sorted({r["floor"] for r in rows}))
        lines += ["", f"Distances of {ns} samples; the floor is {floors}. Likelihoods of {tested} test images. "
                  f"Code: {', '.join(sorted({r['commit'] for r in rows if r['commit']})) or 'unknown'}.", said]
        lines += [*not_alone(rows, lambda r: f"{r['family']}, {r['package']}"), ""]
    return "\n".join(lines).strip() or "No row yet."


def equal_table(out):
    """The table of all rows of the same network in a folder."""
    order = [equal.name for equal in EQUAL]
    rows = [r for path in out.glob("step-*.json") if (r := read_json(path)) and r.get("name") in order]
    if not rows:
        return "No row yet."
    rows.sort(key=lambda r: (order.index(r["name"]), r["dataset"]))
    names, said = machines(rows)
    heads = ["network", "images a step", "parameters: ours, the peer's", "ours, ms", "the peer, ms", "ratio",
             f"at most {AIM}"] + ["processor"] * (len(names) > 1)
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for r in rows:
        equal = EQUAL[order.index(r["name"])]
        figures = [", ".join(f"{ms:.1f}" for ms in r["ms"][who]) for who in ("ours", "peer")]
        cells = [f"{r['name']}: {equal.says}", str(r["batch"]), f"{r['parameters']['ours']:,}, {r['parameters']['peer']:,}",
                 *figures, f"{r['ratio']:.2f}", "yes" if r["ratio"] <= AIM else "no"]
        if len(names) > 1:
            cells.append(str(1 + names.index(f"{r['processor']}, PyTorch {r['torch']}")))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The programs of the rows, without the flags that all have:", ""]
    lines += [f"- {r['name']}: `{r['ours']}` and `tools/{r['peer']}`, {r['steps'][0]} and {r['steps'][1]} steps." for r in rows]
    lines += [*not_alone(rows, lambda r: r["name"]), "", said]
    return "\n".join(lines)


def put(page, name, text):
    """Put a text between the marks of a name in a page."""
    marks = [MARK.format(name, end) for end in ("begin", "end")]
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if any(content.count(mark) != 1 for mark in marks):
        raise Problem(f"{page}: has no place between {marks[0]} and {marks[1]}")
    before, rest = content.split(marks[0])
    _, after = rest.split(marks[1])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")
    print(f"{page}: {name}")


# ---- the command line


def parser_of(doc, names):
    """A parser with the flags that this program and tools/cost.py share; names are those that --models knows."""
    parser = Parser(doc)
    parser.add_argument("--models", nargs="+", default=["all"], choices=["all", "none", *names], metavar="NAME",
                        help=f"{', '.join(names)}, all or none [all]")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of what was measured [runs/peers]")
    parser.add_argument("--write", nargs="?", type=Path, const=PAGE, metavar="PAGE.md",
                        help="put the tables into the page [docs/peers.md]")
    return parser


def parse(argv):
    parser = parser_of(__doc__, [peer.family for peer in PEERS])
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion_mnist"), help="[mnist]")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training for each program (> 0 to 100000) [2]")
    parser.add_argument("--num-samples", type=int, default=500, help="for the distance (10 to 1000000) [500]")
    parser.add_argument("--eval-images", type=int, default=1000,
                        help="the first so many test images for the likelihood, 0: all (0 to 10000) [1000]")
    parser.add_argument("--seed", type=int, default=0, help="of all programs (0 to 4294967295) [0]")
    parser.add_argument("--equal-network", action="store_true", help="time a step of equal networks instead")
    parser.add_argument("--pairs", type=int, default=3, help="of timings, for --equal-network (1 to 100) [3]")
    parser.add_argument("--data-dir", default="data", help="folder where data sets are looked for [data]")
    parser.add_argument("--venv", type=Path, default=Path("runs/peers/venv"), help="the environment [runs/peers/venv]")
    args = parser.parse_args(argv)
    parser.check(args, minutes=(None, 100_000), num_samples=(10, 1_000_000), eval_images=(0, 10_000), seed=(0, 2**32 - 1),
                 pairs=(1, 100))
    return args, [peer for peer in PEERS if {"all", peer.family} & set(args.models)]


def work(argv):
    """Make the environment, the rows and the page -> the exit code: 1 where a row could not be made."""
    code = 0
    args, peers = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if peers or not args.write:  # the page alone needs no environment
        python = make_environment(args.venv.absolute())
        code = equal_network(args, python) if args.equal_network else equal_time(peers, args, python)
    if args.write:
        put(args.write, "equal time", time_tables(args.out))
        put(args.write, "equal network", equal_table(args.out))
    return code


def main(argv=None):
    """The command line; returns the exit code."""
    return exit_code(work, argv, "the same command goes on")


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
