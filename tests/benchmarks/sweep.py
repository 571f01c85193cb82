"""Time one operation over a growing size: a CSV and a plot of every implementation that runs here.

    python tests/benchmarks/sweep.py group_norm_silu                       # sweep-group_norm_silu.csv and .png
    python tests/benchmarks/sweep.py attention --passes backward --out docs/sweep-h100-attention

On a GPU the Triton kernels are among them, and CUDA events are the clock (bench.py); on a CPU reference, plain and compiled.
Each is checked against the reference before it is timed.
"""

import argparse
import csv
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import bench

import kernels
from kernels import attention, bias_act, coupling, decode_attention, group_norm, logistic_mixture, masked_conv, vector_quantize

IMPLS = [impl for impl in bench.IMPLS if bench.DEVICE == "cuda" or impl not in ("compiled reference", "triton")]


class Sweep(NamedTuple):
    size: str  # what it is
    sizes: tuple
    module: object
    inputs: object  # size -> the arguments
    fixed: dict = {}  # further arguments
    passes: tuple = bench.PASSES  # that there are

    def forms(self, op):
        """As bench.prepare takes them."""
        names = {"reference": f"{op}_reference", "plain": f"{op}_torch", "triton": op}
        return {impl: functools.partial(getattr(self.module, name), **self.fixed) for impl, name in names.items()}


def rand(*shape):
    return torch.randn(*shape, device=bench.DEVICE)


def images(*shape):
    return rand(*shape).to(memory_format=torch.channels_last)


OPS = {
    "group_norm_silu": Sweep("side of images, 16x64 in 8 groups", (8, 16, 32, 64), group_norm,
                             lambda n: (images(16, 64, n, n), 8, rand(64), rand(64))),
    "attention": Sweep("side of images, 8x4 heads of 64, a position a pixel, 2-D bias", (8, 16, 24, 32), attention,
                       lambda n: (*(rand(8, 4, n * n, 64) for _ in range(3)), "causal", rand(4, 2 * n - 1, 2 * n - 1))),
    "decode_attention": Sweep("keys, 8x8 heads of 64", (64, 256, 1024, 4096), decode_attention,
                              lambda n: (rand(8, 8, 1, 64), rand(8, 8, 4096, 64), rand(8, 8, 4096, 64), n), {}, ("forward",)),
    "masked_conv2d": Sweep("side of images, 16x64, 3x3", (7, 14, 28, 56), masked_conv,
                           lambda n: (images(16, 64, n, n), rand(64, 64, 3, 3) / 24, rand(64))),
    "gated_masked_conv2d": Sweep("side of images, 16x64, 3x3", (7, 14, 28, 56), masked_conv,
                                 lambda n: (images(16, 64, n, n), rand(128, 64, 3, 3) / 24, rand(128), rand(16, 128))),
    "affine_coupling": Sweep("side of images, 32x12, half of the channels", (8, 16, 32, 64), coupling,
                             lambda n: (rand(32, 12, n, n), rand(32, 12, n, n)), {"mask_or_split": 6}),
    "spline_coupling": Sweep("side of images, 32x4, 8 bins", (7, 14, 28, 56), coupling,
                             lambda n: (rand(32, 4, n, n), rand(32, 4 * 23, n, n))),
    "nearest_code": Sweep("vectors of 64, 512 codes", (1024, 4096, 16384, 65536), vector_quantize,
                          lambda n: (rand(n, 64), rand(512, 64))),
    "logistic_mixture": Sweep("side of images, 16x1, 10 mixtures", (14, 28, 56, 112), logistic_mixture,
                              lambda n: (torch.randint(0, 256, (16, 1, n, n), device=bench.DEVICE), rand(16, 30, n, n))),
    "bias_act": Sweep("side of images, 64x64", (7, 14, 28, 56), bias_act, lambda n: (rand(64, 64, n, n), rand(64))),
}


def measure(op, passes, sizes=None):
    """Rows of (size, implementation, milliseconds at the quantiles 0.2, 0.5 and 0.8)."""
    forms = OPS[op].forms(op)
    rows = []
    for size in sizes or OPS[op].sizes:
        torch.manual_seed(0)
        x = OPS[op].inputs(size)
        kernels.mode = "torch"
        want = bench.prepare(forms["reference"], x, passes)()
        for impl in IMPLS:
            kernels.mode = "triton" if impl == "triton" else "torch"
            f = bench.compiled(forms[bench.SOURCE[impl]]) if impl in bench.SOURCE else forms[impl]
            call = bench.prepare(f, x, passes)
            bench.check(call(), want, 1e-2)
            rows.append((size, impl, *(round(1e3 * seconds, 5) for seconds in bench.times(call))))
            print(*rows[-1], flush=True)
    return rows


def plot(rows, size, title, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for impl in dict.fromkeys(row[1] for row in rows):
        sizes, _, p20, p50, p80 = zip(*(row for row in rows if row[1] == impl), strict=True)
        axes.plot(sizes, p50, "o-", label=impl)
        axes.fill_between(sizes, p20, p80, alpha=0.2)
    axes.set(title=title, xscale="log", yscale="log", xlabel=size, ylabel="milliseconds: median, quantiles 0.2 to 0.8")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--passes", choices=bench.PASSES, help="default: forward+backward, or forward where there is no other")
    parser.add_argument("--sizes", type=int, nargs="+", help="instead of the usual ones")
    parser.add_argument("--out", help="path of the two files without their endings; default: sweep-OP")
    args = parser.parse_args()
    passes = args.passes or OPS[args.op].passes[-1]
    if passes not in OPS[args.op].passes:
        parser.error(f"{args.op} has no gradients")
    out = Path(args.out or f"sweep-{args.op}")
    rows = measure(args.op, passes, args.sizes)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("size", "implementation", "p20_ms", "p50_ms", "p80_ms"))
        writer.writerows(rows)
    plot(rows, OPS[args.op].size, f"{args.op}, {passes}, {bench.device_name()}", f"{out}.png")
    print(f"{out}.csv and {out}.png")


if __name__ == "__main__":
    main()
