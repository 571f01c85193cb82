"""Every metric of a run against the step, as a picture.

  python tools/curves.py runs/diffusion-mnist            # writes runs/diffusion-mnist/curves.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def read_metrics(path):
    """The lines of metrics.jsonl; what is no object, as a full disk may leave it, is passed by."""
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def draw(lines):
    """A figure with a panel for each metric of lines, dicts of step, seconds and metrics."""
    names = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in names if name not in ("step", "seconds", "final")]
    figure = Figure((4 * max(len(names), 1), 3), layout="tight")
    for i, name in enumerate(names):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis = figure.add_subplot(1, len(names), i + 1, title=name, xlabel="step")
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 2 else "")
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "metrics.jsonl").is_file():
        sys.exit(f"error: {' '.join(sys.argv[1:]) or 'no folder'}: name the folder of a run, with its metrics.jsonl")
    path = Path(sys.argv[1], "curves.png")
    draw(read_metrics(path.with_name("metrics.jsonl"))).savefig(path)
    print(f"{path}: every metric against the step")
