"""Generative adversarial networks: a generator G learns to fool a discriminator D, which learns to tell its images from data.

The weakness: the two do not descend on anything together. They may cycle for ever, one may outrun the other, and G may fall
onto a few images (dropped modes), while no loss shows it. The remedy shown here is R3GAN's: a relativistic loss, which asks
D only that a real image scores higher than the fake it is paired with, so that G cannot win by a few images far from the
rest; and penalties on D's gradient at real and at fake images (R1, R2), with which training converges locally. The classical
losses are flags, and the page shows how each fares. A detector warns with the step when the samples' diversity falls.

Papers: GAN (Goodfellow 2014), relativistic pairing (Jolicoeur-Martineau 2019), R1 and R2, Dirac-GAN (Mescheder 2018), R3GAN
(Huang 2024), WGAN-GP (Gulrajani 2017), hinge (Miyato 2018), spectral norm (Miyato 2018), projection (Miyato and Koyama 2018).
  losses of D and G ........................ LOSSES                  R3GAN eq. 2, GAN eq. 1, WGAN-GP eq. 3
  zero-centred gradient penalties .......... gradient_penalty        Mescheder eqs. 9 and 10
  WGAN's penalty ........................... wgan_penalty            WGAN-GP eq. 3
  class-conditional D ...................... Discriminator           projection eq. 3
  step of D, step of G ..................... loss_d, loss_g          GAN alg. 1

  python gan.py                                                             # digits
  python gan.py --dataset mnist --minutes 10                                # MNIST on two CPU cores
  python gan.py --dataset mnist --loss wgan-gp --out runs/gan-wgan
The second, with --num-samples 10000, gives a Frechet distance of 0.14 on two Zen 5 cores, where real test images have 0.04.
All results: docs/gan.md
"""

import copy
import math
from dataclasses import dataclass, replace
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


@dataclass
class Config:
    # the core, the same in all six scripts
    mode: Literal["train", "eval", "sample"] = "train"  # train (evaluates and samples at the end), eval or sample alone
    dataset: str = "digits"  # digits, mnist, fashion_mnist, cifar10, stacked_mnist or a folder of images
    data_dir: str = "data"  # folder where data sets are looked for, and downloaded to
    image_size: int = 0  # resize images to this many pixels a side, 0 leaves them as they are (>= 0)
    steps: int | None = None  # optimizer steps, 2000 where --minutes is not given either (> 0)
    minutes: float | None = None  # stop by the clock after this many minutes of training (> 0)
    batch_size: int = 64  # images a step, over all processes (> 0)
    lr: float = 2e-3  # learning rate of Adam (> 0)
    seed: int = 0  # seed of everything random (0 to 4294967295)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    amp: Literal["off", "bf16", "fp16"] = "off"  # mixed precision
    compile: bool = False  # torch.compile the network
    kernels: Literal["auto", "torch", "triton"] = "auto"  # fused kernels or plain PyTorch
    out: str | None = None  # run directory, runs/<script>-<dataset> where not given
    resume: bool = False  # continue the run in --out from its last checkpoint
    overwrite: bool = False  # start anew in an --out that holds a run already
    num_samples: int = 80  # images to write to samples.npz (> 0)
    ema: float = 0.15  # share of the run so far over which the weights are averaged that are evaluated and sampled (> 0)
    log_every: int = 50  # steps between lines of metrics.jsonl (> 0)
    save_every: int = 1000  # steps between checkpoints and sample grids (> 0)
    # the model
    loss: Literal["relativistic", "nonsaturating", "hinge", "wgan-gp", "minimax"] = "relativistic"  # row of LOSSES
    r1: float | None = None  # weight of the gradient penalty at real images; 0.5 for relativistic, else 0 (>= 0)
    r2: float | None = None  # weight of the gradient penalty at fake images; 0.5 for relativistic, else 0 (>= 0)
    anneal: int = 1000  # steps in which what those weights have above their value, nine times it at first, falls to 1/e (> 0)
    spectral_norm: bool = False  # D's convolutions and linear layers have norm 1
    z_dim: int = 64  # numbers that G makes an image of (> 0)
    patch: int = 0  # pixels a side folded into channels at the door; 0: 1 below 16 pixels, else 2 (>= 0)
    width: int = 32  # channels of both networks (> 0)
    halvings: int = 0  # how often G doubles and D halves the image; 0: until a side has 4 or fewer positions (>= 0)
    blocks: int = 1  # residual blocks a resolution (> 0)
    labels: bool = True  # condition G and D on the class
    warmup: int = 100  # steps of linear warm-up of the learning rate (>= 0)
    decay: int = 2000  # steps after which the learning rate falls as 1 / sqrt(step) (> 0)
    # sampling: free to change on a trained model
    truncation: float = 1.0  # factor of the noise, less is nearer to the mean image (> 0)
    label: int | None = None  # sample this class only, else all in turn (>= 0)


# ---- the model


class BiasAct(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return bias_act(x, self.bias)


class ResBlock(nn.Module):
    """No normalisation: the residual branch starts small instead (as in Fixup and R3GAN), but for --spectral-norm."""

    def __init__(self, width, norm):
        super().__init__()
        self.act1, self.conv1 = BiasAct(width), norm(conv(width, width))
        self.act2, self.conv2 = BiasAct(width), norm(conv(width, width, 0.1))

    def forward(self, x):
        return x + self.conv2(self.act2(self.conv1(self.act1(x))))


def residual(cfg, norm):
    return nn.Sequential(*(ResBlock(cfg.width, norm) for _ in range(cfg.blocks)))


def conv(c_in, c_out, gain=1.0, kernel=3):
    """A convolution that keeps the second moment of its input, times gain^2."""
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(layer.weight, std=gain / (c_in * kernel**2) ** 0.5)
    return layer


def resolutions(H, W, halvings):
    """Sizes from the whole image down, each half of the one before, rounded up."""
    return [(-(-H // 2**i), -(-W // 2**i)) for i in range(halvings + 1)]


class Generator(nn.Module):
    """z (B,z_dim), N(0, 1), and y (B,) -> x (B,C,H,W), about [-1,1]. Any size: what does not fit a patch is cropped."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        w, self.patch, self.size = cfg.width, cfg.patch, (H, W)
        self.sizes = resolutions(-(-H // cfg.patch), -(-W // cfg.patch), cfg.halvings)[::-1]
        self.label = nn.Embedding(max(classes, 1), cfg.z_dim)
        self.first = nn.Linear(2 * cfg.z_dim, w * math.prod(self.sizes[0]))
        self.levels = nn.ModuleList(residual(cfg, nn.Identity()) for _ in self.sizes)
        self.act, self.out = BiasAct(w), conv(w, channels * cfg.patch**2, kernel=1)

    def forward(self, z, y):
        h = self.first(torch.cat([z, self.label(y)], 1)).unflatten(1, (*self.sizes[0], -1)).permute(0, 3, 1, 2)
        for size, level in zip(self.sizes, self.levels, strict=True):
            h = level(h if h.shape[2:] == size else F.interpolate(h, size, mode="bilinear"))  # (B, width, *size)
        H, W = self.size
        return F.pixel_shuffle(self.out(self.act(h)), self.patch)[..., :H, :W]


class Discriminator(nn.Module):
    """x (B,C,H,W) and y (B,) -> scores (B,): how real, given the class (by projection onto the class's vector)."""

    def __init__(self, channels, H, W, classes, cfg):
        super().__init__()
        w, self.patch = cfg.width, cfg.patch
        norm = spectral_norm if cfg.spectral_norm else nn.Identity()
        self.sizes = resolutions(-(-H // cfg.patch), -(-W // cfg.patch), cfg.halvings)
        self.stem = norm(conv(channels * cfg.patch**2, w, kernel=1))
        self.levels = nn.ModuleList(residual(cfg, norm) for _ in self.sizes)
        self.act, self.last = BiasAct(w), norm(nn.Linear(w * math.prod(self.sizes[-1]), w))
        self.act_last, self.out, self.label = BiasAct(w), norm(nn.Linear(w, 1)), nn.Embedding(max(classes, 1), w)

    def features(self, x):
        """(B,width), what the score is a linear function of."""
        H, W = x.shape[2:]
        h = self.stem(F.pixel_unshuffle(F.pad(x, (0, -W % self.patch, 0, -H % self.patch)), self.patch))
        for size, level in zip(self.sizes, self.levels, strict=True):
            h = level(h if h.shape[2:] == size else F.interpolate(h, size, mode="bilinear"))
        return self.act_last(self.last(self.act(h).permute(0, 2, 3, 1).flatten(1)))

    def score(self, h, y):
        return self.out(h)[:, 0] + (h * self.label(y)).sum(1) / h.shape[1] ** 0.5

    def forward(self, x, y):
        return self.score(self.features(x), y)


# ---- the maths

LOSSES = {  # --loss: (of D, of G), functions of the scores of real and fake images, (B,) -> (B,)
    "relativistic": (lambda real, fake: F.softplus(fake - real), lambda real, fake: F.softplus(real - fake)),
    "nonsaturating": (lambda real, fake: F.softplus(-real) + F.softplus(fake), lambda real, fake: F.softplus(-fake)),
    "minimax": (lambda real, fake: F.softplus(-real) + F.softplus(fake), lambda real, fake: -F.softplus(fake)),
    "hinge": (lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda real, fake: -fake),
    "wgan-gp": (lambda real, fake: fake - real, lambda real, fake: -fake),
}


def gradient_penalty(scores, x):
    """Squared norm of D's gradient at each image, over all of C, H and W. scores (B,) of x (B,C,H,W) -> (B,)."""
    (grad,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return grad.square().sum((1, 2, 3))


def wgan_penalty(D, real, fake, y):
    """(norm of D's gradient - 1)^2 on the line between a real and a fake image, one place for each pair. -> (B,)"""
    w = torch.rand(len(real), 1, 1, 1, device=real.device, dtype=real.dtype)
    x = torch.lerp(real, fake, w).requires_grad_()
    return ((gradient_penalty(D(x, y), x) + 1e-12).sqrt() - 1) ** 2


def penalty_weight(weight, step, cfg):
    """Ten times --r1 or --r2 at first, falling to it."""
    return weight * (1 + 9 * math.exp(-step / cfg.anneal))


def loss_d(G, D, real, y, z, step, cfg):
    """What D minimises, (B,), and its terms. real (B,C,H,W) in [-1,1], z (B,z_dim). G is left alone."""
    with torch.no_grad():
        fake = G(z, y).to(real.dtype)  # penalties are taken in float32, whatever --amp
    real, fake = real.detach().requires_grad_(), fake.requires_grad_()
    s_real, s_fake = D(real, y), D(fake, y)
    terms = {"d_real": s_real, "d_fake": s_fake, "gap": s_real - s_fake}
    total = LOSSES[cfg.loss][0](s_real, s_fake)
    for name, weight, scores, x in (("r1", cfg.r1, s_real, real), ("r2", cfg.r2, s_fake, fake)):
        if weight:
            terms[name] = gradient_penalty(scores, x)
            total = total + 0.5 * penalty_weight(weight, step, cfg) * terms[name]
    if cfg.loss == "wgan-gp":
        terms["gp"] = wgan_penalty(D, real.detach(), fake.detach(), y)
        total = total + 10 * terms["gp"]
    return total, terms


def loss_g(G, D, real, y, z, cfg):
    """What G minimises, (B,). D is left alone."""
    s_fake = D(G(z, y), y)
    s_real = D(real, y) if cfg.loss == "relativistic" else None
    return LOSSES[cfg.loss][1](s_real, s_fake)


@torch.no_grad()
def sample(G, z, y, truncation=1.0):
    """Images (B,C,H,W) in [-1,1] of noise z (B,z_dim), N(0, 1)."""
    return G(truncation * z, y).clamp(-1, 1)


def diversity(x):
    """Mean distance between two of n vectors or images, divided by what one has from 0. x (n,...) -> a number, 0 for n = 1."""
    x = x.flatten(1).float().cpu()  # pdist is not there on MPS
    return (torch.pdist(x).mean() / x.norm(dim=1).mean().clamp(min=1e-6)).item() if len(x) > 1 else 0.0


@torch.no_grad()
def shares(D, fake, real):
    """The diversity of fake images over that of real ones, (n,C,H,W) in [-1,1], in pixels and in D's features."""
    training = D.training
    D.eval()
    spread = [(diversity(x + 1), diversity(torch.cat([D.features(part) for part in x.split(at_once(x[0].shape))])))
              for x in (fake, real)]
    D.train(training)
    return [f / r if r else 1.0 for f, r in zip(*spread, strict=True)]  # of one real image there is nothing to compare with


# ---- the loops

# What may differ from the checkpoint when it is resumed, evaluated or sampled from; the rest is the run's own.
FREE = """mode data_dir steps minutes device amp compile kernels out resume overwrite num_samples log_every save_every
    truncation label""".split()

COLLAPSED = 0.5  # share of the data's diversity below which the samples' is called collapsed


def choose(cfg, H, W):
    """cfg, with what the loss and the size of the images decide where nothing was said."""
    cfg.patch = cfg.patch or (1 if min(H, W) < 16 else 2)
    side = -(-min(H, W) // cfg.patch)
    cfg.halvings = cfg.halvings or max(math.ceil(math.log2(side / 4)), 0)
    if 2**cfg.halvings > side:
        raise ValueError(f"--halvings {cfg.halvings}: {side} positions a side cannot be halved so often")
    default = 0.5 if cfg.loss == "relativistic" else 0.0
    cfg.r1, cfg.r2 = (default if r is None else r for r in (cfg.r1, cfg.r2))
    return cfg


def stack(data):
    """Three digits as the channels of one image, drawn once for each image: 1,000 modes, taken as unlabelled."""
    rng = np.random.default_rng(0)
    parts = []
    for images in (data.train, data.test):
        index = torch.from_numpy(rng.integers(len(images), size=(3, len(images))))
        parts += [torch.cat([images[i] for i in index], 1), torch.zeros(len(images), dtype=torch.long)]
    return Data(*parts, 0)


def to_uint8(x):
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().cpu()


@torch.no_grad()
def update_ema(ema, model, step, share):
    """Average the weights with the power profile of Karras et al. 2024, eq. 127, whose width grows with the run."""
    decay = (1 - 1 / (step + 1)) ** (1 / share)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def train(G, D, ema, data, cfg, run):
    """A step of D, then one of G. No schedule knows when the run will end, so it may be stopped, or continued, at any step."""
    optimizers = [torch.optim.Adam(net.parameters(), cfg.lr, (0.0, 0.99), fused=True) for net in (D, G)]
    parts = {"generator": G, "discriminator": D, "ema": ema, "optimizer_d": optimizers[0], "optimizer_g": optimizers[1]}
    run.begin(parts)
    fast_g, fast_d = (torch.compile(net) if cfg.compile else net for net in (G, D))
    twice = D if cfg.r1 or cfg.r2 or cfg.loss == "wgan-gp" else fast_d  # penalties differentiate twice, compiled code does not
    fixed = torch.randn(64, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    labels = torch.arange(64, device=run.device) % max(data.classes, 1)
    real, now = data.train[:64].to(run.device) / 127.5 - 1, None
    for step in run.steps():
        if now is None or step % cfg.log_every == 0:
            last, now = now or (0, 0), shares(D, sample(ema, fixed, labels), real)
            for before, share, where in zip(last, now, ("", " in D's features"), strict=True):
                if before >= COLLAPSED > share and run.rank == 0:
                    words = f"warning: step {step}: the samples' diversity{where} fell to {100 * share:.0f} % of the data's"
                    run.bar.write(words, file=sys.stderr)
        x, y = run.batch(data)
        x = x / 127.5 - 1
        lr = cfg.lr * min(1, (step + 1) / (cfg.warmup + 1), (cfg.decay / (step + 1)) ** 0.5)
        optimizers[0].param_groups[0]["lr"] = optimizers[1].param_groups[0]["lr"] = lr
        with run.autocast():
            total, terms = loss_d(fast_g, twice, x, y, torch.randn(len(x), cfg.z_dim, device=x.device), step, cfg)
            total = total.mean()
        norm_d = run.update(total, D, optimizers[0])
        D.requires_grad_(False)
        with run.autocast():
            loss = loss_g(fast_g, fast_d, x, y, torch.randn(len(x), cfg.z_dim, device=x.device), cfg).mean()
        norm_g = run.update(loss, G, optimizers[1])
        D.requires_grad_(True)
        update_ema(ema, G, step, cfg.ema)
        run.log(loss=loss, loss_d=total, **{name: term.mean() for name, term in terms.items()}, grad_norm_d=norm_d,
                grad_norm_g=norm_g, diversity=now[0], feature_diversity=now[1], lr=lr)
        if run.step % cfg.save_every == 0:
            run.save(parts)
            run.show(generate(ema, 80, data.classes, cfg, run)[0])
    run.save(parts)
    run.check()


@torch.no_grad()
def evaluate(ema, D, data, cfg, run):
    """Of as many samples as test images, at most 1,000: diversity over that of test images, in pixels and in D's features;
    D's scores of train, test and sampled images (train far above test: D knows its images by heart)."""
    n = min(len(data.test), 1000)
    images, labels = generate(ema, n, data.classes, replace(cfg, label=None), run)
    sets = {"train": (data.train[:n], data.train_labels[:n]), "test": (data.test[:n], data.test_labels[:n]),
            "fake": (images, labels)}
    sets = {name: (x.to(run.device) / 127.5 - 1, y.to(run.device)) for name, (x, y) in sets.items()}
    pixels, features = shares(D, sets["fake"][0], sets["test"][0])
    size = at_once(images[0].shape)
    scores = {f"test_d_{name}": torch.cat(list(map(D, x.split(size), y.split(size)))).mean().item()
              for name, (x, y) in sets.items()}
    return {"test_diversity": pixels, "test_feature_diversity": features} | scores


def generate(ema, n, classes, cfg, run):
    """n images (n,C,H,W) uint8 and labels (n,), from the averaged generator and the noise of --seed."""
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.arange(n) % max(classes, 1) if cfg.label is None else torch.full((n,), cfg.label)
    images = []
    for y in labels.split(at_once((3, *ema.size))):
        run.check()
        z = torch.randn(len(y), cfg.z_dim, generator=generator).to(run.device)
        images.append(to_uint8(sample(ema, z, y.to(run.device), cfg.truncation)))
    return torch.cat(images), labels


def show_interpolations(ema, classes, cfg, run):
    """interpolations.png: a row a pair of noise vectors, on the arc between them, one class a row."""
    z = torch.randn(2, 10, 1, cfg.z_dim, generator=torch.Generator().manual_seed(cfg.seed)).to(run.device)
    angle = torch.linspace(0, math.pi / 2, 10, device=run.device)[:, None]
    z = torch.cos(angle) * z[0] + torch.sin(angle) * z[1]  # (10, 10, z_dim), N(0, 1) all the way
    y = (torch.arange(10, device=run.device) % max(classes, 1)).repeat_interleave(10)
    save_grid(to_uint8(sample(ema, z.flatten(0, 1), y, cfg.truncation)), run.out / "interpolations.png", 10)


# ======== plumbing, byte-identical in all six scripts (python tools/sync.py): nothing about the model is in it ========

import argparse
import collections
import contextlib
import dataclasses
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
import urllib.request
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn, get_args, get_origin

import torch.distributed as dist
from PIL import ImageOps
from tqdm import tqdm

MIRRORS = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": ("https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                      "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
SHA256 = {  # of the decompressed files, of the archive itself for cifar10
    "mnist": {"train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
              "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
              "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
              "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"},
    "fashion_mnist": {"train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                      "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                      "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                      "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"},
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
}
TIMEOUT = 20  # seconds a mirror may stay silent


class Data(NamedTuple):
    """Images (N,C,H,W) uint8 and labels (N,) int64, which are all 0 where there are no classes."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: int  # 0 where there are no labels


def at_once(shape, values=3072):
    """Images (C,H,W) to evaluate or sample at once, whatever --batch-size is: 250, fewer where they have more values."""
    return max(min(250, 250 * values // math.prod(shape)), 1)


def fail(message, code=2) -> NoReturn:
    print("error:", *message.split(), file=sys.stderr)  # one line, whatever an exception's text holds
    raise SystemExit(code)


def fetch(name, file, data_dir):
    """The content of one file of a data set, checked by SHA-256: from --data-dir, Debian's folder or the first good mirror."""
    folder, packed, tried = Path(data_dir) / name, file if file.endswith(".tar.gz") else f"{file}.gz", []
    folders = [folder] + [Path("/usr/share/datasets/fashion-mnist")] * (name == "fashion_mnist")
    places = [place / f for place in folders for f in dict.fromkeys((packed, file)) if (place / f).exists()]
    for source in [*places, *(mirror + packed for mirror in MIRRORS[name])]:
        try:
            if source in places:
                raw = source.read_bytes()
            else:
                with (urllib.request.urlopen(source, timeout=TIMEOUT) as response,
                      tqdm.wrapattr(response, "read", response.length, desc=packed, disable=None) as stream):
                    raw = b"".join(iter(lambda: stream.read(1 << 16), b""))
            content = gzip.decompress(raw) if str(source).endswith(f"{file}.gz") else raw
            if hashlib.sha256(content).hexdigest() != SHA256[name][file]:
                raise ValueError("wrong SHA-256")
            if source not in places:
                write(folder / packed, lambda f, raw=raw: f.write(raw))
            return content
        except Exception as e:  # whatever a mirror sends, or a disk holds: the next may be good
            tried.append(f"{source} ({e or type(e).__name__})")
    fail(f"no good copy of {folder / packed}: tried {', '.join(tried)}; put it there, or use --dataset digits (no network)", 1)


def load_folder(root, size):
    """A folder of images, else its subfolders as classes; every tenth image by name is held out as the test split.

    Grey only where all are grey, else RGB; transparency is laid over white. Each image is scaled to cover size x size, or
    the commonest size where size is 0, and cropped at the centre. What cannot be read is named and skipped.
    """
    known, images, broken = Image.registered_extensions(), {}, []
    for path in sorted(p for p in (*root.glob("*"), *root.glob("*/*")) if p.suffix.lower() in known and p.is_file()):
        try:
            with Image.open(path) as image:
                if image.mode.startswith("I"):  # 16 bits a pixel
                    image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
                if "A" in image.getbands() or "transparency" in image.info:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                image = image.convert("L" if image.mode in ("1", "L") else "RGB")
                images[path] = ImageOps.fit(image, (size, size)) if size else image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            broken.append(f"{path} ({e})")
    if broken:
        print(f"skipped {len(broken)} broken images: {'; '.join(broken)}", file=sys.stderr)
    if len(images) < 2:
        fail(f"--dataset {root}: {len(images)} readable images in it or in its subfolders, at least 2 are needed")
    folders = sorted({path.parent for path in images})
    if root in folders[:-1]:
        fail(f"--dataset {root}: holds images as well as subfolders of images; move either away")
    target = collections.Counter(image.size for image in images.values()).most_common(1)[0][0]
    mode = "L" if all(image.mode == "L" for image in images.values()) else "RGB"
    x = np.stack([np.atleast_3d(np.asarray(ImageOps.fit(image.convert(mode), target))) for image in images.values()])
    x, held = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.arange(len(x)) % 10 == 1
    y = torch.tensor([folders.index(path.parent) for path in images])
    mixed = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))  # so that the first n are of all classes
    x, y, held = x[mixed], y[mixed], held[mixed]
    return Data(x[~held], y[~held], x[held], y[held], 0 if root in folders else len(folders))


def load_data(name, data_dir, image_size=0) -> Data:
    """digits, mnist, fashion_mnist, cifar10 or a folder of images, whole in memory."""
    if name == "digits":
        from sklearn.datasets import load_digits

        digits, order = load_digits(), np.random.RandomState(0).permutation(1797)
        x, y = np.round(digits.images[order, None] * 255 / 16).astype(np.uint8), digits.target[order]
        parts = x[297:], y[297:], x[:297], y[:297]
    elif name in ("mnist", "fashion_mnist"):
        raw = [np.frombuffer(fetch(name, file, data_dir), np.uint8) for file in SHA256[name]]
        parts = [r[8:] if i % 2 else r[16:].reshape(-1, 1, 28, 28) for i, r in enumerate(raw)]
    elif name == "cifar10":
        archive = tarfile.open(fileobj=io.BytesIO(fetch(name, "cifar-10-binary.tar.gz", data_dir)))
        files = sorted(f for f in archive.getnames() if f.endswith(".bin"))  # data_batch_1 to 5, test_batch
        rows = np.frombuffer(b"".join(archive.extractfile(f).read() for f in files), np.uint8).reshape(-1, 3073)
        x, y = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
        parts = x[:50_000], y[:50_000], x[50_000:], y[50_000:]
    elif Path(name).is_dir():
        return load_folder(Path(name), image_size)
    else:
        fail(f"--dataset {name}: neither digits, mnist, fashion_mnist nor cifar10, nor a folder")
    x, y, x_test, y_test = (torch.tensor(p) for p in parts)
    if image_size and x.shape[-2:] != (image_size, image_size):
        x, x_test = (F.interpolate(part, (image_size, image_size), mode="bilinear", antialias=True) for part in (x, x_test))
    return Data(x, y.long(), x_test, y_test.long(), 10)


def parse_args(config_class, argv=None):
    """The command line built from the dataclass: a flag a field, its comment as help -> the config, the names given.

    A bound in the comment, (> 0), (>= 0) or (0 to 1), is checked. Whatever is wrong is one line and exit code 2.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[config_class.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists every flag)")
    for field in dataclasses.fields(config_class):
        kind, origin = (*get_args(field.type), field.type)[0], get_origin(field.type)
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": get_args(field.type)} if origin is Literal else
                   {"type": kind, "metavar": kind.__name__, "nargs": "+" if origin is tuple else None})
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for name, value in given.items():
        if bound := re.search(r"\((>=?)? ?([\d.]+)(?: to ([\d.]+))?\)", comments[name]):
            sign, low, high = bound[1], float(bound[2]), float(bound[3] or sys.float_info.max)
            for v in value if isinstance(value, tuple) else (value,):
                if not low <= v <= high or sign == ">" and v == low:
                    parser.error(f"argument --{name.replace('_', '-')}: {v}: must be {bound[0][1:-1]}")
    return config_class(**given), set(given)


def set_up(cfg):
    """The device, this process's rank and the number of processes (torchrun's); kernels.mode from --kernels."""
    rank, local, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    kind = there[0] if cfg.device == "auto" else cfg.device
    if kind not in there:
        fail(f"--device {kind}: not available here, there is {', '.join(there)}")
    if cfg.batch_size % world:
        fail(f"--batch-size {cfg.batch_size}: cannot be split over {world} processes")
    mode = os.environ.get("M2_KERNELS", "auto") if cfg.kernels == "auto" else cfg.kernels
    try:
        import kernels
        runs, why = kernels.available(kind)  # PyPI's unrelated package of this name has none
        kernels.mode = mode
    except (ImportError, AttributeError):
        runs, why = False, "the folder kernels/ is not beside this script"
    if mode not in ("auto", "torch", "triton") or mode == "triton" and not runs:
        fail(f"--kernels {mode}: {why if mode == 'triton' else 'M2_KERNELS must be auto, torch or triton'}")
    if world > 1 and not dist.is_initialized():
        torch.cuda.set_device(local) if kind == "cuda" else None
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return torch.device(f"cuda:{local}" if kind == "cuda" else kind), rank, world


def write(path, save):
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


def save_grid(images, path, columns):
    """Images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged."""
    rows = F.pad(images.cpu(), (1, 1, 1, 1, 0, 0, 0, -len(images) % columns)).unflatten(0, (-1, columns))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(-1)  # (rows*(H+2), columns*(W+2)[, C])
    image = ImageOps.scale(Image.fromarray(grid.numpy()), max(1, 56 // max(images.shape[2:])), Image.NEAREST)
    write(path, lambda f: image.save(f, "png"))


@lru_cache(maxsize=4)
def shuffle(n, seed, epoch):
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class Run:
    """One run: its directory, checkpoint, log, progress bar, budget and stop signals. Only rank 0 writes.

    Everything random in a step follows from (seed, step, rank), so that the step stands for all states of generators.
    """

    def __init__(self, cfg, given, free):
        self.cfg, self.script, self.signal, self.saved = cfg, Path(__file__).stem, 0, {}
        cfg.out = cfg.out or f"runs/{self.script}-{Path(cfg.dataset).name}"
        self.out, self.path, self.metrics = Path(cfg.out), Path(cfg.out) / "checkpoint.pt", Path(cfg.out) / "metrics.jsonl"
        if cfg.resume or cfg.mode != "train":
            self.load()
            given = given | {"mode", "out", "resume", "overwrite"}
            given |= {"steps", "minutes"} if {"steps", "minutes"} & given else set()
            for name, value in self.saved["config"].items():
                if name not in given:
                    setattr(cfg, name, value)
                elif name not in free and getattr(cfg, name) != value:
                    fail(f"--{name.replace('_', '-')} {getattr(cfg, name)}: the run in {self.path} has {value}")
        elif self.out.is_dir() and any(self.out.iterdir()) and not cfg.overwrite:
            fail(f"--out {self.out}: is not empty; --resume continues a run, --overwrite replaces it")
        self.step, self.seconds, self.facts = (self.saved.get(name, 0) for name in ("step", "seconds", "facts"))
        self.device, self.rank, self.world = set_up(cfg)
        self.scaler, self.sums = torch.amp.GradScaler(self.device.type, enabled=cfg.amp == "fp16"), collections.Counter()
        dtype = torch.float16 if cfg.amp == "fp16" else torch.bfloat16
        self.autocast = partial(torch.autocast, self.device.type, dtype, enabled=cfg.amp != "off")

    def load(self):
        try:
            saved = self.saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            fail(f"--out {self.out}: there is no checkpoint.pt in it")
        except Exception as e:  # whatever a damaged or hostile file raises: nothing in it is run
            fail(f"{self.path}: not a whole checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:80]})")
        if not isinstance(saved, dict) or saved.get("format") != 1 or not {"script", "config", "step", "facts"} <= saved.keys():
            fail(f"{self.path}: not a checkpoint of a run in format 1 (weights alone, or another version)")
        if saved["script"] != self.script:
            fail(f"{self.path}: is a checkpoint of {saved['script']}.py, not of {self.script}.py")
        if fields := saved["config"].keys() ^ {f.name for f in dataclasses.fields(self.cfg)}:
            fail(f"{self.path}: of another version, whose config differs in {', '.join(sorted(fields))}")

    def describe(self, data):
        """Note what the data is; a checkpoint of other data is refused."""
        self.facts = {"shape": list(data.train.shape[1:]), "classes": data.classes, "train_images": len(data.train)}
        if self.saved and self.saved["facts"] != self.facts:
            fail(f"--dataset {self.cfg.dataset}: is {self.facts}, the run in {self.path} had {self.saved['facts']}")

    def restore(self, parts):
        """Load each named part from the checkpoint, if there is one, and from now on catch stop signals."""
        for name, part in parts.items() if self.saved else ():
            if name not in self.saved:
                fail(f"{self.path}: holds no {name}")
            part.load_state_dict(self.saved[name])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def begin(self, parts):
        """Restore, lay out the directory and save once: what cannot be written is found before any training."""
        self.restore(parts | {"scaler": self.scaler})
        if self.rank == 0:
            lines = [m for m in self.read_metrics() if m["step"] <= self.step and "final" not in m] if self.saved else []
            for old in () if self.saved else self.out.glob("samples/step_*.png"):
                old.unlink()
            write(self.metrics, lambda f: f.write("".join(json.dumps(m) + "\n" for m in lines).encode()))
            write(self.out / "config.json", lambda f: f.write(json.dumps(dataclasses.asdict(self.cfg), indent=1).encode()))
        self.save(parts)

    def save(self, parts):
        if self.rank == 0:
            state = {name: part.state_dict() for name, part in (parts | {"scaler": self.scaler}).items()}
            state |= {"format": 1, "script": self.script, "config": dataclasses.asdict(self.cfg), "facts": self.facts,
                      "step": self.step, "seconds": self.seconds}
            torch.save(state, buffer := io.BytesIO())
            write(self.path, lambda f: f.write(buffer.getbuffer()))

    def on_signal(self, number, frame):
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def check(self):
        """Exit if a stop signal has come; called between the batches of evaluation and sampling."""
        if self.signal:
            fail(f"stopped by {signal.Signals(self.signal).name}; --resume continues {self.out}", 128 + self.signal)

    def steps(self):
        """Yield step after step until --steps, --minutes or a stop signal; self.step counts the one under way as done."""
        start, minutes, steps = time.monotonic() - self.seconds, self.cfg.minutes or math.inf, self.cfg.steps or math.inf
        form = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}"
        with tqdm(total=100, disable=self.rank > 0 or None, desc=self.script, bar_format=form) as self.bar:
            while True:
                self.seconds = time.monotonic() - start
                if self.world > 1:  # all processes stop at the same step
                    state = torch.tensor([self.seconds, self.signal], device=self.device)
                    dist.all_reduce(state, dist.ReduceOp.MAX)
                    self.seconds, self.signal = state[0].item(), int(state[1])
                progress = max(self.step / steps, self.seconds / (60 * minutes))
                self.bar.update(100 * min(progress, 1) - self.bar.n)
                if self.signal or progress >= 1:
                    return
                torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]))
                self.step += 1
                yield self.step - 1

    def batch(self, data):
        """This process's share of the step's images and labels: the next of an endless row of shuffles of the data."""
        n, B = len(data.train), self.cfg.batch_size
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
            bad = next((name for name, grad in grads.items() if not grad.isfinite().all()), "none")
            fail(f"step {self.step}: loss {loss.item()}, first bad gradient that of {bad}; {self.path} is the last good "
                 f"checkpoint, a smaller {rate} may help", 1)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm

    def log(self, **metrics):
        """Average metrics, the loss among them, into a line of metrics.jsonl every --log-every steps."""
        self.sums.update({name: torch.as_tensor(value).detach() for name, value in metrics.items()} | {"count": 1})
        if self.step % self.cfg.log_every == 0:
            means = {name: float(total) / self.sums["count"] for name, total in self.sums.items() if name != "count"}
            self.sums.clear()
            self.write_metrics(**means)
            self.bar.set_postfix_str(f"step {self.step} loss {means['loss']:.4f} {self.step / self.seconds:.1f} steps/s")

    def read_metrics(self):
        """The lines of metrics.jsonl but those that a crash or a full disk cut short."""
        lines = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def write_metrics(self, **metrics):
        if self.rank == 0:
            try:
                with open(self.metrics, "a") as f:
                    f.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 3)} | metrics) + "\n")
            except OSError as e:
                fail(f"cannot write {self.metrics}: {e.strerror or e}", 1)

    def show(self, images):
        """The newest grid: samples.png, and samples/ under its step."""
        for name in (f"samples/step_{self.step:06d}.png", "samples.png") if self.rank == 0 else ():
            save_grid(images, self.out / name, 10)

    def curves(self):
        """Every metric against the step, as curves.png."""
        if self.rank == 0:
            from matplotlib.figure import Figure

            lines = self.read_metrics()
            names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in ("step", "seconds")]
            figure = Figure((4 * max(len(names), 1), 3), layout="tight")
            for i, name in enumerate(names):
                axis = figure.add_subplot(1, len(names), i + 1, title=name, xlabel="step")
                axis.plot([line["step"] for line in lines if name in line], [line[name] for line in lines if name in line])
            write(self.out / "curves.png", lambda f: figure.savefig(f, format="png"))


def launch(main):
    """main(), with what the machine refuses (files, memory, kernels) said in one line."""
    try:
        main()
    except OSError as e:
        fail(f"{e.filename or Path(__file__).stem}: {e.strerror or e}", 1)
    except (MemoryError, RuntimeError) as e:
        if "kernels.mode is 'triton'" in str(e):
            fail(f"--kernels triton: {e}")
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        fail(f"out of memory, a smaller --batch-size or --width helps ({(str(e) or 'no more').splitlines()[0]})", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ======== end of the plumbing ========================================================================================


def main(argv=None):
    cfg, given = parse_args(Config, argv)
    if cfg.steps is None and cfg.minutes is None:
        cfg.steps = 2000
    run = Run(cfg, given, FREE)
    if cfg.mode != "sample":
        stacked = cfg.dataset == "stacked_mnist"
        data = load_data("mnist" if stacked else cfg.dataset, cfg.data_dir, cfg.image_size)
        data = stack(data) if stacked else data
        if not cfg.labels:
            data = data._replace(train_labels=0 * data.train_labels, test_labels=0 * data.test_labels, classes=0)
        run.describe(data)
    (C, H, W), classes = run.facts["shape"], run.facts["classes"]
    if cfg.label is not None and cfg.label >= classes:
        fail(f"--label {cfg.label}: the model knows {classes} classes")
    torch.manual_seed(cfg.seed)
    try:
        choose(cfg, H, W)
        G, D = Generator(C, H, W, classes, cfg), Discriminator(C, H, W, classes, cfg)
    except ValueError as e:
        fail(str(e))
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
    ema = copy.deepcopy(G).eval().requires_grad_(False)
    if cfg.mode == "train":
        train(G, D, ema, data, cfg, run)
        run.curves()
    else:
        run.restore({"ema": ema, "discriminator": D})
    if run.rank > 0:
        return
    if cfg.mode != "sample":
        metrics = evaluate(ema, D.eval(), data, cfg, run)
        run.write_metrics(final=True, **metrics)
        print(f"samples have {100 * metrics['test_diversity']:.0f} % of the diversity of test images, in D's features "
              f"{100 * metrics['test_feature_diversity']:.0f} %; D scores train images {metrics['test_d_train']:.2f}, test "
              f"images {metrics['test_d_test']:.2f}, samples {metrics['test_d_fake']:.2f}; tools/evaluate.py gives a distance"
              + "; WARNING: the generator has dropped modes" * (
                  min(metrics["test_diversity"], metrics["test_feature_diversity"]) < COLLAPSED))
    if cfg.mode != "eval":
        images, labels = generate(ema, cfg.num_samples, classes, cfg, run)
        arrays = {"images": images.permute(0, 2, 3, 1).numpy()} | ({"labels": labels.numpy()} if classes else {})
        write(run.out / "samples.npz", lambda f: np.savez_compressed(f, **arrays))
        save_grid(images[:80], run.out / "samples.png", 10)
        show_interpolations(ema, classes, cfg, run)
        print(f"{len(images)} samples in {run.out / 'samples.npz'}, the first of them in {run.out / 'samples.png'}")
    run.check()


if __name__ == "__main__":
    launch(main)
