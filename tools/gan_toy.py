"""The smallest games that gan.py's losses play, as a picture, in minutes on a CPU.

  python tools/gan_toy.py [--out docs/gan_toy.png]

Dirac-GAN (Mescheder 2018, section 2): real data is the point 0, G a point g, and D(x) = d x. The game has its equilibrium at
g = d = 0; the picture shows each loss's way from (1, 0.5). Below it, for each loss, samples of a G that learns a ring of eight
Gaussians.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gan

GAMES = [("relativistic", 0.5), *((loss, 0.0) for loss in gan.LOSS_D)]  # (--loss, --r1 and --r2; for the ring a fifth of those)
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


class Dirac(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


class DiracG(Dirac):
    def forward(self, z, y):
        return self.value.expand(len(z), 1, 1, 1)


class DiracD(Dirac):
    def forward(self, x, y):
        return self.value * x[:, 0, 0, 0]


def dirac(loss, r, steps=4000, lr=0.02):
    """(g, d) after each step of gradient descent by both players at once, from (1, 0.5)."""
    G, D, cfg = DiracG(1.0), DiracD(0.5), gan.choose(gan.Config(loss=loss, r1=r, r2=r, anneal=1), 8, 8)
    real, z, path = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.zeros(2, 1), []
    for _ in range(steps):
        (d,) = torch.autograd.grad(gan.loss_d(G, D, real, None, z, 1000, cfg)[0].mean(), D.value)
        (g,) = torch.autograd.grad(gan.loss_g(G, D, real, None, z, cfg).mean(), G.value)
        with torch.no_grad():
            D.value -= lr * d
            G.value -= lr * g
        path.append((G.value.item(), D.value.item()))
    return path


class Net(nn.Sequential):
    """z (B,8), or points (B,2,1,1), to points or scores."""

    def __init__(self, n_in, n_out):
        super().__init__(nn.Linear(n_in, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, n_out))

    def forward(self, x, y):
        out = super().forward(x.flatten(1))
        return out[:, 0] if out.shape[1] == 1 else out[:, :, None, None]


def ring(loss, r, steps=2500, n=4000, seed=0):
    """n samples (n,2) of a G that was trained on the ring."""
    torch.manual_seed(seed)
    G, D, cfg = Net(8, 2), Net(2, 1), gan.choose(gan.Config(loss=loss, r1=r, r2=r, anneal=300), 8, 8)
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3, (0.0, 0.99)) for net in (D, G)]
    for step in range(steps):
        real = (CENTRES[torch.randint(8, (128,))] + 0.05 * torch.randn(128, 2))[:, :, None, None]
        for optimizer in optimizers:
            z = torch.randn(128, 8)
            game = gan.loss_d(G, D, real, None, z, step, cfg)[0] if optimizer is optimizers[0] else gan.loss_g(
                G, D, real, None, z, cfg)
            optimizer.zero_grad()
            game.mean().backward()
            optimizer.step()
    with torch.no_grad():
        return G(torch.randn(n, 8), None).flatten(1)


def main():
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/gan_toy.png")
    args = parser.parse_args()
    figure = Figure((15, 5.2), layout="tight")
    for i, (loss, r) in enumerate(GAMES):
        path = dirac(loss, r)
        axis = figure.add_subplot(2, len(GAMES), i + 1, title=f"{loss}, R1 and R2" if r else loss, xlabel="g", ylabel="d")
        axis.plot(*zip((1.0, 0.5), *path, strict=True), linewidth=0.6)
        axis.plot(0, 0, "k+")
        axis.plot(*path[-1], "o", markersize=4)
        axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
        axis = figure.add_subplot(2, len(GAMES), len(GAMES) + i + 1, aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
        axis.plot(*ring(loss, r / 5, n=1000).T, ".", markersize=1)
        axis.plot(*CENTRES.T, "k+")
    figure.savefig(args.out, dpi=80)


if __name__ == "__main__":
    main()
