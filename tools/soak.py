"""Does a long run grow, or slow down? Trains scripts by the clock, reads their memory once a second, prints a row for each.

  python tools/soak.py vae [gan ...] [--minutes 60] [--out runs/soak] [flags of the scripts, the same for all]

Memory is the resident set of the process (VmRSS in /proc, so Linux alone), in MB. `early` is its mean over the minute that
follows the first minute of training and the first grid of samples, `last` that over the last minute; growth is how much the
last is above the early one. Speed is steps a second in each third of the training, from metrics.jsonl. Evaluation and
sampling, which come after the training, are not counted. The readings stay in soak.json beside the run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def resident(pid):
    """Resident memory of a process in MB, 0 where it is over."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def watch(command, started, seconds):
    """Run a command -> its exit code and the readings [(seconds since started() was first true, MB)] up to `seconds`."""
    every = min(1, seconds / 100)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    readings = []
    start = None
    while process.poll() is None:
        if start is None and started():
            start = time.monotonic()
        if start is not None and time.monotonic() - start < seconds:
            readings.append((time.monotonic() - start, resident(process.pid)))
        time.sleep(every)
    return process.returncode, readings


def summary(readings, log, save_every):
    """readings [(seconds, MB)], log [(step, seconds)] -> the figures of a row; a minute is a tenth of a run under ten."""
    t, memory = np.array(readings).T
    steps, at = np.array([(0, 0), *log], float).T
    minute = min(60, t[-1] / 10)
    start = min(max(minute, np.interp(save_every, steps, at)), t[-1] - minute)
    early = memory[(t >= start) & (t < start + minute)].mean()
    last = memory[t >= t[-1] - minute].mean()
    thirds = np.interp(np.linspace(0, at[-1], 4), at, steps)
    return {"early": early, "last": last, "growth": 100 * (last / early - 1), "peak": memory.max(), "steps": int(steps[-1]),
            "speed": (np.diff(thirds) / (at[-1] / 3)).tolist()}


def row(name, found):
    speed = ", ".join(f"{v:.2f}" for v in found["speed"])
    return (f"| {name}.py | {found['early']:.0f} | {found['last']:.0f} | {found['growth']:+.1f} % | {found['peak']:.0f} | "
            f"{found['steps']} | {speed} |")


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("scripts", nargs="+", help="names of scripts, without .py")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args, flags = parser.parse_known_args(argv)
    print("| script | MB, early | MB, last | growth | MB, peak | steps | steps a second, by thirds |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    for name in args.scripts:
        out = args.out / name
        command = [sys.executable, ROOT / f"{name}.py", "--minutes", args.minutes, "--out", out, "--overwrite", *flags]
        before = time.time()
        config = out / "config.json"  # written when the training begins
        code, readings = watch([str(part) for part in command], lambda path=config, before=before: path.exists()
                               and path.stat().st_mtime >= before, args.minutes * 60)
        if code:
            sys.exit(f"{name}.py ended with exit code {code}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        log = [(line["step"], line["seconds"]) for line in lines if not line.get("final")]
        found = summary(readings, log, json.loads(config.read_text())["save_every"])
        (out / "soak.json").write_text(json.dumps(found | {"readings": readings}))
        print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
