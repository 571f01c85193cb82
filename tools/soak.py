"""Does a long run grow, or slow down? Trains scripts by the clock, reads their memory once a second, prints a row for each.

  python tools/soak.py vae [gan ...] [--minutes 60] [--together] [--out runs/soak] [flags of the scripts, the same for all]

One script runs after another, or all at once with --together, so that six hours become one.
Memory is the resident set of the process (VmRSS in /proc, so Linux alone), in MB. `early` is its mean over the minute that
follows the first minute of training and the first grid of samples, `last` that over the last minute; growth is how much the
last is above the early one. Speed is steps a second of processor time in each third of the training, by the clock: other
processes on the machine hardly change it. Evaluation and sampling, which come after the training, are not counted. The
readings stay in soak.json beside the run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


def worked(pid):
    """Seconds that a process has had of processors, all its threads together, 0 where it is over."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in its own code, in the kernel's


def watch(command, started, seconds):
    """Run a command -> its exit code and the readings [(seconds since started() was first true, MB, seconds of processor)]."""
    every = min(1, seconds / 100)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    readings = []
    start = None
    while process.poll() is None:
        if start is None and started():
            start = time.monotonic()
        if start is not None and time.monotonic() - start < seconds:
            readings.append((time.monotonic() - start, resident(process.pid), worked(process.pid)))
        time.sleep(every)
    return process.returncode, readings


def summary(readings, log, save_every):
    """readings [(seconds, MB, seconds of processor)], log [(step, seconds)] -> the figures of a row.

    A minute is a tenth of a run under ten.
    """
    t, memory, processor = np.array(readings).T
    steps, at = np.array([(0, 0), *log], float).T
    minute = min(60, t[-1] / 10)
    start = min(max(minute, np.interp(save_every, steps, at)), t[-1] - minute)
    early = memory[(t >= start) & (t < start + minute)].mean()
    last = memory[t >= t[-1] - minute].mean()
    thirds = np.linspace(0, at[-1], 4)
    speed = np.diff(np.interp(thirds, at, steps)) / np.diff(np.interp(thirds, t, processor))
    return {"early": early, "last": last, "growth": 100 * (last / early - 1), "peak": memory.max(), "steps": int(steps[-1]),
            "speed": speed.tolist()}


def row(name, found):
    speed = ", ".join(f"{v:.2f}" for v in found["speed"])
    return (f"| {name}.py | {found['early']:.0f} | {found['last']:.0f} | {found['growth']:+.1f} % | {found['peak']:.0f} | "
            f"{found['steps']} | {speed} |")


def soak(name, minutes, out, flags):
    """Train one script -> its row."""
    out = out / name
    config = out / "config.json"  # written when the training begins
    command = [sys.executable, ROOT / f"{name}.py", "--minutes", minutes, "--out", out, "--overwrite", *flags]
    before = time.time()
    code, readings = watch([str(part) for part in command], lambda: config.exists() and config.stat().st_mtime >= before,
                           minutes * 60)
    if code:
        raise SystemExit(f"{name}.py ended with exit code {code}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    log = [(line["step"], line["seconds"]) for line in lines if not line.get("final")]
    found = summary(readings, log, json.loads(config.read_text())["save_every"])
    (out / "soak.json").write_text(json.dumps(found | {"readings": readings}))
    return row(name, found)


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("scripts", nargs="+", help="names of scripts, without .py")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--together", action="store_true", help="all scripts at once")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args, flags = parser.parse_known_args(argv)
    print("| script | MB, early | MB, last | growth | MB, peak | steps | steps a second of processor time, by thirds |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    with ThreadPoolExecutor(len(args.scripts) if args.together else 1) as pool:
        for line in pool.map(partial(soak, minutes=args.minutes, out=args.out, flags=flags), args.scripts):
            print(line, flush=True)


if __name__ == "__main__":
    main()
