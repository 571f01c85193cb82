"""The bound of a trained diffusion.py with 1, 2, 4, ... levels, as a table and a picture.

  python tools/levels.py pretrained/diffusion-mnist --out docs/levels.png

A hierarchical VAE with T levels has the bound prior + KL of each level + reconstruction. Where the
encoder adds noise, the KL of a level from t (noisy) to s (clean) is (VDM eqs. 13 and 14)
1/2 (SNR(s) - SNR(t)) E|x - x_hat(x_t)|^2. The levels are equally spaced in log SNR, from MIN_LOGSNR
to --decoder-logsnr. The other two terms, and the limit of infinitely many levels, are those of
diffusion.elbo. No network is trained anew: the same one is asked at other levels.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion

SHOWN = (8, 64)  # the numbers of levels whose single levels the picture shows


def log_snrs(T, cfg):
    """The log SNR of the T + 1 latents of a chain with T levels, the noisiest first."""
    return torch.linspace(diffusion.MIN_LOGSNR, cfg.decoder_logsnr, T + 1, dtype=torch.float64)


@torch.no_grad()
def level_kls(model, x, y, cfg, T, generator):
    """For images x (B,C,H,W) in {0..255}, K = --elbo-samples levels each, and their KLs: both (K,B).

    T times the mean over K is an estimate of the sum over all levels, in nats. The draws are those
    of diffusion.elbo from the same generator; each log SNR is moved to the noisy end of its level.
    """
    data = x / 127.5 - 1  # in [-1,1]
    K = cfg.elbo_samples
    ends = log_snrs(T, cfg)
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    place = (offset + torch.arange(len(x)) / len(x)) % 1  # (B,)
    levels = []
    kls = []
    for k in range(K):
        level = ((k + place) / K * T).long().clamp(max=T - 1)  # rounding may reach T
        noisy = ends[level]
        clean = ends[level + 1]
        t = diffusion.time_of(noisy, cfg)
        eps = torch.randn(data.shape, generator=generator).to(data)
        x_hat = diffusion.denoise(model, diffusion.q_sample(data, t, eps, cfg), t, y, cfg).clamp(-1, 1)
        levels.append(level)
        kls.append(0.5 * (clean.exp() - noisy.exp()) * ((data - x_hat) ** 2).sum((1, 2, 3)))  # VDM eq. 13
    return torch.stack(levels), torch.stack(kls)


def bounds(model, images, labels, cfg, pixels, counts):
    """Of images (N,C,H,W) uint8, for each T of counts and infinity: T -> name -> bits/dim (N,). pixels of count_pixels.

    The names are those of diffusion.elbo. Beside it the bits/dim of each level: T -> (T,).
    """
    per_nat = 1 / (images[0].numel() * math.log(2))
    size = diffusion.at_once(images.shape[1:])
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    found = {T: [] for T in [*counts, math.inf]}
    of_levels = {T: torch.zeros(T, dtype=torch.float64) for T in counts}
    generator = torch.Generator().manual_seed(cfg.seed)
    for x, y in diffusion.progress(batches, "batches of images"):
        state = generator.get_state()
        limit = diffusion.elbo(model, x, y, cfg, pixels, generator)
        found[math.inf].append(limit)
        for T in counts:
            levels, kls = level_kls(model, x, y, cfg, T, torch.Generator().set_state(state))
            bits = kls.double() * T * per_nat / cfg.elbo_samples
            of_levels[T].index_add_(0, levels.flatten(), bits.flatten() / len(images))
            total = limit["prior"] + bits.sum(0) + limit["reconstruction"]
            found[T].append(limit | {"diffusion": bits.sum(0), "bpd": total})
    table = {T: {name: torch.cat([terms[name].double() for terms in parts]) for name in parts[0]} for T, parts in found.items()}
    return table, of_levels


def draw(table, of_levels, cfg):
    """A figure: the bound over the number of levels, and what each level costs."""
    bits = {T: terms["bpd"].mean().item() for T, terms in table.items()}
    limit = bits.pop(math.inf)
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(list(bits), list(bits.values()), "o-", label="T levels")
    left.axhline(limit, color="black", linestyle="--", label=f"infinitely many: {limit:.3f}")
    left.set(xlabel="number of levels T", ylabel="bound on -log p(x), bits/dim")
    left.set_xticks(list(bits), map(str, bits), rotation=45)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if limit / 2 < tick < 2 * max(bits.values())]
    left.set_yticks(ticks, map(str, ticks))
    left.minorticks_off()
    left.legend()
    for T, color in zip(SHOWN, ("lightblue", "tab:blue"), strict=True):
        if T in of_levels:
            ends = log_snrs(T, cfg)
            right.stairs(of_levels[T] / ends.diff(), ends, fill=True, color=color, label=f"{T} levels: {bits[T]:.2f} bits/dim")
    right.set(xlabel="log signal-to-noise ratio (noise is on the left)", ylabel="bits/dim for each unit of log SNR")
    right.legend()
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of a run of diffusion.py")
    parser.add_argument("--images", type=int, default=500, help="how many test images, from the first on")
    parser.add_argument("--levels", type=int, default=1024, help="the most levels; the powers of two up to it are computed")
    parser.add_argument("--data-dir", help="folder where the data set is looked for; by default the run's")
    parser.add_argument("--out", type=Path, help="file of the picture; by default levels.png in the run's folder")
    args = parser.parse_args(argv)
    if args.levels < 1 or args.images < 1:
        parser.error("--levels and --images are at least 1")
    _, saved = diffusion.read_run(args.folder)
    model, cfg = diffusion.load(args.folder)
    data = diffusion.load_data(cfg.dataset, args.data_dir or cfg.data_dir, cfg.image_size)
    shape = list(data.test.shape[1:])
    if shape != saved["facts"]["shape"]:
        diffusion.fail(f"{cfg.dataset}: images of {shape}, the run in {args.folder} has {saved['facts']['shape']}")
    pixels = diffusion.count_pixels(data.train, cfg)
    images = data.test[: args.images]
    counts = [2**k for k in range(args.levels.bit_length())]
    table, of_levels = bounds(model, images, data.test_labels[: args.images], cfg, pixels, counts)
    print(f"bits/dim of {len(images)} test images, {cfg.elbo_samples} levels drawn for each image and T")
    for T, terms in table.items():
        above = terms["bpd"] - table[math.inf]["bpd"]
        means = " + ".join(f"{name} {terms[name].mean():.4f}" for name in ("prior", "diffusion", "reconstruction"))
        error = f", {above.mean():.4f} +- {above.std() / len(images) ** 0.5:.4f} above the limit" * (T < math.inf)
        print(f"T = {T}: at most {terms['bpd'].mean():.4f} = {means}{error}")
    path = args.out or args.folder / "levels.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(table, of_levels, cfg).savefig(path)
    print(f"{path}: the bound over the number of levels, and what each level costs")


if __name__ == "__main__":
    main()
