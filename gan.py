"""Generative adversarial networks: a generator G learns to fool a discriminator D, and D learns to
tell G's images from those of the data.

The weakness: the two networks do not descend on one common function. They may cycle for ever, one
of them may outrun the other, and G may fall onto a few images (it drops modes). No loss shows this.
The remedy here is that of R3GAN. Its relativistic loss asks D only that a real image scores higher
than the fake one that it is paired with, so G cannot win by a few images far away from the data.
Its penalties on D's gradient at real and at fake images (R1, R2) make training converge locally.
The classical losses are flags beside it. A warning names the step where the samples lose diversity.

Papers: GAN (Goodfellow 2014), relativistic pairing (Jolicoeur-Martineau 2019), R1 and R2 (Mescheder
2018), R3GAN (Huang 2024), WGAN-GP (Gulrajani 2017), spectral norm and the hinge loss (Miyato 2018),
projection (Miyato and Koyama 2018).
  losses of D and of G ................ LOSS_D, LOSS_G      R3GAN eq. 2, GAN eq. 1, WGAN-GP eq. 3
  R1 and R2 ........................... squared_gradient    Mescheder eqs. 9 and 10
  WGAN's penalty ...................... wgan_penalty        WGAN-GP eq. 3
  step of D, step of G ................ loss_d, loss_g      GAN alg. 1
  class-conditional D ................. Discriminator       projection eq. 3

  python gan.py                                             # digits, about a minute
  python gan.py --dataset mnist --minutes 10 --num-samples 10000
  python gan.py --dataset mnist --loss wgan-gp --out runs/gan-wgan
After --steps 10100, ten minutes of Zen 5, samples have a Frechet distance of 0.095 (docs/gan.md).
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

try:  # fused Triton kernels when this file sits beside kernels/, plain PyTorch otherwise
    from kernels.bias_act import bias_act
except ImportError:
    def bias_act(x, bias, slope=0.2, gain=2**0.5):
        return gain * F.leaky_relu(x + bias.to(x.dtype).view(-1, *(1,) * (x.dim() - 2)), slope)

# Further imports, and the helpers for data and runs (Data, Run, save_grid, ...), stand below, under "plumbing".


@dataclass
class Config:
    # model
    z_dim: int = 64  # numbers in the noise vector that G turns into an image (1 to 65536)
    width: int = 32  # channels of the convolutions of both networks (1 to 4096)
    blocks: int = 1  # residual blocks at each resolution (1 to 64)
    patch: int = 0  # pixels a side that are folded into channels; 0: 2, or 1 for images below 16 pixels (0 to 64)
    spectral_norm: bool = False  # divide each weight matrix of D, but for the classes, by its largest singular value
    # training
    loss: Literal["relativistic", "nonsaturating", "hinge", "wgan-gp", "minimax"] = "relativistic"  # LOSS_D and LOSS_G
    r1: float | None = None  # gamma in gamma/2 |grad D|^2 at real images; 0.5 for relativistic, else 0 (>= 0)
    r2: float | None = None  # the same at fake images (>= 0)
    anneal: int = 1000  # steps; r1 and r2 are multiplied by 1 + 9 exp(-step / anneal) (> 0)
    labels: bool = True  # condition on the class
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 500  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # evaluation and sampling, free to change on a trained model
    temperature: float = 1.0  # factor of the noise; a smaller one gives images nearer to that of zero noise (> 0)
    label: str | None = None  # sample this class only, by its name or number; else all in turn
    # core, the same in all six scripts
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, stacked_mnist, a folder of images or a FILE.npz
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (0 to 4096)
    batch_size: int = 64  # images a step, over all processes (1 to 65536)
    lr: float = 2e-3  # learning rate (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    ema: float = 0.15  # share of the run so far over which the weights are averaged, not a decay rate (> 0 to 0.5)
    init: str | None = None  # start from the weights of the run in this folder, of the same script and network
    # core, free to change on a trained model
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    eval_images: int = 0  # evaluate on the first so many test images, 0: on all (>= 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)


# ---- the maths: G and D are functions, G(z, y) -> images and D(x, y) -> scores, of a batch with classes y (B,)

# What D and G minimise, by --loss, from the scores of real and of fake images: (B,), (B,) -> (B,).
# A high score stands for a real image. softplus(-s) = -log sigmoid(s), softplus(s) = -log(1 - sigmoid(s)).
LOSS_D = {
    "relativistic": lambda real, fake: F.softplus(fake - real),  # R3GAN eq. 2
    "nonsaturating": lambda real, fake: F.softplus(-real) + F.softplus(fake),  # GAN eq. 1
    "minimax": lambda real, fake: F.softplus(-real) + F.softplus(fake),  # GAN eq. 1
    "hinge": lambda real, fake: F.relu(1 - real) + F.relu(1 + fake),  # Miyato 2018
    "wgan-gp": lambda real, fake: fake - real,  # WGAN-GP eq. 3; loss_d adds the penalty, and D gets one step, not five
}
LOSS_G = {
    "relativistic": lambda real, fake: F.softplus(real - fake),  # R3GAN eq. 2, real and fake exchanged
    "nonsaturating": lambda real, fake: F.softplus(-fake),  # GAN section 3
    "minimax": lambda real, fake: -F.softplus(fake),  # GAN eq. 1
    "hinge": lambda real, fake: -fake,  # Miyato 2018
    "wgan-gp": lambda real, fake: -fake,  # WGAN-GP alg. 1
}
WGAN_LAMBDA = 10  # lambda in WGAN-GP eq. 3


def squared_gradient(scores, x):
    """|grad D|^2 at each image, over all of C, H and W. scores (B,) of x (B,C,H,W) -> (B,)."""
    (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)  # each score depends on its own image alone
    return grad.square().sum((1, 2, 3))


def wgan_penalty(D, real, fake, y):
    """(|grad D| - 1)^2 at a random place on the line between each pair of a real and a fake image. -> (B,)"""
    place = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    x = torch.lerp(real, fake, place).requires_grad_()
    norm = (squared_gradient(D(x, y), x) + 1e-12).sqrt()
    return (norm - 1) ** 2


def loss_d(G, D, real, y, z, step, cfg):
    """What D minimises, (B,), and its terms by name. real (B,C,H,W) in [-1,1], z (B,z_dim). G gets no gradient."""
    with torch.no_grad():
        fake = G(z, y).to(real.dtype)  # float32 whatever --amp says, and so is D's gradient with respect to it
    real = real.detach().requires_grad_()
    fake = fake.requires_grad_()
    s_real = D(real, y)
    s_fake = D(fake, y)
    total = LOSS_D[cfg.loss](s_real, s_fake)
    terms = {"d_real": s_real, "d_fake": s_fake, "gap": s_real - s_fake}
    annealed = 1 + 9 * math.exp(-step / cfg.anneal)  # falls from 10 to 1
    if cfg.r1:
        terms["r1"] = squared_gradient(s_real, real)
        total = total + annealed * cfg.r1 / 2 * terms["r1"]  # Mescheder eq. 9
    if cfg.r2:
        terms["r2"] = squared_gradient(s_fake, fake)
        total = total + annealed * cfg.r2 / 2 * terms["r2"]  # Mescheder eq. 10
    if cfg.loss == "wgan-gp":
        terms["gp"] = wgan_penalty(D, real.detach(), fake.detach(), y)
        total = total + WGAN_LAMBDA * terms["gp"]  # WGAN-GP eq. 3
    return total, terms


def loss_g(G, D, real, y, z, cfg):
    """What G minimises, (B,). The caller switches off the gradient of D's weights."""
    s_fake = D(G(z, y), y)
    s_real = D(real, y) if cfg.loss == "relativistic" else None  # the other losses of G see no real images
    return LOSS_G[cfg.loss](s_real, s_fake)


@torch.no_grad()
def sample(G, z, y, temperature=1.0):
    """Images (B,C,H,W) in [-1,1] from noise z (B,z_dim), N(0, 1), and classes y (B,)."""
    return G(temperature * z, y).clamp(-1, 1)


# ---- the networks: patches, then residual blocks at each resolution; G goes up through the resolutions, D down


def resolutions(H, W, patch):
    """Sizes (rows, columns): first the number of patches, then halves of it, rounded up, until a side is 4 or less."""
    sizes = [(math.ceil(H / patch), math.ceil(W / patch))]
    while min(sizes[-1]) > 4:
        sizes.append(tuple(math.ceil(side / 2) for side in sizes[-1]))
    return sizes


def resize(x, size):
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear")


def conv(c_in, c_out, gain=1.0, kernel=3):
    """A convolution without bias. If the mean square of its input is 1, that of its output starts as gain^2."""
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(layer.weight, std=gain / (c_in * kernel**2) ** 0.5)
    return layer


class BiasAct(nn.Module):
    """sqrt(2) leaky_relu(x + bias), in one kernel where there is one."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return bias_act(x, self.bias)


class ResBlock(nn.Sequential):
    """x + branch(x). The branch has no normalisation but starts small instead, as in Fixup and R3GAN."""

    def __init__(self, width, norm):
        super().__init__(BiasAct(width), norm(conv(width, width)),
                         BiasAct(width), norm(conv(width, width, gain=0.1)))  # a spectral norm cancels the gain

    def forward(self, x):
        return x + super().forward(x)


def residual_blocks(cfg, norm=lambda layer: layer):
    return nn.Sequential(*(ResBlock(cfg.width, norm) for _ in range(cfg.blocks)))


class Generator(nn.Module):
    """Noise z (B,z_dim) and classes y (B,) -> images (B,C,H,W), roughly in [-1,1]. The last patches are cropped."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.patch = cfg.patch
        self.size = H, W
        self.sizes = resolutions(H, W, cfg.patch)[::-1]  # from the smallest up
        self.class_vector = nn.Embedding(max(classes, 1), cfg.z_dim)
        self.first = nn.Linear(2 * cfg.z_dim, cfg.width * math.prod(self.sizes[0]))
        self.levels = nn.ModuleList(residual_blocks(cfg) for _ in self.sizes)
        self.act = BiasAct(cfg.width)
        self.out = conv(cfg.width, channels * cfg.patch**2, kernel=1)

    def forward(self, z, y):
        h = self.first(torch.cat([z, self.class_vector(y)], 1))  # (B, rows * columns * width)
        h = h.unflatten(1, (*self.sizes[0], -1)).permute(0, 3, 1, 2)  # (B, width, rows, columns), channels last
        for size, level in zip(self.sizes, self.levels, strict=True):
            h = level(resize(h, size))  # (B, width, *size)
        H, W = self.size
        return F.pixel_shuffle(self.out(self.act(h)), self.patch)[..., :H, :W]


class Discriminator(nn.Module):
    """Images x (B,C,H,W) and classes y (B,) -> scores (B,), high where an image looks like a real one of its class."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        self.patch = cfg.patch
        self.sizes = resolutions(H, W, cfg.patch)  # from the largest down
        norm = spectral_norm if cfg.spectral_norm else lambda layer: layer
        self.stem = norm(conv(channels * cfg.patch**2, cfg.width, kernel=1))
        self.levels = nn.ModuleList(residual_blocks(cfg, norm) for _ in self.sizes)
        self.act = BiasAct(cfg.width)
        self.last = norm(nn.Linear(cfg.width * math.prod(self.sizes[-1]), cfg.width))
        self.act_last = BiasAct(cfg.width)
        self.out = norm(nn.Linear(cfg.width, 1))
        self.class_vector = nn.Embedding(max(classes, 1), cfg.width)

    def features(self, x):
        """phi(x) (B,width). The score is a linear function of it."""
        H, W = x.shape[2:]
        x = F.pad(x, (0, -W % self.patch, 0, -H % self.patch))  # to whole patches
        h = self.stem(F.pixel_unshuffle(x, self.patch))
        for size, level in zip(self.sizes, self.levels, strict=True):
            h = level(resize(h, size))  # (B, width, *size)
        h = self.act(h).permute(0, 2, 3, 1).flatten(1)  # (B, rows * columns * width), channels last
        return self.act_last(self.last(h))

    def forward(self, x, y):
        phi = self.features(x).to(self.class_vector.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):  # the losses see small differences of large scores
            return self.out(phi)[:, 0] + (phi * self.class_vector(y)).sum(1) / phi.shape[1] ** 0.5  # projection eq. 3, scaled


# ---- the detector of dropped modes

COLLAPSED = 0.5  # samples with less than this share of the data's diversity are called collapsed


def diversity(x):
    """Mean distance between two of n images or vectors (n,...), divided by their mean norm. A number, 0 for n = 1."""
    x = x.flatten(1).float().cpu()  # MPS has no pdist
    return (torch.pdist(x).mean() / x.norm(dim=1).mean().clamp(min=1e-6)).item() if len(x) > 1 else 0.0


def in_batches(f, *inputs):
    """f(*inputs), computed for some of the n images at once. inputs (n,...) -> (n,...)"""
    size = at_once(inputs[0][0].shape)
    parts = zip(*(x.split(size) for x in inputs), strict=True)
    return torch.cat([f(*part) for part in parts])


@torch.no_grad()
def relative_diversity(D, fake, real):
    """Diversity of fake images divided by that of real ones, (n,C,H,W) in [-1,1]: in pixels, and in D's features."""
    def ratio(fake, real):
        of_real = diversity(real)
        return diversity(fake) / of_real if of_real else 1.0  # a single real image has no diversity to compare with

    return {"diversity": ratio(fake + 1, real + 1),  # + 1, so that the norm is the distance from a black image
            "feature_diversity": ratio(in_batches(D.features, fake), in_batches(D.features, real))}


def warn_if_collapsed(before, now, step, run):
    """Say it on stderr where one of the relative diversities falls below COLLAPSED."""
    for name, share in now.items():
        if share < COLLAPSED <= before.get(name, 0) and run.rank == 0:
            what = f"the samples' {name.replace('_', ' ')} fell to {100 * share:.0f} % of the data's"
            run.bar.write(f"warning: step {step}: {what}", sys.stderr)


# ---- the loops


def train(data, cfg, run):
    """GAN alg. 1, with one step of D for each step of G. No schedule depends on where the run ends."""
    G, D = (network.to(run.device) for network in build(run.shape, run.classes, cfg))
    ema = copy.deepcopy(G).eval().requires_grad_(False)  # the average of G's weights; G has no buffers
    opt_d = torch.optim.Adam(D.parameters(), cfg.lr, betas=(0.0, 0.99), fused=True)
    opt_g = torch.optim.Adam(G.parameters(), cfg.lr, betas=(0.0, 0.99), fused=True)
    parts = {"generator": G, "discriminator": D, "ema_generator": ema, "optimizer_d": opt_d, "optimizer_g": opt_g}
    fast_g = torch.compile(G) if cfg.compile else G
    fast_d = torch.compile(D) if cfg.compile else D
    # Penalties differentiate D twice, which compiled code does not support.
    d_for_penalty = D if cfg.r1 or cfg.r2 or cfg.loss == "wgan-gp" else fast_d
    # The detector compares 64 images from fixed noise with 64 images of the data.
    fixed_z = torch.randn(64, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    fixed_y = torch.arange(64, device=run.device) % max(run.classes, 1)
    fixed_real = data.train[:64].to(run.device) / 127.5 - 1
    shares = {}
    for step in run.steps(parts, preview=lambda: generate(ema, run.labels(80), cfg, run)):
        if not shares or step % cfg.log_every == 0:
            before = shares
            D.eval()  # in training mode, spectral_norm changes its buffers at each call
            shares = relative_diversity(D, sample(ema, fixed_z, fixed_y), fixed_real)
            D.train()
            warn_if_collapsed(before, shares, step, run)
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        opt_d.param_groups[0]["lr"] = opt_g.param_groups[0]["lr"] = lr
        x, y = run.batch(data)
        x = x / 127.5 - 1  # [-1,1]

        z = torch.randn(len(x), cfg.z_dim, device=run.device)  # the step of D
        with run.autocast():
            total, terms = loss_d(fast_g, d_for_penalty, x, y, z, step, cfg)
            total_d = total.mean()
        norm_d = run.update(total_d, D, opt_d)

        z = torch.randn(len(x), cfg.z_dim, device=run.device)  # the step of G, of other noise
        D.requires_grad_(False)
        with run.autocast():
            total_g = loss_g(fast_g, fast_d, x, y, z, cfg).mean()
        norm_g = run.update(total_g, G, opt_g)
        D.requires_grad_(True)
        update_ema(ema, G, step, cfg.ema)
        means = {name: term.mean() for name, term in terms.items()}
        run.log(loss=total_g, loss_d=total_d, **means, grad_norm_d=norm_d, grad_norm_g=norm_g, **shares, lr=lr)


@torch.no_grad()
def evaluate(G, D, data, cfg, run):
    """For as many samples as test images, at most 1,000: relative diversity, D's mean scores (of train images too)."""
    n = min(len(data.test), 1000)
    labels = torch.arange(n) % max(run.classes, 1)  # all classes, whatever --label says
    samples = generate(G, labels, cfg, run)
    train, test, fake = (x.to(run.device) / 127.5 - 1 for x in (data.train[:n], data.test[:n], samples))  # [-1,1]
    metrics = {f"test_{name}": share for name, share in relative_diversity(D, fake, test).items()}
    # D knows the train images by heart if it scores them far above test images.
    for name, x, y in (("train", train, data.train_labels), ("test", test, data.test_labels), ("fake", fake, labels)):
        metrics[f"test_d_{name}"] = in_batches(D, x, y[:n].to(run.device)).mean().item()
    return metrics


def generate(G, labels, cfg, run):
    """Images (n,C,H,W) uint8 of these classes (n,), from the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    images = []
    for y in progress(labels.split(at_once((3, *G.size))), "sampling"):
        z = torch.randn(len(y), cfg.z_dim, generator=generator).to(run.device)
        images.append(to_uint8(sample(G, z, y.to(run.device), cfg.temperature)))
    return torch.cat(images)


# ---- extras: a grid to look at, and a data set with 1,000 known modes


def interpolations(G, cfg, run):
    """100 images (100,C,H,W) uint8: each row of ten leads from one noise vector to another, within one class."""
    z = torch.randn(2, 10, 1, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    angle = torch.linspace(0, math.pi / 2, 10, device=run.device)[:, None]
    z = torch.cos(angle) * z[0] + torch.sin(angle) * z[1]  # (10, 10, z_dim), from N(0, 1) at each angle
    y = run.labels(10).repeat_interleave(10).to(run.device)
    return to_uint8(sample(G, z.flatten(0, 1), y, cfg.temperature))


def stack(data):
    """Stacked MNIST: three digits, drawn once and for all, are the channels of one image. 10^3 modes, no labels."""
    rng = np.random.default_rng(0)
    parts = []
    for images in (data.train, data.test):
        index = torch.from_numpy(rng.integers(len(images), size=(3, len(images))))
        parts += [torch.cat([images[i] for i in index], 1), torch.zeros(len(images), dtype=torch.long)]
    return Data(*parts)


# ======== plumbing, byte-identical in all six scripts (python tools/sync.py): nothing about the model is in it ========

import argparse
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import os
import re
import signal
import sys
import tarfile
import time
import zipfile
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import get_args, get_origin
from urllib.request import urlopen

import torch.distributed as dist
from PIL import ImageOps
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SHA256 = {  # the first digits of each file's hash: of what an IDX file holds, of the archive itself
    "mnist": dict(zip(IDX, "ba891046e6505d7a 65a50cbbf4e906d7 0fa7898d509279e4 ff7bcfd416de3373".split(), strict=True)),
    "fashion_mnist": dict(zip(IDX, "c59f468a2f672dc8 bad3541b69d91243 5b4141f0afbad91e 0402a96d92fd2663".split(), strict=True)),
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a"},
}
MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
TORCHVISION = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "cifar10": "."}  # its folders under --data-dir
TIMEOUT = 20  # seconds a mirror may stay silent
LOCKS = {}  # of the folders that this process writes to
# images (N,C,H,W) uint8; labels (N,) int64; the names of the classes, () where all labels are 0; what else is to be said
Data = namedtuple("Data", "train train_labels test test_labels names note", defaults=((), ""))


def fail(message, code=2):
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever an exception's text holds
    raise SystemExit(code)


def progress(items=None, what=None, **more):
    """A bar on a terminal, elsewhere a line a minute."""
    bar = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
    often = {"bar_format": bar} if sys.stderr.isatty() else {"bar_format": bar + "\n", "mininterval": 60, "delay": 60}
    return tqdm(items, what, miniters=0, **often | more)


def fetch(name, file, data_dir):
    """The content of one file of a data set, checked by SHA-256: from the disk, else from the first good mirror."""
    packed = file.removesuffix(".gz") + ".gz"
    target = Path(data_dir, name, packed).absolute()
    folders = (target.parent, Path(data_dir, TORCHVISION[name]).absolute(), Path("/usr/share/datasets", name.replace("_", "-")))
    disk = [(folder / f).as_uri() for folder in folders for f in (packed, file) if (folder / f).exists()]
    tried = [f"{path} (a pickle is not read)" for folder in folders for path in folder.glob("cifar-10-python.tar.gz")]
    for url in (*disk, *(mirror + packed for mirror in MIRRORS[name])):
        try:
            with urlopen(url, timeout=TIMEOUT) as f, tqdm.wrapattr(f, "read", desc=packed, disable=None) as stream:
                raw = b"".join(iter(partial(stream.read, 1 << 16), b""))
            content = gzip.decompress(raw) if url.endswith(f"{file}.gz") else raw
            if not hashlib.sha256(content).hexdigest().startswith(SHA256[name][file]):
                raise ValueError("wrong SHA-256")
            if url not in disk:
                write(target, lambda f, raw=raw: f.write(raw))
            return content
        except Exception as e:  # whatever a mirror sends, or a disk holds: the next may be good
            tried.append(f"{url.removeprefix('file://')} ({e or type(e).__name__})")
    fail(f"no good copy of {target}: tried {', '.join(tried)}; put it there, or use --dataset digits (no download)", 1)


def in_threads(function, items, what):
    """function of each item, in their order, on all cores, with a bar; 256 at a time, so that few results wait."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = (result for i in range(0, len(items), 256) for result in pool.map(function, items[i:i + 256]))
        yield from progress(results, what, total=len(items))


def read_image(path, size=None, peak=None):
    """An image file in mode L or RGB: upright, over white, of more than 8 bits divided by `peak`, cropped to size (W, H)."""
    image = Image.open(path)
    image.draft(None, size and (2 * max(size), 2 * max(size)))  # a JPEG is decoded smaller, to no less than twice the size
    if image.mode[0] not in "IF" and ";16" in str(image.tile) and not image.getbbox():  # Pillow keeps the high bytes
        raise ValueError("its 16-bit colours are all below 256; save it with 8 bits")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":  # more than 8 bits
        pixels = np.asarray(image, np.float64)
        if not np.isfinite(pixels.max()):
            raise ValueError("pixels that are not finite")
        image = Image.fromarray((255 * pixels / (peak or pixels.max() or 1)).round().clip(0, 255).astype(np.uint8))
    mode = "L" if Image.getmodebase(image.mode) == "L" else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == mode else image.convert(mode)
    return ImageOps.fit(image, size) if size else image


def load_folder(root, side):
    """Images at any depth, in classes by the folder under the root, or under its train/ and test/ or val/ if it has both."""
    known = Image.registered_extensions().keys() | {".heic", ".heif", ".avif", ".jxl"}  # some need a plug-in
    found = []
    walked = set()
    for top, folders, names in os.walk(root, followlinks=True):
        if os.path.realpath(top) in walked:
            folders.clear()  # a link leads back here: no further
        else:
            walked.add(os.path.realpath(top))
            found += [Path(top, f).relative_to(root) for f in names]
    found = sorted(f for f in found if f.suffix.lower() in known and not any(part.startswith(".") for part in f.parts))
    found = [found[i] for i in np.random.RandomState(0).permutation(len(found))]  # so that the first n are of all classes
    test = next((name for name in ("test", "val") if {"train", name} <= {f.parts[0] for f in found}), None)
    files = [f for part in ("train", test) for f in found if f.parts[0] == part] if test else found
    modes = set()
    peaks = [0]

    def look(f):
        with contextlib.suppress(Exception), Image.open(root / f) as image:  # what cannot be read is named below
            modes.add(Image.getmodebase(image.mode))
            if image.mode[0] in "IF" and np.isfinite(top := np.asarray(image).max()):
                peaks.append(top)
            if side:
                return side, side
            turned = image.getexif().get(274, 1) >= 5  # by a quarter, says EXIF
            return image.size[::-1] if turned else image.size

    def read(i):
        try:
            x[i] = np.atleast_3d(read_image(root / files[i], size, peak).convert(mode))
        except Exception as e:  # whatever a decoder raises
            return f"{root / files[i]} ({e})"

    sizes = Counter(in_threads(look, files, "looking at images"))
    del sizes[None]
    peak = max(peaks)
    size = max(sizes, key=sizes.get, default=(1, 1))  # the commonest
    if max(size) > 128 and not side:
        fail(f"--dataset {root}: images of {size[0]} x {size[1]} pixels are too large as they are; add --image-size 64")
    mode = "L" if modes <= {"L"} else "RGB"
    x = np.empty((len(files), *size[::-1], len(mode)), np.uint8)
    kept = []
    skipped = []
    for i, error in enumerate(in_threads(read, range(len(files)), "reading images")):
        if error:
            skipped.append(error)
        else:
            x[len(kept)] = x[i]  # without a gap, and without a copy of the whole
            kept.append(files[i])
    if skipped:
        print(f"skipped {len(skipped)} images that cannot be read:", *"; ".join(skipped[:10]).split(), file=sys.stderr)
    n = sum(f.parts[0] == test for f in kept) if test else -(-len(kept) // 10)
    if not 0 < n < len(kept):
        fail(f"--dataset {root}: {len(kept)} readable images, {n} of them to test on; at least 2 are needed, 1 to test on")
    folders = ["".join(f.parts[bool(test):-1][:1]) for f in kept]
    names = sorted(set(folders)) if all(folders) and len(set(folders)) > 1 else []
    y = torch.tensor([names.index(folder) if names else 0 for folder in folders])
    x = torch.from_numpy(x[:len(kept)]).permute(0, 3, 1, 2)
    odd = {"skipped": len(skipped), "cropped": sizes.total() - sizes[size], "in unused folders": len(found) - len(files)}
    note = "".join(f"; {count} {what}" for what, count in odd.items() if count)
    return Data(x[:-n], y[:-n], x[-n:], y[-n:], tuple(names), note)


def load_npz(path):
    """What np.savez wrote: images uint8 (N,H,W) or (N,H,W,C), maybe labels (N,), test_images, test_labels, names of classes."""
    try:
        zipfile.ZipFile(path).close()  # numpy takes what is none for a pickle
        with np.load(path, allow_pickle=False) as file:
            parts = []
            for part in ("", "test_") if {"test_images", "test_labels"} & {*file} else ("",):
                x = file[f"{part}images"]
                y = file[f"{part}labels"] if {"labels", "test_labels"} & {*file} else np.zeros(len(x), int)
                if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[3:] not in ((), (1,), (3,)) or x.size == 0:
                    raise ValueError(f"{part}images are {x.dtype} {x.shape}, not uint8 (N,H,W) or (N,H,W,C) with C 1 or 3")
                if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 65535:
                    raise ValueError(f"{part}labels are {y.dtype} {y.shape}, not {len(x)} integers from 0 to 65535")
                parts += [np.moveaxis(x.reshape(*x.shape[:3], -1), 3, 1), y.astype(np.int64)]
            classes = 1 + max(y.max() for y in parts[1::2])
            names = np.ravel(file["names"] if "names" in file else range(classes)).astype(str).tolist()
        if len(parts) == 2:  # as of a folder: mixed, which needs no second copy in memory, and a tenth held out
            n = -(-len(y) // 10)
            for part in parts:
                np.random.RandomState(0).shuffle(part)
            parts = [*(part[:-n] for part in parts), *(part[-n:] for part in parts)]
        if not len(parts[0]) or parts[0].shape[1:] != parts[2].shape[1:] or len(names) < classes:
            raise ValueError("at least 2 images are needed, test_images of the shape of images, and a name for each label")
        return parts, tuple(names) if classes > 1 else ()
    except Exception as e:  # whatever a damaged file raises
        fail(f"--dataset {path}: {str(e) or type(e).__name__}")


def load_data(name, data_dir, image_size=0):
    """digits, mnist, fashion_mnist, cifar10, a folder of images or a FILE.npz, whole in memory."""
    names = tuple("0123456789")
    if name == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(1797)
        x = np.round(digits.images[order, None] * 255 / 16).astype(np.uint8)
        y = digits.target[order]
        parts = (x[297:], y[297:], x[:297], y[:297])
    elif name in ("mnist", "fashion_mnist"):
        raw = [np.frombuffer(fetch(name, file, data_dir), np.uint8) for file in IDX]
        parts = [part[8:] if i % 2 else part[16:].reshape(-1, 1, 28, 28) for i, part in enumerate(raw)]
    elif name == "cifar10":
        archive = tarfile.open(fileobj=io.BytesIO(fetch(name, "cifar-10-binary.tar.gz", data_dir)))
        files = sorted(f for f in archive.getnames() if f.endswith(".bin"))  # data_batch_1 to 5, test_batch
        rows = np.frombuffer(b"".join(archive.extractfile(f).read() for f in files), np.uint8).reshape(-1, 3073)
        x = rows[:, 1:].reshape(-1, 3, 32, 32)
        parts = (x[:50_000], rows[:50_000, 0], x[50_000:], rows[50_000:, 0])
    elif name and Path(name).is_dir():
        return load_folder(Path(name), image_size)
    elif name.endswith(".npz") and Path(name).is_file():
        parts, names = load_npz(name)
    else:
        fail(f"--dataset {name}: neither digits, mnist, fashion_mnist nor cifar10, nor a folder or a FILE.npz")
    x, y, x_test, y_test = (torch.from_numpy(np.require(part, requirements="W")) for part in parts)
    H, W = x.shape[2:]
    if image_size and (H, W) != (image_size, image_size):
        S = min(H, W)  # a square at the centre
        square = (..., slice((H - S) // 2, (H + S) // 2), slice((W - S) // 2, (W + S) // 2))
        x, x_test = (F.interpolate(part[square], (image_size,) * 2, mode="bilinear", antialias=True) for part in (x, x_test))
    elif max(H, W) > 128 and not image_size:
        fail(f"--dataset {name}: images of {W} x {H} pixels are too large as they are; add --image-size 64")
    return Data(x, y.long(), x_test, y_test.long(), names)


def parse_args(argv=None):
    """The command line -> the config, and the checkpoint that the run goes on from, {} for a new one.

    A field of Config is a flag; its comment is the help, and a bound in it is checked; a comment of its own begins a group.
    What no flag says is taken from the checkpoint, from which only fields of a group "free to change" may differ.
    """
    comments = {}
    groups = {}
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--flag value] ...", allow_abbrev=False,
                                     formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=100))
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    for heading, name, comment in re.findall(r"^    (?:# (.*)|(\w+): .*?  # (.*))$", inspect.getsource(Config), re.M):
        if heading:
            section = parser.add_argument_group(heading)
            continue
        comments[name] = comment
        groups[name] = section.title
        field = Config.__dataclass_fields__[name]
        kind = (*get_args(field.type), field.type)[0]  # int of int | None and of tuple[int, ...]
        if get_origin(field.type) is Literal:
            options = {"choices": get_args(field.type)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"type": os.path.expanduser if kind is str else kind, "metavar": kind.__name__}
            if get_origin(field.type) is tuple:
                options["nargs"] = "+" if ... in get_args(field.type) else len(get_args(field.type))
        text = f"{comment} [{field.default}]".replace("%", "%%")
        section.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if bound := re.search(r"\((>=?)? ?(-?[\d.]+)(?: to ([\d.]+))?\)", comments[name]):
            sign, low, high = bound.groups()
            for v in value if isinstance(value, tuple) else [value]:
                most = float(high or (2**31 - 1 if isinstance(v, int) else np.finfo(np.float32).max))
                if not float(low) <= v <= most or sign == ">" and v == float(low):
                    fail(f"--{name.replace('_', '-')}: {v}: must be {sign or 'from'} {low} to {most:.10g}: {comments[name]}")
    cfg = Config(**given)
    cfg.out = cfg.out or f"runs/{Path(__file__).stem}-{Path(cfg.dataset).resolve().name}"
    saved = {}
    path = Path(cfg.out, "checkpoint.pt")
    lock(path.parent)
    if cfg.mode != "train" or cfg.resume and path.exists():
        old, saved = read_run(cfg.out)
        for name, value in given.items():
            if value != getattr(old, name) and "free to change" not in groups[name]:
                fail(f"--{name.replace('_', '-')} {value}: the run in {path} has {getattr(old, name)}")
        once = ["mode", "resume", "overwrite"]  # these have their defaults again, where no flag says them
        if cfg.steps or cfg.minutes:  # a new budget replaces the old one
            once += ["steps", "minutes"]
        if cfg.mode != "train":  # so does what the training was asked to show besides samples, of whichever --label
            once += [name for name, group in groups.items() if group[:4] == "eval" and getattr(Config, name) in (None, "no")]
        kept = {name: value for name, value in vars(old).items() if name not in once or name == "label"}
        cfg = Config(**kept | given | {"out": cfg.out})
    elif not cfg.overwrite and path.parent.is_dir() and any(f.suffix != ".part" for f in path.parent.iterdir()):
        fail(f"--out {cfg.out}: is not empty; --resume continues a run from its checkpoint.pt, --overwrite replaces it")
    elif cfg.resume:
        print(f"--resume: there is no {path} yet, so the run starts")
    if not cfg.steps and not cfg.minutes:
        cfg.steps = 2000
    return cfg, saved


def lock(folder):
    """Refuse a run's folder that another process writes to, until this one ends."""
    try:
        import fcntl
        if folder not in LOCKS and os.environ.get("RANK", "0") == "0":
            LOCKS[folder] = os.open(folder, os.O_RDONLY)
            fcntl.flock(LOCKS[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"--out {folder}: another process is writing to it")
    except (ImportError, OSError):  # Windows, a file system without locks, or no folder
        pass


def read_run(folder):
    """The config and the checkpoint of the run in a folder; what is damaged, not finite or not of this script is refused."""
    path = Path(folder, "checkpoint.pt")
    script = Path(__file__).stem
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        saved = dict(torch.load(path, map_location="cpu", weights_only=True))  # runs nothing that a file may hold
        if (saved["format"], saved["script"]) != (2, script):
            raise ValueError(f"is of {saved['script']}.py in format {saved['format']}, not of {script}.py in format 2")
        if fields := saved["config"].keys() ^ Config.__dataclass_fields__.keys():
            raise ValueError(f"of another version, whose config differs in {', '.join(sorted(fields))}")
        if not all(torch.as_tensor(v).isfinite().all() for v in tree_leaves(saved) if isinstance(v, (float, torch.Tensor))):
            raise ValueError("holds numbers that are not finite")
        kinds = {"facts": dict, "step": int, "seconds": (int, float), "log_size": int}
        if odd := [name for name, kind in kinds.items() if not isinstance(saved[name], kind)]:
            raise ValueError(f"its {', '.join(odd)} cannot be read")
        return Config(**saved["config"]), saved
    except Exception as e:  # whatever a missing, damaged or hostile file raises
        fail(f"{path}: is not a checkpoint to go on from: {type(e).__name__}: {(str(e) or '-').splitlines()[0][:200]}")


def restore(parts, saved, folder):
    """Load each named part of a checkpoint; one that is missing, or of other shapes, is named."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
            matrices = set(part.param_groups[1]["params"]) if isinstance(part, Muon) else ()
            for p, state in part.state.items() if isinstance(part, torch.optim.Optimizer) else ():
                adam = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                wanted = {"exp_avg": p.shape} if p in matrices else adam
                if {key: v.shape for key, v in state.items()} != wanted:
                    raise ValueError("the optimizer's moments are not there or of other shapes")  # PyTorch does not look
        except Exception as e:
            fail(f"{Path(folder, 'checkpoint.pt')}: its {name} does not fit: {e!r:.300}")


def write(path, save, what=None):
    """save(file) under a temporary name, flushed to disk, then renamed: at any moment path is whole, old or new."""
    part = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            save(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror or e}", 1)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    if what:
        print(f"{path}: {what}")


def save_grid(images, path, columns=10, what=None):
    """Images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged."""
    columns = min(columns, len(images))
    rows = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)  # (rows*(H+2), columns*(W+2)[, C])
    image = ImageOps.scale(Image.fromarray(grid.numpy()), max(1, 56 // max(images.shape[2:])), Image.NEAREST)
    write(path, lambda f: image.save(f, "png"), what)


def save_images(images, path, labels=None, how=""):
    """Images (N,C,H,W) uint8 as an .npz of images (N,H,W,C), and of labels (N,) where they have some."""
    arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    what = f"{len(images)} images, uint8 of (N,H,W,C){' and their labels' * (labels is not None)}{how}"
    write(path, lambda f: np.savez_compressed(f, **arrays), what)


def to_uint8(x):
    """[-1,1] -> {0..255} on the CPU"""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()


def at_once(shape, values=3072):
    """Images (C,H,W) to evaluate or sample at once, whatever --batch-size is: 250, fewer where they have more values."""
    return max(min(250, 250 * values // math.prod(shape)), 1)


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights by the power profile of Karras et al. 2024, eq. 127; share is their 1 / (gamma + 1)."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def orthogonal(m):
    """Nearly the orthogonal matrices next to m (n,rows,columns): singular values from 0.7 to 1.2.

    Five steps of Newton-Schulz, x <- p x with p = 3.4445 - 4.775 s + 2.0315 s^2 and s = x x', all of them on s alone.
    """
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    one = torch.eye(x.shape[1]).to(x)
    s = x @ x.mT
    q = one
    for _ in range(5):
        p = 3.4445 * one + (2.0315 * s - 4.775 * one) @ s
        q = p @ q
        s = p @ s @ p
    return (q @ x).mT if tall else q @ x


class Muon(torch.optim.Adam):
    """Adam, but the matrices of `inside`, parts of the model, move by their momentum made orthogonal (Jordan 2024).

    A factor makes that step about as large as Adam's, so both have one learning rate (Liu et al. 2025, eq. 4). The kernels
    of a convolution are a matrix with a row for each output. torch.optim.Muon multiplies in bfloat16, slow on most CPUs.
    """

    def __init__(self, model, inside, lr, betas):
        matrices = [p for part in inside for p in part.parameters() if p.ndim > 1]
        taken = set(matrices)
        others = [p for p in model.parameters() if p not in taken]
        super().__init__([{"params": others}, {"params": matrices}], lr, betas, fused=True)
        self._step_supports_amp_scaling = False  # the scaler of fp16 itself leaves out a step

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's wants three numbers of every parameter

    @torch.no_grad()
    def step(self):
        shapes = defaultdict(list)  # matrices of one shape are multiplied together
        for p in self.param_groups[1]["params"]:
            if p.grad is not None:
                shapes[p.shape].append(p)
        for shape, params in shapes.items():
            grads = [p.grad for p in params]
            momenta = [self.state[p].setdefault("exp_avg", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(momenta, grads, 0.05)
            ahead = torch.stack(torch._foreach_lerp(grads, momenta, 0.95)).flatten(2)  # Nesterov's momentum
            size = self.param_groups[0]["lr"] * 0.2 * max(ahead.shape[1:]) ** 0.5
            torch._foreach_add_(params, list((-size * orthogonal(ahead)).unflatten(2, shape[1:])))
            for p in params:
                p.grad = None  # Adam leaves it alone
        super().step()


@lru_cache(maxsize=4)
def shuffle(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class Deaf(contextlib.suppress, contextlib.ContextDecorator):
    """Deaf(errors)(call) is call, but these errors of it end nothing: a training outlives whoever reads what it prints."""


def on_signal(number, frame):
    """A stop signal ends the program: in training after the step under way, else at once. A second one always at once."""
    if Run.signal == number or Run.signal and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun adds a SIGTERM of its own
        os._exit(128 + number)
    Run.signal = Run.signal or number
    if not Run.stepping:
        fail(f"stopped by {signal.Signals(number).name}; --resume continues {Run.out}", 128 + number)
    print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr)


def launch(main):
    """main() as a program: stop signals are heard, and what the machine refuses (files, memory, kernels) is one line."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    deaf = Deaf(OSError, RuntimeError)  # the second: a signal's words within others
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write = deaf(stream.write)
        stream.flush = deaf(stream.flush)
    Run.stepping = False
    numbers = {n for n in signal.valid_signals() if n in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None))}
    before = {n: signal.signal(n, on_signal) for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN}
    try:
        main()
        if Run.signal:  # its exception was lost in a library
            sys.exit(128 + Run.signal)
    except OSError as e:
        fail(f"{e.filename or Path(__file__).stem}: {e.strerror or e}", 1)
    except (MemoryError, RuntimeError) as e:
        if "kernels.mode" in str(e):
            fail(f"--kernels: {e}")
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            fail(f"another process cannot be reached; --resume continues {Run.out} ({e!r:.160})", 1)
        if not re.search("MemoryError|allocate memory|overflowed", repr(e)):
            raise
        fail(f"out of memory, a smaller --batch-size or --width helps ({(str(e) or 'no more').splitlines()[0]})", 1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        Run.signal = 0  # main() may be called again, without launch()
        while LOCKS:
            os.close(LOCKS.popitem()[1])
        if dist.is_initialized():
            dist.destroy_process_group()


class Run:
    """A run's folder, clock, log and processes. What is random in a step follows from (seed, step, rank) alone."""

    signal = 0  # the stop signal that has come
    stepping = False  # whether it waits for the end of a step
    out = "the run"

    def __init__(self, cfg, saved):
        self.cfg = cfg
        self.saved = saved
        self.sums = Counter()
        self.out = Run.out = Path(cfg.out)
        self.folder = self.out / "sampled" if cfg.mode == "sample" else self.out  # of results
        self.step, self.seconds, self.log_size = (saved.get(name, 0) for name in ("step", "seconds", "log_size"))
        vars(self).update(saved.get("facts", {}))  # shape, classes, names and train_images of the data
        self.rank, local, self.world = (int(os.environ.get(*of)) for of in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
        mps = torch.backends.mps.is_available() and self.world == 1  # gloo has no tensors of MPS
        there = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
        kind = there[0] if cfg.device == "auto" else cfg.device
        if kind not in there:
            fail(f"--device {kind}: not available here, there is {', '.join(there)}")
        if cfg.batch_size % self.world:
            fail(f"--batch-size {cfg.batch_size}: cannot be split over {self.world} processes")
        mode = os.environ.get("M2_KERNELS", "auto") if cfg.kernels == "auto" else cfg.kernels
        try:
            import kernels
            kernels.choose(mode, kind)
        except (ImportError, AttributeError):  # PyPI has an unrelated package of this name
            if mode == "triton":
                fail("--kernels triton: the folder kernels/ is not beside this script")
        torch.set_flush_denormal(True)  # numbers below 1e-38 become 0: some CPUs compute with them many times slower
        self.device = torch.device(f"cuda:{local}" if kind == "cuda" else kind)
        if self.world > 1 and not dist.is_initialized():
            # loaded later, as an optimizer does, it would hold the group, whose threads would then outlive the program
            import torch.distributed.nn as _  # noqa: F401
            if kind == "cuda":
                torch.cuda.set_device(local)
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        dtype = torch.float16 if cfg.amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, kind, dtype, enabled=cfg.amp != "off")
        self.scaler = torch.amp.GradScaler(kind, enabled=cfg.amp == "fp16")
        torch.manual_seed(cfg.seed)  # of the weights that the networks start from

    def describe(self, data, labels=True):
        """Say what the data is, which must be the checkpoint's -> data, cut as --no-labels and --eval-images want it."""
        names = f"{len(data.names)} classes{'' if labels else ' (not used)'}: {', '.join(data.names[:20])}"
        names = names + ", ..." * (len(data.names) > 20) if data.names else "no classes"
        if not labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, names=())
        facts = {"shape": list(data.train.shape[1:]), "classes": len(data.names), "names": list(data.names)}
        facts["train_images"] = len(data.train)
        if self.saved and self.saved["facts"] != facts:
            fail(f"--dataset {self.cfg.dataset}: is {facts}, the run in {self.out} had {self.saved['facts']}")
        self.facts = facts
        vars(self).update(facts)
        self.labels(1)
        total = len(data.test)
        n = min(self.cfg.eval_images or total, total)
        self.tested = f"{f'the first {n} of' if n < total else 'all'} {total} test images"
        if self.rank == 0:
            print(f"{self.cfg.dataset}: {len(data.train)} images to train on, {total} to test on, of "
                  f"{' x '.join(map(str, self.shape))}; {names}{data.note}")
        return data._replace(test=data.test[:n], test_labels=data.test_labels[:n])

    def labels(self, n):
        """The classes (n,) to sample: all in turn, or --label by its name or number."""
        label = getattr(self.cfg, "label", None)
        if label is None:
            return torch.arange(n) % max(self.classes, 1)
        known = self.names + [str(i) for i in range(self.classes)]
        if label not in known:
            fail(f"--label {label}: the model knows {self.classes} classes: {', '.join(self.names)}")
        return torch.full((n,), known.index(label) % self.classes)

    def begin(self, parts):
        """Restore the parts, or start from --init; save; only then clear away what is not of this run."""
        if self.saved:
            restore(parts, self.saved, self.out)
        elif self.cfg.init:
            _, other = read_run(self.cfg.init)
            for name, net in ((name, part) for name, part in parts.items() if isinstance(part, nn.Module)):
                theirs = other.get(f"ema_{name.removeprefix('ema_')}") or other.get(name, {})  # averaged, where it is
                ours = net.state_dict()
                fits = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
                net.load_state_dict(fits, strict=False)
                paths = {key: [*accumulate(key.split("."), "{}.{}".format)] for key in ours.keys() | theirs.keys()}
                fitting = {module for key in fits for module in paths[key]}  # in which something fits
                odd = sorted({next(m for m in paths[key] if m not in fitting) for key in paths.keys() - fits.keys()})
                but = f", but for what does not fit: {', '.join(odd)}" * bool(odd)
                print(f"--init {self.cfg.init}: {name} starts from its weights{but}")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            lock(self.out)
            self.save(parts)  # what cannot be written is found before any training
            stale = [f for f in self.out.glob("samples/step_*.png") if f.stem[5:].zfill(12) > f"{self.step:012d}"]
            if not self.saved:  # of the run that is overwritten
                stale += [folder / f"samples.{kind}" for folder in (self.out, self.out / "sampled") for kind in ("npz", "png")]
            for path in (*stale, *self.out.glob("*.[0-9]*.part"), *self.out.glob("s*/*.[0-9]*.part")):
                path.unlink(missing_ok=True)
            with open(self.out / "metrics.jsonl", "ab") as f:  # lines beyond the checkpoint are written again
                f.truncate(min(f.tell(), self.log_size))
            write(self.out / "config.json", lambda f: f.write(json.dumps(vars(self.cfg) | self.facts, indent=1).encode()))
            print(f"{self.out}: settings in config.json, log in metrics.jsonl, state in checkpoint.pt, images in samples.png, "
                  "grids of the training in samples/")
            if self.step >= (self.cfg.steps or math.inf):
                print(f"step {self.step}: --steps {self.cfg.steps} leaves nothing to train")
        self.saved = None
        self.start = time.monotonic() - self.seconds

    def save(self, parts):
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"format": 2, "script": Path(__file__).stem, "config": vars(self.cfg), "facts": self.facts}
            state |= {name: getattr(self, name) for name in ("step", "seconds", "log_size")}
            torch.save(state, buffer := io.BytesIO())
            write(self.out / "checkpoint.pt", lambda f: f.write(buffer.getbuffer()))

    def steps(self, parts, preview, until=math.inf):
        """Yield step after step until --steps, --minutes, `until` or a stop signal; self.step counts the one under way as done.

        Parts are restored before and saved meanwhile; after a save preview() -> images (N,C,H,W) uint8 is the newest grid.
        """
        parts = parts | {"scaler": self.scaler}
        if self.saved is not None:
            self.begin(parts)
        Run.stepping = True
        with progress(what=Path(__file__).stem, total=100, disable=self.rank > 0) as self.bar:
            while True:
                state = torch.tensor([time.monotonic() - self.start, Run.signal], dtype=torch.float64)
                if self.world > 1:  # all processes stop at the same step
                    state = state.to(self.device)
                    dist.all_reduce(state, dist.ReduceOp.MAX)
                self.seconds, number = state.tolist()
                self.done = max(self.step / (self.cfg.steps or math.inf), self.seconds / 60 / (self.cfg.minutes or math.inf))
                self.bar.update(100 * min(self.done, 1) - self.bar.n)
                self.over = number > 0 or self.done >= 1
                if self.over or self.step >= until:
                    break
                torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]))
                self.step += 1
                yield self.step - 1
                if self.step % self.cfg.save_every == 0:
                    self.save(parts)
                    if self.rank == 0 and not Run.signal:
                        Run.stepping = self.world > 1  # one process need not wait for the grid
                        images = preview()
                        save_grid(images, self.out / f"samples/step_{self.step:06d}.png")
                        save_grid(images, self.out / "samples.png")
                        Run.stepping = True
        if self.step % self.cfg.save_every:
            self.save(parts)
        Run.stepping = False
        if number := int(number) or Run.signal:
            fail(f"stopped by {signal.Signals(number).name}; --resume continues {self.out}", 128 + number)

    def batch(self, data):
        """This process's share of the step's images and labels: the next of an endless row of shuffles of the data."""
        n = len(data.train)
        B = self.cfg.batch_size
        at = torch.arange(self.rank, B, self.world) + (self.step - 1) * B
        index = torch.cat([shuffle(n, self.cfg.seed, e)[at[at // n == e] % n] for e in (at // n).unique().tolist()])
        return data.train[index].to(self.device), data.train_labels[index].to(self.device)

    def update(self, loss, model, optimizer, rate="--lr", max_norm=1.0):
        """Backward, mean over processes, clip, optimizer step. A loss or gradient that is not finite ends the run."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if self.world > 1:  # one flat all-reduce
            flat = torch.cat([grad.flatten() for grad in grads.values()])
            dist.all_reduce(flat)
            for grad, mean in zip(grads.values(), flat.split([g.numel() for g in grads.values()]), strict=True):
                grad.copy_(mean.view_as(grad) / self.world)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm(grads.values())
        if not loss.isfinite() or not norm.isfinite() and self.scaler.get_scale() <= 1:  # fp16 first tries smaller scales
            bad = next((f"first bad gradient that of {name}" for name, grad in grads.items() if not grad.isfinite().all()),
                       f"gradient norm {norm.item()}, though each gradient is finite")
            fail(f"step {self.step}: loss {loss.item()}, {bad}; {self.out / 'checkpoint.pt'} is the last good checkpoint, "
                 f"a smaller {rate} may help", 1)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def log(self, **metrics):
        """Average metrics, the loss among them, over steps and processes: a line of metrics.jsonl every --log-every steps."""
        if self.sums.keys() - {"count"} != metrics.keys():  # another stage of training
            self.sums.clear()
        self.sums.update({name: torch.as_tensor(value).detach() for name, value in metrics.items()} | {"count": 1})
        if self.step % self.cfg.log_every == 0:
            means = {name: float(total) / self.sums["count"] for name, total in self.sums.items() if name != "count"}
            self.sums.clear()
            if self.world > 1:
                total = torch.tensor(list(means.values()), dtype=torch.float64, device=self.device)
                dist.all_reduce(total)
                means = dict(zip(means, (total / self.world).tolist(), strict=True))
            self.write_metrics(**means)
            rate = self.step / max(self.seconds, 1e-9)
            self.bar.set_postfix_str(f"step {self.step} loss {means['loss']:.4f} {rate:.1f} steps/s", refresh=False)

    def write_metrics(self, final=False, **metrics):
        """Append a line to metrics.jsonl. What is not finite becomes null, and ends the program where it is a test figure."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        line = {"step": self.step, "seconds": round(self.seconds, 3)} | metrics | dict.fromkeys(bad)
        path = self.out / "metrics.jsonl"
        try:
            with open(path if self.rank == 0 else os.devnull, "a+b") as f:
                f.seek(max(f.tell() - 1, 0))
                torn = f.read() not in (b"", b"\n")  # the last line was cut short
                f.write(b"\n" * torn + json.dumps(line | {"final": True} if final else line).encode() + b"\n")
                self.log_size = f.tell()
        except OSError as e:
            fail(f"cannot write {path}: {e.strerror or e}", 1)
        if final and bad:
            fail(f"test figures that are not finite: {', '.join(bad)}", 1)

    def write_samples(self, images, labels=None, how=""):
        """samples.npz, with labels (N,) where there are classes, and samples.png: a grid of the first 80."""
        save_images(images, self.folder / "samples.npz", labels if self.classes else None, how)
        save_grid(images[:80], self.folder / "samples.png", what=f"the first {min(len(images), 80)} of them")


# ======== end of the plumbing ========================================================================================


def choose(cfg, H, W):
    """cfg, with what the loss and the size of the images decide where the command line left it open."""
    if cfg.patch == 0:
        cfg.patch = 1 if min(H, W) < 16 else 2
    gamma = 0.5 if cfg.loss == "relativistic" else 0.0
    cfg.r1 = gamma if cfg.r1 is None else cfg.r1
    cfg.r2 = gamma if cfg.r2 is None else cfg.r2
    return cfg


def build(shape, classes, cfg):
    """Generator and discriminator for images of this shape (C,H,W), with the weights that --seed draws."""
    choose(cfg, *shape[1:])
    G = Generator(*shape, classes, cfg).to(memory_format=torch.channels_last)
    D = Discriminator(*shape, classes, cfg).to(memory_format=torch.channels_last)
    return G, D


def load(folder, device="cpu"):
    """The averaged generator of the run in a folder, its discriminator and its config.

        G, D, cfg = gan.load("runs/gan-digits")
        x = gan.sample(G, torch.randn(80, cfg.z_dim), torch.arange(80) % 10)
        gan.save_grid(gan.to_uint8(x), "samples.png")
    """
    cfg, saved = read_run(folder)
    G, D = build(saved["facts"]["shape"], saved["facts"]["classes"], cfg)
    restore({"ema_generator": G, "discriminator": D}, saved, folder)
    G, D = (network.to(device).eval().requires_grad_(False) for network in (G, D))
    return G, D, cfg


def main(argv=None):
    cfg, saved = parse_args(argv)
    run = Run(cfg, saved)
    if cfg.mode != "sample":
        stacked = cfg.dataset == "stacked_mnist"
        data = load_data("mnist" if stacked else cfg.dataset, cfg.data_dir, cfg.image_size)
        data = run.describe(stack(data) if stacked else data, cfg.labels)
    if cfg.mode == "train":
        train(data, cfg, run)
    if run.rank > 0:
        return
    G, D, _ = load(cfg.out, run.device)
    if cfg.mode != "sample":
        metrics = evaluate(G, D, data, cfg, run)
        run.write_metrics(final=True, **metrics)
        shares = (metrics["test_diversity"], metrics["test_feature_diversity"])
        print(f"on {run.tested}, at most 1,000: samples have {shares[0]:.0%} of their diversity, in D's features "
              f"{shares[1]:.0%}; D scores train images {metrics['test_d_train']:.2f}, test images "
              f"{metrics['test_d_test']:.2f}, samples {metrics['test_d_fake']:.2f}; tools/evaluate.py gives a distance")
        if min(shares) < COLLAPSED:
            print("WARNING: the generator has dropped modes")
    if cfg.mode != "eval":
        labels = run.labels(cfg.num_samples)
        run.write_samples(generate(G, labels, cfg, run), labels)
        save_grid(interpolations(G, cfg, run), run.folder / "interpolations.png",
                  what="each row leads from one noise vector to another, within a class")


if __name__ == "__main__":
    launch(main)
