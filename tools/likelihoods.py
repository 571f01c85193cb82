"""The bits/dim of each image of a run of flow.py that was given --compare, as a histogram of both data sets.

  python tools/likelihoods.py runs/flow-mnist            # writes runs/flow-mnist/likelihoods.png
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw(bits):
    """A figure with the shares of images over bits/dim; bits: a name -> the values of its images."""
    figure = Figure((6, 3), layout="tight")
    axis = figure.add_subplot(xlabel="bits/dim", ylabel="share of test images")
    edges = np.histogram_bin_edges(np.concatenate(list(bits.values())), 80)
    for name, values in bits.items():
        shares = np.full(len(values), 1 / len(values))
        axis.hist(values, edges, weights=shares, alpha=0.6, label=name)
    axis.legend()
    return figure


if __name__ == "__main__":
    folder = Path(*sys.argv[1:2])
    path = folder / "likelihoods.npz"
    if len(sys.argv) != 2 or not path.is_file():
        sys.exit(f"error: {' '.join(sys.argv[1:]) or 'no folder'}: name the folder of a run of flow.py, with its {path.name}")
    config = json.loads((folder / "config.json").read_text())
    names = {"test": config["dataset"], "compare": config["compare"] or "compare"}
    bits = {names[key]: values for key, values in np.load(path).items()}
    draw(bits).savefig(path.with_suffix(".png"))
    print(f"{path.with_suffix('.png')}: the bits/dim of the images of each data set")
