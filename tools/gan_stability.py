"""How often does each loss of gan.py fail? Every loss from several seeds, with nothing else changed, on a CPU in minutes.

  python tools/gan_stability.py [--seeds 5] [--losses hinge ...] [--out runs/gan-stability] [flags of gan.py, the same for all]

A run has diverged if it stopped on a loss or gradient that is not finite; it has collapsed if gan.py's detector warned, or if
1,500 samples cover less than half of the balls round the train images (tools/evaluate.py; as many train images cover 1.00 of
them). Printed for each loss: how many runs did either, and coverage and distance of every seed.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from evaluate import SHAPES, evaluate

import gan

COVERAGE = 0.5


def run(loss, seed, out, flags):
    """One training: whether it diverged, whether the detector warned, coverage, distance (nan where it diverged)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            gan.main(["--num-samples", "1500", "--save-every", "1000000", *flags, "--loss", loss, "--seed", str(seed),
                      "--out", str(out), "--overwrite"])
    except SystemExit:
        if "is the last good checkpoint" not in said.getvalue():
            print(said.getvalue(), file=sys.stderr, end="")
            raise
        return {"diverged": True, "warned": "warning:" in said.getvalue(), "coverage": float("nan"), "frechet": float("nan")}
    samples, config = np.load(out / "samples.npz"), json.loads((out / "config.json").read_text())
    found = evaluate(samples["images"], config["dataset"], config["data_dir"])
    return {"diverged": False, "warned": "warning:" in said.getvalue()} | {k: found[k] for k in ("coverage", "frechet")}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--losses", nargs="+", choices=gan.LOSS_D, default=list(gan.LOSS_D))
    parser.add_argument("--out", type=Path, default="runs/gan-stability")
    args, flags = parser.parse_known_args()
    if flags and (taken := {"--loss", "--seed", "--out", "--overwrite", "--mode", "--resume"} & set(flags)):
        parser.error(f"{', '.join(sorted(taken))}: not to be given, each run has its own")
    if (dataset := gan.parse_args([*flags, "--overwrite"])[0].dataset) not in SHAPES:
        parser.error(f"--dataset {dataset}: tools/evaluate.py has classifiers of {', '.join(SHAPES)}")
    print("| loss | diverged | collapsed | coverage | distance |\n|---|---|---|---|---|")
    for loss in args.losses:
        runs = [run(loss, seed, args.out / f"{loss}-{seed}", flags) for seed in range(args.seeds)]
        collapsed = sum(not r["diverged"] and (r["warned"] or r["coverage"] < COVERAGE) for r in runs)
        print(f"| {loss} | {sum(r['diverged'] for r in runs)} of {args.seeds} | {collapsed} of {args.seeds} "
              "| " + ", ".join(f"{r['coverage']:.2f}" for r in runs)
              + " | " + ", ".join(f"{r['frechet']:.2f}" for r in runs) + " |", flush=True)


if __name__ == "__main__":
    main()
