"""Time one operation over a growing size: a CSV and a plot of every implementation that runs here.

    python tests/benchmarks/sweep.py group_norm_silu                       # sweep-group_norm_silu.csv and .png
    python tests/benchmarks/sweep.py attention --passes backward --out docs/kernels-h100

On a GPU the Triton kernels are among them, and CUDA events are the clock (bench.py); on a CPU reference, plain and compiled.
"""

import argparse
import csv
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import bench

import kernels
from kernels import attention, bias_act, coupling, group_norm, logistic_mixture, masked_conv, vector_quantize


def rand(*shape):
    return torch.randn(*shape, device=bench.DEVICE)


def forms(module, op, **fixed):
    """The forms of an operation, as bench.prepare takes them."""
    names = {"reference": f"{op}_reference", "plain": f"{op}_torch", "triton": op}
    found = {impl: getattr(module, name) for impl, name in names.items()}
    return {name: lambda *x, f=f: f(*x, **fixed) for name, f in found.items()}


OPS = {  # operation: (what the size is, sizes, its forms, size -> inputs)
    "group_norm_silu": ("side of images 16x64", (8, 16, 32, 64), forms(group_norm, "group_norm_silu"),
                        lambda n: (rand(16, 64, n, n).to(memory_format=torch.channels_last), 8, rand(64), rand(64))),
    "attention": ("positions, 8x4 heads of 64, causal", (128, 256, 512, 1024), forms(attention, "attention", mask="causal"),
                  lambda n: tuple(rand(8, 4, n, 64) for _ in range(3))),
    "masked_conv2d": ("side of images 16x64, 3x3", (7, 14, 28, 56), forms(masked_conv, "masked_conv2d"),
                      lambda n: (rand(16, 64, n, n).to(memory_format=torch.channels_last), rand(64, 64, 3, 3) / 24, rand(64))),
    "affine_coupling": ("side of images 32x12", (8, 16, 32, 64), forms(coupling, "affine_coupling", mask_or_split=6),
                        lambda n: (rand(32, 12, n, n), rand(32, 12, n, n))),
    "spline_coupling": ("side of images 32x4, 8 bins", (7, 14, 28, 56), forms(coupling, "spline_coupling"),
                        lambda n: (rand(32, 4, n, n), rand(32, 4 * 23, n, n))),
    "nearest_code": ("vectors of 64, 512 codes", (1024, 4096, 16384, 65536), forms(vector_quantize, "nearest_code"),
                     lambda n: (rand(n, 64), rand(512, 64))),
    "logistic_mixture": ("side of images 16x1, 10 mixtures", (14, 28, 56, 112), forms(logistic_mixture, "logistic_mixture"),
                         lambda n: (torch.randint(0, 256, (16, 1, n, n), device=bench.DEVICE), rand(16, 30, n, n))),
    "bias_act": ("side of images 64x64", (7, 14, 28, 56), forms(bias_act, "bias_act"),
                 lambda n: (rand(64, 64, n, n), rand(64))),
}


def measure(op, passes, sizes=None):
    """Rows of (size, implementation, milliseconds at the quantiles 0.2, 0.5 and 0.8)."""
    _, usual, found, inputs = OPS[op]
    impls = [impl for impl in bench.IMPLS if bench.DEVICE == "cuda" or impl in ("reference", "plain", "compiled")]
    rows = []
    for size in sizes or usual:
        torch.manual_seed(0)
        x = inputs(size)
        for impl in impls:
            f = found[{"compiled": "plain", "compiled reference": "reference"}.get(impl, impl)]
            if impl.startswith("compiled"):
                f = bench.compiled(f)
            kernels.mode = "triton" if impl == "triton" else "torch"
            seconds = bench.times(bench.prepare(f, x, passes))
            rows.append((size, impl, *(round(1e3 * s, 5) for s in seconds)))
            print(*rows[-1], flush=True)
    return rows


def plot(rows, title, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for impl in dict.fromkeys(row[1] for row in rows):
        own = [row for row in rows if row[1] == impl]
        axes.plot([row[0] for row in own], [row[3] for row in own], "o-", label=impl)
        axes.fill_between([row[0] for row in own], [row[2] for row in own], [row[4] for row in own], alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel=title, ylabel="milliseconds, median and the middle 60 %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--passes", choices=bench.PASSES, default="forward+backward")
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the usual ones")
    parser.add_argument("--out", help="path of the two files without their endings; default: sweep-OP")
    args = parser.parse_args()
    out = Path(args.out or f"sweep-{args.op}")
    rows = measure(args.op, args.passes, args.sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(("size", "implementation", "p20_ms", "p50_ms", "p80_ms"))
        writer.writerows(rows)
    plot(rows, f"{args.op}, {args.passes}: {OPS[args.op][0]}", f"{out}.png")
    print(f"{out}.csv and {out}.png")


if __name__ == "__main__":
    main()
