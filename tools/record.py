"""How many minutes of training a script needs to reach a target: a row for docs/records.md.

  python tools/record.py diffusion --target distance 0.2 --dataset mnist --minutes 10
  python tools/record.py flow --target bpd 1.1 --every 2 --minutes 20 --dequantize variational

Trains the script (flags that are not listed here go to it) and stops the clock every --every minutes:
the run is evaluated and sampled, and is then resumed. Only training counts, so the minute that is
printed is that of the first look at which the figure is at the target or below. Targets: distance (of
10,000 samples, tools/evaluate.py), bpd (bits/dim of 8-bit images) and nats (of binarised images).
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # from whatever directory this is run

from evaluate import evaluate, read_samples
from features import SHAPES
from scoreboard import Problem, Watch, commit, leave_at_sigterm, likelihood, processor, read_json, run_command
from sync import SCRIPTS

TARGETS = ("distance", "bpd", "nats")
NAMES = [name.removesuffix(".py") for name in SCRIPTS]


def figure_of(args):
    """The figure of --target of the run as it is, and the minutes that it has trained."""
    lines = [json.loads(line) for line in (args.out / "metrics.jsonl").read_text().splitlines()]
    final = [line for line in lines if line.get("final")][-1]
    minutes = final["seconds"] / 60
    if args.target[0] == "distance":
        images, labels = read_samples(args.out / "samples.npz")
        return evaluate(images, args.dataset, args.data_dir, labels)["frechet_at_floor_n"], minutes
    found = likelihood(args.script, read_json(args.out / "config.json"), final)
    if args.target[0] not in found:
        raise Problem(f"--target {args.target[0]}: {args.script}.py has {', '.join(found) or 'no likelihood'} with these flags")
    return found[args.target[0]], minutes


def search(args, flags):
    """Train until the target is met -> the row of docs/records.md; Problem where --minutes are over before."""
    name, target = args.target[0], float(args.target[1])
    watch = Watch()
    num_samples = args.num_samples if name == "distance" else 1  # a likelihood needs none, and they may take long
    looks = 0
    while looks * args.every < args.minutes:
        looks += 1
        minutes = min(looks * args.every, args.minutes)
        command = [sys.executable, ROOT / f"{args.script}.py", "--dataset", args.dataset, "--data-dir", args.data_dir,
                   "--minutes", minutes, "--num-samples", num_samples, "--out", args.out, *flags]
        run_command([*command, "--resume" if looks > 1 else "--overwrite"], args.out.with_name(f"{args.out.name}.log"), watch)
        figure, trained = figure_of(args)
        print(f"{trained:.2f} minutes: {name} {figure:.4g}", flush=True)
        if figure <= target:
            for other, share in watch.busy().items():
                print(f"warning: not alone: {other} took {share:.0%} of a core", file=sys.stderr)
            typed = " ".join(["python", f"{args.script}.py", "--dataset", args.dataset, "--minutes", f"{minutes:g}", *flags])
            cells = (args.script, f"{name} {target:g}", f"{trained:.1f}", f"{figure:.4g}", f"`{typed}`", processor(), commit())
            return f"| {' | '.join(cells)} |"
    raise Problem(f"{name} {target:g} was not reached in {args.minutes:g} minutes")


def main(argv=None):
    """The command line; returns the exit code: 1 where the target was not reached."""

    def fail(message):
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("script", choices=NAMES)
    names = f"{', '.join(TARGETS)}; and a number"
    parser.add_argument("--target", nargs=2, required=True, metavar=("NAME", "VALUE"), help=names)
    parser.add_argument("--dataset", default="mnist", choices=list(SHAPES), help="[mnist]")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training at most (> 0 to 100000) [10]")
    parser.add_argument("--every", type=float, default=1.0, help="minutes between two looks (> 0 to 100000) [1]")
    parser.add_argument("--num-samples", type=int, default=10_000, help="for the distance (10 to 1000000) [10000]")
    parser.add_argument("--data-dir", default="data", help="folder where data sets are looked for [data]")
    parser.add_argument("--out", type=Path, default=Path("runs/record"), help="folder of the run [runs/record]")
    args, flags = parser.parse_known_args(argv)
    try:
        known = args.target[0] in TARGETS and float(args.target[1]) > 0
    except ValueError:
        known = False
    if not known:
        fail(f"--target {' '.join(args.target)}: one of {', '.join(TARGETS)}, and a number above 0")
    for name, most in (("minutes", 100_000), ("every", 100_000)):
        if not 0 < getattr(args, name) <= most:
            fail(f"--{name} {getattr(args, name)}: must be above 0 and at most {most}")
    if not 10 <= args.num_samples <= 1_000_000:
        fail(f"--num-samples {args.num_samples}: must be from 10 to 1000000")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        print(search(args, flags))
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        return 130
    except (Problem, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave_at_sigterm()
    sys.exit(main())
