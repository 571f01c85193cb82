"""How many bits/dim a trained flow.py gives the test images of several data sets, as a histogram.

  python tools/likelihoods.py runs/flow-mnist fashion_mnist    # its own test split, and that of Fashion-MNIST

Prints the mean of each and writes likelihoods.png into the folder of the run. It is the script's own bound (one draw of
dequantization noise, the mean of p(x | y) over the classes), on all test images.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flow


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


def bits_of(folder, others, data_dir=None):
    """The bits/dim (N,) of the test images of each data set, the run's own first: a dictionary from names to arrays."""
    model, cfg = flow.load(folder)
    facts = json.loads(Path(folder, "config.json").read_text())
    bits = {}
    for name in dict.fromkeys([cfg.dataset, *others]):
        images = flow.load_data(name, data_dir or cfg.data_dir, cfg.image_size).test
        if list(images.shape[1:]) != facts["shape"]:
            flow.fail(f"{name}: images of {list(images.shape[1:])}, the run in {folder} has {facts['shape']}")
        bits[name] = flow.evaluate(model, images, facts["classes"], cfg, "cpu").numpy()
    return bits


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of a run of flow.py")
    parser.add_argument("others", nargs="*", help="data sets beside the run's own: mnist, fashion_mnist, a folder, a FILE.npz")
    parser.add_argument("--data-dir", help="folder where data sets are looked for; by default the run's")
    args = parser.parse_args(argv)
    bits = bits_of(args.folder, args.others, args.data_dir)
    for name, values in bits.items():
        print(f"{name}: {values.mean():.4f} bits/dim, {len(values)} test images")
    path = args.folder / "likelihoods.png"
    draw(bits).savefig(path)
    print(f"{path}: the bits/dim of the images of each data set")


if __name__ == "__main__":
    main()
